"""Build the pairs of MS COCO from its official download of 2014 or 2017.

SOURCE holds the unpacked annotations_trainval2017.zip, train2017.zip and val2017.zip (or 2014).
The items are the images with an object of a category; an item has several captions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import maker_features
import makers
import numpy as np
from makers import Made

from vhabl.system import errors

YEARS = (2014, 2017)
KINDS, PARTS = ("instances", "captions"), ("train", "val")
PUBLISHED = {"pairs": 122_218, "classes": 80}
WHOLE = "Take the whole file of the official download"  # what to do about a part that is wrong
CAPTION_SEED = 1  # as the split's
Layout = dict[str, dict[str, type]]  # the lists of a file and the fields of their entries
INSTANCES: Layout = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
CAPTIONS: Layout = {"annotations": {"id": int, "image_id": int, "caption": str}}


def main(arguments: list[str]) -> int:
    parser = makers.parser(__doc__ or "", "download of MS COCO", "dataset/coco")
    parser.add_argument(
        "--year", type=int, choices=YEARS, help="default: that of the files in SOURCE/annotations"
    )
    parser.add_argument(
        "--one-caption",
        action="store_true",
        help="keep one caption of each image, drawn once at random, as in CMCL's release; without "
        "it all, of which training draws one at each visit",
    )
    _, made = maker_features.make(
        parser, arguments, "coco", lambda o: read(o.source, o.year, o.one_caption)
    )
    print(makers.describe(made, PUBLISHED))
    return 0


def read(source: Path, year: int | None = None, one_caption: bool = False) -> Made:
    """The images with a category: those of train, then those of val, each by image id.

    labels [N, categories by id]. one_caption: keep one of each image's, drawn with a fixed seed.
    Raises VhablError where a part of the download is missing or damaged, or the parts disagree.
    """
    folder = source / "annotations"
    year = year or find_year(folder)
    class_names: dict[int, str] = {}
    index: list[str] = []
    captions: list[list[str]] = []
    classes: list[set[int]] = []
    for part in (f"{name}{year}" for name in PARTS):
        names, images, owned = read_instances(folder / f"instances_{part}.json")
        if class_names and names != class_names:
            what = "its categories differ from those of train"
            do = "Take both parts from one download"
            errors.fail(folder / f"instances_{part}.json", what, do)
        class_names = names
        check_images(source / part, images)
        texts = read_captions(folder / f"captions_{part}.json", images)
        for image in sorted(owned):
            index.append(f"{part}/{images[image]}")
            captions.append(texts.get(image) or [""])
            classes.append(owned[image])
        if bare := len(images) - len(owned):
            errors.note(f"{part}: {errors.plural(bare, 'image')} without a category left out")
    if one_caption:
        draws = np.random.RandomState(CAPTION_SEED).random_sample(len(captions))
        captions = [[own[int(u * len(own))]] for own, u in zip(captions, draws, strict=True)]
    return Made(
        index,
        [source / path for path in index],
        captions,
        np.array([[name in own for name in class_names] for own in classes], np.uint8),
        list(class_names.values()),
    )


def find_year(folder: Path) -> int:
    """The year of the annotations in a folder. Raises VhablError where there is not just one."""
    years = [
        year
        for year in YEARS
        if any((folder / f"{kind}_{part}{year}.json").exists() for kind in KINDS for part in PARTS)
    ]
    if not years:
        do = "Unpack annotations_trainval2014.zip or annotations_trainval2017.zip there"
        errors.fail(folder, "no instances_*.json or captions_*.json in it", do)
    if len(years) > 1:
        errors.fail(
            folder, "it holds annotations of 2014 and of 2017", "Choose one of them with --year"
        )
    return years[0]


def read_instances(path: Path) -> tuple[dict[int, str], dict[int, str], dict[int, set[int]]]:
    """Categories by id, in that order; file names by image id; categories by image id.

    Raises VhablError where the file is missing or damaged, or names an unknown image or category.
    """
    images, annotations, categories = load(path, INSTANCES)
    file_names, names = unique(path, "images", images), unique(path, "categories", categories)
    owned: dict[int, set[int]] = {}
    for image, category in annotations:
        if image not in file_names:
            errors.fail(f"{path}: annotations", f"image_id {image} is none of its images", WHOLE)
        if category not in names:
            what = f"category_id {category} is none of its categories"
            errors.fail(f"{path}: annotations", what, WHOLE)
        owned.setdefault(image, set()).add(category)
    return dict(sorted(names.items())), file_names, owned


def read_captions(path: Path, images: dict[int, str]) -> dict[int, list[str]]:
    """Captions by image id, in the order of their own ids: each one line, none of them empty.

    Raises VhablError where the file is missing or damaged, or names an unknown image.
    """
    (annotations,) = load(path, CAPTIONS)
    captions: dict[int, list[str]] = {}
    for _, image, caption in sorted(annotations):
        if image not in images:
            what = f"image_id {image} is no image of the instances"
            errors.fail(f"{path}: annotations", what, WHOLE)
        if words := caption.split():
            captions.setdefault(image, []).append(" ".join(words))
    return captions


def load(path: Path, layout: Layout) -> list[list[tuple[Any, ...]]]:
    """The lists of a JSON file that the layout names, an entry's fields as a tuple.

    Raises VhablError where the file is missing, damaged or of another layout.
    """
    makers.find([path], f"annotations_trainval{path.stem[-4:]}.zip")
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:
        errors.fail(path, f"the JSON is damaged ({error})", WHOLE)
    result = []
    for key, fields in layout.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            errors.fail(f"{path}: {key}", "it is no list", WHOLE)
        for number, entry in enumerate(entries):
            values = entry if isinstance(entry, dict) else {}
            if any(type(values.get(name)) is not kind for name, kind in fields.items()):
                expected = " and ".join(
                    f"{name} ({kind.__name__})" for name, kind in fields.items()
                )
                errors.fail(f"{path}: {key}[{number}]", f"its fields are not {expected}", WHOLE)
        result.append([tuple(entry[name] for name in fields) for entry in entries])
    return result


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)  # the bulk of the file, and of memory
    return entry


def unique(path: Path, key: str, entries: list[tuple[int, str]]) -> dict[int, str]:
    """Names by id. Raises VhablError where an id is there twice."""
    result: dict[int, str] = {}
    for number, name in entries:
        if number in result:
            errors.fail(f"{path}: {key}", f"two entries have the id {number}", WHOLE)
        result[number] = name
    return result


def check_images(folder: Path, images: dict[int, str]) -> None:
    """Say how many files no annotation names. Raises VhablError where an image is missing."""
    download = f"{folder.name}.zip"
    makers.find([folder], download)
    makers.require_images([folder / name for name in images.values()], download)
    others = {file.name for file in folder.glob("*.jpg")} - set(images.values())
    if others:
        errors.note(
            f"{folder.name}: {errors.plural(len(others), 'image')} without annotation left out"
        )


if __name__ == "__main__":
    errors.run(main)
