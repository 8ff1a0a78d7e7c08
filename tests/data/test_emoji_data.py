"""The committed emoji pairs are what their README says, and scripts/make_emoji.py makes them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, features
from scipy.io import loadmat

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "dataset" / "emoji"
SCRIPT = ROOT / "scripts" / "make_emoji.py"
MAT_VARIABLES = {
    "caption.mat": ["caption"],
    "index.mat": ["index"],
    "label.mat": ["label", "names"],
}

PAIRS = 1840
GROUPS = 9
SUBGROUPS = 39
MAX_BYTES = 6_000_000

# Debian 12: fonts-noto-color-emoji 2.042-0+deb12u1, unicode-cldr-core 41-0.1, unicode-data 15.0.0-1
INPUTS = {
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": "e5899ed38b8ed83e",
    "/usr/share/unicode/cldr/common/annotations/en.xml": "170a989b9aff71fd",
    "/usr/share/unicode/cldr/common/annotationsDerived/en.xml": "0fab943b22dd1197",
    "/usr/share/unicode/emoji/emoji-test.txt": "8445f23ac8388e09",
}
# The compressors that wrote the committed files; others give other bytes for the same content.
COMPRESSORS = {"pillow": "13.0.0", "zlib-ng": "2.3.3", "zlib": "1.2.13"}


@dataclass(frozen=True)
class Pairs:
    captions: list[str]
    paths: list[str]
    labels: np.ndarray
    names: list[str]


def strings(cells: np.ndarray) -> list[str]:
    assert cells.ndim == 2 and cells.shape[1] == 1
    return [cell.item() for cell in cells[:, 0]]


def comparable(phrase: str) -> str:
    """Write a phrase without case, punctuation between words, and plurals."""
    text = " ".join(re.split(r"[-_&\s]+", phrase.lower())).strip()
    return re.sub(r"(?<!s)s\b", "", re.sub(r"ies\b", "y", text).replace("people", "person"))


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    label = loadmat(DATA / "label.mat")
    return Pairs(
        captions=strings(loadmat(DATA / "caption.mat")["caption"]),
        paths=strings(loadmat(DATA / "index.mat")["index"]),
        labels=label["label"],
        names=strings(label["names"]),
    )


def test_every_file_holds_the_same_number_of_pairs(pairs: Pairs) -> None:
    assert len(pairs.captions) == len(pairs.paths) == PAIRS
    assert pairs.labels.shape == (PAIRS, GROUPS + SUBGROUPS)
    assert pairs.labels.dtype == np.uint8
    assert set(np.unique(pairs.labels)) == {0, 1}


def test_class_names_are_distinct(pairs: Pairs) -> None:
    assert len(set(pairs.names)) == len(pairs.names) == GROUPS + SUBGROUPS
    assert pairs.names[0] == "Smileys & Emotion"
    assert pairs.names[GROUPS - 1] == "Flags"
    assert pairs.names[-1] == "country-flag"


def test_every_pair_has_one_group_and_at_most_one_subgroup(pairs: Pairs) -> None:
    assert (pairs.labels[:, :GROUPS].sum(axis=1) == 1).all()
    assert (pairs.labels[:, GROUPS:].sum(axis=1) <= 1).all()


def test_every_subgroup_lies_in_one_group_and_has_15_members(pairs: Pairs) -> None:
    groups, subgroups = pairs.labels[:, :GROUPS], pairs.labels[:, GROUPS:]
    shared = subgroups.T.astype(int) @ groups
    assert (np.count_nonzero(shared, axis=1) == 1).all()
    assert (subgroups.sum(axis=0) >= 15).all()


def test_images_are_distinct_squares_on_white(pairs: Pairs) -> None:
    assert {path.name for path in (DATA / "images").iterdir()} == {
        path.removeprefix("images/") for path in pairs.paths
    }
    pixels = set()
    for path in pairs.paths:
        with Image.open(DATA / path) as image:
            assert image.format == "PNG"
            assert image.mode in {"RGB", "P"} and "transparency" not in image.info
            assert image.width == image.height and 64 <= image.width <= 72
            colours = np.asarray(image.convert("RGB"))
            assert (colours[[0, -1]] == 255).all(), "the background is white"
            pixels.add(colours.tobytes())
    assert len(pixels) == PAIRS


def test_image_name_is_the_character_sequence(pairs: Pairs) -> None:
    row = pairs.paths.index("images/1f600.png")
    assert pairs.captions[row].startswith("grinning face")
    assert pairs.names[int(pairs.labels[row].argmax())] == "Smileys & Emotion"


def test_no_caption_is_empty_or_names_a_label(pairs: Pairs) -> None:
    labels = {comparable(name) for name in pairs.names}
    for caption in pairs.captions:
        assert caption and caption == caption.strip()
        for part in caption.split(", "):
            assert part
            assert comparable(part) not in labels, caption
            assert comparable(part.partition(":")[0]) not in labels, caption


@pytest.mark.parametrize("caption", ["Germany", "São Tomé & Príncipe", "Åland Islands"])
def test_flags_are_called_by_the_country_alone(pairs: Pairs, caption: str) -> None:
    assert caption in pairs.captions


def test_data_set_stays_small() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_licences_are_shipped() -> None:
    assert "SIL OPEN FONT LICENSE Version 1.1" in (DATA / "LICENSE-NOTO").read_text("utf-8")
    assert "COPYRIGHT AND PERMISSION NOTICE" in (DATA / "LICENSE-UNICODE").read_text("utf-8")


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("uharfbuzz", reason="scripts/make_emoji.py needs uharfbuzz")
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def same_compressors() -> bool:
    installed = {
        "pillow": PIL.__version__,
        "zlib-ng": features.version("zlib_ng"),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }
    return installed == COMPRESSORS


def assert_same_content(made: Path, committed: Path) -> None:
    if committed.suffix == ".png":
        with Image.open(made) as left, Image.open(committed) as right:
            assert left.convert("RGB").tobytes() == right.convert("RGB").tobytes()
    else:
        made_variables, committed_variables = loadmat(made), loadmat(committed)
        for name in MAT_VARIABLES[committed.name]:
            np.testing.assert_array_equal(made_variables[name], committed_variables[name])


def test_script_makes_the_committed_files(tmp_path: Path) -> None:
    for name, digest in INPUTS.items():
        if not Path(name).is_file():
            pytest.skip(f"{name} is missing: install its Debian package")
        if not hashlib.sha256(Path(name).read_bytes()).hexdigest().startswith(digest):
            pytest.skip(f"{name} is not the version that the data set was made from")
    out = tmp_path / "emoji"
    out.mkdir()
    (out / "README.md").write_text("kept", encoding="utf-8")

    result = run_script("--out", out)

    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]
    assert (out / "README.md").read_text(encoding="utf-8") == "kept"
    generated = [*MAT_VARIABLES, *(f"images/{path.name}" for path in (DATA / "images").iterdir())]
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert made == {*generated, "README.md"}
    for name in generated:
        assert_same_content(out / name, DATA / name)
        if same_compressors():
            assert (out / name).read_bytes() == (DATA / name).read_bytes(), name


@pytest.mark.parametrize(
    ("option", "package"),
    [
        ("--font", "fonts-noto-color-emoji"),
        ("--cldr", "unicode-cldr-core"),
        ("--emoji-test", "unicode-data"),
    ],
)
def test_script_names_the_package_of_a_missing_file(
    tmp_path: Path, option: str, package: str
) -> None:
    inputs = {}
    for name in ("--font", "--cldr", "--emoji-test"):
        inputs[name] = tmp_path / name.strip("-")
    inputs["--font"].write_bytes(b"")
    inputs["--emoji-test"].write_text("", encoding="utf-8")
    for folder in ("annotations", "annotationsDerived"):
        (inputs["--cldr"] / folder).mkdir(parents=True)
        (inputs["--cldr"] / folder / "en.xml").write_text("<ldml/>", encoding="utf-8")
    inputs[option] = tmp_path / "absent"

    result = run_script(
        "--out", tmp_path / "out", *(word for pair in inputs.items() for word in pair)
    )

    assert result.returncode == 2
    assert str(tmp_path / "absent") in result.stderr and package in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_script_does_not_replace_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    result = run_script("--out", tmp_path)
    assert result.returncode == 2
    assert "thesis.txt" in result.stderr
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"
