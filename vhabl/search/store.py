"""Codes and what belongs to them, on disk: read as memory maps, never half-written.

An index folder has index.json and segments, which are never changed once they are there. What is
added is a new segment; what is deleted is named by a new file beside the segment's. Then index.json
is replaced as a whole, and with it what counts: a reader sees the old index or the new one.

Within a segment the items are in the order of their first view's prefixes, so that a scan by prefix
reads runs of rows. A second view (of a cross-modal method) has an order of its own, and rows_VIEW
says which item a row is.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vhabl.evaluation.records import SHORTLIST
from vhabl.search import faiss_index, scan
from vhabl.search.engine import (
    FORMAT,
    META,
    MODES,
    Hit,
    Items,
    Mode,
    Query,
    check_ids,
    check_new,
    read_meta,
    refuse_id,
)
from vhabl.system.errors import fail, plural
from vhabl.system.files import alone, atomic_path, beside, named, open_array, write_json

TEXTS = ("ids", "captions", "images")
CENTRES = "centres.npy"
_WRITTEN = "what vhabl.search wrote"
_AGAIN = "Build the index again"
_BLOCK = 2**24  # bytes of a file that are read at once for its checksum


def _array(path: Path, kind: Any, *shape: int) -> np.ndarray:
    """A memory map of an array. Raises VhablError where it is of another type or shape."""
    found = open_array(path, _WRITTEN)
    if found.dtype != kind or found.shape != shape:
        said = f"shape {found.shape} of type {found.dtype}"
        fail(path, said, f"{META} says {shape} of {np.dtype(kind)}")
    return found


class Texts:
    """Strings in a file, read when they are indexed."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.at = _array(folder / f"{name}_at.npy", np.int64, count + 1)
        self.path = folder / f"{name}.bin"
        size = self.path.stat().st_size
        self.content = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)

    def __getitem__(self, row: int) -> str:
        try:
            return self.content[self.at[row] : self.at[row + 1]].tobytes().decode("utf-8")
        except UnicodeDecodeError:
            fail(self.path, "its bytes are not UTF-8", _AGAIN)

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
    """A part of an index, read-only. Raises VhablError where its arrays do not fit."""

    def __init__(self, folder: Path, meta: dict[str, Any], about: dict[str, Any]) -> None:
        def array(name: str, kind: Any, *shape: int) -> np.ndarray:
            return _array(folder / f"{name}.npy", kind, *shape)

        self.folder, self.meta, self.size = folder, meta, meta["items"]
        size, views = self.size, about["views"]
        packed, labels = (-(-n // 8) for n in (about["bits"], len(about["class_names"])))
        codes = {view: array(f"codes_{view}", np.uint8, size, packed) for view in views}
        self.widths = {view: packed.shape[1] for view, packed in codes.items()}
        self.words = {view: scan.to_words(packed) for view, packed in codes.items()}
        starts = {v: array(f"starts_{v}", np.int64, 2**scan.PREFIX + 1) for v in views}
        self.starts = {view: np.asarray(rows) for view, rows in starts.items()}
        self.rows = {view: array(f"rows_{view}", np.uint32, size) for view in views[1:]}
        self.labels = array("labels", np.uint8, size, labels)
        choices = [view for view in views if f"choices_{view}.npy" in meta["files"]]
        self.choices = {v: open_array(folder / f"choices_{v}.npy", _WRITTEN) for v in choices}
        self._graphs: dict[tuple[str, str], Any] = {}
        self._places: dict[str, np.ndarray] = {}
        self.id_hash, self.id_row = (
            array("id_hash", np.uint64, size),
            array("id_row", np.uint32, size),
        )
        self.texts = {name: Texts(folder, name, size) for name in TEXTS}
        self.alive = None
        if meta["alive"] is not None:
            self.alive = np.asarray(array(meta["alive"], np.uint8, size))
        # Kernels go where these lead, without a look at the ends.
        for view, rows in self.starts.items():
            if rows[0] != 0 or rows[-1] != size or (np.diff(rows) < 0).any():
                fail(folder / f"starts_{view}.npy", "its buckets do not follow each other", _AGAIN)
        for view, rows in self.rows.items():
            if (rows >= size).any():
                fail(folder / f"rows_{view}.npy", "it names an item that there is not", _AGAIN)

    def items_of(self, view: str, rows: np.ndarray) -> np.ndarray:
        """Item numbers of a view's rows; -1 stays."""
        if view not in self.rows:
            return rows
        return np.where(rows < 0, -1, self.rows[view][np.maximum(rows, 0)].astype(np.int64))

    def packed(self, view: str, items: np.ndarray) -> np.ndarray:
        """Codes of items [n], as bytes [n, B]."""
        rows = items
        if view in self.rows:
            if view not in self._places:  # once: every picture of the page asks for an item
                self._places[view] = np.empty(self.size, np.uint32)
                self._places[view][self.rows[view]] = np.arange(self.size, dtype=np.uint32)
            rows = self._places[view][items]
        bytes_of = np.ascontiguousarray(self.words[view][rows]).view(np.uint8)
        return np.ascontiguousarray(bytes_of[:, : self.widths[view]])

    def graph(self, view: str, kind: str) -> Any:
        """A FAISS index of a view's rows, read when it is first asked for. Raises VhablError where
        its file was changed.
        """
        if (view, kind) not in self._graphs:
            name = f"{kind}_{view}.faiss"
            verify(self.folder / name, self.meta["files"][name])
            self._graphs[view, kind] = faiss_index.load(self.folder / name)
        return self._graphs[view, kind]

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
            if item < self.size and self.texts["ids"][item] == identity:
                return item if self.alive is None or self.alive[item] else None
            start += 1
        return None


def write_segment(
    folder: Path, codes: dict[str, np.ndarray], items: Items, graphs: Sequence[faiss_index.Graph]
) -> dict[str, Any]:
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
        packed = packed[by_prefix]
        np.save(folder / f"codes_{view}.npy", packed)
        np.save(folder / f"starts_{view}.npy", starts)
        for kind in graphs:
            faiss_index.write(faiss_index.build(packed, kind), folder / f"{kind}_{view}.faiss")
    assert order is not None
    labels = np.packbits(items.labels[order] > 0, axis=1, bitorder="little")
    np.save(folder / "labels.npy", labels)
    for view, choices in items.choices.items():
        np.save(folder / f"choices_{view}.npy", choices[order])
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


def verify(path: Path, expected: Sequence[int]) -> None:
    """Raise VhablError where a file's checksum is another one than `_checksum` gave."""
    if _checksum(path)[1] != expected[1]:
        fail(path, f"its checksum is not that of {META}", _AGAIN)


class Store:
    """The segments of an index: the engine on one machine. Raises VhablError where the folder holds
    no whole index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder, _check)
        self.views: list[str] = self.meta["views"]
        self.bits: int = self.meta["bits"]
        self.class_names: list[str] = self.meta["class_names"]
        self.centres: np.ndarray | None = None
        if self.meta.get("centres"):
            _check_size(folder / CENTRES, self.meta["centres"])
            verify(folder / CENTRES, self.meta["centres"])
            self.centres = np.array(open_array(folder / CENTRES, _WRITTEN))
            if self.centres.dtype != np.float32 or self.centres.ndim != 3:
                do = "It must be [M, J, bits] of float32"
                fail(folder / CENTRES, f"shape {self.centres.shape}", do)
        self.segments = [self._open(name, part) for name, part in self.meta["segments"].items()]

    def _open(self, name: str, part: dict[str, Any]) -> Segment:
        folder = self.folder / name
        for file, expected in part["files"].items():
            _check_size(folder / file, expected)
            # What a search goes by. A graph is verified when it is used.
            if file.startswith(("codes_", "starts_", "rows_", "choices_", "alive")):
                verify(folder / file, expected)
        found = Segment(folder, part, self.meta)
        for view, choices in found.choices.items():
            self._check_choices(folder / f"choices_{view}.npy", choices, found.size)
        return found

    def _check_choices(self, path: Path, choices: np.ndarray, size: int) -> None:
        count, each = (0, 0) if self.centres is None else self.centres.shape[:2]
        fits = choices.shape == (size, count) and choices.dtype in (np.uint8, np.uint16)
        if not fits or (choices >= each).any():
            fail(path, "it names centres that there are not", _AGAIN)

    def verify(self) -> None:
        """Read every file whole. Raises VhablError naming one that is not as it was written."""
        for name, part in self.meta["segments"].items():
            for file, expected in part["files"].items():
                verify(self.folder / name / file, expected)

    def __len__(self) -> int:
        dead = sum(int((s.alive == 0).sum()) for s in self.segments if s.alive is not None)
        return sum(segment.size for segment in self.segments) - dead

    @property
    def prefixes(self) -> bool:
        return True

    @property
    def parts(self) -> str:
        return plural(len(self.segments), "segment")

    @property
    def modes(self) -> tuple[Mode, ...]:
        measured = [set(self.meta.get("recall", {}).get(view, ())) for view in self.views]
        there = {"exact"}.union(set.intersection(*measured))
        there |= {"weighted"} if self.meta.get("importance") else set()
        return tuple(mode for mode in MODES if mode in there)

    def find(self, query: Query) -> list[list[Hit]]:
        view, mode = query.view, query.mode
        chosen = None
        if query.wanted is not None:
            chosen = [query.wanted.mask(segment.labels) for segment in self.segments]
        scores: np.ndarray | None = None
        if mode == "two-stage":
            assert query.features is not None
            found, scores = self.two_stage(
                view, query.packed, query.features, query.top, self._setting(view, mode), chosen
            )
        else:
            setting = 1.0 if mode in ("exact", "weighted") else self._setting(view, mode)
            weights = None
            if mode == "weighted":
                weights = np.array(self.meta["importance"][: query.bits])
            found = self.scan(
                view, query.packed, query.bits, query.top, mode, setting, chosen, weights
            )
        return [
            [
                self._hit(
                    int(d), int(s), int(i), None if scores is None else float(scores[q, rank])
                )
                for rank, (d, s, i) in enumerate(zip(*rows, strict=True))
                if i >= 0
            ]
            for q, rows in enumerate(zip(*found, strict=True))
        ]

    def _setting(self, view: str, mode: str) -> float:
        setting: float = self.meta["recall"][view][mode]["setting"]
        return setting

    def _hit(self, distance: int, segment: int, item: int, score: float | None = None) -> Hit:
        texts = self.texts(segment, item)
        labels = tuple(self.labels(segment, item))
        return Hit(texts["ids"], distance, texts["captions"], texts["images"], labels, score)

    def shortlist(self, top: int) -> int:
        """How many items a second stage ranks for so many that are asked for."""
        return min(max(SHORTLIST, top), sum(segment.size for segment in self.segments))

    def two_stage(
        self,
        view: str,
        packed: np.ndarray,
        features: np.ndarray,
        top: int,
        setting: float,
        chosen: Sequence[np.ndarray | None] | None = None,
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """The nearest by distance, found by prefix, and ranked by the inner products of features
        [Q, bits] with the centres of items: what `scan` gives, and the scores [Q, top].
        """
        assert self.centres is not None
        shortlist = self.shortlist(top)
        found = self.scan(view, packed, self.bits, shortlist, "prefix", setting, chosen)
        choices = np.zeros((*found[2].shape, len(self.centres)), np.uint16)
        for number, segment in enumerate(self.segments):
            here = (found[1] == number) & (found[2] >= 0)
            choices[here] = segment.choices[view][found[2][here]]
        scores = scan.by_centres(features, self.centres, choices)
        scores = np.where(found[2] < 0, -np.inf, scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        distance, part, item = (np.take_along_axis(column, order, axis=1) for column in found)
        return (distance, part, item), np.take_along_axis(scores, order, axis=1)

    def scan(
        self,
        view: str,
        query: np.ndarray,
        bits: int,
        top: int,
        mode: Mode = "exact",
        setting: float = 1.0,
        chosen: Sequence[np.ndarray | None] | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances, segments and items [Q, top] of the nearest for packed codes [Q, B], by their
        first bits; -1 where there are fewer. mode and setting: `prefix`, `ivf` or `hnsw` and what
        `vhabl.search.faiss_index` says of them; else the scan is exact. chosen: for each segment,
        which items take part; weights: of each bit, for the exact scan.
        """
        words = scan.to_words(query)
        parts = []
        for number, segment in enumerate(self.segments):
            allowed = segment.allowed(view, None if chosen is None else chosen[number])
            whole = segment.words[view]
            if mode == "prefix" and setting < 1 and bits >= scan.PREFIX:
                limit = math.ceil(setting * segment.size)
                starts = segment.starts[view]
                distance, rows = scan.by_prefix(words, whole, starts, bits, top, limit, allowed)
            elif mode in faiss_index.GRAPHS:
                graph = segment.graph(view, mode)
                distance, rows = faiss_index.nearest(graph, query, top, setting, allowed)
                possible = segment.size if allowed is None else int(allowed.sum())
                few = (rows >= 0).sum(axis=1) < min(top, possible)
                if few.any():  # a filter left out what it found, or it met too few
                    wide = min(top, segment.size)
                    distance, rows = distance[:, :wide].copy(), rows[:, :wide].copy()
                    exact = scan.exact(words[few], whole, bits, top, allowed)
                    distance[few], rows[few] = exact
            else:
                distance, rows = scan.exact(words, whole, bits, top, allowed, weights)
            parts.append((distance, np.full_like(rows, number), segment.items_of(view, rows)))
        return _merge(parts, top)

    def texts(self, segment: int, item: int) -> dict[str, str]:
        """Id, caption and image of an item."""
        return {name: texts[item] for name, texts in self.segments[segment].texts.items()}

    def labels(self, segment: int, item: int) -> list[str]:
        packed = self.segments[segment].labels[item]
        bits = np.unpackbits(packed, count=len(self.class_names), bitorder="little")
        return [name for name, has in zip(self.class_names, bits, strict=True) if has]

    def item(self, identity: str) -> tuple[Hit, dict[str, np.ndarray]]:
        found = self.locate(identity)
        if found is None:
            refuse_id(self.folder, identity, there=False)
        number, item = found
        rows = np.array([item])
        packed = {view: self.segments[number].packed(view, rows)[0] for view in self.views}
        return self._hit(0, number, item), packed

    def some(self, count: int) -> list[Hit]:
        segment = self.segments[0]
        alive = np.arange(segment.size) if segment.alive is None else np.flatnonzero(segment.alive)
        chosen = np.linspace(0, len(alive) - 1, min(count, len(alive))).astype(int)
        return [self._hit(0, 0, int(item)) for item in alive[chosen]]

    def locate(self, identity: str) -> tuple[int, int] | None:
        """Segment and item of an id, or None where there is none."""
        for number, segment in enumerate(self.segments):
            item = segment.find(identity)
            if item is not None:
                return number, item
        return None

    # -- changes -----------------------------------------------------------------------------------

    def add(self, codes: dict[str, np.ndarray], items: Items) -> Store:
        """The store with more items, and with what others changed since it was opened. Raises
        VhablError for an id that there is already, and while another process changes it.
        """
        check_ids(items.ids)
        with alone(self.folder):
            return Store(self.folder)._add(codes, items)

    def _add(self, codes: dict[str, np.ndarray], items: Items) -> Store:
        for identity in items.ids:
            if self.locate(identity) is not None:
                refuse_id(self.folder, identity, there=True)
        name = f"segment-{self.meta['next']:04d}"
        part = _write_folder(self.folder / name, codes, items, self.meta.get("graphs", []))
        segments = {**self.meta["segments"], name: part}
        write_json(
            self.folder / META,
            {**self.meta, "next": self.meta["next"] + 1, "segments": segments},
        )
        return Store(self.folder)

    def delete(self, ids: Sequence[str]) -> Store:
        """The store without these items, and with what others changed since it was opened. Raises
        VhablError, and deletes none, for an id that there is not, and while another process changes
        it.
        """
        with alone(self.folder):
            return Store(self.folder)._delete(ids)

    def _delete(self, ids: Sequence[str]) -> Store:
        dead: dict[int, list[int]] = {}
        for identity in ids:
            found = self.locate(identity)
            if found is None:
                refuse_id(self.folder, identity, there=False)
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


def create(
    folder: Path,
    about: dict[str, Any],
    codes: dict[str, np.ndarray],
    items: Items,
    measure: Callable[[Store], dict[str, Any]],
    graphs: Sequence[faiss_index.Graph] = (),
    centres: np.ndarray | None = None,
) -> Store:
    """Write a new index: whole, or not at all. about: what `index.json` says beside; it has views,
    bits and class_names; measure: what it says more of the codes; graphs: FAISS indexes to build
    beside them; centres: [M, J, bits], which the items' choices are of. Raises VhablError where the
    folder exists.
    """
    check_new(folder)
    check_ids(items.ids)
    temporary = beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with named(folder, temporary):
            part = _write_folder(temporary / "segment-0000", codes, items, graphs)
            meta = {
                "format": FORMAT, "engine": "folder", **about, "graphs": list(graphs),
                "centres": None, "next": 1, "segments": {"segment-0000": part},
            }  # fmt: skip
            if centres is not None:
                np.save(temporary / CENTRES, centres)
                meta["centres"] = _checksum(temporary / CENTRES)
            write_json(temporary / META, meta)
            write_json(temporary / META, {**meta, **measure(Store(temporary))})
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Store(folder)


def _write_folder(
    folder: Path, codes: dict[str, np.ndarray], items: Items, graphs: Sequence[faiss_index.Graph]
) -> dict[str, Any]:
    """A segment in a folder that is there whole or not at all."""
    temporary = beside(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: no index names it
    try:
        with named(folder, temporary):
            temporary.mkdir(parents=True)
            part = write_segment(temporary, codes, items, graphs)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return part


def _check(meta: dict[str, Any]) -> None:
    if not meta["segments"]:
        raise ValueError("no segment")
    for name, part in meta["segments"].items():
        if not {"items", "alive", "files"} <= part.keys():
            raise ValueError("a segment without items, alive and files")
        if type(part["items"]) is not int or not isinstance(part["alive"], str | None):
            raise ValueError("items or alive of another type")
        if any(Path(file).name != file for file in (name, *part["files"])):
            raise ValueError("a file that is elsewhere")
        for said in (*part["files"].values(), meta.get("centres") or [0, 0]):
            if not isinstance(said, list) or [type(number) for number in said] != [int, int]:
                raise ValueError("a file without size and checksum")
    for view, modes in meta.get("recall", {}).items():
        for mode, found in modes.items():
            if not all(
                type(found[n]) in (int, float) for n in ("setting", "recall", "at", "queries")
            ):
                raise ValueError(f"a setting of {mode} on {view} that is no number")
            if not 0 <= found["setting"] <= 2**20:
                raise ValueError(f"a setting of {mode} on {view} out of range")


def _check_size(path: Path, expected: Sequence[int]) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected[0]:
        said = "no such file" if found is None else f"{found:,} bytes"
        fail(path, said, f"{META} says {expected[0]:,} bytes. {_AGAIN}")


def _merge(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest of all segments, those of earlier ones first at equal distance."""
    joined = [np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)]
    far = np.iinfo(np.int32).max
    order = np.argsort(np.where(joined[2] < 0, far, joined[0]), axis=1, kind="stable")[:, :top]
    distance, segment, item = (np.take_along_axis(x, order, axis=1) for x in joined)
    return distance, segment, item
