"""Hamming distances and shared labels as whole matrices: for looking at a few queries.

The measures do not use them: their kernels never hold a matrix of queries x database.
"""

from __future__ import annotations

import numpy as np


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


def shared_labels(query_labels: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Number of classes that two items share: [Q, C] x [N, C] -> [Q, N] int32."""
    return (query_labels.astype(np.float32) @ database_labels.astype(np.float32).T).astype(np.int32)
