"""Text tables of records: a row for each method, task and database, a column for each length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vhabl.evaluator import Record

Key = tuple[str, str, str]  # method, task, database


def table(rows: Sequence[Record], measure: str = "mAP@all", ties: str = "expected") -> str:
    """Mean over seeds, and the standard deviation where there are several, in Markdown.

    The method names keep their order in `rows`. A result made with oracle labels says so.
    """
    cells: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    seeds: dict[Key, set[int]] = defaultdict(set)
    for r in rows:
        if r.measure != measure or r.ties not in (ties, "real"):
            continue
        key = (r.method + (" (oracle labels)" if r.oracle_labels else ""), r.task, r.database)
        cells[key][r.bits].append(r.value)
        seeds[key].add(r.seed)
    lengths = sorted({bits for by_bits in cells.values() for bits in by_bits})
    header = ["method", "task", "database", "seeds", *(f"{bits} bits" for bits in lengths)]
    lines = [header]
    for key in sorted(cells, key=lambda k: (k[2], k[1])):  # stable: methods keep their order
        values = [_cell(cells[key].get(bits, [])) for bits in lengths]
        lines.append([*key, str(len(seeds[key])), *values])
    return _markdown(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def print_table(rows: Sequence[Record], measure: str = "mAP@all", ties: str = "expected") -> None:
    print(f"{measure}, {ties} order of ties; queries without a match count as 0")
    print(table(rows, measure, ties))
