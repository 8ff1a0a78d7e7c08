"""The measures, each under a name that cannot be misread.

Histograms over (distance, shared labels) give every measure whose expectation over tie orders has
a closed form; the others rank ties by database position (`index`). Formulas count, for each tie of
n items of which r are relevant, the A items (B of them relevant) that are nearer.

A query without a relevant item has no defined average precision. It is counted as 0 in the
headline value, as the field's releases do; a second value leaves such queries out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from vhabl.metrics.counts import Ordered, discounts, gains

ALL = 1 << 62  # the cut-off that cuts nothing
# any: ties do not matter; real: a ranking by real numbers, where the rare ties go by position
Ties = Literal["expected", "index", "best", "worst", "any", "real"]


@dataclass(frozen=True)
class Tally:
    """All that a measure sees of the codes.

    counts: [Q, D, S] database items at each distance that share 0 ... S - 1 labels with the query.
    ordered: sums over the ranking with ties by position, where a measure asks for them.
    unit: how many labels one level of `counts` stands for (less than 1 where labels have degrees).
    """

    counts: np.ndarray
    ordered: Ordered | None = None
    unit: float = 1.0

    @cached_property
    def items(self) -> np.ndarray:
        """Items at each distance, [Q, D]."""
        return self.counts.sum(axis=2)

    @cached_property
    def relevant(self) -> np.ndarray:
        """Relevant items at each distance, [Q, D]."""
        return self.counts[:, :, 1:].sum(axis=2)

    @cached_property
    def total(self) -> np.ndarray:
        """Relevant items of each query, [Q]."""
        return self.relevant.sum(axis=1)

    @cached_property
    def nearer(self) -> np.ndarray:
        """Items nearer than each distance: A, [Q, D]."""
        return np.cumsum(self.items, axis=1) - self.items

    def sums(self, name: str, cut: int) -> np.ndarray:
        """One of the ordered sums at a cut-off, [Q]."""
        assert self.ordered is not None
        return getattr(self.ordered, name)[:, self.ordered.cuts.index(cut)]


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, and NaN where there is nothing to count."""
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


def _harmonic(n: int) -> np.ndarray:
    """H_0 ... H_n, where H_i = 1 + 1/2 + ... + 1/i: float64 [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])


def average_precision(
    items: np.ndarray, relevant: np.ndarray, ties: Ties, cut: int | None = None
) -> np.ndarray:
    """Average precision of each query from distance histograms: mAP@all, or mAP@R/min.

    items, relevant: [Q, D] counts at each distance, nearest first; cut: R, or None for the whole
    database. Returns float64 [Q]; NaN for a query without a relevant item. ties: `expected` is the
    exact mean over all orders of the items at equal distance, `best` puts the relevant items of
    each tie first, `worst` last (both without a cut-off only).

    The item at place j of a tie is relevant with probability r/n, and then (j-1)(r-1)/(n-1) of the
    items before it in the tie are expected to be relevant, so the tie adds

        sum_j  r/n * (B + 1 + (j-1)(r-1)/(n-1)) / (A + j),   j = 1 ... min(n, R - A)

    to the sum of precisions, which is divided by min(R, relevant items) (McSherry & Najork, ECIR
    2008; He et al., CVPR 2018). Differences of harmonic numbers give each sum in closed form.

    >>> items, relevant = np.array([[1, 2]]), np.array([[0, 1]])
    >>> average_precision(items, relevant, "expected")  # (1/2 + 1/3) / 2
    array([0.41666667])
    >>> average_precision(items, relevant, "best"), average_precision(items, relevant, "worst")
    (array([0.5]), array([0.33333333]))
    >>> average_precision(items, relevant, "expected", cut=2)  # relevant at rank 2 half of the time
    array([0.25])
    """
    n = items.astype(np.int64)  # (Q, D)
    r = relevant.astype(np.int64)
    before = np.cumsum(n, axis=1) - n  # A
    hits = np.cumsum(r, axis=1) - r  # B
    harmonic = _harmonic(int(n.sum(axis=1).max(initial=0)))
    total = r.sum(axis=1)

    if ties == "expected":
        counted = n if cut is None else np.clip(cut - before, 0, n)
        places = harmonic[before + counted] - harmonic[before]  # sum_j 1 / (A + j)
        shift = counted - (before + 1) * places  # sum_j (j - 1) / (A + j)
        density = r / np.maximum(n, 1)
        others = (r - 1) / np.maximum(n - 1, 1)
        gain = density * ((hits + 1) * places + others * shift)
        if cut is not None:
            total = np.minimum(total, cut)
    elif ties == "best" and cut is None:  # sum_i (B + i) / (A + i), i = 1 ... r
        gain = r + (hits - before) * (harmonic[before + r] - harmonic[before])
    elif ties == "worst" and cut is None:  # the same after the n - r others of the tie
        start = before + n - r
        gain = r + (hits - start) * (harmonic[start + r] - harmonic[start])
    else:
        raise ValueError(f"order {ties!r} with cut-off {cut} cannot be computed from a histogram")
    gain = np.where(r > 0, gain, 0.0)
    return _divide(gain.sum(axis=1), total)


# -- measures of a query: Tally -> [Q], NaN where a query has no match -----------------------------


def ap_all(tally: Tally, ties: Ties) -> np.ndarray:
    """mAP@all: mean precision at the relevant items of the whole database."""
    if ties == "index":
        return _divide(tally.sums("precision", ALL), tally.total)
    return average_precision(tally.items, tally.relevant, ties)


def ap_hits(tally: Tally, cut: int) -> np.ndarray:
    """mAP@R/hits: mean precision at the hits within the first R ranks; without a hit 0."""
    return np.where(tally.total > 0, np.nan_to_num(ap_of_hits(tally, cut)), np.nan)


def ap_of_hits(tally: Tally, cut: int) -> np.ndarray:
    """As `ap_hits`, and not defined (NaN) for a query without a hit within the first R ranks: the
    mean over the others is what HQ's release reports.
    """
    return _divide(tally.sums("precision", cut), tally.sums("hits", cut))


def ap_min(tally: Tally, ties: Ties, cut: int) -> np.ndarray:
    """mAP@R/min: sum of precisions at the hits within R ranks, over min(R, relevant items)."""
    if ties == "index":
        return _divide(tally.sums("precision", cut), np.minimum(tally.total, cut))
    return average_precision(tally.items, tally.relevant, ties, cut)


def ap_first(tally: Tally, cut: int) -> np.ndarray:
    """mAP@first-k-relevant: mean precision at the first k relevant items, wherever they rank."""
    return _divide(tally.sums("first", cut), np.minimum(tally.total, cut))


def hits_at(tally: Tally, ties: Ties, cut: int) -> np.ndarray:
    """Relevant items among the first N ranks; `expected`: r m / n for the m places of a tie."""
    if ties == "index":
        return tally.sums("hits", cut).astype(np.float64)
    counted = np.clip(cut - tally.nearer, 0, tally.items)
    return (tally.relevant * counted / np.maximum(tally.items, 1)).sum(axis=1)


def precision_at(tally: Tally, ties: Ties, cut: int) -> np.ndarray:
    """Share of relevant items among the first N ranks (of a smaller database: among all).

    >>> tally = Tally(np.array([[[1, 0], [1, 1]]]))  # an irrelevant item, then a tie of two
    >>> precision_at(tally, "expected", 2)
    array([0.25])
    """
    return hits_at(tally, ties, cut) / np.minimum(cut, tally.items.sum(axis=1))


def recall_at(tally: Tally, ties: Ties, cut: int) -> np.ndarray:
    """Share of a query's relevant items that are among the first N ranks."""
    return _divide(hits_at(tally, ties, cut), tally.total)


def ndcg_at(tally: Tally, ties: Ties, cut: int) -> np.ndarray:
    """NDCG@N with gain 2^shared labels - 1 and discount log2(rank + 1) (Jarvelin & Kekalainen,
    TOIS 2002); `expected`: every place of a tie has the tie's mean gain.

    >>> tally = Tally(np.array([[[1, 0], [0, 1]]]))  # the relevant item ranks second
    >>> ndcg_at(tally, "expected", 2) * np.log2(3)
    array([1.])
    """
    gain = gains(tally.counts.shape[2], tally.unit)
    discount = discounts(int(tally.items[0].sum()))
    summed = np.concatenate([[0.0], np.cumsum(discount)])  # of the first 0, 1, 2 ... ranks
    first = min(cut, len(discount))
    per_level = tally.counts.sum(axis=1)[:, ::-1]  # (Q, S), the highest gain first
    upto = np.minimum(np.cumsum(per_level, axis=1), first)
    at_level = np.diff(summed[upto], axis=1, prepend=0.0)  # discounts that fall to each level
    ideal = at_level @ gain[::-1]
    if ties == "index":
        return _divide(tally.sums("dcg", cut), ideal)
    start = np.minimum(tally.nearer, first)
    end = np.minimum(tally.nearer + tally.items, first)
    mean_gain = (tally.counts @ gain) / np.maximum(tally.items, 1)
    return _divide((mean_gain * (summed[end] - summed[start])).sum(axis=1), ideal)


def first_match_rank(tally: Tally) -> np.ndarray:
    """Expected rank of the first relevant item: A + (n + 1) / (r + 1) in the first tie with one.

    >>> first_match_rank(Tally(np.array([[[1, 0], [1, 1]]])))  # after one item, first of two or not
    array([2.5])
    """
    first = (tally.relevant > 0).argmax(axis=1)[:, None]
    n, r, before = (
        np.take_along_axis(a, first, axis=1)[:, 0]
        for a in (tally.items, tally.relevant, tally.nearer)
    )
    return np.where(tally.total > 0, before + (n + 1) / (r + 1), np.nan)


def precision_within(tally: Tally, radius: int) -> np.ndarray:
    """Share of relevant items within a Hamming radius; an empty ball counts as 0."""
    return np.nan_to_num(precision_in_ball(tally, radius))


def precision_in_ball(tally: Tally, radius: int) -> np.ndarray:
    """Share of relevant items within a Hamming radius; NaN for an empty ball."""
    ball = slice(0, radius + 1)
    return _divide(tally.relevant[:, ball].sum(axis=1), tally.items[:, ball].sum(axis=1))


def recall_within(tally: Tally, radius: int) -> np.ndarray:
    """Share of a query's relevant items that lie within a Hamming radius."""
    return _divide(tally.relevant[:, : radius + 1].sum(axis=1), tally.total)


def empty_ball(tally: Tally, radius: int) -> np.ndarray:
    """1 where no item lies within a Hamming radius of the query, else 0."""
    return (tally.items[:, : radius + 1].sum(axis=1) == 0).astype(np.float64)


# -- measures of the codes alone -------------------------------------------------------------------


def code_statistics(codes: np.ndarray) -> dict[str, float]:
    """What can be said of +-1 codes [N, K] without a query or a label.

    - bit balance: mean over bits of |mean of the bit|; 0 where half of the items have each value;
    - bit correlation: mean |Pearson correlation| of two bits, over pairs of bits that vary;
    - distinct codes: share of items times codes, distinct / N;
    - expected collisions: items with the same code as an item drawn at random, itself left out.

    >>> code_statistics(np.array([[1, 1], [1, -1], [1, 1], [-1, -1]]))["expected collisions"]
    0.5
    """
    items = len(codes)
    means = codes.mean(axis=0, dtype=np.float64)
    varying = np.abs(means) < 1
    x = codes[:, varying].astype(np.float32)
    covariance = (x.T @ x) / items - np.outer(means[varying], means[varying])
    spread = np.sqrt(1 - means[varying] ** 2)
    correlation = np.abs(covariance / np.outer(spread, spread))
    pairs = len(correlation) * (len(correlation) - 1)
    packed = np.packbits(codes > 0, axis=1)
    counts = np.unique(packed, axis=0, return_counts=True)[1].astype(np.float64)
    return {
        "bit balance": float(np.abs(means).mean()),
        "bit correlation": float((correlation.sum() - np.trace(correlation)) / max(1, pairs)),
        "distinct codes": len(counts) / items,
        "expected collisions": float((counts * (counts - 1)).sum() / items),
    }


# -- the list --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A measure by name. cut: the cut-off at which it needs `Ordered` sums, if it does.

    counted_as_zero: queries for which it is not defined are 0 in the headline value; else they are
    left out of it.
    """

    name: str
    ties: Ties
    of: Callable[[Tally], np.ndarray]
    cut: int | None = None
    counted_as_zero: bool = True


def _with_ties(name: str, function: Callable[..., np.ndarray], cut: int) -> list[Measure]:
    """A measure with a cut-off in expected order and in index order."""
    return [
        Measure(name, "expected", partial(function, ties="expected", cut=cut)),
        Measure(name, "index", partial(function, ties="index", cut=cut), cut),
    ]


WITH_HIT = " (queries with a hit)"  # how the name of a mean ends that leaves out the others


def cut_off_measures(cut: int) -> list[Measure]:
    """The three cut-off forms of mAP at R = k = cut; of mAP@R/hits also the mean over the queries
    that have a hit within the first R.
    """
    with_hit = partial(ap_of_hits, cut=cut)
    return [
        Measure(f"mAP@{cut}/hits", "index", partial(ap_hits, cut=cut), cut),
        Measure(f"mAP@{cut}/hits{WITH_HIT}", "index", with_hit, cut, counted_as_zero=False),
        *_with_ties(f"mAP@{cut}/min", ap_min, cut),
        Measure(f"mAP@first-{cut}-relevant", "index", partial(ap_first, cut=cut), cut),
    ]


HEADLINE = (Measure("mAP@all", "expected", partial(ap_all, ties="expected")),)
MEASURES: tuple[Measure, ...] = (
    *HEADLINE,
    Measure("mAP@all", "index", partial(ap_all, ties="index"), ALL),
    Measure("mAP@all", "best", partial(ap_all, ties="best")),
    Measure("mAP@all", "worst", partial(ap_all, ties="worst")),
    *cut_off_measures(50),
    *cut_off_measures(5000),
    *_with_ties("precision@100", precision_at, 100),
    *_with_ties("recall@100", recall_at, 100),
    *_with_ties("NDCG@100", ndcg_at, 100),
    Measure("precision within radius 2", "any", partial(precision_within, radius=2)),
    Measure("recall within radius 2", "any", partial(recall_within, radius=2)),
    Measure("first-match rank", "expected", first_match_rank, counted_as_zero=False),
)
RANKS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


RADII = 32  # steps of a curve over radii, at most


def curves(bits: int) -> tuple[Measure, ...]:
    """Precision and recall over ranks, and over Hamming radii 0 ... K (every K/32-th where K > 32).

    The precision of a ball is averaged over the queries whose ball is not empty; the share of empty
    balls stands beside it.
    """
    over_ranks = [
        Measure(f"{name}@{n}", "expected", partial(function, ties="expected", cut=n))
        for n in RANKS
        for name, function in (("precision", precision_at), ("recall", recall_at))
    ]
    over_radii = [
        Measure(
            f"{name} at radius {radius}",
            "any",
            partial(function, radius=radius),
            counted_as_zero=name != "ball precision",
        )
        for radius in [*range(0, bits, -(-bits // RADII)), bits]
        for name, function in (
            ("ball precision", precision_in_ball),
            ("ball recall", recall_within),
            ("empty balls", empty_ball),
        )
    ]
    return *over_ranks, *over_radii
