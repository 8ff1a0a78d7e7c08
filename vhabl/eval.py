"""Evaluate a saved run, several seeds of one, or code files.

python -m vhabl.eval --checkpoint checkpoint/wiki/vh_abl/0 [--bits 12]
python -m vhabl.eval --compare checkpoint/wiki/vh_abl checkpoint/wiki/nested_mlp
python -m vhabl.eval --codes flickrhashcode/wiki/VH-ABL_64-wiki_bits.mat --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vhabl import codes
from vhabl.evaluation.records import (
    MeasureSet,
    Record,
    measure,
    own_positions,
    real_valued_records,
    records,
    shown,
    with_one_modality,
)
from vhabl.metrics import per_query, permutation_test
from vhabl.report import print_table
from vhabl.system import errors
from vhabl.system.errors import fail
from vhabl.training import run_folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.eval", description="Evaluate a saved run or a code file, exactly."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="a run folder, or a folder above several seeds (mean and deviation)",
    )
    what.add_argument(
        "--codes",
        type=Path,
        metavar="FILE",
        nargs="+",
        help="code files, .mat in the releases' layouts or packed .npz",
    )
    what.add_argument(
        "--compare",
        type=Path,
        metavar=("RUN_A", "RUN_B"),
        nargs=2,
        help="mAP@all of two runs (or folders of seeds) and whether the difference is chance",
    )
    parser.add_argument(
        "--bits",
        type=_lengths,
        default=None,
        metavar="N[,N...]",
        help="code lengths; default: those of the run",
    )
    parser.add_argument(
        "--measures",
        choices=("headline", "all", "curves"),
        default=None,
        help="headline (mAP@all) is the default for runs, all for code files; "
        "curves adds precision and recall over ranks and radii",
    )
    parser.add_argument(
        "--keep-own",
        action="store_true",
        help="keep a query that is in the database itself (it is left out by default)",
    )
    parser.add_argument("--json", action="store_true", help="one record a line instead of a table")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="data.path=PATH or device=NAME, where they differ from the run's",
    )
    given = parser.parse_intermixed_args(arguments)
    if given.compare:
        first, second = given.compare
        print(compare(first, second, given.bits, given.overrides))
        return 0
    if given.codes:
        if given.bits or given.overrides:
            fail("--codes", "neither --bits nor overrides go with it", "Give code files alone")
        rows = evaluate_files(given.codes, given.measures or "all")
    else:
        if not given.json:  # a table has the mean over seeds
            run_folder.require_alike(run_folder.find(given.checkpoint))
        rows = evaluate_runs(
            given.checkpoint,
            given.bits,
            given.measures or "headline",
            given.overrides,
            given.keep_own,
        )
    if given.json:
        for row in rows:
            print(json.dumps(row.as_dict()))
    else:
        for measure, ties in dict.fromkeys((r.measure, r.ties) for r in rows):
            print_table(rows, measure, ties)
    return 0


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length such as 12 or 16,32") from None


def evaluate_runs(
    folder: Path,
    bits: list[int] | None,
    measures: MeasureSet,
    overrides: list[str],
    keep_own: bool = False,
) -> list[Record]:
    """Encode and measure again every run at or below a folder."""
    rows: list[Record] = []
    for run, data, found in run_folder.encoded(
        map(run_folder.load, run_folder.find(folder)), bits, overrides
    ):
        config, everything = run.config, with_one_modality(run.method, data, found)
        rows += records(config.title, data, everything, config.seed, measures, keep_own)
        if measures != "headline":
            rows += real_valued_records(
                run.method, data, list(found), config.seed, keep_own, config.title
            )
    return rows


def compare(a: Path, b: Path, bits: list[int] | None, overrides: list[str]) -> str:
    """A line for each length: both means, their difference and its p-value under the paired
    permutation test on per-query AP, each query's AP averaged over the seeds of a row.
    """
    (rows_a, judges_a, oracle_a), (rows_b, judges_b, oracle_b) = (
        _query_precisions(folder, bits, overrides) for folder in (a, b)
    )
    rows = rows_a, rows_b
    named = f"A = {shown(str(a), oracle_a)}, B = {shown(str(b), oracle_b)}"
    lines = [f"mAP@all, expected order of ties; {named}"]
    for key in rows[0]:
        if key not in rows[1]:
            continue
        first, second = (np.mean(row[key], axis=0) for row in rows)
        if not np.array_equal(judges_a[key], judges_b[key]):
            found = f"{len(first)} and {len(second)} queries, whose labels differ"
            fail(f"{a} and {b}", found, "Compare runs on the same data and split")
        p = permutation_test(first, second)
        seeds = f"{len(rows[0][key])} and {len(rows[1][key])} seeds"
        lines.append(
            f"{key[1]} {key[0]} bits: A {first.mean():.4f}  B {second.mean():.4f}  "
            f"A - B {first.mean() - second.mean():+.4f}  p = {p:.4f}  "
            f"({seeds}, {len(first)} queries)"
        )
    if len(lines) == 1:
        fail(f"{a} and {b}", "no code length and task is in both", "Compare runs that share one")
    return "\n".join(lines)


def _query_precisions(
    folder: Path, bits: list[int] | None, overrides: list[str]
) -> tuple[dict[tuple[int, str], list[np.ndarray]], dict[tuple[int, str], np.ndarray], bool]:
    """AP of each query (0 where it has no match) of every run at or below a folder, the labels of
    the queries, and whether any was made with oracle labels.
    """
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    judges: dict[tuple[int, str], np.ndarray] = {}
    oracle = False
    folders = run_folder.find(folder)
    run_folder.require_alike(folders)
    for _, data, codes_of_run in run_folder.encoded(map(run_folder.load, folders), bits, overrides):
        own = own_positions(data.query.sources, data.database.sources)
        for length, tasks in codes_of_run.items():
            for task, part in tasks.items():
                values = np.nan_to_num(per_query(part, own=own))
                found.setdefault((length, task), []).append(values)
                judges[length, task] = part.query_labels
                oracle = oracle or part.oracle_labels
    return found, judges, oracle


def evaluate_files(paths: list[Path], measures: MeasureSet) -> list[Record]:
    """Measure code files: records whose method is the file's path."""
    rows: list[Record] = []
    for path in paths:
        for task, found in codes.load(path).items():
            name = str(path)
            oracle = found.oracle_labels
            template = Record(name, "file", task, found.bits, "", 0.0, 0, "", oracle, 0, 0, "all")
            rows += measure(found, template, measures)
    return rows


if __name__ == "__main__":
    errors.run(main)
