"""Foreign files that are read in a process of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vhabl.system import apart
from vhabl.system.apart import Blocks, read_apart
from vhabl.system.errors import VhablError, fail

pytestmark = pytest.mark.robust


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.mat"
    path.write_bytes(b"content")
    return path


def test_values_come_over_as_they_were(file: Path) -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "rows": rng.normal(size=(300, 70)), "columns": rng.normal(size=(300, 70)).T,
        "every other": rng.normal(size=(30, 70))[::2, ::3], "one": np.array(3.5),
        "none": np.zeros((0, 4)), "bits": rng.random((5, 5)) < 0.5, "three": rng.random((2, 3, 4)),
        "words": np.array(["é", "longer"]), "cells": np.array([["a", np.arange(3)]], object),
        "text": "text",
    }  # fmt: skip
    found = read_apart(file, lambda: values.items(), "numbers")
    assert list(found) == list(values)
    for name, value in values.items():
        assert type(found[name]) is type(value)
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            if value.dtype != object:
                np.testing.assert_array_equal(found[name], value)
                found[name][...] = value  # it can be written to
    assert found["cells"][0, 0] == "a" and found["cells"][0, 1].tolist() == [0, 1, 2]


def test_an_array_in_parts(file: Path) -> None:
    whole = np.arange(7000.0).reshape(100, 70)
    parts = Blocks(whole.shape, whole.dtype, (whole[at : at + 9] for at in range(0, 100, 9)), True)
    (found,) = read_apart(file, lambda: [("x", parts)], "numbers").values()
    np.testing.assert_array_equal(found, whole.T)


def crashes() -> Iterator[tuple[str, Any]]:
    yield "x", np.zeros(5)
    os.kill(os.getpid(), signal.SIGSEGV)


def ends_in_an_array() -> Iterator[tuple[str, Any]]:
    yield "x", Blocks((9,), np.dtype(float), [np.zeros(3)])
    os.kill(os.getpid(), signal.SIGBUS)


def loops() -> Iterator[tuple[str, Any]]:
    yield "x", 1
    while True:
        pass


def fills_the_memory() -> Iterator[tuple[str, Any]]:
    yield "x", np.ones(2**30, np.uint8)


def declares_too_much() -> Iterator[tuple[str, Any]]:
    yield "x", Blocks((2**20, 2**20), np.dtype(float), [])


def is_refused() -> Iterator[tuple[str, Any]]:
    fail("key x", "nothing", "Something")
    yield


def has_a_fault() -> Iterator[tuple[str, Any]]:
    yield "x", {}["y"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            crashes,
            "f.mat: the file is damaged and ended its reader (signal 11). It must be numbers",
        ),
        (ends_in_an_array, "its reader (signal 7"),
        (loops, "f.mat: reading it did not end in 1 s. It must be numbers"),
        (fills_the_memory, "f.mat: the file is damaged or truncated (Unable to allocate"),
        (declares_too_much, "more content than a file of its size may have"),
        (is_refused, "key x: nothing. Something"),
        (has_a_fault, "f.mat: the file is damaged or truncated ('y'). It must be numbers"),
    ],
)
def test_a_reader_that_fails_is_one_message(
    file: Path, read: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "SECONDS", 1)
    with pytest.raises(VhablError) as raised:
        read_apart(file, read, "numbers")
    assert message in str(raised.value)


def test_no_process_is_left_behind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor waited for, where what it says cannot be taken in."""

    def sleeps() -> Iterator[tuple[str, Any]]:
        yield "x", np.zeros(2**11)
        time.sleep(60)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "empty", stopped)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read_apart(file, sleeps, "numbers")
    assert time.monotonic() - begun < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
