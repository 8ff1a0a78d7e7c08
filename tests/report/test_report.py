"""Tables, figures and the page: what they show is what the records say."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_feature_file

from vhabl.config import CONFIG_DIR, load
from vhabl.data import load as load_data
from vhabl.evaluation.records import CLASSIFIER, Record, measure
from vhabl.report import Table, figures, page, published
from vhabl.report.gallery import Gallery, sample_of_queries
from vhabl.report.plots import Line, Panel, category_panel, plot
from vhabl.report.published import Published
from vhabl.system.errors import VhablError
from vhabl.types import Codes


def record(method: str, bits: int, value: float, seed: int = 0, **changes: object) -> Record:
    row = Record(
        method, "wiki", "fused", bits, "mAP@all", value, seed, "expected", False, 7, 0, "all"
    )
    return replace(row, **changes)  # type: ignore[arg-type]


ROWS = [
    record("A_1", 16, 0.5, seed=0),
    record("A_1", 16, 0.7, seed=1),
    record("A_1", 32, 0.65, seed=0),
    record("A_1", 32, 0.75, seed=1),
    record("B", 16, 0.61),
    record("B", 32, 0.62),
    record(CLASSIFIER, 10, 0.62),
]


def texts(table: Table, method: str) -> list[str]:
    (row,) = [r for r in table.rows if r.method == method]
    return [cell.text for cell in table.cells(row)]


def test_a_table_has_means_and_deviations_over_seeds() -> None:
    table = Table(ROWS)
    others = [record("B", 16, 0.1, ties="index"), record("B", 16, 0.2, measure="NDCG@100")]
    assert Table([*ROWS, *others]).markdown() == table.markdown()
    header = ["method", "task", "database", "seeds", "16 bits", "32 bits", "own length"]
    assert table.header == header
    assert texts(table, "A_1")[:6] == [
        "A_1", "fused", "all", "2", "0.6000 ± 0.1414", "0.7000 ± 0.0707",
    ]  # fmt: skip
    assert texts(table, "B")[3:] == ["1", "0.6100", "0.6200", ""]
    assert table.caption == "mAP@all, expected order of ties; 7 queries"
    said = "± standard deviation over the seeds, as many as their column says"
    assert said in table.footnotes()
    assert said not in Table([r for r in ROWS if r.seed == 0]).footnotes()


def test_a_length_of_its_own_makes_no_column() -> None:
    assert texts(Table(ROWS), CLASSIFIER)[4:] == ["-", "-", "0.6200 (10 bits)"]
    alone = Table([record("A", 12, 0.5)])  # the only length there is
    assert alone.header[4:] == ["12 bits"]


def test_the_best_code_and_those_below_the_classifier_are_marked() -> None:
    rows = [
        *ROWS,
        record("B (real-valued)", 16, 0.61),
        record("Cheat", 16, 0.99, oracle_labels=True),
    ]
    table = Table(rows)
    marks = {
        row.method: [(cell.best, cell.below) for cell in table.cells(row)[4:6]]
        for row in table.rows
    }
    assert marks["A_1"] == [(False, True), (True, False)]
    assert marks["B"] == [(True, True), (False, False)]  # 0.62 is level with the classifier
    assert marks["B (real-valued)"][0] == (False, True)  # level with the best code, but no code
    assert marks["Cheat"][0] == (False, False)
    assert table.footnotes()[-1].startswith("† below the labels that a linear classifier predicts")
    assert texts(table, "Cheat")[0] == "Cheat (oracle labels)"


def test_marks_stay_within_a_task_and_a_database() -> None:
    other = [replace(r, database="without_train", value=r.value / 2) for r in ROWS]
    table = Table([*ROWS, *other])
    best = [(r.method, r.database) for r in table.rows if table.cells(r)[5].best]
    assert best == [("A_1", "all"), ("A_1", "without_train")]
    assert not [r for r in table.rows if r.database != "all" and table.cells(r)[5].below]
    below = [(r.method, r.database) for r in table.rows if table.cells(r)[4].below]
    assert below == [("A_1", "all"), ("B", "all"), ("A_1", "without_train"), ("B", "without_train")]


def test_a_rank_has_no_best_mark() -> None:
    rows = [replace(r, measure="first-match rank") for r in ROWS]
    table = Table(rows, "first-match rank")
    assert not any(cell.best or cell.below for row in table.rows for cell in table.cells(row))


def test_rows_of_another_protocol_say_so() -> None:
    rows = [*ROWS, record("C", 16, 0.4, queries=9, queries_without_match=2, own_items="left_out")]
    table = Table(rows)
    assert table.protocol == ""
    assert texts(table, "B")[0] == "B [1]" and texts(table, "C")[0] == "C [2]"
    assert table.footnotes()[:2] == [
        "[1] 7 queries.",
        "[2] 9 queries, 2 of them without a match, counted as 0, queries that are in the database "
        "themselves left out.",
    ]


def test_the_four_forms_agree() -> None:
    table = Table(ROWS)
    assert "| A_1" in table.markdown() and "0.6100†" in table.markdown()
    values = json.loads(table.json())
    assert [(v["method"], v["bits"], v["mean"]) for v in values][2] == ("B", 16, 0.61)
    assert values[0]["mean"] == pytest.approx(0.6)  # over both seeds
    assert values[0]["deviation"] == pytest.approx(2**0.5 / 10) and values[2]["deviation"] is None
    read = list(csv.DictReader(io.StringIO(table.csv())))
    assert [float(r["mean"]) for r in read] == [v["mean"] for v in values]
    latex = table.latex()
    assert r"A\_1 & fused & all & 2 & 0.6000 $\pm$ 0.1414$^\dagger$ & " in latex
    assert r"\textbf{0.7000 $\pm$ 0.0707}" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in rows} == {6}
    assert latex.count(r"\begin{tabular}{lllrrrr}") == 1


FOREIGN = Published(
    "Theirs", [16, 32], {"wiki": {"fused": [0.8, 0.9]}}, "as read", "A paper",
    measure="mAP@all", queries={"wiki": 7}, epoch="validation",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing"),
        ({"measure": None}, "cut-off not stated"),
        ({"measure": "mAP@50/min"}, "the measure is mAP@50/min"),
        ({"queries": {}}, "number of queries not stated"),
        ({"queries": {"wiki": 2000}}, "2000 queries, here 7"),
        ({"epoch": None}, "choice of the epoch not stated"),
        ({"epoch": "the test queries"}, "best epoch chosen on the test queries"),
        ({"oracle_labels": True}, "labels enter the encoder"),
    ],
)
def test_a_published_row_says_how_its_protocol_differs(
    changes: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = replace(FOREIGN, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr("vhabl.report.table.published", lambda: (entry,))
    table = Table(ROWS)
    cells = texts(table, "Theirs")
    suffix = " (oracle labels)" if entry.oracle_labels else ""
    assert cells[:6] == [f"Theirs{suffix} [1]", "fused", "published", "-", "0.8000", "0.9000"]
    assert table.footnotes()[0] == f"[1] A paper: as read. Differs: {said}."
    assert table.rows[-1].method == "Theirs"  # below ours
    best = [r.method for r in table.rows if table.cells(r)[5].best]
    assert best == ["A_1"]  # a published figure takes no mark from ours
    assert [v["source"] for v in table.values()][-2:] == ["published", "published"]


def test_published_figures_of_other_data_tasks_and_measures_stay_out() -> None:
    assert all(row.database != "published" for row in Table(ROWS).rows)  # none are known for wiki
    flickr = [replace(r, data="mirflickr") for r in ROWS]
    found = {r.method: r for r in Table(flickr).rows if r.database == "published"}
    assert {"CLIPMH", "BSTH", "PGHMH (released codes)", "VH-ABL"} <= set(found)
    assert "MITH" not in found  # it serves other tasks
    assert found["PGHMH (released codes)"].oracle_labels
    assert not found["VH-ABL"].values and "not found as text" in found["VH-ABL"].notes[0]
    assert "MITH" in {r.method for r in Table([replace(flickr[0], task="i2t")]).rows}
    rank = Table([replace(r, measure="NDCG@100") for r in flickr], "NDCG@100")
    assert all(row.database != "published" for row in rank.rows)


def test_every_published_entry_is_complete() -> None:
    entries = published.published()
    assert len(entries) == 15
    for entry in entries:
        assert entry.protocol and entry.source
        for tasks in entry.values.values():
            for values in tasks.values():
                assert len(values) == len(entry.bits) and all(0 < v < 1 for v in values)
        if entry.epoch is not None:
            assert entry.epoch == "the test queries"


# -- figures ---------------------------------------------------------------------------------------


def measured(seed: int = 0, title: str = "VH-ABL") -> list[Record]:
    rng = np.random.default_rng(seed)
    signs = [(rng.integers(0, 2, (n, 16)) * 2 - 1).astype(np.int8) for n in (9, 150)]
    labels = [np.eye(3, dtype=np.uint8)[rng.integers(3, size=n)] for n in (9, 150)]
    rows = measure(Codes(*signs, *labels), record(title, 16, 0.0, seed, ties=""), "curves")
    return [replace(r, bits=16) for r in rows]


def test_curves_are_means_of_the_records_over_seeds() -> None:
    rows = measured(0) + measured(1)

    def mean(name: str) -> float:
        return float(np.mean([r.value for r in rows if (r.measure, r.ties) in names(name)]))

    def names(name: str) -> list[tuple[str, str]]:
        return [(name, "expected"), (name, "any")]

    found = {f.name: f for f in figures.from_records(rows)}
    assert set(found) == {"map_over_bits", "precision_recall", "precision_at_n"}
    line = found["precision_at_n"].panels[0].lines["VH-ABL"]
    assert list(line.x) == [1, 5, 10, 20, 50, 100, 200]  # all 150 items: nothing is beyond
    assert line.y == [pytest.approx(mean(f"precision@{n}")) for n in line.x]
    curve = found["precision_recall"].panels[0].lines["VH-ABL"]
    radii = [r for r in range(17) if mean(f"empty balls at radius {r}") < 1]
    assert len(radii) < 17  # no precision where every ball is empty
    assert curve.x == [pytest.approx(mean(f"ball recall at radius {r}")) for r in radii]
    assert curve.y == [pytest.approx(mean(f"ball precision at radius {r}")) for r in radii]
    empty = mean("empty balls at radius 2")
    assert empty > 0 and f"VH-ABL 16 bits {empty:.0%}" in found["precision_recall"].caption


def test_map_over_bits_leaves_out_real_values_and_other_databases() -> None:
    extra = [record("A_1 (real-valued)", 16, 0.9), record("B", 64, 0.9, database="without_train")]
    (figure,) = figures.from_records([*ROWS, *extra])
    (panel,) = figure.panels
    assert list(panel.ticks) == ["16", "32"]
    assert list(panel.lines) == ["A_1", "B", "linear classifier (10 bits)"]
    line = panel.lines["A_1"]
    assert line.y == [pytest.approx(0.6), pytest.approx(0.7)]
    assert line.error == [pytest.approx(0.1), pytest.approx(0.05)]  # of the mean, over two seeds
    assert panel.lines["linear classifier (10 bits)"].y == [0.62, 0.62]


def test_tasks_have_figures_of_their_own() -> None:
    rows = [replace(r, task=task) for task in ("i2t", "t2i") for r in ROWS]
    found = figures.from_records(rows)
    assert [f.name for f in found] == ["map_over_bits-i2t", "map_over_bits-t2i"]
    assert [f.title for f in found] == ["mAP over bits, i2t", "mAP over bits, t2i"]


def test_importance_intervals_and_balance_come_from_codes() -> None:
    rng = np.random.default_rng(0)
    labels = np.eye(2, dtype=np.uint8)[rng.integers(2, size=60)]
    bits = np.where(rng.random((60, 20)) < 0.5, 1, -1).astype(np.int8)
    bits[:, :10] = np.where(labels[:, :1] == 1, 1, -1)  # the first ten tell the classes apart
    bits[:, 19] = 1
    codes = {"M": {"fused": Codes(bits[:20], bits[20:], labels[:20], labels[20:])}}
    weights = np.linspace(2, 0, 20)
    importance, balance = figures.from_codes({"M": weights}, codes)
    assert list(importance.panels[0].lines["M"].y) == weights.tolist()
    intervals = importance.panels[1]
    assert list(intervals.ticks) == ["1-10", "11-20"]
    assert intervals.lines["M"].y[0] == pytest.approx(1) and intervals.lines["M"].y[1] < 0.8
    shares = np.sort((bits[20:] > 0).mean(axis=0))
    assert balance.panels[0].lines["M"].y == shares.tolist() and shares[-1] == 1
    assert [f.name for f in figures.from_codes({}, {})] == []


def test_training_curves_show_the_last_phase_and_add_up_the_small_terms() -> None:
    terms = {f"t{i}": 8.0 - i for i in range(8)}
    history = [
        {"phase": "select", "epoch": 1, "loss": 99.0, **terms, "validation": 0.4},
        {"phase": "final", "epoch": 1, "loss": 36.0, **terms},
        {"phase": "final", "epoch": 2, "loss": 35.0, **terms},
    ]
    figure = figures.training_curves({"M": history})
    losses, validation = figure.panels
    assert list(losses.lines) == ["sum", "t0", "t1", "t2", "t3", "t4", "t5", "others"]
    assert losses.lines["sum"] == Line([1, 2], [36.0, 35.0])
    assert losses.lines["others"].y == [3.0, 3.0]
    assert validation.lines["M"] == Line([1], [0.4])
    assert "chose the number of epochs" in figure.caption


def test_a_plot_is_two_files_and_the_same_ones_again(tmp_path: Path) -> None:
    panels = [
        category_panel("one", "x", "y", {"a": {"1": [0.1, 0.3], "2": [0.4]}}),
        Panel("two", "x", "y", {f"line {i}": Line([1, 10], [0, i]) for i in range(9)}, log_x=True),
    ]
    plot(tmp_path / "p", panels)
    first = [(tmp_path / name).read_bytes() for name in ("p.png", "p.svg")]
    plot(tmp_path / "p", panels)
    assert [(tmp_path / name).read_bytes() for name in ("p.png", "p.svg")] == first
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]


def test_a_name_keeps_its_style_whatever_else_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    seen: dict[str, set[tuple[str, str, str]]] = {}
    drawn = Axes.errorbar

    def spy(axes: Axes, *arguments, **style):  # type: ignore[no-untyped-def]
        look = (style["color"], style["linestyle"], style["marker"])
        seen.setdefault(style["label"], set()).add(look)
        return drawn(axes, *arguments, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    names = [f"m{i}" for i in range(14)]
    lines = {name: Line([0, 1], [0, 1]) for name in names}
    plot(tmp_path / "all", [Panel("", "", "", lines)], names)
    plot(tmp_path / "one", [Panel("", "", "", {"m5": lines["m5"]})], names)
    assert all(len(looks) == 1 for looks in seen.values())
    assert len({look for looks in seen.values() for look in looks}) == 14  # no two are alike


# -- retrieved items and the page ------------------------------------------------------------------


def test_a_gallery_row_is_ranked_marked_and_leaves_out_the_query(tmp_path: Path) -> None:
    file = write_feature_file(tmp_path / "f.mat")
    config = load(CONFIG_DIR / "vh_abl.yaml", ["data=wiki", f"data.path={file}"]).data
    config = replace(config, class_names=["a", "b", "c", "d"])
    data = load_data(config)
    data = replace(data, query=data.database.take(np.arange(5)))  # the queries are in the database
    rng = np.random.default_rng(0)
    signs = (rng.integers(0, 2, (len(data.database), 8)) * 2 - 1).astype(np.int8)
    codes = Codes(signs[:5], signs, data.query.labels, data.database.labels)
    query, hits = Gallery(config, data).row(codes, 3, top=10)
    assert query.caption == "query 4" and query.image is None
    distances = (signs[3] != signs).sum(axis=1)
    order = [i for i in np.argsort(distances, kind="stable") if i != 3][:10]
    assert [h.item.caption for h in hits] == [f"item {i + 1}" for i in order]
    assert [h.distance for h in hits] == distances[order].tolist()
    classes = data.database.labels.argmax(axis=1)
    assert [h.right for h in hits] == [bool(classes[i] == classes[3]) for i in order]
    assert hits[0].item.classes == "abcd"[classes[order[0]]]
    assert len(Gallery(config, data).row(codes, 3, top=500)[1]) == len(data.database) - 1


def test_the_sample_of_queries_is_seeded_and_fits() -> None:
    codes = Codes(*(np.ones((n, 2), np.int8) for n in (50, 1, 50, 1)))
    found: Sequence[int] = sample_of_queries(codes, 8)
    assert found == sample_of_queries(codes, 8) and len(set(found)) == 8 and max(found) < 50
    assert sorted(found) == list(found)
    few = Codes(*(np.ones((n, 2), np.int8) for n in (3, 1, 3, 1)))
    assert list(sample_of_queries(few, 8)) == [0, 1, 2]


def test_a_page_without_runs_has_the_table_and_is_escaped(tmp_path: Path) -> None:
    rows = [*ROWS, record("<b>&", 16, 0.3), record("A_1", 16, 0.2, measure="NDCG@100")]
    page.write(tmp_path / "report", rows, [], [])
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "0.6000 ± 0.1414" in text and "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert re.search(r"<summary>NDCG@100, expected order of ties</summary>", text)
    assert "Retrieved items" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is loaded from elsewhere
    made = {p.name for p in (tmp_path / "report").iterdir()}
    assert made == {"index.html", "table.md", "table.csv", "table.tex", "table.json", "plots"}
    assert (tmp_path / "report" / "table.md").read_text(encoding="utf-8").startswith("| method")


def test_other_tables_are_measures_not_points_of_curves() -> None:
    named = {(t.measure, t.ties) for t in page.other_tables(measured())}
    assert ("precision@100", "expected") in named and ("mAP@all", "best") in named
    assert ("bit balance", "") in named
    assert [t.title for t in page.other_tables(measured()) if t.measure == "bit balance"] == [
        "bit balance"
    ]
    assert not [
        m for m, _ in named if "radius 7" in m or m.endswith("(matched)") or m == "recall@5"
    ]
    assert ("mAP@all", "expected") not in named


def test_a_damaged_run_stops_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"none")
    with pytest.raises(VhablError, match=r"weights\.safetensors: the file is damaged"):
        page.write(tmp_path / "report", ROWS, [folder], [])
    assert not (tmp_path / "report").exists()


def test_the_run_that_is_looked_at_has_the_lowest_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_run(folder: Path) -> SimpleNamespace:
        method, seed = folder.parts
        return SimpleNamespace(config=SimpleNamespace(title=method, seed=int(seed)), folder=folder)

    monkeypatch.setattr("vhabl.training.run_folder.load", load_run)
    folders = [Path("a/10"), Path("a/2"), Path("b/7")]
    assert [run.folder for run in page.first_runs(folders)] == [Path("a/2"), Path("b/7")]
