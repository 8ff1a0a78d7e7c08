"""What a kernel needs and what it returns: packed codes and labels, histograms, ordered sums.

A kernel never holds anything of size queries x database. Two passes give all measures:

- `histogram`: how many items of each number of shared labels lie at each distance;
- `ordered`: with ties in database order, sums over the ranks up to some cut-offs. The histogram
  says at which rank each distance starts, so one more pass in database order needs no sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vhabl.system.errors import fail
from vhabl.types import Codes

WORD = 64  # bits of a packed word


def pack_words(bits: np.ndarray) -> np.ndarray:
    """Rows of bits to 64-bit words, bit i in word i // 64 at place i % 64, zero padded.

    bits: [N, K] array whose positive entries are ones (+-1 codes, 0/1 labels). Returns uint64
    [N, ceil(K / 64)].

    >>> pack_words(np.array([[1, -1, 1]]))
    array([[5]], dtype=uint64)
    """
    items, width = bits.shape
    words = np.zeros((items, -(-width // WORD) * 8), np.uint8)
    step = max(1, (1 << 24) // max(1, width))  # bounds the memory of the comparison
    for start in range(0, items, step):
        packed = np.packbits(bits[start : start + step] > 0, axis=1, bitorder="little")
        words[start : start + step, : packed.shape[1]] = packed
    return words.view("<u8")


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The first `bits` bits of each row of words: uint8 [N, bits] of 0 and 1."""
    return np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=1, count=bits, bitorder="little"
    )


GRADES = 100  # steps from 0 to the largest degree, where degrees are not whole numbers


def pack_labels(query: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Labels as masks whose common ones count how much two items share, and the unit of a count.

    query [Q, C] and database [N, C]: how far each item belongs to each class, 0 where it does not.
    Two items share `sum over classes of min(q, d)`: the number of common classes where labels are
    0 and 1. A class of whole degrees up to D takes D bits, of which the first `degree` are ones.
    Fractions, and degrees above 100, are rounded to steps of 1/100 of the largest, none of them to
    0. Returns uint64 masks [Q, L] and [N, L], and what one common bit stands for. Raises VhablError
    for a negative or undefined degree.

    >>> q, d, unit = pack_labels(np.array([[2, 1]]), np.array([[1, 1], [3, 0], [0, 0]]))
    >>> np.bitwise_count(q & d).sum(axis=1) * unit
    array([2., 2., 0.])
    """
    both = query, database
    top = max((float(np.max(side, initial=0)) for side in both), default=0.0)
    for name, side in zip(("query", "database"), both, strict=True):
        if (side.dtype.kind == "f" and not np.isfinite(side).all()) or np.min(side, initial=0) < 0:
            fail(f"{name} labels", "a negative or undefined degree", "Degrees must be 0 or more")
    unit = 1.0
    fractions = any(side.dtype.kind == "f" and (side != np.rint(side)).any() for side in both)
    if fractions or top > GRADES:
        unit = top / GRADES
    # Beyond what the other side reaches, a degree makes no difference.
    depth = np.minimum(*(np.ceil(np.max(s, axis=0, initial=0) / unit - 1e-9) for s in both))
    if depth.max(initial=0) <= 1 and unit == 1:
        return pack_words(query), pack_words(database), unit
    classes = np.repeat(np.arange(query.shape[1]), depth.astype(np.int64))
    degrees = np.concatenate([np.arange(1, d + 1) for d in depth]) if len(classes) else depth[:0]

    def pack(side: np.ndarray) -> np.ndarray:
        words = np.zeros((len(side), max(1, -(-len(classes) // WORD))), np.uint64)
        step = max(1, (1 << 24) // max(1, len(classes)))
        for start in range(0, len(side), step):
            part = side[start : start + step, classes]
            steps = np.maximum(np.rint(part / unit), part > 0)
            packed = pack_words(steps >= degrees)
            words[start : start + step, : packed.shape[1]] = packed
        return words

    return pack(query), pack(database), unit


def check(codes: Codes) -> None:
    """Raise VhablError where codes are not +-1 or widths of the two sides differ."""
    for name in ("query", "database"):
        for kind in ("codes", "labels"):
            values = getattr(codes, name if kind == "codes" else f"{name}_labels")
            if not isinstance(values, np.ndarray) or values.ndim != 2:
                shape = getattr(values, "shape", type(values).__name__)
                do = "They must be an array, items x bits or classes"
                fail(f"{name} {kind}", f"shape {shape}", do)
            if values.dtype.kind not in "fiub" or values.shape[1] == 0:
                found = f"{values.shape[1]} columns of type {values.dtype}"
                fail(f"{name} {kind}", found, "They must be numbers in at least one column")
        signs = getattr(codes, name)
        step = max(1, (1 << 24) // max(1, signs.shape[1]))
        for start in range(0, len(signs), step):
            part = signs[start : start + step]
            right = (part == 1) | (part == -1)
            if not right.all():
                fail(f"{name} codes", f"the value {part[~right][0]:g}", "Codes must be -1 and +1")
    for what, one, other in (
        ("bits", codes.query, codes.database),
        ("classes", codes.query_labels, codes.database_labels),
    ):
        if one.shape[1] != other.shape[1]:
            do = "Both must have as many"
            fail("query and database", f"{one.shape[1]} and {other.shape[1]} {what}", do)


@dataclass(frozen=True)
class Packed:
    """Codes and labels of queries and database as 64-bit words (any of them a memory map).

    query [Q, W] and database [N, W] of `bits` bits; query_labels [Q, L] and database_labels [N, L]
    are masks of classes (`pack_labels`), of which one common bit stands for `unit` shared labels.
    weights: None, or the integer weight of each bit, [K], not negative.
    own: None, or for each query the database position of the query itself, -1 where it is not
    there, [Q]: that item is left out. Bits beyond `bits` are zero.
    """

    bits: int
    query: np.ndarray
    database: np.ndarray
    query_labels: np.ndarray
    database_labels: np.ndarray
    weights: np.ndarray | None = None
    own: np.ndarray | None = None
    unit: float = 1.0

    def __post_init__(self) -> None:
        """A kernel reads memory as these shapes promise. Raises VhablError where they disagree."""
        words = -(-self.bits // WORD)
        for name in ("query", "database"):
            rows, labels = getattr(self, name), getattr(self, f"{name}_labels")
            if len(rows) == 0 or self.bits < 1:
                do = "There must be at least one"
                fail(f"{name} codes", f"{len(rows)} items of {self.bits} bits", do)
            if rows.shape != (len(rows), words):
                fail(f"{name} codes", f"shape {rows.shape}", f"{self.bits} bits take {words} words")
            if len(labels) != len(rows):
                do = "Give one for each"
                fail(f"{name} labels", f"{len(labels)} rows for {len(rows)} codes", do)
        widths = self.query_labels.shape[1:], self.database_labels.shape[1:]
        if widths[0] != widths[1] or widths[0][0] == 0:
            do = "Both must have as many, at least one"
            fail("labels", f"{widths[0]} and {widths[1]} words a row", do)
        w, own = self.weights, self.own
        if w is not None and (w.shape != (self.bits,) or w.dtype.kind not in "iu" or w.min() < 0):
            do = f"They must be {self.bits} integers, not negative"
            fail("weights", f"shape {w.shape} of type {w.dtype}, or a negative one", do)
        items = len(self.database)
        if own is not None and (own.shape != (len(self.query),) or own.max() >= items):
            do = f"It must be a position below {items} or -1 for each query"
            fail("own", f"shape {own.shape}", do)

    @classmethod
    def of(
        cls, codes: Codes, weights: np.ndarray | None = None, own: np.ndarray | None = None
    ) -> Packed:
        """Pack +-1 codes with their labels. Raises VhablError where they are none, or disagree."""
        check(codes)
        q, d, unit = pack_labels(codes.query_labels, codes.database_labels)
        signs = pack_words(codes.query), pack_words(codes.database)
        return cls(codes.bits, *signs, q, d, weights, own, unit)

    @cached_property
    def distances(self) -> int:
        """Number of possible distances: 0 ... K, or 0 ... the sum of the weights."""
        return 1 + (self.bits if self.weights is None else int(self.weights.sum()))

    @cached_property
    def levels(self) -> int:
        """Number of possible counts of common label bits, 0 included."""
        masks = self.query_labels, self.database_labels
        return 1 + min(int(np.bitwise_count(m).sum(axis=1).max(initial=0)) for m in masks)

    @cached_property
    def gains(self) -> np.ndarray:
        """Gain of an item by its common label bits: float64 [levels]."""
        return gains(self.levels, self.unit)

    @cached_property
    def left_out(self) -> np.ndarray:
        """`own` with -1 for every query where nothing is left out: int64 [Q]."""
        return np.full(len(self.query), -1) if self.own is None else self.own.astype(np.int64)


@dataclass(frozen=True)
class Ordered:
    """Sums over the ranking of each query in which ties stay in database order.

    For each query and cut-off R: `precision` is the sum of the precisions at the relevant items
    among the first R ranks, `hits` their number, `first` the sum of the precisions at the first R
    relevant items wherever they rank, and `dcg` the discounted gain of the first R ranks.
    All [Q, cut-offs]; hits is int64, the others float64.
    """

    cuts: tuple[int, ...]
    precision: np.ndarray
    hits: np.ndarray
    first: np.ndarray
    dcg: np.ndarray


def gains(levels: int, unit: float) -> np.ndarray:
    """Gain of an item that shares s labels, 2^s - 1, for s = 0, unit ... (levels - 1) unit."""
    return np.exp2(np.arange(levels) * unit) - 1.0


def discounts(ranks: int) -> np.ndarray:
    """1 / log2(rank + 1) for ranks 1 ... `ranks`."""
    return 1.0 / np.log2(np.arange(2, ranks + 2))


def without_own(packed: Packed, counts: np.ndarray) -> np.ndarray:
    """Take from the histograms [Q, distances, levels] the item that each query leaves out."""
    for q in np.flatnonzero(packed.left_out >= 0):
        item = packed.left_out[q]
        differs = unpack_words((packed.query[q] ^ packed.database[item])[None], packed.bits)[0]
        weights = 1 if packed.weights is None else packed.weights
        shared = np.bitwise_count(packed.query_labels[q] & packed.database_labels[item]).sum()
        counts[q, int((differs * weights).sum()), int(shared)] -= 1
    return counts
