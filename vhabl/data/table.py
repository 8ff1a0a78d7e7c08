"""A user's own pairs as a table: CSV, JSON lines or Parquet (the file's name says which) with
columns of images, captions and labels.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vhabl.data.images import Embedded, Stored
from vhabl.data.pairs import Pairs
from vhabl.errors import VhablError, brief, fail, note, plural
from vhabl.settings import DataConfig


def read_table(path: Path, config: DataConfig, unlabelled: bool = False) -> Pairs:
    """Read a table. Rows without a label take no part, and a note says how many there are; with
    `unlabelled` they do, and there need be no labels at all.

    Labels are names: a list, or a text with `data.separator` between them. Image paths are relative
    to `data.image_root` in the table's folder. Raises VhablError naming the file and the row.
    """
    rows = list(_rows(path))
    for key in ("image_column", "caption_column", "label_column"):
        column = getattr(config, key)
        if unlabelled and key == "label_column":
            continue
        if rows and column not in rows[0]:
            known = ", ".join(rows[0])
            fail(f"{path}: row 1", f"columns {known}", f"{column!r} (key data.{key})")
    labels = [_labels(row.get(config.label_column), config.separator) for row in rows]
    kept = [number for number, own in enumerate(labels) if own or unlabelled]
    if not kept:
        fail(f"{path}: column {config.label_column}", "no label in any row", "names of classes")
    if len(kept) < len(rows):
        left_out = plural(len(rows) - len(kept), "row")
        note(f"{path}: {left_out} without a label: no part in training and evaluation")
    names = config.class_names or sorted({name for number in kept for name in labels[number]})
    place = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(kept), len(names)), np.uint8)
    ids, captions, further, files, seen = [], [], [], list[Stored](), set()
    for item, number in enumerate(kept):
        where = f"{path}: row {number + 1}"
        for name in labels[number]:
            if name not in place:
                fail(where, f"label {name!r}", "one of data.class_names")
            matrix[item, place[name]] = 1
        file = _image(path, number, rows[number], config)
        image = _image_id(file, rows[number], config)
        first, *others = _captions(rows[number], config)
        ids.append(f"{image}#{number + 1}" if image in seen else image)
        seen.add(image)
        captions.append(first)
        further.append(others)
        files.append(file)
    return Pairs(ids, captions, further, files, matrix, list(names))


def read_items(
    path: Path, config: DataConfig
) -> tuple[list[str], list[Stored] | None, list[str] | None]:
    """Ids, image files and captions of all rows, with or without labels; None for a column that
    the table does not have. Raises VhablError naming the file and the row.
    """
    if not path.exists():
        fail(path, "no such file", "a .csv, .tsv, .jsonl or .parquet table")
    rows = list(_rows(path))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    known = ", ".join(columns) or "none"
    has = {c: c in columns for c in (config.image_column, config.caption_column)}
    for number, row in enumerate(rows):
        for column in (c for c, there in has.items() if there and c not in row):
            fail(f"{path}: row {number + 1}", "no such column", f"{column}, as other rows have it")
    if not any(has.values()):
        fail(f"{path}: columns", known, f"{config.image_column}, {config.caption_column} or both")
    files = captions = None
    if has[config.image_column]:
        files = [_image(path, n, row, config) for n, row in enumerate(rows)]
        names = [_image_id(file, row, config) for file, row in zip(files, rows, strict=True)]
    if has[config.caption_column]:
        captions = [_captions(row, config)[0] for row in rows]
    ids = names if files is not None else [str(number + 1) for number in range(len(rows))]
    return ids, files, captions


def _image(path: Path, number: int, row: dict[str, Any], config: DataConfig) -> Stored:
    """The picture of a row: a file, or one that the row holds as its bytes (in JSON as base64)."""
    cell = row.get(config.image_column)
    content, name = cell, None
    if isinstance(cell, dict):
        content, name = cell.get("bytes"), cell.get("path")
        if isinstance(content, str):
            try:
                content = base64.b64decode(content, validate=True)
            except ValueError:
                content = name = None
    if isinstance(content, bytes) and content:
        return Embedded(name if isinstance(name, str) and name else str(number + 1), content)
    name = cell if isinstance(cell, str) else name
    if not isinstance(name, str) or not name:
        where = f"{path}: row {number + 1}: column {config.image_column}"
        expected = 'a file name, or a picture as {"bytes": ..., "path": ...} with bytes in base64'
        fail(where, repr(cell)[:100], expected)
    return path.parent / config.image_root / name.replace("\\", "/")


def _image_id(image: Stored, row: dict[str, Any], config: DataConfig) -> str:
    """The name of a picture as the table gives it."""
    cell = row.get(config.image_column)
    return cell if isinstance(cell, str) else image.name


def _captions(row: dict[str, Any], config: DataConfig) -> list[str]:
    """The captions of a row, at least one (an empty one where there is none)."""
    found = row.get(config.caption_column)
    listed = found if isinstance(found, list) else [found]
    return ["" if c is None else str(c) for c in listed] or [""]


def _labels(cell: Any, separator: str) -> list[str]:
    if cell is None:
        return []
    parts = cell if isinstance(cell, list) else str(cell).split(separator)
    return [name for name in (str(part).strip() for part in parts) if name]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    kinds = ".csv, .tsv, .jsonl or .parquet"
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            return _parquet_rows(path)
        if ending not in (".csv", ".tsv", ".jsonl"):
            fail(path, f"a file name that ends with {ending!r}", f"a table: {kinds}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            if ending == ".jsonl":
                return [_json_row(path, n, line) for n, line in enumerate(file, 1) if line.strip()]
            delimiter = "\t" if ending == ".tsv" else ","
            rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        fail(path, f"content that cannot be read ({error})", f"a table: {kinds}")
    for number, row in enumerate(rows, 1):  # a comma without quotes moves all cells after it
        if None in row or None in row.values():
            fail(f"{path}: row {number}", "more or fewer cells than columns", "one cell a column")
    return rows


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{path}: line {number}", f"text that is not JSON ({error})", "an object")
    if not isinstance(row, dict):
        fail(f"{path}: line {number}", f"a {type(row).__name__}", "an object")
    return row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise VhablError(
            f"{path}: found a Parquet file and no pyarrow; expected it: pip install pyarrow"
        ) from None
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        fail(path, f"content that cannot be read ({brief(error)})", "a Parquet table")
