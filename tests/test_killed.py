"""Work that is killed at random moments ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("VHABL_KILLS", "4"))  # of each work
SEED = int(os.environ.get("VHABL_SEED", "0"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("work", ["training", "caching", "encoding", "indexing", "reporting"])
def test_killed_work_ends_as_any_other(work: str) -> None:
    """The files are those of a run that nothing disturbed, bit for bit, and no finished epoch is
    trained again, but for one whose state was not yet stored.
    """
    command = [sys.executable, str(HERE / "killing.py"), work, str(KILLS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{work}: {KILLS} kills" in done.stdout
