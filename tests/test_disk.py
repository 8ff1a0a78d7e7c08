"""A disk that is full, or turns read-only, while something is written to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIKES = int(os.environ.get("VHABL_STRIKES", "2"))  # of each work and kind
OWN_DISK = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTS = ["sh", "-c", "mount -t tmpfs -o size=1m none . && mount -o remount,ro ."]


def own_disks() -> bool:
    try:
        return subprocess.run([*OWN_DISK, *MOUNTS], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    "work", ["training", "caching", "encoding", "indexing", "adding", "reporting"]
)
def test_a_disk_that_can_no_longer_be_written(work: str) -> None:
    """One message and exit code 2, what was there is still there, and once the disk is mended the
    same command ends as one that nothing disturbed.
    """
    if not own_disks():
        pytest.skip("no disk of one's own here: unshare and mount are not allowed")
    command = [*OWN_DISK, sys.executable, str(HERE / "striking.py"), work, str(STRIKES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{work}: " in done.stdout
