"""Tables of records: a row for each method, task and database, a column for each code length.

One table has four forms: Markdown, LaTeX, CSV and JSON. Published figures stand beside ours, each
with its protocol and what differs in it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vhabl.evaluation.records import CLASSIFIER, NOT_BINARY, Record, shown
from vhabl.report.published import Published, published

PUBLISHED = "published"  # in the column of the database
BELOW = "†"


@dataclass(frozen=True)
class Row:
    """values: {bits: one value a seed}; notes are printed below the table, with a number each."""

    method: str
    task: str
    database: str  # all | without_train | published
    values: dict[int, list[float]]
    seeds: int
    notes: tuple[str, ...] = ()
    oracle_labels: bool = False

    @property
    def group(self) -> tuple[str, str]:
        """What values may be compared in: the same task and database."""
        return self.task, self.database

    def mean(self, bits: int) -> float | None:
        values = self.values.get(bits)
        return float(np.mean(values)) if values else None

    def deviation(self, bits: int) -> float | None:
        """Standard deviation over the seeds, where there are several."""
        values = self.values.get(bits, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False  # of its column, task and database, among our own binary codes
    below: bool = False  # below what a linear classifier's labels reach


class Table:
    """One measure of a data set's records, and published figures where they are for mAP.

    Methods keep their order in the records. A result made with oracle labels says so. Where the
    labels that a linear classifier predicts score higher than a method, its cell has a dagger.
    """

    def __init__(
        self,
        records: Sequence[Record],
        measure: str = "mAP@all",
        ties: str = "expected",
        with_published: bool = True,
    ) -> None:
        self.measure, self.ties = measure, ties
        chosen = [r for r in records if r.measure == measure and r.ties in (ties, "real")]
        protocols = {_protocol(r) for r in chosen}
        rows = _measured(chosen, with_notes=len(protocols) > 1)
        self.protocol = protocols.pop() if len(protocols) == 1 else ""
        if with_published and measure == "mAP@all":
            rows += _published(chosen)
        # Stable: methods keep their order, and published figures follow ours.
        self.rows = sorted(rows, key=lambda r: (r.database == PUBLISHED, r.database, r.task))
        shared = [bits for row in self.rows if len(row.values) > 1 for bits in row.values]
        self.lengths = sorted(set(shared or (b for row in self.rows for b in row.values)))
        self.notes = list(dict.fromkeys(note for row in self.rows for note in row.notes))

    @property
    def title(self) -> str:
        """The measure, and the order of ties where that matters."""
        ordered = self.ties not in ("", "any")
        return self.measure + (f", {self.ties} order of ties" if ordered else "")

    @property
    def caption(self) -> str:
        return self.title + (f"; {self.protocol}" if self.protocol else "")

    @property
    def header(self) -> list[str]:
        own = ["own length"] if any(self._other(row) for row in self.rows) else []
        return ["method", "task", "database", "seeds", *(f"{b} bits" for b in self.lengths), *own]

    def cells(self, row: Row) -> list[Cell]:
        """The cells of one row, as many as `header` has."""
        marks = "".join(f" [{self.notes.index(note) + 1}]" for note in row.notes)
        name = shown(row.method, row.oracle_labels) + marks
        cells = [Cell(name), Cell(row.task), Cell(row.database)]
        cells.append(Cell(str(row.seeds) if row.seeds else "-"))
        cells += [self._value(row, bits) for bits in self.lengths]
        if "own length" in self.header:
            other = self._other(row)
            cells.append(Cell(f"{_number(row, other)} ({other} bits)" if other else ""))
        return cells

    def footnotes(self) -> list[str]:
        """What the marks of the table mean."""
        lines = [f"[{number}] {note}" for number, note in enumerate(self.notes, 1)]
        if any(row.deviation(bits) is not None for row in self.rows for bits in row.values):
            lines.append("± standard deviation over the seeds, as many as their column says")
        if any(cell.below for row in self.rows for cell in self.cells(row)):
            lines.append(
                f"{BELOW} below the labels that a linear classifier predicts, taken as a code"
            )
        return lines

    def _other(self, row: Row) -> int | None:
        """A row's one length where no other row has it: the classifier has one bit a class."""
        return next((bits for bits in row.values if bits not in self.lengths), None)

    def _value(self, row: Row, bits: int) -> Cell:
        mean = row.mean(bits)
        if mean is None:
            return Cell("-")
        if not self.measure.startswith(("mAP", "precision", "recall", "NDCG")):
            return Cell(_number(row, bits))  # for others, such as a rank, more is not better
        rivals = [r for r in self.rows if r.group == row.group and _is_code(r)]
        means = [m for r in rivals if (m := r.mean(bits)) is not None]
        classifiers = [r for r in self.rows if r.group == row.group and r.method == CLASSIFIER]
        reference = max((m for r in classifiers for b in r.values if (m := r.mean(b))), default=0)
        measured = row.method != CLASSIFIER and row.database != PUBLISHED
        return Cell(
            _number(row, bits),
            best=_is_code(row) and row.database != PUBLISHED and mean == max(means),
            below=measured and mean < reference,
        )

    # -- forms -------------------------------------------------------------------------------------

    def markdown(self) -> str:
        lines = [self.header]
        for row in self.rows:
            lines.append([c.text + BELOW * c.below for c in self.cells(row)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join([*text, *([""] if self.footnotes() else []), *self.footnotes()])

    def latex(self) -> str:
        """A `tabular` with booktabs rules; the best code of each column is bold."""
        lines = [
            f"% {self.caption}",
            r"\begin{tabular}{lllr" + "r" * (len(self.header) - 4) + "}",
            r"\toprule",
            " & ".join(map(_latex, self.header)) + r" \\",
        ]
        group = None
        for row in self.rows:
            if row.group != group:
                lines.append(r"\midrule")
                group = row.group
            cells = []
            for cell in self.cells(row):
                text = _latex(cell.text)
                text = rf"\textbf{{{text}}}" if cell.best else text
                cells.append(text + r"$^\dagger$" * cell.below)
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\footnotesize {_latex(note)}" for note in self.footnotes()]
        return "\n".join(lines) + "\n"

    def values(self) -> list[dict[str, Any]]:
        """One entry for each row and length: what CSV and JSON hold."""
        return [
            {
                "method": row.method,
                "task": row.task,
                "database": row.database,
                "source": "published" if row.database == PUBLISHED else "measured",
                "measure": self.measure,
                "ties": self.ties,
                "bits": bits,
                "mean": row.mean(bits),
                "deviation": row.deviation(bits),
                "seeds": row.seeds,
                "oracle_labels": row.oracle_labels,
                "notes": " ".join(row.notes) or self.protocol,
            }
            for row in self.rows
            for bits in row.values
        ]

    def csv(self) -> str:
        text = io.StringIO()
        values = self.values()
        writer = csv.DictWriter(text, list(values[0]) if values else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(values)
        return text.getvalue()

    def json(self) -> str:
        return json.dumps(self.values(), indent=1) + "\n"


def _number(row: Row, bits: int) -> str:
    spread = row.deviation(bits)
    return f"{row.mean(bits):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _is_code(row: Row) -> bool:
    """A row of binary codes that labels have not entered: what the best of a column is among."""
    return not (row.oracle_labels or row.method == CLASSIFIER or row.method.endswith(NOT_BINARY))


def _latex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("#", r"\#"),
        ("±", r"$\pm$"),
        (BELOW, r"$^\dagger$"),
    ):
        text = text.replace(plain, escaped)
    return text


# -- rows ------------------------------------------------------------------------------------------


def _protocol(r: Record) -> str:
    parts = [f"{r.queries} queries"]
    if r.queries_without_match:
        parts.append(f"{r.queries_without_match} of them without a match, counted as 0")
    if r.own_items != "none":
        parts.append(f"queries that are in the database themselves {r.own_items.replace('_', ' ')}")
    return ", ".join(parts)


def _measured(records: Sequence[Record], with_notes: bool) -> list[Row]:
    found: dict[tuple[str, str, str, bool], list[Record]] = {}
    for r in records:
        found.setdefault((r.method, r.task, r.database, r.oracle_labels), []).append(r)
    rows = []
    for (method, task, database, oracle_labels), own in found.items():
        values: dict[int, list[float]] = {}
        for r in own:
            values.setdefault(r.bits, []).append(r.value)
        seeds = len({r.seed for r in own})
        notes = (_protocol(own[0]) + ".",) if with_notes else ()
        rows.append(Row(method, task, database, values, seeds, notes, oracle_labels))
    return rows


def _published(records: Sequence[Record]) -> list[Row]:
    """Published figures for the data set and the tasks of these records."""
    rows = []
    queries = {(r.data, r.task): r.queries for r in records}
    for (name, task), count in queries.items():
        data = name.partition("_")[0]  # mirflickr_cnn is mirflickr, split otherwise
        for entry in published():
            if task in entry.values.get(data, {}):
                values = dict(zip(entry.bits, entry.values[data][task], strict=True))
                found = {bits: [value] for bits, value in values.items()}
                note = f"{entry.source}: {entry.protocol}."
                if found:
                    note += f" Differs: {'; '.join(differences(entry, data, count)) or 'nothing'}."
                row = Row(entry.method, task, PUBLISHED, found, 0, (note,), entry.oracle_labels)
                rows.append(row)
    return rows


def differences(entry: Published, data: str, queries: int) -> list[str]:
    """In what a published figure's protocol is not ours, or not known to be."""
    found = []
    if entry.oracle_labels:
        found.append("labels enter the encoder")
    if entry.measure is None:
        found.append("cut-off not stated")
    elif entry.measure != "mAP@all":
        found.append(f"the measure is {entry.measure}")
    theirs = entry.queries.get(data)
    if theirs is None:
        found.append("number of queries not stated")
    elif theirs != queries:
        found.append(f"{theirs} queries, here {queries}")
    if entry.epoch is None:
        found.append("choice of the epoch not stated")
    elif entry.epoch != "validation":
        found.append(f"best epoch chosen on {entry.epoch}")
    return found


def print_table(
    rows: Sequence[Record],
    measure: str = "mAP@all",
    ties: str = "expected",
    with_published: bool = False,
) -> None:
    table = Table(rows, measure, ties, with_published)
    print(table.caption)
    print(table.markdown())
