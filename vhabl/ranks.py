"""The processes that torchrun starts for one command: which of them this is, and errors they share.

Without torchrun there is one rank, and nothing here changes what a command does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from vhabl.errors import EXIT_USER_ERROR, VhablError, describe_os_error, fail

T = TypeVar("T")

# A rank that has little to do waits for those that have days of work. It does not wait for one that
# died: its connection ends, and torchrun stops all.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; local: its number among those of this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def device(self, name: str) -> str:
        """The device of this rank: for auto and cuda, one GPU each where there are any."""
        own = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local}" if own else name

    def everywhere(self, step: Callable[[], T]) -> T:
        """What `step` gives on this rank, once it has ended on all. Only rank 0 prints.

        Raises VhablError on rank 0 where the step failed on any rank; the others leave without a
        word and with exit code 0, as torchrun stops all ranks at the first that fails: it has to be
        the one that speaks.
        """
        if self.size == 1:
            return step()
        error: VhablError | OSError | SystemExit | None = None
        try:
            with _muted(self.rank > 0):
                result = step()
        except (VhablError, OSError, SystemExit) as caught:  # the last one is argparse's
            error = caught
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        messages = self.gather(message if error is not None else None)
        if all(text is None for text in messages):
            return result
        if self.rank > 0:
            sys.exit(0)
        if error is not None:
            raise error
        raise VhablError(next(text for text in messages if text is not None))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, once all have come here.

        Raises VhablError on rank 0 where a rank died.
        """
        found = [value] * self.size
        if self.size == 1:
            return found
        try:
            dist.all_gather_object(found, value)
        except RuntimeError:  # a connection was closed
            if self.rank > 0:
                sys.exit(EXIT_USER_ERROR)
            fail("processes", "one that died", f"all {self.size} to the end: run the command again")
        return found


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, connected to the others."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, size, local)
    finally:
        dist.destroy_process_group()


@contextmanager
def _muted(silent: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
