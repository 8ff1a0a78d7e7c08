"""Codes of +-1, packed to bytes."""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray) -> np.ndarray:
    """+-1 codes [N, K] to bytes [N, ceil(K / 8)] uint8, little-endian bit order, zero padded.

    >>> pack(np.array([[1, -1, 1, -1, -1, -1, -1, -1, 1]]))
    array([[5, 1]], dtype=uint8)
    """
    return np.packbits(codes > 0, axis=1, bitorder="little")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of `pack` to +-1 codes [N, bits] int8.

    >>> unpack(np.array([[5, 1]], dtype=np.uint8), 9)
    array([[ 1, -1,  1, -1, -1, -1, -1, -1,  1]], dtype=int8)
    """
    ones = np.unpackbits(packed, axis=1, count=bits, bitorder="little").astype(np.int8)
    return 2 * ones - 1
