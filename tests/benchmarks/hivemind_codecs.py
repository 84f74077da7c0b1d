"""What hivemind's codecs cost and lose, on the values that ours are measured with.

Knows hivemind and torch; does not know moshpitd. It runs inside the environment that rivals.py makes,
on one thread, and prints one JSON object on its last line:

    {"hivemind", "torch", "codecs": [{"codec", "bits_per_element", "encode_gb_s", "decode_gb_s", "relative_error"}],
     "missing": [...]}
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import hivemind
import numpy as np
import torch
from hivemind.compression import (
    BlockwiseQuantization,
    CompressionInfo,
    Float16Compression,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
    quantization,
)

# hivemind 1.1.12 takes int() of an array of one element, which numpy refuses since 2.4: without this its 8-bit codecs
# cannot decode at all.
quantization.int = lambda value: int(np.asarray(value).reshape(-1)[0])


def main() -> None:
    """Parses the command line, measures, prints the JSON."""
    parser = argparse.ArgumentParser(description="Measure hivemind's codecs on normally distributed float32.")
    parser.add_argument("--elements", type=int, default=1 << 18)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(arguments.elements, np.float32))
    info = CompressionInfo.from_tensor(values)
    found, missing = [], []
    for codec in (Uniform8BitQuantization(), Quantile8BitQuantization(), BlockwiseQuantization(), Float16Compression()):
        name = type(codec).__name__
        try:
            code = codec.compress(values, info)
        except ImportError as error:
            missing.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        back = codec.extract(code)
        found.append(
            {
                "codec": name,
                "bits_per_element": len(code.buffer) * 8 / len(values),
                "encode_gb_s": gb_s(lambda codec=codec: codec.compress(values, info), values, arguments.seconds),
                "decode_gb_s": gb_s(lambda codec=codec, code=code: codec.extract(code), values, arguments.seconds),
                "relative_error": float((back.double() - values.double()).norm() / values.double().norm()),
            }
        )
    report = {"hivemind": hivemind.__version__, "torch": torch.__version__, "codecs": found, "missing": missing}
    print(json.dumps(report), flush=True)


def gb_s(work: Callable[[], object], values: torch.Tensor, seconds: float) -> float:
    """1e9 bytes of float32 a second, the fastest of all tries."""
    best = math.inf
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - began)
    return values.numel() * 4 / best / 1e9


if __name__ == "__main__":
    main()
