"""Every recipe in configs/ builds, trains, encodes, evaluates, saves and reloads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    CNN,
    pair_overrides,
    picture_arrays,
    write_arrays,
    write_feature_file,
    write_pair_folder,
)

from vhabl import codes as code_files
from vhabl import train
from vhabl.config import CONFIG_DIR, build_method, load, recipes
from vhabl.data import load as load_data
from vhabl.evaluation.records import code_tasks
from vhabl.methods.base import HashingMethod
from vhabl.studies import baselines
from vhabl.system.errors import VhablError
from vhabl.training import run_folder
from vhabl.types import Batch, Dataset

RECIPES = recipes()
pytestmark = pytest.mark.usefixtures("tiny_alexnet")


def overrides(recipe: Path, tmp_path: Path) -> list[str]:
    """What makes a recipe run on a few items: feature files, or pictures and words for towers and
    networks.
    """
    encoder = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("encoder", {}).get("name")
    if encoder in ("clip", "cnn"):
        given = pair_overrides(write_pair_folder(tmp_path / "pairs"))
        return [*given, *CNN] if encoder == "cnn" else given
    file = write_feature_file(tmp_path / "features.mat")
    return ["data=wiki", f"data.path={file}", "data.class_names=[]", "device=cpu", "codes=none"]


def untrained(recipe: Path, tmp_path: Path) -> tuple[HashingMethod, Dataset]:
    """A recipe's model with seeded initial weights, and a few items for it."""
    config = load(recipe, overrides(recipe, tmp_path))
    data = load_data(config.data, config.encoder)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    method.prepare(torch.from_numpy(data.train.labels).float())
    return method, data


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_whole(recipe: Path, tmp_path: Path) -> None:
    """Its own widths and lengths, on a few items for two steps."""
    given = ["epochs=2", "validation.every=1", "validation.fraction=0.1", "out=run"]
    config = load(recipe, [*overrides(recipe, tmp_path), *given, "batch_size=60"])
    data = load_data(config.data, config.encoder)
    rows = train.train(config, data, progress_bar=False)
    assert {r.bits for r in rows} == set(config.bits)
    assert all(0 <= r.value <= 1 for r in rows if "mAP" in r.measure)
    run = run_folder.load(Path("run"))
    found = code_tasks(run.method, data, config.bits)
    longest = found[max(config.bits)]
    for bits, tasks in found.items():
        for task, codes in tasks.items():
            assert codes.query.shape == (len(data.query), bits)
            assert codes.database.shape == (len(data.database), bits)
            assert set(np.unique(codes.database)) <= {-1, 1}
            if run.method.any_length:
                assert np.array_equal(codes.database, longest[task].database[:, :bits])  # a prefix
    other = min(config.bits) - 1
    if run.method.any_length:
        assert run.method.encode(data.query.inputs(), other)
    else:
        with pytest.raises(VhablError, match=f"bits is {other}, but must be a code length"):
            run.method.encode(data.query.inputs(), other)


def test_hq_as_published_trains_on_arrays_of_its_release(tmp_path: Path) -> None:
    """Normalised pictures, words, and training texts in another order; each side has its labels."""
    arrays = picture_arrays(train=60)
    order = np.random.RandomState(10).permutation(60)
    for name in ("train_text", "train_text_label"):
        arrays[name] = arrays[name][order]
    for name in ("train_image", "vali_image", "test_image"):
        scaled = arrays[name] / 255 - np.array([0.485, 0.456, 0.406])
        arrays[name] = (scaled / np.array([0.229, 0.224, 0.225])).astype(np.float32)
    folder = write_arrays(tmp_path / "arrays", arrays)
    config = load(
        CONFIG_DIR / "hq_published.yaml",
        ["data=mirflickr", "protocol=own", f"data.path={folder}", "data.class_names=[]", "epochs=3",
         "validation.every=1", "encoder.weights=", "bits=[8,16]", "model.dim=16", "device=cpu",
         "model.centres=8", "codes=codes", "out=run"],
    )  # fmt: skip
    assert config.data.name == "mirflickr_hq" and config.data.text_order == -1
    data = load_data(config.data, config.encoder)
    rows = train.train(config, data, progress_bar=False)
    run = run_folder.load(Path("run"))
    assert not run.method.spec.paired and run.fingerprint == data.fingerprint
    views = [run.method.encode(s.inputs(), 16) for s in (data.query, data.database)]
    asked = "HQ (published)", "mAP@all", 16, "index"
    values = {(r.task, r.database): r.value for r in rows
              if (r.method, r.measure, r.bits, r.ties) == asked}  # fmt: skip
    saved = code_files.load(Path("codes/HQ (published)_16-mirflickr_hq_bits.mat"))
    for task, mine, theirs, judge in (
        ("i2t", "image", "text", data.database.text_labels),
        ("t2i", "text", "image", data.database.labels),
    ):
        found = []
        for code, labels in zip(views[0][mine], data.query.labels, strict=True):
            distance = (views[1][theirs] != code).sum(dim=1).numpy()
            hit = (judge[np.argsort(distance, kind="stable")] @ labels) > 0
            ranks = np.flatnonzero(hit) + 1
            found.append((np.arange(1, len(ranks) + 1) / ranks).mean())
        assert values[task, "all"] == pytest.approx(np.mean(found))
        assert np.array_equal(saved[task].database_labels, judge)
    # Its reference row is chance, whose average precision with R hits among N items is
    # H / N + (R - 1) / (N - 1) (1 - H / N), where H = 1 + 1/2 + ... + 1/N.
    given = ["data=mirflickr_hq", f"data.path={folder}", "data.class_names=[]", "bits=[8]"]
    assert baselines.main([*given, "--quiet", "out=reference"]) == 0
    reference = json.loads(Path("reference/metrics.json").read_text())
    assert {(r["method"], r["task"]) for r in reference} == {("chance", "i2t"), ("chance", "t2i")}
    for task, judge in (("i2t", data.database.text_labels), ("t2i", data.database.labels)):
        n, first = len(judge), (1 / np.arange(1, len(judge) + 1)).mean()
        hits = ((data.query.labels @ judge.T) > 0).sum(axis=1)
        expected = np.where(hits > 0, first + (hits - 1) / (n - 1) * (1 - first), 0).mean()
        asked = task, "mAP@all", "expected", "all"
        (value,) = (r["value"] for r in reference
                    if (r["task"], r["measure"], r["ties"], r["database"]) == asked)  # fmt: skip
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_gradients_reach_every_parameter(recipe: Path, tmp_path: Path) -> None:
    """No part of a model is in no loss, as the importance network is in the release."""
    method, data = untrained(recipe, tmp_path)
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-4)
    reached = set()
    # A part that starts at zero lets gradients through after one step, and a stand-in needs an
    # item that loses its modality.
    for _ in range(4):
        labels = torch.from_numpy(data.train.labels).float()
        texts = torch.from_numpy(data.train.labels_of_texts).float()
        batch = Batch(data.train.inputs(), labels, torch.arange(len(labels)), texts)
        optimizer.zero_grad()
        torch.stack(list(method.loss(batch).values())).sum().backward()
        optimizer.step()
        found = [(n, p.grad) for n, p in method.named_parameters() if p.grad is not None]
        reached |= {name for name, gradient in found if gradient.abs().sum() > 0}
    assert reached == {name for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_codes_of_an_item_do_not_depend_on_its_batch(recipe: Path, tmp_path: Path) -> None:
    """Codes come from an item alone: no batch statistics, no other item, no label."""
    method, data = untrained(recipe, tmp_path)
    method.eval()
    inputs = data.train.inputs()
    with torch.no_grad():
        together = method.embed(inputs)
        alone = method.embed(inputs.take(slice(3, 4)))
    for view in together:
        assert torch.allclose(together[view][3:4], alone[view], atol=1e-5)
