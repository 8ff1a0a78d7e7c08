"""Work that is killed at random moments ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vhabl.system.files import beside, write_json

HERE = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("VHABL_KILLS", "3"))  # of each work
SEED = int(os.environ.get("VHABL_SEED", "0"))

pytestmark = pytest.mark.robust


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("work", ["training", "caching", "encoding", "indexing", "reporting"])
def test_killed_work_ends_as_any_other(work: str) -> None:
    """The files are those of a run that nothing disturbed, bit for bit, and no finished epoch is
    trained again, but for one whose state was not yet stored.
    """
    command = [sys.executable, str(HERE / "kill_faults.py"), work, str(KILLS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{work}: {KILLS} kills" in done.stdout


def test_what_killed_processes_left_goes_when_it_is_a_day_old() -> None:
    """Of what is written, and of no other; a younger one may be in the making."""
    day = 24 * 3600
    kept = {".a[1].json.10.tmp", ".a[1].json.tmp", ".a[1].json.b.6.tmp", ".a[1].json.7.tmp.x",
            ".b.8.tmp", "a[1].json.9.tmp"}  # fmt: skip
    for name in (".a[1].json.7.tmp", *kept):
        Path(name).write_text("a part")
        age = day - 60 if "10" in name else day + 60
        os.utime(name, (time.time() - age,) * 2)
    Path(".index.11.tmp/segment-0000").mkdir(parents=True)
    os.utime(".index.11.tmp", (0, 0))
    write_json(Path("a[1].json"), {})
    assert beside(Path("index")) == Path(f".index.{os.getpid()}.tmp")
    assert {path.name for path in Path().iterdir()} == {"a[1].json", *kept}
