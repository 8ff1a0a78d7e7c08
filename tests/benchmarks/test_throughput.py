"""What a training step is made of: its matrix products, and nothing that a host waits for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import pair_config, small_config, write_pair_folder
from torch import Tensor, nn

from vhabl.data import load as load_data
from vhabl.nn import losses
from vhabl.nn.layers import Dropout
from vhabl.training.trainer import Trainer
from vhabl.types import Batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from measuring import Watch, replay, saved_for_backward
from throughput import Loop

NOWHERE = torch.device("meta")  # holds no numbers: whoever asks for one fails


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def test_matrix_products_are_counted_by_their_operands() -> None:
    """Two forward, and backward one for each weight and one for what enters the second layer."""
    net, x = tiny(), torch.randn(5, 3)
    with Watch() as watch:
        net(x).sum().backward()
    shapes = sorted((a[0], b[0]) for a, b in watch.products)
    forward = [((5, 3), (3, 4)), ((5, 4), (4, 2))]
    backward = [((2, 5), (5, 4)), ((4, 5), (5, 3)), ((5, 2), (2, 4))]
    assert shapes == sorted(forward + backward)
    assert not watch.waits
    with Watch() as again:
        replay(watch.products, torch.device("cpu"))()
    assert again.products == watch.products
    with Watch() as batched:
        torch.randn(2, 3, 4) @ torch.randn(2, 4, 5)
    assert [(a[0], b[0]) for a, b in batched.products] == [((2, 3, 4), (2, 4, 5))]


@pytest.mark.parametrize(
    ("wait", "run"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 0]),
        (1, lambda x: x.unique()),
        (1, lambda x: x.to(NOWHERE)),
        (1, lambda x: torch.empty(4, device=NOWHERE).copy_(x)),
        (0, lambda x: x.to(NOWHERE, non_blocking=True)),
        (0, lambda x: x[torch.tensor([2, 0])]),
        (0, lambda x: torch.where(x > 0, x, 0.0)),
        (0, lambda x: x.double()),
    ],
)
def test_what_a_host_waits_for_is_counted(wait: int, run: Callable[[Tensor], object]) -> None:
    x = torch.arange(4.0)
    with Watch() as watch:
        run(x)
    assert watch.waits.total() == wait


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("pairs") / "pairs")


METHODS = ["vh_abl", "hiamh", "nested_mlp", "hq", "cmcl", "pghmh"]
METHODS += ["cmcl on towers", "pghmh on towers", "vh_abl_clip on towers"]


def trainer(method: str, feature_file: Path, pair_folder: Path) -> Trainer:
    """On towers with random cuts, from files."""
    common = ["optim.name=sgd", "optim.clip=1", "optim.averaging=1", "validation.fraction=0"]
    if method.endswith("towers"):
        method = method.split()[0]
        changed = ["encoder.resize=40", "encoder.augment=true", "encoder.tune=all"]
        config = pair_config(pair_folder, method, *changed, *common)
    else:
        features = ["encoder.name=features", "encoder.tune=all"]
        config = small_config(feature_file, method, *features, *common)
    return Trainer(config, load_data(config.data, config.encoder), progress_bar=False)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_a_value(method: str, feature_file: Path, pair_folder: Path) -> None:
    begun = trainer(method, feature_file, pair_folder)
    loop = Loop(begun.config, begun.data, steps=2)
    watch = loop.watch()
    assert loop.host_waits == 0, watch.waits
    assert watch.operations > 100 and watch.products


@pytest.mark.parametrize("method", METHODS)
def test_no_step_copies_between_devices(method: str, feature_file: Path, pair_folder: Path) -> None:
    """On a device without numbers, where a copy to or from the host is seen and a value fails."""
    begun = trainer(method, feature_file, pair_folder)
    begun.device = NOWHERE
    begun.begin()
    begun.method.train()
    batches = list(torch.arange(32).split(16))
    with Watch() as watch:
        for resident in {begun.resident, None}:
            begun.resident = resident
            found = begun.inputs(batches)
            next(found)
            watch.waits.clear()  # the rows of all batches came at once
            rows, inputs = next(found)
            assert not watch.waits
        terms = begun.method.loss(Batch(inputs, begun.labels[rows], rows))
        torch.stack(list(terms.values())).sum().backward()
        assert begun.mean is not None
        begun.mean.update(begun.method)
    assert not watch.waits


def test_small_data_stays_on_the_device(
    feature_file: Path, pair_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = trainer("vh_abl", feature_file, pair_folder)
    monkeypatch.setattr("vhabl.training.trainer.RESIDENT", begun.data.train.bytes)
    begun.begin()
    assert begun.resident is not None
    batches = list(torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(16))
    with monkeypatch.context() as patch:
        patch.setattr("vhabl.training.trainer.read", None)  # nothing is read any more
        kept = list(begun.inputs(batches))
    assert [rows.tolist() for rows, _ in kept] == [rows.tolist() for rows in batches]
    for rows, inputs in kept:
        there = begun.train.inputs(rows.numpy())
        assert torch.equal(inputs.image, there.image) and torch.equal(inputs.text, there.text)
    monkeypatch.setattr("vhabl.training.trainer.RESIDENT", begun.train.bytes - 1)
    begun.begin()
    assert begun.resident is None


def test_the_likelihood_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    memory, h = 3 * torch.randn(50, 80, dtype=torch.double), torch.randn(7, 80, dtype=torch.double)
    similar = (torch.rand(50, 7) < 0.3).double()
    h.requires_grad_()
    found = []
    for pairs in (1, 7 * 13, 7 * 50, 2**18):
        monkeypatch.setattr("vhabl.nn.losses._Likelihood.PAIRS", {"cpu": pairs})
        value = losses.likelihood(memory, h, similar)
        found.append((value.detach(), *torch.autograd.grad(value, h)))
    products = memory @ h.T
    assert (products.abs() > 64).any()  # some are clamped
    s = products.clamp(-64, 64) / 2
    value = (nn.functional.softplus(s) - similar * s).mean()
    expected = (value.detach(), *torch.autograd.grad(value, h))
    for pair in found:
        torch.testing.assert_close(pair, expected)


def test_dropout_keeps_a_share_and_the_mean() -> None:
    x = torch.randn(50, 40)
    dropout = Dropout(0.3)
    torch.manual_seed(1)
    found = dropout(x)
    torch.manual_seed(1)
    kept = torch.rand(50, 40) >= 0.3
    assert torch.equal(found, x * (kept.float() / 0.7))
    assert torch.equal(dropout.eval()(x), x)


def test_what_a_step_saves_is_counted_without_numbers() -> None:
    """The input, what the ReLU gives (kept for it and for the next layer), not the weights."""
    for device in ("cpu", "meta"):
        net = tiny().to(device)
        x = torch.zeros(5, 3, device=device)
        saved, value = saved_for_backward(net, lambda net=net, x=x: net(x).sum())
        assert saved == 4 * (5 * 3 + 5 * 4) and value.ndim == 0
