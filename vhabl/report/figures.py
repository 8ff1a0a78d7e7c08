"""The figures of a report: which panels, from records of measures and from finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vhabl.evaluation.records import CLASSIFIER, NOT_BINARY, Record, interval_scores, shown
from vhabl.metrics.measures import ALL, RANKS
from vhabl.report.plots import Line, Panel, category_panel
from vhabl.types import Codes

TERMS = 6  # loss terms drawn apart; the others are added up


@dataclass(frozen=True)
class Figure:
    """name: of its files. caption: what is to be seen and how it was made."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    order: Sequence[str] = ()  # of the styles of its lines, where they are not methods


def from_records(rows: Sequence[Record]) -> list[Figure]:
    """mAP over bits, precision over recall and precision at N, for the whole database."""
    known = methods(rows)
    rows = [r for r in rows if r.database == "all" and named(r) in (*known, CLASSIFIER)]
    figures = []
    for task in dict.fromkeys(r.task for r in rows):
        own = [r for r in rows if r.task == task]
        suffix = "" if task == "fused" else f"-{task}"
        ending = "" if task == "fused" else f", {task}"
        figures += [
            replace(figure, title=figure.title + ending)
            for figure in (
                map_over_bits(own, suffix),
                precision_recall(own, suffix),
                precision_at_n(own, suffix),
            )
            if any(panel.lines for panel in figure.panels)
        ]
    return figures


def named(row: Record) -> str:
    """The name of a row's line."""
    return shown(row.method, row.oracle_labels)


def methods(rows: Sequence[Record]) -> list[str]:
    """The names that have a line in every figure, in the order of their styles."""
    names = dict.fromkeys(named(r) for r in rows if not r.method.endswith(NOT_BINARY))
    return [name for name in names if name != CLASSIFIER]


def map_over_bits(rows: Sequence[Record], suffix: str) -> Figure:
    chosen = [r for r in rows if (r.measure, r.ties) == ("mAP@all", "expected")]
    coded = [r for r in chosen if r.method != CLASSIFIER]
    lengths = sorted({r.bits for r in coded})
    lines = {
        name: {
            str(bits): values
            for bits in lengths
            if (values := [r.value for r in coded if named(r) == name and r.bits == bits])
        }
        for name in dict.fromkeys(map(named, coded))
    }
    panel = category_panel("", "bits", "mAP@all", lines)
    caption = "Mean over the seeds; bars are standard errors over the seeds."
    labels = [r for r in chosen if r.method == CLASSIFIER]
    if labels:
        level = float(np.mean([r.value for r in labels]))
        ends = [0, len(panel.ticks) - 1]
        classifier = {f"{CLASSIFIER} ({labels[0].bits} bits)": Line(ends, [level, level])}
        panel = Panel("", panel.x_label, panel.y_label, {**panel.lines, **classifier}, panel.ticks)
        caption += " The labels that a linear classifier predicts, as a code, have one length."
    return Figure(f"map_over_bits{suffix}", "mAP over bits", caption, [panel])


def _curves(rows: Sequence[Record], names: Sequence[str]) -> dict[int, dict[str, dict[str, float]]]:
    """Means over seeds of the measures asked for: {bits: {method: {measure: value}}}, for the
    lengths that more than one method has, or all where none is shared.
    """
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    wanted = set(names)
    for r in rows:
        if r.measure in wanted and r.ties in ("expected", "any"):
            by_method = found.setdefault(r.bits, {}).setdefault(named(r), {})
            by_method.setdefault(r.measure, []).append(r.value)
    shared = {bits: methods for bits, methods in found.items() if len(methods) > 1} or found
    return {
        bits: {m: {k: float(np.mean(v)) for k, v in own.items()} for m, own in shared[bits].items()}
        for bits in sorted(shared)
    }


def precision_recall(rows: Sequence[Record], suffix: str) -> Figure:
    radii = sorted(
        {int(r.measure.split()[-1]) for r in rows if r.measure.startswith("ball recall at")}
    )
    kinds = ("ball recall", "ball precision", "empty balls")
    curves = _curves(rows, [f"{kind} at radius {radius}" for kind in kinds for radius in radii])
    panels, empty = [], []
    for bits, methods in curves.items():
        lines = {}
        for method, values in methods.items():
            # where every ball is empty there is no precision
            steps = [r for r in radii if values.get(f"empty balls at radius {r}", 1) < 1]
            recall = [values[f"ball recall at radius {r}"] for r in steps]
            precision = [values[f"ball precision at radius {r}"] for r in steps]
            lines[method] = Line(recall, precision)
            share = values.get("empty balls at radius 2", 0.0)
            if share > 0:
                empty.append(f"{method} {bits} bits {share:.0%}")
        panels.append(Panel(f"{bits} bits", "recall", "precision", lines))
    caption = (
        "Over Hamming radii, averaged over the queries; a ball without any item is left out of the "
        "precision. Balls of radius 2 without any item: " + (", ".join(empty) or "none") + "."
    )
    return Figure(f"precision_recall{suffix}", "Precision over recall", caption, panels)


def precision_at_n(rows: Sequence[Record], suffix: str) -> Figure:
    curves = _curves(rows, [f"{kind}@{n}" for kind in ("precision", "recall") for n in RANKS])
    panels = []
    for bits, methods in curves.items():
        lines = {}
        for method, values in methods.items():
            ranks = [n for n in RANKS if f"precision@{n}" in values]
            full = next((n for n in ranks if values[f"recall@{n}"] == 1), ALL)  # all is retrieved
            ranks = [n for n in ranks if n <= full]
            lines[method] = Line(ranks, [values[f"precision@{n}"] for n in ranks])
        panels.append(Panel(f"{bits} bits", "N", "precision@N", lines, log_x=True))
    caption = "Exact expectation over the order of items at equal distance."
    return Figure(f"precision_at_n{suffix}", "Precision at N", caption, panels)


def from_codes(
    importance: Mapping[str, np.ndarray | None], codes: Mapping[str, Mapping[str, Codes]]
) -> list[Figure]:
    """Bit importance, intervals and balance of the longest codes: {method: {task: Codes}}."""
    panels = []
    ranked = {name: w for name, w in importance.items() if w is not None}
    if ranked:
        lines = {name: Line(range(1, len(w) + 1), w.tolist()) for name, w in ranked.items()}
        panels.append(
            Panel("importance", "bit, by rank", "weight (mean 1)", lines, marks=False, level=1.0)
        )
    intervals = {
        name: {bits: [value] for bits, value in found.items()}
        for name, tasks in codes.items()
        if "fused" in tasks and (found := interval_scores(tasks["fused"]))
    }
    if intervals:
        panels.append(category_panel("intervals", "bits, by rank", "mAP@all", intervals))
    figures = []
    if panels:
        caption = (
            "Left: what each bit weighs where a method ranks bits. "
            "Right: ten ranked bits alone at a time; a ranking that works falls."
            if len(panels) == 2
            else "Ten bits alone at a time, in the order of the code."
        )
        figures.append(Figure("bit_importance", "Bit importance", caption, panels))
    shares = {
        name: np.sort((next(iter(tasks.values())).database > 0).mean(axis=0))
        for name, tasks in codes.items()
    }
    if shares:
        lines = {name: Line(range(1, len(s) + 1), s.tolist()) for name, s in shares.items()}
        panel = Panel("", "bit, by share", "share of ones", lines, marks=False, level=0.5)
        caption = "Share of the database items whose bit is one, sorted; one half is balanced."
        figures.append(Figure("code_balance", "Code balance", caption, [panel]))
    return figures


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Losses over the epochs of the last phase of training, a panel a method; and the validation
    scores by which the number of epochs was chosen, where it was.
    """
    panels = []
    for method, history in histories.items():
        last = history[-1]["phase"] if history else ""
        rows = [row for row in history if row["phase"] == last]
        terms = [k for k in rows[0] if k not in ("phase", "epoch", "loss", "validation")]
        size = {t: float(np.mean([abs(row[t]) for row in rows])) for t in terms}
        terms = sorted(size, key=lambda t: -size[t]) if len(terms) > 1 else []
        epochs = [row["epoch"] for row in rows]
        lines = {"sum": Line(epochs, [row["loss"] for row in rows])}
        for term in terms[:TERMS]:
            lines[term] = Line(epochs, [row[term] for row in rows])
        if terms[TERMS:]:
            rest = [sum(row[t] for t in terms[TERMS:]) for row in rows]
            lines["others"] = Line(epochs, rest)
        panels.append(Panel(method, "epoch", "loss", lines, marks=False))
    scored = {
        method: [row for row in history if "validation" in row]
        for method, history in histories.items()
    }
    found = {
        method: Line([r["epoch"] for r in rows], [r["validation"] for r in rows])
        for method, rows in scored.items()
        if rows
    }
    if found:
        panels.append(Panel("validation split", "epoch", "mAP@all", found))
    caption = (
        "Weighted loss terms, mean over each epoch; the smallest ones are added up as others. "
        + (
            "The validation split chose the number of epochs."
            if found
            else "The number of epochs is fixed in the recipe."
        )
    )
    return Figure("training", "Training", caption, panels, ["sum"])
