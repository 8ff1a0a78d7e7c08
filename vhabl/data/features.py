"""Feature files of the field: one .mat with I_tr, T_tr, L_tr, I_db ... L_te."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from vhabl.errors import fail
from vhabl.matfile import read_mat
from vhabl.settings import DataConfig
from vhabl.types import Split

ROLES = ("tr", "db", "te")


def load_features(path: Path, config: DataConfig) -> tuple[Split, Split, Split]:
    """Read training, database and query items of a feature file.

    Labels are 0/1 per class, or one column of class numbers that begin at 1, as MATLAB writes them.
    Raises VhablError naming the key that is missing, has other rows, NaN, infinities or wrong
    labels.
    """
    keys = [f"{part}_{role}" for role in ROLES for part in "ITL"]
    arrays = read_mat(path, keys)
    missing = [key for key in keys if key not in arrays]
    if missing:
        found = ", ".join(sorted(read_mat(path))) or "nothing"
        fail(f"{path}: key {missing[0]}", f"only {found}", ", ".join(keys))

    def where(key: str) -> str:
        return f"{path}: key {key}"

    features = {k: as_features(where(k), arrays.pop(k)) for k in keys if k[0] != "L"}
    labels = as_labels(path, {f"L_{role}": arrays[f"L_{role}"] for role in ROLES}, where)
    for role in ROLES:
        rows = {f"{part}_{role}": len(features[f"{part}_{role}"]) for part in "IT"}
        require_same(path, "rows", rows | {f"L_{role}": len(labels[f"L_{role}"])})
    for part in "IT":
        widths = {f"{part}_{role}": features[f"{part}_{role}"].shape[1] for role in ROLES}
        require_same(path, "columns", widths)
    train, database, query = (
        Split(
            content_ids(features[f"I_{role}"], features[f"T_{role}"]),
            features[f"I_{role}"],
            features[f"T_{role}"],
            labels[f"L_{role}"],
        )
        for role in ROLES
    )
    return train, database, query


def require_same(path: Path, what: str, counts: dict[str, int]) -> None:
    """Raise VhablError unless the parts of a data set have as many rows, or columns."""
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{n} {what} in {name}" for name, n in counts.items())
        fail(path, found, "the same number")


def as_features(where: object, values: np.ndarray) -> np.ndarray:
    """Numbers [N, d] as float32. Raises VhablError, naming `where`, unless they are finite."""
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiub":
        fail(where, f"shape {values.shape} of type {values.dtype}", "numbers, items x features")
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
        result = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        fail(
            where,
            f"{values[row, column]} in row {row + 1}, column {column + 1}"
            f" ({int((~finite).sum())} such values)",
            "finite numbers",
        )
    return result


def as_labels(
    path: Path, parts: dict[str, np.ndarray], where: Callable[[str], object]
) -> dict[str, np.ndarray]:
    """Labels of all parts of a data set as 0/1 matrices [N, C] over one set of classes.

    where: how messages name a part. Raises VhablError where labels are something else.
    """
    for name, values in parts.items():
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiub":
            fail(
                where(name),
                f"shape {values.shape} of type {values.dtype}",
                "numbers, items x classes, or one column of class numbers",
            )
    if all(1 in v.shape for v in parts.values()) and max(v.max() for v in parts.values()) > 1:
        return _from_class_numbers({n: v.reshape(-1) for n, v in parts.items()}, where)
    require_same(path, "columns", {name: v.shape[1] for name, v in parts.items()})
    for name, values in parts.items():
        wrong = ~np.isin(values, (0, 1))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            fail(
                where(name),
                f"{values[row, column]:g} in row {row + 1}, column {column + 1}",
                "labels of 0 and 1, or one column of class numbers from 1",
            )
    return {name: values.astype(np.uint8) for name, values in parts.items()}


def _from_class_numbers(
    parts: dict[str, np.ndarray], where: Callable[[str], object]
) -> dict[str, np.ndarray]:
    for name, values in parts.items():
        wrong = ~np.isfinite(values) | (values != np.floor(values)) | (values < 1) | (values > 1e5)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            fail(
                where(name),
                f"{values[row]:g} in row {row + 1}",
                "one column of whole class numbers that begin at 1",
            )
    classes = int(max(v.max() for v in parts.values()))
    result = {}
    for name, values in parts.items():
        result[name] = np.zeros((len(values), classes), np.uint8)
        result[name][np.arange(len(values)), values.astype(np.int64) - 1] = 1
    return result


def content_ids(image: Iterable[np.ndarray], text: np.ndarray) -> np.ndarray:
    """Ids from the items' bytes: equal rows in two splits are taken for the same item."""
    return np.array(
        [
            hashlib.blake2b(i.tobytes() + t.tobytes(), digest_size=16).hexdigest()
            for i, t in zip(image, text, strict=True)
        ]
    )
