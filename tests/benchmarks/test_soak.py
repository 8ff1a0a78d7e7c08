"""A slice of benchmarks/soak.py: long runs of it are for a release."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import soak  # noqa: E402

pytestmark = pytest.mark.robust


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("asked", [("page", "--minutes", "0.05"), ("train", "--epochs", "3")])
def test_a_short_soak_finds_nothing_wrong(asked: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *asked],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong:" not in done.stdout and "too short to say what grows" in done.stdout
    if asked[0] == "page":
        for line in ("text         200", "upload       200", "wrong        422"):
            assert line in done.stdout
        assert "written to the log  0 bytes" in done.stdout


def samples(mib: Callable[[float], float], files: Callable[[float], int]) -> list[soak.Sample]:
    return [soak.Sample(at, mib(at), files(at), 20) for at in range(0, 600, 2)]


@pytest.mark.parametrize(
    ("mib", "files", "wrong"),
    [
        (lambda at: 700 + min(at, 120), lambda at: 30, ""),  # the warm-up is nothing to speak of
        (lambda at: 700 + at % 20, lambda at: 30 + at % 6, ""),
        (lambda at: 700 + 0.1 * at, lambda at: 30, r"memory grew by 4\d\.\d MiB; at most 32"),
        (lambda at: 700, lambda at: 30 + at // 40, "open files grew from 34 to 44; at most 8 more"),
    ],
)
def test_what_grows_is_said(
    mib: Callable[[float], float], files: Callable[[float], int], wrong: str
) -> None:
    watch = soak.Watch(0, samples=samples(mib, files))
    found = "\n".join(watch.report())
    assert re.fullmatch(wrong, found), found
