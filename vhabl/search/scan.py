"""The nearest codes of queries: an exact scan, and one that a short prefix leads.

Codes are rows of 64-bit words (`to_words`). Items at equal distance come in the order of their
rows. A kernel keeps, for each query, what is nearer than the k-th nearest so far; a full buffer is
cut back to k by counting distances, so that no item is sorted but those returned.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, uint64

from vhabl.metrics.kernel_numba import CHUNK, by_word, distances_of, popcount, weight_table

PREFIX = 16  # bits that buckets are made of
ALL = np.uint64(2**64 - 1)
_EVERY = np.zeros(0, np.uint8)
_BY_ONES = np.argsort(np.bitwise_count(np.arange(2**PREFIX, dtype=np.uint32)), kind="stable")
_BY_ONES = _BY_ONES.astype(np.int64)  # prefixes by their distance from any: xor with its own


def to_words(packed: np.ndarray) -> np.ndarray:
    """Bytes of codes [N, B] as 64-bit words [N, ceil(B / 8)]: no copy where 8 divides B."""
    rest = -packed.shape[1] % 8
    if rest:
        packed = np.pad(packed, ((0, 0), (0, rest)))
    return np.ascontiguousarray(packed).view(np.uint64)


def prefixes(packed: np.ndarray) -> np.ndarray:
    """The first `PREFIX` bits of codes as numbers, [N]; zeros after the end of a shorter code."""
    first = np.zeros((len(packed), 2), np.uint8)
    first[:, : packed.shape[1]] = packed[:, :2]
    return first.view(np.uint16)[:, 0]


def buckets(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of codes [N, B] by prefix, [N], and the first row of each bucket in that order,
    [2^PREFIX + 1].
    """
    ahead = prefixes(packed)
    order = np.argsort(ahead, kind="stable")
    return order, np.searchsorted(ahead[order], np.arange(2**PREFIX + 1)).astype(np.int64)


def masks(bits: int) -> np.ndarray:
    """Ones for the first bits of a code's words: [ceil(bits / 64)]."""
    whole, rest = divmod(bits, 64)
    last = [2**rest - 1] if rest else []
    return np.array([2**64 - 1] * whole + last, np.uint64)


def exact(
    query: np.ndarray,
    database: np.ndarray,
    bits: int,
    top: int,
    allowed: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances [Q, k] and rows [Q, k] of the k = min(top, N) nearest of words [N, W] for query
    words [Q, W], by their first bits; -1 where fewer are allowed. allowed: 0 for items that take
    no part, [N] uint8. weights: of each bit in a distance, [bits] of integers; 1 without.
    """
    k, mask = min(top, len(database)), masks(bits)
    query = query[:, : len(mask)] & mask
    some = _EVERY if allowed is None else allowed
    table = weight_table(weights, len(mask))
    farthest = bits if weights is None else int(weights.sum())
    found = in_parts(
        lambda rows: _exact(query[rows], database, mask, k, some, table, farthest), len(query)
    )
    return found[0], found[1]


def by_prefix(
    query: np.ndarray,
    database: np.ndarray,
    starts: np.ndarray,
    bits: int,
    top: int,
    budget: int,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact`, of the items whose prefixes are nearest to the query's: bucket by bucket until
    `budget` items were compared, or until no other item can be nearer. Items at equal distance
    come in the order in which they were met.

    database and starts: as `buckets` orders them.
    bits: at least `PREFIX`.
    """
    k, mask = min(top, len(database)), masks(bits)
    some = _EVERY if allowed is None else allowed
    own = query[:, 0] & np.uint64(2**PREFIX - 1)  # the first bits of a word are its lowest
    found = in_parts(
        lambda rows: _by_prefix(
            query[rows], own[rows], database, mask, starts, k, budget, some, _BY_ONES
        ),
        len(query),
    )
    return found[0], found[1]


def by_centres(features: np.ndarray, centres: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Inner products [Q, R] of features [Q, d] with the sums of centres [M, J, d] that choices
    [Q, R, M] name: the second stage of HQ. Of so few items no table of all centres is made.
    """
    (found,) = in_parts(
        lambda rows: (_by_centres(features[rows], centres, choices[rows]),), len(features)
    )
    return found


def in_parts(run: Callable[[slice], tuple[np.ndarray, ...]], queries: int) -> list[np.ndarray]:
    """What `run` gives for rows of queries, joined: a part on each of torch's threads. A kernel
    with threads of its own would start them for every chunk, which takes longer than one query.
    """
    threads = max(1, min(torch.get_num_threads(), queries))
    if threads == 1:
        return list(run(slice(None)))
    ends = np.linspace(0, queries, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:  # the kernels leave the interpreter's lock
        parts = list(pool.map(run, map(slice, ends, ends[1:])))
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


@njit(cache=True, nogil=True, fastmath=True)  # a sum in any order
def _by_centres(features: np.ndarray, centres: np.ndarray, choices: np.ndarray) -> np.ndarray:
    found = np.empty(choices.shape[:2], np.float32)
    for q in range(len(features)):
        for r in range(choices.shape[1]):
            total = np.float32(0)
            for m in range(choices.shape[2]):
                row = choices[q, r, m]
                for i in range(features.shape[1]):
                    total += features[q, i] * centres[m, row, i]
            found[q, r] = total
    return found


@njit(cache=True, nogil=True)
def _cut(
    distance: np.ndarray, row: np.ndarray, count: int, k: int, bins: np.ndarray
) -> tuple[int, int]:
    """Keep the k nearest of a buffer in their order: how many are left, and the distance from
    which on nothing enters any more.
    """
    if count < k:
        return count, len(bins)
    bins[:] = 0
    for i in range(count):
        bins[distance[i]] += 1
    nearer, limit = 0, 0
    while nearer + bins[limit] < k:
        nearer += bins[limit]
        limit += 1
    room, kept = k - nearer, 0
    for i in range(count):
        if distance[i] < limit or (distance[i] == limit and room > 0):
            room -= distance[i] == limit
            distance[kept], row[kept] = distance[i], row[i]
            kept += 1
    return kept, limit


@njit(cache=True, nogil=True)
def _sorted(
    distance: np.ndarray, row: np.ndarray, count: int, bins: np.ndarray,
    out_distance: np.ndarray, out_row: np.ndarray,
) -> None:  # fmt: skip
    """Write a buffer by distance, rows of equal distance in their order."""
    bins[:] = 0
    for i in range(count):
        bins[distance[i]] += 1
    place = 0
    for d in range(len(bins)):
        bins[d], place = place, place + bins[d]
    for i in range(count):
        at = bins[distance[i]]
        bins[distance[i]] += 1
        out_distance[at], out_row[at] = distance[i], row[i]


@njit(cache=True, nogil=True)
def _exact(
    query: np.ndarray, database: np.ndarray, masks: np.ndarray, k: int, allowed: np.ndarray,
    table: np.ndarray, farthest: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    room = 4 * k + 64
    far = farthest + 1  # a distance that no item has
    distance = np.empty((len(query), room), np.int32)
    row = np.empty((len(query), room), np.int64)
    counts = np.zeros(len(query), np.int64)
    limits = np.full(len(query), far, np.int64)
    found_distance = np.full((len(query), k), -1, np.int32)
    found_row = np.full((len(query), k), -1, np.int64)
    words = np.empty((query.shape[1], CHUNK), np.uint64)
    bins = np.empty(far, np.int64)
    near = np.empty(CHUNK, np.int32)
    for start in range(0, len(database), CHUNK):
        n = min(CHUNK, len(database) - start)
        by_word(database[:, : len(masks)], start, n, words)
        if masks[-1] != ALL:
            words[-1, :n] &= masks[-1]
        for q in range(len(query)):
            distances_of(query[q], words, table, n, near)
            count, limit = counts[q], limits[q]
            for i in range(n):
                if near[i] < limit and (len(allowed) == 0 or allowed[start + i]):
                    distance[q, count], row[q, count] = near[i], start + i
                    count += 1
                    if count == room:
                        count, limit = _cut(distance[q], row[q], count, k, bins)
            counts[q], limits[q] = count, limit
    for q in range(len(query)):
        count, _ = _cut(distance[q], row[q], counts[q], k, bins)
        _sorted(distance[q], row[q], count, bins, found_distance[q], found_row[q])
    return found_distance, found_row


@njit(cache=True, nogil=True)
def _by_prefix(
    query: np.ndarray, query_prefix: np.ndarray, database: np.ndarray, masks: np.ndarray,
    starts: np.ndarray, k: int, budget: int, allowed: np.ndarray, by_ones: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    room, width = 4 * k + 64, len(masks)
    far = 64 * width + 1
    found_distance = np.full((len(query), k), -1, np.int32)
    found_row = np.full((len(query), k), -1, np.int64)
    distance, row = np.empty(room, np.int32), np.empty(room, np.int64)
    bins = np.empty(far, np.int64)
    for q in range(len(query)):
        count, limit, seen = 0, far, 0
        own = np.int64(query_prefix[q])
        for change in by_ones:
            if seen >= budget and count >= k:
                break
            if limit <= popcount(uint64(change)):  # at least so far is what is left
                break
            bucket = own ^ change
            for i in range(starts[bucket], starts[bucket + 1]):
                if len(allowed) and not allowed[i]:
                    continue
                near = 0
                for w in range(width):
                    near += popcount((query[q, w] ^ database[i, w]) & masks[w])
                if near < limit:
                    distance[count], row[count] = near, i
                    count += 1
                    if count == room:
                        count, limit = _cut(distance, row, count, k, bins)
            seen += starts[bucket + 1] - starts[bucket]
        count, limit = _cut(distance, row, count, k, bins)
        _sorted(distance, row, count, bins, found_distance[q], found_row[q])
    return found_distance, found_row
