"""The makers of pairs read the official layouts, and the reader of pairs reads what they write."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tracemalloc
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from helpers import SHARED, TINY_TOWERS, TinyAlexNet
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vhabl.config import CONFIG_DIR, load_data_config
from vhabl.data.features import load_features
from vhabl.data.images import open_image, read_pixels
from vhabl.data.matlab import read_mat
from vhabl.data.pairs import Pairs, read_pairs
from vhabl.encoders import ClipEncoder, cnn, open_clip
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import VhablError
from vhabl.types import Inputs, Split

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import make_coco
import make_flickr
import make_nuswide
import maker_features
import makers

SCRIPTS = Path(makers.__file__).parent
COCO_MINI = SHARED / "coco_mini"
FILES = {"caption.mat", "index.mat", "label.mat", "classes.txt", "images"}
Main = Callable[[list[str]], int]


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "JPEG")
    return file.getvalue()


JPEG = jpeg()


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read_back(out: Path) -> Pairs:
    config = DataConfig(name="made", kind="pairs", path=str(out), image_root="images")
    pairs = read_pairs(out, config)
    assert all(file.is_file() for file in pairs.files)
    assert len({file.resolve() for file in pairs.files}) == len(pairs.files)
    for path, file in zip(pairs.ids, pairs.files, strict=True):
        assert str(file.resolve()).endswith(path.split("/")[-1])
    return pairs


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def owned(pairs: Pairs, class_names: list[str]) -> list[set[str]]:
    """The names of each item's classes."""
    assert pairs.labels.shape == (len(pairs.ids), len(class_names))
    return [{class_names[i] for i in np.flatnonzero(row)} for row in pairs.labels]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(main: Main, arguments: list[str], parts: list[str]) -> None:
    """One message that holds the parts, and no file changed."""
    before = tree(Path.cwd())
    with pytest.raises(VhablError) as caught:
        main(arguments)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert tree(Path.cwd()) == before


# MIRFLICKR-25000

FLICKR_CLASSES = [
    "animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor",
    "lake", "male", "night", "people", "plant_life", "portrait", "river", "sea", "sky",
    "structures", "sunset", "transport", "tree", "water",
]  # fmt: skip
TWENTY, NINETEEN = "ciel été", "almost"
# Images 1 to 23 have a label. 1 to 19 and 24 have the tag of twenty images; 1 to 18 and 21 that of
# nineteen, image 5 twice; 20 another tag; 22 no file of tags; 23 an empty one.
LABELLED = range(1, 24)


def flickr_tags(number: int) -> list[str]:
    tags = ["naïve", "日本", "new\u2028line"] if number == 3 else []
    tags += [NINETEEN] if number <= 18 or number == 21 else []
    tags += [TWENTY] if number <= 19 or number == 24 else []
    tags += [NINETEEN] if number == 5 else []
    return tags + (["rare"] if number == 20 else [])


def flickr_labels(number: int) -> set[str]:
    names = {FLICKR_CLASSES[(number * 5) % 24]} if number in LABELLED else set()
    return names | ({"water", "animals"} if number == 2 else set())


def flickr_source(root: Path, images: str = "", annotations: str = "annotations") -> Path:
    for number in range(1, 25):
        put(root / images / f"im{number}.jpg", JPEG + bytes([number]))
        if number != 22:
            text = "\r\n".join(["", *flickr_tags(number), "", ""])
            put(root / images / "meta" / "tags" / f"tags{number}.txt", text)
    put(root / images / "meta" / "tags" / "README.txt", b"\xff")
    for name in FLICKR_CLASSES:
        numbers = [str(n) for n in LABELLED if name in flickr_labels(n)]
        put(root / annotations / f"{name}.txt", "".join(f"{n}\r\n" for n in reversed(numbers)))
    put(root / annotations / "baby_r1.txt", "24\n")
    put(root / annotations / "README.txt", "Annotations, not numbers\n")
    return root


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("", "annotations"),
        ("mirflickr", "mirflickr25k_annotations_v080"),
        ("mirflickr", "mirflickr/annotations"),
        ("", "../mirflickr25k_annotations_v080"),
    ],
)
def test_flickr_takes_labelled_images_with_a_tag_of_twenty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: str, annotations: str
) -> None:
    source = flickr_source(tmp_path / "download", images, annotations)
    assert make_flickr.main([str(source)]) == 0

    out = tmp_path / "dataset" / "flickr25k"
    assert {path.name for path in out.iterdir()} == FILES | {"words.txt"}
    pairs = read_back(out)
    assert pairs.ids == [f"im{n}.jpg" for n in range(1, 20)]  # by number, not by name
    assert pairs.captions == [" ".join(flickr_tags(n)) for n in range(1, 20)]
    assert (
        pairs.captions[2] == f"naïve 日本 new\u2028line almost {TWENTY}"
    )  # also tags not in the vocabulary
    assert lines(out / "classes.txt") == FLICKR_CLASSES
    assert owned(pairs, FLICKR_CLASSES) == [flickr_labels(n) for n in range(1, 20)]
    assert lines(out / "words.txt") == [TWENTY]
    assert (out / "images").is_symlink()
    assert (out / "images").resolve() == (source / images).resolve()
    assert [file.read_bytes()[-1] for file in pairs.files] == list(range(1, 20))
    assert capsys.readouterr().out.splitlines() == [
        "pairs: 19; published 20,015",
        "classes: 24, as published",
        "tags: 1; published 1,386",
        "empty captions: 0",
        "captions an item: 1",
    ]


def test_flickr_all_takes_labelled_images_without_tags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = flickr_source(tmp_path / "download")
    make_flickr.main([str(source), "--all", "--out", "made"])
    pairs = read_back(tmp_path / "made")
    assert pairs.ids == [f"im{n}.jpg" for n in LABELLED]
    assert pairs.captions == [" ".join(flickr_tags(n)) for n in LABELLED]
    assert pairs.captions[19:] == ["rare", "almost", "", ""]
    assert owned(pairs, FLICKR_CLASSES) == [flickr_labels(n) for n in LABELLED]
    shown = capsys.readouterr().out
    assert "pairs: 23; published 24,581" in shown and "empty captions: 2" in shown


def test_flickr_min_count_sets_the_vocabulary(tmp_path: Path) -> None:
    made = make_flickr.read(flickr_source(tmp_path / "download"), min_count=19)
    assert made.words == [NINETEEN, TWENTY]
    assert made.index == [f"im{n}.jpg" for n in [*range(1, 20), 21]]
    assert made.tags == [flickr_tags(n) for n in [*range(1, 20), 21]]
    assert make_flickr.read(tmp_path / "download", min_count=1).words == sorted(
        ["naïve", "日本", "new\u2028line", "rare", NINETEEN, TWENTY]
    )


def follow_source(name: str, main: Main) -> Path:
    """Run a maker on the folder `download` as configs/data says for CMCL; where it writes."""
    own, base = (
        load_data_config(CONFIG_DIR / "data" / f"{n}.yaml", []) for n in (f"{name}_cmcl", name)
    )
    assert replace(own, name=name, path=base.path, source=base.source) == base  # the same split
    program, script, source, *options = own.source.split()
    assert [program, script, source] == ["python", f"scripts/{main.__module__}.py", "SOURCE"]
    assert main(["download", *options]) == 0
    return Path(own.path)


def test_flickr_captions_as_published_hold_the_vocabulary_alone(tmp_path: Path) -> None:
    flickr_source(tmp_path / "download")
    pairs = read_back(follow_source("mirflickr", make_flickr.main))
    assert pairs.ids == [f"im{n}.jpg" for n in range(1, 20)]
    assert pairs.captions == [TWENTY] * 19
    made = make_flickr.read(tmp_path / "download", True, 19, vocabulary_captions=True)
    both = f"{NINETEEN} {TWENTY}"
    rest = [TWENTY, "", NINETEEN, "", ""]  # of 19 to 23
    expected = [both] * 4 + [f"{both} {NINETEEN}"] + [both] * 13 + rest
    assert made.captions == [[caption] for caption in expected]  # in the order of the file
    assert made.tags[2] == flickr_tags(3)  # for the bag of tags


FLICKR_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, ["download: ", "no such folder"]),
    "no tags": (
        lambda s: shutil.rmtree(s / "meta"),
        ["download/meta/tags: ", "mirflickr25k.zip"],
    ),
    "no annotations": (
        lambda s: shutil.rmtree(s / "annotations"),
        ["download/mirflickr25k_annotations_v080: ", "mirflickr25k_annotations_v080.zip"],
    ),
    "a label missing": (
        lambda s: (s / "annotations" / "sea.txt").unlink(),
        ["annotations/sea.txt: ", "mirflickr25k_annotations_v080.zip"],
    ),
    "a label that is a folder": (
        lambda s: [(s / "annotations/sea.txt").unlink(), (s / "annotations/sea.txt").mkdir()],
        ["annotations/sea.txt: it is a folder"],
    ),
    "a number that is none": (
        lambda s: put(s / "annotations" / "sea.txt", "1\nim2\n"),
        ["annotations/sea.txt: line 2: 'im2'. The file"],
    ),
    "a number of no image": (
        lambda s: put(s / "annotations" / "sea.txt", "1\n31\n"),
        ["download/im31.jpg: ", "1 of 25 images", "mirflickr25k.zip"],
    ),
    "images missing": (
        lambda s: [(s / f"im{n}.jpg").unlink() for n in (2, 10, 24)],
        ["download/im2.jpg: ", "3 of 24 images"],
    ),
    "tags not UTF-8": (
        lambda s: put(s / "meta" / "tags" / "tags7.txt", "été\n".encode("latin-1")),
        ["tags/tags7.txt: ", "are not UTF-8"],
    ),
    "no tag in the vocabulary": (
        lambda s: [put(s / "meta" / "tags" / f"tags{n}.txt", "") for n in range(1, 25)],
        ["selection: no item"],
    ),
}


@pytest.mark.parametrize("damage", FLICKR_DAMAGE)
def test_flickr_refuses_a_damaged_download(tmp_path: Path, damage: str) -> None:
    harm, parts = FLICKR_DAMAGE[damage]
    harm(flickr_source(tmp_path / "download"))
    assert_refused(make_flickr.main, ["download"], parts)


# NUS-WIDE

ROWS = 24
TAGS = ["sky", "café", "blue", "tree"]  # not in alphabetical order
# Twenty concepts of three images, beginning with zebra so that none is first by name, then three
# of two images, of which the first by name is the 21st class, one of one image and 57 of none.
TOP = [f"zebra{i:02}" for i in range(20)]
MEMBERS: dict[str, set[int]] = (
    {name: {i, (i + 1) % 20, (i + 7) % 20} for i, name in enumerate(TOP)}
    | {"tied_c": {20, 23}, "tied_a": {21, 22}, "tied_b": {20, 21}, "airport": {23}}
    | {f"rare{i:02}": set() for i in range(57)}
)
NUS_CLASSES = ["tied_a", *TOP]


def nus_index(row: int) -> str:
    return f"folder{row % 3}/{row:04}_9{row}.jpg"


def nus_tags(row: int) -> list[str]:
    return [tag for i, tag in enumerate(TAGS) if row >> i & 1]  # none for rows 0 and 16


def nus_source(root: Path, labels: str = "Groundtruth/AllLabels", flat: bool = False) -> Path:
    assert len(MEMBERS) == 81
    index = [nus_index(row).replace("/", "\\" if row % 2 else "/") for row in range(ROWS)]
    put(root / "ImageList" / "Imagelist.txt", "\r\n".join(index) + "\r\n")
    for name, rows in MEMBERS.items():
        text = "".join(f"{int(row in rows)}\n" for row in range(ROWS))
        put(root / labels / f"Labels_{name}.txt", text)
    text = ""
    for row in range(ROWS):
        space = "\t" if row % 2 else " "
        text += space.join(str(row >> i & 1) for i in range(4)) + space + "\n"
    put(root / "NUS_WID_Tags" / "AllTags1k.txt", text)
    put(root / "NUS_WID_Tags" / "TagList1k.txt", "\n".join(TAGS) + "\n")
    for row in range(23):  # 23 is of no class, its image is not needed
        name = Path(nus_index(row)).name
        elsewhere = "elsewhere" if row == 5 else Path(nus_index(row)).parent
        folder = Path("images") if flat else Path("Flickr", elsewhere)
        put(root / folder / name, JPEG + bytes([row]))
    return root


SELECTED = {
    "tags": [row for row in range(23) if row not in (0, 16, 20)],
    "concepts": [row for row in range(23) if row != 20],
}


@pytest.mark.parametrize("selection", SELECTED)
@pytest.mark.parametrize("labels", ["Groundtruth/AllLabels", "AllLabels"])
def test_nuswide_takes_images_of_the_most_frequent_concepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], selection: str, labels: str
) -> None:
    source = nus_source(tmp_path / "download", labels)
    arguments = ["--selection", selection] if selection != "tags" else []
    assert make_nuswide.main([str(source), *arguments]) == 0

    out = tmp_path / "dataset" / "nuswide"
    assert {path.name for path in out.iterdir()} == FILES | {"words.txt"}
    pairs, rows = read_back(out), SELECTED[selection]
    assert pairs.ids == [nus_index(row) for row in rows]
    assert pairs.captions == [" ".join(nus_tags(row)) for row in rows]
    assert lines(out / "classes.txt") == NUS_CLASSES
    assert owned(pairs, NUS_CLASSES) == [
        {name for name in NUS_CLASSES if row in MEMBERS[name]} for row in rows
    ]
    assert pairs.labels.any(axis=1).all()
    assert lines(out / "words.txt") == TAGS
    assert not (out / "images").is_symlink()
    assert {p.name for p in (out / "images").iterdir()} == {Path(i).name for i in pairs.ids}
    assert [file.read_bytes()[-1] for file in pairs.files] == rows
    published, empty = ("190,421", 0) if selection == "tags" else ("195,834", 2)
    assert capsys.readouterr().out.splitlines() == [
        f"pairs: {len(rows)}; published {published}",
        "classes: 21, as published",
        "tags: 4; published 1,000",
        f"empty captions: {empty}",
        "captions an item: 1",
    ]


def test_nuswide_of_one_folder_links_the_folder(tmp_path: Path) -> None:
    source = nus_source(tmp_path / "download", flat=True)
    make_nuswide.main([str(source), "--out", "made"])
    assert (tmp_path / "made" / "images").resolve() == source / "images"
    assert read_back(tmp_path / "made").ids == [nus_index(row) for row in SELECTED["tags"]]


def test_nuswide_finds_images_in_linked_folders(tmp_path: Path) -> None:
    source = nus_source(tmp_path / "download")
    (source / "Flickr" / "folder1").rename(tmp_path / "disk")
    (source / "Flickr" / "folder1").symlink_to(tmp_path / "disk")
    make_nuswide.main(["download", "--out", "made"])
    assert read_back(tmp_path / "made").ids == [nus_index(row) for row in SELECTED["tags"]]


def test_nuswide_takes_more_or_fewer_classes(tmp_path: Path) -> None:
    source = nus_source(tmp_path / "download")
    assert make_nuswide.read(source, classes=1).class_names == ["zebra00"]
    made = make_nuswide.read(source, classes=22)
    assert made.class_names == ["tied_a", "tied_b", *TOP]
    assert nus_index(20) in made.index


def test_nuswide_says_which_selection_it_does_not_build(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        make_nuswide.main(["--help"])
    assert caught.value.code == 0
    assert "192,779" in capsys.readouterr().out


def test_nuswide_reads_tags_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "AllTags1k.txt"
    row = b"0\t" * 500 + b"1\t" + b"0\t" * 499 + b"\n"
    path.write_bytes(row * 1000)  # two million bytes
    tracemalloc.start()
    try:
        assert all(tags.tolist() == [500] for tags in make_nuswide.read_tags(path, 1000, 1000))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def edit(path: Path, number: int, line: str | None) -> None:
    """Change a line, counted from 1, or take it out."""
    text = path.read_text(encoding="utf-8").splitlines()
    text[number - 1 : number] = [] if line is None else [line]
    put(path, "\n".join(text) + "\n")


NUS_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no list": (lambda s: shutil.rmtree(s / "ImageList"), ["Imagelist.txt: ", "ImageList.zip"]),
    "no labels": (
        lambda s: shutil.rmtree(s / "Groundtruth"),
        ["Groundtruth/AllLabels: ", "nor ", "Groundtruth.zip"],
    ),
    "a label missing": (
        lambda s: (s / "Groundtruth/AllLabels/Labels_rare00.txt").unlink(),
        ["AllLabels: 80 files Labels_*.txt. Unpack all 81", "Groundtruth.zip"],
    ),
    "no tags": (
        lambda s: (s / "NUS_WID_Tags/AllTags1k.txt").unlink(),
        ["NUS_WID_Tags/AllTags1k.txt: ", "NUS_WID_Tags.zip"],
    ),
    "no names of tags": (
        lambda s: (s / "NUS_WID_Tags/TagList1k.txt").unlink(),
        ["NUS_WID_Tags/TagList1k.txt: ", "NUS_WID_Tags.zip"],
    ),
    "no images": (
        lambda s: shutil.rmtree(s / "Flickr"),
        ["download/Flickr: ", "nor ", "download/images", "NUS-WIDE"],
    ),
    "labels too short": (
        lambda s: edit(s / "Groundtruth/AllLabels/Labels_rare07.txt", 24, None),
        ["Labels_rare07.txt: 23 lines for 24"],
    ),
    "a label that is no bit": (
        lambda s: edit(s / "Groundtruth/AllLabels/Labels_rare07.txt", 9, "-1130179"),
        ["Labels_rare07.txt: line 9: '-1130179'", "0 or 1"],
    ),
    "a blank label": (
        lambda s: edit(s / "Groundtruth/AllLabels/Labels_rare07.txt", 9, ""),
        ["Labels_rare07.txt: line 9: ''"],
    ),
    "a blank image": (
        lambda s: edit(s / "ImageList/Imagelist.txt", 3, ""),
        ["Imagelist.txt: line 3: ''"],
    ),
    "a folder in the list": (
        lambda s: edit(s / "ImageList/Imagelist.txt", 3, "actor\\"),
        ["Imagelist.txt: line 3: 'actor"],
    ),
    "a blank name of a tag": (
        lambda s: edit(s / "NUS_WID_Tags/TagList1k.txt", 2, ""),
        ["TagList1k.txt: line 2: ''"],
    ),
    "names of tags not UTF-8": (
        lambda s: put(s / "NUS_WID_Tags/TagList1k.txt", "a\ncafé\nb\nc\n".encode("latin-1")),
        ["TagList1k.txt: ", "are not UTF-8"],
    ),
    "a narrow row": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 24, "0 1 0"),
        ["AllTags1k.txt: line 24: 3 numbers for 4"],
    ),
    "a wide row": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 5, "0 1 0 0 1"),
        ["AllTags1k.txt: line 5: 5 numbers for 4"],
    ),
    "a tag that is no bit": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 5, "0 1 2 0"),
        ["AllTags1k.txt: line 5: '2', where only 0 and 1"],
    ),
    "a tag of two digits": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 5, "0 01 1 0"),
        ["AllTags1k.txt: line 5: '01', where only 0 and 1"],
    ),
    "a row too few": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 5, None),
        ["AllTags1k.txt: 23 rows for 24"],
    ),
    "a row too many": (
        lambda s: edit(s / "NUS_WID_Tags/AllTags1k.txt", 24, "0 0 0 0\n1 1 1 1"),
        ["AllTags1k.txt: 25 rows for 24"],
    ),
    "images missing": (
        lambda s: [(s / "Flickr" / nus_index(row)).unlink() for row in (7, 12)],
        ["Flickr/folder1/0007_97.jpg: ", "2 of 20 images"],
    ),
    "an image twice": (
        lambda s: put(s / "Flickr/other/0007_97.jpg", JPEG),
        ["Flickr/other/0007_97.jpg", "Flickr/folder1/0007_97.jpg", "base name"],
    ),
    "an image listed twice": (
        lambda s: edit(s / "ImageList/Imagelist.txt", 9, "other\\0007_97.jpg"),
        ["other/0007_97.jpg: ", "folder1/0007_97.jpg has the same base name"],
    ),
}


@pytest.mark.parametrize("damage", NUS_DAMAGE)
def test_nuswide_refuses_a_damaged_download(tmp_path: Path, damage: str) -> None:
    harm, parts = NUS_DAMAGE[damage]
    harm(nus_source(tmp_path / "download"))
    assert_refused(make_nuswide.main, ["download"], parts)


@pytest.mark.parametrize("classes", ["0", "82"])
def test_nuswide_refuses_numbers_of_classes(tmp_path: Path, classes: str) -> None:
    nus_source(tmp_path / "download")
    arguments = ["download", "--classes", classes]
    assert_refused(
        make_nuswide.main, arguments, [f"--classes is {classes}, but must be from 1 to 81"]
    )


# MS COCO


def coco_part(images: dict[int, list[int]], captions: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Content of the two files: categories by image, and id, image and text of captions."""
    entries = [{"id": image, "file_name": f"{image:04}.jpg"} for image in images]
    objects = [
        {"id": 7, "image_id": image, "category_id": category, "segmentation": [[1.5, 2]]}
        for image, categories in images.items()
        for category in categories
    ]
    names = [(90, "toothbrush"), (1, "person"), (13, "stop sign")]
    return {
        "instances": {
            "images": entries,
            "annotations": objects,
            "categories": [{"id": number, "name": name} for number, name in names],
        },
        "captions": {
            "images": entries,
            "annotations": [
                {"id": number, "image_id": image, "caption": text}
                for number, image, text in captions
            ],
        },
    }


COCO_PARTS = {
    "train": coco_part(
        {30: [90, 1, 90], 4: [13], 5: []},  # 5 has no category
        [(12, 30, "third"), (2, 30, " first \n"), (3, 5, "none"), (9, 30, "second\nof  it\n")],
    ),
    "val": coco_part({2: [1], 1: [13]}, [(8, 1, "\n"), (5, 2, "été 日本"), (1, 2, "")]),
}


def coco_source(root: Path, year: int = 2017) -> Path:
    for part, content in COCO_PARTS.items():
        for kind, file in content.items():
            put(root / "annotations" / f"{kind}_{part}{year}.json", json.dumps(file))
        for image in content["instances"]["images"]:
            put(root / f"{part}{year}" / image["file_name"], JPEG + bytes([image["id"]]))
    put(root / f"val{year}" / "0099.jpg", JPEG)
    return root


def all_captions(out: Path) -> list[list[str]]:
    cells = read_mat(out / "caption.mat")["caption"].reshape(-1)
    return [cell.reshape(-1).tolist() if isinstance(cell, np.ndarray) else [cell] for cell in cells]


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_takes_images_with_a_category(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], year: int
) -> None:
    source = coco_source(tmp_path / "download", year)
    assert make_coco.main([str(source)]) == 0

    out = tmp_path / "dataset" / "coco"
    assert {path.name for path in out.iterdir()} == FILES
    pairs = read_back(out)
    train, val = f"train{year}", f"val{year}"
    assert pairs.ids == [
        f"{train}/0004.jpg", f"{train}/0030.jpg", f"{val}/0001.jpg", f"{val}/0002.jpg"
    ]  # fmt: skip
    assert all_captions(out) == [[""], ["first", "second of it", "third"], [""], ["été 日本"]]
    assert pairs.captions == ["", "first", "", "été 日本"]
    assert lines(out / "classes.txt") == ["person", "stop sign", "toothbrush"]
    assert pairs.labels.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [file.read_bytes()[-1] for file in pairs.files] == [4, 30, 1, 2]
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "pairs: 4; published 122,218",
        "classes: 3; published 80",
        "empty captions: 2",
        "captions an item: 1 to 3",
    ]
    assert shown.err.splitlines() == [
        f"note: {train}: 1 image without a category left out",
        f"note: {val}: 1 image without annotation left out",
    ]
    assert make_coco.read(source).captions == all_captions(out)


def test_coco_captions_as_published_are_drawn_once(tmp_path: Path) -> None:
    """Seed 1 gives 0.417, 0.720, 0.0001 and 0.302: the third of three captions for the second."""
    coco_source(tmp_path / "download")
    out = follow_source("coco", make_coco.main)
    assert all_captions(out) == [[""], ["third"], [""], ["été 日本"]]
    assert read_back(out).labels.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="shared/data/coco_mini is missing")
def test_coco_mini_with_one_caption_an_image(tmp_path: Path) -> None:
    """Further numbers of seed 1: 0.147, 0.092, 0.186, 0.346, 0.397, 0.539."""
    every = make_coco.read(COCO_MINI).captions
    one = make_coco.read(COCO_MINI, one_caption=True).captions
    assert one[0] == ["adults at dining room table with birthday cake."]
    drawn = [2, 3, 0, 1, 0, 0, 0, 1, 1, 2]
    assert one[:10] == [[own[n]] for own, n in zip(every, drawn, strict=False)]
    places = [own.index(caption) for own, (caption,) in zip(every, one, strict=True)]
    assert min(np.bincount(places, minlength=5)) > 159 / 5 / 2  # all places are drawn alike


def test_coco_of_two_years_is_chosen(tmp_path: Path) -> None:
    source = coco_source(coco_source(tmp_path / "download", 2014), 2017)
    assert_refused(make_coco.main, ["download"], ["annotations: ", "2014 and", "--year"])
    assert make_coco.read(source, 2014).index[0] == "train2014/0004.jpg"
    assert make_coco.read(source, 2017).index[0] == "train2017/0004.jpg"


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="shared/data/coco_mini is missing")
def test_coco_mini_is_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The counts are those of the annotations, taken without the maker."""
    make_coco.main([str(COCO_MINI), "--out", "mini"])
    assert capsys.readouterr().err == "note: val2017: 80 images without annotation left out\n"
    out = tmp_path / "mini"
    pairs, names = read_back(out), lines(out / "classes.txt")
    assert len(pairs.ids) == 159
    assert sum(path.startswith("train2017/") for path in pairs.ids[:80]) == 80
    assert sum(path.startswith("val2017/") for path in pairs.ids[80:]) == 79
    assert pairs.ids[0] == "train2017/000000000790.jpg"
    assert (names[0], names[-1], len(names)) == ("person", "toothbrush", 80)
    assert pairs.labels.sum() == 586 and pairs.labels.any(axis=0).all()
    assert pairs.labels[:, 0].sum() == 75 and pairs.labels[:, -1].sum() == 5
    assert pairs.labels[:80].sum() == 302
    captions = all_captions(out)
    assert {len(own) for own in captions} == {5}
    assert captions[0] == [
        "a family is sitting down at a table to have cake",
        "Group around a table waiting for a birthday cake to be served.",
        "adults at dining room table with birthday cake.",
        "Four persons sitting on dining table for cake and drinks.",
        "A group of people are gathered around a table with cake on it.",
    ]
    assert pairs.captions == [own[0] for own in captions]


def change(name: str, key: str, *path: Any) -> Callable[[Path], None]:
    """Set a value of a JSON file: the last of the path; the others lead to it."""

    def harm(source: Path) -> None:
        file = source / "annotations" / name
        content = json.loads(file.read_text(encoding="utf-8"))
        *steps, last, value = [key, *path]
        place = content
        for step in steps:
            place = place[step]
        place[last] = value
        put(file, json.dumps(content))

    return harm


COCO_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no annotations": (
        lambda s: shutil.rmtree(s / "annotations"),
        ["download/annotations: ", "annotations_trainval2017.zip"],
    ),
    "no instances": (
        lambda s: (s / "annotations/instances_train2017.json").unlink(),
        ["instances_train2017.json: ", "annotations_trainval2017.zip"],
    ),
    "no captions": (
        lambda s: (s / "annotations/captions_val2017.json").unlink(),
        ["captions_val2017.json: ", "annotations_trainval2017.zip"],
    ),
    "no images": (
        lambda s: shutil.rmtree(s / "val2017"),
        ["download/val2017: ", "val2017.zip"],
    ),
    "an image missing": (
        lambda s: (s / "train2017/0005.jpg").unlink(),  # also one without a category
        ["train2017/0005.jpg: ", "1 of 3 images", "train2017.zip"],
    ),
    "cut JSON": (
        lambda s: put(s / "annotations/captions_val2017.json", '{"annotations": ['),
        ["captions_val2017.json: ", "JSON is damaged"],
    ),
    "JSON too deep": (
        lambda s: put(s / "annotations/captions_val2017.json", "[" * 100_000),
        ["captions_val2017.json: ", "JSON is damaged"],
    ),
    "JSON not UTF-8": (
        lambda s: put(s / "annotations/captions_val2017.json", b'{"\xff": 1}'),
        ["captions_val2017.json: ", "JSON is damaged"],
    ),
    "JSON of a list": (
        lambda s: put(s / "annotations/captions_val2017.json", "[]"),
        ["captions_val2017.json: annotations: it is no list"],
    ),
    "no categories": (
        change("instances_val2017.json", "categories", None),
        ["instances_val2017.json: categories: it is no list"],
    ),
    "an entry of another layout": (
        change("captions_train2017.json", "annotations", 1, ["caption"]),
        ["captions_train2017.json: annotations[1]: ", "caption (str)"],
    ),
    "a field of another type": (
        change("instances_train2017.json", "images", 2, "id", "5"),
        ["instances_train2017.json: images[2]: ", "id (int)"],
    ),
    "an unknown category": (
        change("instances_train2017.json", "annotations", 0, "category_id", 12),
        ["instances_train2017.json: annotations: category_id 12"],
    ),
    "an unknown image": (
        change("instances_train2017.json", "annotations", 0, "image_id", 31),
        ["instances_train2017.json: annotations: image_id 31"],
    ),
    "a caption of an unknown image": (
        change("captions_val2017.json", "annotations", 0, "image_id", 31),
        ["captions_val2017.json: annotations: image_id 31"],
    ),
    "an id twice": (
        change("instances_val2017.json", "images", 0, "id", 1),
        ["instances_val2017.json: images: two entries have the id 1"],
    ),
    "other categories in val": (
        change("instances_val2017.json", "categories", 0, "name", "brush"),
        ["instances_val2017.json: its categories differ"],
    ),
    "a base name twice": (
        lambda s: [
            change("instances_val2017.json", "images", 0, "file_name", "0030.jpg")(s),
            put(s / "val2017/0030.jpg", JPEG),
        ],
        ["val2017/0030.jpg: ", "train2017/0030.jpg has the same base name"],
    ),
}


@pytest.mark.parametrize("damage", COCO_DAMAGE)
def test_coco_refuses_a_damaged_download(tmp_path: Path, damage: str) -> None:
    harm, parts = COCO_DAMAGE[damage]
    harm(coco_source(tmp_path / "download"))
    assert_refused(make_coco.main, ["download"], parts)


# The folder that is written


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = coco_source(tmp_path / "download")
    (tmp_path / "made").mkdir()  # an empty folder is no content
    make_coco.main(["download", "--out", "made"])
    assert_refused(make_coco.main, ["download", "--out", "made"], ["made: ", "--force"])
    assert read_back(tmp_path / "made").labels.shape == (4, 3)

    flickr_source(tmp_path / "other")
    make_flickr.main(["other", "--out", "made", "--force"])
    assert len(read_back(tmp_path / "made").ids) == 19
    make_coco.main(["download", "--out", "made", "--force"])  # over a link to a folder
    assert read_back(tmp_path / "made").labels.shape == (4, 3)
    assert not (tmp_path / "made" / "words.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "made", "other"]
    assert (source / "val2017" / "0001.jpg").is_file() and (tmp_path / "other/im1.jpg").is_file()


def test_out_is_checked_before_the_reading_and_before_the_writing(tmp_path: Path) -> None:
    made = make_coco.read(coco_source(tmp_path / "download"))
    put(tmp_path / "made" / "mine.txt", "mine")
    with pytest.raises(VhablError, match=r"mine\.txt"):
        makers.write(made, tmp_path / "made", force=True)
    (tmp_path / "empty").mkdir()
    assert_refused(make_coco.main, ["empty", "--out", "made"], ["it holds mine.txt"])


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["mir_cnn_twt.mat", "README.md", "caption.mat/x", "images/a.jpg"])
def test_files_of_others_are_never_replaced(tmp_path: Path, force: list[str], name: str) -> None:
    coco_source(tmp_path / "download")
    put(tmp_path / "made" / name, "mine")
    parts = [f"made: it holds {name.partition('/')[0]}, which no maker wrote"]
    assert_refused(make_coco.main, ["download", "--out", "made", *force], parts)


def test_the_download_is_never_replaced(tmp_path: Path) -> None:
    coco_source(tmp_path / "download")
    arguments = ["download", "--out", "download", "--force"]
    assert_refused(make_coco.main, arguments, ["it holds annotations and 2 others"])


def test_a_file_is_no_place_to_write(tmp_path: Path) -> None:
    coco_source(tmp_path / "download")
    put(tmp_path / "made", "mine")
    assert_refused(make_coco.main, ["download", "--out", "made"], ["made: it is a file"])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", ["_write_text", "rename"])
def test_a_failure_leaves_all_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, step: str
) -> None:
    coco_source(tmp_path / "download")
    if before:
        make_coco.main(["download", "--out", "made"])
    state = tree(tmp_path)

    rename = Path.rename

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        return fail() if self.name == "new" else rename(self, target)  # type: ignore[return-value]

    if step == "rename":
        monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    else:
        monkeypatch.setattr(makers, step, fail)
    with pytest.raises(OSError, match="No space"):
        make_coco.main(["download", "--out", "made", "--force"])
    assert tree(tmp_path) == state


def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path) -> None:
    coco_source(tmp_path / "download")
    put(tmp_path / ".made.tmp" / "new" / "caption.mat", "half")
    make_coco.main(["download", "--out", "made"])
    assert len(read_back(tmp_path / "made").ids) == 4
    assert not (tmp_path / ".made.tmp").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    coco_source(tmp_path / "download")
    make_coco.main(["download", "--out", "made"])
    for name in ("caption.mat", "index.mat", "label.mat"):
        head = (tmp_path / "made" / name).read_bytes()[:116]
        assert head == b"MATLAB 5.0 MAT-file, image-text pairs".ljust(116)


def test_counts_that_agree_are_as_published() -> None:
    made = makers.Made(["a.jpg"], [Path("a.jpg")], [[""]], np.ones((1, 2)), ["x", "y"], ["w"])
    assert makers.describe(made, {"pairs": 1, "classes": 2, "tags": 1}).splitlines() == [
        "pairs: 1, as published",
        "classes: 2, as published",
        "tags: 1, as published",
        "empty captions: 1",
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["flickr", "nuswide", "coco"])
def test_the_commands_end_with_one_message(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(SCRIPTS / f"make_{name}.py"), "absent"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    absent = tmp_path / "absent"
    assert result.stderr == (
        f"error: {absent}: no such folder. Give the folder of the unpacked download\n"
    )
    assert list(tmp_path.iterdir()) == []


# The feature file

SPLIT = ["--query", "4", "--train", "8", "--device", "cpu"]
CNN = ["download", "--out", "made", "--features", "cnn", *SPLIT]


def picture_source(root: Path) -> Path:
    """The download of MIRFLICKR-25000 with pictures that differ, some of them wide, some high."""
    flickr_source(root)
    rng = np.random.default_rng(0)
    for number in range(1, 25):
        size = (40, 50) if number % 2 else (61, 44)
        pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        pixels[:, :, number % 3] //= 4
        Image.fromarray(pixels).save(root / f"im{number}.jpg")
    return root


def towers() -> list[str]:
    """Arguments for tiny towers of random weights."""
    text = {**TINY_TOWERS["text_cfg"], "context_length": 32}  # type: ignore[dict-item]
    Path("towers.json").write_text(json.dumps({**TINY_TOWERS, "text_cfg": text}), encoding="utf-8")
    torch.manual_seed(3)
    torch.save(open_clip.build_towers("towers.json", "").state_dict(), "towers.pt")
    return ["--features", "clip", "--model", "towers.json", "--weights", "towers.pt"]


class TinyNet(nn.Sequential):
    """In place of a network: notes how many pictures it gets."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(nn.Conv2d(3, 5, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.given: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and x.shape[1:] == (3, 224, 224)
        self.given.append(len(x))
        return super().forward(x)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> TinyNet:
    result = TinyNet()
    open_clip.mend_torchvision()
    monkeypatch.setattr(cnn, "build_network", lambda name, weights, option: result)
    return result


def read_features(file: Path) -> tuple[Split, Split, Split]:
    config = DataConfig(name="made", kind="features", path=str(file))
    return load_features(file, config)


def drawn(items: int, query: int = 4, train: int = 8) -> list[np.ndarray]:
    """Training, database and query items of the common split."""
    order = np.random.RandomState(1).permutation(items)
    return [order[query:][:train], order[query:], order[:query]]


def by_torchvision(files: list[Path], network: nn.Module) -> torch.Tensor:
    """What a network gives for images as torchvision itself prepares them."""
    open_clip.mend_torchvision()
    from torchvision import models

    prepare = models.VGG16_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        return network.eval()(torch.stack([prepare(open_image(file)) for file in files]))


def assert_clip(out: Path, query: int, train: int) -> None:
    """The feature file beside the pairs holds what the encoder of `towers` gives for them."""
    config = EncoderConfig(
        name="clip", model="towers.json", weights="towers.pt", tune="frozen", words=32
    )
    encoder, pairs = ClipEncoder(config, tokens=True).eval(), read_back(out)
    pixels = np.stack([read_pixels(file, 32, False) for file in pairs.files])
    tokens, _ = open_clip.tokenise(pairs.captions, 32)
    with torch.no_grad():
        found = encoder(Inputs(torch.from_numpy(pixels), torch.from_numpy(tokens)))
    assert found.image is not None and found.text is not None
    file = out.with_name(out.name + "_clip") / "features.mat"
    rows = drawn(len(pairs.ids), query, train)
    for split, items in zip(read_features(file), rows, strict=True):
        # Frozen outputs are rounded to float16.
        np.testing.assert_allclose(split.image[:], found.image[items], atol=2e-3)
        np.testing.assert_allclose(split.text[:], found.text[items], atol=2e-3)
        assert (split.labels == pairs.labels[items]).all()
    for vectors in (found.image, found.text):  # a wrong item would show
        far = torch.pdist(vectors.unique(dim=0))
        assert len(far) and far.min() > 0.02


def test_features_of_clip_are_those_of_its_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_source(tmp_path / "download")
    monkeypatch.setattr(maker_features.Clip, "batch", 5)  # the training items end within a batch
    make_flickr.main(["download", "--out", "made", *SPLIT, *towers()])
    out, folder = tmp_path / "made", tmp_path / "made_clip"
    assert {path.name for path in out.iterdir()} == FILES | {"words.txt"}
    assert [path.name for path in folder.iterdir()] == ["features.mat"]  # no words are counted
    assert_clip(out, 4, 8)

    file = folder / "features.mat"
    assert scipy.io.matlab.matfile_version(str(file)) == (2, 0)  # what MATLAB 7.3 calls itself
    assert file.read_bytes()[:10] == b"MATLAB 7.3" and file.read_bytes()[512:516] == b"\x89HDF"
    with h5py.File(file) as content:
        shapes = {key: node.shape for key, node in content.items()}
        kinds = {
            key: (node.dtype.name, node.attrs["MATLAB_class"]) for key, node in content.items()
        }
        assert content["I_db"].chunks == (32, 5)
    widths, sizes = {"I": 32, "T": 32, "L": 24}, {"tr": 8, "db": 15, "te": 4}
    assert shapes == {f"{p}_{r}": (widths[p], sizes[r]) for p in "ITL" for r in sizes}
    assert kinds == {
        key: ("uint8", b"uint8") if key[0] == "L" else ("float32", b"single") for key in shapes
    }
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:2] == [
        f"features: {file}: 8 training, 15 database and 4 query items; image 32, text 32",
        "pairs: 19; published 20,015",
    ]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="shared/data/coco_mini is missing")
def test_features_of_clip_take_the_first_caption(tmp_path: Path) -> None:
    sizes = ["--query", "30", "--train", "60", "--device", "cpu"]
    make_coco.main([str(COCO_MINI), "--out", "mini", *sizes, *towers()])
    assert_clip(tmp_path / "mini", 30, 60)


def nus_tags_of(name: str) -> list[str]:
    return nus_tags(int(Path(name).name.partition("_")[0]))


@pytest.mark.parametrize(
    ("main", "source", "tags_of"),
    [
        (make_flickr.main, picture_source, lambda name: flickr_tags(int(name[2:-4]))),
        (make_nuswide.main, nus_source, nus_tags_of),
    ],
)
def test_features_of_cnn_go_with_a_bag_of_tags(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    net: TinyNet,
    main: Main,
    source: Callable[[Path], Path],
    tags_of: Callable[[str], list[str]],
) -> None:
    source(tmp_path / "download")
    monkeypatch.setattr(maker_features.Cnn, "batch", 6)
    arguments = ["--min-count", "1"] if main is make_flickr.main else []
    main([*CNN, *arguments])
    folder, pairs = tmp_path / "made_cnn", read_back(tmp_path / "made")
    assert {path.name for path in folder.iterdir()} == {"features.mat", "words.txt"}
    # No picture twice, though the training items are part of the database.
    assert sum(net.given) == len(pairs.ids) and max(net.given) == 6

    vocabulary = lines(folder / "words.txt")
    assert vocabulary == lines(tmp_path / "made" / "words.txt")
    assert vocabulary == (TAGS if main is make_nuswide.main else sorted(vocabulary))
    image = by_torchvision(pairs.files, net)
    bag = np.array([[word in tags_of(name) for word in vocabulary] for name in pairs.ids])
    assert bag.any(axis=0).sum() > 3
    assert main is make_nuswide.main or bag[:19, vocabulary.index(TWENTY)].all()
    rows = drawn(len(pairs.ids))
    for split, items in zip(read_features(folder / "features.mat"), rows, strict=True):
        np.testing.assert_allclose(split.image[:], image[items], atol=1e-5)
        assert (split.text[:] == bag[items]).all()
        assert (split.labels == pairs.labels[items]).all()
    with h5py.File(folder / "features.mat") as content:
        assert content["T_db"].dtype == np.uint8 and content["I_db"].dtype == np.float32


def test_features_count_the_words_of_all_training_captions(tmp_path: Path, net: TinyNet) -> None:
    train = set(drawn(9, 2, 4)[0].tolist())
    captions = []
    for item in range(9):  # the first of six captions has another word
        for turn in range(6):
            text = f"Common word{turn}" if turn else "first"
            text += " almost" if turn and (item, turn) != (min(train), 1) else ""
            text += " twice twice" if turn % 2 else ""
            text += " elsewhere" if item not in train else ""
            captions.append((item * 6 + turn, item + 1, text))
    images = {item + 1: [1 + 12 * (item % 2)] for item in range(8)}
    parts = {"train": (images, captions[:48]), "val": ({9: [1]}, captions[48:])}
    for part, content in parts.items():
        for kind, file in coco_part(*content).items():
            put(tmp_path / f"download/annotations/{kind}_{part}2017.json", json.dumps(file))
        for image in content[0]:
            put(tmp_path / f"download/{part}2017/{image:04}.jpg", JPEG + bytes([image]))
    sizes = ["--query", "2", "--train", "4", "--device", "cpu"]
    arguments = ["download", "--out", "made", "--features", "cnn"]
    with pytest.raises(VhablError, match=r"no word.*20 of them.*more training"):
        make_coco.main([*arguments, "--query", "2", "--train", "2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download"]

    make_coco.main([*arguments, *sizes])
    folder = tmp_path / "made_cnn"
    assert lines(folder / "words.txt") == ["common"]
    for split in read_features(folder / "features.mat"):
        assert (split.text[:] == 1).all() and split.text.shape[1] == 1

    put(tmp_path / "download/annotations/captions_val2017.json", json.dumps({"annotations": []}))
    make_coco.main([*arguments, *sizes, "--force"])
    rows = drawn(9, 2, 4)
    assert 8 not in train
    for split, items in zip(read_features(folder / "features.mat"), rows, strict=True):
        assert split.text[:, 0].tolist() == [float(item != 8) for item in items]


def test_features_that_are_there_are_replaced_only_by_force(tmp_path: Path, net: TinyNet) -> None:
    picture_source(tmp_path / "download")
    folder = tmp_path / "made_cnn"
    for name in ("features.mat", "words.txt"):
        put(folder / name, "mine")
        # Before the minutes of reading: there is no download in this folder.
        (tmp_path / "empty").mkdir(exist_ok=True)
        parts = [f"made_cnn/{name}: it exists already", "--force"]
        assert_refused(make_flickr.main, ["empty", *CNN[1:]], parts)
        (folder / name).unlink()
    put(folder / "features.mat", "mine")
    put(folder / "mir_cnn_twt.mat", "of others")
    make_flickr.main([*CNN, "--force"])
    assert len(read_features(folder / "features.mat")[0]) == 8
    assert (folder / "mir_cnn_twt.mat").read_text() == "of others"

    (folder / "features.mat").unlink()
    (folder / "features.mat").mkdir()
    assert_refused(make_flickr.main, [*CNN, "--force"], ["features.mat: it is a folder"])
    shutil.rmtree(folder)
    put(folder, "mine")
    assert_refused(make_flickr.main, [*CNN, "--force"], ["made_cnn: it is a file"])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("harm", ["image", "disk", "words"])
def test_features_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: TinyNet, before: bool, harm: str
) -> None:
    picture_source(tmp_path / "download")
    if before:
        make_flickr.main(CNN)
    state = tree(tmp_path / "made_cnn") if before else None
    if harm == "image":
        put(tmp_path / "download" / "im7.jpg", "no image")
        text = r"im7\.jpg.*image.*cannot be read"
    else:
        text = r"made_cnn.*No space left on device"

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        if harm == "disk":
            monkeypatch.setattr(h5py.Dataset, "__setitem__", fail)
        else:
            monkeypatch.setattr(maker_features, "write_text", fail)
    with pytest.raises(VhablError, match=text):
        make_flickr.main([*CNN, "--force", "--min-count", "19"])
    assert len(read_back(tmp_path / "made").ids) == 20  # the pairs are whole
    names = ["download", "made", "made_cnn"] if before else ["download", "made"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not before or tree(tmp_path / "made_cnn") == state


def test_features_need_enough_items_and_options_that_fit(tmp_path: Path, net: TinyNet) -> None:
    picture_source(tmp_path / "download")
    cnn, clip = ["download", "--features", "cnn"], ["download", *towers()]
    keys = "data.query and data.train"
    assert_refused(make_flickr.main, cnn, [keys, "2000 queries and 10000", "the 19 items"])
    assert_refused(make_flickr.main, clip, [keys, "2000 queries and 10000", "the 19 items"])
    arguments = [*clip, "--query", "4", "--train", "16"]
    assert_refused(make_flickr.main, arguments, ["4 queries and 16 training items", "the 19 items"])
    nus_source(tmp_path / "nus")
    arguments = ["nus", "--features", "cnn", "--train", "5"]
    assert_refused(make_nuswide.main, arguments, [keys, "2100 queries and 5", "the 20 items"])
    coco_source(tmp_path / "coco")
    arguments = ["coco", "--features", "cnn", "--query", "1"]
    assert_refused(make_coco.main, arguments, [keys, "1 queries and 10000", "the 4 items"])

    for name in ("weights", "device", "query", "train", "network", "model"):
        value = "alexnet" if name == "network" else "4"
        parts = [f"--{name}: it means nothing with no --features. Add --features c"]
        assert_refused(make_flickr.main, ["download", f"--{name}", value], parts)
    parts = ["--network: it means nothing with --features clip. Add --features cnn"]
    assert_refused(make_flickr.main, [*clip, "--network", "alexnet"], parts)
    parts = ["--model: it means nothing with --features cnn. Add --features clip"]
    assert_refused(make_flickr.main, [*cnn, "--model", "towers.json"], parts)
    assert_refused(make_flickr.main, [*cnn, "--device", "abacus"], ["device is 'abacus'"])


def test_features_of_clip_refuse_bad_weights(tmp_path: Path) -> None:
    picture_source(tmp_path / "download")
    arguments = ["download", "--out", "made", *SPLIT, *towers()[:-1]]
    assert_refused(make_flickr.main, [*arguments, "absent.pt"], ["absent.pt: no such file"])
    put(tmp_path / "text.pt", "text")
    assert_refused(make_flickr.main, [*arguments, "text.pt"], ["text.pt: ", "damaged or"])
    torch.save({"visual.proj": torch.zeros(2)}, "other.pt")
    assert_refused(make_flickr.main, [*arguments, "other.pt"], ["other.pt: ", "no ln_final.bias"])


# The weights of networks


@pytest.fixture
def state(tiny_alexnet: None) -> dict[str, torch.Tensor]:
    """Weights of the tiny network, which takes the place of torchvision's."""
    torch.manual_seed(7)
    return TinyAlexNet().state_dict()


@pytest.mark.parametrize("place", ["own.pth", "own.safetensors", "cache"])
def test_features_of_cnn_read_weights_from_a_file(
    tmp_path: Path, state: dict[str, torch.Tensor], place: str
) -> None:
    picture_source(tmp_path / "download")
    arguments = ["--weights", place]
    if place == "own.safetensors":
        save_file(state, place)
    elif place == "own.pth":
        torch.save(state, place)
    else:  # where an earlier download was kept
        Path("cache").mkdir()
        torch.save(state, "cache/vgg16-397923af.pth")
        arguments = []
    make_flickr.main([*CNN, *arguments])
    whole = TinyAlexNet()
    whole.load_state_dict(state)
    files = read_back(tmp_path / "made").files
    second = nn.Sequential(whole.features, whole.avgpool, nn.Flatten(), whole.classifier[:6])
    expected = by_torchvision(files, second)
    train, database, query = read_features(tmp_path / "made_cnn" / "features.mat")
    for split, items in zip((train, database, query), drawn(19), strict=True):
        np.testing.assert_allclose(split.image[:], expected[items], atol=1e-5)
    assert database.image.shape[1] == 6 and (database.image[:] >= 0).all()


class Foreign:
    pass


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "absent.pth": (
        lambda s: None,
        ["--weights absent.pth: no such file", "vgg16-397923af.pth, or one of IMAGENET1K_V1"],
    ),
    "folder.pth": (lambda s: Path("folder.pth").mkdir(), ["no such file"]),
    "empty.pth": (lambda s: put(Path("empty.pth"), ""), ["damaged or"]),
    "text.pth": (lambda s: put(Path("text.pth"), "text"), ["damaged or"]),
    "text.safetensors": (lambda s: put(Path("text.safetensors"), "text"), ["damaged or"]),
    "code.pth": (lambda s: torch.save({**s, "x": Foreign()}, "code.pth"), ["damaged or"]),
    "list.pth": (lambda s: torch.save([1], "list.pth"), ["something else than tensors by name"]),
    "number.pth": (
        lambda s: torch.save({**s, "classifier.1.bias": 1}, "number.pth"),
        ["something else than tensors by name"],
    ),
    "less.pth": (
        lambda s: torch.save({k: s[k] for k in s if k != "classifier.1.bias"}, "less.pth"),
        ["less.pth: no tensor classifier.1.bias. It must be the weights of vgg16"],
    ),
    "more.pth": (
        lambda s: torch.save({**s, "classifier.9.bias": torch.ones(1)}, "more.pth"),
        ["more.pth: an unknown tensor classifier.9.bias. It must be the weights of vgg16"],
    ),
    "shape.pth": (
        lambda s: torch.save({**s, "classifier.1.bias": torch.ones(7)}, "shape.pth"),
        ["shape.pth: classifier.1.bias has the shape (7,). vgg16 needs (8,)"],
    ),
    "nan.safetensors": (
        lambda s: save_file({**s, "classifier.1.bias": torch.ones(8) / 0}, "nan.safetensors"),
        ["classifier.1.bias has values that are not finite"],
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_features_of_cnn_refuse_bad_weights(
    tmp_path: Path, state: dict[str, torch.Tensor], name: str
) -> None:
    picture_source(tmp_path / "download")
    make, parts = BAD_WEIGHTS[name]
    make(state)
    assert_refused(make_flickr.main, [*CNN, "--weights", name], [name, *parts])


@pytest.mark.parametrize(
    ("arguments", "name", "file"),
    [
        ([], "IMAGENET1K_V1", "vgg16-397923af.pth"),
        (["--network", "alexnet"], "IMAGENET1K_V1", "alexnet-owt-7be5be79.pth"),
        (["--weights", "IMAGENET1K_FEATURES"], "IMAGENET1K_FEATURES", "vgg16_features-amdegroot-"),
    ],
)
def test_features_of_cnn_name_the_weights_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str, file: str
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    (tmp_path / "empty").mkdir()  # said before the reading
    (tmp_path / "cache").mkdir()
    parts = [f"weights {name}: https://", "no route to host"]
    parts.append(f"--weights {file}")
    assert_refused(make_flickr.main, ["empty", *CNN[1:], *arguments], parts)


@pytest.mark.slow
def test_features_of_alexnet_are_its_second_connected_layer(tmp_path: Path) -> None:
    open_clip.mend_torchvision()
    from torchvision import models

    picture_source(tmp_path / "download")
    torch.manual_seed(0)
    whole = models.alexnet(weights=None)
    torch.save(whole.state_dict(), "alexnet.pth")
    make_flickr.main([*CNN, "--network", "alexnet", "--weights", "alexnet.pth"])
    found: list[torch.Tensor] = []
    whole.classifier[5].register_forward_hook(lambda *given: found.append(given[2]))
    assert isinstance(whole.classifier[5], nn.ReLU)
    by_torchvision(read_back(tmp_path / "made").files, whole)
    splits = read_features(tmp_path / "made_cnn" / "features.mat")
    for split, items in zip(splits, drawn(19), strict=True):
        assert split.image.shape == (len(items), 4096)
        np.testing.assert_allclose(split.image[:], found[0][items], atol=1e-5)
    assert (splits[1].image[:] > 0).any()


@pytest.mark.e2e
def test_features_end_with_one_message(tmp_path: Path) -> None:
    flickr_source(tmp_path / "download")
    command = [sys.executable, str(SCRIPTS / "make_flickr.py"), *CNN, "--weights", "absent.pth"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --weights absent.pth: no such file. Give ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["download"]
