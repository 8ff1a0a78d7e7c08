"""An index whose codes are rows of a Milvus collection: a server, a cluster, or an embedded file.

The folder of such an index has `index.json` alone, with the address and the collection's name.
Binary vectors are compared by Hamming distance, each with the engine's exact index. An item's
labels are one text with a 0 or 1 for each class, which filters match by pattern: an array of
classes takes fifteen times as long to insert in the embedded engine, which knows no `not` either.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vhabl.search.engine import (
    FORMAT,
    META,
    Hit,
    Items,
    Mode,
    Query,
    check_ids,
    check_new,
    read_meta,
    refuse_id,
)
from vhabl.search.store import hashes
from vhabl.search.where import Filter
from vhabl.system.errors import VhablError, brief, fail
from vhabl.system.files import beside, write_json

T = TypeVar("T")

EMBEDDED = "milvus.db"  # beside index.json, where no address was given
TIMEOUT = 10.0  # seconds that a server has to answer the first call
LIMIT = 16384  # items that the engine gives at once
BATCH = 5000  # items that are sent at once
LONGEST = 65535  # bytes of a text field, the engine's own limit
FIELDS = ("caption", "image", "labels")
BUCKETS = 2**16  # into which ids are dealt by their hashes, to ask for items in parts


class Collection:
    """A collection of a Milvus as an engine. Raises VhablError where it does not answer, or has no
    such collection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder, lambda meta: (meta["uri"], meta["collection"]))
        self.views: list[str] = self.meta["views"]
        self.bits: int = self.meta["bits"]
        self.class_names: list[str] = self.meta["class_names"]
        self.name: str = self.meta["collection"]
        uri = self.meta["uri"]
        self.address = str(folder / EMBEDDED) if uri == EMBEDDED else uri
        if is_file(self.address) and not Path(self.address).is_file():
            fail(self.address, "no such file", "Put the embedded collection of the index back")
        self.client = connect(self.address)
        with said(self.address):
            there = self.client.has_collection(self.name)
        if not there:
            do = "Build the index again"
            fail(self.address, f"no collection {self.name}, which {folder / META} names", do)

    def __len__(self) -> int:
        with said(self.address):
            (row,) = self.client.query(self.name, filter="", output_fields=["count(*)"])
        return int(row["count(*)"])

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("exact",)

    @property
    def prefixes(self) -> bool:
        return False

    @property
    def parts(self) -> str:
        return f"collection {self.name} of {self.address}"

    def verify(self) -> None:
        """That it answers and has its items; what it stores is its own to keep."""
        len(self)

    def find(self, query: Query) -> list[list[Hit]]:
        wanted = "" if query.wanted is None else expression(query.wanted)
        if query.top > LIMIT:
            return [self._pages(query, code, wanted) for code in query.packed]
        return self._search(query.view, query.packed, query.top, wanted)

    def _search(
        self, view: str, packed: np.ndarray, top: int, wanted: str, at: int | None = None
    ) -> list[list[Hit]]:
        """One call to the engine. at: only items at this distance."""
        ring = {} if at is None else {"range_filter": at, "radius": at + 1}
        with said(self.address):
            found = self.client.search(
                self.name, [code.tobytes() for code in packed], wanted, top,
                output_fields=list(FIELDS), anns_field=field_of(view),
                search_params={"metric_type": "HAMMING", "params": ring},
            )  # fmt: skip
        return [[self._hit(row["entity"], row) for row in rows] for rows in found]

    def _pages(self, query: Query, code: np.ndarray, wanted: str) -> list[Hit]:
        """More items than the engine gives at once: from where the first page may lack some, all
        items of one distance after another. (The client's own iterator loses items where a page
        is smaller than a tie.)
        """
        (hits,) = self._search(query.view, code[None], LIMIT, wanted)
        if len(hits) < LIMIT:
            return hits
        last = hits[-1].distance
        hits = [hit for hit in hits if hit.distance < last]
        for distance in range(last, self.bits + 1):
            hits += self._ring(query.view, code, distance, wanted, 0, BUCKETS)
            if len(hits) >= query.top:
                break
        return hits[: query.top]

    def _ring(
        self, view: str, code: np.ndarray, distance: int, wanted: str, first: int, end: int
    ) -> list[Hit]:
        """All items at a distance whose buckets are `first` up to before `end`."""
        some = f"bucket >= {first} and bucket < {end}"
        both = f"({wanted}) and {some}" if wanted else some
        (hits,) = self._search(view, code[None], LIMIT, both, distance)
        if len(hits) < LIMIT or end - first == 1:
            return hits
        middle = (first + end) // 2
        return [
            *self._ring(view, code, distance, wanted, first, middle),
            *self._ring(view, code, distance, wanted, middle, end),
        ]

    def _hit(self, entity: dict[str, Any], row: dict[str, Any]) -> Hit:
        pairs = zip(self.class_names, entity["labels"], strict=True)
        labels = tuple(name for name, has in pairs if has == "1")
        distance = round(row.get("distance", 0))
        return Hit(row["id"], distance, entity["caption"], entity["image"], labels)

    def item(self, identity: str) -> tuple[Hit, dict[str, np.ndarray]]:
        with said(self.address):
            fields = [field_of(view) for view in self.views]
            rows = self.client.get(self.name, [identity], [*FIELDS, *fields])
        if not rows:
            refuse_id(self.folder, identity, there=False)
        (row,) = rows
        packed = {view: _bytes_of(row[field_of(view)]) for view in self.views}
        return self._hit(row, {"id": identity}), packed

    def some(self, count: int) -> list[Hit]:
        with said(self.address):
            rows = self.client.query(self.name, "", ["id", *FIELDS], limit=count)
        return [self._hit(row, row) for row in rows]

    def _there(self, ids: Sequence[str]) -> set[str]:
        """Which of the ids there are."""
        found: set[str] = set()
        with said(self.address):
            for some in in_batches(ids):
                found |= {row["id"] for row in self.client.get(self.name, some, ["id"])}
        return found

    def add(self, codes: dict[str, np.ndarray], items: Items) -> Collection:
        check_ids(items.ids)
        for identity in self._there(items.ids):
            refuse_id(self.folder, identity, there=True)
        sent = 0
        try:
            with said(self.address):
                for rows in batches(codes, items):
                    sent += len(rows)
                    self.client.insert(self.name, rows)
        except BaseException:
            with contextlib.suppress(Exception):
                for some in in_batches(items.ids[:sent]):
                    self.client.delete(self.name, ids=some)
            raise
        return self

    def delete(self, ids: Sequence[str]) -> Collection:
        there = self._there(ids)
        for identity in ids:
            if identity not in there:
                refuse_id(self.folder, identity, there=False)
        with said(self.address):
            for some in in_batches(ids):
                self.client.delete(self.name, ids=some)
        return self


def create(
    folder: Path, uri: str, about: dict[str, Any], codes: dict[str, np.ndarray], items: Items
) -> Collection:
    """Write a new index: whole, or not at all. uri: a server's address or an embedded file; one in
    the folder where it is empty. about: as in `vhabl.search.store`. Raises VhablError where the
    folder exists, or the server does not answer.
    """
    check_new(folder)
    check_ids(items.ids)
    rows = batches(codes, items)
    temporary = beside(folder)
    temporary.mkdir(parents=True)
    name = f"vhabl_{secrets.token_hex(6)}"
    address = uri or str(temporary / EMBEDDED)
    client: Any = None
    try:
        client = connect(address)
        with said(address):
            _create_collection(client, name, codes)
            for some in rows:
                client.insert(name, some)
        client.close()
        where = str(Path(uri).resolve()) if uri and is_file(uri) else uri or EMBEDDED
        write_json(
            temporary / META,
            {"format": FORMAT, "engine": "milvus", **about, "uri": where, "collection": name},
        )
        temporary.rename(folder)
    except BaseException:
        if client is not None and uri:
            with contextlib.suppress(Exception):
                client.drop_collection(name)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Collection(folder)


def _create_collection(client: Any, name: str, codes: dict[str, np.ndarray]) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST)
    for field in FIELDS:
        schema.add_field(field, DataType.VARCHAR, max_length=LONGEST)
    schema.add_field("bucket", DataType.INT64)
    indexes = client.prepare_index_params()
    for view, packed in codes.items():
        schema.add_field(field_of(view), DataType.BINARY_VECTOR, dim=8 * packed.shape[1])
        indexes.add_index(field_of(view), index_type="BIN_FLAT", metric_type="HAMMING")
    client.create_collection(
        name, schema=schema, index_params=indexes, consistency_level="Strong"
    )  # what was inserted is found at once


def batches(codes: dict[str, np.ndarray], items: Items) -> list[list[dict[str, Any]]]:
    """Rows of the collection. Raises VhablError for a text that the engine cannot hold."""
    rows = []
    buckets = hashes(items.ids) % np.uint64(BUCKETS)
    for n, identity in enumerate(items.ids):
        row: dict[str, Any] = {
            "id": identity,
            "caption": items.captions[n],
            "image": items.images[n],
            "labels": "".join("01"[has] for has in (items.labels[n] > 0).astype(int)),
        }
        for name, value in row.items():
            if len(value.encode("utf-8", "replace")) > LONGEST:
                do = f"Milvus holds at most {LONGEST:,} bytes"
                fail(f"item {identity[:80]}: {name}", f"{len(value):,} characters", do)
        row["bucket"] = int(buckets[n])
        rows.append(row | {field_of(view): packed[n].tobytes() for view, packed in codes.items()})
    return in_batches(rows)


def in_batches(values: Sequence[T]) -> list[list[T]]:
    """What is sent at once, one part after another."""
    return [list(values[start : start + BATCH]) for start in range(0, len(values), BATCH)]


def expression(wanted: Filter, negated: bool = False) -> str:
    """A filter as Milvus writes it. `not` goes down to the labels: a 0 in place of a 1.

    >>> from vhabl.search.where import parse
    >>> expression(parse("not (label = 'a' or label != 'c')", ["a", "b", "c"]))
    '(labels like "0%") and (labels like "__1%")'
    """
    if wanted.kind == "has":
        return f'labels like "{"_" * wanted.label}{0 if negated else 1}%"'
    if wanted.kind == "not":
        return expression(wanted.parts[0], not negated)
    joined = wanted.kind if not negated else {"and": "or", "or": "and"}[wanted.kind]
    return f" {joined} ".join(f"({expression(part, negated)})" for part in wanted.parts)


def field_of(view: str) -> str:
    """The field of a view's codes."""
    return f"code_{view}"


def _bytes_of(vector: Any) -> np.ndarray:
    """A stored code [B], as one string of bytes or a list of such, which versions differ in."""
    return np.frombuffer(b"".join(vector) if isinstance(vector, list) else vector, np.uint8)


def is_file(address: str) -> bool:
    """Whether an address is an embedded file's."""
    return "://" not in address


def connect(address: str) -> Any:
    """A client. Raises VhablError where the package is missing or nothing answers in time."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors are raised as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the embedded engine's own
            from pymilvus import MilvusClient

            if is_file(address):
                import milvus_lite  # noqa: F401
    except ImportError as error:
        what = "the package milvus-lite" if is_file(address) else "the package pymilvus"
        fail("engine milvus", f"no {error.name or what}", "Install it: pip install 'vhabl[milvus]'")
    with said(address):
        return MilvusClient(address, timeout=TIMEOUT)


@contextlib.contextmanager
def said(address: str) -> Iterator[None]:
    """What the engine raises as one message."""
    from pymilvus import MilvusException

    for name in ("pymilvus", "pymilvus.milvus_client"):  # what they log is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except VhablError:
        raise
    except (MilvusException, OSError, ValueError) as error:
        found = brief(error)
        if isinstance(error, MilvusException):
            found = " ".join(error.message.split())[:120]
            if "connect" in found.lower():
                found = f"no answer (it is waited for {TIMEOUT:g} seconds)"
        fail(f"Milvus at {address}", found, "Start the server, or give an embedded file")
