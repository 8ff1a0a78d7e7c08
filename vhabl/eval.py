"""Evaluate a saved run, several seeds of one, or code files.

python -m vhabl.eval --checkpoint checkpoint/wiki/vh_abl/0 [--bits 12]
python -m vhabl.eval --codes flickrhashcode/wiki/VH-ABL_64-wiki_bits.mat --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vhabl import codes, errors, runs
from vhabl.config import override
from vhabl.data import load as load_data
from vhabl.errors import fail
from vhabl.evaluator import MeasureSet, Record, code_tasks, measure, records
from vhabl.report import print_table
from vhabl.settings import DataConfig
from vhabl.trainer import pick_device
from vhabl.types import Dataset


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
    if given.codes:
        if given.bits or given.overrides:
            fail("argument --codes", "--bits or an override beside it", "code files alone")
        rows = evaluate_files(given.codes, given.measures or "all")
    else:
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
    data: Dataset | None = None
    data_config: DataConfig | None = None
    for path in runs.find(folder):
        run = runs.load(path)
        config = override(run.config, overrides)
        if data is None or config.data != data_config:  # seeds of one run share their data
            data, data_config = load_data(config.data), config.data
        runs.check_data(run, data)
        method = run.method.to(pick_device(config.device))
        found = code_tasks(method, data, bits or config.bits)
        rows += records(method.title, data, found, config.seed, measures, keep_own)
    return rows


def evaluate_files(paths: list[Path], measures: MeasureSet) -> list[Record]:
    """Measure code files: records whose method is the file's path."""
    rows: list[Record] = []
    for path in paths:
        for task, found in codes.load(path).items():
            name = str(path)
            template = Record(name, "file", task, found.bits, "", 0.0, 0, "", False, 0, 0, "all")
            rows += measure(found, template, measures)
    return rows


if __name__ == "__main__":
    errors.run(main)
