"""The training loop: repeatable, resumable, selected on validation, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from helpers import small_config

from vhabl import encoders, train
from vhabl.config import build_method, override
from vhabl.data import load as load_data
from vhabl.data import validation_split
from vhabl.evaluation.records import batches_in_order, code_tasks
from vhabl.methods.hq import HQ
from vhabl.methods.nested_mlp import NestedMLP
from vhabl.settings import EncoderConfig, OptimConfig
from vhabl.system import errors
from vhabl.system.errors import Stopped, VhablError
from vhabl.system.files import alone
from vhabl.training import run_folder
from vhabl.training.optim import WeightMean, build_optimizer, clip_gradients, set_rate
from vhabl.training.trainer import STATE_FILE, Trainer, pick_device
from vhabl.types import Batch, DataSpec, Inputs, Split


def weights(method: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in method.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_seed_gives_one_model_bit_for_bit(feature_file: Path) -> None:
    config = small_config(feature_file)
    data = load_data(config.data)
    first = weights(Trainer(config, data, False).run())
    torch.rand(7)  # what was drawn before a run must not matter
    assert same(first, weights(Trainer(config, data, False).run()))
    other = weights(Trainer(override(config, ["seed=1"]), data, False).run())
    assert not same(first, other)


class Killed(Exception):
    pass


def test_the_mean_of_weights_is_weighted_by_a_power_of_the_update() -> None:
    """eta = 1: the t-th of T states has weight 2 t / (T (T + 1))."""
    model = torch.nn.BatchNorm1d(1)
    mean = WeightMean(model, 1.0)
    states = [3.0, -1.0, 4.0, 1.5]
    for state in states:
        torch.nn.init.constant_(model.weight, state)
        model.num_batches_tracked += 1
        mean.update(model)
    expected = sum(2 * t * x for t, x in enumerate(states, start=1)) / (4 * 5)
    assert mean.model.weight.item() == pytest.approx(expected)
    assert mean.model.num_batches_tracked == 4
    assert not mean.model.weight.requires_grad


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("vh_abl", ["optim.averaging=0", "model.net.dropout=0.3"]),
        ("vh_abl", ["optim.averaging=2", "model.net.dropout=0.3"]),
        ("cmcl", ["optim.averaging=0"]),  # has a memory of all training items
        ("hq", ["model.begin=3"]),  # and dictionaries, that begin later
    ],
)
@pytest.mark.parametrize("epochs_before", [1, 2, 3, 4, 5])
def test_an_interrupted_run_ends_with_the_same_weights(
    feature_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs_before: int,
    method: str,
    overrides: list[str],
) -> None:
    """Interrupted in any epoch of either phase (4 of selection, then the final ones)."""
    config = small_config(feature_file, method, *overrides)
    data = load_data(config.data)
    whole = Trainer(override(config, ["out=whole"]), data, False)
    expected = weights(whole.run())

    part = override(config, ["out=part"])
    done = 0
    real = Trainer.train_epoch

    def dies(self: Trainer) -> dict[str, float]:
        nonlocal done
        if done == epochs_before:
            raise Killed
        done += 1
        return real(self)

    monkeypatch.setattr(Trainer, "train_epoch", dies)
    with pytest.raises(Killed):
        Trainer(part, data, False).run()
    monkeypatch.setattr(Trainer, "train_epoch", real)
    torch.rand(11)
    resumed = Trainer(override(part, ["resume=true"]), data, False)
    assert same(expected, weights(resumed.run()))
    assert resumed.progress.history == whole.progress.history


def test_batches_have_the_labels_of_images_and_of_texts(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both phases, and of the items in order: text i of the order that was drawn."""
    config = small_config(feature_file, "hq", "data.text_order=10", "model.pairs=rows", "epochs=2")
    data, pairs = load_data(config.data), load_data(small_config(feature_file, "hq").data)
    order = np.random.RandomState(10).permutation(60)
    seen: list[Batch] = []
    real = HQ.loss
    monkeypatch.setattr(HQ, "loss", lambda self, batch: seen.append(batch) or real(self, batch))
    trainer = Trainer(config, data, False)
    method = trainer.run()
    final = seen[-4 * trainer.progress.best_epoch :]
    drawn = sorted(row for batch in final for row in batch.index.tolist())
    assert drawn == sorted([*range(60)] * trainer.progress.best_epoch)
    for batch in [*final, *batches_in_order(method, data.train)]:
        rows = batch.index.numpy()
        assert batch.text_labels is not None
        assert np.array_equal(batch.labels.numpy(), pairs.train.labels[rows])
        assert np.array_equal(batch.text_labels.numpy(), pairs.train.labels[order[rows]])
        assert np.array_equal(batch.inputs.text.numpy(), pairs.train.text[order[rows]])
    assert len(seen) > len(final) and all(batch.text_labels is not None for batch in seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("epoch", [1, 3, 4, 6])
def test_a_run_that_is_asked_to_stop_stores_its_epoch(
    feature_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    epoch: int,
) -> None:
    """No epoch is lost, however seldom the state is stored; resumed, it ends as any other."""
    config = small_config(feature_file, "vh_abl", "save_every=100")
    data = load_data(config.data)
    expected = weights(Trainer(override(config, ["out=whole"]), data, False).run())
    real, done = Trainer.train_epoch, 0

    def asked(self: Trainer) -> dict[str, float]:
        nonlocal done
        done += 1
        if done == epoch:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is before  # once more stops at once
        return real(self)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "train_epoch", asked)
    part = override(config, ["out=part"])
    with pytest.raises(
        Stopped, match=r"stopped after epoch \d of \d \((select|final)\); res"
    ) as left:
        Trainer(part, data, False).run()
    assert done == epoch and left.value.code == 128 + number
    assert f"note: {number.name}: stops after this epoch" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    resumed = Trainer(override(part, ["resume=true"]), data, False)
    assert same(expected, weights(resumed.run()))
    assert done == len(resumed.progress.history)  # none was trained twice


def test_a_stop_is_a_message_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> int:
        raise Stopped("stopped after epoch 3", signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        errors.run(main)
    assert left.value.code == 143 and capsys.readouterr().err == "stopped after epoch 3\n"


def test_a_folder_has_one_training_at_a_time(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "out=run", "epochs=1")
    data = load_data(config.data)
    with alone(Path("run")), pytest.raises(VhablError, match="run: another process wri"):
        train.train(config, data, progress_bar=False)
    assert list(Path("run").iterdir()) == []
    train.train(config, data, progress_bar=False)
    with alone(Path("run")):  # it was let go of
        pass


def test_resume_names_the_key_that_differs(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "out=run")
    data = load_data(config.data)
    Trainer(config, data, False).run()
    assert Path("run", STATE_FILE).exists()
    changed = override(config, ["resume=true", "optim.lr=0.5"])
    with pytest.raises(VhablError, match=r"state.pt: optim.lr was .* and is 0.5 now"):
        Trainer(changed, data, False).run()


def test_resume_refuses_a_damaged_state(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "out=run")
    data = load_data(config.data)
    Trainer(config, data, False).run()
    state = Path("run", STATE_FILE)
    whole = state.read_bytes()
    bit = bytearray(whole)
    bit[whole.index(next(iter(torch.load(state)["method"].values())).numpy().tobytes())] ^= 1
    bomb = io.BytesIO()
    with ZipFile(bomb, "w", ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**28 + 1))
    for content, why in (
        (whole[:1000], ".*"), (bytes(bit), "another checksum of .*/data/"),
        (bomb.getvalue(), "an archive of 268,435,457 bytes"),
    ):  # fmt: skip
        state.write_bytes(content)
        with pytest.raises(VhablError, match=rf"state\.pt: the state is damaged \({why}"):
            Trainer(override(config, ["resume=true"]), data, False).run()


def test_selection_sees_only_the_validation_split(feature_file: Path) -> None:
    """Other test queries change neither the chosen epoch nor a weight."""
    config = small_config(feature_file)
    data = load_data(config.data)
    expected = Trainer(config, data, False)
    model = weights(expected.run())
    query = replace(data.query, image=-data.query.image, labels=1 - data.query.labels)
    other = Trainer(config, replace(data, query=query), False)
    assert same(model, weights(other.run()))
    assert other.progress.best_epoch == expected.progress.best_epoch


def test_validation_items_are_apart_from_those_trained_on(feature_file: Path) -> None:
    data = load_data(small_config(feature_file).data)
    held_out = validation_split(data, 0.1, 1)
    assert len(held_out.query) == 6 and len(held_out.train) == 54
    assert not set(held_out.query.ids) & set(held_out.train.ids)
    assert held_out.database is held_out.train
    again = validation_split(data, 0.1, 1)
    assert np.array_equal(again.query.ids, held_out.query.ids)


def test_the_final_phase_trains_for_the_epochs_chosen(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.9, 0.4])
    monkeypatch.setattr("vhabl.training.trainer.validation_score", lambda *_: next(scores))
    config = small_config(feature_file, "nested_mlp", "epochs=6")
    trainer = Trainer(config, load_data(config.data), False)
    trainer.run()
    phases = [row["phase"] for row in trainer.progress.history]
    assert phases.count("select") == 6 and phases.count("final") == 4
    stored = [row["validation"] for row in trainer.progress.history if "validation" in row]
    assert stored == [0.2, 0.9, 0.4]


@pytest.mark.parametrize(
    ("scores", "select", "final"),
    [
        ([0.5, 0.4, 0.3, 0.9], 3, 1),
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.9], 5, 3),  # patience starts anew with a better score
    ],
)
def test_early_stop_after_patience(
    feature_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    select: int,
    final: int,
) -> None:
    coming = iter(scores)
    monkeypatch.setattr("vhabl.training.trainer.validation_score", lambda *_: next(coming))
    config = small_config(
        feature_file, "nested_mlp", "epochs=50", "validation.patience=2", "validation.every=1"
    )
    trainer = Trainer(config, load_data(config.data), False)
    trainer.run()
    phases = [row["phase"] for row in trainer.progress.history]
    assert phases.count("select") == select and phases.count("final") == final


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e25])
@pytest.mark.parametrize("scale", ["standard", "global"])
def test_scaling_gives_any_unit_a_spread_of_1_and_a_note_counts_constant_features(
    factor: float, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    image = np.stack([rng.normal(3, 2, 50), np.full(50, 7.1), rng.normal(0, 5, 50)], axis=1)
    centred = image - image.mean(axis=0)
    deviation = centred.std(axis=0)
    expected = centred / np.where(deviation > 1e-9, deviation, 1)
    if scale == "global":
        expected = centred / np.sqrt((centred**2).mean())
    split = Split(
        np.arange(50).astype(str), (image * factor).astype(np.float32),
        np.ones((50, 2), np.float32), np.eye(2, dtype=np.uint8)[np.arange(50) % 2],
    )  # fmt: skip
    scaling = encoders.FeatureScaling(DataSpec("data", 3, 2, classes=2, train_items=50))
    scaling.fit(split, scale)
    found = scaling(split.inputs(np.arange(50)))
    np.testing.assert_allclose(found.image.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not found.text.any()
    unseen = replace(split, image=split.image + np.float32(factor), text=split.text + 1)
    later = scaling(unseen.inputs(np.arange(50)))
    assert not later.text.any()  # what never changed in training carries nothing later
    if scale == "standard":
        assert not later.image[:, 1].any()
    told = capsys.readouterr().err
    assert "note: 1 of 3 image features are constant on the training items\n" in told
    assert "note: 2 of 2 text features are constant on the training items\n" in told


def test_a_run_on_data_with_a_constant_feature_is_read_again(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "data.scale=standard", "out=run", "epochs=1")
    data = load_data(config.data)
    image = data.train.image.copy()
    image[:, 0] = 3
    constant = replace(data, train=replace(data.train, image=image))
    trained = Trainer(config, constant, False).run().eval()
    run_folder.save(Path("run"), config, trained, constant, [], [])
    inputs = data.query.inputs()
    found = run_folder.load(Path("run")).method.eval().encode(inputs, 16)["fused"]
    assert torch.equal(found, trained.encode(inputs, 16)["fused"])


def test_scaling_is_measured_on_the_training_items_alone(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "data.scale=standard")
    data = load_data(config.data)
    shifted = replace(data, query=replace(data.query, image=data.query.image + 100))
    method = Trainer(config, shifted, False).run()
    mean = method.encoder.get_buffer("image_mean")
    assert torch.allclose(mean, torch.from_numpy(data.train.image).mean(dim=0), atol=1e-5)


def test_noise_is_a_share_of_each_features_deviation_in_training_alone() -> None:
    torch.manual_seed(0)
    spec = DataSpec("data", 2, 1, classes=1, train_items=0)
    encoder = encoders.build(EncoderConfig(image_noise=0.5), spec, tokens="")
    image = torch.randn(20000, 2) * torch.tensor([1.0, 10.0]) + torch.tensor([0.0, 5.0])
    inputs = Inputs(image, torch.randn(20000, 1))
    noisy = encoder.train()(inputs)
    added = noisy.image - image
    assert added.mean(dim=0).tolist() == pytest.approx([0, 0], abs=0.1)
    assert added.std(dim=0).tolist() == pytest.approx([0.5, 5], rel=0.03)
    assert torch.equal(noisy.text, inputs.text)
    assert torch.equal(encoder.eval()(inputs).image, image)


def test_a_loss_that_is_not_finite_stops_the_run(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "optim.lr=1e30", "optim.name=sgd")
    with pytest.raises(VhablError, match="not finite"):
        Trainer(config, load_data(config.data), False).run()


def test_a_run_folder_is_whole_and_reloads_to_equal_codes(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "out=run", "codes=codes")
    data = load_data(config.data)
    rows = train.train(config, data, progress_bar=False)
    found = {p.name for p in Path("run").iterdir()}
    assert found == {
        "config.yaml", "weights.safetensors", "metrics.json", "history.json",
        "environment.json", "tensorboard",
    }  # fmt: skip
    assert {p.name for p in Path("codes").iterdir()} == {
        f"VH-ABL_{bits}-wiki_bits.{ending}" for bits in (8, 16) for ending in ("mat", "npz")
    }
    run = run_folder.load(Path("run"))
    assert run.config == config
    run_folder.check_data(run, data)
    again = code_tasks(run.method, data, [8, 16])
    from vhabl import codes

    for bits in (8, 16):
        for ending in ("mat", "npz"):
            stored = codes.load(Path("codes", f"VH-ABL_{bits}-wiki_bits.{ending}"))["fused"]
            assert np.array_equal(stored.query, again[bits]["fused"].query)
            assert np.array_equal(stored.database, again[bits]["fused"].database)
    stored_rows = json.loads(Path("run/metrics.json").read_text())
    assert stored_rows == [row.as_dict() for row in rows]
    assert set(stored_rows[0]) == {
        "method", "data", "task", "bits", "measure", "value", "seed", "ties", "oracle_labels",
        "queries", "queries_without_match", "database", "own_items",
    }  # fmt: skip


def test_a_failure_while_writing_leaves_the_old_run(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(feature_file, "nested_mlp", "out=run")
    data = load_data(config.data)
    train.train(config, data, progress_bar=False)
    before = {p: p.read_bytes() for p in Path("run").glob("*.*")}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "run/weights.safetensors")

    monkeypatch.setattr("vhabl.training.run_folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train.train(override(config, ["optim.lr=0.02"]), data, progress_bar=False)
    for path, content in before.items():
        if path.name in ("weights.safetensors", "metrics.json"):
            assert path.read_bytes() == content
    assert not list(Path("run").glob(".*.tmp"))


def test_wrong_devices_are_named() -> None:
    with pytest.raises(VhablError, match=r"device is 'tpu9'"):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(VhablError, match=r"device 'cuda': 0 CUDA devices"):
            pick_device("cuda")


def test_a_gpu_with_a_number_is_what_cuda_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation says `cuda`; and convolutions in float32 are not rounded there."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert [pick_device(name).index for name in ("cuda", "cuda:1", "auto")] == [None, 1, None]
    assert current == [torch.device("cuda:1")] and not torch.backends.cudnn.allow_tf32
    with pytest.raises(VhablError, match=r"cuda:2.*2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.gpu
def test_training_on_a_gpu_gives_codes_of_the_same_quality(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "epochs=20", "device=cuda")
    data = load_data(config.data)
    method = Trainer(config, data, False).run()
    assert next(method.parameters()).device.type == "cuda"
    from vhabl.evaluation.records import validation_score

    assert validation_score(method, data, [16]) > 0.8


def test_batches_in_order_cover_every_item_once(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhabl.encoders.Encoder.batch", 7)
    config = small_config(feature_file)
    data = load_data(config.data)
    method = build_method(config, data.spec)
    index = torch.cat([b.index for b in batches_in_order(method, data.train)])
    assert index.tolist() == list(range(60))


def test_the_seed_decides_the_first_weights_and_the_order_of_items(feature_file: Path) -> None:
    data = load_data(small_config(feature_file).data)
    found = []
    for seed in (0, 1):
        trainer = Trainer(small_config(feature_file, "nested_mlp", f"seed={seed}"), data, False)
        trainer.begin()
        order = torch.randperm(60, generator=trainer.shuffle)
        found.append((weights(trainer.method)["net.head.1.weight"], order))
    (first_weight, first_order), (second_weight, second_order) = found
    assert not torch.equal(first_weight, second_weight)
    assert not torch.equal(first_order, second_order)


def test_selection_trains_and_scales_on_the_items_not_held_out(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "data.scale=standard")
    data = load_data(config.data)
    kept = validation_split(data, config.validation.fraction, config.validation.seed).train
    trainer = Trainer(config, data, False)
    for phase, split in (("select", kept), ("final", data.train)):
        trainer.progress.phase = phase
        trainer.begin()
        image = torch.from_numpy(split.image)
        assert trainer.resident is not None
        assert torch.equal(trainer.resident.image, image)
        assert torch.equal(trainer.labels, torch.from_numpy(split.labels).float())
        mean = trainer.method.encoder.get_buffer("image_mean")
        assert torch.allclose(mean, image.mean(dim=0), atol=1e-5)


def test_an_epoch_takes_every_item_once_and_none_alone(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 items in batches of 59: the last item joins the batch before it."""
    seen: list[list[int]] = []
    real = NestedMLP.loss

    def loss(self: NestedMLP, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch.index.tolist())
        return real(self, batch)

    monkeypatch.setattr(NestedMLP, "loss", loss)
    config = small_config(
        feature_file, "nested_mlp", "epochs=2", "batch_size=59", "validation.fraction=0"
    )
    Trainer(config, load_data(config.data), False).run()
    assert [sorted(rows) for rows in seen] == [list(range(60))] * 2
    assert seen[0] != seen[1]


def test_a_step_follows_the_sum_of_the_terms_of_its_own_batch(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: NestedMLP, batch: Batch) -> dict[str, torch.Tensor]:
        total = self.net.head[1].bias.sum()
        return {"a": total, "b": 2 * total}

    monkeypatch.setattr(NestedMLP, "loss", loss)
    config = small_config(
        feature_file, "nested_mlp", "optim.name=sgd", "optim.lr=0.5", "optim.averaging=0",
        "validation.fraction=0", "epochs=3", "batch_size=60",
    )  # fmt: skip
    trainer = Trainer(config, load_data(config.data), False)
    trainer.begin()
    before = weights(trainer.method)["net.head.1.bias"]
    after = weights(trainer.run())["net.head.1.bias"]
    assert torch.allclose(after, before - 3 * 0.5 * 3, atol=1e-5)
    first = trainer.progress.history[0]
    assert first["loss"] == pytest.approx(first["a"] + first["b"])
    assert first["a"] == pytest.approx(float(before.sum()), abs=1e-5)


def test_the_history_has_the_mean_of_each_term_over_the_batches(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([1.0, 2.0, 6.0])

    def loss(self: NestedMLP, batch: Batch) -> dict[str, torch.Tensor]:
        nothing = 0 * self.net.head[1].bias.sum()
        return {"a": nothing + next(values), "b": nothing + 1}

    monkeypatch.setattr(NestedMLP, "loss", loss)
    config = small_config(
        feature_file, "nested_mlp", "validation.fraction=0", "epochs=1", "batch_size=20"
    )
    trainer = Trainer(config, load_data(config.data), False)
    trainer.run()
    assert trainer.progress.history == [{"phase": "final", "epoch": 1, "a": 3, "b": 1, "loss": 4}]


@pytest.mark.parametrize(("clip", "longest"), [(1e-3, 1e-3), (0.0, float("inf"))])
def test_the_gradient_is_clipped_where_the_recipe_says_so(
    feature_file: Path, clip: float, longest: float
) -> None:
    config = small_config(
        feature_file, "nested_mlp", "optim.name=sgd", "optim.lr=1", "optim.averaging=0",
        f"optim.clip={clip}", "validation.fraction=0", "epochs=1", "batch_size=60",
    )  # fmt: skip
    trainer = Trainer(config, load_data(config.data), False)
    trainer.begin()
    before = [p.detach().clone() for p in trainer.method.parameters()]
    after = trainer.run().parameters()
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert 9e-4 < moved < longest * 1.01
    assert clip or moved > 1e-2


def test_the_final_phase_repeats_the_rates_of_selection(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends earlier on the same schedule: its epochs are those whose score was the best."""
    scores = iter([0.9, 0.2])
    rates: list[float] = []

    def record(optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float) -> None:
        set_rate(optimizer, config, progress)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr("vhabl.training.trainer.validation_score", lambda *_: next(scores))
    monkeypatch.setattr("vhabl.training.trainer.set_rate", record)
    config = small_config(feature_file, "nested_mlp", "optim.schedule=cosine")
    Trainer(config, load_data(config.data), False).run()
    assert len(rates) == 16 + 8  # 4 batches in each of 4 and 2 epochs
    assert rates[16:] == rates[:8]
    assert rates[0] == config.optim.lr and rates[:16] == sorted(set(rates), reverse=True)


def test_of_equal_scores_the_earlier_epoch_is_chosen(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.5, 0.4])
    monkeypatch.setattr("vhabl.training.trainer.validation_score", lambda *_: next(scores))
    config = small_config(feature_file, "nested_mlp", "epochs=6")
    trainer = Trainer(config, load_data(config.data), False)
    trainer.run()
    assert trainer.progress.best_epoch == 2


def test_fewer_epochs_than_between_validations_are_still_scored(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "epochs=3", "validation.every=5")
    trainer = Trainer(config, load_data(config.data), False)
    trainer.run()
    assert trainer.progress.best_epoch == 3 and trainer.progress.best_score > 0
    assert [row["phase"] for row in trainer.progress.history] == ["select"] * 3 + ["final"] * 3


def test_the_mean_of_weights_is_what_a_run_returns(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "optim.averaging=2")
    trainer = Trainer(config, load_data(config.data), False)
    found = weights(trainer.run())
    assert trainer.mean is not None
    assert same(found, weights(trainer.mean.model))
    assert not same(found, weights(trainer.method))


def test_a_method_is_told_of_every_epoch(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(NestedMLP, "after_epoch", lambda self: told.append(self.training))
    config = small_config(feature_file, "nested_mlp", "validation.fraction=0")
    Trainer(config, load_data(config.data), False).run()
    assert told == [True] * 4


def test_resume_refuses_a_state_of_other_data(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "out=run", "epochs=2")
    data = load_data(config.data)
    Trainer(config, data, False).run()
    other = replace(data, fingerprint="0" * 32)
    with pytest.raises(VhablError, match=r"state\.pt: it was trained on other data"):
        Trainer(override(config, ["resume=true"]), other, False).run()


def test_rates_rise_in_the_warm_up_and_fall_along_a_cosine() -> None:
    """The cosine falls over all steps, those of the warm-up too, as in BertAdam."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    config = OptimConfig(lr=0.1, schedule="cosine", warmup=0.2)
    optimizer = build_optimizer([{"params": [parameter]}], [("a", parameter)], config)
    by_hand = ((0.0, 0.0), (0.05, 0.25), (0.2, 0.9045085), (0.5, 0.5), (0.75, 0.1464466))
    for progress, factor in by_hand:
        set_rate(optimizer, config, progress)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor), progress
    constant = replace(config, schedule="constant", warmup=0.0)
    for progress in (0.0, 0.5, 0.99):
        set_rate(optimizer, constant, progress)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_an_optimiser_is_the_one_the_recipe_names(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    config = OptimConfig(
        name=name, lr=0.1, weight_decay=0.3, momentum=0.7, betas=[0.8, 0.95], eps=1e-6
    )
    plain, tuned = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [plain]}, {"params": [tuned], "lr": 0.02}]
    optimizer = build_optimizer(groups, [("a", plain), ("b", tuned)], config)
    assert type(optimizer) is kind
    first, second = optimizer.param_groups
    assert first["params"] == [plain] and second["params"] == [tuned]
    assert (first["lr"], second["lr"]) == pytest.approx((0.1, 0.02))
    assert first["weight_decay"] == second["weight_decay"] == 0.3
    if name == "sgd":
        assert first["momentum"] == 0.7
    else:
        assert (first["betas"], first["eps"]) == ((0.8, 0.95), 1e-6)
    set_rate(optimizer, config, 0.5)
    assert (first["lr"], second["lr"]) == pytest.approx((0.1, 0.02))


def test_rates_are_scaled_by_the_longest_name_that_a_parameter_begins_with() -> None:
    names = ("fusion.weight", "fusion.norm.weight", "fusionary.weight", "encoder.end.bias")
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in names]
    scales = {"fusion": 0.1, "fusion.norm": 0.5, "encoder.end": 0}
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, lr_scale=scales)
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.01}]
    named = list(zip(names, parameters, strict=True))
    optimizer = build_optimizer(groups, named, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters] == pytest.approx([0.01, 0.05, 0.1, 0])
    torch.stack([p.sum() for p in parameters]).sum().backward()
    optimizer.step()
    assert parameters[3].item() == 1 and all(p.item() < 1 for p in parameters[:3])
    with pytest.raises(VhablError, match=r"optim\.lr_scale\.fusio: no such part. Name a"):
        build_optimizer(groups, named, replace(config, lr_scale={"fusio": 1.0}))


@pytest.mark.parametrize(
    ("per_tensor", "expected"),
    [(False, [[0.6, 0.8], [0.0, 0.0], [2.4]]), (True, [[0.6 * 2.6, 0.8 * 2.6], [0.0, 0.0], [2.6]])],
)
def test_gradients_are_clipped_together_or_each_alone(
    per_tensor: bool, expected: list[list[float]]
) -> None:
    """Norms 5, 0 and 12, together 13."""
    gradients = [[3.0, 4.0], [0.0, 0.0], [12.0]]
    parameters = [torch.nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    unused = torch.nn.Parameter(torch.zeros(2))
    clip_gradients([*parameters, unused], OptimConfig(clip=2.6, clip_per_tensor=per_tensor))
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.tolist() == pytest.approx(gradient, rel=1e-5)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    clip_gradients(parameters, OptimConfig(clip=100, clip_per_tensor=per_tensor))
    clip_gradients(parameters, OptimConfig(clip=0, clip_per_tensor=per_tensor))
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))
