"""Labels of arrays as 0/1 matrices: the answer key of every measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vhabl.system.errors import fail, plural


def as_labels(
    path: Path, parts: dict[str, np.ndarray], where: Callable[[str], object]
) -> dict[str, np.ndarray]:
    """Labels of all parts of a data set as 0/1 matrices [N, C] over one set of classes.

    parts: [N, C] of 0 and 1, or class numbers from 1, [N], [N, 1] or [1, N]. where: how messages
    name a part. Raises VhablError where labels are something else.
    """
    parts = {name: v[:, None] if v.ndim == 1 else v for name, v in parts.items()}
    for name, values in parts.items():
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiub":
            do = "It must be numbers, items x classes, or one column of class numbers"
            fail(where(name), f"shape {values.shape} of type {values.dtype}", do)
    if all(1 in v.shape for v in parts.values()) and max(v.max() for v in parts.values()) > 1:
        return _from_class_numbers({n: v.reshape(-1) for n, v in parts.items()}, where)
    require_same(path, "columns", {name: v.shape[1] for name, v in parts.items()})
    if all(values.shape[1] == 1 for values in parts.values()):
        do = "Give a column for each class, or class numbers from 1"
        fail(where(next(iter(parts))), "one column of 0 and 1, which may be two classes or one", do)
    for name, values in parts.items():
        wrong = ~np.isin(values, (0, 1))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            do = "Labels must be 0 and 1, or one column of class numbers from 1"
            fail(where(name), f"{values[row, column]:g} in row {row + 1}, column {column + 1}", do)
    return {name: values.astype(np.uint8) for name, values in parts.items()}


def _from_class_numbers(
    parts: dict[str, np.ndarray], where: Callable[[str], object]
) -> dict[str, np.ndarray]:
    for name, values in parts.items():
        wrong = ~np.isfinite(values) | (values != np.floor(values)) | (values < 1) | (values > 1e5)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            do = "One column of labels must be whole class numbers from 1"
            fail(where(name), f"{values[row]:g} in row {row + 1}", do)
    classes = int(max(v.max() for v in parts.values()))
    result = {}
    for name, values in parts.items():
        result[name] = np.zeros((len(values), classes), np.uint8)
        result[name][np.arange(len(values)), values.astype(np.int64) - 1] = 1
    return result


def require_same(path: Path, what: str, counts: dict[str, int]) -> None:
    """Raise VhablError unless the parts of a data set have as many rows, or columns."""
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{n} {what} in {name}" for name, n in counts.items())
        fail(path, found, "They must be the same")


def describe(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Labels [N, C] in words: how many an item has, and a line for each class with its items."""
    per_item, per_class = labels.sum(axis=1), labels.sum(axis=0)
    return [
        f"{labels.shape[1]} classes, {per_item.mean():.1f} labels an item, "
        f"{(per_item == 0).mean():.1%} of the items without a label",
        *(f"  {name}: {plural(int(n), 'item')}" for name, n in zip(names, per_class, strict=True)),
    ]


def numbers(labels: np.ndarray) -> list[str]:
    """Names of classes that have none."""
    return [f"class {number + 1}" for number in range(labels.shape[1])]
