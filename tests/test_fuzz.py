"""Damaged and hostile files of every reader: read, or refused with one message and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = int(os.environ.get("VHABL_FUZZ", "150"))  # of each reader
FIRST = int(os.environ.get("VHABL_SEED", "0"))  # the number of the first one
# Cases that once crashed, hung, took too much or ended with a traceback: READER:NUMBER.
FOUND = ()


def fuzz(first: int, count: int, *readers: str) -> dict[str, tuple[int, int]]:
    """How many files each reader read and refused. Any other outcome fails the test."""
    command = [sys.executable, str(HERE / "fuzzing.py"), str(first), str(count), *readers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = re.findall(r"^(\w+): ([\d,]+) read, ([\d,]+) refused;", done.stdout, re.M)
    return {name: (int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in found}
