"""A slice of scripts/soak.py: long runs of it are for a release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("asked", [("page", "--minutes", "0.05"), ("train", "--epochs", "3")])
def test_a_short_soak_finds_nothing_wrong(asked: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), *asked],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong:" not in done.stdout and "too short to say what grows" in done.stdout
    if asked[0] == "page":
        for line in ("text         200", "upload       200", "wrong        422"):
            assert line in done.stdout
        assert "written to the log  0 bytes" in done.stdout
