"""The audit calls labels in codes what they are, and leaves honest codes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, small_config

from vhabl import audit, codes, train
from vhabl.audit import audit_checkpoint, bit_errors, duplicates, labels_read_off
from vhabl.config import CONFIG_DIR, build_method, load
from vhabl.data import load as load_data
from vhabl.evaluation.records import code_tasks
from vhabl.methods.vh_abl import VHABL
from vhabl.studies.baselines import Features, classifier_codes, itq, lsh
from vhabl.system.errors import VhablError
from vhabl.training.trainer import Trainer
from vhabl.types import Codes, Dataset, Inputs, Split

PUBLISHED = SHARED / "flickrhashcode"


@pytest.fixture(scope="module")
def emoji() -> Dataset:
    return load_data(load(CONFIG_DIR / "vh_abl.yaml", ["data=emoji"]).data)


# Code files


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("flipped", [0.0, 0.1])
def test_codes_published_with_labels_in_them_are_implausible(bits: int, flipped: float) -> None:
    path = PUBLISHED / f"Ours_{bits}-flickr25k_bits.mat"
    if not path.is_file():
        pytest.skip(f"{path.name} is not part of the project and is not beside it")
    found = codes.load(path)["fused"]
    noise = np.random.default_rng(0).random(found.query.shape) < flipped
    query = np.where(noise, -found.query, found.query)
    assert bit_errors(query, found.query_labels).implausible


@pytest.mark.parametrize("bits", [16, 64])
@pytest.mark.parametrize("fit", [lsh, itq], ids=["LSH", "ITQ"])
def test_projections_are_plausible(emoji: Dataset, fit, bits: int) -> None:
    features = Features(emoji)
    projection = fit(features(emoji.train), bits, 0)
    found = np.where(features(emoji.query) @ projection >= 0, 1, -1)
    assert not bit_errors(found, emoji.query.labels).implausible


def test_predicted_labels_are_plausible(emoji: Dataset) -> None:
    """They are made from what a classifier sees; true labels as a code are not."""
    features = Features(emoji)
    x, new = features(emoji.train), features(emoji.query)
    (predicted,) = classifier_codes(x, emoji.train.labels, [new], 0)
    assert not bit_errors(predicted, emoji.query.labels).implausible
    true = np.where(emoji.query.labels > 0, 1, -1)
    assert bit_errors(true, emoji.query.labels).implausible
    random = np.random.default_rng(0)
    hashed = np.where(emoji.query.labels @ random.normal(size=(48, 32)) > 0, 1, -1)
    noise = random.random(hashed.shape) < 0.1
    assert bit_errors(np.where(noise, -hashed, hashed), emoji.query.labels).implausible


@pytest.mark.parametrize("bits", [16, 128, 256])
@pytest.mark.parametrize("flipped", [0, 0.05, 0.1])
def test_projected_label_sets_are_implausible(emoji: Dataset, bits: int, flipped: float) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        for labels in (emoji.query.labels, emoji.database.labels):
            prescribed = np.where(labels @ random.normal(size=(48, bits)) > 0, 1, -1)
            noise = random.random(prescribed.shape) < flipped
            assert bit_errors(np.where(noise, -prescribed, prescribed), labels).implausible


@pytest.mark.parametrize("epochs", [2, 4])
def test_codes_of_a_model_that_has_learned_little_are_plausible(
    emoji: Dataset, epochs: int
) -> None:
    config = load(
        CONFIG_DIR / "nested_mlp.yaml",
        ["data=emoji", f"epochs={epochs}", "validation.fraction=0", "device=cpu", "codes=none",
         "out=run"],
    )  # fmt: skip
    method = Trainer(config, emoji, progress_bar=False).run()
    found = {}
    for bits, tasks in code_tasks(method, emoji, [16, 128]).items():
        found[bits] = bit_errors(tasks["fused"].query, emoji.query.labels)
        assert not found[bits].implausible, found
    assert found[16].agreement > 0.5  # it is the errors that speak for them


@pytest.mark.slow
def test_trained_codes_are_plausible(emoji: Dataset, tmp_path: Path) -> None:
    config = load(
        CONFIG_DIR / "nested_mlp.yaml",
        ["data=emoji", "epochs=20", "validation.fraction=0", "device=cpu", f"codes={tmp_path}",
         "out=run"],
    )  # fmt: skip
    train.train(config, emoji, progress_bar=False)
    for path in tmp_path.glob("*.mat"):
        found = codes.load(path)["fused"]
        assert not bit_errors(found.query, found.query_labels).implausible
        assert audit.main(["--codes", str(path)]) == 0


def test_errors_by_hand() -> None:
    """Four queries with one label set: one errs in both of two bits, a third bit never errs."""
    found = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [-1, -1, 1], [-1, -1, -1]])
    labels = np.array([[1], [1], [1], [1], [1]])
    result = bit_errors(found, labels)
    # errors of bits 1 and 2 are equal (queries 4, 5), those of bit 3 are query 5: with n = 5 the
    # correlations are 1, c and c with c = (1/5 - 2/25) / sqrt(6/25 * 4/25)
    c = (1 / 5 - 2 / 25) / np.sqrt(6 / 25 * 4 / 25)
    assert result.dependence == pytest.approx(4 * (1 + 2 * c**2) / 3)
    assert result.sets == 1
    assert result.agreement == pytest.approx(0)  # no other label set to differ from


def test_agreement_is_measured_against_that_of_any_two_queries() -> None:
    found = np.array([[1, 1]] * 5 + [[-1, 1]] * 5)
    labels = np.array([[1, 0]] * 5 + [[0, 1]] * 5)
    result = bit_errors(found, labels)
    assert result.agreement == pytest.approx(1)
    assert result.dependence == 0 and result.implausible


def test_without_a_large_label_set_nothing_is_said() -> None:
    found = bit_errors(np.ones((4, 3), np.int8), np.ones((4, 1), np.uint8))
    assert found.sets == 0 and not found.implausible


def test_independent_errors_have_dependence_one() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.eye(4, dtype=np.uint8), 100, axis=0)
    prototype = random.choice([-1, 1], (4, 40))
    noise = random.random((400, 40)) < 0.15
    found = np.where(noise, -1, 1) * np.repeat(prototype, 100, axis=0)
    assert bit_errors(found, labels).dependence == pytest.approx(1, abs=0.1)


def test_labels_are_read_off_codes_that_hold_them() -> None:
    random = np.random.default_rng(0)
    labels = np.eye(5, dtype=np.uint8)[random.integers(5, size=200)]
    assert labels_read_off(2.0 * labels - 1, labels) == 1.0
    unrelated = random.choice([-1.0, 1.0], (200, 5))
    assert labels_read_off(unrelated, labels) < 0.4


def test_the_verdict_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.repeat(np.eye(4, dtype=np.uint8), 30, axis=0)
    true = np.where(labels > 0, 1, -1).astype(np.int8)
    mat, packed = codes.save(
        tmp_path, "X", "flickr25k", {"fused": Codes(true, true, labels, labels)}
    )
    assert audit.main(["--codes", str(mat)]) == 3
    assert audit.main(["--codes", str(packed)]) == 3
    out = capsys.readouterr().out
    assert out.rstrip().endswith("implausible") and "dependence of bit errors" in out
    random = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), true.shape)
    codes.save(tmp_path, "Y", "x", {"fused": Codes(random, random, labels, labels)})
    assert audit.main(["--codes", str(tmp_path / "Y_4-x_bits.mat")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("nothing implausible")


# Checkpoints


class LeakySplit(Split):
    """Items whose text holds their labels, as a prompt of true class names would."""

    def take(self, rows: np.ndarray) -> LeakySplit:
        return leaky(super().take(rows))

    def inputs(self, rows: np.ndarray | slice = slice(None), *draws: np.ndarray | None) -> Inputs:
        inputs = super().inputs(rows, *draws)
        assert inputs.text is not None
        text = inputs.text.clone()
        text[:, : self.labels.shape[1]] = 20.0 * torch.from_numpy(self.labels[rows]).float()
        return Inputs(inputs.image, text)


@pytest.fixture
def model(feature_file: Path) -> tuple[VHABL, Dataset]:
    """Without training; each bit is centred, so that half of the items have either value."""
    config = small_config(feature_file)
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec).eval()
    with torch.no_grad():
        inputs = method.encoder(data.train.inputs())
        for member in method.net.members:
            member.hash.bias -= member(inputs)[0].atanh().median(dim=0).values
    return method, data


def leaky(split: Split) -> LeakySplit:
    return LeakySplit(split.ids, split.image, split.text, split.labels)


def test_an_honest_model_changes_no_bit(model: tuple[VHABL, Dataset]) -> None:
    trials = audit_checkpoint(*model)
    assert len(trials) == 10
    assert [t.changed for t in trials] == [0] * 10
    assert all(t.bits > 0 for t in trials)


def test_labels_in_an_input_are_found(model: tuple[VHABL, Dataset]) -> None:
    method, data = model
    trials = audit_checkpoint(method, replace(data, query=leaky(data.query)))
    changed = {t.name for t in trials if t.changed}
    assert changed == {
        "query: permuted labels", "query: inverted labels", "query: missing labels",
    }  # fmt: skip


def test_a_model_that_looks_at_the_other_items_is_found(
    model: tuple[VHABL, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = model
    embed = method.embed
    monkeypatch.setattr(
        method, "embed", lambda inputs: {k: h - h.mean(dim=0) for k, h in embed(inputs).items()}
    )
    changed = {t.name for t in audit_checkpoint(method, data) if t.changed}
    assert "query: half of the company" in changed and "query: permuted labels" not in changed


def test_a_sign_at_zero_is_listed_apart(
    model: tuple[VHABL, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = model
    embed, calls = method.embed, []

    def trembling(inputs: Inputs) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {k: h * 0 + (-1e-6) ** len(calls) for k, h in embed(inputs).items()}

    monkeypatch.setattr(method, "embed", trembling)
    trials = audit_checkpoint(method, data)
    assert all(t.changed == 0 for t in trials)
    assert any(t.near_zero > 0 for t in trials)


def test_duplicates_are_counted_by_content(model: tuple[VHABL, Dataset]) -> None:
    _, data = model
    assert set(duplicates(data).values()) == {0}
    image, text = data.query.image.copy(), data.query.text.copy()
    image[:3], text[:2] = data.train.image[:3], data.train.text[:2]
    found = duplicates(replace(data, query=replace(data.query, image=image, text=text)))
    assert found == {
        "train: same image": 3, "train: same image and text": 2,
        "database: same image": 3, "database: same image and text": 2,
    }  # fmt: skip
    same = replace(data, query=data.train)  # the item itself is no duplicate of itself
    assert set(duplicates(same).values()) == {0}


def test_the_verdict_on_a_run(
    feature_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(feature_file, "nested_mlp", "out=run")
    data = load_data(config.data)
    train.train(config, data, progress_bar=False)
    assert audit.main(["--checkpoint", "run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("no leak")
    monkeypatch.setattr(audit, "load_data", lambda *_: replace(data, query=leaky(data.query)))
    assert audit.main(["--checkpoint", "run"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("\nleak")
    with pytest.raises(VhablError, match=r"no such folder|no weights"):
        audit.main(["--checkpoint", "nowhere"])


def test_a_run_is_audited_on_the_data_it_was_trained_on(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(feature_file, "nested_mlp", "out=run", "epochs=1")
    data = load_data(config.data)
    train.train(config, data, progress_bar=False)
    monkeypatch.setattr(audit, "load_data", lambda *_: replace(data, fingerprint="0" * 32))
    with pytest.raises(VhablError, match=r"trained on .wiki.*The data are .wiki"):
        audit.main(["--checkpoint", "run"])


def test_one_implausible_part_decides(tmp_path: Path) -> None:
    """One file among several, or one task of a file, the first as well as the last."""
    labels = np.repeat(np.eye(4, dtype=np.uint8), 30, axis=0)
    true = np.where(labels > 0, 1, -1).astype(np.int8)
    random = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), true.shape)
    bad, good = (Codes(c, c, labels, labels) for c in (true, random))
    files = []
    for name, tasks in (
        ("bad", {"fused": bad}), ("good", {"fused": good}),
        ("first", {"i2t": bad, "t2i": good}), ("last", {"i2t": good, "t2i": bad}),
    ):  # fmt: skip
        files.append(str(codes.save(tmp_path, name, "x", tasks)[0]))
    bad_file, good_file, *mixed = files
    assert audit.main(["--codes", bad_file, good_file]) == 3
    assert audit.main(["--codes", good_file, bad_file]) == 3
    assert [audit.main(["--codes", file]) for file in mixed] == [3, 3]


def test_labels_are_read_off_held_out_items() -> None:
    """Codes that tell every item apart name the classes of the items of the fit alone."""
    random = np.random.default_rng(0)
    labels = np.eye(5, dtype=np.uint8)[random.integers(5, size=200)]
    assert labels_read_off(random.choice([-1.0, 1.0], (200, 400)), labels) < 0.4
