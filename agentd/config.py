"""The configuration: `agentd.toml`, read and checked once. Unknown keys are errors."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentd.errors import ConfigError, Reason, first_mistake
from agentd.places import default_file, default_socket, default_state, expanded

SYSTEM = "You are agentd, an assistant on a small device. Use the tools."


Folder = Annotated[Path, AfterValidator(expanded)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Strict):
    """`model` is `pocket` or the path of a Gemma 4 GGUF. `threads` 0 means one for each core. `parallel` runs share the passes
    over the model, and its context. `prefixes_mib` is how much of the disk the states of prompts may take, 0 for none;
    with `warm` what all prompts begin with is decoded at the start.
    """

    model: str = "pocket"
    context: int = Field(default=4096, ge=256, le=131072)
    threads: int = Field(default=0, ge=0, le=256)
    batch: int = Field(default=32, ge=16, le=2048)
    parallel: int = Field(default=4, ge=1, le=8)
    prefixes_mib: int = Field(default=256, ge=0, le=65536)
    repack: Literal["off", "auto"] = "off"
    thinking: bool = False
    warm: bool = True
    system: str = SYSTEM
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = Field(default=0, ge=0, lt=2**32)
    load_timeout_s: float = Field(default=120, gt=0)


class RunsConfig(_Strict):
    """Limits of one run. `repeats` is how often the very same call may be made; `joules` counts where the device tells its
    power.
    """

    steps: int = Field(default=8, ge=1, le=100)
    tokens: int = Field(default=2048, ge=16)
    seconds: float = Field(default=300, gt=0)
    calls: int = Field(default=32, ge=1, le=10000)
    joules: float | None = Field(default=None, gt=0)
    repeats: int = Field(default=2, ge=1, le=10)


class JournalConfig(_Strict):
    """What is kept to undo calls: of a file, of a call, in all, for how long. The newest runs are kept all the same."""

    file_limit_mib: int = Field(default=64, ge=1, le=4096)
    call_limit_mib: int = Field(default=256, ge=1)
    total_mib: int = Field(default=2048, ge=1)
    days: int = Field(default=14, ge=1, le=36500)
    runs: int = Field(default=20, ge=0)
    low_space_mib: int = Field(default=200, ge=0)


class ToolsConfig(_Strict):
    """`bundled` are those that come with agentd, `bundles` folders of further ones.

    Relative paths in calls start at `folder`.
    """

    folder: Folder = Field(default=Path("~"), validate_default=True)
    bundled: tuple[Literal["files", "system", "http", "shell", "notify", "time", "gpio", "termux"], ...] = ("files", "system")
    bundles: tuple[Folder, ...] = ()
    sysfs: str = "/sys"
    proc: str = "/proc"


class SandboxConfig(_Strict):
    """`minimum` is the level below which the daemon does not start. The limits are those of one call, all its processes
    together.
    """

    minimum: Literal["L0", "L1", "L2", "L3", "L4"] = "L0"
    processes: int = Field(default=64, ge=1, le=4096)
    memory_mib: int = Field(default=768, ge=64)
    written_mib: int = Field(default=1024, ge=1)


class CredentialConfig(_Strict):
    """A secret that may be sent to this host and port over TLS, for `path` and what is below it."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
    host: str
    port: int = Field(default=443, ge=1, le=65535)
    path: Annotated[str, Field(pattern=r"^/[!-~]*$")] = "/"


class GrantConfig(_Strict):
    """One rule. `scope` is `*` or `kind:pattern`; it holds until `expires` and while all conditions do."""

    principal: str = "*"
    tool: str
    scope: str
    decision: Literal["allow", "ask", "deny"] = "allow"
    expires: AwareDatetime | None = None
    charging: bool = False
    hours: str = ""
    nominal: bool = False
    rehearse: bool = False


class ApprovalsConfig(_Strict):
    """How long a question waits for an answer, and how many may wait. `notify` shows them on this device's screen."""

    timeout_s: float = Field(default=300, gt=0, le=86400)
    pending: int = Field(default=256, ge=1, le=10000)
    notify: bool = True


class ShipConfig(_Strict):
    """A receiver of events: `to` is file:///PATH, tcp://HOST:PORT, tls://, udp://, or http(s):// for otlp."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    to: str
    format: Literal["jsonl", "csv", "syslog", "cef", "ocsf", "otlp"] = "jsonl"


class WitnessConfig(_Strict):
    """Somebody who cosigns checkpoints: its key, and where it is asked; without that it only is known."""

    key: str
    url: str = ""


class AuditConfig(_Strict):
    """`origin` names the log in its checkpoints, from its first one on; they also go to `anchor_file` and to journald.

    With `outputs` what tools give back is kept beside the log, as what they are asked is.
    """

    origin: Annotated[str, Field(pattern=r"^[!-*,-~]{0,128}$")] = ""
    ship: tuple[ShipConfig, ...] = ()
    witness: tuple[WitnessConfig, ...] = ()
    keep_events: int = Field(default=1_000_000, ge=1000)
    anchor_file: Folder | None = None
    journald: bool = True
    outputs: bool = False


class BudgetsConfig(_Strict):
    """`device` decides the thresholds; the tables say others. Their keys are checked by agentd.budgets.policy."""

    device: Literal["auto", "pi4", "pi5", "pizero2w", "android", "generic"] = "auto"
    thermal: dict[str, Any] = {}
    battery: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    states: dict[str, Any] = {}
    admission: dict[str, Any] = {}


class MetricsConfig(_Strict):
    """Prometheus asks at `listen`; a collector is told at `otlp` (http://HOST:4318/v1/metrics). Empty: not at all."""

    listen: Annotated[str, Field(pattern=r"^((\[[0-9a-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5})?$")] = ""
    otlp: Annotated[str, Field(pattern=r"^(https?://[!-~]+)?$")] = ""
    every_s: float = Field(default=60, ge=1, le=3600)


class QuotaConfig(_Strict):
    """What each principal of that name (`*` and `?` stand for others) may use of the model in an hour or a day, all runs
    together: generated tokens, seconds of the model, calls of tools, and joules where the device tells its power.
    """

    principal: str = "*"
    per: Literal["hour", "day"] = "day"
    tokens: int | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0)
    calls: int | None = Field(default=None, ge=0)
    joules: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(limit is None for limit in (self.tokens, self.seconds, self.calls, self.joules)):
            raise ValueError("a quota needs tokens, seconds, calls or joules")
        return self


class TaintConfig(_Strict):
    """What is read outside `trusted` makes a run untrusted, what is read in `private` makes it private."""

    trusted: tuple[str, ...] = ("~", "/usr", "/etc", "/sys", "/proc")
    private: tuple[str, ...] = ("~/.ssh", "~/.gnupg", "~/.aws", "~/.config", "~/.local/share/keyrings", "~/.mozilla")


Role = Literal["user", "approver", "auditor", "admin"]


class PrincipalConfig(_Strict):
    """What a principal may do, beside the owner of the daemon, who may do everything."""

    name: Annotated[str, Field(pattern=r"^(unix|tls):[^\s:*]{1,64}$")]
    roles: tuple[Role, ...] = Field(min_length=1)


class ListenConfig(_Strict):
    """TCP, beside the socket. Without TLS only at a loopback address. `client_ca` lets in whoever has a certificate of it."""

    address: Annotated[str, Field(pattern=r"^(\[[0-9a-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")]
    certificate: Folder | None = None
    key: Folder | None = None
    client_ca: Folder | None = None

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        host = self.address.rpartition(":")[0].strip("[]")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if self.client_ca and not self.certificate:
            raise ValueError("client_ca needs certificate and key")
        if not self.certificate and host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError("without certificate and key only a loopback address may be listened at")
        return self


DEVICES = {
    "camera": ("/dev/video*",),
    "gpio": ("/dev/gpiochip*", "/dev/gpiomem*"),
    "i2c": ("/dev/i2c-*",),
    "serial": ("/dev/ttyUSB*", "/dev/ttyACM*", "/dev/ttyAMA*"),
    "spi": ("/dev/spidev*",),
}


class Config(_Strict):
    state: Folder = Field(default_factory=default_state)
    automations: Folder = Field(default_factory=lambda: default_file().parent / "automations")
    socket: Folder = Field(default_factory=default_socket)
    engine: EngineConfig = EngineConfig()
    runs: RunsConfig = RunsConfig()
    journal: JournalConfig = JournalConfig()
    tools: ToolsConfig = ToolsConfig()
    sandbox: SandboxConfig = SandboxConfig()
    approvals: ApprovalsConfig = ApprovalsConfig()
    audit: AuditConfig = AuditConfig()
    taint: TaintConfig = TaintConfig()
    budgets: BudgetsConfig = BudgetsConfig()
    listen: ListenConfig | None = None
    socket_mode: Literal["0600", "0660", "0666"] = "0600"
    principals: tuple[PrincipalConfig, ...] = ()
    credentials: tuple[CredentialConfig, ...] = ()
    devices: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")], tuple[str, ...]] = {}
    grants: tuple[GrantConfig, ...] = ()
    metrics: MetricsConfig = MetricsConfig()
    quotas: tuple[QuotaConfig, ...] = ()


def load(file: Path | None) -> Config:
    """Read `file`, or the default one if it is there. Raises ConfigError naming file and key."""
    chosen = file or default_file()
    try:
        text = chosen.read_text()
    except FileNotFoundError:
        if file is None:
            return Config()
        hint = "Give the path of an agentd.toml, or leave --config out to use the defaults."
        raise ConfigError(Reason.CONFIG_INVALID, f"There is no configuration file {file}.", hint=hint) from None
    except (OSError, UnicodeDecodeError) as e:
        raise _invalid(chosen, str(e)) from None
    return check(text, chosen)


def check(text: str, chosen: Path) -> Config:
    """The configuration that a text is, as the file `chosen`. Raises ConfigError naming file and key."""
    try:
        beside = {"automations": expanded(chosen).parent / "automations"}
        return Config.model_validate(beside | tomllib.loads(text))
    except ValidationError as e:
        raise _invalid(chosen, ": ".join(first_mistake(e))) from None
    except tomllib.TOMLDecodeError as e:
        raise _invalid(chosen, str(e)) from None


def _invalid(file: Path, why: str) -> ConfigError:
    return ConfigError(
        Reason.CONFIG_INVALID,
        f"The configuration {file} is wrong: {why}.",
        hint="docs/configuration.md lists every key.",
        metadata={"file": str(file), "why": why},
    )
