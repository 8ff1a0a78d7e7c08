"""The kernels in plain torch, for any device: matrix products of +-1 in blocks.

Every product is exact: float32 holds all integers up to 2^24.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vhabl.metrics.counts import Ordered, Packed, discounts, without_own

PAIRS = 1 << 24  # query-item pairs held at once
ITEMS = 1 << 14  # database items compared at once


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unpack(words: np.ndarray, bits: int, device: torch.device) -> Tensor:
    """Rows of words to float32 [N, bits] of 0 and 1."""
    raw = torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).to(device)
    places = torch.arange(8, device=device, dtype=torch.uint8)
    return ((raw[:, :, None] >> places) & 1).flatten(1)[:, :bits].float()


class _Sides:
    """Codes and labels of some rows as matrices whose product is a distance or a shared count."""

    def __init__(
        self, packed: Packed, codes: np.ndarray, labels: np.ndarray, device: torch.device
    ) -> None:
        self.ones = unpack(codes, packed.bits, device)
        self.labels = unpack(labels, labels.shape[1] * 64, device)


def _pairs(packed: Packed, q: _Sides, d: _Sides, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and shared labels, [b, n] int64 each. With ones x, y and weights w the distance is
    w.x + w.y - 2 (w x).y.
    """
    x, y = q.ones * weights, d.ones
    distance = x.sum(1)[:, None] + (y @ weights)[None, :] - 2 * (x @ y.T)
    return distance.long(), (q.labels @ d.labels.T).long()


def _blocks(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _weights(packed: Packed, device: torch.device) -> Tensor:
    if packed.weights is None:
        return torch.ones(packed.bits, device=device)
    return torch.from_numpy(packed.weights).float().to(device)


def histogram(packed: Packed, device: torch.device | None = None) -> np.ndarray:
    """Items at each distance that share each number of labels: int64 [Q, distances, levels]."""
    device = device or default_device()
    queries, width = len(packed.query), packed.distances * packed.levels
    counts = torch.zeros(queries, width, dtype=torch.int64, device=device)
    weights = _weights(packed, device)
    for rows in _blocks(len(packed.database), ITEMS):
        d = _Sides(packed, packed.database[rows], packed.database_labels[rows], device)
        for block in _blocks(queries, max(1, PAIRS // ITEMS)):
            q = _Sides(packed, packed.query[block], packed.query_labels[block], device)
            distance, shared = _pairs(packed, q, d, weights)
            bins = distance * packed.levels + shared
            counts[block].scatter_add_(1, bins, torch.ones_like(bins))
    found = counts.view(queries, packed.distances, packed.levels).cpu().numpy()
    return without_own(packed, found)


def ordered(
    packed: Packed, counts: np.ndarray, cuts: tuple[int, ...], device: torch.device | None = None
) -> Ordered:
    """Sums over the ranking with ties in database order, from a stable sort of query blocks."""
    device = device or default_device()
    items = len(packed.database)
    weights = _weights(packed, device)
    d = _Sides(packed, packed.database, packed.database_labels, device)
    ranks = torch.arange(1, items + 1, device=device)
    gain = torch.from_numpy(packed.gains).to(device)
    discount = torch.from_numpy(discounts(items)).to(device)
    sums: list[tuple[Tensor, ...]] = []
    for block in _blocks(len(packed.query), max(1, PAIRS // max(1, 8 * items))):
        q = _Sides(packed, packed.query[block], packed.query_labels[block], device)
        distance, shared = _pairs(packed, q, d, weights)
        own = torch.from_numpy(packed.left_out[block]).to(device)
        rows = (own >= 0).nonzero().flatten()  # an item left out goes last and matches nothing
        distance[rows, own[rows]], shared[rows, own[rows]] = packed.distances, 0
        shared = shared.gather(1, distance.argsort(dim=1, stable=True))  # in ranked order
        relevant = shared > 0
        found = relevant.cumsum(1)
        at = torch.where(relevant, found.double() / ranks, 0.0)
        gained = gain[shared] * discount
        sums.append(
            (
                torch.stack([at[:, :cut].sum(1) for cut in cuts], 1),
                torch.stack([relevant[:, :cut].sum(1) for cut in cuts], 1),
                torch.stack([torch.where(found <= cut, at, 0.0).sum(1) for cut in cuts], 1),
                torch.stack([gained[:, :cut].sum(1) for cut in cuts], 1),
            )
        )
    precision, hits, first, dcg = (
        torch.cat(part).cpu().numpy() for part in zip(*sums, strict=True)
    )
    return Ordered(cuts, precision, hits, first, dcg)
