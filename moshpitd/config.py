"""Gathers the daemon's configuration: flag > environment > file > default, and where each value came from.

Knows names, how a value is written, what is a typing error. Does not know what a value does: each room keeps its own
frozen config dataclass beside the class that uses it, and `Config.room` composes it from the preset and the file's
table of that name. Imports nothing heavy: the command line reads the default socket path from here at every call.

A setting has one name everywhere: `group_size_max` in the file, MOSHPITD_GROUP_SIZE_MAX, --group-size-max.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

PORT_DEFAULT = 7600
ENVIRONMENT_PREFIX = "MOSHPITD_"
SOCKET_PATH_BYTES_MAX = 107
"""sizeof(sun_path) less the terminating zero, on Linux."""

Source = Literal["flag", "environment", "file", "default"]
Preset = Literal["loopback", "lan", "wan"]
Scalar = str | int | float | bool
Flags = Mapping[str, str | Sequence[str] | None]
"""What was typed, by setting name; None or empty where it was not."""

PRESETS: Mapping[Preset, Mapping[str, Mapping[str, Scalar]]] = {
    "loopback": {"directory": {"join_retry_s": 0.2, "join_retry_s_max": 1.0, "mend_interval_s": 10.0}},
    "lan": {"directory": {"join_retry_s": 0.5, "join_retry_s_max": 2.0, "mend_interval_s": 30.0}},
    "wan": {},
}
"""What a kind of network changes in the rooms' own defaults. Nothing is assumed of `wan`: it is the defaults. Nearer
peers are asked more often, because asking is cheap there; retransmission stays, because a busy machine is no nearer."""

ROOMS = (
    *("local", "household", "driver", "peer", "directory"),
    *("session", "cohort", "matchmaking", "all_reduce", "lossy", "udp", "telemetry"),
)
"""Tables the file may hold: one for each room with a config dataclass of its own."""

_T = TypeVar("_T")
_Choice = TypeVar("_Choice", bound=str)


class ConfigError(Exception):
    """A setting is wrong; the message names where it was written and what to write instead."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """HOST:PORT; host is a name or an address, IPv6 without its brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """True for 0.0.0.0 and ::, which can be listened on but not dialled."""
        return self.host in ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class ConfigValue:
    """A setting in force, for people."""

    name: str
    value: str
    source: Source


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a daemon is told at its start."""

    swarm: str
    listen: Endpoint
    """gRPC on TCP and the directory on UDP, same number; port 0 lets the system choose."""
    announce: Endpoint | None
    """What others are told to dial; None = the address this machine has on the way to them."""
    join: tuple[Endpoint, ...]
    """Live members, any; none starts a new swarm unless peers are remembered."""
    socket: Path
    data_dir: Path
    """Identity, sequence numbers, remembered peers. One daemon a directory."""
    grid: tuple[int, ...] | None
    """Sides of a pinned grid; None = planned from the swarm's size."""
    group_size_max: int
    """The planner's limit: larger groups mean fewer rounds and longer ones."""
    http: Endpoint | None
    """Where /healthz and /metrics are served; None = nowhere."""
    event_loop: Literal["auto", "uvloop", "asyncio"]
    """auto = uvloop where it is installed."""
    drain_timeout_s: float
    """How long SIGTERM waits for the running round."""
    transport: Literal["auto", "grpc", "tcp"]
    """How chunks travel between peers: auto = plain TCP where both offer it and it can be reached, else gRPC."""
    bulk_port: int
    """Where the plain TCP path listens; 0 = any free port."""
    bulk_announce: int
    """The port that others are to dial for it, where a port mapping gives it another number; 0 = bulk_port."""
    vector_bytes_max: int
    """The largest vector a trainer may hand in; the guard of this machine's memory."""
    shared_memory_dir: str
    """Where memory shared with trainers is made: `auto`, `off` or a directory."""
    log_level: Literal["debug", "info", "warning", "error"]
    preset: Preset
    rooms: Mapping[str, Mapping[str, Scalar]]
    """What preset and file change in the rooms' own configs."""
    values: tuple[ConfigValue, ...]
    """Every setting with its source, in the order of the documentation."""

    def room(self, name: str, kind: type[_T]) -> _T:
        """A room's config: its own defaults, changed by the preset and the file's table [name]."""
        assert name in ROOMS and dataclasses.is_dataclass(kind)
        defaults = kind()
        changes: dict[str, Scalar] = {}
        for key, value in self.rooms.get(name, {}).items():
            place = f"{key} in table [{name}]"
            if key not in {field.name for field in dataclasses.fields(kind)}:
                raise ConfigError(f"{place}: no such setting{_did_you_mean(key, _names(kind))}")
            default = getattr(defaults, key)
            if type(default) is float and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise ConfigError(f"{place}: {value!r} is no {type(default).__name__}, as its default {default!r} is")
            if isinstance(value, float | int) and (value < 0 or value == math.inf or value != value):
                raise ConfigError(f"{place}: {value!r} is out of range")
            changes[key] = value
        return dataclasses.replace(defaults, **changes)


def load(flags: Flags, environ: Mapping[str, str]) -> Config:
    """Merge all sources. Raises ConfigError for unknown names, unreadable values and a swarm without a name."""
    layers = _Layers.read(flags, environ)
    swarm = layers.one("swarm", _swarm, "")
    preset: Preset = layers.one("preset", _one_of("loopback", "lan", "wan"), "wan")
    rooms = {
        room: {**PRESETS[preset].get(room, {}), **layers.tables.get(room, {})}
        for room in ROOMS
        if room in PRESETS[preset] or room in layers.tables
    }
    config = Config(
        swarm=swarm,
        listen=layers.one("listen", endpoint, Endpoint("0.0.0.0", PORT_DEFAULT)),
        announce=layers.one("announce", _dialled, None, "auto"),
        join=layers.many("join", _dialled),
        socket=layers.one("socket", _socket, default_socket(environ)),
        data_dir=layers.one("data_dir", _path, _default_data_dir(swarm, environ)),
        grid=layers.one("grid", _grid, None, "auto"),
        group_size_max=layers.one("group_size_max", _group_size, 16),
        http=layers.one("http", _http, None, "off"),
        event_loop=layers.one("event_loop", _one_of("auto", "uvloop", "asyncio"), "auto"),
        drain_timeout_s=layers.one("drain_timeout", _seconds, 20.0),
        transport=layers.one("transport", _one_of("auto", "grpc", "tcp"), "auto"),
        bulk_port=layers.one("bulk_port", _port, 0),
        bulk_announce=layers.one("bulk_announce", _port, 0),
        vector_bytes_max=layers.one("vector_bytes_max", _bytes, 4 << 30, "4GiB"),
        shared_memory_dir=layers.one("shared_memory_dir", _shared_memory_dir, "auto"),
        log_level=layers.one("log_level", _one_of("debug", "info", "warning", "error"), "info"),
        preset=preset,
        rooms=rooms,
        values=(*layers.values, *_room_values(rooms, layers.tables)),
    )
    layers.refuse_unknown({value.name for value in layers.values})
    if not swarm:
        raise ConfigError("the swarm has no name: give --swarm NAME, MOSHPITD_SWARM or `swarm` in the file")
    return config


def default_socket(environ: Mapping[str, str]) -> Path:
    """Under $XDG_RUNTIME_DIR, else in a directory of the user's own in the temporary one. So do clients."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime, "moshpitd", "moshpitd.sock")
    return Path(tempfile.gettempdir(), f"moshpitd-{os.getuid()}", "moshpitd.sock")


def endpoint(text: str) -> Endpoint:
    """Read HOST:PORT. Raises ValueError with what to write instead."""
    example = "write HOST:PORT, as in 192.0.2.7:7600, node.example.org:7600 or [2001:db8::7]:7600"
    if "//" in text:
        raise ValueError(f"is an URL: {example}")
    host, colon, port = text.rpartition(":")
    if text.startswith("["):
        bracketed, bracket, port = text[1:].partition("]:")
        if not bracket:
            raise ValueError(f"has no port after its bracket: {example}")
        host = str(_ipv6(bracketed, example))
    elif not colon or not host:
        raise ValueError(f"has no {'host' if colon else 'port'}: {example}")
    elif ":" in host:
        raise ValueError(f"is an IPv6 address without brackets: {example}")
    elif not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?", host):
        raise ValueError(f"names no host: {example}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"has {port!r} for a port, which is no number from 0 to 65535: {example}")
    return Endpoint(host, int(port))


@dataclass(slots=True)
class _Layers:
    """The sources side by side. `values` grows by every setting asked for."""

    flags: Mapping[str, list[str]]
    environ: Mapping[str, str]
    file: Mapping[str, list[str]]
    file_name: str
    tables: Mapping[str, Mapping[str, Scalar]]
    values: list[ConfigValue] = dataclasses.field(default_factory=list)

    @staticmethod
    def read(flags: Flags, environ: Mapping[str, str]) -> _Layers:
        typed = {name: [given] if isinstance(given, str) else list(given) for name, given in flags.items() if given}
        [file_name] = typed.pop("config", [environ.get(ENVIRONMENT_PREFIX + "CONFIG", "")])
        file, tables = _read_file(file_name) if file_name else ({}, {})
        return _Layers(typed, environ, file, file_name, tables)

    def one(self, name: str, read: Callable[[str], _T], default: _T, default_text: str | None = None) -> _T:
        """The value of a setting that has one, by the strongest source that gives it."""
        source, place, texts = self._find(name)
        if source == "default":
            self.values.append(ConfigValue(name, str(default) if default_text is None else default_text, source))
            return default
        if len(texts) != 1:
            raise ConfigError(f"{place}: takes one value, not {len(texts)}")
        value = _reading(read, texts[0], place)
        self.values.append(ConfigValue(name, texts[0], source))
        return value

    def many(self, name: str, read: Callable[[str], _T]) -> tuple[_T, ...]:
        """The values of a repeatable setting: the strongest source that gives any replaces the weaker ones."""
        source, place, texts = self._find(name)
        if source == "environment":
            texts = texts[0].replace(",", " ").split()
        self.values.append(ConfigValue(name, " ".join(texts), source))
        return tuple(_reading(read, text, place) for text in texts)

    def refuse_unknown(self, known: set[str]) -> None:
        for name in self.flags:
            assert name in known, name
        for name in self.file:
            if name not in known:
                raise ConfigError(f"{name} in {self.file_name}: no such setting{_did_you_mean(name, known)}")
        variables = {_variable(name) for name in known} | {_variable("config")}
        for variable in self.environ:
            if not variable.startswith(ENVIRONMENT_PREFIX) or _KUBERNETES.fullmatch(variable):
                continue
            if variable not in variables:
                raise ConfigError(f"{variable} in the environment: no such setting{_did_you_mean(variable, variables)}")

    def _find(self, name: str) -> tuple[Source, str, list[str]]:
        """(source, how people call that place, what stands there)."""
        variable = _variable(name)
        if name in self.flags:
            return "flag", "--" + name.replace("_", "-"), self.flags[name]
        if self.environ.get(variable):
            return "environment", variable, [self.environ[variable]]
        if name in self.file:
            return "file", f"{name} in {self.file_name}", self.file[name]
        return "default", name, []


_KUBERNETES = re.compile(r"MOSHPITD_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)\w*)?)")
"""What Kubernetes puts into every container's environment when a service is called moshpitd; not meant for us."""


def _read_file(name: str) -> tuple[dict[str, list[str]], dict[str, dict[str, Scalar]]]:
    """(settings as text, tables of the rooms)."""
    try:
        with open(name, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"config file {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {name} is not TOML: {error}") from error
    settings: dict[str, list[str]] = {}
    tables: dict[str, dict[str, Scalar]] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in ROOMS:
                raise ConfigError(f"table [{key}] in {name}: no such table{_did_you_mean(key, ROOMS)}")
            tables[key] = {inner: _scalar(item, f"{key}.{inner} in {name}") for inner, item in value.items()}
        else:
            items = value if isinstance(value, list) else [value]
            settings[key] = [str(_scalar(item, f"{key} in {name}")) for item in items]
    return settings, tables


def _scalar(value: object, place: str) -> Scalar:
    if isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(f"{place}: expected text or a number, not {type(value).__name__}")


def _room_values(
    rooms: Mapping[str, Mapping[str, Scalar]], tables: Mapping[str, Mapping[str, Scalar]]
) -> Iterable[ConfigValue]:
    for room, changes in rooms.items():
        for name, value in changes.items():
            source: Source = "file" if name in tables.get(room, {}) else "default"
            yield ConfigValue(f"{room}.{name}", str(value), source)


def _default_data_dir(swarm: str, environ: Mapping[str, str]) -> Path:
    state = environ.get("XDG_STATE_HOME")
    return Path(state or os.path.expanduser("~/.local/state"), "moshpitd", swarm)


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _names(kind: type[object]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


def _reading(read: Callable[[str], _T], text: str, place: str) -> _T:
    try:
        return read(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {text!r} {error}") from error


# How each kind of value is written. All raise ValueError with the end of a sentence that begins with what was written.


def _swarm(text: str) -> str:
    # Becomes a directory's name, hence no separators and no leading dot.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError("names no swarm: use up to 64 letters, digits, '.', '_' and '-', a letter or digit first")
    return text


def _ipv6(text: str, example: str) -> ipaddress.IPv6Address:
    try:
        return ipaddress.IPv6Address(text)
    except ValueError as error:
        raise ValueError(f"has no IPv6 address in its brackets: {example}") from error


def _dialled(text: str) -> Endpoint:
    """An endpoint others can reach: neither port 0 nor a wildcard."""
    where = endpoint(text)
    if where.port == 0 or where.is_wildcard:
        raise ValueError("cannot be dialled: name an address and a port of one machine")
    return where


def _http(text: str) -> Endpoint | None:
    return None if text == "off" else endpoint(text)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text)).absolute()


def _socket(text: str) -> Path:
    path = _path(text)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"is longer than the {SOCKET_PATH_BYTES_MAX} bytes a Unix socket's path may have")
    return path


def _shared_memory_dir(text: str) -> str:
    return text if text in ("auto", "off") else str(_path(text))


def _grid(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){0,7}", text):
        raise ValueError("is no grid: write auto, or the sides, as in 4x4 or 2x4x4")
    sides = tuple(int(side) for side in text.split("x"))
    if math.prod(sides) < 2:
        raise ValueError("has one cell only: nobody would meet")
    return sides


def _group_size(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 1024:
        raise ValueError("is no group size: write a number from 2 to 1024")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError("is no port: write a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError("is no duration: write seconds, as in 20 or 0.5")
    return seconds


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,15})\s*(|KiB|MiB|GiB)", text)
    if not match:
        raise ValueError("is no amount of bytes: write a number, or one with KiB, MiB or GiB, as in 512MiB")
    return int(match[1]) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[match[2]]


def _one_of(*choices: _Choice) -> Callable[[str], _Choice]:
    def read(text: str) -> _Choice:
        for choice in choices:
            if choice == text:
                return choice
        raise ValueError(f"is none of {', '.join(choices)}")

    return read
