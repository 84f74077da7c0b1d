"""Which codec each tensor travels by.

    flash8                                             all alike
    *.bias=float32,size<4096=float32,*=flash4-8        the first rule that fits a tensor counts

A rule's pattern is a shell's, for names ("*", "?", "[...]", case counts; write ? for a comma), or `size<N`: tensors of
fewer elements. A tensor that no rule fits is refused by name, and so is a rule that can never count. `Rules.name` is
the one spelling of what is meant, for terms are compared as text.

Tensors lie in the vector in the order of their names, so codecs may change every few thousand elements: weight, bias,
weight, bias. Chunks do not end there. What one chunk has of one codec, from however many tensors, is gathered, coded at
once, and laid behind what it has of the codec before: chunks stay large, and small tensors cost nothing.
"""

from __future__ import annotations

import bisect
import fnmatch
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moshpitd.averaging.codecs.auto import AUTO, CHOICES
from moshpitd.averaging.codecs.codec import Codec, VectorCodec
from moshpitd.averaging.codecs.coding import Coding
from moshpitd.averaging.codecs.names import codec_named
from moshpitd.averaging.errors import InvalidInput, RemoteProtocolError
from moshpitd.averaging.vector import DTYPES, Floats, Layout, TensorSpec, Vector

RULES_MAX = 64
TEXT_MAX = 1000
"""Characters of all rules: terms are told as text of at most 1,024."""
EVERYTHING = "*"
_SIZE = re.compile(r"size\s*<\s*([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors that fit the pattern travel by this codec."""

    pattern: str
    codec: str
    """Canonical, or `auto`."""

    def fits(self, spec: TensorSpec) -> bool:
        if size := _SIZE.fullmatch(self.pattern):
            return spec.elements < int(size[1])
        return fnmatch.fnmatchcase(spec.name, self.pattern)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a session calls its codec."""

    rules: tuple[Rule, ...]

    @property
    def name(self) -> str:
        """Canonical."""
        if [rule.pattern for rule in self.rules] == [EVERYTHING]:
            return self.rules[0].codec
        return ",".join(f"{rule.pattern}={rule.codec}" for rule in self.rules)

    @property
    def has_auto(self) -> bool:
        return any(rule.codec == AUTO for rule in self.rules)

    @property
    def by_tensor(self) -> bool:
        """Whether it depends on the tensor."""
        return len(self.rules) > 1 or self.rules[0].pattern != EVERYTHING

    @property
    def is_anchored(self) -> bool:
        return any(rule.codec != AUTO and codec_named(rule.codec).anchored for rule in self.rules)

    @property
    def precision(self) -> float:
        """Of the least precise; see Codec."""
        return max(codec_named(rule.codec).precision for rule in self.rules)

    def with_auto(self, codec: str) -> Rules:
        """The same, with this codec where it says `auto`."""
        return Rules(tuple(replace(rule, codec=codec) if rule.codec == AUTO else rule for rule in self.rules))

    def check(self, layout: Layout) -> None:
        """Raises InvalidInput for a tensor that no rule fits."""
        for spec in layout.tensors:
            self._rule_of(spec)

    def share_of_auto(self, layout: Layout) -> tuple[int, int]:
        """How many bytes, and elements, of the vector `auto` is to be chosen for."""
        specs = [spec for spec in layout.tensors if self._rule_of(spec).codec == AUTO]
        elements = sum(spec.elements for spec in specs)
        return sum(spec.elements * DTYPES[spec.dtype].itemsize for spec in specs), elements

    def wire_bytes(self, layout: Layout) -> int:
        """Of the whole vector as contributions and as averages; `auto` as where lines are slow."""
        total = 0
        codecs = {rule.codec: codec_named(CHOICES[-1] if rule.codec == AUTO else rule.codec) for rule in self.rules}
        for spec in layout.tensors:
            codec, dtype = codecs[self._rule_of(spec).codec], DTYPES[spec.dtype]
            total += sum(half.encoded_bytes(dtype, spec.elements) for half in (codec.contribution, codec.average))
        return total

    def over(self, layout: Layout) -> VectorCodec:
        """For vectors of this layout; there is no `auto` left."""
        codecs = {rule.codec: codec_named(rule.codec) for rule in self.rules}
        ends: list[int] = []
        runs: list[Codec] = []
        end = 0
        for spec in layout.tensors:
            codec = codecs[self._rule_of(spec).codec]
            end += spec.elements
            if runs and runs[-1] == codec:
                ends[-1] = end
            elif spec.elements:
                runs.append(codec)
                ends.append(end)
        return runs[0] if len(self.rules) == 1 else ByTensor(self.name, tuple(ends), tuple(runs))

    def _rule_of(self, spec: TensorSpec) -> Rule:
        for rule in self.rules:
            if rule.fits(spec):
                return rule
        raise InvalidInput(
            f"no codec for tensor {spec}: none of the rules {self.name!r} fits it; end them with *=float32, say"
        )


def rules_of(text: str) -> Rules:
    """What is written as a session's codec. Raises InvalidInput."""
    if "=" not in text:
        return Rules((Rule(EVERYTHING, text if text == AUTO else codec_named(text).name),))
    rules: list[Rule] = []
    for part in text.split(","):
        pattern, equals, codec = (each.strip() for each in part.rpartition("="))
        if not equals or not pattern:
            raise InvalidInput(f"codec rule {part[:80]!r}: write PATTERN=CODEC, such as *.bias=float32")
        if size := _SIZE.fullmatch(pattern):
            pattern = f"size<{int(size[1])}"
        for before in rules:
            if before.pattern in (pattern, EVERYTHING):
                raise InvalidInput(
                    f"codec rule {part.strip()[:80]!r} can never count, {before.pattern!r} comes before it: "
                    "the first rule that fits a tensor counts"
                )
        rules.append(Rule(pattern, codec if codec == AUTO else codec_named(codec).name))
    found = Rules(tuple(rules))
    if len(rules) > RULES_MAX or len(found.name) > TEXT_MAX:
        raise InvalidInput(f"{len(rules)} codec rules: at most {RULES_MAX}, of {TEXT_MAX} characters together")
    return found


# ---- a vector of several codecs


@dataclass(frozen=True, slots=True)
class ByTensor:
    """A codec for each run of the vector; see VectorCodec."""

    name: str
    ends: tuple[int, ...]
    """Where each run ends; runs follow each other."""
    runs: tuple[Codec, ...]

    def of(self, start: int, stop: int, anchor: Vector | None = None) -> Codec:
        places: dict[str, list[slice]] = {}
        codecs: dict[str, Codec] = {}
        at = start
        for number in range(bisect.bisect_right(self.ends, start), len(self.ends)):
            end, codec = min(self.ends[number], stop), self.runs[number]
            codecs[codec.name] = codec
            places.setdefault(codec.name, []).append(slice(at - start, end - start))
            at = end
            if at == stop:
                break
        if len(codecs) == 1:
            return codec.of(start, stop, anchor)
        parts: list[tuple[Places, Codec]] = []
        for name, codec in codecs.items():
            there = Places(tuple(places[name]))
            if anchor is not None:
                codec = codec.around(partial(there.of, anchor, start, stop))
            parts.append((there, codec))
        return Codec(
            self.name,
            Gathered(tuple((there, codec.contribution) for there, codec in parts)),
            Gathered(tuple((there, codec.average) for there, codec in parts)),
            max(codec.precision for _, codec in parts),
        )


@dataclass(frozen=True, slots=True)
class Places:
    """Some elements of a chunk."""

    slices: tuple[slice, ...]

    @property
    def elements(self) -> int:
        return sum(each.stop - each.start for each in self.slices)

    def take(self, chunk: Floats) -> Floats:
        if len(self.slices) == 1:
            return chunk[self.slices[0]]
        return np.concatenate([chunk[each] for each in self.slices])

    def put(self, values: Floats, chunk: Floats) -> None:
        at = 0
        for each in self.slices:
            size = each.stop - each.start
            chunk[each] = values[at : at + size]
            at += size

    def of(self, vector: Vector, start: int, stop: int) -> Floats:
        """... where the chunk is these elements of a vector."""
        return self.take(vector.elements(start, stop))


@dataclass(frozen=True, slots=True)
class Gathered:
    """A coding of several, each for some places of the chunk; their codes follow each other."""

    parts: tuple[tuple[Places, Coding], ...]

    def encode(self, values: Floats) -> bytes:
        return b"".join(coding.encode(there.take(values)) for there, coding in self.parts)

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        if len(payload) != (size := self.encoded_bytes(dtype, elements)):
            raise RemoteProtocolError(f"{elements} elements by several codecs have {size} bytes, not {len(payload)}")
        values = np.empty(elements, dtype)
        view, at = memoryview(payload), 0
        for there, coding in self.parts:
            size = coding.encoded_bytes(dtype, there.elements)
            there.put(coding.decode(view[at : at + size], dtype, there.elements), values)
            at += size
        return values

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        return sum(coding.encoded_bytes(dtype, there.elements) for there, coding in self.parts)
