"""The histogram on a CUDA device: one program a query and a share of the database.

Packed words are compared as 32-bit halves; every program counts its share in registers and adds it
to the query's histogram once. Ties in database order need a sort: there the torch kernel serves.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from vhabl.metrics import kernel_torch
from vhabl.metrics.counts import Packed, without_own

BLOCK = 1024  # items compared at once
SHARES = 16  # programs a query

ordered = kernel_torch.ordered


@triton.jit
def _popcount(x):  # type: ignore[no-untyped-def]
    """Ones of each 32-bit word, by adding neighbouring fields of 1, 2, 4 and 8 bits."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    query,
    database,
    query_labels,
    database_labels,
    counts,
    items,
    share,
    width,
    WORDS: tl.constexpr,
    MASKS: tl.constexpr,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """database [WORDS, N] and database_labels [MASKS, N] are laid out by word."""
    q = tl.program_id(0)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, items)
    found = tl.zeros((BINS,), tl.int32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        distance = tl.zeros((BLOCK,), tl.uint32)
        for w in tl.static_range(WORDS):
            word = tl.load(database + w * items + at, mask=inside, other=0).to(tl.uint32)
            distance += _popcount(word ^ tl.load(query + q * WORDS + w).to(tl.uint32))
        shared = tl.zeros((BLOCK,), tl.uint32)
        for w in tl.static_range(MASKS):
            word = tl.load(database_labels + w * items + at, mask=inside, other=0).to(tl.uint32)
            shared += _popcount(word & tl.load(query_labels + q * MASKS + w).to(tl.uint32))
        bins = (distance * LEVELS + shared).to(tl.int32)
        found += tl.histogram(tl.where(inside, bins, BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    # The last bin, which no distance reaches, holds the places beyond the end.
    tl.atomic_add(counts + q * width + bins, found, mask=bins < width)


def _by_word(words: np.ndarray, device: torch.device) -> torch.Tensor:
    halves = np.ascontiguousarray(words).view(np.int32)
    return torch.from_numpy(halves).to(device).t().contiguous()


def histogram(packed: Packed, device: torch.device | None = None) -> np.ndarray:
    """Items at each distance that share each number of labels: int64 [Q, distances, levels]."""
    device = device or kernel_torch.default_device()
    width = packed.distances * packed.levels
    if packed.weights is not None or width >= 1 << 13 or len(packed.query) == 0:
        return kernel_torch.histogram(packed, device)
    database = _by_word(packed.database, device)
    masks = _by_word(packed.database_labels, device)
    query = torch.from_numpy(np.ascontiguousarray(packed.query).view(np.int32)).to(device)
    labels = torch.from_numpy(np.ascontiguousarray(packed.query_labels).view(np.int32)).to(device)
    queries, items = len(query), database.shape[1]
    counts = torch.zeros(queries, width, dtype=torch.int32, device=device)
    share = -(-max(1, items) // (SHARES * BLOCK)) * BLOCK
    _kernel[(queries, -(-items // share))](
        query, database, labels, masks, counts, items, share, width,
        WORDS=query.shape[1], MASKS=labels.shape[1], LEVELS=packed.levels,
        BINS=triton.next_power_of_2(width + 1), BLOCK=BLOCK,
    )  # fmt: skip
    shape = queries, packed.distances, packed.levels
    return without_own(packed, counts.view(shape).cpu().numpy().astype(np.int64))
