"""Numbers over epochs as TensorBoard reads them."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vhabl.system.files import append


class ScalarLog:
    """A file of events, written when they are added: torch's SummaryWriter has a thread for it, and
    what a full disk says there reaches nobody as one message.

    folder: where TensorBoard looks for them; first: the epoch that is added first. What earlier
    files of the folder say of it and of later ones no longer counts. Raises VhablError where the
    file cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time():.6f}"
        self._write(file_version="brain.Event:2", step=first)
        self._write(session_log=SessionLog(status=SessionLog.START), step=first)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(summary=Summary(value=scalars), step=epoch)

    def _write(self, **content: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        append(self.path, record.getvalue())
