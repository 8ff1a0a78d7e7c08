#!/usr/bin/env python3
"""Build the image-text data set `dataset/emoji` from an emoji font and Unicode's English names.

Each pair is one emoji: the glyph that Noto Color Emoji draws, and the short name and keywords
that Unicode CLDR gives it. The labels are the groups and the larger subgroups of Unicode's
emoji-test.txt. A caption that held the name of a label would give the answer away, so these
names are taken out of the captions.

The inputs are files of three Debian packages: fonts-noto-color-emoji, unicode-cldr-core and
unicode-data. The same inputs and library versions give the same output, byte for byte.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uharfbuzz as hb
from PIL import Image
from scipy.io import savemat

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

IMAGE_SIZE = 72
PALETTE_SIZE = 256
NEARLY_WHITE = 250
MIN_SUBGROUP_SIZE = 15
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
VARIATION_SELECTOR = "\ufe0f"  # CLDR leaves it out of its keys

GENERATED = {"images", "caption.mat", "index.mat", "label.mat"}
KEPT = {"README.md", "LICENSE-NOTO", "LICENSE-UNICODE"}

MAT_HEADER = b"MATLAB 5.0 MAT-file, written by make_emoji.py".ljust(116)


class InputError(Exception):
    """The inputs or the output folder cannot be used; the message says what to do about it."""


@dataclass(frozen=True)
class Emoji:
    """A line of emoji-test.txt."""

    text: str
    group: str
    subgroup: str

    @property
    def cldr_key(self) -> str:
        return self.text.replace(VARIATION_SELECTOR, "")

    @property
    def image_path(self) -> str:
        return "images/" + "_".join(f"{ord(char):04x}" for char in self.text) + ".png"


@dataclass(frozen=True)
class Annotation:
    """What CLDR says of an emoji in English."""

    name: str
    keywords: tuple[str, ...]


def require(path: Path, package: str) -> Path:
    """Return `path`, or say which Debian package holds it."""
    if not path.is_file():
        raise InputError(f"{path} not found: install the Debian package {package}")
    return path


def read_emoji(path: Path) -> Iterator[Emoji]:
    """Yield the fully-qualified emoji without skin tone, in the order of emoji-test.txt."""
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            codes, _, rest = line.partition(";")
            text = "".join(chr(int(code, 16)) for code in codes.split())
            status = rest.partition("#")[0].strip()
            if status == "fully-qualified" and SKIN_TONES.isdisjoint(text):
                yield Emoji(text, group, subgroup)


def read_annotations(paths: list[Path]) -> dict[str, Annotation]:
    """Return the annotation of every character sequence that has a short name."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in paths:
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as error:
            raise InputError(f"{path} is not a CLDR file: {error}") from error
        for element in root.iter("annotation"):
            key, content = element.get("cp", ""), element.text or ""
            if element.get("type") == "tts":
                names[key] = content.strip()
            else:
                keywords[key] = tuple(word.strip() for word in content.split("|"))
    return {key: Annotation(name, keywords.get(key, ())) for key, name in names.items()}


class EmojiFont:
    """A font with bitmap glyphs, used through HarfBuzz."""

    def __init__(self, path: Path) -> None:
        self._font = hb.Font(hb.Face(hb.Blob.from_file_path(str(path))))

    def bitmap(self, text: str) -> Image.Image | None:
        """Return the bitmap of `text`, or None if the font does not draw it as one glyph."""
        buffer = hb.Buffer()
        buffer.add_str(text)
        buffer.guess_segment_properties()
        hb.shape(self._font, buffer)
        glyphs = [info.codepoint for info in buffer.glyph_infos]
        if len(glyphs) != 1 or glyphs[0] == 0:
            return None
        png = self._font.get_glyph_color_png(glyphs[0])
        if not png.data:
            return None
        return Image.open(io.BytesIO(png.data)).convert("RGBA")


def draw(bitmap: Image.Image) -> Image.Image:
    """Centre the bitmap on a white square and scale it.

    The palette keeps the data set below 6 MB, where plain RGB files would need 8 MB. Of the ways
    to choose one, maximum coverage has the smallest error in the worst pixel.
    """
    side = max(bitmap.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    scaled = canvas.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    image = scaled.quantize(
        PALETTE_SIZE, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    image.putpalette(whiten(image.getpalette() or []))
    return image


def whiten(palette: list[int]) -> list[int]:
    """Make the nearly white colours white: quantization may shift the background a little."""
    colours = np.array(palette, dtype=np.uint8).reshape(-1, 3)
    colours[colours.min(axis=1) >= NEARLY_WHITE] = 255
    return colours.ravel().tolist()


def draw_all(
    emoji: Iterable[Emoji], font: EmojiFont, annotations: dict[str, Annotation]
) -> dict[Emoji, Image.Image]:
    """Draw the emoji that are annotated and that the font has."""
    images: dict[Emoji, Image.Image] = {}
    for item in emoji:
        bitmap = font.bitmap(item.text) if item.cldr_key in annotations else None
        if bitmap is not None:
            images[item] = draw(bitmap)
    return images


def first_of_each_look(emoji: Iterable[Emoji], images: dict[Emoji, Image.Image]) -> list[Emoji]:
    """Keep the first of the emoji with the same image, as of flags that share a design."""
    firsts: dict[bytes, Emoji] = {}
    for item in emoji:
        firsts.setdefault(images[item].convert("RGB").tobytes(), item)
    return list(firsts.values())


def class_names(emoji: Collection[Emoji]) -> list[str]:
    """Return the groups, then the subgroups with enough members to be worth predicting."""
    groups = list(dict.fromkeys(item.group for item in emoji))
    sizes = Counter(item.subgroup for item in emoji)
    return groups + [name for name, size in sizes.items() if size >= MIN_SUBGROUP_SIZE]


def label_matrix(emoji: list[Emoji], classes: list[str]) -> np.ndarray:
    rows = [[name in (item.group, item.subgroup) for name in classes] for item in emoji]
    return np.array(rows, dtype=np.uint8)


def comparable(phrase: str) -> str:
    """Reduce a phrase to what it has in common with its other spellings and its plural."""
    words = re.split(r"[\s_&-]+", phrase.casefold())
    return " ".join(singular(word) for word in words if word)


def singular(word: str) -> str:
    """Cut a regular English plural; the few classes need no more than this."""
    if word == "people":
        return "person"
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def make_caption(annotation: Annotation, labels: set[str]) -> tuple[str, Counter[str]]:
    """Join the name and the keywords, without repeats and without the names of labels.

    A name such as "flag: Germany" loses the part before the colon if that part is a label.
    Also return how many names, keywords and prefixes were dropped.
    """
    parts: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for position, part in enumerate((annotation.name, *annotation.keywords)):
        prefix, colon, rest = part.partition(":")
        if colon and comparable(prefix) in labels:
            dropped["prefixes"] += 1
            part = rest.strip()
        if comparable(part) in labels:
            dropped["keywords" if position else "names"] += 1
        elif part:
            parts.setdefault(part.casefold(), part)
    return ", ".join(parts.values()), dropped


def cells(strings: list[str]) -> np.ndarray:
    """Return an N x 1 MATLAB cell array."""
    return np.array(strings, dtype=object).reshape(-1, 1)


def write_mat(path: Path, variables: dict[str, np.ndarray]) -> None:
    """Write a MATLAB 5 file whose header does not hold the date, so that it is reproducible."""
    savemat(path, variables, do_compression=True)
    with path.open("r+b") as file:
        file.write(MAT_HEADER)


def write_pairs(
    folder: Path,
    emoji: list[Emoji],
    images: dict[Emoji, Image.Image],
    captions: list[str],
    classes: list[str],
) -> None:
    """Write the layout of raw pairs: images and three MATLAB files whose rows correspond."""
    (folder / "images").mkdir(parents=True)
    for item in emoji:
        images[item].save(folder / item.image_path, optimize=True)
    write_mat(folder / "caption.mat", {"caption": cells(captions)})
    write_mat(folder / "index.mat", {"index": cells([item.image_path for item in emoji])})
    labels = label_matrix(emoji, classes)
    write_mat(folder / "label.mat", {"label": labels, "names": cells(classes)})


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier build."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder")
    foreign = {path.name for path in out.iterdir()} - GENERATED - KEPT if out.exists() else set()
    if foreign:
        raise InputError(f"{out} holds other files, move them away: {', '.join(sorted(foreign))}")


def replace_folder(new: Path, out: Path, spare: Path) -> None:
    """Put `new` in the place of `out`; carry over the files that are written by hand."""
    if not out.exists():
        new.rename(out)
        return
    for name in KEPT:
        if (out / name).exists():
            shutil.copy2(out / name, new / name)
    out.rename(spare)
    try:
        new.rename(out)
    except OSError:
        spare.rename(out)
        raise


def build(font_path: Path, cldr: Path, emoji_test: Path, out: Path) -> None:
    """Make the data set in a folder beside `out`, then move it into place."""
    check_replaceable(out)
    font = EmojiFont(require(font_path, "fonts-noto-color-emoji"))
    annotations = read_annotations(
        [
            require(cldr / folder / "en.xml", "unicode-cldr-core")
            for folder in ("annotations", "annotationsDerived")
        ]
    )
    candidates = read_emoji(require(emoji_test, "unicode-data"))
    images = draw_all(candidates, font, annotations)
    if not images:
        raise InputError(f"{font_path} draws none of the annotated emoji in {emoji_test}")

    classes = class_names(images)
    labels = {comparable(name) for name in classes}
    captions = {item: make_caption(annotations[item.cldr_key], labels) for item in images}
    # An emoji that is called like a label and nothing else has no caption left: U+1F46A, family.
    # It goes first, so that a look-alike with a caption stays.
    emoji = first_of_each_look((item for item in images if captions[item][0]), images)
    dropped = sum((captions[item][1] for item in emoji), Counter())

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary, "new")
        write_pairs(new, emoji, images, [captions[item][0] for item in emoji], classes)
        replace_folder(new, out, Path(temporary, "old"))

    groups = len({item.group for item in emoji})
    print(f"# {len(emoji)} pairs, {groups} groups, {len(classes) - groups} subgroups in {out}")
    print(
        f"# label names taken out of the captions: {dropped['names']} names, "
        f"{dropped['keywords']} keywords, {dropped['prefixes']} prefixes"
    )
    print("class_names:")
    for name in classes:
        print(f"  - {json.dumps(name)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build the emoji data set from files of three Debian packages."
    )
    parser.add_argument("--font", type=Path, default=FONT, help="default: %(default)s")
    parser.add_argument(
        "--cldr",
        type=Path,
        default=CLDR,
        help="folder with annotations/en.xml and annotationsDerived/en.xml; default: %(default)s",
    )
    parser.add_argument("--emoji-test", type=Path, default=EMOJI_TEST, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("dataset/emoji"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        build(options.font, options.cldr, options.emoji_test, options.out.resolve())
    except (InputError, OSError) as error:
        print(f"make_emoji.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
