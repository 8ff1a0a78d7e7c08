"""Every recipe in configs/ builds, trains, encodes, evaluates, saves and reloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_feature_file

from vhabl import methods, runs, train
from vhabl.config import load, recipes
from vhabl.data import load as load_data
from vhabl.errors import VhablError
from vhabl.evaluator import code_tasks
from vhabl.methods.base import HashingMethod
from vhabl.types import Batch, Dataset, Inputs

RECIPES = recipes()


def untrained(recipe: Path, tmp_path: Path) -> tuple[HashingMethod, Dataset]:
    """A recipe's model with seeded initial weights, and 60 items for it."""
    file = write_feature_file(tmp_path / "features.mat")
    config = load(recipe, ["data=mirflickr", f"data.path={file}"])
    data = load_data(config.data)
    torch.manual_seed(0)
    return methods.get(config.method)(data.spec, config.bits, config.model), data


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_whole(recipe: Path, tmp_path: Path) -> None:
    """Its own widths and lengths, on 60 items for two steps."""
    file = write_feature_file(tmp_path / "features.mat")
    config = load(
        recipe,
        ["data=mirflickr", f"data.path={file}", "epochs=2", "validation.every=1", "out=run",
         "batch_size=60", "device=cpu", "codes=none"],
    )  # fmt: skip
    data = load_data(config.data)
    rows = train.train(config, data, progress_bar=False)
    assert {r.bits for r in rows} == set(config.bits)
    assert all(0 <= r.value <= 1 for r in rows if "mAP" in r.measure)
    run = runs.load(Path("run"))
    found = code_tasks(run.method, data, config.bits)
    longest = found[max(config.bits)]
    for bits, tasks in found.items():
        for task, codes in tasks.items():
            assert codes.query.shape == (20, bits) and codes.database.shape == (60, bits)
            assert set(np.unique(codes.database)) <= {-1, 1}
            if run.method.any_length:
                assert np.array_equal(codes.database, longest[task].database[:, :bits])  # a prefix
    other = min(config.bits) - 1
    if run.method.any_length:
        assert run.method.encode(data.query.inputs(), other)
    else:
        with pytest.raises(VhablError, match=f"key bits: found {other}; expected a code length"):
            run.method.encode(data.query.inputs(), other)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_gradients_reach_every_parameter(recipe: Path, tmp_path: Path) -> None:
    """No part of a model is in no loss, as the importance network is in the release."""
    method, data = untrained(recipe, tmp_path)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):  # a part that starts at zero lets gradients through after one step
        inputs = Inputs(torch.from_numpy(data.train.image), torch.from_numpy(data.train.text))
        labels = torch.from_numpy(data.train.labels).float()
        optimizer.zero_grad()
        torch.stack(
            list(method.loss(Batch(inputs, labels, torch.arange(60))).values())
        ).sum().backward()
        optimizer.step()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


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
