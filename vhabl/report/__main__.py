"""Print the table of runs and write their report: python -m vhabl.report checkpoint/emoji."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path

from vhabl.report import page, print_table
from vhabl.system import errors
from vhabl.training.run_folder import METRICS_FILE, WEIGHTS_FILE, read_records, require_alike


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.report",
        description="A table of all metrics.json files at or below the folders, and a report: the "
        "table as Markdown, CSV, LaTeX and JSON, plots as PNG and SVG, and one HTML page.",
    )
    parser.add_argument(
        "given",
        nargs="+",
        metavar="FOLDER|key=value",
        help="folders of runs; data.path=PATH or device=NAME where they differ from the runs'",
    )
    parser.add_argument("--measure", default="mAP@all", help="of the printed table [mAP@all]")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: report/ in the first folder"
    )
    parser.add_argument("--table-only", action="store_true", help="print, and write nothing")
    given = parser.parse_intermixed_args(arguments)
    overrides = [text for text in given.given if "=" in text]
    folders = [Path(text) for text in given.given if "=" not in text]
    records = {file.parent: read_records(file) for folder in folders for file in _files(folder)}
    if not records:
        errors.fail("FOLDER", "none is given", "Give folders of runs that training wrote")
    measures = sorted({row.measure for rows in records.values() for row in rows})
    if given.measure not in measures:
        near = get_close_matches(given.measure, measures, 5, 0.0)
        errors.bad_value("--measure", given.measure, f"a measure such as {', '.join(near)}")
    data_sets = dict.fromkeys(row.data for rows in records.values() for row in rows)
    out = given.out or folders[0] / "report"
    for data in data_sets:
        print(f"\n{data}")
        own = {folder: rows for folder, rows in records.items() if rows and rows[0].data == data}
        trained = [folder for folder in own if (folder / WEIGHTS_FILE).is_file()]
        require_alike(trained)
        # Reference rows are for the tasks that a trained method serves.
        served = {row.task for folder in trained for row in own[folder]}
        rows = [r for found in own.values() for r in found if r.task in served or not served]
        orders = {row.ties for row in rows if row.measure == given.measure}
        ties = "expected" if "expected" in orders else min(orders, default="")
        print_table(rows, given.measure, ties, with_published=True)
        if given.table_only:
            continue
        target = out if len(data_sets) == 1 else out / data
        page.write(target, rows, trained, overrides)
        print(f"report: {target / 'index.html'}")
    return 0


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob(METRICS_FILE))
    if not found:
        errors.fail(
            folder, f"no {METRICS_FILE} is in it", "Give a folder of runs that training wrote"
        )
    return found


if __name__ == "__main__":
    errors.run(main)
