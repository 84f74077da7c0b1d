"""Three buffers: the trainer always has one to write, the daemon always has a whole model, and they never meet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.posts import BUFFERS, Posts
from moshpitd.averaging.vector import Vector

LAYOUT = Vector.of({"w": np.zeros(1, np.float32)}).layout


def model(buffer: Vector) -> float:
    return float(buffer.arrays()["w"][0])


@given(st.lists(st.sampled_from(["post", "send", "sent"]), max_size=200))
def test_whatever_comes_first_no_model_is_torn(story: list[str]) -> None:
    buffers = [Vector.empty(LAYOUT) for _ in range(BUFFERS)]
    posts, written, sending = Posts(), 0, 0.0
    for event in story:
        own = posts.writable(buffers)
        own.arrays()["w"][0] = np.nan  # its trainer is in the middle of writing
        if event == "post":
            written += 1
            own.arrays()["w"][0] = written
            posts.post(own, written)
        elif event == "send" and posts.newest and not posts.sending:
            sending = model(posts.send().vector)
        elif event == "sent":
            posts.sent()
        if posts.newest:
            assert model(posts.newest.vector) == written, "the newest post is whole, whatever the trainer writes"
        if posts.sending:
            assert model(posts.sending.vector) == sending, "what a version reads does not change"


def test_two_buffers_would_not_do() -> None:
    buffers = [Vector.empty(LAYOUT) for _ in range(2)]
    posts = Posts()
    posts.post(posts.writable(buffers), 1)
    posts.send()
    posts.post(posts.writable(buffers), 2)
    with pytest.raises(StopIteration):
        posts.writable(buffers)


def test_writing_where_it_must_not_is_our_own_fault() -> None:
    buffer, posts = Vector.empty(LAYOUT), Posts()
    posts.post(buffer, 1)
    with pytest.raises(AssertionError):
        posts.post(buffer, 2)
