"""Parts of a code file that ranks write one each, and their merge.

Shard 2 of 4 of codes.npz is codes.npz.shards/2-of-4.npz: the codes of consecutive items, with a
signature of all that decides them. One that is whole and has the signature asked for is not made
again; any other takes no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vhabl.codes.files import texts
from vhabl.system.errors import fail, plural
from vhabl.system.files import atomic_path, check_archive
from vhabl.types import Embedded, Rows, Stored

BLOCK = 1024  # items that a signature reads at once
_REMOVE = "Remove the folder and run the command again"
OWN_KEYS = ("signature", "first", "ids", "cut")  # of a shard; the others are views


@dataclass(frozen=True)
class Part:
    """Packed codes {view: [n, B] uint8} of the items from number `first` on, and their ids.

    cut: how many of their texts were longer than what the model reads.
    """

    first: int
    ids: Sequence[str]
    codes: dict[str, np.ndarray]
    cut: int = 0


@dataclass(frozen=True)
class Shard:
    """A file that holds a part, or is to hold it."""

    path: Path
    signature: str

    def read(self) -> Part | None:
        """The part, or None where the file is not there, damaged, or of another signature."""
        try:
            check_archive(self.path)
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["signature"]) != self.signature:
                    return None
                codes = {view: file[view] for view in file.files if view not in OWN_KEYS}
                return Part(int(file["first"]), texts(file["ids"]), codes, int(file["cut"]))
        except Exception:  # damaged bytes raise many types
            return None

    def write(self, part: Part) -> None:
        content: dict[str, Any] = {
            "signature": np.array(self.signature),
            "first": np.int64(part.first),
            "ids": np.array(part.ids, str),
            "cut": np.int64(part.cut),
            **part.codes,
        }
        with atomic_path(self.path) as path, path.open("wb") as file:
            np.savez(file, **content)


def folder(out: Path) -> Path:
    """Where the shards of a code file are until it is whole."""
    return out.with_name(f"{out.name}.shards")


def rows(count: int, batch: int, rank: int, size: int) -> slice:
    """The items of a rank: whole batches, as equal in number as can be, the ranks' one after the
    other. In other batches than those of a single process a code may differ in a bit near 0.

    >>> [rows(10, 2, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 6, None), slice(6, 10, None)]
    """
    batches = -(-count // batch)
    first, end = (batches * number // size * batch for number in (rank, rank + 1))
    return slice(min(first, count), min(end, count))


def signature(
    made_with: Iterable[str],
    ids: Sequence[str],
    images: Sequence[Stored] | np.ndarray | Rows | None,
    texts: Sequence[str | None] | np.ndarray | None,
) -> str:
    """A short digest of what decides the codes of items: made_with, ids, texts and features as they
    are, and for each picture its path, size and time of change, as reading it takes long.
    """
    digest = blake2b(digest_size=16)

    def add(content: bytes) -> None:
        digest.update(len(content).to_bytes(8, "little"))  # so that "ab", "c" is not "a", "bc"
        digest.update(content)

    for values in (made_with, ids, images, texts):
        if isinstance(values, np.ndarray | Rows):
            add(repr((values.shape, values[:0].dtype.str)).encode())
            for start in range(0, len(values), BLOCK):
                add(np.ascontiguousarray(values[start : start + BLOCK]).tobytes())
            continue
        listed = None if values is None else list(values)
        add(b"none" if listed is None else f"{len(listed)} values".encode())
        for value in listed or ():
            add(b"\xff" if value is None else str(value).encode("utf-8", "surrogatepass"))
            if isinstance(value, Embedded):
                add(value.content)
            if isinstance(value, Path) and value.is_file():  # else it is said when it is read
                found = value.stat()
                add(f"{found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def merge(shards: Sequence[Shard], ids: Sequence[str]) -> Part:
    """The parts of all ranks as one. Raises VhablError where they are not each of these items once
    and in order.
    """
    parts: list[Part] = []
    for shard in shards:
        part = shard.read()
        if part is None:
            fail(shard.path, "no such shard, or another", "All ranks must write to a common disk")
        expected = sum(len(other.ids) for other in parts)
        if part.first != expected or any(len(c) != len(part.ids) for c in part.codes.values()):
            fail(shard.path, f"items from number {part.first} on, not from {expected}", _REMOVE)
        parts.append(part)
    found = [identity for part in parts for identity in part.ids]
    if found != np.array(ids, str).tolist():
        where = shards[0].path.parent
        fail(where, f"ids of {plural(len(found), 'item')} for {len(ids):,} asked for", _REMOVE)
    views = parts[0].codes
    codes = {view: np.concatenate([part.codes[view] for part in parts]) for view in views}
    return Part(0, found, codes, sum(part.cut for part in parts))
