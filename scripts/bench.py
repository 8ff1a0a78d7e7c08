"""Benchmarks: ratios of two ways to do the same thing, measured in one run.

python scripts/bench.py losses [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vhabl import losses


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def multi_similarity_loop(h: Tensor, y: Tensor) -> Tensor:
    """The multi-similarity loss as the releases compute it: one anchor after another.

    Anchors without a negative or a positive, where the releases fail, are left out.
    """
    h = F.normalize(h, dim=1)
    s = h @ h.T
    shared = (y @ y.T) > 0
    total = h.new_zeros(())
    for i in range(len(h)):
        positive = s[i][shared[i]]
        positive = positive[positive < 1 - 1e-5]
        negative = s[i][~shared[i]]
        if len(positive) == 0 or len(negative) == 0:
            continue
        negative = negative[negative + 0.1 > positive.min()]
        if len(negative) == 0:
            continue
        positive = positive[positive - 0.1 < negative.max()]
        if len(positive) == 0:
            continue
        pull = torch.log(1 + torch.sum(torch.exp(-2.0 * (positive - 0.5)))) / 2.0
        push = torch.log(1 + torch.sum(torch.exp(40.0 * (negative - 0.5)))) / 40.0
        total = total + pull + push
    return total / len(h)


def bench_losses() -> list[dict[str, object]]:
    """The multi-similarity loss, forward and backward, at batch 1024 and K = 128."""
    torch.manual_seed(0)
    y = F.one_hot(torch.randint(0, 24, (1024,)), 24).float()
    y = torch.clamp(y + (torch.rand(1024, 24) < 0.1), max=1)
    h = torch.tanh(torch.randn(1024, 128)).requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        h.grad = None
        value = loss(h, y)
        value.backward()
        return value.detach()

    difference = float((step(losses.multi_similarity) - step(multi_similarity_loop)).abs())
    matrix = median_seconds(lambda: step(losses.multi_similarity), 10)
    loop = median_seconds(lambda: step(multi_similarity_loop), 3)
    return [
        {
            "case": "multi-similarity loss, forward and backward, B = 1024, K = 128",
            "loop_seconds": loop,
            "matrix_seconds": matrix,
            "ratio": loop / matrix,
            "difference": difference,
            "threads": torch.get_num_threads(),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("losses",))
    parser.add_argument("--json", action="store_true", help="one record a line")
    given = parser.parse_args()
    for record in bench_losses():
        if given.json:
            print(json.dumps(record))
        else:
            print(record["case"])
            for name, value in record.items():
                if name != "case":
                    shown = f"{value:.6g}" if isinstance(value, float) else value
                    print(f"  {name:16s} {shown}")


if __name__ == "__main__":
    main()
