"""What every engine of an index has: the values that go in and out, and its description on disk.

An index is a folder with `index.json`. It says which engine holds the codes, whose they are, and
what its searches reach; the codes are files beside it (`vhabl.search.store`) or rows of a Milvus
collection (`vhabl.search.milvus`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

import numpy as np

from vhabl.search.where import Filter
from vhabl.system.errors import VhablError, brief, fail

FORMAT = 2
META = "index.json"
ENGINES = ("folder", "milvus")
Mode = Literal["exact", "weighted", "prefix", "two-stage", "ivf", "hnsw"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Hit:
    """A found item. distance: bits that differ, or their weights where these are counted; image:
    its path, or empty; score: what a second stage ranked it by, the larger the nearer.
    """

    id: str
    distance: int
    caption: str
    image: str
    labels: tuple[str, ...]
    score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}


@dataclass(frozen=True)
class Items:
    """What an index keeps of items beside their codes.

    labels: [N, C] of 0 and 1; choices: numbers of the centres that stand for an item's features,
    {view: [N, M]}, of a method with dictionaries (`vhabl.nn.quantisation`).
    """

    ids: Sequence[str]
    captions: Sequence[str]
    images: Sequence[str]
    labels: np.ndarray
    choices: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What an engine is asked, checked.

    packed: codes [Q, B] of the index's length, of which the first `bits` count; wanted: a filter;
    features: [Q, bits] float32, for a second stage.
    """

    view: str
    packed: np.ndarray
    bits: int
    top: int
    mode: Mode = "exact"
    wanted: Filter | None = None
    features: np.ndarray | None = None


class Engine(Protocol):
    """The engine of an opened index. What changes it gives the changed one."""

    folder: Path
    meta: dict[str, Any]
    views: list[str]
    bits: int
    class_names: list[str]

    def __len__(self) -> int: ...

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can be searched."""

    @property
    def prefixes(self) -> bool:
        """Whether it can compare the first bits of its codes alone."""

    @property
    def parts(self) -> str:
        """What holds its items, in words."""

    def find(self, query: Query) -> list[list[Hit]]:
        """The nearest items of each query, by distance or score."""

    def item(self, identity: str) -> tuple[Hit, dict[str, np.ndarray]]:
        """An item and its packed codes {view: [B]}. Raises VhablError where there is none."""

    def some(self, count: int) -> list[Hit]:
        """At most so many of the items, to begin a search with."""

    def add(self, codes: dict[str, np.ndarray], items: Items) -> Engine:
        """With more items, packed codes {view: [N, B]}: all or, with a VhablError, none of them."""

    def delete(self, ids: Sequence[str]) -> Engine:
        """Without these items. Raises VhablError, and deletes none, for an id that there is not."""

    def verify(self) -> None:
        """Read all that is stored. Raises VhablError naming what is not as it was written."""


def check_new(folder: Path) -> None:
    """Raise VhablError where there is something already."""
    if folder.exists():
        fail(folder, "it exists already", "Choose a new folder for the index")


def check_ids(ids: Sequence[str]) -> None:
    """Raise VhablError for no item, or for an id that comes twice."""
    if not ids:
        fail("items", "none is given", "Give at least one")
    seen: set[str] = set()
    for identity in ids:
        if identity in seen:
            fail(f"id {identity}", "it comes twice", "Ids must differ")
        seen.add(identity)


def refuse_id(folder: Path, identity: str, there: bool) -> NoReturn:
    """Raise VhablError for an id that is there already, or that is not."""
    where = f"{folder}: id {identity}"
    if there:
        fail(where, "an item has it already", "Choose a new id")
    fail(where, "no item has it", "Give the id of an item")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type, or a list of one."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(v) is kind[0] for v in value)
    return value is None or _is(value, [int]) if kind is None else type(value) is kind


ABOUT: dict[str, Any] = {  # what an index says; None: whole numbers, or nothing
    "method": str, "task": str, "any_length": bool, "data": str, "run": str, "digest": str,
    "views": [str], "bits": int, "importance": None, "class_names": [str],
}  # fmt: skip


def read_meta(
    folder: Path, check: Callable[[dict[str, Any]], object] = lambda _: None
) -> dict[str, Any]:
    """The description of an index. check: raises ValueError, KeyError or the like for what an
    engine cannot use. Raises VhablError where there is none, or it is damaged.
    """
    path = folder / META
    if not path.is_file():
        fail(folder, f"no {META} is in it", "Give an index that python -m vhabl.search build wrote")
    try:
        meta = dict(json.loads(path.read_text(encoding="utf-8")))
        if meta["format"] != FORMAT:
            fail(path, f"format {meta['format']} in place of {FORMAT}", "Build the index again")
        for name in ABOUT.keys() & meta.keys():
            if not _is(meta[name], ABOUT[name]):
                raise ValueError(f"a value of another type as {name}")
        if not meta["views"] or not set(meta["views"]) <= {"fused", "image", "text"}:
            raise ValueError(f"views {meta['views']}")
        importance = meta.get("importance") or [0] * meta["bits"]
        if not 1 <= meta["bits"] <= 4096 or len(importance) != meta["bits"]:
            raise ValueError("another number of bits")
        if not all(0 <= weight < 2**24 for weight in importance):
            raise ValueError("weights of bits out of range")
        if meta["engine"] not in ENGINES:
            raise ValueError(f"engine {meta['engine']!r}")
        check(meta)
    except VhablError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(path, f"the description is damaged ({brief(error)})", "Build the index again")
    return meta
