"""One training step of the recipes at their published size, with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_pair_folder

from vhabl.config import CONFIG_DIR, Config, build_method, load
from vhabl.data import load as load_data
from vhabl.training.optim import build_optimizer
from vhabl.types import Batch, DataSpec, Inputs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from measuring import saved_for_backward

GIGABYTE = 2**30
TRAIN_ITEMS = 10_000
# Gigabytes of the GPU that a recipe has to fit; a backward pass holds its largest gradients too.
CARD = 24
ROOM = 0.75 * CARD


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cmcl", "pghmh", "vh_abl_clip", "hiamh_clip"])
def test_a_step_at_the_published_size(name: str, tmp_path: Path) -> None:
    """PGHMH on ViT-B/16 and the others on ViT-B/32 at a batch of 128, with MIRFlickr's 24 classes
    and 10,000 training items. The memory is computed from what a float32 step keeps: weights,
    gradients, both moments of Adam, buffers and saved tensors.
    """
    folder = write_pair_folder(tmp_path / "pairs", items=130, side=64)
    names = [f"class {n}" for n in range(24)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    widen(folder, len(names))
    config = load(
        CONFIG_DIR / f"{name}.yaml",
        ["data=mirflickr", f"data.path={folder}", "data.query=2", "data.train=128",
         "encoder.weights=", "device=cpu"],
    )  # fmt: skip
    assert config.batch_size == 128
    data = load_data(config.data, config.encoder)
    labels = torch.from_numpy(data.train.labels).float()
    batch = Batch(data.train.inputs(np.arange(128)), labels, torch.arange(128))
    assert memory_of_a_step(config, data.spec, batch) < ROOM


@pytest.mark.slow
def test_a_step_of_hq_on_alexnet_at_the_published_size() -> None:
    """A batch of 50 pictures, cut to 224 x 224, with a bag of MIRFlickr's 1,386 words."""
    config = load(
        CONFIG_DIR / "hq_alexnet.yaml", ["data=mirflickr", "encoder.weights=", "device=cpu"]
    )
    assert config.batch_size == 50 and config.encoder.tune == "all"
    torch.manual_seed(0)
    pixels = torch.randint(256, (50, 3, config.encoder.resize, config.encoder.resize))
    inputs = Inputs(pixels.to(torch.uint8), (torch.rand(50, 1386) < 0.01).float())
    batch = Batch(inputs, torch.eye(24)[torch.arange(50) % 24], torch.arange(50))
    spec = DataSpec("mirflickr", config.encoder.resize, 1386, 24, TRAIN_ITEMS)
    assert memory_of_a_step(config, spec, batch) < ROOM


def memory_of_a_step(config: Config, spec: DataSpec, batch: Batch) -> float:
    """Gigabytes of a training step, computed as above; the step moves nearly every weight."""
    torch.manual_seed(0)
    method = build_method(config, spec)
    labels = batch.labels
    method.prepare(labels.repeat(-(-TRAIN_ITEMS // len(labels)), 1)[:TRAIN_ITEMS])
    optimizer = build_optimizer(method.param_groups(), method.named_parameters(), config.optim)
    before = {n: p.detach().clone() for n, p in method.named_parameters() if p.requires_grad}
    kept, loss = saved_for_backward(
        method, lambda: torch.stack(list(method.loss(batch).values())).sum()
    )
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in method.parameters())
    moved = [n for n, p in method.named_parameters() if n in before and (p != before[n]).any()]
    assert len(moved) > 0.9 * len(before)

    parameters = sum(p.nbytes for p in method.parameters())
    tuned = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in method.buffers())
    total = (parameters + 3 * tuned + buffers + kept) / GIGABYTE
    report = {"parameters": parameters, "tuned": tuned, "buffers": buffers, "saved": kept}
    name = f"{config.method} {config.encoder.model}"
    print(name, json.dumps({k: round(v / GIGABYTE, 2) for k, v in report.items()}), f"{total:.1f}")
    return total


def widen(folder: Path, classes: int) -> None:
    """Give the labels of a folder more columns, all of them used."""
    import scipy.io

    labels = scipy.io.loadmat(folder / "label.mat")["label"]
    wide = np.zeros((len(labels), classes), np.uint8)
    wide[np.arange(len(labels)), np.arange(len(labels)) % classes] = 1
    scipy.io.savemat(folder / "label.mat", {"label": wide})
