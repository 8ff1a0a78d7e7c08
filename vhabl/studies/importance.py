"""Does learned bit importance work? Three experiments, one command each.

    python -m vhabl.studies.importance ranking data=wiki data.path=FILE --seeds 0 1 2
    python -m vhabl.studies.importance alone   data=wiki data.path=FILE --seeds 0 1 2
    python -m vhabl.studies.importance lengths data=wiki data.path=FILE --seeds 0

ranking: prefixes by the learned ranking against the same model's bits in random order, by variance,
    and greedily chosen on the validation split; and the interval analysis (bits 1-10, 11-20 ...).
alone: a prefix of the longest model against a model trained at that length alone.
lengths: base lengths 4, 8 ... 1024, each cut to 16 bits by importance (4 and 8 stay as they are).

Each writes a CSV and a plot (PNG, SVG) to checkpoint/<data>/<method>/importance/.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vhabl import methods
from vhabl.config import CONFIG_DIR, Config, load, override
from vhabl.data import load as load_data
from vhabl.data import validation_split
from vhabl.evaluation.records import batches_in_order, code_tasks, interval_scores, score
from vhabl.methods.base import HashingMethod
from vhabl.metrics import average_precision
from vhabl.metrics.hamming import shared_labels
from vhabl.report.plots import category_panel, plot
from vhabl.system import errors
from vhabl.system.files import write_text
from vhabl.training.trainer import Trainer
from vhabl.types import Codes, Dataset

PREFIXES = (8, 16, 32, 64)
CUT = 16
BASE_LENGTHS = tuple(2**power for power in range(2, 11))
RANDOM_ORDERS = 10
HELD_OUT = 0.1  # share of the training items held out where the recipe holds none out


@dataclass(frozen=True)
class Row:
    """One measured value: mAP@all (expected) of the bits that `order` and `bits` name."""

    experiment: str
    seed: int
    order: str
    bits: str
    value: float


def fused_codes(method: HashingMethod, data: Dataset) -> Codes:
    return code_tasks(method, data, [method.bits])[method.bits]["fused"]


# -- ranking ---------------------------------------------------------------------------------------


def ranking(config: Config, data: Dataset, seed: int) -> list[Row]:
    """Four orders of one model's bits, and its intervals, all scored on the test queries.

    The validation items take no part in training here (nor in the database), so that the greedy
    choice is made on items that the model has not seen.
    """
    fraction = config.validation.fraction or HELD_OUT
    held_out = validation_split(data, fraction, config.validation.seed)
    seen = replace(held_out, query=data.query)
    config = override(config, [f"seed={seed}", "validation.fraction=0"])
    method = Trainer(config, seen).run()
    test, validation = fused_codes(method, seen), fused_codes(method, held_out)
    rows: list[Row] = []

    def add(order: str, columns: np.ndarray, lengths: Iterable[int]) -> None:
        for m in lengths:
            rows.append(Row("ranking", seed, order, str(m), score(test, columns[:m])))

    lengths = [m for m in PREFIXES if m <= method.bits]
    learned = np.arange(method.bits)  # codes are stored in the order of importance
    add("learned", learned, lengths)
    add("variance", by_variance(method, seen), lengths)
    add("greedy", greedy(validation, max(lengths)), lengths)
    random = np.random.default_rng(seed)
    orders = [random.permutation(method.bits) for _ in range(RANDOM_ORDERS)]
    for m in lengths:
        mean = float(np.mean([score(test, order[:m]) for order in orders]))
        rows.append(Row("ranking", seed, "random", str(m), mean))
    for name, value in interval_scores(test).items():
        rows.append(Row("intervals", seed, "learned", name, value))
    return rows


@torch.no_grad()
def by_variance(method: HashingMethod, data: Dataset) -> np.ndarray:
    """Bits by the variance of their relaxed value on the training items, largest first."""
    parts = [method.embed(b.inputs)["fused"].cpu() for b in batches_in_order(method, data.train)]
    return np.asarray(torch.cat(parts).var(dim=0).argsort(descending=True, stable=True))


def greedy(codes: Codes, length: int) -> np.ndarray:
    """Bits chosen one after another, each the one that adds most to mAP@all of those before it."""
    bits, items = codes.bits, len(codes.database)
    relevant = shared_labels(codes.query_labels, codes.database_labels) > 0  # (Q, N)
    differs = codes.query[:, None, :] != codes.database[None, :, :]  # (Q, N, K)
    differs = np.ascontiguousarray(differs.transpose(2, 0, 1)).astype(np.int32)
    distance = np.zeros(relevant.shape, np.int32)
    chosen: list[int] = []
    for step in range(length):
        width = step + 2
        first_bin = np.arange(len(relevant), dtype=np.int32)[:, None] * width
        size = len(relevant) * width
        best, best_value = -1, -1.0
        for bit in range(bits):
            if bit in chosen:
                continue
            bins = distance + differs[bit] + first_bin
            counts = np.bincount(bins.ravel(), minlength=size).reshape(-1, width)
            hits = np.bincount(bins[relevant], minlength=size).reshape(-1, width)
            assert counts.sum() == len(relevant) * items
            value = float(np.nan_to_num(average_precision(counts, hits, "expected")).mean())
            if value > best_value:
                best, best_value = bit, value
        chosen.append(best)
        distance += differs[best]
    return np.array(chosen)


# -- one model for all lengths ---------------------------------------------------------------------


def alone(config: Config, data: Dataset, seed: int) -> list[Row]:
    """Prefixes of the longest model, and models trained at each length alone."""
    longest = max(config.bits)
    lengths = [m for m in (*PREFIXES, longest) if m <= longest]
    config = override(config, [f"seed={seed}"])
    prefix = fused_codes(Trainer(config, data).run(), data)
    rows = [Row("alone", seed, "prefix", str(m), score(prefix, slice(m))) for m in lengths]
    for m in lengths[:-1]:
        own = fused_codes(Trainer(override(config, [f"bits=[{m}]"]), data).run(), data)
        rows.append(Row("alone", seed, "trained alone", str(m), score(own, slice(m))))
    return rows


def base_lengths(config: Config, data: Dataset, seed: int) -> list[Row]:
    """Models of 4 ... 1024 bits, each cut to its 16 most important ones."""
    rows: list[Row] = []
    for base in BASE_LENGTHS:
        own = override(config, [f"seed={seed}", f"bits=[{base}]"])
        codes = fused_codes(Trainer(own, data).run(), data)
        rows.append(Row("lengths", seed, "whole", str(base), score(codes, slice(base))))
        cut = min(CUT, base)
        rows.append(Row("lengths", seed, f"cut to {CUT}", str(base), score(codes, slice(cut))))
    return rows


# -- output ----------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[[Config, Dataset, int], list[Row]]] = {
    "ranking": ranking,
    "alone": alone,
    "lengths": base_lengths,
}
_AXES = {
    "ranking": "bits kept",
    "intervals": "ranked bits",
    "alone": "bits",
    "lengths": "base length (bits)",
}


def summary(rows: Sequence[Row]) -> str:
    """Mean and standard error over the seeds, a line for each order."""
    lines = []
    for order in dict.fromkeys(r.order for r in rows):
        cells = []
        for bits in dict.fromkeys(r.bits for r in rows):
            values = [r.value for r in rows if r.order == order and r.bits == bits]
            if values:
                error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
                cells.append(f"{bits}: {np.mean(values):.4f} ± {error:.4f}")
        lines.append(f"  {order:14s} " + "  ".join(cells))
    return "\n".join(lines)


def write(folder: Path, experiment: str, rows: Sequence[Row], title: str) -> None:
    """CSV of all values, and a plot of means with standard errors, as PNG and SVG."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["experiment", "seed", "order", "bits", "mAP@all"])
    table.writerows([r.experiment, r.seed, r.order, r.bits, f"{r.value:.6f}"] for r in rows)
    write_text(folder / f"{experiment}.csv", text.getvalue())
    lines = {
        order: {
            bits: [r.value for r in rows if r.order == order and r.bits == bits]
            for bits in dict.fromkeys(r.bits for r in rows if r.order == order)
        }
        for order in dict.fromkeys(r.order for r in rows)
    }
    plot(folder / experiment, [category_panel(title, _AXES[experiment], "mAP@all", lines)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.studies.importance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=EXPERIMENTS, help="see above")
    parser.add_argument("--config", default=str(CONFIG_DIR / "vh_abl.yaml"), metavar="FILE",
                        help="a recipe [configs/vh_abl.yaml]")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="[0]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe")
    given = parser.parse_intermixed_args(arguments)
    # The experiments keep their own files; the run folder is only where training may store states.
    config = load(given.config, given.overrides)
    folder = (Path(config.out) if config.out else config.run_folder.parent) / "importance"
    scratch = folder / "state"
    config = override(config, [f"out={scratch}", "codes=none", f"save_every={config.epochs + 1}"])
    kind = methods.get(config.method)
    if kind.task != "fused" or not kind.any_length:
        errors.bad_value(
            "method", config.method, "a method of pairs whose shorter codes are prefixes"
        )
    if max(config.bits) < PREFIXES[0]:
        errors.bad_value("bits", config.bits, f"at least {PREFIXES[0]}")
    data = load_data(config.data, config.encoder)
    rows: list[Row] = []
    for seed in tqdm(given.seeds, desc=given.experiment, unit="seed", disable=None):
        rows += EXPERIMENTS[given.experiment](config, data, seed)
    for experiment in dict.fromkeys(r.experiment for r in rows):
        part = [r for r in rows if r.experiment == experiment]
        title = f"{config.title} on {data.name}: {experiment}"
        print(f"{title}, mAP@all, mean ± standard error of {len(given.seeds)} seeds")
        print(summary(part))
        write(folder, experiment, part, title)
    print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    errors.run(main)
