"""Codes of one's own pictures and texts, from a trained run.

python -m vhabl.encode --checkpoint RUN --images DIR --bits 64 --out codes.npz
python -m vhabl.encode --checkpoint RUN --table items.csv --bits 64 --out codes.npz
python -m vhabl.encode --checkpoint RUN --text "a red car" --text "two dogs"

    model = vhabl.load("checkpoint/mine/vh_abl_clip/0")
    codes = model.encode(images=["a.jpg", "b.jpg"], texts=["a red car", "two dogs"], bits=64)
    codes["fused"]  # int8 [2, 64] of -1 and +1

An .npz file has `ids`, `bits`, and the codes of each view (`fused`, or `image` and `text`) packed
as `vhabl.codes.pack` does. A fused method takes pictures, texts or pairs; a cross one encodes
pictures and texts apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vhabl import codes as code_files
from vhabl import errors, openclip, runs
from vhabl.data.pairs import bag_of_words, describe_images, pictures
from vhabl.data.table import read_items
from vhabl.errors import fail, note, plural
from vhabl.evaluator import encode
from vhabl.files import atomic_path
from vhabl.settings import DataConfig
from vhabl.trainer import pick_device
from vhabl.types import Rows, Split

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

Images = Sequence[str | Path | Image.Image] | np.ndarray
Texts = Sequence[str] | np.ndarray


def load(folder: str | Path, device: str = "auto") -> Model:
    """The model of a finished run. Raises VhablError where there is none, or it is damaged."""
    return Model(runs.load(Path(folder)), device)


class Model:
    """A trained method that encodes raw files and strings. It never sees a label."""

    def __init__(self, run: runs.Run, device: str = "auto") -> None:
        self.run = run
        self.method = run.method.to(pick_device(device)).eval()
        if self.method.oracle_labels:
            fail(run.folder, "a model that encodes true labels", "one without oracle_labels")

    def encode(
        self,
        images: Images | Rows | None = None,
        texts: Texts | None = None,
        bits: int | None = None,
        progress_bar: bool = False,
    ) -> dict[str, np.ndarray]:
        """Codes of each view, int8 [N, bits] of -1 and +1: {"fused": ...} or {"image": ..., "text":
        ...} with what was given.

        images: files or pictures, or the pixels of a data set; texts: strings. For a model of
        features both are features [N, d]; for one of pictures in arrays its texts are. A fused
        method takes them as pairs. bits: the longest length by default. Raises VhablError for a
        picture that cannot be read, for a length or a modality that the model does not serve, and
        for numbers of images and texts that do not pair.
        """
        if images is None and texts is None:
            fail("images and texts", "neither", "one of them, or both")
        bits = self.method.bits if bits is None else bits
        if not isinstance(bits, int):
            fail("key bits", repr(bits), "a whole number")
        self.method.check_length(bits)
        image = None if images is None else self._image(images)
        text = None if texts is None else self._text(texts)
        if image is not None and text is not None and self.method.task == "fused":
            if len(image) != len(text):
                found = f"{plural(len(image), 'image')} and {plural(len(text), 'text')}"
                fail("images and texts", found, "as many of each: they are pairs")
            return self._codes(image, text, bits, "", progress_bar)
        result: dict[str, np.ndarray] = {}
        if image is not None:
            result |= self._codes(image, _nothing(len(image)), bits, "image", progress_bar)
        if text is not None:
            result |= self._codes(_nothing(len(text)), text, bits, "text", progress_bar)
        return result

    def _codes(
        self,
        image: np.ndarray | Rows,
        text: np.ndarray | Rows,
        bits: int,
        only: str,
        progress_bar: bool,
    ) -> dict[str, np.ndarray]:
        count = len(text) if only == "text" else len(image)
        views = [self.method.task] if self.method.task == "fused" else [only]
        if not count:
            return {view: np.zeros((0, bits), np.int8) for view in views}
        split = Split(np.arange(count), image, text, np.zeros((count, 0), np.uint8))
        return encode(self.method, split, [bits], only, progress_bar)[bits]

    def _image(self, images: Images | Rows) -> np.ndarray | Rows:
        config, encoder = self.run.config.data, self.run.config.encoder
        if isinstance(images, Rows):
            return images
        if not config.has_files and encoder.name == "features":
            return _features("images", images, self.method.spec.image_dim)
        _refuse_features("images", images)
        files = [Path(i) if isinstance(i, str) else i for i in images]
        if encoder.name == "features" and not files:
            return np.zeros((0, self.method.spec.image_dim), np.float32)
        if encoder.name == "features":
            return describe_images(files)
        return Rows(pictures(files, config, encoder), np.arange(len(files)))

    def _text(self, texts: Texts) -> np.ndarray:
        config, encoder = self.run.config.data, self.run.config.encoder
        if not config.has_files:
            return _features("texts", texts, self.method.spec.text_dim)
        _refuse_features("texts", texts)
        if encoder.name != "clip":
            return bag_of_words(list(texts), self.method.spec.vocabulary)
        tokens, too_long = openclip.tokenise(list(texts), encoder.words)
        if too_long:
            note(f"{plural(too_long, 'text')} longer than {encoder.words} tokens: cut")
        return tokens


def _nothing(count: int) -> np.ndarray:
    return np.zeros((count, 0), np.float32)


def _features(what: str, given: Any, width: int) -> np.ndarray:
    try:
        features = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        features = np.zeros(0, np.float32)
    if features.ndim != 2 or features.shape[1] != width or not np.isfinite(features).all():
        fail(what, f"{type(given).__name__} of shape {np.shape(features)}",
             f"finite features [N, {width}]: the model was trained on features")  # fmt: skip
    return features


def _refuse_features(what: str, given: Any) -> None:
    known = (str, Path, Image.Image) if what == "images" else (str,)
    if isinstance(given, str | bytes | np.ndarray) or not isinstance(given, Sequence):
        fail(what, f"a {type(given).__name__}", "a sequence of files or strings")
    for number, item in enumerate(given):
        if not isinstance(item, known):
            found = f"a {type(item).__name__} as number {number + 1}"
            fail(what, found, " or ".join(kind.__name__ for kind in known))


def image_files(folder: Path) -> list[Path]:
    """Pictures in a folder, by name. Raises VhablError where there is none."""
    if not folder.is_dir():
        fail(folder, "no such folder", "a folder of pictures")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        fail(folder, "no picture", f"files that end with {', '.join(sorted(SUFFIXES))}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.encode", description="Codes of your own pictures and texts."
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, metavar="DIR", help="every picture of a folder")
    what.add_argument(
        "--table", type=Path, metavar="FILE",
        help="a .csv, .tsv, .jsonl or .parquet table with columns image, caption or both",
    )  # fmt: skip
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--image-root", default="images", metavar="DIR",
                        help="folder of a table's pictures, beside the table [images]")  # fmt: skip
    parser.add_argument("--bits", type=int, metavar="N", help="code length [the longest]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="without it, codes are printed"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    if given.out is not None and given.out.suffix != ".npz":
        fail(f"argument --out {given.out}", "another ending", ".npz")
    model = load(given.checkpoint, given.device)
    images: list[Path] | None = None
    texts: list[str] | None = given.text
    if given.images is not None:
        images = image_files(given.images)
        ids = [file.name for file in images]
    elif given.table is not None:
        config = DataConfig("table", "table", str(given.table), image_root=given.image_root)
        ids, images, texts = read_items(given.table, config)
    else:
        ids = list(given.text)
    bits = model.method.bits if given.bits is None else given.bits
    found = model.encode(images, texts, bits, progress_bar=not given.quiet)
    if given.out is None:
        for view, rows in found.items():
            for name, code in zip(ids, rows, strict=True):
                print(f"{name}\t{view}\t{''.join('1' if bit > 0 else '0' for bit in code)}")
        return 0
    with atomic_path(given.out) as path, path.open("wb") as file:
        packed: dict[str, Any] = {view: code_files.pack(rows) for view, rows in found.items()}
        np.savez(file, bits=np.int64(bits), ids=np.array(ids), **packed)
    sizes = ", ".join(f"{view} {len(rows):,}" for view, rows in found.items())
    print(f"{given.out}: codes of {bits} bits: {sizes}")
    return 0


if __name__ == "__main__":
    errors.run(main)
