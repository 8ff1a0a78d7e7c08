"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from zipfile import ZipFile

import numpy as np

from vhabl.system.errors import VhablError, brief, describe_os_error, fail

T = TypeVar("T")

_BLOCK = 2**20  # bytes that show whether a disk is full
_LEFT = 24 * 3600  # seconds without a change after which nobody makes a temporary file any more

_PACKAGE = Path(__file__).resolve().parents[1]
# Where configs/ and dataset/emoji/ are: in the package where it is installed, else in the clone.
PROJECT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def locate(path: str | Path) -> Path:
    """A path as given, or, where that does not exist, the same path below `PROJECT`."""
    path = Path(path)
    below_project = PROJECT / path
    return below_project if not path.exists() and below_project.exists() else path


class Unwritable(VhablError):
    """A file or folder that the system refuses to write, and the reason."""

    def __init__(self, target: Path, reason: OSError) -> None:
        super().__init__(describe_os_error(OSError(reason.errno, reason.strerror, str(target))))
        self.reason = reason


def beside(target: Path) -> Path:
    """Where this process makes the file or folder `target`. What killed processes left there of it
    is removed when it is a day old: a younger one may be in the making, also on another machine.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.tmp")
    with suppress(OSError):  # what cannot be removed is in nobody's way
        for left in target.parent.iterdir():
            if pattern.fullmatch(left.name) and time.time() - left.stat().st_mtime > _LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends without an error.

    After a kill at any moment `target` is the old file or the new one, never a part of one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target)
    try:
        with named(target, temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        with suppress(OSError):  # it is gone, or the disk can no longer be written
            temporary.unlink()


@contextmanager
def named(target: Path, temporary: Path) -> Iterator[None]:
    """Say of what the system refuses to write which file it was for, and why.

    Libraries raise errors of many types then, few of which name the file or the reason: the system
    is asked itself. temporary: the file or folder where `target` is made. Raises Unwritable.
    """
    try:
        yield
    except Unwritable as error:  # of a part of what is made
        raise Unwritable(target, error.reason) from error
    except VhablError:
        raise
    except Exception as error:
        reason = error if isinstance(error, OSError) and error.errno else _refusal(temporary)
        if reason is None or not _is_of(reason, temporary):
            raise
        raise Unwritable(target, reason) from error


def _refusal(place: Path) -> OSError | None:
    """What the system says to a write beside a file or folder, or None where it lets it happen."""
    probe = place.with_name(f"{place.name}.more")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_BLOCK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return OSError(error.errno, error.strerror)  # without the probe's name
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def _is_of(error: OSError, place: Path) -> bool:
    """Whether an error may be one of a file or of what is in a folder: many name none."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(place)


def append(target: Path, content: bytes) -> None:
    """Write at the end of a file, which is there or not."""
    with named(target, target), target.open("ab") as file:
        file.write(content)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it
    does. Raises VhablError where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                do = "Wait until it ends, or choose another folder"
                fail(folder, "another process writes to it", do)
            # some network file systems hold no folders: there it is left to the user
        yield
    finally:
        os.close(held)


def most_content(path: Path, packing: int) -> int:
    """The most bytes that the content of a file may take, so many times the file where that is
    large: what declares more is damaged, or was made to fill the memory.
    """
    return max(2**28, packing * path.stat().st_size)


def open_array(path: Path, expected: str) -> np.ndarray:
    """The array of a .npy file as a memory map, which holds no Python objects: reading them could
    run code. Raises VhablError where the file is none.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # damaged bytes raise many types
        do = f"It must be {expected}"
        fail(path, f"the file is damaged or of another kind ({brief(error)})", do)


def check_archive(path: Path) -> None:
    """Raise ValueError where a file is no zip archive, or one that unpacks to far more."""
    with ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > most_content(path, 64):  # codes and weights hardly pack
        raise ValueError(f"an archive of {total:,} bytes of content")


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def read_rows(path: Path, kind: type[T], writer: str) -> list[T]:
    """The rows of a JSON file that `writer` wrote from a list of the dataclass `kind`, whose fields
    are texts, numbers and truth values. Raises VhablError where the file holds anything else.
    """
    types = get_type_hints(kind)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError("no list")
        for number, row in enumerate(rows, 1):
            for name, value in row.items():
                known = (float, int) if types[name] is float else types[name]
                if not isinstance(value, known) or (isinstance(value, bool) and known is not bool):
                    raise ValueError(f"{name} {value!r} in row {number}")
        return [kind(**row) for row in rows]
    except KeyError as error:
        found = f"an unknown {error}"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        found = brief(error)
    fail(path, f"this is no list of records ({found})", f"It must be what {writer} writes")


def write_json(target: Path, value: Any) -> None:
    write_text(target, json.dumps(value, indent=1) + "\n")
