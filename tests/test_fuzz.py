"""Damaged and hostile files of every reader: read, or refused with a message and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = int(os.environ.get("VHABL_FUZZ", "60"))  # of each reader
FIRST = int(os.environ.get("VHABL_SEED", "0"))  # the number of the first one
FOUND = ("features:14",)  # what once crashed, hung, took too much or ended with a traceback


def fuzz(first: int, count: int, *readers: str) -> int:
    """How many files were read or refused. Any other outcome fails the test."""
    command = [sys.executable, str(HERE / "fuzzing.py"), str(first), str(count), *readers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    print(done.stdout)
    found = re.findall(r"^[\w:]+: ([\d,]+) read, ([\d,]+) refused, 0 failed;", done.stdout, re.M)
    return sum(int(number.replace(",", "")) for pair in found for number in pair)


QUICK = ("features", "features_73", "code_files", "arrays", "tables", "images", "recipes",
         "overrides", "filters", "shards", "clip_weights", "cnn_weights", "caches")  # fmt: skip


def test_a_few_files_of_each_format() -> None:
    assert fuzz(FIRST, 10, *QUICK) == 10 * len(QUICK)


def test_files_that_were_found_once() -> None:
    assert fuzz(0, 0, *FOUND) == len(FOUND)


@pytest.mark.slow
@pytest.mark.e2e
def test_many_files_of_every_reader() -> None:
    listed = (HERE / "fuzzing.py").read_text(encoding="utf-8")
    readers = re.findall(r"^@reader|^READERS\[", listed, re.M)
    assert fuzz(FIRST, FILES) == FILES * len(readers)
