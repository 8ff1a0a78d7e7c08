"""Binary codes for image-text pairs: hashing methods, exact evaluation, search."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhabl.encode import Model

__version__ = "0.2.0"

# torch's threads spin while they wait for each other and take cores from other processes. With a
# tenth of libgomp's default, two threads beside two other processes on 2 cores train VH-ABL on Wiki
# 2.5 times as fast, and on idle cores as fast. libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def load(folder: str | Path, device: str = "auto") -> Model:
    """The model of a finished run, which encodes raw files and strings: see `vhabl.encode`."""
    from vhabl.encode import load as load_model

    return load_model(folder, device)
