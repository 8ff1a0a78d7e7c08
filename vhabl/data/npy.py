"""HQ's layout: a folder of arrays, `{train,vali,test}_{image,text}.npy` and their labels.

Images are pictures, N x h x w x 3, or features, N x d; texts are features, such as a bag of words.
Row i of an image file and row i of a text file are one item, but for training: where
train_text_label.npy differs from train_image_label.npy, the texts stand in another order than the
images (the release draws it with seed 10), and each side is judged by its own labels.

Pictures are of 8 bits: as uint8, or as real numbers on a scale of 0 to 255 or 0 to 1, or as
torchvision normalises them for ImageNet's networks, which whole levels prove.

The training items are those of train, the queries those of test. The database is all but the
queries, as for pairs: train and vali. (The release searches a database that holds the queries
themselves.) vali chooses nothing: validation draws its queries from the training items, as it does
for every data set.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vhabl.data.features import as_features, content_ids
from vhabl.data.images import ImageFiles, rows_in_order
from vhabl.data.labels import as_labels, require_same
from vhabl.data.pairs import Roles, describe_images, pictures
from vhabl.encoders import cnn
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import fail, plural
from vhabl.system.files import open_array
from vhabl.types import Rows, Split

ROLES = ("train", "vali", "test")
IMAGES, TEXTS = (tuple(f"{role}_{part}" for role in ROLES) for part in ("image", "text"))
LABELS = ("train_image_label", "train_text_label", "vali_label", "test_label")
NAMES = (*IMAGES, *TEXTS, *LABELS)
CHUNK = 256  # pictures that are described at once


def load_arrays(path: Path, config: DataConfig, encoder: EncoderConfig) -> Roles:
    """Read a folder of arrays; pictures stay in their files where they are many.

    Raises VhablError naming the file that is missing, damaged or holds Python objects, has another
    shape or number of rows, values that are not finite, pictures on an unknown scale, or wrong
    labels; and where the encoder takes other inputs.
    """
    if encoder.name == "clip":
        what = f"it takes captions, and the texts of {config.path} are bags of words"
        do = "Set encoder.name=cnn or features, or choose another data set"
        fail("encoder.name 'clip'", what, do)

    def file(name: str) -> Path:
        return path / f"{name}.npy"

    arrays = {name: _open(file(name)) for name in NAMES}
    for name in IMAGES:
        _check_images(file(name), arrays[name])
    require_same(path, "axes", {name: arrays[name].ndim for name in IMAGES})
    text = _joined(path, {name: as_features(file(name), arrays[name]) for name in TEXTS})
    labels = as_labels(path, {name: arrays[name] for name in LABELS}, file)
    for role in ROLES:
        rows = {name: len(arrays[name]) for name in NAMES if name.startswith(role)}
        require_same(path, "rows", rows)
    of_images, of_texts, of_vali, of_test = (labels[name] for name in LABELS)

    images = [arrays[name] for name in IMAGES]
    image: np.ndarray | Rows
    if images[0].ndim == 4:
        every = Pictures(images, [_scale(file(name), arrays[name]) for name in IMAGES])
        if encoder.name == "features":
            image = _described(every)
        else:
            store = pictures(every, config, encoder, ImageArrays)
            image = Rows(store.in_memory(), np.arange(len(every)))
    elif encoder.name == "features":
        image = _joined(path, {name: as_features(file(name), arrays[name]) for name in IMAGES})
    else:
        what = f"it takes pictures, and {file('train_image')} holds features"
        do = "Set encoder.name=features, or give pictures N x h x w x 3"
        fail(f"encoder.name {encoder.name!r}", what, do)
    ids = content_ids(chain.from_iterable(images), text)
    rest = of_vali, of_test
    everything = Split(ids, image, text, np.concatenate([of_images, *rest]))
    notes = [f"vali: {plural(len(of_vali), 'item')}, in the database and in nothing else"]
    differ = int((of_images != of_texts).any(axis=1).sum())
    seen = everything
    if differ:
        seen = replace(everything, text_labels=np.concatenate([of_texts, *rest]))
        notes.append(
            f"train: {plural(differ, 'text')} with other labels than the image of the row: images "
            "and texts are no pairs"
        )
    sizes = [len(of_images), len(of_vali)]
    train, vali, test = np.split(np.arange(len(ids)), np.cumsum(sizes))
    splits = seen.take(train), seen.take(np.concatenate([train, vali])), everything.take(test)
    return Roles(splits, (), notes)


def _joined(path: Path, parts: dict[str, np.ndarray]) -> np.ndarray:
    require_same(path, "columns", {name: x.shape[1] for name, x in parts.items()})
    return np.concatenate(list(parts.values()))


def _open(file: Path) -> np.ndarray:
    if not file.is_file():
        fail(file, "no such file", "HQ's layout is " + ", ".join(f"{name}.npy" for name in NAMES))
    return open_array(file, "an array of numbers (.npy)")


def _check_images(file: Path, values: np.ndarray) -> None:
    numbers = values.dtype == np.uint8 or values.dtype.kind == "f"
    of_pixels = values.ndim == 4 and values.shape[3] == 3 and numbers
    if values.ndim != 2 and not of_pixels:
        fail(
            file,
            f"shape {values.shape} of type {values.dtype}",
            "It must be pictures, items x height x width x 3 of uint8 or real numbers, or "
            "features, items x features",
        )


@dataclass(frozen=True)
class Scale:
    """What makes levels of 0 to 255 of the numbers of pictures [..., 3]: x * spread + mean."""

    spread: tuple[float, ...] = (1.0,)
    mean: tuple[float, ...] = (0.0,)

    def levels(self, x: np.ndarray) -> np.ndarray:
        return x * np.array(self.spread, np.float32) + np.array(self.mean, np.float32)


OF_255, OF_1 = Scale(), Scale((255.0,))
NORMALISED = Scale(*(tuple(255 * x for x in values) for values in (cnn.SPREAD, cnn.MEAN)))
DARK = 128  # pictures of 0 to 255 none of which reaches this level may be on another scale
OFF = 0.1  # of a level, that rounding may take numbers from a whole one


def _scale(file: Path, values: np.ndarray) -> Scale:
    """The scale of an array of pictures. Raises VhablError where it is none that is known, or
    numbers are not finite.
    """
    if values.dtype == np.uint8:
        return OF_255
    least, most, off = np.inf, -np.inf, 0.0
    for rows in rows_in_order(len(values), CHUNK):
        some = values[rows]
        if not np.isfinite(some).all():
            fail(file, "numbers that are not finite", "Pictures must not have any")
        least, most = min(least, some.min()), max(most, some.max())
        levels = NORMALISED.levels(some)
        whole = np.clip(np.rint(levels), 0, 255)
        off = max(off, float(np.abs(levels - whole).max()))
    if least >= 0 and most <= 1:
        return OF_1
    if least >= 0 and DARK <= most <= 255:
        return OF_255
    if off <= OFF:
        return NORMALISED
    fail(
        file,
        f"pictures of numbers from {least:.4g} to {most:.4g}",
        "They must be 0 to 1, 0 to 255, or levels of 0 to 255 that torchvision "
        "normalised for ImageNet",
    )


def _described(images: Pictures) -> np.ndarray:
    """Descriptors of all pictures."""
    chunks = rows_in_order(len(images), CHUNK)
    return np.concatenate([describe_images([images[row] for row in rows]) for rows in chunks])


class Pictures(Sequence[Image.Image]):
    """The pictures of several arrays [N, h, w, 3], read when they are indexed."""

    def __init__(self, arrays: Sequence[np.ndarray], scales: Sequence[Scale]) -> None:
        self.arrays, self.scales = arrays, scales
        self.first = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: Any) -> Any:
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        levels = self.scales[part].levels(self.arrays[part][row - self.first[part]])
        return Image.fromarray(np.ascontiguousarray(np.rint(levels).astype(np.uint8)))


class ImageArrays(ImageFiles):
    """A store of pixels, as of image files, of pictures that are in arrays."""

    def marks(self, rows: np.ndarray) -> np.ndarray:
        return self._sums[rows]

    def state(self) -> bytes:
        return self._sums.tobytes()

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.array([zlib.crc32(np.asarray(picture).tobytes()) for picture in self.files])
