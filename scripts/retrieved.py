"""A picture of retrieved pairs: some queries of the shipped data set and their nearest items.

python scripts/retrieved.py --checkpoint checkpoint/emoji/vh_abl/0 --bits 64 --out retrieved.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from vhabl.data.images import open_image
from vhabl.report.gallery import Gallery, Item
from vhabl.system import errors
from vhabl.system.files import atomic_path
from vhabl.training import run_folder

RIGHT, WRONG = "#009E73", "#D55E00"  # told apart by colour-blind readers, and by the mark


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--queries", type=int, nargs="+", default=[3, 8, 15, 21, 40, 57])
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)

    ((run, data, codes),) = run_folder.encoded(
        [run_folder.load(given.checkpoint)], [given.bits], []
    )
    if not run.config.data.has_files:
        do = "Give a run on image-text pairs"
        errors.fail(given.checkpoint, f"its data are of kind {run.config.data.kind}", do)
    gallery = Gallery(run.config.data, data)
    task, found = next(iter(codes[given.bits].items()))  # i2t of a cross-modal run
    if max(given.queries) >= len(found.query):
        errors.bad_value("--queries", max(given.queries), f"below {len(found.query)}")

    columns = given.top + 1
    size = (0.72 * columns + 0.3, 0.95 * len(given.queries) + 0.4)
    figure, grid = plt.subplots(len(given.queries), columns, figsize=size, dpi=160, squeeze=False)
    for row, number in zip(grid, given.queries, strict=True):
        query, hits = gallery.row(found, number, given.top)
        show(row[0], query, "query", "#000000")
        for axes, hit in zip(row[1:], hits, strict=True):
            label = f"{'✓' if hit.right else '✗'} {hit.distance}"
            show(axes, hit.item, label, RIGHT if hit.right else WRONG)
    figure.suptitle(
        f"{run.config.title}, {given.bits} bits, {task}: nearest pairs, Hamming distance, "
        "✓ shares a label with the query",
        fontsize=8,
    )
    figure.tight_layout(pad=0.4)
    with atomic_path(given.out) as path:
        figure.savefig(path, format="png")
    return 0


def show(axes: plt.Axes, item: Item, label: str, colour: str) -> None:
    assert item.image is not None
    image = open_image(item.image)
    axes.imshow(image)
    side = image.size[0]
    axes.add_patch(Rectangle((-0.5, -0.5), side, side, fill=False, color=colour, linewidth=1.5))
    axes.set_title(label, fontsize=7, color=colour, pad=2)
    axes.axis("off")


if __name__ == "__main__":
    errors.run(main)
