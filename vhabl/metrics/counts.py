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


@dataclass(frozen=True)
class Packed:
    """Codes and labels of queries and database as 64-bit words (any of them a memory map).

    query [Q, W] and database [N, W] of `bits` bits; query_labels [Q, L] and database_labels [N, L]
    are masks of classes. weights: None, or the integer weight of each bit, [K], not negative.
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

    @classmethod
    def of(
        cls, codes: Codes, weights: np.ndarray | None = None, own: np.ndarray | None = None
    ) -> Packed:
        """Pack +-1 codes with 0/1 labels."""
        return cls(
            codes.bits,
            pack_words(codes.query),
            pack_words(codes.database),
            pack_words(codes.query_labels),
            pack_words(codes.database_labels),
            weights,
            own,
        )

    @cached_property
    def distances(self) -> int:
        """Number of possible distances: 0 ... K, or 0 ... the sum of the weights."""
        return 1 + (self.bits if self.weights is None else int(self.weights.sum()))

    @cached_property
    def levels(self) -> int:
        """Number of possible counts of shared labels, 0 included."""
        masks = self.query_labels, self.database_labels
        return 1 + min(int(np.bitwise_count(m).sum(axis=1).max(initial=0)) for m in masks)

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


def gains(levels: int) -> np.ndarray:
    """Gain of an item that shares s labels, 2^s - 1, for s = 0 ... levels - 1."""
    return np.exp2(np.arange(levels)) - 1.0


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
