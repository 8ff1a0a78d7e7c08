"""Print the table of runs: python -m vhabl.report checkpoint/emoji [FOLDER ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

from vhabl import errors
from vhabl.report import print_table
from vhabl.runs import METRICS_FILE, read_records


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.report",
        description="A table of all metrics.json files at or below the folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--measure", default="mAP@all", help="default: mAP@all")
    given = parser.parse_args(arguments)
    files = [file for folder in given.folders for file in sorted(folder.rglob(METRICS_FILE))]
    if not files:
        folders = " ".join(map(str, given.folders))
        errors.fail(folders, f"no {METRICS_FILE}", "folders of runs that training wrote")
    rows = [row for file in files for row in read_records(file)]
    for data in dict.fromkeys(row.data for row in rows):
        print(f"\n{data}")
        print_table([row for row in rows if row.data == data], given.measure)
    return 0


if __name__ == "__main__":
    errors.run(main)
