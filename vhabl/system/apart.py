"""Foreign files read in a process of their own, which a damaged one may end without ending ours.

The libraries for MATLAB and HDF5 files are written in C: damaged bytes can crash them, and sizes
that a file merely declares can take any memory and time. The forked process has limits on both, and
hands over what it read one array after the other, so that none is in memory twice for long.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from vhabl.system.errors import VhablError, brief, fail
from vhabl.system.files import most_content

BLOCK = 2**24  # bytes of an array that are handed over at once
PIPE = 2**20  # bytes between the processes, where the system lets us choose
PACKING = 1032  # deflate makes no more of a byte; nearly so much where a matrix is mostly zeros
SECONDS = 8  # of computing, and one more for each MB of the file


@dataclass(frozen=True)
class Blocks:
    """An array that is read in parts, one after the other along its first axis; turned: it is the
    transposed array that is meant.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[np.ndarray]
    turned: bool = False


def read_apart(
    path: Path, read: Callable[[], Iterable[tuple[str, Any]]], expected: str
) -> dict[str, Any]:
    """What `read` yields in a forked process, by name; `Blocks` as arrays.

    Raises VhablError, with what was expected of the file, where reading fails, ends the process, or
    takes more than the content of a file of this size may.
    """
    must = f"It must be {expected}"
    seconds = SECONDS + path.stat().st_size // 2**20
    ours, theirs = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # fewer turns of the two processes
        with suppress(OSError):
            fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, PIPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which is needed
        process = os.fork()
    if process == 0:
        os.close(ours)
        _hand_over(theirs, read, most_content(path, PACKING), seconds)
    os.close(theirs)
    try:
        with open(ours, "rb") as pipe:  # noqa: PTH123 - a number of a file
            return dict(_received(pipe))
    except _Failed as error:
        fail(path, f"the file is damaged or truncated ({error})", must)
    except (EOFError, pickle.UnpicklingError):
        _, status = os.waitpid(process, 0)
        process = 0
    finally:
        if process:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    ended = -os.waitstatus_to_exitcode(status)
    if ended == signal.SIGXCPU:
        fail(path, f"reading it did not end in {seconds} s", must)
    fail(path, f"the file is damaged and ended its reader (signal {ended})", must)


class _Failed(Exception):
    """What ended reading, in words."""


def _received(pipe: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """What our own process wrote: the names and values, to the end. Raises EOFError before it."""
    while (message := pickle.load(pipe)) is not None:
        name, value = message
        if isinstance(value, VhablError | _Failed):
            raise value
        if isinstance(value, Blocks):
            array = np.empty(value.shape, value.dtype)
            rest = array.reshape(-1).view(np.uint8).data
            while rest:
                count = pipe.readinto(rest[:BLOCK])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError
                rest = rest[count:]
            value = array.T if value.turned else array
        yield name, value


def _hand_over(
    pipe: int, read: Callable[[], Iterable[tuple[str, Any]]], most: int, seconds: int
) -> None:
    """The whole life of the forked process."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ours is ended by the one that waits for it
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says of its crash
        _limit(2 * most + 4 * BLOCK, seconds)
        with open(pipe, "wb") as file:
            try:
                for name, value in read():
                    most = _write(file, name, value, most)
                pickle.dump(None, file)
            except VhablError as error:
                pickle.dump(("", error), file)
            except Exception as error:  # the readers raise many types on damaged bytes
                pickle.dump(("", _Failed(brief(error))), file)
    finally:
        os._exit(0)


def _limit(memory: int, seconds: int) -> None:
    """Limits of this process, from here on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    size = Path("/proc/self/statm")
    if size.exists():
        used = int(size.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _write(file: IO[bytes], name: str, value: Any, most: int) -> int:
    """Hand over a value, of at most so many bytes; how many are left."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        turned = not value.flags.c_contiguous and value.flags.f_contiguous
        value = np.asarray(value.T if turned else value, order="C")
        value = Blocks(value.shape, value.dtype, [value], turned)
    if not isinstance(value, Blocks):
        pickle.dump((name, value), file)
        return most
    most -= int(np.prod(value.shape, dtype=object)) * value.dtype.itemsize
    if most < 0:
        raise ValueError("more content than a file of its size may have")
    pickle.dump((name, Blocks(value.shape, value.dtype, [], value.turned)), file)
    for part in value.parts:
        flat = part.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), BLOCK):
            file.write(flat[start : start + BLOCK].data)
    return most
