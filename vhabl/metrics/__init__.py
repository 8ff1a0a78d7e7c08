"""Retrieval measures on Hamming distances: pure functions of arrays, no input or output."""

from vhabl.metrics.hamming import hamming_distances, relevance_histogram
from vhabl.metrics.measures import (
    HEADLINE,
    MEASURES,
    Measure,
    Ties,
    Value,
    average_precision,
    evaluate,
)

__all__ = [
    "HEADLINE",
    "MEASURES",
    "Measure",
    "Ties",
    "Value",
    "average_precision",
    "evaluate",
    "hamming_distances",
    "relevance_histogram",
]
