"""Requests to stop: Ctrl-C, and SIGTERM of a server that ends a job."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vhabl.system.errors import note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """While this is entered, the first request is kept in `signal` and said; work goes on to where
    it can be stored. The second one ends the process as ever.

    what: what is finished first, for the message. said: False where a request is no user's word:
    torchrun asks the other processes so when one ends. Only the main thread can be asked.
    """

    def __init__(self, what: str, said: bool = True) -> None:
        self.what = what
        self.said = said
        self.signal = 0  # the number of the signal, once there was one
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self.said:
            note(f"{signal.Signals(number).name}: stops after {self.what}; once more stops at once")
