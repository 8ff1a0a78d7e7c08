"""The run whose codes find best for a text alone and an image alone, for an index of a demo.

python scripts/best_run.py checkpoint/emoji/hq/0 checkpoint/emoji/cmcl/0 ...

It compares the mean mAP@all of both at the longest code, as the runs' own tables have them, and
prints the folder of the best. It picks what is shown, not a number that is reported.
"""

from __future__ import annotations

from pathlib import Path

from vhabl.system import errors
from vhabl.training import run_folder

ALONE = ("i2t", "t2i", "i2f", "t2f")


def score(folder: Path) -> float:
    """The mean of mAP@all over queries of one modality; -1 of a run that serves none, or that has
    oracle labels.
    """
    found = [
        r for r in run_folder.read_records(folder / "metrics.json")
        if r.measure == "mAP@all" and r.ties == "expected" and r.database == "all"
        and r.task in ALONE and not r.oracle_labels
    ]  # fmt: skip
    longest = [r.value for r in found if r.bits == max(f.bits for f in found)]
    return sum(longest) / len(longest) if longest else -1.0


def main(arguments: list[str]) -> int:
    scores = {folder: score(Path(folder)) for folder in arguments}
    best = max(scores, key=lambda folder: scores[folder], default="")
    if not best or scores[best] < 0:
        errors.note("no run serves a text or an image alone: no index")
        return 1
    print(best)
    return 0


if __name__ == "__main__":
    errors.run(main)
