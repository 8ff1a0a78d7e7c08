"""Distances and measures against hand-worked cases, enumeration and published codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhabl import codes as code_files
from vhabl.metrics import (
    HEADLINE,
    MEASURES,
    Measure,
    Ties,
    average_precision,
    code_statistics,
    curves,
    evaluate,
    evaluate_ranking,
    hamming_distances,
    integer_weights,
    per_query,
)
from vhabl.metrics.counts import Packed, pack_labels, pack_words
from vhabl.metrics.evaluation import tally_of
from vhabl.metrics.hamming import shared_labels
from vhabl.metrics.measures import (
    ALL,
    Tally,
    ap_all,
    ap_first,
    ap_hits,
    ap_min,
    ap_of_hits,
    empty_ball,
    first_match_rank,
    ndcg_at,
    precision_at,
    precision_in_ball,
    precision_within,
    recall_at,
    recall_within,
)
from vhabl.system.errors import VhablError
from vhabl.types import Codes

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickrhashcode"
TIES: tuple[Ties, ...] = ("expected", "index", "best", "worst")
OVER_ALL = tuple(m for m in MEASURES if m.name == "mAP@all")

# A case worked by hand. One query; six items, by position:
#   position        0  1  2  3  4  5
#   distance        1  0  1  2  2  4
#   shared labels   1  0  2  0  1  0
# Ranked, ties by position (1, 0, 2, 3, 4, 5):
#   relevant        0    1    1    0    1    0
#   precision       0   1/2  2/3   0   3/5   0
# A second query is 2 away from what the first is 0, 1 or 2 away from; no item has its label.
HAND = Codes(
    query=np.array([[1, 1, 1, 1, -1, -1], [1, 1, 1, 1, 1, 1]], np.int8),
    database=np.array(
        [
            [-1, 1, 1, 1, -1, -1],
            [1, 1, 1, 1, -1, -1],
            [1, -1, 1, 1, -1, -1],
            [1, 1, -1, -1, -1, -1],
            [-1, -1, 1, 1, -1, -1],
            [-1, -1, -1, -1, -1, -1],
        ],
        np.int8,
    ),
    query_labels=np.array([[1, 1, 0, 0], [0, 0, 0, 1]], np.uint8),
    database_labels=np.array(
        [[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        np.uint8,
    ),
)


def random_codes(
    queries: int, items: int, bits: int, classes: int = 3, seed: int = 0, density: float = 0.4
) -> Codes:
    rng = np.random.default_rng(seed)

    def signs(rows: int) -> np.ndarray:
        return rng.choice(np.array([-1, 1], np.int8), (rows, bits))

    def labels(rows: int) -> np.ndarray:
        return (rng.random((rows, classes)) < density).astype(np.uint8)

    return Codes(signs(queries), signs(items), labels(queries), labels(items))


def plain_average_precision(relevant: Sequence[bool]) -> Fraction:
    hits, total = 0, Fraction(0)
    for place, match in enumerate(relevant, start=1):
        if match:
            hits += 1
            total += Fraction(hits, place)
    return total / hits if hits else Fraction(0)


def plain_pairs(codes: Codes, query: int) -> list[tuple[int, bool]]:
    """Distance and relevance of every item, bit by bit and label by label."""
    pairs = []
    for code, labels in zip(codes.database.tolist(), codes.database_labels.tolist(), strict=True):
        distance = sum(a != b for a, b in zip(codes.query[query].tolist(), code, strict=True))
        own = codes.query_labels[query].tolist()
        pairs.append((distance, any(a and b for a, b in zip(own, labels, strict=True))))
    return pairs


def every_order(pairs: list[tuple[int, bool]]) -> list[Fraction]:
    """Average precision under every order of the items that respects the distances."""
    return [
        plain_average_precision([match for _, match in order])
        for order in itertools.permutations(pairs)
        if all(a[0] <= b[0] for a, b in itertools.pairwise(order))
    ]


def plain_expected(counts: list[tuple[int, int]]) -> Fraction:
    """Mean over all places that the relevant items of each tie can have: [(items, relevant)]."""
    total, before, hits = Fraction(0), 0, 0
    for items, relevant in counts:
        arrangements = list(itertools.combinations(range(1, items + 1), relevant))
        for places in arrangements:
            for i, place in enumerate(places, start=1):
                total += Fraction(hits + i, before + place) / len(arrangements)
        before, hits = before + items, hits + relevant
    return total / hits if hits else Fraction(0)


def plain_order(counts: list[tuple[int, int]], relevant_first: bool) -> Fraction:
    order: list[bool] = []
    for items, relevant in counts:
        tie = [True] * relevant + [False] * (items - relevant)
        order += tie if relevant_first else tie[::-1]
    return plain_average_precision(order)


def values(codes: Codes, measures: tuple[Measure, ...] = OVER_ALL) -> dict[str, float]:
    return {v.ties: v.value for v in evaluate(codes, measures)}


def one_item(bits: int, differing: int) -> tuple[np.ndarray, np.ndarray]:
    """A code and another that differs from it in so many bits, spread over the code."""
    rng = np.random.default_rng(bits)
    code = rng.choice(np.array([-1, 1], np.int8), (1, bits))
    other = code.copy()
    other[0, rng.permutation(bits)[:differing]] *= -1
    return code, other


# Distances and histograms


def test_hand_case_is_what_its_comment_says() -> None:
    assert hamming_distances(HAND.query, HAND.database).tolist() == [
        [1, 0, 1, 2, 2, 4],
        [3, 2, 3, 4, 4, 6],
    ]
    assert shared_labels(HAND.query_labels, HAND.database_labels).tolist() == [
        [1, 0, 2, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("bits", [1, 8, 16, 64, 127, 128, 129, 255, 256, 257, 1100])
def test_distances_are_exact_at_lengths_where_int8_wraps(bits: int) -> None:
    for differing in {0, 1, bits // 3, bits // 2, bits - 1, bits}:
        code, other = one_item(bits, differing)
        assert hamming_distances(code, other).tolist() == [[differing]]


@pytest.mark.parametrize("bits", [128, 129, 1100])
def test_an_identical_item_ranks_first_at_lengths_where_int8_wraps(bits: int) -> None:
    """In int8 the product of an identical pair of 128 bits is -128, as of an opposite pair."""
    same, opposite = one_item(bits, bits)
    _, far = one_item(bits, bits // 2)
    found = Codes(
        same,
        np.concatenate([opposite, far, same]),
        np.array([[1]], np.uint8),
        np.array([[0], [0], [1]], np.uint8),
    )
    assert values(found) == dict.fromkeys(TIES, 1.0)
    items = tally_of(Packed.of(found), HEADLINE).items
    assert items.nonzero()[1].tolist() == sorted({0, bits // 2, bits})


def test_many_shared_labels_are_counted_exactly() -> None:
    labels = np.ones((1, 300), np.uint8)
    assert shared_labels(labels, labels).tolist() == [[300]]


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, np.float64])
def test_distances_do_not_depend_on_the_type_of_the_codes(dtype: type) -> None:
    found = hamming_distances(HAND.query.astype(dtype), HAND.database.astype(dtype))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, hamming_distances(HAND.query, HAND.database))


# mAP@all under each order of ties


def test_average_precision_by_hand() -> None:
    """Of HAND's first query. Expected: the tie at 1 is all relevant, 1/2 + 2/3; at 2 one of two
    is, at rank 4 or 5 with equal chance and two hits before it, (3/4 + 3/5) / 2. Over 3 items.
    """
    expected = (1 / 2 + 2 / 3 + (3 / 4 + 3 / 5) / 2) / 3
    index = worst = (1 / 2 + 2 / 3 + 3 / 5) / 3
    best = (1 / 2 + 2 / 3 + 3 / 4) / 3
    first = Codes(HAND.query[:1], HAND.database, HAND.query_labels[:1], HAND.database_labels)
    assert values(first) == pytest.approx(
        {"expected": expected, "index": index, "best": best, "worst": worst}, rel=1e-14
    )
    counts = np.array([[1, 2, 2, 0, 1]]), np.array([[0, 2, 1, 0, 0]])
    assert average_precision(*counts, "expected") == pytest.approx([expected], rel=1e-14)
    assert average_precision(*counts, "best") == pytest.approx([best], rel=1e-14)
    assert average_precision(*counts, "worst") == pytest.approx([worst], rel=1e-14)


def test_index_order_is_no_order_of_a_histogram() -> None:
    with pytest.raises(ValueError, match="index"):
        average_precision(np.array([[1]]), np.array([[1]]), "index")


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_map_equals_the_enumeration_of_all_orders(bits: int, seed: int) -> None:
    found = random_codes(3, 6, bits, classes=2, seed=seed)
    pairs = [plain_pairs(found, q) for q in range(3)]
    orders = [every_order(p) for p in pairs]
    by_index = [
        plain_average_precision([m for _, m in sorted(p, key=lambda x: x[0])]) for p in pairs
    ]
    assert values(found) == pytest.approx(
        {
            "expected": float(sum(sum(o) / len(o) for o in orders) / 3),
            "best": float(sum(max(o) for o in orders) / 3),
            "worst": float(sum(min(o) for o in orders) / 3),
            "index": float(sum(by_index) / 3),
        },
        rel=1e-12,
        abs=1e-15,
    )


ties_of_a_query = st.lists(
    st.integers(0, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=6,
)


@given(ties_of_a_query)
@settings(max_examples=200, deadline=None)
def test_closed_forms_equal_the_mean_over_arrangements(counts: list[tuple[int, int]]) -> None:
    items, relevant = (np.array([column]) for column in zip(*counts, strict=True))
    references: dict[Ties, Fraction] = {
        "expected": plain_expected(counts),
        "best": plain_order(counts, relevant_first=True),
        "worst": plain_order(counts, relevant_first=False),
    }
    for ties, reference in references.items():
        (value,) = average_precision(items, relevant, ties)
        if relevant.sum() == 0:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(float(reference), rel=1e-12)


@given(
    queries=st.integers(1, 5),
    items=st.integers(1, 30),
    bits=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_map_of_codes_equals_the_slow_reference(
    queries: int, items: int, bits: int, seed: int
) -> None:
    found = random_codes(queries, items, bits, seed=seed, density=0.3)
    ties: dict[str, list[Fraction]] = {name: [] for name in TIES}
    for q in range(queries):
        pairs = sorted(plain_pairs(found, q), key=lambda pair: pair[0])  # a stable sort
        matches = [[m for d, m in pairs if d == distance] for distance in range(bits + 1)]
        counts = [(len(m), sum(m)) for m in matches]
        ties["expected"].append(hypergeometric_expected(counts))
        ties["index"].append(plain_average_precision([m for _, m in pairs]))
        ties["best"].append(plain_order(counts, relevant_first=True))
        ties["worst"].append(plain_order(counts, relevant_first=False))
    found_values = values(found)
    assert found_values == pytest.approx(
        {name: float(sum(parts) / queries) for name, parts in ties.items()}, rel=1e-12, abs=1e-15
    )
    assert found_values["worst"] <= found_values["expected"] + 1e-12
    assert found_values["expected"] <= found_values["best"] + 1e-12


def hypergeometric_expected(counts: list[tuple[int, int]]) -> Fraction:
    """As `plain_expected`, for ties with too many arrangements to list: place by place."""
    total, before, hits = Fraction(0), 0, 0
    for n, r in counts:
        for place in range(1, n + 1):
            for earlier in range(min(r, place)):  # relevant items before a relevant one here
                ways = math.comb(place - 1, earlier) * math.comb(n - place, r - 1 - earlier)
                chance = Fraction(ways, math.comb(n, r))
                total += chance * Fraction(hits + earlier + 1, before + place)
        before, hits = before + n, hits + r
    return total / hits if hits else Fraction(0)


# Every measure, on the hand-worked case

CUTS = (1, 2, 3, 4, 100, ALL)


@pytest.fixture(scope="module")
def tally() -> Tally:
    asked = [Measure("", "index", lambda t: t.total, cut) for cut in CUTS]
    return tally_of(Packed.of(HAND), asked)


def test_the_hand_case_is_counted(tally: Tally) -> None:
    assert tally.items.tolist() == [[1, 2, 2, 0, 1, 0, 0], [0, 0, 1, 2, 2, 0, 1]]
    assert tally.relevant.tolist() == [[0, 2, 1, 0, 0, 0, 0], [0] * 7]
    assert tally.counts[0, 1].tolist() == [0, 1, 1]
    assert tally.nearer[0].tolist() == [0, 1, 3, 5, 5, 6, 6]
    assert tally.total.tolist() == [3, 0]


def test_ties_stay_in_database_order_over_many_equal_items() -> None:
    """An unstable sort keeps short runs in order: it takes many items to tell."""
    codes = np.ones((1000, 3), np.int8)
    labels = np.zeros((1000, 1), np.uint8)
    labels[[10, 500]] = 1
    found = Codes(codes[:1], codes, np.array([[1]], np.uint8), labels)
    assert values(found)["index"] == pytest.approx((1 / 11 + 2 / 501) / 2, rel=1e-14)


Row = tuple[Callable[[Tally], np.ndarray], float, float]
LOG3 = math.log2(3)
IDEAL = 3 + 1 / LOG3 + 1 / 2  # gains 3 1 1 in the best order
# Value of the first query; the second has no match: no value, or 0 where a share is asked for.
# Under `expected` the tie of two at distance 2 (ranks 4 and 5) has its one match at either rank.
BY_HAND: list[Row] = [
    (lambda t: ap_all(t, "index"), (1 / 2 + 2 / 3 + 3 / 5) / 3, math.nan),
    (lambda t: ap_hits(t, 1), 0, math.nan),  # no hit within the first rank
    (lambda t: ap_of_hits(t, 1), math.nan, math.nan),
    (lambda t: ap_of_hits(t, 3), (1 / 2 + 2 / 3) / 2, math.nan),
    (lambda t: ap_hits(t, 2), 1 / 2, math.nan),
    (lambda t: ap_hits(t, 3), (1 / 2 + 2 / 3) / 2, math.nan),
    (lambda t: ap_hits(t, 100), (1 / 2 + 2 / 3 + 3 / 5) / 3, math.nan),
    (lambda t: ap_min(t, "index", 1), 0, math.nan),
    (lambda t: ap_min(t, "index", 2), (1 / 2) / 2, math.nan),
    (lambda t: ap_min(t, "index", 4), (1 / 2 + 2 / 3) / 3, math.nan),
    (lambda t: ap_min(t, "index", 100), (1 / 2 + 2 / 3 + 3 / 5) / 3, math.nan),
    (lambda t: ap_min(t, "expected", 2), (1 / 2) / 2, math.nan),
    (lambda t: ap_min(t, "expected", 4), (1 / 2 + 2 / 3 + (3 / 4) / 2) / 3, math.nan),
    (lambda t: ap_min(t, "expected", 100), (7 / 6 + (3 / 4 + 3 / 5) / 2) / 3, math.nan),
    (lambda t: ap_first(t, 1), 1 / 2, math.nan),
    (lambda t: ap_first(t, 2), (1 / 2 + 2 / 3) / 2, math.nan),
    (lambda t: ap_first(t, 100), (1 / 2 + 2 / 3 + 3 / 5) / 3, math.nan),
    (lambda t: precision_at(t, "index", 1), 0, 0),
    (lambda t: precision_at(t, "index", 3), 2 / 3, 0),
    (lambda t: precision_at(t, "index", 4), 2 / 4, 0),
    (lambda t: precision_at(t, "index", 100), 3 / 6, 0),
    (lambda t: precision_at(t, "expected", 2), 1 / 2, 0),
    (lambda t: precision_at(t, "expected", 4), 2.5 / 4, 0),
    (lambda t: precision_at(t, "expected", 100), 3 / 6, 0),
    (lambda t: recall_at(t, "index", 4), 2 / 3, math.nan),
    (lambda t: recall_at(t, "expected", 4), 2.5 / 3, math.nan),
    (lambda t: precision_within(t, 0), 0, 0),
    (lambda t: precision_within(t, 1), 2 / 3, 0),  # an empty ball of the second query
    (lambda t: precision_within(t, 2), 3 / 5, 0),
    (lambda t: precision_within(t, 6), 3 / 6, 0),
    (lambda t: precision_in_ball(t, 1), 2 / 3, math.nan),
    (lambda t: precision_in_ball(t, 2), 3 / 5, 0),
    (lambda t: recall_within(t, 1), 2 / 3, math.nan),
    (lambda t: recall_within(t, 2), 1, math.nan),
    (lambda t: empty_ball(t, 1), 0, 1),
    (lambda t: empty_ball(t, 2), 0, 0),
    (first_match_rank, 1 + 3 / 3, math.nan),  # the tie at ranks 2 and 3 is all relevant
    # Gains 2^shared - 1 by rank: 0 1 3 0 1 0.
    (lambda t: ndcg_at(t, "index", 1), 0, math.nan),
    (lambda t: ndcg_at(t, "index", 2), (1 / LOG3) / (3 + 1 / LOG3), math.nan),
    (lambda t: ndcg_at(t, "index", 3), (1 / LOG3 + 3 / 2) / IDEAL, math.nan),
    (lambda t: ndcg_at(t, "index", 100), (1 / LOG3 + 3 / 2 + 1 / math.log2(6)) / IDEAL, math.nan),
    # The tie at ranks 2 and 3 has mean gain 2, the one at ranks 4 and 5 has 1/2.
    (lambda t: ndcg_at(t, "expected", 2), (2 / LOG3) / (3 + 1 / LOG3), math.nan),
    (lambda t: ndcg_at(t, "expected", 3), (2 / LOG3 + 2 / 2) / IDEAL, math.nan),
    (
        lambda t: ndcg_at(t, "expected", 100),
        (2 / LOG3 + 2 / 2 + (1 / math.log2(5) + 1 / math.log2(6)) / 2) / IDEAL,
        math.nan,
    ),
]


@pytest.mark.parametrize(("measure", "first", "second"), BY_HAND)
def test_measure_by_hand(
    tally: Tally, measure: Callable[[Tally], np.ndarray], first: float, second: float
) -> None:
    assert measure(tally).tolist() == pytest.approx([first, second], rel=1e-14, nan_ok=True)


def test_the_first_match_waits_for_its_share_of_a_tie() -> None:
    """Two of four items at equal distance match: the first of them is expected at rank 5/3."""
    counts = np.array([[[1, 0], [2, 2], [0, 9]]])
    assert first_match_rank(Tally(counts)).tolist() == pytest.approx([1 + 5 / 3])


def graded_codes(seed: int, kind: str) -> Codes:
    """Random codes whose labels have degrees 0 ... 3, or of tenths; the largest is 3."""
    found = random_codes(4, 30, 5, classes=4, seed=seed)
    rng = np.random.default_rng(seed)

    def degrees(labels: np.ndarray) -> np.ndarray:
        steps = rng.integers(1, 31, labels.shape) / 10
        steps[0, 0] = 3
        return np.where(labels > 0, np.ceil(steps) if kind == "whole" else steps, 0)

    return replace(
        found,
        query_labels=degrees(np.maximum(found.query_labels, np.eye(4, dtype=np.uint8))),
        database_labels=degrees(found.database_labels),
    )


def plain_shared(found: Codes) -> np.ndarray:
    """How much each query and item share: [Q, N]."""
    q, d = found.query_labels[:, None], found.database_labels[None]
    return np.minimum(q, d).sum(axis=2)


@pytest.mark.parametrize("kind", ["whole", "tenths"])
@pytest.mark.parametrize("seed", range(3))
def test_graded_labels_give_graded_gain(seed: int, kind: str) -> None:
    """NDCG of a stable sort, straight from its formula; a degree is rounded to 0.03 at most."""
    found = graded_codes(seed, kind)
    gain = 2 ** plain_shared(found) - 1
    order = np.argsort(hamming_distances(found.query, found.database), axis=1, kind="stable")
    discount = 1 / np.log2(np.arange(2, 32))
    dcg = np.take_along_axis(gain, order, axis=1) @ discount
    ideal = np.sort(gain, axis=1)[:, ::-1] @ discount
    assert (ideal > 0).all()
    measures = [m for m in MEASURES if m.name in ("NDCG@100", "mAP@all") and m.ties == "index"]
    average, ndcg = evaluate(found, measures)
    tolerance = 1e-12 if kind == "whole" else 0.01
    assert ndcg.value == pytest.approx(float((dcg / ideal).mean()), abs=tolerance)
    plain = replace(
        found,
        query_labels=(found.query_labels > 0).astype(np.uint8),
        database_labels=(found.database_labels > 0).astype(np.uint8),
    )
    assert average.value == evaluate(plain, measures[:1])[0].value  # relevant is any degree
    assert abs(ndcg.value - evaluate(plain, measures[1:])[0].value) > 1e-4
    ranked = evaluate_ranking(
        found.query, found.database, found.query_labels, found.database_labels, measures
    )
    assert [v.value for v in ranked] == pytest.approx([average.value, ndcg.value], rel=1e-12)


def test_graded_labels_by_hand() -> None:
    q, d = np.array([[0.5, 1.0, 0.0]]), np.array([[1.0, 0.25, 1.0], [0.0, 0.001, 0.0], [0, 0, 3]])
    query, database, unit = pack_labels(q, d)
    assert unit == 0.03  # a hundredth of the largest
    shared = np.bitwise_count(query & database).sum(axis=1) * unit
    assert shared[0] == pytest.approx(0.5 + 0.25, abs=0.03)
    assert shared[1] == 0.03  # a small degree is not rounded away
    assert shared[2] == 0
    ones = pack_labels((q > 0).astype(np.uint8), 3 * (d > 0).astype(np.int64))
    assert ones[2] == 1 and np.array_equal(ones[0], pack_words(q > 0))
    large = pack_labels(np.array([[1000, 1]]), np.array([[500, 1]]))
    assert large[2] == 10 and np.bitwise_count(large[0] & large[1]).sum() == 50 + 1
    many = pack_labels(np.full((1, 40), 3), np.full((2, 40), 5))
    assert many[0].shape == (1, 2) and np.bitwise_count(many[0] & many[1]).sum() == 2 * 120


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("side", ["query", "database"])
def test_degrees_that_are_none_are_refused(value: float, side: str) -> None:
    found = graded_codes(0, "tenths")
    getattr(found, f"{side}_labels")[1, 1] = value
    with pytest.raises(VhablError, match=f"{side} labels: a negative or undefined degree"):
        evaluate(found)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_expected_cut_off_measures_are_means_over_all_orders(seed: int, cut: int) -> None:
    found = random_codes(1, 6, 2, classes=2, seed=seed)
    shared = shared_labels(found.query_labels, found.database_labels)[0]
    distance = hamming_distances(found.query, found.database)[0]
    total = int((shared > 0).sum())
    ideal = sorted(2.0**shared - 1, reverse=True)
    best = sum(g / math.log2(i + 2) for i, g in enumerate(ideal[:cut]))
    sums = np.zeros(4)
    orders = [
        [int(shared[i]) for i in order]
        for order in itertools.permutations(range(6))
        if all(distance[a] <= distance[b] for a, b in itertools.pairwise(order))
    ]
    for order in orders:
        hits = [sum(s > 0 for s in order[: i + 1]) for i in range(6)]
        precisions = [hits[i] / (i + 1) for i in range(6) if order[i] > 0 and i < cut]
        dcg = sum((2**s - 1) / math.log2(i + 2) for i, s in enumerate(order[:cut]))
        first = next((i + 1 for i in range(6) if order[i] > 0), 0)
        sums += (
            sum(precisions) / min(total, cut) if total else 0,
            hits[min(cut, 6) - 1],
            dcg / best if best else 0,
            first,
        )
    mean = sums / len(orders)
    tally = tally_of(Packed.of(found), HEADLINE)
    measured = (
        ap_min(tally, "expected", cut),
        precision_at(tally, "expected", cut) * min(cut, 6),
        ndcg_at(tally, "expected", cut),
        first_match_rank(tally),
    )
    assert [float(np.nan_to_num(m)[0]) for m in measured] == pytest.approx(mean.tolist(), abs=1e-12)


def test_named_measures_use_their_cut_offs() -> None:
    """Relevant items at ranks 50, 51, 100, 101, 5000, 5001: a hundred items at 2, the rest at 3."""
    ranks = np.array([50, 51, 100, 101, 5000, 5001])
    items = 5002
    database = np.ones((items, 3), np.int8)
    database[:, :2] = -1
    database[100:, 2] = -1
    labels = np.isin(np.arange(1, items + 1), ranks)[:, None].astype(np.uint8)
    found = Codes(np.ones((1, 3), np.int8), database, np.array([[1]], np.uint8), labels)
    precisions = np.arange(1, 7) / ranks
    ideal = sum(1 / math.log2(i + 1) for i in range(1, 7))
    expected = {
        "mAP@all": precisions.mean(),
        "mAP@50/hits": precisions[0],
        "mAP@50/hits (queries with a hit)": precisions[0],
        "mAP@50/min": precisions[0] / 6,
        "mAP@first-50-relevant": precisions.mean(),
        "mAP@5000/hits": precisions[:5].mean(),
        "mAP@5000/hits (queries with a hit)": precisions[:5].mean(),
        "mAP@5000/min": precisions[:5].sum() / 6,
        "mAP@first-5000-relevant": precisions.mean(),
        "precision@100": 3 / 100,
        "recall@100": 3 / 6,
        "NDCG@100": sum(1 / math.log2(r + 1) for r in ranks[:3]) / ideal,
    }
    index = tuple(m for m in MEASURES if m.ties == "index")
    measured = {v.measure: v.value for v in evaluate(found, index)}
    assert measured == pytest.approx(expected, rel=1e-12)
    radius = {v.measure: v.value for v in evaluate(found, MEASURES) if v.ties == "any"}
    assert radius == pytest.approx(
        {"precision within radius 2": 3 / 100, "recall within radius 2": 3 / 6}
    )


def test_first_5000_relevant_leaves_out_the_5001st() -> None:
    labels = np.ones((5003, 1), np.uint8)
    labels[4999] = 0  # the last counted item is at rank 5001
    found = Codes(np.ones((1, 1), np.int8), np.ones((5003, 1), np.int8), labels[:1], labels)
    measure = next(m for m in MEASURES if m.name == "mAP@first-5000-relevant")
    (value,) = evaluate(found, (measure,))
    assert value.value == pytest.approx((4999 + 5000 / 5001) / 5000, rel=1e-14)


def test_curves_of_the_hand_case() -> None:
    """Macro over queries: of the balls that are not empty for precision, of all for the rest."""
    found = {v.measure: v.value for v in evaluate(HAND, curves(6))}
    assert found["ball precision at radius 1"] == pytest.approx(2 / 3)  # one ball is empty
    assert found["empty balls at radius 1"] == 1 / 2
    assert found["ball precision at radius 2"] == pytest.approx((3 / 5 + 0) / 2)
    assert found["ball recall at radius 1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["precision@1"] == 0 and found["recall@5"] == 1 / 2
    assert "ball recall at radius 6" in found and "ball recall at radius 7" not in found


def test_values_of_each_query() -> None:
    assert per_query(HAND).tolist() == pytest.approx(
        [(1 / 2 + 2 / 3 + (3 / 4 + 3 / 5) / 2) / 3, math.nan], nan_ok=True
    )


# Other distances

INDEX = tuple(m for m in MEASURES if m.ties == "index")


def test_a_bit_without_weight_is_a_bit_left_out() -> None:
    found = random_codes(5, 40, 12)
    part = Codes(
        found.query[:, :7], found.database[:, :7], found.query_labels, found.database_labels
    )
    weights = np.array([3] * 7 + [0] * 5)
    weighted = {v.ties: v.value for v in evaluate(found, OVER_ALL, weights)}
    assert weighted == pytest.approx(values(part), rel=1e-12)


def test_weights_decide_between_items_at_equal_distance() -> None:
    """Two items differ from the query in one bit each; the match in the one that counts less."""
    labels = np.array([[1], [0]], np.uint8)
    found = Codes(
        np.array([[1, 1]], np.int8), np.array([[1, -1], [-1, 1]], np.int8), labels[:1], labels
    )
    assert values(found)["expected"] == 3 / 4
    weighted = {v.ties: v.value for v in evaluate(found, OVER_ALL, np.array([2, 1]))}
    assert weighted == dict.fromkeys(TIES, 1.0)


def test_integer_weights_keep_the_ratios() -> None:
    weights, factor = integer_weights(np.array([0.5, 0.25, 0.0]), largest=8)
    assert (weights.tolist(), factor) == ([8, 4, 0], 16.0)


def test_a_ranking_of_binary_queries_is_the_hamming_ranking() -> None:
    found = random_codes(6, 50, 9)
    arrays = (found.query, found.database, found.query_labels, found.database_labels)
    ranked = evaluate_ranking(*(a.astype(np.float32) for a in arrays[:2]), *arrays[2:], INDEX)
    for one, other in zip(ranked, evaluate(found, INDEX), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-12), one.measure


def test_a_real_query_ranks_by_its_own_confidence() -> None:
    """Both items differ in one bit; the query is surer of the first bit."""
    labels = np.array([[1], [0]], np.uint8)
    query, database = np.array([[0.9, 0.1]]), np.array([[1.0, -1], [-1, 1]])
    (value,) = evaluate_ranking(query, database, labels[:1], labels, INDEX[:1])
    assert value.value == 1.0
    (value,) = evaluate_ranking(query[:, ::-1], database, labels[:1], labels, INDEX[:1])
    assert value.value == 1 / 2


def test_a_real_ranking_has_no_expected_order() -> None:
    with pytest.raises(ValueError, match="index order"):
        evaluate_ranking(HAND.query, HAND.database, HAND.query_labels, HAND.database_labels,
                         HEADLINE)  # fmt: skip


# The codes alone


def test_code_statistics_by_hand() -> None:
    """Means of the bits: 1/2, 0, 1. The products of the first two have mean (1 - 1 + 1 + 1) / 4,
    so their covariance is 1/2 and their spreads sqrt(3/4) and 1; the third bit never varies.
    """
    codes = np.array([[1, 1, 1], [1, -1, 1], [1, 1, 1], [-1, -1, 1]])
    found = code_statistics(codes)
    assert found == pytest.approx(
        {
            "bit balance": (1 / 2 + 0 + 1) / 3,
            "bit correlation": (1 / 2) / math.sqrt(3 / 4),
            "distinct codes": 3 / 4,
            "expected collisions": 2 / 4,
        }
    )


def test_code_statistics_of_one_item() -> None:
    found = code_statistics(np.ones((1, 4), np.int8))
    assert found == {
        "bit balance": 1.0,
        "bit correlation": 0.0,
        "distinct codes": 1.0,
        "expected collisions": 0.0,
    }


# Queries without a match

ZERO = tuple(m for m in MEASURES if m.counted_as_zero)


def test_queries_without_a_match_count_as_zero_and_are_reported() -> None:
    """HAND has two queries; the second has no match, so each mean is half the first's value."""
    first = Codes(HAND.query[:1], HAND.database, HAND.query_labels[:1], HAND.database_labels)
    for both, alone in zip(evaluate(HAND, ZERO), evaluate(first, ZERO), strict=True):
        assert (both.queries, both.queries_without_match) == (2, 1)
        assert (alone.queries, alone.queries_without_match) == (1, 0)
        assert alone.value == pytest.approx(alone.value_matched_only)
        assert alone.value > 0
        assert both.value == pytest.approx(alone.value / 2, rel=1e-15)
        assert both.value_matched_only == pytest.approx(alone.value)


def test_a_match_beyond_the_cut_off_is_a_zero_among_the_matched() -> None:
    measure = Measure("mAP@1/hits", "index", lambda t: ap_hits(t, 1), 1)
    (value,) = evaluate(HAND, (measure,))
    assert (value.value, value.value_matched_only, value.queries_without_match) == (0, 0, 1)


def test_queries_without_a_hit_count_as_zero_or_are_left_out() -> None:
    """60 items at distances 0 ... 59 and three queries: hits at ranks 1 and 50, a hit at rank 51
    alone, no relevant item. The means over 3, over the 2 with a match, and over the 1 with a hit.
    """
    triangle = np.where(np.arange(60) < np.arange(60)[:, None], -1, 1).astype(np.int8)
    items = np.zeros((60, 2), np.uint8)
    items[[0, 49], 0] = items[50, 1] = 1
    queries = np.array([[1, 0], [0, 1], [0, 0]], np.uint8)
    codes = Codes(np.ones((3, 60), np.int8), triangle, queries, items)
    found = {v.measure: v for v in evaluate(codes, MEASURES) if v.measure.startswith("mAP@50/hits")}
    one = (1 / 1 + 2 / 50) / 2
    zero, left_out = found["mAP@50/hits"], found["mAP@50/hits (queries with a hit)"]
    assert [zero.value, zero.value_matched_only] == pytest.approx([one / 3, one / 2])
    assert [left_out.value, left_out.value_matched_only] == pytest.approx([one, one])
    assert left_out.ties == "index" and left_out.queries == 3


def test_no_query_with_a_match_gives_zero() -> None:
    second = Codes(HAND.query[1:], HAND.database, HAND.query_labels[1:], HAND.database_labels)
    for value in evaluate(second, MEASURES):
        assert (value.value, value.value_matched_only) == (0.0, 0.0)
        assert (value.queries, value.queries_without_match) == (1, 1)


def test_values_come_in_the_order_asked_for() -> None:
    asked = (MEASURES[5], MEASURES[0], MEASURES[2], MEASURES[1])
    assert [(v.measure, v.ties) for v in evaluate(HAND, asked)] == [(m.name, m.ties) for m in asked]
    (headline,) = evaluate(HAND)
    assert (headline.measure, headline.ties) == ("mAP@all", "expected")
    assert [(m.name, m.ties) for m in HEADLINE] == [("mAP@all", "expected")]


# Codes published with PGHMH: values at 16, 32 and 64 bits, worked out apart from this project

KNOWN = {
    ("mAP@all", "expected"): (0.976048, 0.992414, 0.998643),
    ("mAP@all", "index"): (0.976073, 0.992410, 0.998636),
    ("mAP@all", "best"): (0.984942, 0.994696, 0.999028),
    ("mAP@all", "worst"): (0.967971, 0.990404, 0.998272),
    ("mAP@5000/hits", "index"): (0.991135, 0.996066, 0.999312),
    ("mAP@5000/min", "index"): (0.981691, 0.993796, 0.998897),
    ("mAP@first-5000-relevant", "index"): (0.987313, 0.995006, 0.999092),
    ("precision@100", "index"): (0.999575, 0.999760, 0.999955),
    ("precision within radius 2", "any"): (0.999912, 0.998500, 0.977500),
    ("NDCG@100", "index"): (0.690228, 0.721342, 0.742746),
}


@pytest.mark.parametrize(("column", "bits"), [(0, 16), (1, 32), (2, 64)])
def test_published_codes_have_their_known_values(column: int, bits: int) -> None:
    path = PUBLISHED / f"Ours_{bits}-flickr25k_bits.mat"
    if not path.is_file():
        pytest.skip(f"{path.name} is not part of the project and is not beside it")
    found = evaluate(code_files.load(path)["fused"], MEASURES)
    values = {(v.measure, v.ties): v.value for v in found}
    assert {name: values[name] for name in KNOWN} == pytest.approx(
        {name: known[column] for name, known in KNOWN.items()}, rel=0, abs=1e-6
    )
    assert [v.queries for v in found] == [2000] * len(MEASURES)


def test_values_of_each_query_leave_the_query_itself_out() -> None:
    """Without item 1, the first of its ranking, the matches come at ranks 1, 2 and 3 or 4."""
    found = per_query(HAND, own=np.array([1, -1])).tolist()
    assert found == pytest.approx([(1 + 1 + (3 / 3 + 3 / 4) / 2) / 3, math.nan], nan_ok=True)


def test_a_curve_over_radii_ends_at_the_length_of_the_code() -> None:
    for bits, count in ((6, 7), (32, 33), (33, 18), (128, 33)):
        radii = [m.name for m in curves(bits) if m.name.startswith("ball recall")]
        assert len(radii) == count, bits
        assert radii[0] == "ball recall at radius 0"
        assert radii[-1] == f"ball recall at radius {bits}"
