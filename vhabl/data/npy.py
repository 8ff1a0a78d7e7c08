"""HQ's layout: a folder of arrays, `{train,vali,test}_{image,text}.npy` and their labels.

Images are pictures, N x h x w x 3 of uint8, or features, N x d; texts are features, such as a bag
of words. Row i of an image file and row i of a text file are one item.

The training items are those of train, the queries those of test. The database is all but the
queries, as for pairs: train and vali. (The release searches a database that holds the queries
themselves.) vali chooses nothing: validation draws its queries from the training items, as it does
for every data set.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vhabl.data.features import as_features, as_labels, content_ids, require_same
from vhabl.data.images import ImageFiles, rows_in_order
from vhabl.data.pairs import Roles, describe_images, pictures
from vhabl.errors import fail, plural
from vhabl.files import open_array
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.types import Rows, Split

ROLES = ("train", "vali", "test")
IMAGES, TEXTS = (tuple(f"{role}_{part}" for role in ROLES) for part in ("image", "text"))
LABELS = ("train_image_label", "train_text_label", "vali_label", "test_label")
NAMES = (*IMAGES, *TEXTS, *LABELS)
CHUNK = 256  # pictures that are described at once


def load_arrays(path: Path, config: DataConfig, encoder: EncoderConfig) -> Roles:
    """Read a folder of arrays; pictures stay in their files where they are many.

    Raises VhablError naming the file that is missing, damaged or holds Python objects, has another
    shape or number of rows, values that are not finite, or wrong labels; and where the labels of
    training images and texts disagree, or the encoder takes other inputs.
    """
    if encoder.name == "clip":
        found = f"'clip' with texts that are bags of words ({config.path})"
        fail("key encoder.name", found, "'cnn', 'features', or a data set of captions")

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
    differ = np.flatnonzero((of_images != of_texts).any(axis=1))
    if len(differ):
        count = plural(len(differ), "such row")
        found = f"another label than train_image_label.npy has in row {differ[0] + 1} ({count})"
        fail(file("train_text_label"), found, "the same: image i and text i are one item")

    images = [arrays[name] for name in IMAGES]
    image: np.ndarray | Rows
    if images[0].ndim == 4 and encoder.name == "features":
        image = _described(Pictures(images))
    elif images[0].ndim == 4:
        store = pictures(Pictures(images), config, encoder, ImageArrays)
        image = Rows(store.in_memory(), np.arange(sum(map(len, images))))
    elif encoder.name == "features":
        image = _joined(path, {name: as_features(file(name), arrays[name]) for name in IMAGES})
    else:
        found = f"{encoder.name!r} with features ({file('train_image')})"
        fail("key encoder.name", found, "'features', or pictures N x h x w x 3")
    ids = content_ids(chain.from_iterable(images), text)
    everything = Split(ids, image, text, np.concatenate([of_images, of_vali, of_test]))
    sizes = [len(of_images), len(of_vali)]
    train, vali, test = np.split(np.arange(len(ids)), np.cumsum(sizes))
    note = f"vali: {plural(len(vali), 'item')}, in the database and in nothing else"
    return Roles(
        (
            everything.take(train),
            everything.take(np.concatenate([train, vali])),
            everything.take(test),
        ),
        (),
        [note],
    )


def _joined(path: Path, parts: dict[str, np.ndarray]) -> np.ndarray:
    require_same(path, "columns", {name: x.shape[1] for name, x in parts.items()})
    return np.concatenate(list(parts.values()))


def _open(file: Path) -> np.ndarray:
    if not file.is_file():
        fail(file, "no such file", "HQ's layout: " + ", ".join(f"{name}.npy" for name in NAMES))
    return open_array(file, "an array of numbers (.npy)")


def _check_images(file: Path, values: np.ndarray) -> None:
    of_pixels = values.ndim == 4 and values.shape[3] == 3 and values.dtype == np.uint8
    if values.ndim != 2 and not of_pixels:
        fail(
            file,
            f"shape {values.shape} of type {values.dtype}",
            "pictures, items x height x width x 3 of uint8, or features, items x features",
        )


def _described(images: Pictures) -> np.ndarray:
    """Descriptors of all pictures."""
    chunks = rows_in_order(len(images), CHUNK)
    return np.concatenate([describe_images([images[row] for row in rows]) for rows in chunks])


class Pictures(Sequence[Image.Image]):
    """The pictures of several arrays [N, h, w, 3], read when they are indexed."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.first = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: Any) -> Any:
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        return Image.fromarray(np.ascontiguousarray(self.arrays[part][row - self.first[part]]))


class ImageArrays(ImageFiles):
    """A store of pixels, as of image files, of pictures that are in arrays."""

    def marks(self, rows: np.ndarray) -> np.ndarray:
        return self._sums[rows]

    def state(self) -> bytes:
        return self._sums.tobytes()

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.array([zlib.crc32(np.asarray(picture).tobytes()) for picture in self.files])
