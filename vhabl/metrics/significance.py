"""Is one row of a table better than another, or are the queries just as kind to both?"""

from __future__ import annotations

import numpy as np


def permutation_test(a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test on per-query values a and b, [Q] each.

    If neither row were better, each query's two values could as well be swapped. The p-value is the
    share of random swaps, the observed one counted among them, whose mean difference is at least
    as large (Smucker, Allan & Carterette, CIKM 2007). Never 0: at least 1 / (draws + 1).

    >>> permutation_test(np.array([0.5, 0.7]), np.array([0.5, 0.7]))
    1.0
    """
    difference = a - b
    observed = abs(difference.sum())
    random = np.random.default_rng(seed)
    as_large = 1
    for start in range(0, draws, 1000):
        signs = random.choice([-1.0, 1.0], (min(1000, draws - start), len(difference)))
        # rounding must not make an equal sum look smaller
        as_large += int((np.abs(signs @ difference) >= observed - 1e-12).sum())
    return as_large / (draws + 1)
