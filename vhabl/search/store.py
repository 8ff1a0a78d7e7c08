"""Codes and what belongs to them, on disk: read as memory maps, never half-written.

An index folder has index.json and segments, which are never changed once they are there. What is
added is a new segment; what is deleted is named by a new file beside the segment's. Then index.json
is replaced as a whole, and with it what counts: a reader sees the old index or the new one.

Within a segment the items are in the order of their first view's prefixes, so that a scan by prefix
reads runs of rows. A second view (of a cross-modal method) has an order of its own, and rows_VIEW
says which item a row is.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vhabl.errors import VhablError, brief, fail
from vhabl.files import atomic_path, write_json
from vhabl.search import scan

FORMAT = 1
META = "index.json"
TEXTS = ("ids", "captions", "images")
_BLOCK = 2**24  # bytes of a file that are read at once for its checksum


@dataclass(frozen=True)
class Items:
    """What an index keeps of items beside their codes. labels: [N, C] of 0 and 1."""

    ids: Sequence[str]
    captions: Sequence[str]
    images: Sequence[str]
    labels: np.ndarray


class Texts:
    """Strings in a file, read when they are indexed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.at = np.load(folder / f"{name}_at.npy", mmap_mode="r")
        size = int(self.at[-1])
        path = folder / f"{name}.bin"
        self.content = np.memmap(path, np.uint8, "r", shape=size) if size else np.zeros(0, np.uint8)

    def __getitem__(self, row: int) -> str:
        return self.content[self.at[row] : self.at[row + 1]].tobytes().decode("utf-8")

    @staticmethod
    def write(folder: Path, name: str, values: Sequence[str]) -> None:
        encoded = [value.encode("utf-8", "replace") for value in values]
        at = np.zeros(len(values) + 1, np.int64)
        np.cumsum([len(value) for value in encoded], out=at[1:])
        np.save(folder / f"{name}_at.npy", at)
        (folder / f"{name}.bin").write_bytes(b"".join(encoded))


def hashes(ids: Sequence[str]) -> np.ndarray:
    """Short numbers of ids, [N] uint64, to find them by."""
    joined = b"".join(blake2b(i.encode("utf-8", "replace"), digest_size=8).digest() for i in ids)
    return np.frombuffer(joined, np.uint64)


class Segment:
    """A part of an index, read-only."""

    def __init__(self, folder: Path, meta: dict[str, Any], views: Sequence[str]) -> None:
        def array(name: str) -> np.ndarray:
            found: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r")
            return found

        self.folder, self.meta, self.size = folder, meta, int(meta["items"])
        self.words = {view: scan.to_words(array(f"codes_{view}")) for view in views}
        self.starts = {view: np.asarray(array(f"starts_{view}")) for view in views}
        self.rows = {view: array(f"rows_{view}") for view in views[1:]}
        self.labels = array("labels")
        self.id_hash, self.id_row = array("id_hash"), array("id_row")
        self.texts = {name: Texts(folder, name) for name in TEXTS}
        self.alive = None if meta["alive"] is None else np.asarray(array(meta["alive"]))

    def items_of(self, view: str, rows: np.ndarray) -> np.ndarray:
        """Item numbers of a view's rows; -1 stays."""
        if view not in self.rows:
            return rows
        return np.where(rows < 0, -1, self.rows[view][np.maximum(rows, 0)].astype(np.int64))

    def allowed(self, view: str, chosen: np.ndarray | None) -> np.ndarray | None:
        """For each row of a view whether its item is alive and chosen, [n] uint8; None: all."""
        both = [part for part in (self.alive, chosen) if part is not None]
        if not both:
            return None
        found = both[0] if len(both) == 1 else both[0] & both[1]
        return found[self.rows[view]] if view in self.rows else np.ascontiguousarray(found)

    def find(self, identity: str) -> int | None:
        """The item of this id, or None where there is none."""
        wanted = hashes([identity])[0]
        start = int(np.searchsorted(self.id_hash, wanted))
        while start < self.size and self.id_hash[start] == wanted:
            item = int(self.id_row[start])
            if self.texts["ids"][item] == identity:
                return item if self.alive is None or self.alive[item] else None
            start += 1
        return None


def write_segment(folder: Path, codes: dict[str, np.ndarray], items: Items) -> dict[str, Any]:
    """Write packed codes {view: [N, B]} and their items into an empty folder; its description."""
    count = len(items.ids)
    order: np.ndarray | None = None
    for view, packed in codes.items():
        by_prefix, starts = scan.buckets(packed)
        if order is None:
            order = by_prefix
        else:  # items have the order of the first view
            place = np.empty(count, np.uint32)
            place[order] = np.arange(count, dtype=np.uint32)
            np.save(folder / f"rows_{view}.npy", place[by_prefix])
        np.save(folder / f"codes_{view}.npy", packed[by_prefix])
        np.save(folder / f"starts_{view}.npy", starts)
    assert order is not None
    labels = np.packbits(items.labels[order] > 0, axis=1, bitorder="little")
    np.save(folder / "labels.npy", labels)
    ids = [items.ids[i] for i in order]
    Texts.write(folder, "ids", ids)
    Texts.write(folder, "captions", [items.captions[i] for i in order])
    Texts.write(folder, "images", [items.images[i] for i in order])
    numbers = hashes(ids)
    by_hash = np.argsort(numbers, kind="stable")
    np.save(folder / "id_hash.npy", numbers[by_hash])
    np.save(folder / "id_row.npy", by_hash.astype(np.uint32))
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    return {"items": count, "alive": None, "files": files}


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    value, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


class Store:
    """The segments of an index. Raises VhablError where the folder holds no whole index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        self.views: list[str] = self.meta["views"]
        self.bits: int = self.meta["bits"]
        self.class_names: list[str] = self.meta["class_names"]
        self.segments = [self._open(name, part) for name, part in self.meta["segments"].items()]

    def _open(self, name: str, part: dict[str, Any]) -> Segment:
        folder = self.folder / name
        for file, (size, _) in part["files"].items():
            path = folder / file
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                said = "no such file" if found is None else f"{found:,} bytes"
                fail(path, said, f"the {size:,} bytes that {META} names")
        decisive = ("codes_", "starts_", "rows_", "alive")
        self._verify(name, part, [file for file in part["files"] if file.startswith(decisive)])
        return Segment(folder, part, self.views)

    def _verify(self, name: str, part: dict[str, Any], files: Sequence[str]) -> None:
        for file in files:
            path = self.folder / name / file
            if _checksum(path)[1] != part["files"][file][1]:
                fail(path, "another checksum", f"that of {META}: the file was changed")

    def verify(self) -> None:
        """Read every file whole. Raises VhablError naming one that is not as it was written."""
        for name, part in self.meta["segments"].items():
            self._verify(name, part, list(part["files"]))

    def __len__(self) -> int:
        dead = sum(int((s.alive == 0).sum()) for s in self.segments if s.alive is not None)
        return sum(segment.size for segment in self.segments) - dead

    def scan(
        self,
        view: str,
        query: np.ndarray,
        bits: int,
        top: int,
        budget: float = 1.0,
        chosen: Sequence[np.ndarray | None] | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances, segments and items [Q, top] of the nearest for packed codes [Q, B], by their
        first bits; -1 where there are fewer. budget: the share of a segment that a scan by prefix
        may compare; 1 is the exact scan. chosen: for each segment, which items take part;
        weights: of each bit, for the exact scan.
        """
        words = scan.to_words(query)
        parts = []
        for number, segment in enumerate(self.segments):
            allowed = segment.allowed(view, None if chosen is None else chosen[number])
            if budget < 1 and bits >= scan.PREFIX:
                limit = int(np.ceil(budget * segment.size))
                found = scan.by_prefix(
                    words, segment.words[view], segment.starts[view], bits, top, limit,
                    allowed,
                )  # fmt: skip
            else:
                found = scan.exact(words, segment.words[view], bits, top, allowed, weights)
            distance, rows = found
            parts.append((distance, np.full_like(rows, number), segment.items_of(view, rows)))
        return _merge(parts, top)

    def texts(self, segment: int, item: int) -> dict[str, str]:
        """Id, caption and image of an item."""
        return {name: texts[item] for name, texts in self.segments[segment].texts.items()}

    def labels(self, segment: int, item: int) -> list[str]:
        packed = self.segments[segment].labels[item]
        bits = np.unpackbits(packed, count=len(self.class_names), bitorder="little")
        return [name for name, has in zip(self.class_names, bits, strict=True) if has]

    def find(self, identity: str) -> tuple[int, int] | None:
        """Segment and item of an id, or None where there is none."""
        for number, segment in enumerate(self.segments):
            item = segment.find(identity)
            if item is not None:
                return number, item
        return None

    # -- changes -----------------------------------------------------------------------------------

    def add(self, codes: dict[str, np.ndarray], items: Items) -> Store:
        """The store with more items. Raises VhablError for an id that there is already."""
        _check_ids(items.ids)
        for identity in items.ids:
            if self.find(identity) is not None:
                fail(f"{self.folder}: id {identity}", "an item that has it", "a new id")
        name = f"segment-{self.meta['next']:04d}"
        part = _write_folder(self.folder / name, codes, items)
        segments = {**self.meta["segments"], name: part}
        write_json(
            self.folder / META,
            {**self.meta, "next": self.meta["next"] + 1, "segments": segments},
        )
        return Store(self.folder)

    def delete(self, ids: Sequence[str]) -> Store:
        """The store without these items. Raises VhablError, and deletes none, for an id that there
        is not.
        """
        dead: dict[int, list[int]] = {}
        for identity in ids:
            found = self.find(identity)
            if found is None:
                fail(f"{self.folder}: id {identity}", "no item that has it", "the id of an item")
            dead.setdefault(found[0], []).append(found[1])
        segments = dict(self.meta["segments"])
        names = list(segments)
        for number, rows in dead.items():
            segment, name = self.segments[number], names[number]
            alive = np.ones(segment.size, np.uint8) if segment.alive is None else segment.alive
            alive = np.array(alive)
            alive[rows] = 0
            file = f"alive-{self.meta['next']:04d}"
            with atomic_path(segment.folder / f"{file}.npy") as path, path.open("wb") as stream:
                np.save(stream, alive)
            files = {k: v for k, v in segment.meta["files"].items() if not k.startswith("alive")}
            files[f"{file}.npy"] = _checksum(segment.folder / f"{file}.npy")
            segments[name] = {**segment.meta, "alive": file, "files": files}
        meta = {**self.meta, "next": self.meta["next"] + 1, "segments": segments}
        write_json(self.folder / META, meta)
        for number in dead:  # what no index names any more
            old = self.segments[number].meta["alive"]
            if old is not None:
                (self.segments[number].folder / f"{old}.npy").unlink(missing_ok=True)
        return Store(self.folder)


def check_new(folder: Path) -> None:
    """Raise VhablError where there is something already."""
    if folder.exists():
        fail(folder, "a file or folder", "nothing: an index is written anew")


def create(
    folder: Path,
    about: dict[str, Any],
    codes: dict[str, np.ndarray],
    items: Items,
    measure: Callable[[Store], dict[str, Any]],
) -> Store:
    """Write a new index: whole, or not at all. about: what `index.json` says beside; it has views,
    bits and class_names; measure: what it says more of the codes. Raises VhablError where the
    folder exists.
    """
    check_new(folder)
    _check_ids(items.ids)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        part = _write_folder(temporary / "segment-0000", codes, items)
        meta = {"format": FORMAT, **about, "next": 1, "segments": {"segment-0000": part}}
        write_json(temporary / META, meta)
        write_json(temporary / META, {**meta, **measure(Store(temporary))})
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Store(folder)


def _write_folder(folder: Path, codes: dict[str, np.ndarray], items: Items) -> dict[str, Any]:
    """A segment in a folder that is there whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: no index names it
    temporary.mkdir(parents=True)
    try:
        part = write_segment(temporary, codes, items)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return part


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        fail("items", "none", "at least one")
    seen: set[str] = set()
    for identity in ids:
        if identity in seen:
            fail(f"id {identity}", "it twice", "ids that differ")
        seen.add(identity)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        fail(folder, f"no {META}", "an index that python -m vhabl.search build wrote")
    try:
        meta = dict(json.loads(path.read_text(encoding="utf-8")))
        if meta["format"] != FORMAT:
            fail(path, f"format {meta['format']}", f"format {FORMAT}")
        if not meta["views"] or not isinstance(meta["bits"], int):
            raise ValueError("no views or bits")
        for part in meta["segments"].values():
            if not {"items", "alive", "files"} <= part.keys():
                raise ValueError("a segment without items, alive and files")
    except VhablError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(path, f"a damaged description ({brief(error)})", "what vhabl.search wrote")
    return meta


def _merge(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest of all segments, those of earlier ones first at equal distance."""
    joined = [np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)]
    far = np.iinfo(np.int32).max
    order = np.argsort(np.where(joined[2] < 0, far, joined[0]), axis=1, kind="stable")[:, :top]
    distance, segment, item = (np.take_along_axis(x, order, axis=1) for x in joined)
    return distance, segment, item
