"""Does anything of a label reach a code?

python -m vhabl.audit --checkpoint checkpoint/wiki/vh_abl/0 [data.path=FILE]
python -m vhabl.audit --codes FILE.mat

A checkpoint is tried: the same items are encoded with true, permuted and missing labels in the data
set, and among other items. A bit that changes is a leak (exit code 1). Queries that are also in the
training set or the database under another identity are counted.

A code file alone cannot prove a leak. It is judged by how its bits err (see `bit_errors`);
"implausible" and exit code 3 where no encoder that looks at its items errs like that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vhabl import codes as code_files
from vhabl.config import override
from vhabl.data import load as load_data
from vhabl.data.images import rows_in_order
from vhabl.evaluation.records import encode, relaxed_codes, shown
from vhabl.methods.base import HashingMethod
from vhabl.metrics import evaluate
from vhabl.report.published import best_honest
from vhabl.system import errors
from vhabl.training import run_folder
from vhabl.types import Codes, Dataset, Split

SAMPLE = 512  # items of each split that are encoded
NEAR_ZERO = 1e-5  # a relaxed value this close to 0 may change its sign by rounding alone
LEAK, IMPLAUSIBLE = 1, 3  # exit codes

# What honest codes of 16 to 128 bits had on Wiki (10 classes, two kinds of features) and emoji
# (48); what random projections of label sets have at 16 to 256 bits with 10 % of the bits flipped;
# and what the codes published with PGHMH have, as they are and with up to 10 % flipped.
CALIBRATION = {  # agreement, dependence of errors
    "learned hashes": "0.50-0.76, 2.2-14",
    "learned hashes after 1 to 8 epochs": "0.29-0.68, 1.3-9",
    "labels of a linear classifier": "0.44-0.73, 2.1-4.7",
    "ITQ": "0.16-0.32, 1.3-2.7",
    "LSH": "0.11-0.17, 1.1-1.7",
    "projected label sets, 10 % flipped": "0.56-0.62, 0.97-1.02",
    "PGHMH as published": "0.94-0.98, 1.2-1.4",
    "PGHMH, 5-10 % flipped": "0.58-0.79, 0.92-1.03",
}
AGREEMENT = 0.5


def largest_dependence(agreement: float) -> float:
    """The dependence of errors up to which codes of this agreement are implausible.

    Independent noise has 1. Where few bits err, those few may well err together, and no encoder
    that looks at its items comes near such an agreement; at a lower agreement encoders do.

    >>> [round(largest_dependence(a), 2) for a in (0.5, 0.6, 0.75, 0.9, 1.0)]
    [1.2, 1.2, 1.5, 1.8, 1.8]
    """
    return 1.2 + 2 * (min(max(agreement, 0.6), 0.9) - 0.6)


SMALLEST_SET = 5  # queries with the same labels


# -- checkpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One way to change what must not matter. changed: bits that differ and were not near zero."""

    name: str
    changed: int
    near_zero: int
    bits: int


def audit_checkpoint(method: HashingMethod, data: Dataset, seed: int = 0) -> list[Trial]:
    """Encode a sample of queries and database items again under changed labels and company."""
    method.eval()
    random = np.random.default_rng(seed)
    trials: list[Trial] = []
    for role, split in (("query", data.query), ("database", data.database)):
        sample = split.take(np.sort(random.permutation(len(split))[:SAMPLE]))
        rows, labels = np.arange(len(sample)), sample.labels
        order, every_other = random.permutation(rows), rows[::2]
        changes = {  # the changed sample, and the rows of the sample that it holds
            "permuted labels": (replace(sample, labels=labels[random.permutation(rows)]), rows),
            "inverted labels": (replace(sample, labels=1 - labels), rows),
            "missing labels": (replace(sample, labels=np.zeros_like(labels)), rows),
            "other company": (sample.take(order), order),
            "half of the company": (sample.take(every_other), every_other),
        }
        before, relaxed = encode_views(method, sample)
        for name, (changed, kept) in changes.items():
            after, _ = encode_views(method, changed)
            trials.append(_compare(f"{role}: {name}", before, after, relaxed, kept))
    return trials


def encode_views(
    method: HashingMethod, split: Split
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Codes and relaxed codes of each view, as an evaluation makes them: [N, K]."""
    bits = method.bits
    return encode(method, split, [bits])[bits], relaxed_codes(method, split, [bits])[bits]


def _compare(
    name: str,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    relaxed: dict[str, np.ndarray],
    rows: np.ndarray,
) -> Trial:
    changed = near = bits = 0
    for view, codes in before.items():
        differs = codes[rows] != after[view]
        close = np.abs(relaxed[view][rows]) <= NEAR_ZERO
        changed += int((differs & ~close).sum())
        near += int((differs & close).sum())
        bits += differs.size
    return Trial(name, changed, near, bits)


def duplicates(data: Dataset) -> dict[str, int]:
    """Queries whose inputs are also in another split: {"train: same image": count, ...}.

    An item whose id is the same is the item itself, which a protocol may allow; it is not counted.
    """
    found: dict[str, int] = {}
    for role, split in (("train", data.train), ("database", data.database)):
        for kind, of in (("same image", ("image",)), ("same image and text", ("image", "text"))):
            others: dict[bytes, set[object]] = {}
            for digest, item in zip(_digests(split, of), split.ids.tolist(), strict=True):
                others.setdefault(digest, set()).add(item)
            mine = zip(_digests(data.query, of), data.query.ids.tolist(), strict=True)
            found[f"{role}: {kind}"] = sum(bool(others.get(d, set()) - {item}) for d, item in mine)
    return found


def _digests(split: Split, parts: tuple[str, ...]) -> list[bytes]:
    digests = []
    for rows in rows_in_order(len(split), SAMPLE):
        arrays = [getattr(split, part)[rows] for part in parts]
        digests += [
            blake2b(b"".join(item.tobytes() for item in items), digest_size=16).digest()
            for items in zip(*arrays, strict=True)
        ]
    return digests


# -- code files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitErrors:
    """How the bits of queries with identical label sets differ; see `bit_errors`.

    sets: label sets with at least `SMALLEST_SET` queries.
    """

    agreement: float
    dependence: float
    sets: int

    @property
    def implausible(self) -> bool:
        """Codes that a label set prescribes, but for noise that strikes bit by bit."""
        alike = self.dependence <= largest_dependence(self.agreement)
        return self.sets > 0 and self.agreement >= AGREEMENT and alike


def bit_errors(codes: np.ndarray, labels: np.ndarray) -> BitErrors:
    """Agreement within label sets, and dependence of errors, of codes [N, K] with labels [N, C].

    Agreement: the mean product of a bit of two queries with the same labels, on a scale where 0 is
    that of any two queries and 1 is equal codes.

    Dependence: a bit errs where it differs from the majority of its label set. An encoder that
    looks at an item takes some queries for something else, and then many bits err at once. A code
    made from the labels takes no query for something else: what noise it has strikes bits one by
    one. The dependence is the mean over pairs of bits of (n - 1) times their squared correlation
    among the n queries of a set: 1 where bits err independently, whatever their rates.
    """
    _, which = np.unique(labels, axis=0, return_inverse=True)
    agreements, sizes = [], []
    squares = pairs = 0.0
    for label_set in range(int(which.max()) + 1):
        members = codes[which.ravel() == label_set].astype(np.int64)
        n = len(members)
        if n < SMALLEST_SET:
            continue
        total = members.sum(axis=0)
        agreements.append(_agreement(total, n))
        sizes.append(n)
        wrong = members != np.where(total >= 0, 1, -1)
        wrong = wrong[:, wrong.any(axis=0)]
        k = wrong.shape[1]
        if k > 1:
            correlation = np.corrcoef(wrong.T)
            squares += (n - 1) * ((correlation**2).sum() - k)
            pairs += k * (k - 1)
    if not sizes:
        return BitErrors(0.0, 0.0, 0)
    overall = _agreement(codes.sum(axis=0, dtype=np.int64), len(codes))
    within = float(np.average(agreements, weights=sizes))
    scaled = (within - overall) / (1 - overall) if overall < 1 else 0.0
    return BitErrors(scaled, squares / pairs if pairs else 0.0, len(sizes))


def _agreement(total: np.ndarray, n: int) -> float:
    """Mean product of a bit of two of n items, from the sum of each bit over them, [K]."""
    return float(((total * total - n) / (n * (n - 1))).mean())


def labels_read_off(codes: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Share of the classes of held-out items that a linear map of their codes names.

    Ridge regression on one half of the items; for each item of the other half the classes with the
    highest values are taken, as many as it has.
    """
    order = np.random.default_rng(seed).permutation(len(codes))
    fit, held_out = np.array_split(order, 2)
    x = np.concatenate([codes, np.ones((len(codes), 1))], axis=1).astype(np.float64)
    gram = x[fit].T @ x[fit] + 10.0 * np.eye(x.shape[1])
    scores = x[held_out] @ np.linalg.solve(gram, x[fit].T @ labels[fit])
    rank = (-scores).argsort(axis=1).argsort(axis=1)
    truth = labels[held_out] > 0
    named = rank < truth.sum(axis=1, keepdims=True)
    return float((named & truth).sum() / max(1, truth.sum()))


def audit_codes(path: Path) -> bool:
    """Print the evidence on a code file; True where its codes are implausible."""
    verdict = False
    for task, codes in code_files.load(path).items():
        found = bit_errors(codes.query, codes.query_labels)
        verdict = verdict or found.implausible
        print(f"{shown(str(path), codes.oracle_labels)} ({task}, {codes.bits} bits)")
        for line in evidence(path.name, task, codes, found):
            print(f"  {line}")
    return verdict


def evidence(name: str, task: str, codes: Codes, found: BitErrors) -> list[str]:
    """What speaks for or against codes, each figure beside that of honest codes."""
    read = labels_read_off(codes.query, codes.query_labels)
    lines = [
        f"agreement of queries with identical labels: {found.agreement:.3f}"
        f" ({found.sets} label sets of {SMALLEST_SET} queries or more)",
        f"dependence of bit errors: {found.dependence:.2f}",
        f"implausible from {AGREEMENT} agreement on, at this one with a dependence up to "
        f"{largest_dependence(found.agreement):.2f}; seen (agreement, dependence):",
        *(f"  {kind}: {seen}" for kind, seen in CALIBRATION.items()),
        f"labels read off held-out query codes: {read:.3f} of all classes",
        f"mAP@all: {evaluate(codes)[0].value:.4f}, chance {chance(codes):.4f}",
    ]
    honest = best_honest(name, task, codes.bits)
    if honest:
        value, entry = honest
        lines.append(
            f"best published mAP without oracle labels: {value:.4f}, {entry.method}"
            f" ({entry.protocol})"
        )
    return lines


def chance(codes: Codes) -> float:
    """Share of relevant pairs: mAP@all of a random ranking, nearly."""
    shared = codes.query_labels.astype(np.float32) @ codes.database_labels.astype(np.float32).T
    return float((shared > 0).mean())


# -- command ---------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="RUN", help="the folder of a run")
    what.add_argument("--codes", type=Path, metavar="FILE", nargs="+", help="code files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.path=PATH")
    given = parser.parse_intermixed_args(arguments)
    if given.codes:
        verdicts = [audit_codes(path) for path in given.codes]
        print("implausible" if any(verdicts) else "nothing implausible")
        return IMPLAUSIBLE if any(verdicts) else 0
    run = run_folder.load(given.checkpoint)
    config = override(run.config, given.overrides)
    data = load_data(config.data, config.encoder)
    run_folder.check_data(run, data)
    trials = audit_checkpoint(run.method, data)
    print(shown(f"{config.method} on {data.name}", config.oracle_labels))
    for trial in trials:
        near = f", {trial.near_zero} within {NEAR_ZERO:g} of zero" if trial.near_zero else ""
        print(f"{trial.name}: {trial.changed} of {trial.bits:,} bits changed{near}")
    for name, count in duplicates(data).items():
        print(f"queries that are also in the {name}: {count} of {len(data.query)}")
    leaks = any(trial.changed for trial in trials)
    print("leak" if leaks else "no leak")
    return LEAK if leaks else 0


if __name__ == "__main__":
    errors.run(main)
