"""What each codec costs on this machine and what it loses, for `moshpitd bench codecs` and the project's own benchmark.

Measures one core on one chunk, as the daemon codes them while a round runs; does not measure rounds or links.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moshpitd.allocator import keep_memory
from moshpitd.averaging.codecs import Codec, Coding, codec_named
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import DTYPES, Floats, Vector
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.forms import Json
from moshpitd.cli.tensor_file import TensorFileError, read

CHUNK_BYTES = 1 << 20
"""What the daemon puts on the wire at once."""
SECONDS = 0.15
"""For each direction of each coding."""
USUAL = (
    *("float32", "float16", "bfloat16"),
    *("flash8", "flash7", "flash6", "flash5", "flash4", "flash3", "flash2"),
    *("flash4-8", "flash8:32", "flash4:32", "flash3+spikes", "flash2:32+spikes"),
    *("flash8+anchored", "flash4+anchored"),
)
SPREAD = 0.01
"""How far anchors are from what is coded around them, by norm."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Of some values."""

    bits_per_element: float
    relative_error: float
    """||decoded - values|| / ||values||."""


@dataclass(frozen=True, slots=True)
class CodingFigures:
    """Of one half of a codec, or of both where they are the same."""

    codec: str
    half: str
    """contributions, averages or both."""
    encode_gb_s: float
    """Of float32 values, 1e9 bytes of them a second, the fastest of all tries."""
    decode_gb_s: float
    normal: Loss
    """Of a chunk of normally distributed values; where codes are anchored, around others SPREAD away."""
    file: Loss | None
    """Of the file's tensors; they have no anchor."""


def normal_chunk() -> Floats:
    return np.random.default_rng(0).standard_normal(CHUNK_BYTES // 4, np.float32)


def measure(codecs: Sequence[Codec], file: Vector | None = None, seconds: float = SECONDS) -> list[CodingFigures]:
    """In the order of the codecs, contributions first."""
    keep_memory()  # as in the daemon: else the kernel's page faults would be measured
    chunk = normal_chunk()
    anchor = Vector.of(
        {"w": chunk + np.float32(SPREAD) * np.random.default_rng(1).standard_normal(len(chunk), np.float32)}
    )
    found: list[CodingFigures] = []
    for codec in codecs:
        here = codec.of(0, len(chunk), anchor)
        halves = {"both": (here.contribution, codec.contribution)}
        if codec.contribution != codec.average:
            halves = {"contributions": halves["both"], "averages": (here.average, codec.average)}
        for half, (coding, plain) in halves.items():
            code = coding.encode(chunk)
            found.append(
                CodingFigures(
                    codec.name,
                    half,
                    encode_gb_s=_gb_s(partial(coding.encode, chunk), seconds),
                    decode_gb_s=_gb_s(partial(coding.decode, code, chunk.dtype, len(chunk)), seconds),
                    normal=_loss(coding, [chunk]),
                    file=_loss(plain, _chunks(file)) if file else None,
                )
            )
    return found


def run(names: Sequence[str], file: Path | None) -> list[CodingFigures]:
    """What was asked for on the command line. Raises Failure."""
    try:
        codecs = [codec_named(name) for name in names or USUAL]
        return measure(codecs, read(file).vector if file else None)
    except InvalidInput as error:
        raise Failure(ExitCode.USAGE, str(error)) from error
    except TensorFileError as error:
        raise Failure(ExitCode.FAILED, str(error)) from error


def form(found: Sequence[CodingFigures]) -> Json:
    def loss(of: Loss | None) -> Json:
        return {"bits_per_element": of.bits_per_element, "relative_error": of.relative_error} if of else None

    return {
        "chunk_bytes": CHUNK_BYTES,
        "codecs": [
            {
                "codec": each.codec,
                "half": each.half,
                "encode_gb_s": each.encode_gb_s,
                "decode_gb_s": each.decode_gb_s,
                "normal": loss(each.normal),
                "file": loss(each.file),
            }
            for each in found
        ],
    }


def show(found: Sequence[CodingFigures]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("codec", no_wrap=True)
    with_file = any(each.file for each in found)
    for heading in ("bits", "encode GB/s", "decode GB/s", "error", *(("file: bits", "error") if with_file else ())):
        table.add_column(heading, justify="right")
    for each in found:
        losses = [each.normal, *([each.file] if each.file else [])]
        cells = [(f"{loss.bits_per_element:.2f}", f"{loss.relative_error:.2g}") for loss in losses]
        table.add_row(
            each.codec if each.half == "both" else f"{each.codec}, {each.half}",
            cells[0][0],
            f"{each.encode_gb_s:.1f}" if each.encode_gb_s < 1000 else "-",
            f"{each.decode_gb_s:.1f}" if each.decode_gb_s < 1000 else "-",
            cells[0][1],
            *(cells[1] if each.file else ()),
        )
    console = Console()
    console.print(table)
    console.print(
        "bits an element; float32 a second on one core (-: nothing to do); error of normally distributed values, "
        f"relative to their norm, where anchored {SPREAD:.0%} from their anchor"
        + ("; and of the file's, without anchors" if with_file else ""),
        style="dim",
        soft_wrap=True,
    )


def _chunks(vector: Vector) -> Iterator[Floats]:
    for segment in vector.layout.segments:
        step = CHUNK_BYTES // DTYPES[segment.dtype].itemsize
        for start in range(segment.start, segment.stop, step):
            yield vector.elements(start, min(start + step, segment.stop))


def _loss(coding: Coding, chunks: Sequence[Floats] | Iterator[Floats]) -> Loss:
    squares: list[tuple[float, float]] = []
    elements = code_bytes = 0
    for values in chunks:
        code = coding.encode(values)
        back = coding.decode(code, values.dtype, len(values))
        exact = values.astype(np.float64)
        squares.append((float(np.linalg.norm(back - exact)), float(np.linalg.norm(exact))))
        elements += len(values)
        code_bytes += len(code)
    off, norm = (math.hypot(*parts) for parts in zip(*squares, strict=True))
    return Loss(code_bytes * 8 / elements, off / norm if norm else 0.0)


def _gb_s(work: Callable[[], object], seconds: float) -> float:
    best = math.inf
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - began)
    return CHUNK_BYTES / best / 1e9
