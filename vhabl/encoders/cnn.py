"""torchvision's networks for pictures, up to their second fully connected layer, and weights."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from vhabl.encoders import open_clip
from vhabl.encoders.weights import read_state
from vhabl.system.errors import brief, fail
from vhabl.system.files import locate

NETWORKS = ("alexnet", "vgg16")
SIDE = 224  # of the pictures that they were trained on
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colour channels


def build_network(name: str, weights: str, option: str) -> nn.Module:
    """A network that ends with its second fully connected layer, after the ReLU.

    weights: a file, the name of weights that torchvision downloads, or empty for random ones;
    option: what precedes them where the user gives them, for messages. Raises VhablError where
    they are missing, damaged or of another network.
    """
    open_clip.mend_torchvision()  # before anything here imports from it
    from torchvision import models

    network: Any = models.get_model(name, weights=None)
    if weights:
        known = models.get_model_weights(name)
        path = locate(weights)
        if path.is_file():
            state, where = read_state(path), str(path)
        elif weights in known.__members__:
            entry = known[weights]
            state, where = download(entry, option), f"weights {entry.name}"
        else:
            fail(
                f"{option}{weights}",
                "no such file",
                f"Give a file such as {known['DEFAULT'].url}, or one of "
                f"{', '.join(known.__members__)}",
            )
        check_state(network, state, where, name)
        network.load_state_dict(state)
    while not isinstance(network.classifier[-1], nn.ReLU):  # that of classes, a dropout
        del network.classifier[-1]
    return network


def download(entry: Any, option: str) -> dict[str, Tensor]:
    """Weights of torchvision's, from its server or from where an earlier download was kept."""
    file = PurePosixPath(entry.url).name
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            model_dir=open_clip.WEIGHTS_FOLDER, check_hash=True, map_location="cpu",
            weights_only=True,
        )  # fmt: skip
    except Exception as error:  # whatever a network raises
        do = f"Connect to a network, or fetch that file elsewhere and give it: {option}{file}"
        fail(f"weights {entry.name}", f"{entry.url} cannot be downloaded ({brief(error)})", do)
    return state


def check_state(network: nn.Module, state: dict[str, Tensor], where: str, name: str) -> None:
    """Raise VhablError, naming a tensor, unless the weights are the network's and finite."""
    expected, wanted = network.state_dict(), f"It must be the weights of {name}"
    for key, tensor in expected.items():
        if key not in state:
            fail(where, f"no tensor {key}", wanted)
        if state[key].shape != tensor.shape:
            shapes = [tuple(t.shape) for t in (state[key], tensor)]
            fail(where, f"{key} has the shape {shapes[0]}", f"{name} needs {shapes[1]}")
        if not torch.isfinite(state[key]).all():
            fail(where, f"{key} has values that are not finite", "Take other weights")
    for key in state:
        if key not in expected:
            fail(where, f"an unknown tensor {key}", wanted)
