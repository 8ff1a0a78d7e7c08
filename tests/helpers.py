"""Small data and recipes that the tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image
from torch import Tensor, nn

from vhabl.config import CONFIG_DIR, Config, load

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def write_feature_file(path: Path, seed: int = 0, classes: int = 4, train: int = 60) -> Path:
    """A feature file in the field's layout whose classes can be told apart: MATLAB 5."""
    rng = np.random.default_rng(seed)
    image_centres, text_centres = rng.normal(size=(classes, 12)), rng.normal(size=(classes, 9))
    arrays = {}
    for role, items in (("tr", train), ("te", 20)):
        label = rng.integers(classes, size=items)
        arrays[f"I_{role}"] = image_centres[label] + rng.normal(0, 0.7, (items, 12))
        arrays[f"T_{role}"] = text_centres[label] + rng.normal(0, 0.7, (items, 9))
        arrays[f"L_{role}"] = np.eye(classes)[label]
    for part in "ITL":
        arrays[f"{part}_db"] = arrays[f"{part}_tr"]
    scipy.io.savemat(path, arrays)
    return path


SMALL = {  # overrides that make a recipe's model small
    "vh_abl": ["model.net.dim=16", "model.net.image_hidden=16", "model.net.text_hidden=16"],
    "hiamh": ["model.net.dim=16", "model.net.image_hidden=16", "model.net.text_hidden=16"],
    "vh_abl_clip": ["model.net.dim=16", "model.net.image_hidden=16", "model.net.text_hidden=16"],
    "nested_mlp": ["model.dim=16"],
    "pghmh": ["model.dim=16", "model.auxiliary=24", "model.heads=2"],
    "hq": ["model.dim=16", "model.dictionaries=2", "model.centres=8"],
    "cmcl": ["model.dim=16", "model.auxiliary=24", "model.concepts=5"],
}


TINY_TOWERS = {  # a vision transformer; configs/clip/tiny.json has a ResNet
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (250,) * 3}


CNN = ["encoder.name=cnn", "encoder.model=alexnet", "encoder.weights=", "data.min_count=1"]


class TinyAlexNet(nn.Module):
    """Made as torchvision's AlexNet is, for the same pictures; see the fixture `tiny_alexnet`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 32, 32), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(36, 8), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def write_pair_folder(folder: Path, items: int = 60, side: int = 40) -> Path:
    """Pairs in the raw layout whose classes are colours: pictures, captions and labels agree. Some
    items have several captions, one has an empty one.
    """
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    labels = rng.integers(len(names), size=items)
    (folder / "images").mkdir(parents=True)
    captions = []
    for item, label in enumerate(labels):
        noise = rng.normal(0, 25, (side, side + item % 3 * 8, 3))
        pixels = np.clip(np.array(COLOURS[names[label]]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{item}.png")
        first = "" if item == 7 else f"a {names[label]} picture, number {item}"
        more = [f"{names[label]} again"] * (item % 3 == 0)
        captions.append(np.array([first, *more], dtype=object) if more else first)
    for name, values in (
        ("caption", cells(captions)),
        ("index", cells([f"anywhere/{item}.png" for item in range(items)])),
        ("label", np.eye(len(names), dtype=np.uint8)[labels]),
    ):
        scipy.io.savemat(folder / f"{name}.mat", {name: values})
    return folder


def picture_arrays(train: int = 24, vali: int = 5, test: int = 7) -> dict[str, np.ndarray]:
    """Arrays of HQ's layout by file name: noisy pictures of three colours, words and labels."""
    rng, arrays = np.random.default_rng(0), {}
    for role, items in (("train", train), ("vali", vali), ("test", test)):
        classes = rng.integers(3, size=items)
        pictures = rng.integers(40, size=(items, 10, 14, 3), dtype=np.uint8)
        pictures[np.arange(items), :, :, classes] += 200
        arrays[f"{role}_image"] = pictures
        arrays[f"{role}_text"] = (rng.random((items, 9)) < 0.4).astype(np.float64)
        labels = np.eye(3, dtype=np.int64)[classes]
        for name in ("train_image", "train_text") if role == "train" else (role,):
            arrays[f"{name}_label"] = labels.copy()
    return arrays


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=True)
    return folder


def cells(values: list[Any]) -> np.ndarray:
    """A column of MATLAB cells."""
    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    return column


def pair_config(folder: Path, method: str = "cmcl", *overrides: str) -> Config:
    """A recipe on a folder of `write_pair_folder` with tiny towers from random weights."""
    common = ["bits=[8,16]", "epochs=2", "batch_size=16", "validation.every=1", *SMALL[method]]
    recipe = CONFIG_DIR / f"{method}.yaml"
    return load(recipe, [*pair_overrides(folder), *common, *overrides])


def pair_overrides(folder: Path) -> list[str]:
    """What makes a recipe with towers run on such a folder."""
    towers = folder / "towers.json"
    towers.write_text(json.dumps(TINY_TOWERS), encoding="utf-8")
    return [
        "data=emoji", f"data.path={folder}", f"data.class_names=[{','.join(COLOURS)}]",
        "data.query=12", "data.train=32", "device=cpu", "codes=none", "encoder.name=clip",
        f"encoder.model={towers}", "encoder.weights=", "encoder.words=12", "encoder.resize=0",
        "encoder.augment=false",
    ]  # fmt: skip


def array_config(folder: Path, *overrides: str) -> Config:
    """HQ on a tiny network and on arrays that `write_arrays` wrote."""
    return pair_config(folder, "hq", "data.kind=npy", "data.class_names=[]", *CNN, *overrides)


def small_config(path: Path, method: str = "vh_abl", *overrides: str) -> Config:
    """A recipe on a small feature file: 16 bits, 4 epochs, validation every 2."""
    common = [
        "data=wiki", f"data.path={path}", "data.class_names=[]", "bits=[8,16]", "epochs=4",
        "batch_size=16", "validation.every=2",
        "validation.fraction=0.1", "device=cpu", "codes=none",
    ]  # fmt: skip
    return load(CONFIG_DIR / f"{method}.yaml", [*common, *SMALL[method], *overrides])


def torchrun(*program: object) -> subprocess.Popen[str]:
    """Two processes of a program, begun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [*launcher, *map(str, program)], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code of a program, and what it wrote on stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
