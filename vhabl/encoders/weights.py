"""Weights of a network from any of the files that they come in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from vhabl.system.apart import read_apart
from vhabl.system.errors import brief, fail
from vhabl.system.files import check_archive

EXPECTED = "a state dict of tensors (.pth), safetensors, or a TorchScript archive as OpenAI's"


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as the network has them that was saved. Raises VhablError where the file
    holds something else.
    """
    state: Any
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = _unpickle(path)
    except Exception as error:  # damaged bytes raise many types
        do = f"It must be {EXPECTED}"
        fail(path, f"the file is damaged or of another kind ({brief(error)})", do)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        fail(path, "it holds something else than tensors by name", f"It must be {EXPECTED}")
    # DataParallel and Lightning put a word before each name.
    return {re.sub(r"^((module|model)\.)+", "", str(name)): t for name, t in state.items()}


def _unpickle(path: Path) -> Any:
    if is_zipfile(path):
        check_archive(path)
        with ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):  # a script
            found = read_apart(path, lambda: _script(path), "a script of weights")
            return {name: torch.from_numpy(array) for name, array in found.items()}
    return torch.load(path, map_location="cpu", weights_only=True)


def _script(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a script, which torch reads with code that damaged bytes can crash."""
    for name, tensor in torch.jit.load(str(path), map_location="cpu").state_dict().items():
        yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
