"""Hamming distances of +-1 codes, and their histograms per query."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_PAIRS = 1 << 23  # pairs of items held at once: bounds the memory at about 100 MB


def hamming_distances(query: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Hamming distances of +-1 codes: [Q, K] x [N, K] -> [Q, N] int32.

    d(q, r) = (K - q . r) / 2. The product is taken in float32, where every sum of up to 2^24 terms
    of +-1 is exact; int8 arithmetic wraps from 128 bits on.

    >>> hamming_distances(np.array([[1, 1, -1]]), np.array([[1, 1, -1], [-1, 1, 1]]))
    array([[0, 2]], dtype=int32)
    """
    bits = query.shape[1]
    products = query.astype(np.float32) @ database.astype(np.float32).T
    return ((bits - products) * 0.5).astype(np.int32)


def query_blocks(queries: int, items: int) -> Iterator[slice]:
    """Slices of queries whose pairs with all items fit the memory bound."""
    step = max(1, BLOCK_PAIRS // max(1, items))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def shared_labels(query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Number of classes that two items share: [Q, C] x [N, C] -> [Q, N] int32."""
    return (query_labels.astype(np.float32) @ database_labels.astype(np.float32).T).astype(np.int32)


def relevance_histogram(
    query: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Items and relevant items at each Hamming distance: two arrays [Q, K + 1] int64.

    An item is relevant to a query when the two share a label.
    """
    bits = query.shape[1]
    items = np.zeros((len(query), bits + 1), np.int64)
    relevant = np.zeros_like(items)
    for rows in query_blocks(len(query), len(database)):
        distances = hamming_distances(query[rows], database)  # (b, N)
        match = shared_labels(query_labels[rows], database_labels) > 0  # (b, N)
        first_bin = np.arange(len(distances))[:, None] * (bits + 1)
        bins = distances + first_bin  # a bin of its own for each (query, distance)
        size = len(distances) * (bits + 1)
        items[rows] = np.bincount(bins.ravel(), minlength=size).reshape(-1, bits + 1)
        relevant[rows] = np.bincount(bins[match], minlength=size).reshape(-1, bits + 1)
    return items, relevant
