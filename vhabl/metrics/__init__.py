"""Retrieval measures of codes, exact under ties: pure functions of arrays, no input or output.

`evaluate` is the one call. Behind it a kernel counts (counts.py says what), on CPU or GPU, and
measures.py computes every measure from the counts.
"""

from vhabl.metrics.evaluation import (
    Kernel,
    Value,
    evaluate,
    evaluate_orders,
    evaluate_ranking,
    integer_weights,
    per_query,
)
from vhabl.metrics.hamming import hamming_distances
from vhabl.metrics.measures import (
    HEADLINE,
    MEASURES,
    WITH_HIT,
    Measure,
    Ties,
    average_precision,
    code_statistics,
    curves,
)
from vhabl.metrics.significance import permutation_test

__all__ = [
    "HEADLINE",
    "MEASURES",
    "WITH_HIT",
    "Kernel",
    "Measure",
    "Ties",
    "Value",
    "average_precision",
    "code_statistics",
    "curves",
    "evaluate",
    "evaluate_orders",
    "evaluate_ranking",
    "hamming_distances",
    "integer_weights",
    "per_query",
    "permutation_test",
]
