"""Build the pairs of MIRFLICKR-25000 from its official download.

SOURCE holds mirflickr25k.zip, unpacked (im1.jpg and so on, meta/tags), and
mirflickr25k_annotations_v080.zip, unpacked there or beside it. An image's caption is its tags.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import maker_features
import makers
import numpy as np
from makers import Made

from vhabl.system import errors

# The files *_r1.txt of the annotations are stricter versions of some of these labels.
CLASSES = [
    "animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor",
    "lake", "male", "night", "people", "plant_life", "portrait", "river", "sea", "sky",
    "structures", "sunset", "transport", "tree", "water",
]  # fmt: skip
TAGS = {"classes": 24, "tags": 1_386}
PUBLISHED = {False: {"pairs": 20_015, **TAGS}, True: {"pairs": 24_581, **TAGS}}
IMAGES, ANNOTATIONS = "mirflickr25k.zip", "mirflickr25k_annotations_v080.zip"


def main(arguments: list[str]) -> int:
    parser = makers.parser(__doc__ or "", f"{IMAGES} and {ANNOTATIONS}", "dataset/flickr25k")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every image with a label (24,581), not only those that also have a tag of the "
        "vocabulary (20,015)",
    )
    parser.add_argument(
        "--min-count",
        type=int,
        default=20,
        help="the vocabulary holds the tags of at least so many images; default: %(default)s",
    )
    parser.add_argument(
        "--vocabulary-captions",
        action="store_true",
        help="captions hold the tags of the vocabulary alone, as in CMCL's release; without it "
        "all tags",
    )
    options, made = maker_features.make(
        parser,
        arguments,
        "mirflickr",
        lambda o: read(o.source, o.all, o.min_count, o.vocabulary_captions),
    )
    print(makers.describe(made, PUBLISHED[options.all]))
    return 0


def read(
    source: Path, every: bool = False, min_count: int = 20, vocabulary_captions: bool = False
) -> Made:
    """The labelled images, by number: those with a tag of the vocabulary, or every one.

    labels [N, 24]. vocabulary_captions: captions leave out the other tags. Raises
    VhablError where a part of the download is missing or damaged.
    """
    folder = source / "mirflickr" if (source / "mirflickr").is_dir() else source
    tags = read_tags(makers.find([folder / "meta" / "tags", source / "meta" / "tags"], IMAGES))
    names = (Path(ANNOTATIONS).stem, "annotations")
    places = [place / name for place in (source, folder, source.parent) for name in names]
    members = read_members(makers.find(places, ANNOTATIONS))
    labelled = set().union(*members)
    # Every image of the download has a file of tags, so these numbers are all that should be there.
    numbers = sorted(labelled | tags.keys())
    makers.require_images([folder / f"im{number}.jpg" for number in numbers], IMAGES)

    counts = Counter(tag for own in tags.values() for tag in set(own))
    words = sorted(tag for tag, count in counts.items() if count >= min_count)
    vocabulary = set(words)
    chosen = [
        number
        for number in sorted(labelled)
        if every or not vocabulary.isdisjoint(tags.get(number, []))
    ]
    chosen_tags = [tags.get(number, []) for number in chosen]
    in_captions = [
        [tag for tag in own if tag in vocabulary or not vocabulary_captions] for own in chosen_tags
    ]
    index = [f"im{number}.jpg" for number in chosen]
    return Made(
        index,
        [folder / name for name in index],
        [[" ".join(own)] for own in in_captions],
        np.array([[number in own for own in members] for number in chosen], np.uint8),
        CLASSES,
        words,
        chosen_tags,
    )


def read_tags(folder: Path) -> dict[int, list[str]]:
    """The tags of every image that has a file of them, in its order. Raises VhablError where
    a file is not UTF-8.
    """
    result = {}
    for path in sorted(folder.glob("tags*.txt")):
        if match := re.fullmatch(r"tags([0-9]+)\.txt", path.name):
            lines = makers.read_lines(path, "a tag on each line, in UTF-8")
            result[int(match[1])] = [line for line in lines if line]
    return result


def read_members(folder: Path) -> list[set[int]]:
    """For each class the numbers of its images. Raises VhablError where a line is no number."""
    members = []
    for name in CLASSES:
        path = makers.find([folder / f"{name}.txt"], ANNOTATIONS)
        lines = makers.read_lines(path, "the number of an image on each line", "[1-9][0-9]*")
        members.append({int(line) for line in lines})
    return members


if __name__ == "__main__":
    errors.run(main)
