"""Feature files of the field: one .mat with I_tr, T_tr, L_tr, I_db ... L_te."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vhabl.data.labels import as_labels, require_same
from vhabl.data.matlab import read_mat
from vhabl.settings import DataConfig
from vhabl.system.errors import fail
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
        fail(path, f"no key {missing[0]}, only {found}", f"It must have {', '.join(keys)}")

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


def as_features(where: object, values: np.ndarray) -> np.ndarray:
    """Numbers [N, d] as float32. Raises VhablError, naming `where`, unless they are finite and vary
    by more than float32 rounds.
    """
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiub":
        do = "It must be numbers, items x features"
        fail(where, f"shape {values.shape} of type {values.dtype}", do)
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
        result = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        fail(
            where,
            f"{values[row, column]} in row {row + 1}, column {column + 1}"
            f" ({int((~finite).sum())} such values)",
            "All must be finite numbers",
        )
    sample = values[:1000].astype(np.float64)  # constant columns are said where they are scaled
    spread, step = sample.std(axis=0), np.spacing(np.abs(result[:1000]).max(axis=0))
    lost = np.flatnonzero((spread > 0) & (spread < 100 * step) & (sample != result[:1000]).any(0))
    if len(lost):
        found = f"{sample[0, lost[0]]:g} give or take {spread[lost[0]]:g} in column {lost[0] + 1}"
        fail(where, f"{found}, which float32 cannot hold", "Subtract the mean of the features")
    return result


def content_ids(image: Iterable[np.ndarray], text: np.ndarray) -> np.ndarray:
    """Ids from the items' bytes: equal rows in two splits are taken for the same item."""
    return np.array(
        [
            hashlib.blake2b(i.tobytes() + t.tobytes(), digest_size=16).hexdigest()
            for i, t in zip(image, text, strict=True)
        ]
    )
