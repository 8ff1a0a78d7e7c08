"""A report: the table in four forms, the figures, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from vhabl.evaluation.records import Record, own_positions
from vhabl.report import figures
from vhabl.report.gallery import Gallery, Hit, Item, sample_of_queries
from vhabl.report.plots import plot
from vhabl.report.table import Table
from vhabl.system.errors import VhablError, note
from vhabl.system.files import write_text
from vhabl.training import run_folder
from vhabl.types import Codes, Dataset

GALLERY_BITS = 64  # the length whose retrieved items are shown, where a run has it
QUERIES, TOP = 8, 10


@dataclass(frozen=True)
class Section:
    """Retrieved items of one method and task."""

    title: str
    rows: list[tuple[Item, list[Hit]]]


@dataclass(frozen=True)
class Inspected:
    """What is read from the runs themselves: figures of codes, retrieved items, sizes in words."""

    figures: list[figures.Figure]
    galleries: list[Section]
    sizes: str = ""


def write(
    out: Path, rows: Sequence[Record], run_folders: Sequence[Path], overrides: Sequence[str]
) -> None:
    """Write table.{md,csv,tex,json}, plots/*.{png,svg} and index.html for one data set.

    Tables and curves are made from the records; importance, balance and retrieved items from the
    first run of each method, where its data set is at hand (else they are left out, and a note on
    stderr says so).
    """
    first = first_runs(run_folders)
    table = Table(rows)
    for ending, text in (
        ("md", table.markdown() + "\n"),
        ("csv", table.csv()),
        ("tex", table.latex()),
        ("json", table.json()),
    ):
        write_text(out / f"table.{ending}", text)
    try:
        inspected = inspect(first, overrides)
    except VhablError as error:
        reason = str(error).splitlines()[0]
        note(f"no codes and no retrieved items in the report: {reason}")
        inspected = Inspected([], [])
    drawn = [*figures.from_records(rows), *inspected.figures]
    histories = {run.config.title: run_folder.read_history(run.folder) for run in first}
    if histories:
        drawn.append(figures.training_curves(histories))
    for figure in drawn:
        order = figure.order or figures.methods(rows)
        plot(out / "plots" / figure.name, figure.panels, order)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vhabl.report", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html").render(
        data=rows[0].data,
        sizes=inspected.sizes,
        table=table,
        many_seeds=any(row.seeds > 1 for row in table.rows),
        figures=[(figure, _svg(out / "plots" / f"{figure.name}.svg")) for figure in drawn],
        galleries=inspected.galleries,
        others=other_tables(rows),
        command=" ".join(["python -m vhabl.report", *sys.argv[1:]]),
    )
    write_text(out / "index.html", text)


def _svg(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def other_tables(rows: Sequence[Record]) -> list[Table]:
    """A table for every other measure that is not a point of a curve."""
    named = dict.fromkeys((r.measure, r.ties) for r in rows if r.ties != "real")
    kept = [
        (measure, ties)
        for measure, ties in named
        if (measure, ties) != ("mAP@all", "expected")
        and " at radius " not in measure
        and not (measure.startswith(("precision@", "recall@")) and not measure.endswith("@100"))
        and not measure.endswith("(matched)")
    ]
    return [Table(rows, measure, ties) for measure, ties in kept]


def first_runs(folders: Sequence[Path]) -> list[run_folder.Run]:
    """The run of the lowest seed of each recipe. Raises VhablError where one is damaged."""
    found: dict[str, run_folder.Run] = {}
    for run in sorted(map(run_folder.load, folders), key=lambda run: run.config.seed):
        found.setdefault(run.config.title, run)
    return list(found.values())


def inspect(first: Sequence[run_folder.Run], overrides: Sequence[str]) -> Inspected:
    """Encode with each run and look at its codes. Raises VhablError where data are missing."""
    importance: dict[str, np.ndarray | None] = {}
    longest: dict[str, dict[str, Codes]] = {}
    galleries: list[Section] = []
    gallery: Gallery | None = None
    seen: dict[str, None] = {}
    for run, data, codes in run_folder.encoded(first, None, overrides):
        title = run.config.title
        weights = run.method.bit_importance()
        importance[title] = None if weights is None else weights.cpu().numpy()
        longest[title] = codes[max(codes)]
        if gallery is None or gallery.data is not data:  # runs on the same data share it
            gallery = Gallery(run.config.data, data)
        bits = GALLERY_BITS if GALLERY_BITS in codes else max(codes)
        for task, found in codes[bits].items():
            queries = sample_of_queries(found, QUERIES)
            name = f"{title}, {bits} bits" + ("" if task == "fused" else f", {task}")
            galleries.append(Section(name, [gallery.row(found, q, TOP) for q in queries]))
        seen.setdefault(describe_inputs(run))
    sizes = "" if gallery is None else f"{describe(gallery.data)}; seen as {', '.join(seen)}"
    return Inspected(figures.from_codes(importance, longest), galleries, sizes)


def describe(data: Dataset) -> str:
    """Sizes of a data set in words."""
    spec = data.spec
    trained = int(np.isin(data.database.ids, data.train.ids).sum())
    inside = own_positions(data.query.sources, data.database.sources) is not None
    return (
        f"{len(data.query):,} queries, {len(data.database):,} database items of which {trained:,} "
        f"were trained on, {spec.classes} classes"
        + ("; queries are in the database themselves" if inside else "")
    )


def describe_inputs(run: run_folder.Run) -> str:
    """What a run's method sees of an item, in words."""
    spec = run.method.spec
    if run.config.encoder.name == "clip":
        return f"pictures of side {spec.image_dim} and texts of {spec.text_dim} tokens"
    if run.config.encoder.name == "cnn":
        return f"pictures of side {spec.image_dim} and {spec.text_dim:,} words"
    return f"features of {spec.image_dim:,} (image) and {spec.text_dim:,} (text)"
