"""The stubs: fresh in the tree, found when stale, loadable side by side and on old runtimes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DOOR = """
// A door.
syntax = "proto3";
package moshpitd.{door}.v1;
{imports}
// Asks.
message AskRequest {{
  // A question.
  string question = 1;
  {extra}
}}
// Answers.
message AskResponse {{}}
// Is asked.
service {title}Service {{
  // Asks.
  rpc Ask(AskRequest) returns (AskResponse);
}}
"""
WORDS = """
// Shared words.
syntax = "proto3";
package moshpitd.local.v1;
// A word.
message Word {
  // Its letters.
  string letters = 1;
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project: two doors, the local one in two files that import each other."""
    protos = tmp_path / "protos"
    local = DOOR.format(
        door="local",
        title="Local",
        imports='import "moshpitd/local/v1/words.proto";',
        extra="// One.\n  Word word = 2;",
    )
    for path, text in {
        "local/v1/door.proto": local,
        "local/v1/words.proto": WORDS,
        "peer/v1/door.proto": DOOR.format(door="peer", title="Peer", imports="", extra=""),
    }.items():
        (protos / "moshpitd" / path).parent.mkdir(parents=True, exist_ok=True)
        (protos / "moshpitd" / path).write_text(text)
    return tmp_path


def generate(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "protos/generate.py", "--root", project, "--protos", project / "protos"]
    return subprocess.run([*command, *arguments], text=True, capture_output=True, timeout=60)


def test_the_stubs_of_this_project_are_fresh() -> None:
    assert generate(ROOT, "--check").stderr == ""


def test_an_old_runtime_loads_the_stubs() -> None:
    stubs = [path for home in ("moshpitd", "clients/python/moshpit_client") for path in (ROOT / home).rglob("*_pb2.py")]
    assert stubs
    assert [path for path in stubs if "# Protobuf Python Version: 6.31." not in path.read_text()] == []


def test_stale_missing_and_left_over_stubs_are_named(project: Path) -> None:
    assert generate(project).returncode == 0
    assert generate(project, "--check").returncode == 0
    (project / "moshpitd/peer/v1/door_pb2.py").write_text("")
    (project / "moshpitd/peer/v1/door_pb2_grpc.py").unlink()
    (project / "protos/moshpitd/local/v1/words.proto").rename(project / "protos/moshpitd/local/v1/nouns.proto")
    door = project / "protos/moshpitd/local/v1/door.proto"
    door.write_text(door.read_text().replace("words.proto", "nouns.proto"))

    check = generate(project, "--check")

    assert check.returncode == 1
    for name in ("peer/v1/door_pb2.py", "peer/v1/door_pb2_grpc.py", "local/v1/words_pb2.py", "local/v1/nouns_pb2.py"):
        assert f"stale: moshpitd/{name} (run `make protos`)" in check.stderr
    assert "stale: clients/python/moshpit_client/v1/words_pb2.pyi" in check.stderr
    assert generate(project).returncode == 0
    assert generate(project, "--check").stderr == ""
    assert not (project / "moshpitd/local/v1/words_pb2.py").exists()


def test_the_client_gets_messages_of_the_local_door_only(project: Path) -> None:
    generate(project)
    client = project / "clients/python/moshpit_client"
    assert {path.name for path in client.rglob("*_pb2*.py")} == {"door_pb2.py", "words_pb2.py"}
    assert [path for path in client.rglob("*.py*") if "import moshpitd" in path.read_text()] == []
    assert [path for path in client.rglob("*.py*") if "from moshpitd" in path.read_text()] == []


def test_client_and_daemon_share_a_process_and_a_wire_even_when_they_differ(project: Path) -> None:
    generate(project)
    client = project / "clients/python/moshpit_client"
    old = project / "old_client"
    client.rename(old)
    door = project / "protos/moshpitd/local/v1/door.proto"
    door.write_text(door.read_text().replace("// A question.", "// New.\n  string news = 3;\n  // A question."))
    generate(project)
    old_home = project / "elsewhere"
    old_home.mkdir()
    old.rename(old_home / "moshpit_client")
    talk = """
from moshpitd.local.v1 import door_pb2 as daemon, door_pb2_grpc
from moshpitd.peer.v1 import door_pb2_grpc
from moshpit_client.v1 import door_pb2 as client
sent = client.AskRequest(question="?", word={"letters": "abc"})
heard = daemon.AskRequest.FromString(sent.SerializeToString())
print(heard.question, heard.word.letters, hasattr(heard, "news"), hasattr(sent, "news"))
"""
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{old_home}"}
    talked = subprocess.run(
        [sys.executable, "-c", talk], text=True, capture_output=True, timeout=60, env=environment, cwd=project
    )
    assert talked.stdout == "? abc True False\n", talked.stderr
