"""The kernels on CPU: xor, popcount, label masks and histogram, on all cores.

The database is read once, chunk by chunk; every chunk is laid out by word so that the compiler
vectorises the distances, and is used for all queries while it is in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import int64, njit, prange, types, uint64
from numba.extending import intrinsic

from vhabl.metrics.counts import Ordered, Packed, discounts, without_own

# With OpenMP numba would set the number of threads for torch too, in the middle of a training.
numba.config.THREADING_LAYER = "workqueue"
one_at_a_time = threading.Lock()  # which this layer needs

CHUNK = 16384  # items; a chunk and its bins stay in the first cache levels


@intrinsic
def popcount(_context: Any, _word: Any) -> Any:
    """Number of ones of a 64-bit word, as the processor's own instruction."""

    def build(_: Any, builder: ir.IRBuilder, __: Any, arguments: Sequence[Any]) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), build


@njit(cache=True, nogil=True)
def by_word(rows: np.ndarray, start: int, n: int, out: np.ndarray) -> None:
    """Words of rows start ... start + n, transposed into out [W, CHUNK]."""
    for i in range(n):
        for w in range(rows.shape[1]):
            out[w, i] = rows[start + i, w]


@njit(cache=True, nogil=True)
def distances_of(
    query: np.ndarray, words: np.ndarray, table: np.ndarray, n: int, out: np.ndarray
) -> None:
    """Distances of one query to the n items of a chunk.

    table: empty, or for each byte of a code the summed weights of its ones, [8 W, 256].
    """
    if len(table) == 0:
        q, row = query[0], words[0]
        for i in range(n):
            out[i] = popcount(row[i] ^ q)
        for w in range(1, len(query)):
            q, row = query[w], words[w]
            for i in range(n):
                out[i] += popcount(row[i] ^ q)
        return
    out[:n] = 0
    for w in range(len(query)):
        q, row = query[w], words[w]
        for byte in range(8):
            weights, shift = table[8 * w + byte], uint64(8 * byte)
            for i in range(n):
                out[i] += weights[((row[i] ^ q) >> shift) & uint64(255)]


@njit(cache=True, nogil=True)
def _add_shared(
    query: np.ndarray, masks: np.ndarray, n: int, factor: np.ndarray, out: np.ndarray
) -> None:
    """out * factor + the number of labels that one query shares with the n items of a chunk."""
    scale, q, row = factor[0], query[0], masks[0]
    for i in range(n):
        out[i] = out[i] * scale + popcount(row[i] & q)
    for w in range(1, len(query)):
        q, row = query[w], masks[w]
        for i in range(n):
            out[i] += popcount(row[i] & q)


@njit(cache=True, nogil=True)
def _count(bins: np.ndarray, n: int, parts: np.ndarray) -> None:
    """Count into four histograms in turn: an item need not wait for the counts before it."""
    a, b, c, d = parts[0], parts[1], parts[2], parts[3]
    whole = n - n % 4
    for i in range(0, whole, 4):
        a[bins[i]] += 1
        b[bins[i + 1]] += 1
        c[bins[i + 2]] += 1
        d[bins[i + 3]] += 1
    for i in range(whole, n):
        a[bins[i]] += 1


@njit(cache=True, parallel=True, nogil=True)
def _histogram(
    query: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    table: np.ndarray,
    distances: int,
    levels: np.ndarray,
) -> np.ndarray:
    """levels: their number, [1], in a type that holds every bin: a narrow one is faster."""
    width = distances * int64(levels[0])
    counts = np.zeros((len(query), width), np.int64)
    words = np.empty((query.shape[1], CHUNK), np.uint64)
    masks = np.empty((query_labels.shape[1], CHUNK), np.uint64)
    for start in range(0, len(database), CHUNK):
        n = min(CHUNK, len(database) - start)
        by_word(database, start, n, words)
        by_word(database_labels, start, n, masks)
        for q in prange(len(query)):
            bins = np.empty(CHUNK, levels.dtype)
            distances_of(query[q], words, table, n, bins)
            _add_shared(query_labels[q], masks, n, levels, bins)
            parts = np.zeros((4, width), np.int32)
            _count(bins, n, parts)
            total = counts[q]
            for b in range(width):
                total[b] += parts[0, b] + parts[1, b] + parts[2, b] + parts[3, b]
    return counts


@njit(cache=True, parallel=True, nogil=True)
def _ordered(
    query: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    table: np.ndarray,
    left_out: np.ndarray,
    rank: np.ndarray,
    hits: np.ndarray,
    cuts: np.ndarray,
    gain: np.ndarray,
    discount: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """rank, hits: items and relevant items nearer than each distance, [Q, D]; counted up here."""
    shape = (len(query), len(cuts))
    precision, first = np.zeros(shape), np.zeros(shape)
    within, dcg = np.zeros(shape, np.int64), np.zeros(shape)
    words = np.empty((query.shape[1], CHUNK), np.uint64)
    masks = np.empty((query_labels.shape[1], CHUNK), np.uint64)
    for start in range(0, len(database), CHUNK):
        n = min(CHUNK, len(database) - start)
        by_word(database, start, n, words)
        by_word(database_labels, start, n, masks)
        for q in prange(len(query)):
            distance = np.empty(CHUNK, np.uint32)
            shared = np.zeros(CHUNK, np.uint32)
            distances_of(query[q], words, table, n, distance)
            _add_shared(query_labels[q], masks, n, np.ones(1, np.uint32), shared)
            ranks, found = rank[q], hits[q]
            skipped = left_out[q] - start
            for i in range(n):
                if i == skipped:
                    continue
                d = distance[i]
                ranks[d] += 1
                if shared[i]:
                    found[d] += 1
                    place, hit = ranks[d], found[d]
                    at = hit / place
                    for c in range(len(cuts)):
                        if place <= cuts[c]:
                            precision[q, c] += at
                            within[q, c] += 1
                            dcg[q, c] += gain[shared[i]] * discount[place - 1]
                        if hit <= cuts[c]:
                            first[q, c] += at
    return precision, within, first, dcg


def weight_table(weights: np.ndarray | None, words: int) -> np.ndarray:
    """Summed weights of the ones of every byte value at every byte of a code, [8 W, 256] uint32;
    without weights [0, 256].
    """
    if weights is None:
        return np.empty((0, 256), np.uint32)
    weights = np.pad(weights.astype(np.uint32), (0, words * 64 - len(weights)))
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (weights.reshape(-1, 8) @ ones.T.astype(np.uint32)).astype(np.uint32)


def _arrays(packed: Packed) -> tuple[np.ndarray, ...]:
    arrays = packed.query, packed.database, packed.query_labels, packed.database_labels
    table = weight_table(packed.weights, packed.query.shape[1])
    return *(np.ascontiguousarray(a).view(np.ndarray) for a in arrays), table


def use_threads() -> None:
    """As many threads as torch has, which `threads=` and OMP_NUM_THREADS set."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def histogram(packed: Packed) -> np.ndarray:
    """Items at each distance that share each number of labels: int64 [Q, distances, levels]."""
    narrow = packed.distances * packed.levels < 1 << 16
    levels = np.array([packed.levels], np.uint16 if narrow else np.uint32)
    with one_at_a_time:
        use_threads()
        counts = _histogram(*_arrays(packed), packed.distances, levels)
    return without_own(packed, counts.reshape(-1, packed.distances, packed.levels))


def ordered(packed: Packed, counts: np.ndarray, cuts: tuple[int, ...]) -> Ordered:
    """Sums over the ranking with ties in database order; counts: what `histogram` gave."""
    items, relevant = counts.sum(axis=2), counts[:, :, 1:].sum(axis=2)
    arguments = (
        *_arrays(packed),
        packed.left_out,
        np.cumsum(items, axis=1) - items,
        np.cumsum(relevant, axis=1) - relevant,
        np.array(cuts, np.int64),
        packed.gains,
        discounts(min(max(cuts, default=0), len(packed.database))),
    )
    with one_at_a_time:
        use_threads()
        precision, within, first, dcg = _ordered(*arguments)
    return Ordered(cuts, precision, within, first, dcg)
