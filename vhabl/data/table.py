"""A user's own pairs as a table: CSV, JSON lines or Parquet (the file's name says which) with
columns of images, captions and labels.
"""

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from vhabl.data.pairs import Pairs
from vhabl.settings import DataConfig
from vhabl.system.errors import VhablError, bad_value, brief, fail, note, plural
from vhabl.types import Embedded, Stored


def read_table(path: Path, config: DataConfig, unlabelled: bool = False) -> Pairs:
    """Read a table. Rows without a label or a caption take no part, and a note says how many there
    are; with `unlabelled` they do, and there need be no labels at all.

    Labels are names: a list, or a text with `data.separator` between them; with
    `data.class_names` also a 0 or 1 for each class. Image paths are relative to `data.image_root`
    in the table's folder. A column `split` says what each row is for: train, query or database.
    Raises VhablError naming the file and the row.
    """
    rows = list(_rows(path))
    columns = _columns(rows)
    _note_unread(path, columns, config)
    config = replace(config, class_names=[normalize("NFC", name) for name in config.class_names])
    for key in ("image_column", "caption_column", "label_column"):
        column = getattr(config, key)
        if unlabelled and key == "label_column":
            continue
        if rows and column not in rows[0]:
            known = ", ".join(rows[0])
            do = f"data.{key} says how it is called"
            fail(f"{path}: row 1", f"no column {column!r}, only {known}", do)
    labels = _labels(path, rows, config)
    texts = [_captions(path, number, row, config) for number, row in enumerate(rows)]
    labelled = [number for number, own in enumerate(labels) if own or unlabelled]
    if not labelled:
        fail(f"{path}: column {config.label_column}", "no row has a label", "Give names of classes")
    kept = [number for number in labelled if texts[number] or unlabelled]
    if not kept:
        fail(f"{path}: column {config.caption_column}", "no row has a caption", "Give texts")
    for what, count in (
        ("label", len(rows) - len(labelled)),
        ("caption", len(labelled) - len(kept)),
    ):
        if count:
            note(f"{path}: {plural(count, 'row')} without a {what}: not trained on or evaluated")
    names = config.class_names or sorted({name for number in kept for name in labels[number]})
    _note_doubtful(path, names, config.separator)
    place = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(kept), len(names)), np.uint8)
    images = [_image(path, number, row, config) for number, row in enumerate(rows)]
    every_id = _ids([_name(image, row, config) for image, row in zip(images, rows, strict=True)])
    ids, captions, further, files = [], [], [], list[Stored]()
    for item, number in enumerate(kept):
        where = f"{path}: row {number + 1}"
        for name in labels[number]:
            if name not in place:
                fail(where, f"the label {name!r} is none of data.class_names", "Add it there")
            matrix[item, place[name]] = 1
        first, *others = texts[number] or [""]
        ids.append(every_id[number])
        captions.append(first)
        further.append(others)
        files.append(images[number])
    splits = [column for column in columns if column.strip().lower() == "split"]
    roles = [_role(path, number, rows[number], splits) for number in kept] if splits else ()
    no_text = frozenset(item for item, number in enumerate(kept) if not texts[number])
    return Pairs(ids, captions, further, files, matrix, names, roles, no_text)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _note_unread(path: Path, columns: Sequence[str], config: DataConfig) -> None:
    """Say which columns there are in place of one that is not there."""
    expected = [config.image_column, config.caption_column, config.label_column]
    absent = [name for name in expected if name not in columns]
    others = [name for name in columns if name not in (*expected, "split", "")]
    if absent and others:
        note(f"{path}: no column {', '.join(absent)}; not read: {', '.join(others)[:200]}")


# Separators, quotes, what is not seen, rows of 0 and 1, and what stands for nothing.
_DOUBTFUL = re.compile(
    r"""[,;|/\\\t\n\u3001\uff0c\uff1b\u200b-\u200f\ufeff]|^["'\u201c]|["'\u201d]$"""
    r"""|^(?:0[01]+|[01]{3,}|none|null|na|n/a|<na>)$""",
    re.IGNORECASE,
)


def _note_doubtful(path: Path, names: Sequence[str], separator: str) -> None:
    """Say which classes may be one, and which one may be several."""
    spelled: dict[str, str] = {}
    for name in names:
        plain = " ".join(re.findall(r"[^\W_]+", name.casefold())) or name
        if (other := spelled.setdefault(plain, name)) != name:
            note(f"{path}: the classes {other!r} and {name!r} differ in case or marks alone")
    parts = {name: re.split(r"\W+|_", name) for name in names}
    several = (n for n in names if len(parts[n]) > 1 and set(parts[n]) <= set(names))
    if listed := next(filter(_DOUBTFUL.search, names), next(several, None)):
        note(f"{path}: is {listed!r} one class? data.separator is {separator!r}")


def _role(path: Path, number: int, row: dict[str, Any], columns: list[str]) -> str:
    role = ", ".join(str(row[column]) for column in columns if column in row).strip().lower()
    if role not in ("train", "query", "database"):
        bad_value(
            f"{path}: row {number + 1}: column split", _shown(role), "train, query or database"
        )
    return role


def read_items(
    path: Path, config: DataConfig
) -> tuple[list[str], list[Stored] | None, list[str | None] | None, list[list[str]]]:
    """Ids, image files, captions and names of the classes of all rows; None for the caption of a
    row that has none, and for the images or captions of a table without that column. Raises
    VhablError naming the file and the row.
    """
    if not path.exists():
        fail(path, "no such file", "Give a .csv, .tsv, .jsonl or .parquet table")
    rows = list(_rows(path))
    columns = _columns(rows)
    known = ", ".join(columns) or "none"
    _note_unread(path, columns, config)
    has = {c: c in columns for c in (config.image_column, config.caption_column)}
    for number, row in enumerate(rows):
        for column in (c for c, there in has.items() if there and c not in row):
            do = "Give every row the same columns"
            fail(f"{path}: row {number + 1}", f"no {column}, which other rows have", do)
    if not any(has.values()):
        do = f"It needs {config.image_column}, {config.caption_column} or both"
        fail(path, f"its columns are {known}", do)
    files = captions = None
    if has[config.image_column]:
        files = [_image(path, n, row, config) for n, row in enumerate(rows)]
        names = [_name(file, row, config) for file, row in zip(files, rows, strict=True)]
    if has[config.caption_column]:
        captions = [next(iter(_captions(path, n, row, config)), None) for n, row in enumerate(rows)]
    ids = _ids(names) if files is not None else [str(n) for n in range(1, len(rows) + 1)]
    return ids, files, captions, _labels(path, rows, config)


def _ids(images: Sequence[str]) -> list[str]:
    """Names of images as ids. A name that was there before takes the row's number: a.png#7."""
    first = {name: row for row, name in reversed(list(enumerate(images, 1)))}
    ids = []
    for row, name in enumerate(images, 1):
        while first.get(name, row) != row:
            name = f"{name}#{row}"
        ids.append(name)
    return ids


# No part of a path is longer; no file name has NUL or half a character of JSON.
_FILE_NAME = re.compile(
    r"(?:[^/\0\ud800-\udc7f\udd00-\udfff]{0,255}/)*[^/\0\ud800-\udc7f\udd00-\udfff]{1,255}"
)


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
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        where = f"{path}: row {number + 1}: column {config.image_column}"
        expected = 'a file name, or a picture as {"bytes": ..., "path": ...} with bytes in base64'
        fail(where, _shown(cell), f"Give {expected}")
    return (path.parent / config.image_root / name.replace("\\", "/")).resolve()


def _name(image: Stored, row: dict[str, Any], config: DataConfig) -> str:
    """The name of a picture as the table gives it."""
    cell = row.get(config.image_column)
    return cell if isinstance(cell, str) else image.name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing; pandas writes NaN for that, or the text of it."""
    if isinstance(cell, str):
        return cell.strip().lower() in ("", "nan")
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_TEXT = rf"(?:{_QUOTED}|None|null|[\d.]+)"
_LIST = re.compile(
    rf"\[\s*(?:{_TEXT}(?:\s*,\s*{_TEXT})*)?\s*\]|\((?:\s*{_QUOTED}\s*,)+(?:\s*{_QUOTED})?\s*\)",
    re.DOTALL,
)
_OPENS_LIST = re.compile(r"""\s*(?:[\[{]|\(\s*['"])""")

_BIT = re.compile(r"(?:[01](?:\.0*)?|true|false)", re.IGNORECASE)
_BITS = re.compile(  # with another separator
    rf"(?:{_BIT.pattern}[\s,;|]+)+{_BIT.pattern}", re.IGNORECASE
)
_NUMBER = re.compile(r"-\d+(?:\.\d*)?|\d*\.\d*[1-9]\d*")  # negative, or a fraction


def _list(cell: str) -> list[Any] | None:
    """The list that a text is, as JSON or Python write it; None where it is another text."""
    if not _LIST.fullmatch(cell.strip()):
        return None
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return list(read(cell.strip()))
    return None


_NOTHING = re.compile(r"\s*(?:none|null|n/a|<na>)\s*", re.IGNORECASE)
# A dictionary, or a list that Python or NumPy printed without its commas.
_PRINTED = re.compile(rf"""\{{['"]|\[\s*{_QUOTED}\s+{_QUOTED}.*\]\s*$""", re.DOTALL)


def _captions(path: Path, number: int, row: dict[str, Any], config: DataConfig) -> list[str]:
    """The captions of a row: none for null, while an empty text is one."""
    cell = row.get(config.caption_column)
    listed = cell if isinstance(cell, list) else _list(cell) if isinstance(cell, str) else None
    if listed is None or not all(c is None or isinstance(c, str) for c in listed):
        listed = cell if isinstance(cell, list) else [cell]
    texts = []
    for text in listed:
        missing = _is_missing(text) or (isinstance(text, str) and _NOTHING.fullmatch(text))
        if text != "" and missing:
            continue
        if not isinstance(text, str) or _PRINTED.match(text):
            where = f"{path}: row {number + 1}: column {config.caption_column}"
            fail(
                where, _shown(cell), 'Give a text, or a list of texts such as ["a dog", "two dogs"]'
            )
        texts.append(text)
    return texts


def _labels(path: Path, rows: Sequence[dict[str, Any]], config: DataConfig) -> list[list[str]]:
    """The names of each row's classes. A 0 or 1 for each class, in all rows, stands for names."""
    column = config.label_column
    found = [
        _names(f"{path}: row {number + 1}: column {column}", row.get(column), config.separator)
        for number, row in enumerate(rows)
    ]
    cells = [own for own in found if own]
    sizes = {len(own) for own in cells}
    names = config.class_names
    if sizes in (set(), {1}) or not all(_BIT.fullmatch(name) for own in cells for name in own):
        return found
    if sizes != {len(names)}:
        what = f"{' or '.join(map(str, sorted(sizes)))} numbers of 0 and 1 a row"
        expected = "a number for each of data.class_names, or names of classes"
        fail(f"{path}: column {column}", what, f"Give {expected}")
    return [
        [name for name, has in zip(names, own, strict=False) if has[0] in "1tT"] for own in found
    ]


def _names(where: str, cell: Any, separator: str) -> list[str]:
    """A cell of labels as names. Raises VhablError where it is no name, number or list of them."""
    parts: list[Any] | None
    if isinstance(cell, str) and _OPENS_LIST.match(cell):
        parts = _list(cell)
    elif isinstance(cell, str):
        for entity in re.findall(r"&#?\w+;", cell):
            if unescape(entity) != entity:
                fail(where, f"{entity!r} in {_shown(cell)}", f"Write {unescape(entity)!r}")
        parts = cell.split(separator)
    else:
        parts = cell if isinstance(cell, list) else [cell]
    names = []
    for part in parts if parts is not None else [{}]:
        if _is_missing(part):
            continue
        whole = isinstance(part, float) and part.is_integer()  # pandas makes floats of numbers
        if isinstance(part, bool) or not (isinstance(part, str | int) or whole):
            expected = f'names of classes, such as "red{separator}square" or ["red", "square"]'
            fail(where, _shown(cell), f"Give {expected}")
        name = normalize("NFC", part.strip()) if isinstance(part, str) else str(int(part))
        if _BITS.fullmatch(name):
            fail(where, f"the text {_shown(name)}", f"Put {separator!r} between 0 and 1")
        if _NUMBER.fullmatch(name):
            do = "Give names of classes, or a 0 or 1 for each of data.class_names"
            fail(where, f"the number {name}", do)
        names.append(name)
    return names


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    kinds = ".csv, .tsv, .jsonl or .parquet"
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            return _parquet_rows(path)
        if ending not in (".csv", ".tsv", ".jsonl"):
            fail(path, f"no table ends with {ending!r}", f"Give one of {kinds}")
        file = io.StringIO(_text(path), newline="")
        if ending == ".jsonl":
            return [_json_row(path, n, line) for n, line in enumerate(file, 1) if line.strip()]
        delimiter = "\t" if ending == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        named = [name for name in columns if name]
        if len(set(named)) < len(named) or (not named and reader.fieldnames is not None):
            found = f"its columns are {', '.join(named)[:120] or 'without names'}"
            fail(f"{path}: line 1", found, "Give every column its own name")
        reader.fieldnames = columns
        rows = list(reader)
    except (csv.Error, IsADirectoryError) as error:
        fail(path, f"it cannot be read ({error})", f"It must be a table: {kinds}")
    if rows and delimiter == "," and len(rows[0]) == 1 and ";" in next(iter(rows[0])):
        fail(f"{path}: line 1", "';' stands between the columns", "Save it as CSV with commas")
    for number, row in enumerate(rows, 1):  # a comma without quotes moves all cells after it
        if None in row or None in row.values():
            do = "Put quotes around a cell that has a comma"
            fail(f"{path}: row {number}", "more or fewer cells than columns", do)
        if ending == ".tsv" and any(set("\t\n") & set(cell) for cell in row.values()):
            do = "Double the quote that the cell begins with, and put the cell in quotes"
            fail(f"{path}: row {number}", "a quote that holds other cells or rows", do)
    return rows


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fail(f"{path}: line {line}", "its bytes are not UTF-8", "Save it as CSV UTF-8")


def _once(keys: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(keys)) < len(keys):
        raise ValueError("a key comes twice")
    return row


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        fail(f"{path}: line {number}", f"this is not JSON ({error})", "Each line must be an object")
    if not isinstance(row, dict):
        fail(f"{path}: line {number}", f"a {type(row).__name__}", "Each line must be an object")
    return row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise VhablError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        fail(path, f"it cannot be read ({brief(error)})", "It must be a Parquet table")
