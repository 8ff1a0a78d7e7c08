"""Build the pairs of NUS-WIDE from its official download.

SOURCE holds the unpacked ImageList, Groundtruth and NUS_WID_Tags, and the images in Flickr or
images. An image's caption is those of the 1,000 tags that it has. Not built: the selection of
192,779 pairs that some papers use, whose rule is not published.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import maker_features
import makers
import numpy as np
from makers import Made

from vhabl.system import errors

CONCEPTS = 81
PUBLISHED = {
    "tags": {"pairs": 190_421, "classes": 21, "tags": 1_000},
    "concepts": {"pairs": 195_834, "classes": 21, "tags": 1_000},
}
BITS = (b"0", b"1")


def main(arguments: list[str]) -> int:
    parser = makers.parser(__doc__ or "", "download of NUS-WIDE", "dataset/nuswide")
    parser.add_argument(
        "--selection",
        choices=PUBLISHED,
        default="tags",
        help="tags: images of a class with one of the 1,000 tags (190,421); concepts: every image "
        "of a class (195,834), the caption may be empty; default: %(default)s",
    )
    parser.add_argument(
        "--classes",
        type=int,
        default=21,
        help="the classes are so many concepts with the most images; default: %(default)s",
    )
    options, made = maker_features.make(
        parser, arguments, "nuswide", lambda o: read(o.source, o.selection, o.classes)
    )
    print(makers.describe(made, PUBLISHED[options.selection]))
    return 0


def read(source: Path, selection: str = "tags", classes: int = 21) -> Made:
    """The images of the most frequent concepts, in the order of the list.

    labels [N, classes]. selection: tags leaves out images without a tag, concepts keeps them.
    Raises VhablError where a part of the download is missing or damaged, or the parts disagree.
    """
    if not 1 <= classes <= CONCEPTS:
        errors.bad_value("--classes", classes, f"from 1 to {CONCEPTS}")
    index = read_index(source)
    names, labels = read_labels(source, len(index), classes)
    tag_folder = source / "NUS_WID_Tags"
    word_file = makers.find([tag_folder / "TagList1k.txt"], "NUS_WID_Tags.zip")
    words = makers.read_lines(word_file, "the name of a tag on each line", ".+")
    tag_file = makers.find([tag_folder / "AllTags1k.txt"], "NUS_WID_Tags.zip")
    labelled = set(np.flatnonzero(labels.any(axis=1)).tolist())
    chosen, tags = [], []
    for row, own in enumerate(read_tags(tag_file, len(index), len(words))):
        if row in labelled and (len(own) or selection == "concepts"):
            chosen.append(row)
            tags.append([words[i] for i in own])
    index = [index[row] for row in chosen]
    return Made(
        index,
        find_images(source, index),
        [[" ".join(own)] for own in tags],
        labels[chosen].astype(np.uint8),
        names,
        words,
        tags,
    )


def read_index(source: Path) -> list[str]:
    """The images' paths, with slashes. Raises VhablError where the list is missing or has gaps."""
    path = makers.find([source / "ImageList" / "Imagelist.txt"], "ImageList.zip")
    lines = makers.read_lines(path, "the path of an image on each line", r".*[^\\/]")
    return [line.replace("\\", "/") for line in lines]


def read_labels(source: Path, items: int, classes: int) -> tuple[list[str], np.ndarray]:
    """The concepts with the most images, by name, and bool [items, classes]: who belongs to them.

    Of concepts with as many images the first by name is taken. Raises VhablError where there are
    not 81 files, or one of them has not a 0 or 1 for each item.
    """
    places = [source / "Groundtruth" / "AllLabels", source / "AllLabels"]
    folder = makers.find(places, "Groundtruth.zip")
    files = {path.stem.removeprefix("Labels_"): path for path in folder.glob("Labels_*.txt")}
    if len(files) != CONCEPTS:
        do = f"Unpack all {CONCEPTS} of Groundtruth.zip there"
        errors.fail(folder, errors.plural(len(files), "file") + " Labels_*.txt", do)
    columns = {name: read_column(files[name], items) for name in sorted(files)}
    frequent = sorted(columns, key=lambda name: (-np.count_nonzero(columns[name]), name))
    names = sorted(frequent[:classes])
    return names, np.stack([columns[name] for name in names], axis=1)


def read_column(path: Path, items: int) -> np.ndarray:
    """Who belongs to a concept: bool [items]. Raises VhablError where the file is another."""
    lines = makers.read_lines(path, "0 or 1 on each line", "[01]")
    if len(lines) != items:
        do = "Take both from one download"
        errors.fail(path, f"{len(lines):,} lines for {items:,} of Imagelist.txt", do)
    return np.array(lines) == "1"


def read_tags(path: Path, items: int, width: int) -> Iterator[np.ndarray]:
    """For each item the positions of its tags, line by line: the file is half a gigabyte.

    Raises VhablError where a row is not of `width` times 0 or 1, or there are not `items` rows.
    """
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue  # blank lines at the end; one within shows in the number of rows
            if len(fields) != width:
                what = f"{len(fields):,} numbers for {width:,} lines of TagList1k.txt"
                errors.fail(f"{path}: line {number}", what, "Take both from one download")
            bad = set(fields).difference(BITS)
            if bad:
                what = f"{repr(min(bad))[1:]}, where only 0 and 1 can be"
                do = "Take the whole file of the official download"
                errors.fail(f"{path}: line {number}", what, do)
            rows += 1
            yield np.flatnonzero(np.frombuffer(b"".join(fields), np.uint8) == ord("1"))
    if rows != items:
        do = "Take both from one download"
        errors.fail(path, f"{rows:,} rows for {items:,} lines of Imagelist.txt", do)


def find_images(source: Path, index: list[str]) -> list[Path]:
    """Where the images lie, by base name. Raises VhablError where one is missing or there twice."""
    download = "NUS-WIDE, in folders of concepts"
    root = makers.find([source / "Flickr", source / "images"], download)
    names = [PurePosixPath(path).name for path in index]
    wanted = set(names)
    found = makers.by_base_name(
        Path(folder, name) for folder, _, there in os.walk(root) for name in there if name in wanted
    )
    # The walk does not follow links to folders; the path as listed does.
    files = [found.get(name, root / path) for name, path in zip(names, index, strict=True)]
    makers.require_images(files, download)
    return files


if __name__ == "__main__":
    errors.run(main)
