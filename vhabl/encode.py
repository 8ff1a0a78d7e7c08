"""Codes of one's own pictures and texts, from a trained run.

python -m vhabl.encode --checkpoint RUN --images DIR --bits 64 --out codes.npz
python -m vhabl.encode --checkpoint RUN --table items.csv --bits 64 --out codes.npz
python -m vhabl.encode --checkpoint RUN --data configs/data/emoji.yaml --out codes.npz
python -m vhabl.encode --checkpoint RUN --text "a red car" --text "two dogs"
torchrun --nproc-per-node 4 -m vhabl.encode --checkpoint RUN --table items.csv --out codes.npz

    model = vhabl.load("checkpoint/mine/vh_abl_clip/0")
    codes = model.encode(images=["a.jpg", "b.jpg"], texts=["a red car", "two dogs"], bits=64)
    codes["fused"]  # int8 [2, 64] of -1 and +1

An .npz file has `ids`, `bits`, digests of the run's weights (`run`) and of the texts (`texts`), and
the codes of each view (`fused`, or `image` and `text`) packed as `vhabl.codes.pack` does. A fused
method takes pictures, texts or pairs; a cross one encodes pictures and texts apart.

Under torchrun each process encodes a part of the items, and the file is the same. Parts that are
done are kept for the next try where one dies (`vhabl.codes.shards`).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from PIL import Image

from vhabl import codes as code_files
from vhabl.codes import shards
from vhabl.codes.shards import Part, Shard
from vhabl.config import load_data_config, to_yaml
from vhabl.data import collection
from vhabl.data.images import Picture, is_picture
from vhabl.data.pairs import bag_of_words, describe_images, pictures, words
from vhabl.data.table import read_items
from vhabl.encoders import open_clip
from vhabl.evaluation.records import encode, relaxed_codes
from vhabl.settings import DataConfig
from vhabl.system import distributed, errors
from vhabl.system.distributed import Ranks
from vhabl.system.errors import bad_value, fail, note, plural
from vhabl.system.files import atomic_path
from vhabl.training import run_folder
from vhabl.training.trainer import pick_device
from vhabl.types import Embedded, Rows, Split, Stored, take

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".avif"}

Images = Sequence[str | Picture] | np.ndarray | Rows
Texts = Sequence[str | None] | np.ndarray  # None: the item has an image alone
# Ids, and images and texts in their order; None for what the items do not have.
Items = tuple[list[str], Sequence[Stored] | np.ndarray | Rows | None, Texts | None]


def load(folder: str | Path, device: str = "auto") -> Model:
    """The model of a finished run. Raises VhablError where there is none, or it is damaged."""
    return Model(run_folder.load(Path(folder)), device)


class Model:
    """A trained method that encodes raw files and strings. It never sees a label."""

    def __init__(self, run: run_folder.Run, device: str = "auto") -> None:
        self.run = run
        self.method = run.method.to(pick_device(device)).eval()
        if self.method.oracle_labels:
            do = "Give a run without oracle_labels"
            fail(run.folder, "its codes are made from true labels", do)

    def encode(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        bits: int | None = None,
        progress_bar: bool = False,
    ) -> dict[str, np.ndarray]:
        """Codes of each view, int8 [N, bits] of -1 and +1: {"fused": ...} or {"image": ..., "text":
        ...} with what was given.

        images: files or pictures, or the pixels of a data set; texts: strings. For a model of
        features both are features [N, d]; for one of pictures in arrays its texts are. A fused
        method takes them as pairs; None as a text is an item that has an image alone. bits: the
        longest length by default. Raises VhablError for a picture that cannot be read, for a length
        or a modality that the model does not serve, and for numbers of images and texts that do not
        pair.
        """
        return self._run(images, texts, bits, progress_bar, encode)

    def features(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        bits: int | None = None,
        progress_bar: bool = False,
    ) -> dict[str, np.ndarray]:
        """What `encode` takes the signs of, float32 [N, bits] of each view."""
        return self._run(images, texts, bits, progress_bar, relaxed_codes)

    def table(self, path: Path, image_root: str, class_names: Sequence[str] = ()) -> DataConfig:
        """How a table is read: with the columns of the one that the model was trained on."""
        own = self.run.config.data
        if own.kind != "table":
            own = DataConfig("table", "table", "")
        names = list(class_names)
        return replace(own, path=str(path), image_root=image_root, class_names=names)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the model does not count; none where it reads tokens. Raises
        VhablError where it counts none of them.
        """
        vocabulary = self.method.spec.vocabulary
        unknown = [word for word in words(text) if word not in vocabulary] if vocabulary else []
        if vocabulary and len(unknown) == len(words(text)):
            do = "Use words of its training captions"
            fail("text", f"the model knows no word of {text[:80]!r}", do)
        return unknown

    def _run(
        self,
        images: Images | None,
        texts: Texts | None,
        bits: int | None,
        progress_bar: bool,
        run: Callable[..., dict[int, dict[str, np.ndarray]]],
    ) -> dict[str, np.ndarray]:
        codes, cut = self._encode(images, texts, bits, progress_bar, run)
        self._note_cut(cut)
        return codes

    def _note_cut(self, count: int) -> None:
        if count:
            words = self.run.config.encoder.words
            note(f"{plural(count, 'text')} longer than {words} tokens: cut")

    def _encode(
        self,
        images: Images | None,
        texts: Texts | None,
        bits: int | None,
        progress_bar: bool,
        run: Callable[..., dict[int, dict[str, np.ndarray]]],
    ) -> tuple[dict[str, np.ndarray], int]:
        """What `run` gives, and how many texts were cut, which it does not say."""
        if images is None and texts is None:
            fail("images and texts", "neither is given", "Give one of them, or both")
        bits = self.method.bits if bits is None else self.method.check_length(bits)
        image = None if images is None else self._image(images)
        text, cut = (None, 0) if texts is None else self._text(texts)
        no_text = np.array([t is None for t in (texts if texts is not None else [])], bool)
        if image is not None and text is not None and self.method.task == "fused":
            if len(image) != len(text):
                found = f"{plural(len(image), 'image')} and {plural(len(text), 'text')}"
                fail("images and texts", found, "They are pairs: give as many of each")
            if not no_text.any():
                return self._codes(image, text, bits, "", progress_bar, run), cut
            pairs, alone = np.flatnonzero(~no_text), np.flatnonzero(no_text)
            some, others = take(image, pairs), take(image, alone)
            parts = (
                self._codes(some, text[pairs], bits, "", progress_bar, run),
                self._codes(others, _nothing(len(alone)), bits, "image", progress_bar, run),
            )
            rows = np.concatenate([part["fused"] for part in parts])
            return {"fused": rows[np.argsort(np.concatenate([pairs, alone]))]}, cut
        if no_text.any():
            fail("texts", f"None as number {no_text.argmax() + 1}", "Give a text of each item")
        result: dict[str, np.ndarray] = {}
        if image is not None:
            result |= self._codes(image, _nothing(len(image)), bits, "image", progress_bar, run)
        if text is not None:
            result |= self._codes(_nothing(len(text)), text, bits, "text", progress_bar, run)
        return result, cut

    def _codes(
        self,
        image: np.ndarray | Rows,
        text: np.ndarray | Rows,
        bits: int,
        only: str,
        progress_bar: bool,
        run: Callable[..., dict[int, dict[str, np.ndarray]]],
    ) -> dict[str, np.ndarray]:
        count = len(text) if only == "text" else len(image)
        views = [self.method.task] if self.method.task == "fused" else [only]
        if not count:
            kind = np.int8 if run is encode else np.float32
            return {view: np.zeros((0, bits), kind) for view in views}
        split = Split(np.arange(count), image, text, np.zeros((count, 0), np.uint8))
        return run(self.method, split, [bits], only, progress_bar)[bits]

    def _image(self, images: Images) -> np.ndarray | Rows:
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

    def _text(self, texts: Texts) -> tuple[np.ndarray, int]:
        """Texts as the encoder takes them, and how many of them were cut."""
        config, encoder = self.run.config.data, self.run.config.encoder
        if not config.has_files:
            return _features("texts", texts, self.method.spec.text_dim), 0
        _refuse_features("texts", texts)
        listed = [text or "" for text in texts]
        if encoder.name != "clip":
            bags = bag_of_words(listed, self.method.spec.vocabulary)
            known = zip(listed, bags, strict=True)
            if unknown := [text for text, bag in known if words(text) and not bag.any()]:
                found = f"{plural(len(unknown), 'text')} without a word that the model knows"
                note(f"{found}, such as {unknown[0][:80]!r}")
            return bags, 0
        return open_clip.tokenise(listed, encoder.words)


def _nothing(count: int) -> np.ndarray:
    return np.zeros((count, 0), np.float32)


def _features(what: str, given: Any, width: int) -> np.ndarray:
    try:
        features = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        features = np.zeros(0, np.float32)
    if features.ndim != 2 or features.shape[1] != width or not np.isfinite(features).all():
        do = f"The model was trained on features: give finite ones, [N, {width}]"
        fail(what, f"{type(given).__name__} of shape {np.shape(features)}", do)
    return features


def _refuse_features(what: str, given: Any) -> None:
    known = (str, Path, Embedded, Image.Image) if what == "images" else (str, NoneType)
    if isinstance(given, str | bytes | np.ndarray) or not isinstance(given, Sequence):
        fail(what, f"a {type(given).__name__}", "Give a sequence of files or strings")
    for number, item in enumerate(given):
        if not isinstance(item, known):
            found = f"a {type(item).__name__} as number {number + 1}"
            names = " or ".join(kind.__name__ for kind in known if kind != NoneType)
            fail(what, found, f"Give {names}")


def image_files(folder: Path) -> list[Path]:
    """Pictures in a folder and its subfolders, by path; a note says what was left out. Raises
    VhablError where there is none.
    """
    if not folder.is_dir():
        fail(folder, "no such folder", "Give a folder of pictures")
    found, hidden, links, others = list[Path](), list[Path](), list[Path](), list[Path]()
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            links += [file] if file.is_symlink() else []
        elif any(part.startswith(".") for part in file.relative_to(folder).parts):
            hidden.append(file)  # such as ._x.jpg, in which macOS keeps notes on x.jpg
        elif file.suffix.lower() in SUFFIXES or is_picture(file):
            found.append(file)
        else:
            others.append(file)
    reasons = (
        (hidden, "hidden"),
        (links, "a link to a folder or to nothing"),
        (others, "no picture"),
    )
    for files, why in reasons:
        if files:
            example = files[0].relative_to(folder)
            note(f"{folder}: left out {plural(len(files), 'file')} ({why}), such as {example}")
    if not found:
        do = f"Names of pictures end with {', '.join(sorted(SUFFIXES))}"
        fail(folder, "no picture is in it", do)
    return found


def _digest(texts: Texts | None) -> str:
    return shards.signature((), (), None, texts)


def read_codes(
    path: Path, model: Model, ids: Sequence[str], texts: Texts, bits: int | None = None
) -> dict[str, np.ndarray]:
    """Codes of each view of the model, int8 [N, bits], from a file that this command wrote. Raises
    VhablError where it is damaged, or not of this run, of these items or of this length.
    """
    arrays = code_files.read_npz(path)
    run, of_texts = (str(arrays.pop(key, "nothing")) for key in ("run", "texts"))
    if run != model.run.digest:
        do = f"{model.run.folder} is {model.run.digest}: encode the items with it"
        fail(path, f"its codes are of run {run}", do)
    try:
        found = code_files.texts(arrays.pop("ids", np.zeros(0, str)))
    except ValueError as error:
        fail(f"{path}: key ids", str(error), "It must be the ids of the items")
    wanted = np.array(ids, str).tolist()
    if found != wanted:
        other = next((f for f, w in zip(found, wanted, strict=False) if f != w), "")
        said = plural(len(found), "item") + (f", {other!r} among them" if other else "")
        do = f"It must be the {plural(len(wanted), 'item')} of the data, in order"
        fail(f"{path}: key ids", said, do)
    if of_texts != _digest(texts):
        fail(f"{path}: key texts", "its codes are of other texts", "Encode the items again")
    views = ["fused"] if model.method.task == "fused" else ["image", "text"]
    if list(arrays) != views:
        do = f"It must have {' and '.join(views)}"
        fail(path, f"its keys are {', '.join(arrays) or 'none'}", do)
    for view, rows in arrays.items():
        if rows.dtype != np.int8 or rows.ndim != 2 or len(rows) != len(ids):
            do = f"It must be codes of {len(ids):,} items"
            fail(f"{path}: key {view}", f"shape {rows.shape}", do)
        if bits is not None and rows.shape[1] != bits:
            bad_value("bits", bits, f"{rows.shape[1]}, as {path} has")
    return arrays


def main(arguments: list[str]) -> int:
    with distributed.joined() as here:
        given, model, items = here.everywhere(lambda: _prepare(arguments, here))
        bits = model.method.bits if given.bits is None else given.bits
        if here.size == 1:
            ids, images, texts = items
            codes = model.encode(images, texts, bits, not given.quiet)
            whole = Part(0, ids, {view: code_files.pack(rows) for view, rows in codes.items()})
        else:
            parts = _encode_parts(model, items, bits, given, here)
            if here.rank > 0:
                return 0
            whole = shards.merge(parts, items[0])
            model._note_cut(whole.cut)
        if given.out is None:
            _print(whole, bits)
            return 0
        with atomic_path(given.out) as path, path.open("wb") as file:
            digests = {"run": np.array(model.run.digest), "texts": np.array(_digest(items[2]))}
            about = {"bits": np.int64(bits), **digests}
            content: dict[str, Any] = {**about, "ids": np.array(whole.ids, str), **whole.codes}
            np.savez(file, **content)
        if here.size > 1:
            shutil.rmtree(shards.folder(given.out))
    sizes = ", ".join(f"{view} {len(rows):,}" for view, rows in whole.codes.items())
    print(f"{given.out}: codes of {bits} bits: {sizes}")
    return 0


def _prepare(arguments: list[str], here: Ranks) -> tuple[argparse.Namespace, Model, Items]:
    """What is asked for, the model, and the items to encode."""
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.encode", description="Codes of your own pictures and texts."
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--images", type=Path, metavar="DIR", help="every picture of a folder and its subfolders"
    )
    what.add_argument(
        "--table", type=Path, metavar="FILE",
        help="a .csv, .tsv, .jsonl or .parquet table with columns image, caption or both",
    )  # fmt: skip
    what.add_argument("--data", metavar="FILE", help="every item of a data set in configs/data")
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--image-root", default="images", metavar="DIR",
                        help="folder of a table's pictures, beside the table [images]")  # fmt: skip
    parser.add_argument("--bits", type=int, metavar="N", help="code length [the longest]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="without it, codes are printed"
    )
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="auto, cpu, cuda (a GPU for each process), cuda:N")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="beside --data, such as data.path=PATH")  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    if given.out is not None and given.out.suffix != ".npz":
        bad_value("--out", given.out, "a name that ends with .npz")
    if given.out is None and here.size > 1:
        fail("--out", f"{here.size} processes cannot print codes", "Give a file: --out FILE.npz")
    if given.overrides and given.data is None:
        fail(f"argument {given.overrides[0]}", "it is a key of a data set", "Give one: --data FILE")
    model = load(given.checkpoint, here.device(given.device))
    return given, model, _items(given, model)


def _items(given: argparse.Namespace, model: Model) -> Items:
    if given.images is not None:
        files = image_files(given.images)
        return [file.relative_to(given.images).as_posix() for file in files], files, None
    if given.table is not None:
        return read_items(given.table, model.table(given.table, given.image_root))[:3]
    if given.data is not None:
        config = load_data_config(given.data, given.overrides)
        found = collection(config, model.run.config.encoder)
        return found.ids, found.images, found.texts
    for text in given.text:
        model.unknown_words(text)  # raises where it knows none
    return list(given.text), None, given.text


def _encode_parts(
    model: Model, items: Items, bits: int, given: argparse.Namespace, here: Ranks
) -> list[Shard]:
    """The shards of all ranks, once each is written. Those of an earlier try are kept where they
    are what this rank would write.
    """
    rows = shards.rows(len(items[0]), model.method.encoder.batch, here.rank, here.size)
    ids, images, texts = _take(items, rows)
    device = next(model.method.parameters()).device.type  # a GPU computes in another precision
    made_with = [to_yaml(model.run.config), model.run.digest, str(bits), device, str(rows)]

    def find() -> tuple[Shard, bool]:
        name = f"{here.rank + 1}-of-{here.size}.npz"
        shard = Shard(
            shards.folder(given.out) / name, shards.signature(made_with, ids, images, texts)
        )
        return shard, shard.read() is not None

    def encode_rows() -> None:
        progress_bar = here.rank == 0 and not given.quiet
        codes, cut = model._encode(images, texts, bits, progress_bar, encode)
        packed = {view: code_files.pack(rows) for view, rows in codes.items()}
        shard.write(Part(rows.start, ids, packed, cut))

    shard, kept = here.everywhere(find)
    for number, there in enumerate(here.gather(kept), 1):
        if there and here.rank == 0:
            note(f"kept shard {number} of {here.size}")
    here.everywhere(lambda: None if kept else encode_rows())
    return here.gather(shard)


def _take(items: Items, rows: slice) -> Items:
    ids, images, texts = items
    return (
        ids[rows],
        None if images is None else take(images, rows),
        None if texts is None else take(texts, rows),
    )


def _print(part: Part, bits: int) -> None:
    for view, packed in part.codes.items():
        for name, code in zip(part.ids, code_files.unpack(packed, bits), strict=True):
            print(f"{name}\t{view}\t{''.join('1' if bit > 0 else '0' for bit in code)}")


if __name__ == "__main__":
    errors.run(main)
