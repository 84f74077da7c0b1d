"""The proto lint: what `buf lint` with this project's rules refuses, and that the project's protos pass."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"

GOOD = """
syntax = "proto3";
package moshpitd.local.v1;
// Asks.
message AskRequest {
  // A question.
  string some_question = 1;
  // Of which kind.
  Kind kind = 2;
}
// Answers.
message AskResponse {}
// Kinds.
enum Kind {
  // Not given.
  KIND_UNSPECIFIED = 0;
}
// Is asked.
service LocalService {
  // Asks.
  rpc Ask(AskRequest) returns (AskResponse);
}
"""


def lint(protos: Path) -> str:
    """What the lint complains of."""
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    return subprocess.run([buf, "lint", protos], text=True, capture_output=True, timeout=60).stdout


def test_the_protos_of_this_project_pass() -> None:
    assert lint(PROTOS) == ""


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("", "", ""),
        ("// Asks.\nmessage", "message", 'Message "AskRequest" should have a non-empty comment'),
        ("  // A question.\n", "", 'Field "some_question" should have a non-empty comment'),
        ("// Kinds.\n", "", 'Enum "Kind" should have a non-empty comment'),
        ("  // Not given.\n", "", 'Enum value "KIND_UNSPECIFIED" should have a non-empty comment'),
        ("// Is asked.\n", "", 'Service "LocalService" should have a non-empty comment'),
        ("  // Asks.\n", "", 'RPC "Ask" should have a non-empty comment'),
        ("some_question", "someQuestion", "should be lower_snake_case"),
        ("KIND_UNSPECIFIED", "KIND_NONE", 'should be suffixed with "_UNSPECIFIED"'),
        ("KIND_UNSPECIFIED", "UNSPECIFIED", 'should be prefixed with "KIND_"'),
        ("LocalService", "Local", 'should be suffixed with "Service"'),
        ("AskResponse", "Answer", 'should be named "AskResponse"'),
        ("moshpitd.local.v1", "moshpitd.local", "should be suffixed with a correctly formed version"),
        ("moshpitd.local.v1", "moshpitd.peer.v1", 'must be within a directory "moshpitd/peer/v1"'),
    ],
)
def test_each_rule_is_on(tmp_path: Path, good: str, bad: str, complaint: str) -> None:
    shutil.copy(PROTOS / "buf.yaml", tmp_path)
    door = tmp_path / "moshpitd/local/v1/door.proto"
    door.parent.mkdir(parents=True)
    door.write_text(GOOD.replace(good, bad))
    complaints = lint(tmp_path)
    assert complaint in complaints
    assert bool(complaints) == bool(complaint)
