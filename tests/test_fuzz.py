"""Damaged and hostile files of every reader: read, or refused with a message and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = int(os.environ.get("VHABL_FUZZ", "30"))  # of each reader
FIRST = int(os.environ.get("VHABL_SEED", "0"))  # the number of the first one
# What once crashed, hung, took too much or ended with a traceback; in runs, which are trained.
FOUND = ("features:14", "features:100", "features_73:33", "code_files:74", "recipes:30",
         "recipes:51", "recipes:67", "overrides:1", "overrides:59", "filters:73",
         "clip_weights:39", "clip_weights:83", "towers:5030", "towers:5136", "towers:5217",
         "towers:5331", "towers:5455")  # fmt: skip
FOUND_IN_RUNS = ("history:4", "weights:15", "weights:112", "encoded:2", "encoded:12", "indexes:2",
                 "indexes:16", "indexes:92", "indexes:99", "indexes:108", "encoded:5028",
                 "encoded:5335")  # fmt: skip

pytestmark = pytest.mark.robust


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
def test_files_of_runs_that_were_found_once() -> None:
    assert fuzz(0, 0, *FOUND_IN_RUNS) == len(FOUND_IN_RUNS)


@pytest.mark.slow
@pytest.mark.e2e
def test_many_files_of_every_reader() -> None:
    listed = (HERE / "fuzzing.py").read_text(encoding="utf-8")
    readers = re.findall(r"^@reader|^READERS\[", listed, re.M)
    assert fuzz(FIRST, FILES) == FILES * len(readers)
