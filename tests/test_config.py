"""Where a setting comes from, who wins, and what is said when it is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from moshpitd.config import PRESETS, Config, ConfigError, Endpoint, default_socket, endpoint, load
from moshpitd.directory.config import DirectoryConfig


def sources(config: Config) -> dict[str, str]:
    return {value.name: value.source for value in config.values}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "moshpitd.toml"
    file.write_text('swarm = "file"\ngrid = "2x4"\nhttp = "127.0.0.1:9000"\n')
    environ = {"MOSHPITD_CONFIG": str(file), "MOSHPITD_SWARM": "environment", "MOSHPITD_GRID": "4x4"}
    config = load({"swarm": "flag", "join": ()}, environ)
    assert (config.swarm, config.grid, config.http) == ("flag", (4, 4), Endpoint("127.0.0.1", 9000))
    assert (config.group_size_max, config.listen) == (16, Endpoint("0.0.0.0", 7600))
    found = sources(config)
    assert [found[name] for name in ("swarm", "grid", "http", "listen")] == ["flag", "environment", "file", "default"]


def test_join_is_a_list_in_every_source(tmp_path: Path) -> None:
    expected = (Endpoint("a.example", 1), Endpoint("::1", 2))
    file = tmp_path / "moshpitd.toml"
    file.write_text('swarm = "s"\njoin = ["a.example:1", "[::1]:2"]\n')
    assert load({"config": str(file)}, {}).join == expected
    assert load({"swarm": "s"}, {"MOSHPITD_JOIN": "a.example:1, [::1]:2"}).join == expected
    assert load({"swarm": "s", "join": ["a.example:1", "[::1]:2"]}, {}).join == expected


def test_an_unknown_key_in_the_file_is_named_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "moshpitd.toml"
    file.write_text('swarm = "s"\ngruop_size_max = 4\n')
    with pytest.raises(ConfigError, match=r"gruop_size_max in .*moshpitd\.toml.*did you mean group_size_max\?"):
        load({"config": str(file)}, {})


def test_an_unknown_table_is_named_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "moshpitd.toml"
    file.write_text('swarm = "s"\n[direktory]\ntries = 4\n')
    with pytest.raises(ConfigError, match=r"\[direktory\].*did you mean directory\?"):
        load({"config": str(file)}, {})


def test_an_unknown_variable_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"MOSHPITD_SWRAM.*did you mean MOSHPITD_SWARM\?"):
        load({"swarm": "s"}, {"MOSHPITD_SWRAM": "t"})


def test_what_kubernetes_puts_beside_a_service_of_our_name_is_no_setting() -> None:
    environ = {
        "MOSHPITD_SERVICE_HOST": "10.0.0.1",
        "MOSHPITD_PORT_7600_TCP_ADDR": "10.0.0.1",
        "MOSHPITD_PORT": "tcp://",
    }
    assert load({"swarm": "s"}, environ).swarm == "s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:0", Endpoint("127.0.0.1", 0)),
        ("node-1.example.org:7600", Endpoint("node-1.example.org", 7600)),
        ("my_container:65535", Endpoint("my_container", 65535)),
        ("[::1]:7600", Endpoint("::1", 7600)),
        ("[fe80::1%eth0]:7600", Endpoint("fe80::1%eth0", 7600)),
    ],
)
def test_host_and_port_are_read_and_written_back(text: str, expected: Endpoint) -> None:
    assert endpoint(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("localhost", "has no port"),
        (":7600", "has no host"),
        ("host:", "no number from 0 to 65535"),
        ("host:65536", "no number from 0 to 65535"),
        ("host:-1", "no number from 0 to 65535"),
        ("::1:7600", "IPv6 address without brackets"),
        ("[::1]", "has no port after its bracket"),
        ("[cafe]:1", "no IPv6 address in its brackets"),
        ("http://host:7600", "is an URL"),
        ("ho st:1", "names no host"),
    ],
)
def test_a_bad_address_names_the_flag_and_shows_a_good_one(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--listen: .*{complaint}.*\[2001:db8::7\]:7600"):
        load({"swarm": "s", "listen": text}, {})


@pytest.mark.parametrize("text", ["0.0.0.0:7600", "host:0", "[::]:7600"])
def test_nobody_can_join_a_wildcard_or_port_zero(text: str) -> None:
    with pytest.raises(ConfigError, match=r"MOSHPITD_JOIN: .* cannot be dialled"):
        load({"swarm": "s"}, {"MOSHPITD_JOIN": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("grid", "4x"),
        ("grid", "1x1"),
        ("grid", "axb"),
        ("group_size_max", "1"),
        ("drain_timeout", "-1"),
        ("drain_timeout", "nan"),
        ("vector_bytes_max", "4 elephants"),
        ("log_level", "loud"),
        ("event_loop", "trio"),
        ("preset", "moon"),
        ("swarm", "../etc"),
        ("socket", "/" + "x" * 200),
    ],
)
def test_an_unreadable_value_is_refused_by_the_name_of_its_flag(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match="^--" + name.replace("_", "-")):
        load({"swarm": "s", name: text}, {})


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load({"config": str(tmp_path / "absent.toml")}, {})
    broken = tmp_path / "broken.toml"
    broken.write_text("swarm = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML: .*line 1"):
        load({"config": str(broken)}, {})


def test_a_swarm_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="--swarm NAME"):
        load({}, {})


def test_the_socket_lies_in_a_directory_of_the_users_own() -> None:
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/moshpitd/moshpitd.sock")
    assert default_socket({}).parent.name.startswith("moshpitd-")


def test_every_swarm_has_its_own_state_by_default() -> None:
    assert load({"swarm": "s"}, {"XDG_STATE_HOME": "/state"}).data_dir == Path("/state/moshpitd/s")


@dataclass(frozen=True, slots=True)
class RoomConfig:
    """A room's own config, as every room has one."""

    interval_s: float = 1.0
    tries: int = 3
    name: str = "room"


def room(tmp_path: Path, table: str) -> RoomConfig:
    file = tmp_path / "moshpitd.toml"
    file.write_text(f'swarm = "s"\n[directory]\n{table}\n')
    return load({"config": str(file)}, {}).room("directory", RoomConfig)


def test_a_rooms_table_changes_its_own_defaults(tmp_path: Path) -> None:
    assert room(tmp_path, "interval_s = 2") == RoomConfig(interval_s=2.0)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("interval = 2", r"did you mean interval_s\?"),
        ('tries = "many"', "is no int, as its default 3 is"),
        ("tries = true", "is no int"),
        ("tries = -1", "out of range"),
        ("interval_s = inf", "out of range"),
        ("interval_s = [1]", "expected text or a number"),
    ],
)
def test_a_wrong_value_in_a_rooms_table_is_named(tmp_path: Path, table: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        room(tmp_path, table)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_fits_the_rooms_it_changes_and_the_file_has_the_last_word(tmp_path: Path, preset: str) -> None:
    file = tmp_path / "moshpitd.toml"
    file.write_text('swarm = "s"\n[directory]\nmend_interval_s = 7.5\n')
    config = load({"preset": preset, "config": str(file)}, {})
    assert set(config.rooms) == {"directory"}
    assert config.room("directory", DirectoryConfig).mend_interval_s == 7.5
    assert sources(config)["directory.mend_interval_s"] == "file"
