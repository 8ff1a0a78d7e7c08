"""Fill the disk, or make it read-only, while a piece of work writes to it; then mend the disk, run
the same command again, and compare that with a run that nothing disturbed:
python tests/disk_faults.py WORK STRIKES, in an empty folder, by `unshare --user --map-root-user
--mount`: the disk is a small one in memory that no other process sees.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from kill_faults import EPOCHS, INPUTS, WORKS, content, counted_epochs, forked, prepare, trained

from vhabl.search import __main__ as search
from vhabl.system import errors

DISK, BALLAST = Path("disk"), Path("disk/ballast")
SAID = {"full": os.strerror(errno.ENOSPC), "read-only": os.strerror(errno.EROFS)}
PATIENCE = 60  # seconds: what hangs is ended
# What Python does to files of the disk: an event and where its path is among the arguments.
CHANGES = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0}


def adding(folder: Path) -> None:
    search.main(["add", str(folder / "index"), "--table", str(INPUTS / "more.csv"),
                 "--image-root", str((INPUTS / "pairs" / "images").resolve())])  # fmt: skip


def begin(work: str) -> Path:
    """The folder of a work on an empty disk, with what there is before it."""
    for left in DISK.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    folder = DISK / "work"
    folder.mkdir()
    if work == "adding":
        shutil.copytree(INPUTS / "index", folder / "index")
    return folder


class Strike:
    """Strikes the disk at the given change that this process makes to it, or at the first one after
    that at which the system allows it. room: bytes that are left of a disk that is full.
    """

    def __init__(self, how: str = "", at: int = 0, room: int = 0) -> None:
        self.how, self.at, self.room = how, at, room
        self.changes, self.busy = 0, False
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.busy or event not in CHANGES:
            return
        path, writes = arguments[CHANGES[event]], event != "open"
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not isinstance(path, str | bytes | os.PathLike):
            return
        if not Path(os.fsdecode(path)).resolve().is_relative_to(DISK.resolve()):
            return
        self.changes += 1
        if self.at and self.changes >= self.at:
            self.busy = True
            self.busy = self.struck()

    def struck(self) -> bool:
        if self.how == "read-only":  # refused while a file is open for writing
            return mounted("remount,ro")
        fill(self.room)
        return True


def mounted(options: str) -> bool:
    return subprocess.run(["mount", "-o", options, str(DISK)], capture_output=True).returncode == 0


def fill(room: int) -> None:
    with BALLAST.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**20)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - room))


def ended(run: Callable[[], object], strike: Callable[[], Strike]) -> tuple[int, str, int]:
    """Run in a process of its own as a command does: exit code, what it said on stderr, and how
    many changes to the disk it made.
    """
    said, count = Path("said"), Path("changes")
    process = os.fork()
    if process == 0:  # ends as any program does: with what threads and open files say of it
        signal.alarm(PATIENCE)
        for stream, name in ((1, os.devnull), (2, "said")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        made = strike()

        def main(_: list[str]) -> None:
            try:
                run()
            finally:
                made.busy = True
                count.write_text(str(made.changes))

        errors.run(main)
    _, status = os.waitpid(process, 0)
    text = said.read_text(encoding="utf-8", errors="replace")
    return os.waitstatus_to_exitcode(status), text, int(count.read_text())


def main(name: str, strikes: int) -> None:
    torch.set_num_threads(1)
    prepare()
    (INPUTS / "more.csv").write_text("image,caption\n0.png,one more\n", encoding="utf-8")
    forked(trained)
    if name == "adding":
        forked(lambda: WORKS["indexing"](INPUTS))
    work = {**WORKS, "adding": adding}[name]
    counted_epochs()
    DISK.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", str(DISK)], check=True)
    begin(name)
    forked(lambda: work(DISK / "work"))  # what is compiled or measured once is now there
    folder = begin(name)
    before = content(folder)
    EPOCHS.unlink(missing_ok=True)
    code, text, changes = ended(lambda: work(folder), Strike)
    if code:
        sys.exit(f"undisturbed: exit code {code}\n{text}")
    expected = content(folder)
    of_one = EPOCHS.stat().st_size if EPOCHS.exists() else 0
    refused = dict.fromkeys(SAID, 0)
    for number, how in product(range(strikes), SAID):
        at = 1 + (number * changes // strikes if strikes < changes else number % changes)
        room = (0, 0, 4096, 65536)[number % 4]
        where = f"{how} at change {at} of {changes}, {room} bytes left"
        folder = begin(name)
        EPOCHS.unlink(missing_ok=True)
        code, text, _ = ended(lambda: work(folder), lambda: Strike(how, at, room))  # noqa: B023
        mounted("remount,rw")
        BALLAST.unlink(missing_ok=True)
        left = content(folder)
        lines = [line for line in text.splitlines() if not line.startswith("note: ")]
        if code == 0:
            if left != expected or lines:
                sys.exit(f"{where}: exit code 0 and not all is there\n{text}")
            continue
        refused[how] += 1
        named = str(DISK) in text and ".tmp" not in text
        if code != 2 or len(lines) != 1 or SAID[how] not in text or not named:
            sys.exit(f"{where}: exit code {code} and\n{text}")
        if how == "full" and (parts := [str(path) for path in folder.rglob("*.tmp*")]):
            sys.exit(f"{where}: left {', '.join(parts)}")
        for file in before.keys() | left.keys():
            if left.get(file) not in (before.get(file), expected.get(file, left.get(file))):
                sys.exit(f"{where}: a part of {file}, or nothing")
        code, text, _ = ended(lambda: work(folder), Strike)  # noqa: B023
        found = content(folder)
        if code or found != expected:
            names = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
            sys.exit(f"{where}: the second time other files: {', '.join(names)}\n{text}")
        again = (EPOCHS.stat().st_size if EPOCHS.exists() else 0) - of_one
        if again > 1:
            sys.exit(f"{where}: {again} epochs were trained twice")
    if not all(refused.values()):
        sys.exit(f"a strike that nobody felt: {refused}")
    said = ", ".join(f"{count} of {strikes} {how}" for how, count in refused.items())
    print(f"{name}: {changes} changes to the disk; refused: {said}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
