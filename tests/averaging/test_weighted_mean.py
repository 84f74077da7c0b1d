"""The mean of whole vectors, job by job, against a dumb twin."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.averaging.weighted_mean import JOB_BYTES_MAX, copy_jobs, mean_jobs

LAYOUT = Layout.of(
    [
        TensorSpec("double", (700_001,), "float64"),
        TensorSpec("single", (1201, 3), "float32"),
        TensorSpec("half", (5,), "float16"),
        TensorSpec("brain", (4097,), "bfloat16"),
    ]
)
ROUNDING = {"double": 1e-7, "single": 1e-6, "half": 2**-11, "brain": 2**-8}
"""float64 by weights that are rounded to float32, as everywhere."""


def random_vector(seed: int) -> Vector:
    vector, rng = Vector.empty(LAYOUT), np.random.default_rng(seed)
    for _, view in vector.views():
        view[:] = rng.uniform(-1, 1, len(view))
    return vector


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [1.0, 0.0, 2.5], [1e-3, 7.0, 1e5, 0.0, 4.0]])
def test_the_mean_of_vectors_of_all_dtypes_in_jobs_of_any_order(weights: list[float]) -> None:
    vectors = [random_vector(seed) for seed in range(len(weights))]
    result = Vector.empty(LAYOUT)
    jobs = list(mean_jobs(vectors, weights, result))
    random.Random(0).shuffle(jobs)
    for job in jobs:
        job()
    for name, values in result.arrays().items():
        rows = [vector.arrays()[name].astype(np.float64) for vector in vectors]
        expected = np.average(rows, axis=0, weights=weights)
        assert np.max(np.abs(values.astype(np.float64) - expected)) <= ROUNDING[name], name


def test_equal_vectors_stay_as_they_are_and_what_has_no_weight_is_not_read() -> None:
    vector, spoilt, result = random_vector(1), Vector.empty(LAYOUT), Vector.empty(LAYOUT)
    spoilt.buffer[:] = 0xFF
    for job in mean_jobs([vector, spoilt, vector, vector], [1.0, 0.0, 2.0, 1.0], result):
        job()
    assert (result.buffer == vector.buffer).all()


def test_no_job_is_longer_than_allowed() -> None:
    vectors = [random_vector(seed) for seed in range(4)]
    jobs = list(mean_jobs(vectors, [1.0] * 4, Vector.empty(LAYOUT)))
    assert len(jobs) >= 4 * LAYOUT.byte_size // JOB_BYTES_MAX


def test_a_copy_is_a_copy() -> None:
    source, target = random_vector(1), Vector.empty(LAYOUT)
    jobs = list(copy_jobs(source, target))
    assert len(jobs) == -(-LAYOUT.byte_size // JOB_BYTES_MAX)
    for job in reversed(jobs):
        job()
    assert (target.buffer == source.buffer).all()
