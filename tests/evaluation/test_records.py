"""Records: which databases, which items, which rows; and the test between two rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_config

from vhabl.config import build_method
from vhabl.data import load as load_data
from vhabl.evaluation.records import (
    Record,
    batches_in_order,
    code_tasks,
    measure,
    own_positions,
    real_valued_records,
    records,
    relaxed_codes,
    to_tasks,
    validation_score,
)
from vhabl.methods.vh_abl import VHABL
from vhabl.metrics import evaluate, permutation_test
from vhabl.nn import quantisation
from vhabl.training.trainer import Trainer
from vhabl.types import Codes, Dataset

HEADLINE = ("mAP@all", "expected")


@pytest.fixture
def model(feature_file: Path) -> tuple[VHABL, Dataset]:
    config = small_config(feature_file)
    data = load_data(config.data)
    torch.manual_seed(0)
    return build_method(config, data.spec), data


def headline(rows: list[Record]) -> dict[str, float]:
    return {r.database: r.value for r in rows if (r.measure, r.ties) == HEADLINE}


def test_the_recall_of_a_small_database_is_said_to_be_a_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    for items, said in ((100, 1), (101, 0)):
        signs = [np.sign(rng.normal(size=(n, 8))).astype(np.int8) for n in (3, items)]
        labels = [np.eye(2, dtype=np.uint8)[rng.integers(2, size=n)] for n in (3, items)]
        record = Record("m", "d", "fused", 8, "", 0.0, 0, "", False, 0, 0, "all")
        rows = measure(Codes(*signs, *labels), record, "all")
        (value,) = {r.value for r in rows if r.measure == "recall@100"} if said else {None}
        told = "note: recall@100 is 1 for any codes: the database has 100 items\n"
        assert capsys.readouterr().err == told * said and value == (1.0 if said else None)


def test_the_database_without_training_items_is_a_row_of_its_own(
    model: tuple[VHABL, Dataset],
) -> None:
    method, data = model
    half = replace(data, train=data.train.take(np.arange(30)))
    codes = code_tasks(method, half, [8])
    rows = records("X", half, codes, 0)
    found = codes[8]["fused"]
    unseen = Codes(found.query, found.database[30:], found.query_labels, found.database_labels[30:])
    assert headline(rows) == {
        "all": evaluate(found)[0].value, "without_train": evaluate(unseen)[0].value,
    }  # fmt: skip
    assert headline(records("X", data, codes, 0)).keys() == {"all"}  # every item was trained on


def test_a_query_in_the_database_is_left_out_unless_kept(model: tuple[VHABL, Dataset]) -> None:
    method, data = model
    inside = replace(data, query=data.database.take(np.array([5, 2])))
    codes = code_tasks(method, inside, [8])
    (left_out, *_), (kept, *_) = (records("X", inside, codes, 0, keep_own=k) for k in (False, True))
    assert (left_out.own_items, kept.own_items) == ("left_out", "kept")
    found = codes[8]["fused"]
    by_hand = []
    for row, item in enumerate((5, 2)):
        rest = np.delete(np.arange(len(found.database)), item)
        alone = Codes(
            found.query[[row]], found.database[rest],
            found.query_labels[[row]], found.database_labels[rest],
        )  # fmt: skip
        by_hand.append(evaluate(alone)[0].value)
    assert left_out.value == pytest.approx(np.mean(by_hand))
    assert kept.value == pytest.approx(evaluate(found)[0].value)
    assert kept.value > left_out.value


def test_own_positions(capsys: pytest.CaptureFixture[str]) -> None:
    database = np.array(["a", "b", "c"])
    assert own_positions(np.array(["c", "x"]), database).tolist() == [2, -1]  # type: ignore[union-attr]
    assert own_positions(np.array(["x"]), database) is None
    assert capsys.readouterr().err == ""
    again = np.array(["a", "b", "c", "b", "x", "x"])
    assert own_positions(np.array(["c", "b", "b"]), again).tolist() == [2, 3, 3]  # type: ignore[union-attr]
    said = "queries come in the database several times: 1 copy kept there"
    assert said in capsys.readouterr().err


def test_another_row_of_a_querys_picture_is_the_query_itself(
    model: tuple[VHABL, Dataset],
) -> None:
    method, data = model
    pictures = np.arange(len(data.database))
    query = replace(data.query, pictures=np.array([5, *range(100, 119)]))
    inside = replace(data, database=replace(data.database, pictures=pictures), query=query)
    codes = code_tasks(method, inside, [8])
    assert records("X", inside, codes, 0)[0].own_items == "left_out"
    assert records("X", data, codes, 0)[0].own_items == "none"


def test_measure_sets_hold_one_another(model: tuple[VHABL, Dataset]) -> None:
    method, data = model
    codes = code_tasks(method, data, [8])[8]["fused"]
    template = Record("X", "y", "fused", 8, "", 0.0, 3, "", False, 0, 0, "all")
    sets = [measure(codes, template, kind) for kind in ("headline", "all", "curves")]
    names = [{(r.measure, r.ties) for r in rows} for rows in sets]
    assert names[0] == {HEADLINE, ("mAP@all (matched)", "expected")}
    assert names[0] < names[1] < names[2]
    assert {"bit balance", "bit correlation", "distinct codes", "expected collisions"} <= {
        name for name, _ in names[1]
    }
    assert all(len(rows) == len(found) for rows, found in zip(sets, names, strict=True))
    for rows in sets:
        assert {(r.method, r.data, r.task, r.bits, r.seed) for r in rows} == {
            ("X", "y", "fused", 8, 3)
        }
        assert all(r.queries == 20 for r in rows)


def test_real_valued_codes_are_ranked_by_cosine(model: tuple[VHABL, Dataset]) -> None:
    method, data = model
    rows = real_valued_records(method, data, [4, 16], 7)
    assert [(r.method, r.bits, r.ties, r.seed) for r in rows] == [
        ("VH-ABL (real-valued)", 4, "real", 7), ("VH-ABL (real-valued)", 16, "real", 7),
    ]  # fmt: skip
    sides = [relaxed_codes(method, s, [4])[4]["fused"] for s in (data.query, data.database)]
    query, database = (h / np.linalg.norm(h, axis=1, keepdims=True) for h in sides)
    precisions = []
    for q, labels in zip(query, data.query.labels, strict=True):
        order = np.argsort(-(database @ q), kind="stable")
        match = (data.database.labels[order] @ labels) > 0
        ranks = np.flatnonzero(match) + 1
        precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    assert rows[0].value == pytest.approx(np.mean(precisions), abs=1e-6)


def test_real_valued_codes_leave_out_the_query_itself(
    model: tuple[VHABL, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On features, which have no ties: a network without training gives many items one code."""
    monkeypatch.setattr(
        "vhabl.evaluation.records.relaxed_codes",
        lambda _, split, __: {12: {"fused": split.image * 1.0}},
    )
    method, data = model
    inside = replace(data, query=data.database.take(np.arange(6)))
    rows = real_valued_records(method, inside, [12], 0)
    kept = real_valued_records(method, inside, [12], 0, keep_own=True)
    assert (rows[0].own_items, kept[0].own_items) == ("left_out", "kept")
    assert real_valued_records(method, data, [12], 0)[0].own_items == "none"
    alone = []
    for i in range(6):  # each query against the database without it
        rest = data.database.take(np.flatnonzero(np.arange(len(data.database)) != i))
        single = replace(inside, query=data.database.take(np.array([i])), database=rest)
        alone.append(real_valued_records(method, single, [12], 0)[0].value)
    assert rows[0].value == pytest.approx(np.mean(alone)) and kept[0].value > rows[0].value


def test_searches_by_dictionaries(feature_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order written out, with a shortlist that is shorter than the database."""
    monkeypatch.setattr("vhabl.evaluation.records.SHORTLIST", 7)
    config = small_config(feature_file, "hq", "epochs=2", "validation.fraction=0", "out=run")
    data = load_data(config.data)
    method = Trainer(config, data, False).run()
    rows = real_valued_records(method, data, [8, 16], 3, title="Mine")
    found = {(r.method, r.task, r.bits, r.measure): r.value for r in rows}
    assert {(r.ties, r.seed, r.database) for r in rows} == {("real", 3, "all")}
    assert [found[f"Mine ({kind})", "i2t", 16, "bytes an item"]
            for kind in ("lossless", "quantised", "two-stage")] == [64, 0.75, 2.75]  # fmt: skip
    for kind in ("lossless", "quantised", "two-stage"):
        both = [found[f"Mine ({kind})", "i2t", 16, f"mAP@50/hits{name}"]
                for name in ("", " (queries with a hit)")]  # fmt: skip
        assert both[0] == both[1] > 0  # 60 items of 4 classes: no query is without a hit
    query, database = (relaxed_codes(method, s, [16])[16] for s in (data.query, data.database))
    centres = method.codebook(16)
    assert centres is not None
    for task, (mine, theirs) in (("i2t", ("image", "text")), ("t2i", ("text", "image"))):
        near = database[theirs]
        coded = quantisation.assign(torch.from_numpy(near), centres)
        rebuilt = quantisation.rebuild(coded, centres).numpy()
        precision: dict[str, list[float]] = {"lossless": [], "quantised": [], "two-stage": []}
        for q, labels in zip(query[mine], data.query.labels, strict=True):
            distance = ((near >= 0) != (q >= 0)).sum(axis=1)
            by_code = sorted(range(60), key=lambda i: (distance[i], i))
            value = rebuilt @ q
            orders = {
                "lossless": sorted(range(60), key=lambda i: -float(near[i] @ q)),
                "quantised": sorted(range(60), key=lambda i: -round(float(value[i]), 5)),
                "two-stage": [*sorted(by_code[:7], key=lambda i: -round(float(value[i]), 5)),
                              *by_code[7:]],
            }  # fmt: skip
            for kind, order in orders.items():
                hit = (data.database.labels[order] @ labels) > 0
                ranks = np.flatnonzero(hit) + 1
                precision[kind].append(float((np.arange(1, len(ranks) + 1) / ranks).mean()))
        for kind, values in precision.items():
            expected = pytest.approx(np.mean(values), abs=2e-3)  # items of one code are tied
            assert found[f"Mine ({kind})", task, 16, "mAP@all"] == expected


def test_permutation_test_by_enumeration() -> None:
    """Three differences 1, 2, 3: of 8 swaps two have a sum as large as 6."""
    a, b = np.array([2.0, 3, 4]), np.ones(3)
    assert permutation_test(a, b, draws=20_000) == pytest.approx(2 / 8, abs=0.01)
    assert permutation_test(b, a, draws=20_000) == pytest.approx(2 / 8, abs=0.01)


def test_permutation_test_tells_a_shift_from_noise() -> None:
    random = np.random.default_rng(0)
    a = random.random(300)
    noise = random.normal(0, 0.1, 300)
    assert permutation_test(a + noise, a) > 0.01
    assert permutation_test(a + noise + 0.05, a) < 0.001
    assert permutation_test(a, a) == 1.0


def test_a_query_outside_the_part_of_the_database_is_looked_up_in_that_part(
    model: tuple[VHABL, Dataset],
) -> None:
    """Queries 40 and 2 are in the database; only 40 is in the part that was not trained on."""
    method, data = model
    inside = replace(
        data,
        train=data.train.take(np.arange(30)),
        query=data.database.take(np.array([40, 2])),
    )
    codes = code_tasks(method, inside, [8])
    found = codes[8]["fused"]
    by_hand = []
    for row, rest in enumerate((np.delete(np.arange(30, 60), 10), np.arange(30, 60))):
        alone = Codes(
            found.query[[row]], found.database[rest],
            found.query_labels[[row]], found.database_labels[rest],
        )  # fmt: skip
        by_hand.append(evaluate(alone)[0].value)
    unseen = headline(records("X", inside, codes, 0))["without_train"]
    assert unseen == pytest.approx(np.mean(by_hand), rel=1e-12)


def test_cross_tasks_search_the_other_modality(model: tuple[VHABL, Dataset]) -> None:
    _, data = model
    views = [{v: np.full((2, 3), 10 * side + i) for i, v in enumerate(("image", "text"))}
             for side in (1, 2)]  # fmt: skip
    tasks = to_tasks(views[0], views[1], data)
    assert {name: (t.query[0, 0], t.database[0, 0]) for name, t in tasks.items()} == {
        "i2t": (10, 21), "t2i": (11, 20),
    }  # fmt: skip
    for task in tasks.values():
        assert task.query_labels is data.query.labels
        assert task.database_labels is data.database.labels


def test_images_and_texts_are_judged_by_their_own_labels(model: tuple[VHABL, Dataset]) -> None:
    """Of a database whose texts stand in another order than its images."""
    _, data = model
    turned = data.database.labels[::-1]
    unpaired = replace(data, database=replace(data.database, text_labels=turned))
    views = [{v: np.ones((2, 3)) for v in ("image", "text")} for _ in range(2)]
    tasks = to_tasks(views[0], views[1], unpaired)
    assert tasks["i2t"].database_labels is turned
    assert tasks["t2i"].database_labels is data.database.labels
    assert tasks["i2t"].query_labels is tasks["t2i"].query_labels is data.query.labels
    flipped = replace(data, query=replace(data.query, text_labels=1 - data.query.labels))
    tasks = to_tasks(views[0], views[1], flipped)
    assert tasks["i2t"].query_labels is data.query.labels
    assert np.array_equal(tasks["t2i"].query_labels, 1 - data.query.labels)


def test_records_of_texts_in_another_order(feature_file: Path) -> None:
    """Every record is what it would be with database texts in the images' order and the codes in
    theirs: codes, validation, real-valued searches, and the part that was not trained on.
    """
    config = small_config(feature_file, "hq", "model.dropout=0", "bits=[16]")
    data = load_data(config.data)
    data = replace(data, train=data.train.take(np.arange(20)))
    torch.manual_seed(0)
    method = build_method(config, data.spec).eval()
    method.calibrate(batches_in_order(method, data.train))
    order = np.concatenate([np.arange(20)[::-1], 20 + np.random.default_rng(0).permutation(40)])
    texts = data.database.take(order)
    unpaired = replace(data.database, text=texts.text, text_labels=texts.labels)
    other = replace(data, database=unpaired)

    def all_of(some: Dataset) -> dict[tuple[object, ...], float]:
        found = code_tasks(method, some, [16])
        rows = records("X", some, found, 0) + real_valued_records(method, some, [16], 0)
        keys = [(r.method, r.task, r.measure, r.database) for r in rows]
        assert ("X", "i2t", "mAP@all", "without_train") in keys
        values = {k: r.value for k, r in zip(keys, rows, strict=True)}
        return values | {("validation",): validation_score(method, some, [16])}

    found, expected = all_of(other), all_of(data)
    exact = [k for k in expected if k[0] in ("X", "HQ (lossless)") and "50" not in str(k)]
    assert len(exact) > 6
    assert {k: found[k] for k in exact} == pytest.approx({k: expected[k] for k in exact}, rel=1e-9)
    assert found["validation",] == pytest.approx(expected["validation",], rel=1e-9)
    as_pairs = all_of(replace(data, database=replace(unpaired, text_labels=None)))
    task = "X", "i2t", "mAP@all", "all"
    assert abs(as_pairs[task] - expected[task]) > 0.01


def test_the_validation_score_is_the_mean_over_lengths_and_tasks(
    model: tuple[VHABL, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = model
    random = np.random.default_rng(0)
    found = {
        bits: {
            task: Codes(
                *(random.choice(np.array([-1, 1], np.int8), (n, bits)) for n in (20, 60)),
                data.query.labels, data.database.labels,
            )
            for task in ("i2t", "t2i")
        }
        for bits in (2, 16)
    }  # fmt: skip
    monkeypatch.setattr(
        "vhabl.evaluation.records.code_tasks", lambda *given: {m: found[m] for m in given[2]}
    )
    each = [evaluate(codes)[0].value for tasks in found.values() for codes in tasks.values()]
    assert len(set(each)) == 4
    assert validation_score(method, data, [2, 16]) == pytest.approx(np.mean(each))


def test_matched_rows_leave_out_queries_without_a_match_and_codes_are_the_database() -> None:
    codes = Codes(
        np.array([[1, 1], [1, 1]], np.int8), np.array([[1, -1], [1, 1], [-1, 1]], np.int8),
        np.array([[1, 0], [0, 1]], np.uint8), np.array([[1, 0]] * 3, np.uint8),
    )  # fmt: skip
    template = Record("X", "y", "fused", 2, "", 0.0, 3, "", False, 0, 0, "all")
    rows = {(r.measure, r.ties): r for r in measure(codes, template, "all")}
    assert rows[HEADLINE].value == 1 / 2
    assert rows[("mAP@all (matched)", "expected")].value == 1
    assert rows[HEADLINE].queries_without_match == 1
    assert rows[("bit balance", "")].value == pytest.approx(1 / 3)
    assert rows[("distinct codes", "")].value == 1
