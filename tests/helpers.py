"""Small data and recipes that the tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from vhabl.config import CONFIG_DIR, Config, load

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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
    "nested_mlp": ["model.dim=16"],
    "cmcl": ["model.dim=16", "model.auxiliary=24"],
}


def small_config(path: Path, method: str = "vh_abl", *overrides: str) -> Config:
    """A recipe on a small feature file: 16 bits, 4 epochs, validation every 2."""
    common = [
        "data=wiki", f"data.path={path}", "data.class_names=[]", "bits=[8,16]", "epochs=4",
        "batch_size=16", "validation.every=2",
        "validation.fraction=0.1", "device=cpu", "codes=none",
    ]  # fmt: skip
    return load(CONFIG_DIR / f"{method}.yaml", [*common, *SMALL[method], *overrides])
