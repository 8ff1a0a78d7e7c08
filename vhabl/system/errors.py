"""Errors a user can cause, and the one place that turns them into exit code 2."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import NoReturn

EXIT_USER_ERROR = 2


class VhablError(Exception):
    """Something the user can mend: says where, what is wrong, and what to do."""


class Stopped(Exception):
    """Work that was asked to stop and stored what it had. code: the exit code of such an end."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


def fail(where: object, what: str, do: str) -> NoReturn:
    """Raise a `VhablError`: where, what is wrong, and a sentence that says what to do."""
    raise VhablError(f"{where}: {what}. {do}")


def bad_value(name: str, value: object, needed: str) -> NoReturn:
    """Raise a `VhablError` for a value that a key, an argument or a cell cannot have."""
    raise VhablError(f"{name} is {value}, but must be {needed}")


@cache
def note(text: str) -> None:
    """Tell the user something that is no error, on stderr, once."""
    print(f"note: {text}", file=sys.stderr)


def plural(count: int, noun: str) -> str:
    """`1 item`, `3 items`, `2 queries`: for messages."""
    several = f"{noun[:-1]}ies" if noun.endswith(("ry", "py")) else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"


def brief(error: Exception) -> str:
    """What another library said, as one line of at most 120 characters; else the error's name."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, naming the file and what would mend it."""
    where = error.filename if error.filename is not None else "file system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: {os.strerror(error.errno)}. Make room for it and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(error.errno)
        return f"{where}: no permission ({reason}). It must be readable and writable"
    reason = (error.strerror or brief(error)).lower()
    return f"{where}: {reason}. Give a file or folder that can be used"


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run an entry point: a user's error is one message on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except (VhablError, OSError, Stopped, KeyboardInterrupt) as error:
        _say(error)
        code = exit_code(error)
    sys.exit(code)


def _say(error: BaseException) -> None:
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, OSError):
        if _stdout_fails():
            error = OSError(error.errno, "", "standard output")
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
    elif isinstance(error, VhablError):
        print(f"error: {error}", file=sys.stderr)
    else:
        print(error if isinstance(error, Stopped) else "interrupted", file=sys.stderr)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, BrokenPipeError):  # the reader of our output (such as `head`) has left
        return 0
    if isinstance(error, VhablError | OSError):
        return EXIT_USER_ERROR
    if isinstance(error, Stopped):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _stdout_fails() -> bool:
    """Whether what was printed cannot be written. Then it is thrown away: the interpreter would try
    once more at its end, and complain.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
