"""The measures, each under a name that cannot be misread.

A query without a relevant item has no defined average precision. It is counted as 0 in the
headline value, as the field's releases do, and `queries_without_match` says how many there were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vhabl.metrics.hamming import (
    hamming_distances,
    query_blocks,
    relevance_histogram,
    shared_labels,
)
from vhabl.types import Codes

Ties = Literal["expected", "index", "best", "worst"]


def _harmonic(n: int) -> np.ndarray:
    """H_0 ... H_n, where H_i = 1 + 1/2 + ... + 1/i: float64 [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])


def average_precision(items: np.ndarray, relevant: np.ndarray, ties: Ties) -> np.ndarray:
    """Average precision of each query over the whole database, from distance histograms.

    items, relevant: [Q, D] counts at each distance, nearest first. Returns float64 [Q]; NaN for a
    query without a relevant item. ties: `expected` is the exact mean over all orders of the items
    at equal distance, `best` puts the relevant items of each tie first, `worst` last.

    With A items (B relevant) nearer than a tie of n items (r relevant), the item at place j of the
    tie is relevant with probability r/n, and then (j-1)(r-1)/(n-1) of the items before it in the
    tie are expected to be relevant, so the tie adds

        sum_j  r/n * (B + 1 + (j-1)(r-1)/(n-1)) / (A + j)

    to the sum of precisions (McSherry & Najork, ECIR 2008; He et al., CVPR 2018). Differences of
    harmonic numbers give each sum over j in closed form.

    >>> items, relevant = np.array([[1, 2]]), np.array([[0, 1]])
    >>> average_precision(items, relevant, "expected")  # (1/2 + 1/3) / 2
    array([0.41666667])
    >>> average_precision(items, relevant, "best"), average_precision(items, relevant, "worst")
    (array([0.5]), array([0.33333333]))
    """
    n = items.astype(np.int64)  # (Q, D)
    r = relevant.astype(np.int64)
    before = np.cumsum(n, axis=1) - n  # A
    hits = np.cumsum(r, axis=1) - r  # B
    harmonic = _harmonic(int(n.sum(axis=1).max(initial=0)))

    if ties == "expected":
        places = harmonic[before + n] - harmonic[before]  # sum_j 1 / (A + j)
        shift = n - (before + 1) * places  # sum_j (j - 1) / (A + j)
        density = r / np.maximum(n, 1)
        others = (r - 1) / np.maximum(n - 1, 1)
        gain = density * ((hits + 1) * places + others * shift)
    elif ties == "best":  # sum_i (B + i) / (A + i), i = 1 ... r
        gain = r + (hits - before) * (harmonic[before + r] - harmonic[before])
    elif ties == "worst":  # the same after the n - r others of the tie
        start = before + n - r
        gain = r + (hits - start) * (harmonic[start + r] - harmonic[start])
    else:
        raise ValueError(f"order {ties!r} cannot be computed from a histogram")
    gain = np.where(r > 0, gain, 0.0)
    total = r.sum(axis=1)
    return np.where(total > 0, gain.sum(axis=1) / np.maximum(total, 1), np.nan)


@dataclass(frozen=True)
class Ranking:
    """Relevance in the stable order by distance, then by database position, for a block of queries.

    relevant [b, N] bool, shared [b, N] (shared labels) and distance [b, N], all in ranked order.
    """

    relevant: np.ndarray
    shared: np.ndarray
    distance: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Relevant items up to and including each rank: [b, N]."""
        return np.cumsum(self.relevant, axis=1)

    @property
    def precisions(self) -> np.ndarray:
        """Precision at the rank of each relevant item, 0 at the others: [b, N]."""
        ranks = np.arange(1, self.relevant.shape[1] + 1)
        return np.where(self.relevant, self.hits / ranks, 0.0)


def rank(codes: Codes, rows: slice) -> Ranking:
    """Rank the whole database for the queries in `rows`; ties by database position."""
    distances = hamming_distances(codes.query[rows], codes.database)
    shared = shared_labels(codes.query_labels[rows], codes.database_labels)
    # A stable sort of 16-bit integers is a radix sort: linear in the database.
    small = np.int16 if codes.bits < 1 << 15 else np.int32
    order = np.argsort(distances.astype(small), axis=1, kind="stable")
    shared = np.take_along_axis(shared, order, axis=1)
    return Ranking(shared > 0, shared, np.take_along_axis(distances, order, axis=1))


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, and NaN where there is nothing to count."""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def ap_all(ranking: Ranking) -> np.ndarray:
    """Average precision over the whole database, in the order given."""
    return _divide(ranking.precisions.sum(axis=1), ranking.relevant.sum(axis=1))


def ap_hits(ranking: Ranking, n: int) -> np.ndarray:
    """mAP@R/hits: mean precision over the hits within the first R ranks."""
    return _divide(ranking.precisions[:, :n].sum(axis=1), ranking.relevant[:, :n].sum(axis=1))


def ap_min(ranking: Ranking, n: int) -> np.ndarray:
    """mAP@R/min: precisions within the first R ranks over min(R, relevant items)."""
    total = np.minimum(ranking.relevant.sum(axis=1), n)
    return _divide(ranking.precisions[:, :n].sum(axis=1), total)


def ap_first(ranking: Ranking, n: int) -> np.ndarray:
    """mAP@first-k-relevant: mean precision of the first k relevant items, wherever they rank."""
    among_first = ranking.relevant & (ranking.hits <= n)
    return _divide((ranking.precisions * among_first).sum(axis=1), among_first.sum(axis=1))


def precision_at(ranking: Ranking, n: int) -> np.ndarray:
    """Share of relevant items among the first N ranks (a smaller database counts as it is)."""
    return ranking.relevant[:, :n].mean(axis=1)


def precision_within(ranking: Ranking, radius: int) -> np.ndarray:
    """Share of relevant items within a Hamming radius; an empty ball counts as 0."""
    ball = ranking.distance <= radius
    return (ball & ranking.relevant).sum(axis=1) / np.maximum(ball.sum(axis=1), 1)


def ndcg_at(ranking: Ranking, n: int) -> np.ndarray:
    """NDCG@N with gain 2^shared labels - 1 and discount log2(rank + 1) (Jarvelin & Kekalainen)."""
    discount = np.log2(np.arange(2, min(n, ranking.shared.shape[1]) + 2))
    gains = np.exp2(ranking.shared) - 1.0
    ideal = -np.sort(-gains, axis=1)[:, :n]
    return _divide((gains[:, :n] / discount).sum(axis=1), (ideal / discount).sum(axis=1))


@dataclass(frozen=True)
class Measure:
    """A measure by name: computed per query from a ranking (index order) or from histograms."""

    name: str
    ties: Ties
    of_ranking: Callable[[Ranking], np.ndarray] | None = None


MEASURES: tuple[Measure, ...] = (
    Measure("mAP@all", "expected"),
    Measure("mAP@all", "index", ap_all),
    Measure("mAP@all", "best"),
    Measure("mAP@all", "worst"),
    Measure("mAP@5000/hits", "index", lambda r: ap_hits(r, 5000)),
    Measure("mAP@5000/min", "index", lambda r: ap_min(r, 5000)),
    Measure("mAP@first-5000-relevant", "index", lambda r: ap_first(r, 5000)),
    Measure("precision@100", "index", lambda r: precision_at(r, 100)),
    Measure("precision within radius 2", "index", lambda r: precision_within(r, 2)),
    Measure("NDCG@100", "index", lambda r: ndcg_at(r, 100)),
)
HEADLINE = MEASURES[:1]


@dataclass(frozen=True)
class Value:
    """One measure of one set of codes. `value` counts queries without a match as 0."""

    measure: str
    ties: Ties
    value: float
    value_matched_only: float
    queries: int
    queries_without_match: int


def evaluate(codes: Codes, measures: tuple[Measure, ...] = HEADLINE) -> list[Value]:
    """Every measure of these codes, in the order asked for.

    One pass over the database for the histogram measures, one for the ranked ones; neither holds
    more than a block of queries against the database.
    """
    ranked = [m for m in measures if m.of_ranking is not None]
    per_query: dict[Measure, np.ndarray] = {m: np.empty(len(codes.query)) for m in ranked}
    if ranked:
        for rows in query_blocks(len(codes.query), 8 * len(codes.database)):
            ranking = rank(codes, rows)
            for m in ranked:
                assert m.of_ranking is not None
                per_query[m][rows] = m.of_ranking(ranking)
    histogram = relevance_histogram(
        codes.query, codes.database, codes.query_labels, codes.database_labels
    )
    for m in measures:
        if m.of_ranking is None:
            per_query[m] = average_precision(*histogram, m.ties)

    matched = histogram[1].sum(axis=1) > 0
    return [
        Value(
            measure=m.name,
            ties=m.ties,
            value=float(np.nan_to_num(per_query[m]).mean()),
            value_matched_only=float(np.nan_to_num(per_query[m])[matched].mean())
            if matched.any()
            else 0.0,
            queries=len(matched),
            queries_without_match=int((~matched).sum()),
        )
        for m in measures
    ]
