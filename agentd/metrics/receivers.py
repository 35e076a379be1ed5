"""Where metrics go: a port that Prometheus asks, or an OpenTelemetry collector that is told. Both libraries are extras."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from agentd import extras
from agentd.errors import ConfigError, DaemonError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agentd.metrics.families import Family

_WAIT_S = 5.0
_FRESH_S = 0.5
_log = logging.getLogger(__name__)


class Exporter(Protocol):
    def start(self) -> None:
        """On the event loop. Raises DaemonError."""

    def stop(self) -> None:
        """Not for the event loop."""


@dataclass(slots=True)
class _OnLoop:
    """Asks the event loop, from threads of the libraries. Who asks in short order gets the same answer."""

    look: Callable[[], list[Family]]
    loop: asyncio.AbstractEventLoop | None = None
    _last: tuple[float, list[Family]] = (0.0, [])

    def __call__(self) -> list[Family]:
        at, known = self._last
        if self.loop is None or (known and time.monotonic() - at < _FRESH_S):
            return known

        async def ask() -> list[Family]:
            return self.look()

        waiting = asyncio.run_coroutine_threadsafe(ask(), self.loop)
        self._last = time.monotonic(), waiting.result(_WAIT_S)
        return self._last[1]


class _Server(ThreadingMixIn, WSGIServer):
    """Whoever hangs up, or sends junk, is no news for the log."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a request for metrics from %s failed", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Not wanted: somebody asks every few seconds."""


def _forgiving(app: Any) -> Any:
    """The library raises for headers that make no sense."""

    def answer(environ: Any, start_response: Any) -> Any:
        try:
            return app(environ, start_response)
        except Exception:
            _log.debug("a request for metrics made no sense", exc_info=True)
            start_response("400 Bad Request", [("Content-Type", "text/plain")])
            return [b"This request makes no sense.\n"]

    return answer


@dataclass(slots=True, eq=False)
class _Prometheus:
    """Answers at HOST:PORT."""

    address: str
    look: _OnLoop
    _server: Any = None

    def start(self) -> None:
        import prometheus_client  # noqa: PLC0415 - an extra

        self.look.loop = asyncio.get_running_loop()
        registry = prometheus_client.CollectorRegistry()
        registry.register(self)
        host, _, port = self.address.rpartition(":")
        try:
            app = _forgiving(prometheus_client.make_wsgi_app(registry))
            kind = _Server6 if ":" in host else _Server
            self._server = make_server(host.strip("[]"), int(port), app, kind, _Handler)
        except (OSError, ValueError, OverflowError) as e:
            message = f"[metrics] listen in agentd.toml: {self.address} can't be listened at: {str(e).rstrip('.')}."
            metadata = {"address": self.address, "key": "metrics.listen"}
            raise DaemonError(
                Reason.SOCKET_INVALID, message, hint="Choose another address or port.", metadata=metadata
            ) from None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def describe(self) -> list[object]:
        """Nothing: or it would be asked for all values when it is registered, before the loop runs on."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        for family in filter(lambda each: each.values, self.look()):
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            names = [name for name, _ in next(iter(family.values))]
            made = kind(family.name, family.help, labels=names)
            for labels, value in family.values.items():
                made.add_metric([text for _, text in labels], value)
            yield made


@dataclass(slots=True)
class _OpenTelemetry:
    """Tells a collector over OTLP (HTTP) every so often."""

    url: str
    every_s: float
    look: _OnLoop
    _provider: Any = None

    def start(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # noqa: PLC0415
        from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

        self.look.loop = asyncio.get_running_loop()
        for name in ("opentelemetry", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)  # a collector that is away is no news each time
        exporter = OTLPMetricExporter(endpoint=self.url, timeout=_WAIT_S)
        reader = PeriodicExportingMetricReader(exporter, self.every_s * 1000, _WAIT_S * 1000)
        self._provider = MeterProvider([reader], Resource.create({"service.name": "agentd"}), shutdown_on_exit=False)
        meter = self._provider.get_meter("agentd")
        for family in self.look.look():
            self._add(meter, family)

    def _add(self, meter: Any, family: Family) -> None:
        """It is asked for its values each time."""
        from opentelemetry.metrics import Observation  # noqa: PLC0415

        def values(_options: object) -> Iterable[Any]:
            with contextlib.suppress(TimeoutError, RuntimeError):  # the daemon is stopping
                for each in self.look():
                    if each.name == family.name:
                        yield from (Observation(value, dict(labels)) for labels, value in each.values.items())

        make = meter.create_observable_counter if family.kind == "counter" else meter.create_observable_gauge
        make(family.name, [values], description=family.help)

    def stop(self) -> None:
        if self._provider:
            self._provider.shutdown(timeout_millis=_WAIT_S * 1000)


def exporters(listen: str, otlp: str, every_s: float, look: Callable[[], list[Family]]) -> list[Exporter]:
    """Those that are wanted. Raises ConfigError where what they need is not installed."""
    made: list[Exporter] = []
    if listen:
        _require("metrics", "listen")
        made.append(_Prometheus(listen, _OnLoop(look)))
    if otlp:
        _require("otel", "otlp")
        made.append(_OpenTelemetry(otlp, every_s, _OnLoop(look)))
    return made


def _require(extra: str, key: str) -> None:
    if not extras.is_there(extra):
        package = extras.MODULES[extra].partition(".")[0]
        message = f"[metrics] {key} in agentd.toml needs the Python package {package}, which is not installed."
        raise ConfigError(Reason.CONFIG_INVALID, message, hint=extras.install(extra), metadata={"key": f"metrics.{key}"})
