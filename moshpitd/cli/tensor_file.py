"""A safetensors file as a vector, and a vector as a safetensors file, written whole or not at all.

Knows what makes a file unfit to be averaged and says so before anything is sent. Does not know the daemon.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import DTYPES, Layout, TensorSpec, Vector, first_non_finite

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Those that can be averaged, as safetensors calls them; the others keep their names in messages."""
HEADER_LENGTH_BYTES = 8


class TensorFileError(Exception):
    """A file cannot be averaged or written; the message names it, the tensor and what is wrong."""


@dataclass(frozen=True)
class TensorFile:
    """What was read."""

    vector: Vector
    metadata: dict[str, str] | None
    """The file's own notes, kept in the output."""


def read(path: Path) -> TensorFile:
    """Read a file and check that it can be averaged. Raises TensorFileError."""
    try:
        with safe_open(path, framework="np") as file:
            specs: list[TensorSpec] = []
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                kind = part.get_dtype()
                specs.append(TensorSpec(name, tuple(part.get_shape()), DTYPE_NAMES.get(kind, kind)))
            vector = Vector.empty(Layout.of(specs))
            for spec, view in vector.views():
                view[...] = file.get_tensor(spec.name).reshape(-1)
            metadata = file.metadata()
    except SafetensorError as error:
        raise TensorFileError(f"{path} {_diagnosis(path)}: {error}") from error
    except OSError as error:
        raise TensorFileError(f"{path} cannot be read: {error}") from error
    except InvalidInput as error:
        raise TensorFileError(f"{path}: {error}") from error
    for spec, view in vector.views():
        index = first_non_finite(view)
        if index is not None:
            place = list(map(int, np.unravel_index(index, spec.shape)))
            raise TensorFileError(f"{path}: tensor {spec.name!r} holds {view[index]} at {place}: nothing was sent")
    return TensorFile(vector, metadata)


class Output:
    """The file to be: a draft beside it that replaces it at once, or vanishes.

    The draft is made first, so that a directory nobody may write to is found out before the averaging, not after it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft: Path | None = None

    def __enter__(self) -> Self:
        try:
            if self._path.is_dir():
                raise IsADirectoryError("it is a directory")
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".draft", dir=self._path.parent)
        except OSError as error:
            raise TensorFileError(f"{self._path} cannot be written: {error.strerror or error}") from error
        os.close(handle)
        self._draft = Path(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draft is not None:
            self._draft.unlink(missing_ok=True)

    def commit(self, vector: Vector, metadata: dict[str, str] | None) -> None:
        """Write, wait for the disk, then replace. Raises TensorFileError, and the old file stays as it was."""
        assert self._draft is not None
        # An empty tensor has no place in the vector, so its view's dtype may be its neighbour's.
        arrays = {spec.name: np.asarray(view, DTYPES[spec.dtype]).reshape(spec.shape) for spec, view in vector.views()}
        try:
            save_file(arrays, self._draft, metadata=metadata)
            self._draft.chmod(_mode(self._path))
            _sync(self._draft)
            self._draft.replace(self._path)
            self._draft = None
            _sync(self._path.parent)
        except (OSError, SafetensorError) as error:
            raise TensorFileError(f"{self._path} cannot be written: {error}") from error


def _diagnosis(path: Path) -> str:
    """Cut off, or something else altogether? A safetensors header is JSON behind its length."""
    with path.open("rb") as file:
        head = file.read(HEADER_LENGTH_BYTES + 1)
    if len(head) > HEADER_LENGTH_BYTES and head[HEADER_LENGTH_BYTES:] != b"{":
        return "is not a safetensors file"
    return "is truncated or damaged" if head else "is empty"


def _mode(path: Path) -> int:
    """The mode a plain `open` would have given: the old file's, else by the umask, which mkstemp's draft ignores."""
    if path.exists():
        return path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
