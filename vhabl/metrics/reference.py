"""The slow, obvious form of the kernels: sort and loop. Every kernel has to equal it.

It is also the way for rankings that are not integers: a query's real values against binary codes.
"""

from __future__ import annotations

import numpy as np

from vhabl.metrics.counts import Ordered, Packed, unpack_words


def distances(packed: Packed, query: int) -> np.ndarray:
    """Distance of one query to every item: int64 [N]."""
    weights = np.ones(packed.bits, np.int64) if packed.weights is None else packed.weights
    q = unpack_words(packed.query[query : query + 1], packed.bits)
    differs = unpack_words(packed.database, packed.bits) != q
    return differs @ weights


def shared_labels(packed: Packed, query: int) -> np.ndarray:
    """Number of label bits that one query shares with every item: int64 [N]."""
    classes = packed.query_labels.shape[1] * 64
    q = unpack_words(packed.query_labels[query : query + 1], classes)
    return (unpack_words(packed.database_labels, classes) & q).sum(axis=1, dtype=np.int64)


def histogram(packed: Packed) -> np.ndarray:
    """Items at each distance that share each number of labels: int64 [Q, distances, levels]."""
    counts = np.zeros((len(packed.query), packed.distances, packed.levels), np.int64)
    for q in range(len(packed.query)):
        pairs = zip(distances(packed, q), shared_labels(packed, q), strict=True)
        for item, (distance, shared) in enumerate(pairs):
            if item != packed.left_out[q]:
                counts[q, distance, shared] += 1
    return counts


def ordered(packed: Packed, counts: np.ndarray, cuts: tuple[int, ...]) -> Ordered:
    """Sums over the ranking with ties in database order, from a stable sort."""
    sums = []
    for q in range(len(packed.query)):
        order = np.argsort(distances(packed, q), kind="stable")
        order = order[order != packed.left_out[q]]
        sums.append(ranked_sums(shared_labels(packed, q)[order], packed.gains, cuts))
    return to_ordered(cuts, sums)


Sums = tuple[list[float], list[int], list[float], list[float]]


def to_ordered(cuts: tuple[int, ...], sums: list[Sums]) -> Ordered:
    """The sums of all queries as arrays."""
    precision, hits, first, dcg = (np.array(part) for part in zip(*sums, strict=True))
    return Ordered(cuts, precision, hits.astype(np.int64), first, dcg)


def ranked_sums(shared: np.ndarray, gains: np.ndarray, cuts: tuple[int, ...]) -> Sums:
    """The four sums of `Ordered` for one query, from its common label bits with the items in ranked
    order, [N], and the gain of each number of them, [levels].
    """
    relevant = shared > 0
    ranks = np.arange(1, len(shared) + 1)
    found = np.cumsum(relevant)
    at = np.where(relevant, found / ranks, 0.0)
    gained = gains[shared] / np.log2(ranks + 1)
    return (
        [float(at[:cut].sum()) for cut in cuts],
        [int(relevant[:cut].sum()) for cut in cuts],
        [float(at[found <= cut].sum()) for cut in cuts],
        [float(gained[:cut].sum()) for cut in cuts],
    )
