"""What the daemon tells is frozen, and turns into the JSON of the command line's `--json`."""

from __future__ import annotations

import dataclasses
import json
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Base of everything that has fields to show."""

    def to_dict(self) -> dict[str, Json]:
        """Fields by name; tuples become lists, records become dicts."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())


def _plain(value: object) -> Json:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Record():
            return value.to_dict()
        case tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            raise AssertionError(f"a record holds {value!r}")
