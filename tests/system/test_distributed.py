"""Training that several processes share: what one process computes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CNN,
    ROOT,
    SMALL,
    ended,
    pair_config,
    pair_overrides,
    small_config,
    torchrun,
    write_feature_file,
    write_pair_folder,
)
from torch import nn
from torchrun_train import still_network, train_all

from vhabl import train
from vhabl.config import CONFIG_DIR, Config, to_yaml
from vhabl.data import load as load_data
from vhabl.encoders import open_clip
from vhabl.evaluation.records import NOT_BINARY, relaxed_codes
from vhabl.system.distributed import ALONE, GlobalBatchNorm, Ranks
from vhabl.training import run_folder
from vhabl.training.trainer import Trainer

STILL = ["model.net.dropout=0", "model.net.modality_dropout=0"]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_out_every_row_once(count: int, size: int) -> None:
    rows = torch.arange(count)
    parts = [Ranks(rank, size, rank).part(rows) for rank in range(size)]
    assert torch.equal(torch.cat(parts), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert np.array_equal(Ranks(size - 1, size, 0).part(rows.numpy()), parts[-1].numpy())


def test_only_the_first_rank_stores_a_state(tmp_path: Path) -> None:
    config = small_config(write_feature_file(tmp_path / "f.mat"), "vh_abl", "out=run")
    data = load_data(config.data)
    for rank, there in ((1, False), (0, True)):
        trainer = Trainer(config, data, False, Ranks(rank, 2, rank))
        trainer.begin()
        trainer.save_state()
        assert trainer.state_path.exists() == there


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 2)])
def test_one_rank_normalises_a_batch_as_torch_does(shape: tuple[int, ...], affine: bool) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    torch.manual_seed(0)
    theirs = nn.Sequential(kind(5, affine=affine)).double()
    if affine:
        nn.init.normal_(theirs[0].weight)
        nn.init.normal_(theirs[0].bias)
    ours = copy.deepcopy(theirs)
    GlobalBatchNorm.convert(ours, ALONE)
    assert type(ours[0]) is GlobalBatchNorm
    for mode in (True, True, False):
        x = torch.randn(shape, dtype=torch.float64)
        results = []
        for module in (theirs.train(mode), ours.train(mode)):
            own = x.clone().requires_grad_()
            y = module(own)
            (y.sin() * torch.arange(y.numel()).view_as(y)).sum().backward()
            results.append([y, own.grad, *module.state_dict().values()])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b)
    half = torch.randn(shape).bfloat16()
    assert ours.float().train()(half).dtype == torch.bfloat16


# -- equal to one process --------------------------------------------------------------------------


def recipes(folder: Path) -> dict[str, Config]:
    """Nothing is random where an encoder is shared out: a share draws from a stream of its own. The
    last batches have one item, or one more than a full one.
    """
    pairs, features = write_pair_folder(folder / "pairs"), write_feature_file(folder / "f.mat")
    resnet = ROOT / "configs" / "clip" / "tiny.json"
    return {
        "features": small_config(features, "vh_abl", "batch_size=17"),
        "towers": pair_config(pairs, "cmcl", "model.dropout=0", "encoder.tune=all", "optim.clip=1",
                              "batch_size=9", "data.workers=2", "validation.fraction=0.2"),
        # Adam makes steps of rounding where there is no gradient, as before a normalisation.
        "pooled": pair_config(pairs, "vh_abl_clip", *STILL, "encoder.tune=1", "optim.name=sgd"),
        "resnet": pair_config(pairs, "hiamh", *STILL, f"encoder.model={resnet}",
                              "encoder.tune=all", "optim.name=sgd"),
        "kept": pair_config(pairs, "pghmh", "encoder.tune=frozen", f"encoder.cache={folder}/cache",
                            "model.dropout=0", "model.block_dropout=0",
                            "model.modality_dropout=0", "model.truth=1"),
        "network": pair_config(pairs, "hq", *CNN, "encoder.tune=2", "model.dropout=0"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the run folders of all recipes: NAME-1 of one process, NAME-2 of two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in recipes(folder).items():
        (folder / f"{name}.yaml").write_text(to_yaml(config), encoding="utf-8")
    two = torchrun(ROOT / "tests" / "torchrun_train.py", folder)
    code, _, err = ended(two)
    assert code == 0, err
    kept = folder / "cache" / "emoji-towers-frozen-hidden.h5"
    kept.rename(folder / "kept-2.h5")
    open_clip.mend_torchvision()
    from torchvision import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "get_model", still_network)
        torch.set_num_threads(1)
        train_all(folder, ALONE)
    kept.rename(folder / "kept-1.h5")
    yield folder


NAMES = ("features", "towers", "pooled", "resnet", "kept", "network")


def of_both(folder: Path, name: str, file: str) -> list[list[dict[str, object]]]:
    found = [json.loads((folder / f"{name}-{n}" / file).read_text()) for n in (1, 2)]
    assert len(found[0]) == len(found[1]) > 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_losses_of_one(both: Path, name: str) -> None:
    for one, two in zip(*of_both(both, name, "history.json"), strict=True):
        assert one.keys() == two.keys()
        assert one.pop("phase") == two.pop("phase")
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_codes_of_one(both: Path, name: str) -> None:
    files = [sorted((both / f"{name}-{n}" / "codes").iterdir()) for n in (1, 2)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and files[0]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes()[128:] == two.read_bytes()[128:], one.name  # after the date
    for one, two in zip(*of_both(both, name, "metrics.json"), strict=True):
        if str(one["method"]).endswith(NOT_BINARY):  # rounding may swap two near distances
            del one["value"], two["value"]
        assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_relaxed_codes_of_one(
    both: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip.mend_torchvision()
    monkeypatch.setattr("torchvision.models.get_model", still_network)
    one, two = (run_folder.load(both / f"{name}-{n}") for n in (1, 2))
    data = load_data(one.config.data, one.config.encoder)
    lengths = one.config.bits
    found = [relaxed_codes(run.method, data.query, lengths) for run in (one, two)]
    for bits in lengths:
        books = [run.method.codebook(bits) for run in (one, two)]
        for a, b in zip(*(r[bits].values() for r in found), strict=True):
            assert np.allclose(a, b, atol=1e-4)
        assert books[0] is None or torch.allclose(*books, atol=1e-4)


@pytest.mark.slow
def test_two_processes_write_what_one_does(both: Path) -> None:
    for name in NAMES:
        one, two = (
            sorted(p.relative_to(f) for p in f.rglob("*") if "tensorboard" not in str(p))
            for f in (both / f"{name}-1", both / f"{name}-2")
        )
        assert one == two
        logs = [p for p in (both / f"{name}-2" / "tensorboard").rglob("*") if p.is_file()]
        phases = {row["phase"] for row in of_both(both, name, "history.json")[1]}
        assert len(logs) == len(phases)
    import h5py

    with h5py.File(both / "kept-1.h5") as one, h5py.File(both / "kept-2.h5") as two:
        assert one.keys() == two.keys()
        for view in one:
            assert np.allclose(one[view][:], two[view][:], atol=1e-5)


# -- what ends them --------------------------------------------------------------------------------


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process numbers by rank."""
    found = {}
    for number in map(
        int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ):
        values = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        environment = dict(value.split(b"=", 1) for value in values if b"=" in value)
        if b"RANK" in environment:
            found[int(environment[b"RANK"])] = number
    return found


def small_recipe(pairs: Path) -> list[str]:
    return [
        f"--config={CONFIG_DIR}/cmcl.yaml", "--quiet", *pair_overrides(pairs), *SMALL["cmcl"],
        "bits=[8,16]", "batch_size=16", "model.dropout=0", "validation.fraction=0",
        "data.workers=0",
    ]  # fmt: skip


UNREAD = """
import atexit
import os
import time
import torch.distributed
from vhabl import train
from vhabl.system import errors
from vhabl.training import trainer
from vhabl.data import images

real = trainer.Trainer.train_phase

def broken(path, *_):
    raise errors.VhablError(f"{path}: this is no picture")

def train_phase(self):
    if os.environ["RANK"] == "1":
        images.read_pixels = broken
    real(self)

# With NCCL both may wait for the other ranks, and these wait for this one.
torch.distributed.destroy_process_group = lambda: time.sleep(600)
atexit.register(time.sleep, 600)
images.IN_MEMORY = 0  # pictures are read by the ranks that need them
trainer.Trainer.train_phase = train_phase
errors.run(train.main)
"""


def wait_for(there: Path, launcher: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if there.exists() or launcher.poll() is not None:
            break
        time.sleep(0.05)
    assert there.exists(), ended(launcher)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_rank_that_dies_stops_the_others_and_nothing_is_lost(tmp_path: Path) -> None:
    """Killed, then asked to stop, then ended by one process alone: as if nothing had been."""
    pairs = write_pair_folder(tmp_path / "pairs")
    recipe = [*small_recipe(pairs), "epochs=60", "save_every=1", "resume=true", "optim.name=sgd"]
    state = Path("shared/state.pt")
    killed = torchrun("-m", "vhabl.train", *recipe, "out=shared")
    wait_for(state, killed)
    os.kill(ranks_of(killed)[1], signal.SIGKILL)
    code, out, err = ended(killed)
    assert code != 0 and out == "" and err.count("error: ") == 1
    assert "error: processes: one died or cannot be reached (" in err
    before = torch.load(state)["progress"]["epoch"]
    asked = torchrun("-m", "vhabl.train", *recipe, "out=shared")
    for _ in range(1200):
        if torch.load(state)["progress"]["epoch"] > before or asked.poll() is not None:
            break
        time.sleep(0.05)
    asked.send_signal(signal.SIGTERM)
    code, out, err = ended(asked)
    assert code != 0 and err.count("stopped after epoch") == 1 and err.count("resume=true") == 1
    assert err.count("note: ") == 2 and err.count("note: 1 empty caption") == 1
    assert before < torch.load(state)["progress"]["epoch"] < 60
    train.main([*recipe, "out=shared"])
    train.main([*recipe, "out=alone"])
    histories = [json.loads(Path(f, "history.json").read_text()) for f in ("shared", "alone")]
    for one, two in zip(*histories, strict=True):
        assert one.pop("phase") == two.pop("phase")
        assert two == pytest.approx(one, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.e2e
def test_an_error_of_any_rank_is_said_once(tmp_path: Path) -> None:
    pairs = write_pair_folder(tmp_path / "pairs")
    recipe = [*small_recipe(pairs), "out=run", "epochs=2"]
    code, out, err = ended(torchrun("-m", "vhabl.train", *recipe, "bits=[0]"))
    assert code != 0 and out == "" and "error: bits is" in err
    assert err.count("error: ") == 1
    Path("unread.py").write_text(UNREAD)
    code, out, err = ended(torchrun("unread.py", *recipe))
    assert code != 0 and out == "" and err.count("error: ") == 1, err
    assert "this is no picture" in err
    assert not Path("run/weights.safetensors").exists()
