"""A disk that is full, or turns read-only, while something is written to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vhabl.system.errors import VhablError
from vhabl.system.files import atomic_path
from vhabl.training.tensorboard import ScalarLog

HERE = Path(__file__).resolve().parents[1]
STRIKES = int(os.environ.get("VHABL_STRIKES", "2"))  # of each work and kind
OWN_DISK = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTS = ["sh", "-c", "mount -t tmpfs -o size=1m none . && mount -o remount,ro ."]

pytestmark = pytest.mark.robust


def own_disks() -> bool:
    try:
        return (
            subprocess.run([*OWN_DISK, *MOUNTS], capture_output=True, check=False).returncode == 0
        )
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
    command = [*OWN_DISK, sys.executable, str(HERE / "disk_faults.py"), work, str(STRIKES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{work}: " in done.stdout


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_to_a_full_disk() -> None:
    printing = "from vhabl.system import errors; errors.run(lambda _: print('x'))"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", printing],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: standard output: No space left on device. Make room for it and "
        "run the command again\n"
    )


def full(path: Path) -> None:
    """What a library raises that hides why it could not write."""
    path.write_bytes(b"a part")
    raise RuntimeError("unexpected pos 64 vs 0")


def test_the_system_is_asked_why_a_library_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Path("state.pt")
    target.write_text("good")
    with pytest.raises(RuntimeError, match="unexpected pos"), atomic_path(target) as path:
        full(path)  # the disk has room: it is another fault, and said as it is
    monkeypatch.setattr(os, "fsync", refuse)
    said = r"^state\.pt: Disk quota exceeded. Make room"
    with pytest.raises(VhablError, match=said), atomic_path(target) as path:
        full(path)
    with pytest.raises(OSError, match=r"\[Errno 2\].*nothing\.png"), atomic_path(target) as path:
        Path("nothing.png").read_bytes()  # an error of another file keeps its name
    assert [p.name for p in Path().iterdir()] == ["state.pt"] and target.read_text() == "good"


def refuse(_: int) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_the_scalars_of_every_epoch_are_read_by_tensorboard() -> None:
    """Those of epochs that are trained again count once."""
    log = ScalarLog(Path("log"), 1)
    for epoch in (1, 2, 3):
        log.add(epoch, {"loss": 1 / epoch, "validation": 0.5})
    again = ScalarLog(Path("log"), 3)
    for epoch in (3, 4):
        again.add(epoch, {"loss": 10.0 + epoch})
    assert again.path.name > log.path.name
    events = EventAccumulator("log").Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, 13.0), (4, 14.0),
    ]  # fmt: skip
    assert [e.step for e in events.Scalars("validation")] == [1, 2]
