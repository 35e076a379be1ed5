"""Metrics of a real daemon, as Prometheus and an OpenTelemetry collector get them."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, ClassVar

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from agentd.client import Client
from agentd.v1 import budget_pb2
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import QUICK, Device, seen
from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path


def asked(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_prometheus_gets_what_happened(tmp_path: Path):
    """Tokens, temperature, states and their changes, admissions, loads; and no text of people."""
    port = free_port()
    extra = QUICK + f'[metrics]\nlisten = "127.0.0.1:{port}"\n'
    with Device(tmp_path, extra=extra).made().running() as device, Client(device.socket) as client:
        list(client.run("what time is it"))
        before = asked(port)
        assert before["agentd_temperature_celsius"][("sensor", "cpu-thermal (thermal_zone0)"),] == 50
        assert before["agentd_battery_level_ratio"][()] == 0.8
        assert before["agentd_tokens_total"][("kind", "generated"),] > 5
        assert before["agentd_budget_state"][("budget", "thermal"),] == 0
        assert before["agentd_model_loads_total"][("reason", "first"),] == 1
        assert before["agentd_sensor_up"][("sensor", "temperature_c"),] == 1
        device.heat(86)
        seen(client, budget_pb2.Budgets.STATE_SHED)
        while client.status().engine_pid:
            time.sleep(0.02)
        time.sleep(0.6)
        after = asked(port)
        assert after["agentd_budget_state"][("budget", "thermal"),] == 3
        changes = after["agentd_budget_transitions_total"]
        assert changes[("budget", "thermal"), ("from", "nominal"), ("reason", "temperature"), ("to", "shed")] == 1
        assert after["agentd_model_unloads_total"][("reason", "shed"),] == 1
        assert after["agentd_budget_state_seconds_total"][("budget", "battery"), ("state", "nominal")] > 0
        admitted = ("class", "normal"), ("decision", "admitted"), ("reason", "")
        assert after["agentd_admission_total"][admitted] == 1
        assert "what time" not in str(after)


class Collector(http.server.BaseHTTPRequestHandler):
    got: ClassVar[list[ExportMetricsServiceRequest]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not wanted."""


def test_a_collector_is_told(tmp_path: Path):
    """Every second, and a collector that is not there disturbs nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    extra = f'[metrics]\notlp = "http://127.0.0.1:{server.server_port}/v1/metrics"\nevery_s = 1\n'
    with DaemonProcess(tmp_path, extra=extra).running() as daemon, Client(daemon.socket) as client:
        list(client.run("what time is it"))
        deadline = time.monotonic() + 20
        names: dict[str, float] = {}
        while names.get("agentd_tokens_total", 0) == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            for request in list(Collector.got):
                for metric in request.resource_metrics[0].scope_metrics[0].metrics:
                    points = metric.sum.data_points or metric.gauge.data_points
                    names[metric.name] = sum(point.as_double for point in points)
        assert names["agentd_tokens_total"] > 5
        assert "agentd_budget_state" in names
        server.shutdown()
        server.server_close()
        time.sleep(1.5)
        assert client.status().pid


def test_what_is_missing_or_taken_is_said(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = DaemonProcess(tmp_path, extra=f'[metrics]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        assert daemon.start(wait=False).ended() == 1
        assert "can't be listened at" in daemon.log
    code = "import sys; sys.modules['prometheus_client'] = None\nfrom agentd.metrics import exporters\nexporters('x:1', '', 60, list)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "which is not installed" in done.stderr
