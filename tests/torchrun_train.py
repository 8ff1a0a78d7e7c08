"""Train every configuration FOLDER/*.yaml, each into FOLDER/NAME-SIZE: a program for torchrun.

python torchrun_train.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import TinyAlexNet

from vhabl import train
from vhabl.config import from_yaml, override
from vhabl.data import load as load_data
from vhabl.encoders import open_clip
from vhabl.system.distributed import Ranks, joined


def train_all(folder: Path, here: Ranks) -> None:
    for recipe in sorted(folder.glob("*.yaml")):
        name = f"{folder}/{recipe.stem}-{here.size}"
        config = from_yaml(recipe.read_text(encoding="utf-8"), recipe)
        config = override(config, [f"out={name}", f"codes={name}/codes"])
        rows = train.train(config, load_data(config.data, config.encoder), False, here)
        assert bool(rows) == (here.rank == 0)


def still_network(*_: object, **__: object) -> TinyAlexNet:
    """A small network that drops nothing out."""
    network = TinyAlexNet()
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return network


if __name__ == "__main__":
    open_clip.mend_torchvision()
    from torchvision import models

    models.get_model = still_network
    with joined() as ranks:
        train_all(Path(sys.argv[1]), ranks)
