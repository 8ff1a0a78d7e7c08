"""Codes to values: one call for every measure, every distance and every kernel."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch

from vhabl.metrics import kernel_torch, reference
from vhabl.metrics.counts import Packed, gains, pack_labels
from vhabl.metrics.measures import HEADLINE, Measure, Tally, Ties
from vhabl.system.errors import fail
from vhabl.types import Codes

Kernel = Literal["auto", "numba", "torch", "triton", "reference"]


@dataclass(frozen=True)
class Value:
    """One measure of one set of codes.

    `value` counts queries without a match as 0 (where the measure does), `value_matched_only`
    leaves them out.
    """

    measure: str
    ties: Ties
    value: float
    value_matched_only: float
    queries: int
    queries_without_match: int


def evaluate(
    codes: Codes,
    measures: Sequence[Measure] = HEADLINE,
    weights: np.ndarray | None = None,
    own: np.ndarray | None = None,
    kernel: Kernel = "auto",
) -> list[Value]:
    """Every measure of these codes, in the order asked for.

    Labels may have degrees (`pack_labels`): items that share a class to some degree are relevant,
    and the gain of NDCG follows the degrees.
    weights: None for the Hamming distance, or an integer weight for each bit, [K], not negative
    (`integer_weights` makes them of real ones). own: for each query its own position in the
    database or -1, [Q]: the query itself is left out there. There are two passes over the database
    at most; nothing of size queries x database is held.
    """
    tally = tally_of(Packed.of(codes, weights, own), measures, kernel)
    return summarise(measures, [m.of(tally) for m in measures], tally.total > 0)


def per_query(
    codes: Codes, measure: Measure = HEADLINE[0], own: np.ndarray | None = None
) -> np.ndarray:
    """One measure of each query, [Q]; NaN where it is not defined."""
    return measure.of(tally_of(Packed.of(codes, own=own), [measure]))


def evaluate_ranking(
    query: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    measures: Sequence[Measure],
    own: np.ndarray | None = None,
) -> list[Value]:
    """Measures of a ranking by inner product, largest first, ties by database position.

    query [Q, d] and database [N, d] are real or +-1: real queries against binary codes (asymmetric
    search), or real embeddings on both sides. own: as in `evaluate`. It sorts, query by query: as
    `evaluate_orders`.
    """
    orders = (np.argsort(-(database @ vector), kind="stable") for vector in query)
    return evaluate_orders(orders, query_labels, database_labels, measures, own)


def evaluate_orders(
    orders: Iterable[np.ndarray],
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    measures: Sequence[Measure],
    own: np.ndarray | None = None,
) -> list[Value]:
    """Measures of any ranking: for each query the numbers of all database items, nearest first.

    Every measure is taken in this one order: only those with `index` order are served (ValueError).
    """
    if any(m.ties != "index" for m in measures):
        raise ValueError("a ranking by real numbers serves measures in index order only")
    cuts = cuts_of(measures)
    masks, labels, unit = pack_labels(query_labels, database_labels)
    left_out = np.full(len(masks), -1) if own is None else own
    most = int(np.bitwise_count(masks).sum(axis=1).max(initial=0))
    gain = gains(most + 1, unit)
    levels, sums = [], []
    for order, mask, position in zip(orders, masks, left_out, strict=True):
        order = order[order != position]
        shared = np.bitwise_count(labels & mask).sum(axis=1, dtype=np.int64)[order]
        levels.append(np.bincount(shared, minlength=most + 1))
        sums.append(reference.ranked_sums(shared, gain, cuts))
    tally = Tally(np.array(levels)[:, None, :], reference.to_ordered(cuts, sums), unit)
    return summarise(measures, [m.of(tally) for m in measures], tally.total > 0)


def cuts_of(measures: Sequence[Measure]) -> tuple[int, ...]:
    """The cut-offs at which measures in index order need sums."""
    return tuple(sorted({m.cut for m in measures if m.cut is not None}))


def tally_of(packed: Packed, measures: Sequence[Measure], kernel: Kernel = "auto") -> Tally:
    """What the measures need of these codes, counted by a kernel."""
    module = pick_kernel(kernel)
    counts = module.histogram(packed)
    cuts = cuts_of(measures)
    ordered = module.ordered(packed, counts, cuts) if cuts else None
    return Tally(counts, ordered, packed.unit)


def pick_kernel(name: Kernel) -> ModuleType:
    """The kernels of this name; `auto`: triton on a CUDA device, else numba, else torch.

    Raises VhablError where a kernel's library or device is missing.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        if cuda and find_spec("triton") and _compiles():
            name = "triton"
        else:
            name = "torch" if cuda or not find_spec("numba") else "numba"
    if name == "reference":
        return reference
    if name == "torch":
        return kernel_torch
    if not find_spec(name):
        fail(f"kernel {name!r}", f"{name} is not installed", "Install it, or take the kernel torch")
    if name == "triton":
        from vhabl.metrics import kernel_triton

        return kernel_triton
    from vhabl.metrics import kernel_numba

    return kernel_numba


def _compiles() -> bool:
    """Whether Triton finds what it compiles its launchers with; images made to run need not have
    it.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def integer_weights(weights: np.ndarray, largest: int = 100) -> tuple[np.ndarray, float]:
    """Real weights [K], not negative, as integers up to `largest`, and the factor between them.

    >>> integer_weights(np.array([2.0, 1.0, 0.013]))
    (array([100,  50,   1]), 50.0)
    """
    factor = largest / float(weights.max())
    return np.rint(weights * factor).astype(np.int64), factor


def summarise(
    measures: Sequence[Measure], columns: Sequence[np.ndarray], matched: np.ndarray
) -> list[Value]:
    """Means over queries, of values [Q] for each measure."""
    values = []
    for measure, column in zip(measures, columns, strict=True):
        kept = column[~np.isnan(column)]
        headline = np.nan_to_num(column) if measure.counted_as_zero else kept
        found = np.nan_to_num(column)[matched] if measure.counted_as_zero else kept
        values.append(
            Value(
                measure=measure.name,
                ties=measure.ties,
                value=float(headline.mean()) if len(headline) else 0.0,
                value_matched_only=float(found.mean()) if len(found) else 0.0,
                queries=len(matched),
                queries_without_match=int((~matched).sum()),
            )
        )
    return values
