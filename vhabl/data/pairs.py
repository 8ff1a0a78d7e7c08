"""Image-text pairs in the raw layout: caption.mat, index.mat, label.mat and a folder of images.

This part computes simple features from the pairs, so that the feature methods run on them:
colour and shape descriptors of the image, a bag of the caption's words.
"""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vhabl.data.descriptors import describe_image
from vhabl.errors import VhablError, fail, plural
from vhabl.matfile import read_mat
from vhabl.settings import DataConfig
from vhabl.types import Split

_KEYS = {  # the releases' names for the same thing
    "caption": ("caption", "tags", "YAll"),
    "index": ("index", "imgs", "FAll"),
    "label": ("label", "category", "LAll", "labels"),
}


@dataclass(frozen=True)
class Pairs:
    """Items as files hold them: an id, a caption, an image file and a row of labels each."""

    ids: list[str]
    captions: list[str]
    files: list[Path]
    labels: np.ndarray  # [N, C] uint8 in {0, 1}
    class_names: list[str]  # in label order; empty where the files do not name them


def read_pairs(path: Path, config: DataConfig) -> Pairs:
    """Read the raw layout. Raises VhablError where files are missing, damaged or disagree."""
    captions, names = _texts(path, "caption"), _texts(path, "index")
    labels = _column(path, "label")
    if labels.ndim != 2 or labels.dtype.kind not in "fiub" or not np.isin(labels, (0, 1)).all():
        fail(
            f"{path / 'label.mat'}: key label",
            f"shape {labels.shape} of type {labels.dtype} or values other than 0 and 1",
            "items x classes of 0 and 1",
        )
    if not len(captions) == len(names) == len(labels):
        fail(
            path,
            f"{len(captions)} captions, {len(names)} images and {len(labels)} label rows",
            "as many of each",
        )
    if config.class_names and len(config.class_names) != labels.shape[1]:
        fail(
            "key data.class_names",
            f"{len(config.class_names)} names",
            f"{labels.shape[1]}, as label.mat has columns",
        )
    # Images are found by their base name under the configured folder.
    files = [path / config.image_root / Path(name).name for name in names]
    return Pairs(names, captions, files, labels.astype(np.uint8), config.class_names)


def draw(items: int, config: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the training, database and query items by a seeded permutation, as the releases
    draw them (NumPy's legacy generator, queries first).

    The database is all but the query items; the training items are part of it. Raises VhablError
    where there are too few items.
    """
    if config.query < 1 or config.train < 2 or config.query + config.train > items:
        fail(
            "keys data.query and data.train",
            f"{config.query} and {config.train}",
            f"at least 1 and 2, together at most the {items} items",
        )
    order = np.random.RandomState(config.split_seed).permutation(items)
    rest = order[config.query :]
    return rest[: config.train], rest, order[: config.query]


def to_splits(pairs: Pairs, config: DataConfig) -> tuple[Split, Split, Split]:
    """Training items, database and queries with computed features.

    The words are those of the training captions alone. Raises VhablError where there are too few
    items, or an image cannot be read.
    """
    train, database, query = draw(len(pairs.ids), config)
    with ThreadPoolExecutor() as pool:
        described = pool.map(lambda file: describe_image(open_image(file)), pairs.files)
        image = np.stack(list(described)).astype(np.float32)
    text = _bag_of_words(pairs.captions, train, config.min_count)
    ids = np.array(pairs.ids)

    def split(rows: np.ndarray) -> Split:
        return Split(ids[rows], image[rows], text[rows], pairs.labels[rows])

    return split(train), split(database), split(query)


def describe_pairs(pairs: Pairs) -> list[str]:
    """What the items are, in words."""
    return [
        plural(len(pairs.ids), "pair") + f", {pairs.labels.shape[1]} classes",
        plural(sum(not caption.strip() for caption in pairs.captions), "empty caption"),
        plural(int((pairs.labels.sum(axis=1) == 0).sum()), "item") + " without a label",
        plural(len(pairs.files) - len(set(pairs.files)), "item") + " with the image of another one",
    ]


def bad_images(pairs: Pairs) -> list[str]:
    """A message for every image that is missing or cannot be read."""

    def problem(file: Path) -> str | None:
        try:
            open_image(file)
        except VhablError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return [p for p in pool.map(problem, pairs.files) if p]


def open_image(path: Path) -> Image.Image:
    """A whole image as RGB. Raises VhablError where it is missing, damaged or absurdly large."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        fail(path, "no such file", "the image of an item")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VhablError(
            f"{path}: found an image that cannot be read ({error}); expected a whole JPEG or PNG"
        ) from None


def _column(path: Path, name: str) -> np.ndarray:
    file = path / f"{name}.mat"
    arrays = read_mat(file, _KEYS[name])
    found = [k for k in _KEYS[name] if k in arrays]
    if not found:
        fail(f"{file}: keys", "none of them", " or ".join(_KEYS[name]))
    return arrays[found[0]]


def _texts(path: Path, name: str) -> list[str]:
    lines = path / f"{name}.txt"  # NUS-WIDE's captions, one line an item
    if lines.exists() and not (path / f"{name}.mat").exists():
        try:
            text = lines.read_text(encoding="utf-8")
            # Not splitlines: a caption may hold other characters that it takes for an end.
            return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        except UnicodeDecodeError:
            fail(lines, "bytes that are not UTF-8", "one caption a line")
    return [_first_text(path / f"{name}.mat", cell) for cell in _column(path, name).reshape(-1)]


def _first_text(file: Path, cell: object) -> str:
    """A cell's text; of several captions the first, so that codes are repeatable."""
    if isinstance(cell, np.ndarray):
        cell = cell.flat[0] if cell.size else ""
    if not isinstance(cell, str):
        fail(file, f"a cell of type {type(cell).__name__}", "texts")
    return cell.rstrip("\n")


def words(caption: str) -> list[str]:
    """Lower-case words of letters and digits.

    >>> words("Man's best friend: dog, pet!")
    ["man's", 'best', 'friend', 'dog', 'pet']
    """
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?", caption.lower())


def _bag_of_words(captions: list[str], train: np.ndarray, min_count: int) -> np.ndarray:
    """Which words of the training captions an item's caption has: float32 [N, words] of 0 and 1."""
    bags = [set(words(c)) for c in captions]
    counts = Counter(word for row in train for word in bags[row])
    vocabulary = {w: i for i, w in enumerate(sorted(w for w in counts if counts[w] >= min_count))}
    if not vocabulary:
        fail(
            "key data.min_count",
            f"{min_count}, which no word of the training captions reaches",
            "a smaller number",
        )
    result = np.zeros((len(captions), len(vocabulary)), np.float32)
    for row, bag in enumerate(bags):
        result[row, [vocabulary[w] for w in bag if w in vocabulary]] = 1
    return result
