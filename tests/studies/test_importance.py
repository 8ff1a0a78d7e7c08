"""The importance experiments: their parts against obvious versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from vhabl.config import CONFIG_DIR
from vhabl.data import load as load_data
from vhabl.data import validation_split
from vhabl.methods.base import HashingMethod
from vhabl.studies import importance
from vhabl.studies.importance import (
    Row,
    alone,
    by_variance,
    fused_codes,
    greedy,
    ranking,
    score,
    summary,
)
from vhabl.system.errors import VhablError
from vhabl.training.trainer import Trainer
from vhabl.types import Codes, Dataset


def random_codes(seed: int, bits: int) -> Codes:
    rng = np.random.default_rng(seed)

    def labels(n: int) -> np.ndarray:
        return (rng.random((n, 4)) < 0.4).astype(np.uint8)

    def codes(n: int) -> np.ndarray:
        return rng.choice([-1, 1], (n, bits)).astype(np.int8)

    return Codes(codes(9), codes(30), labels(9), labels(30))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_the_best_next_bit(seed: int) -> None:
    codes = random_codes(seed, 7)
    chosen: list[int] = []
    for _ in range(5):
        rest = [k for k in range(7) if k not in chosen]
        values = [score(codes, [*chosen, k]) for k in rest]
        chosen.append(rest[int(np.argmax(values))])
    assert greedy(codes, 5).tolist() == chosen


def test_score_takes_the_columns_named() -> None:
    codes = random_codes(0, 6)
    part = Codes(
        codes.query[:, [4, 1]], codes.database[:, [4, 1]], codes.query_labels, codes.database_labels
    )
    assert score(codes, [4, 1]) == score(part, slice(2))


def test_variance_ranks_by_the_relaxed_value(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl")
    data = load_data(config.data)
    method = Trainer(config, data, False).run()
    spread = method.embed(data.train.inputs())["fused"].detach().var(dim=0)
    order = by_variance(method, data)
    assert sorted(order.tolist()) == list(range(16))
    assert (spread[order.tolist()].diff() <= 1e-6).all()


def test_ranking_holds_the_validation_items_out(feature_file: Path) -> None:
    """Neither training nor the database has them; the test queries are scored."""
    config = small_config(feature_file, "vh_abl", "epochs=2")
    data = load_data(config.data)
    rows = ranking(config, data, 0)
    orders = {r.order for r in rows if r.experiment == "ranking"}
    assert orders == {"learned", "random", "variance", "greedy"}
    assert [r.bits for r in rows if r.experiment == "intervals"] == ["1-10"]
    from vhabl.config import override
    from vhabl.data import validation_split

    held_out = validation_split(data, 0.1, 1)
    from dataclasses import replace

    seen = replace(held_out, query=data.query)
    method = Trainer(override(config, ["validation.fraction=0"]), seen, False).run()
    learned = [r.value for r in rows if r.order == "learned" and r.bits == "8"]
    assert learned == [score(fused_codes(method, seen), slice(8))]


def test_summary_gives_mean_and_standard_error() -> None:
    rows = [Row("x", seed, "learned", "8", value) for seed, value in enumerate((0.2, 0.4))]
    assert "8: 0.3000 ± 0.1000" in summary(rows)


def test_the_greedy_choice_never_sees_a_test_query(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(feature_file, "nested_mlp", "epochs=1")
    data = load_data(config.data)
    held_out = validation_split(data, config.validation.fraction, config.validation.seed)
    seen: list[Codes] = []
    variance_of: list[Dataset] = []

    def choose(codes: Codes, length: int) -> np.ndarray:
        seen.append(codes)
        return greedy(codes, length)

    def rank(method: HashingMethod, part: Dataset) -> np.ndarray:
        variance_of.append(part)
        return by_variance(method, part)

    monkeypatch.setattr("vhabl.studies.importance.greedy", choose)
    monkeypatch.setattr("vhabl.studies.importance.by_variance", rank)
    ranking(config, data, 0)
    assert np.array_equal(seen[0].query_labels, held_out.query.labels)
    assert np.array_equal(seen[0].database_labels, held_out.train.labels)
    assert np.array_equal(variance_of[0].train.ids, held_out.train.ids)


def test_a_ranking_scores_intervals_and_means_of_random_orders(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in score: the sum of the columns."""
    for module in ("studies.importance", "evaluation.records"):
        monkeypatch.setattr(
            f"vhabl.{module}.score", lambda _, columns: float(np.arange(32)[columns].sum())
        )
    config = small_config(feature_file, "nested_mlp", "epochs=1", "bits=[32]")
    rows = ranking(config, load_data(config.data), 5)
    found = {(r.order, r.bits): r.value for r in rows}
    assert [r.bits for r in rows if r.experiment == "intervals"] == ["1-10", "11-20", "21-30"]
    assert [found["learned", name] for name in ("1-10", "11-20", "21-30")] == [45, 145, 245]
    assert found["learned", "16"] == sum(range(16))
    random = np.random.default_rng(5)
    orders = [random.permutation(32) for _ in range(10)]
    assert found["random", "8"] == pytest.approx(np.mean([o[:8].sum() for o in orders]))


def test_models_trained_alone_have_the_length_they_stand_for(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[int]] = []
    real = Trainer.run

    def run(self: Trainer) -> HashingMethod:
        trained.append(self.config.bits)
        return real(self)

    monkeypatch.setattr(Trainer, "run", run)
    config = small_config(feature_file, "nested_mlp", "epochs=1", "bits=[8,24]")
    rows = alone(config, load_data(config.data), 3)
    assert trained == [[8, 24], [8], [16]]
    assert [(r.order, r.bits, r.seed) for r in rows] == [
        ("prefix", "8", 3), ("prefix", "16", 3), ("prefix", "24", 3),
        ("trained alone", "8", 3), ("trained alone", "16", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            "cmcl",
            "seed=0",
            "method is cmcl.*a method of pairs whose shorter codes are prefixes",
        ),
        ("nested_mlp", "bits=[4,7]", r"bits is \[4, 7\].*at least 8"),
    ],
)
def test_what_has_no_ranking_to_measure(
    recipe: str, override: str, message: str, feature_file: Path
) -> None:
    arguments = ["--config", str(CONFIG_DIR / f"{recipe}.yaml"), "data=wiki",
                 f"data.path={feature_file}", "encoder.name=features", override]  # fmt: skip
    with pytest.raises(VhablError, match=message):
        importance.main(["ranking", *arguments])
