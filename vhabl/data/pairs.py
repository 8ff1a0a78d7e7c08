"""Image-text pairs in the raw layout: caption.mat, index.mat, label.mat and a folder of images.

What a method sees of them is pixels and tokens, for towers; pixels and a bag of the caption's
words, for networks; or simple features alone: colour and shape descriptors of the image and that
bag.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path, PureWindowsPath

import numpy as np
import regex
from tqdm import tqdm

from vhabl.data.descriptors import describe_image
from vhabl.data.images import ImageFiles, Picture, open_image
from vhabl.data.labels import as_labels, describe, numbers
from vhabl.data.matlab import read_mat
from vhabl.encoders import cnn, open_clip
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import VhablError, bad_value, fail, note, plural
from vhabl.types import Rows, Split, Stored

_KEYS = {  # the releases' names for the same thing
    "caption": ("caption", "tags", "YAll"),
    "index": ("index", "imgs", "FAll"),
    "label": ("label", "category", "LAll", "labels"),
}


@dataclass(frozen=True)
class Pairs:
    """Items as files hold them: an id, captions, an image file and a row of labels each."""

    ids: list[str]
    captions: list[str]  # the first one of each item
    further: list[list[str]]  # the others
    files: Sequence[Stored]
    labels: np.ndarray  # [N, C] uint8 in {0, 1}
    class_names: list[str]  # in label order; empty where the files do not name them
    roles: Sequence[str] = ()  # train, query or database, where the files say which
    no_text: frozenset[int] = frozenset()  # items without a caption: "" stands for it


def read_pairs(path: Path, config: DataConfig) -> Pairs:
    """Read the raw layout. Raises VhablError where files are missing, damaged or disagree."""
    texts = _texts(path, "caption")
    names = [first.strip() for first, *_ in _texts(path, "index")]  # rows of characters are padded
    captions, further = [first for first, *_ in texts], [others for _, *others in texts]
    of_labels = {"label.mat": _column(path, "label")}
    labels = as_labels(path, of_labels, lambda name: path / name)["label.mat"]
    if not len(captions) == len(names) == len(labels):
        what = f"{len(captions)} captions, {len(names)} images and {len(labels)} label rows"
        fail(path, what, "There must be as many of each")
    class_names, listed = config.class_names, path / "classes.txt"
    if not class_names and listed.exists():
        class_names = [line.strip() for line in _lines(listed) if line.strip()]
    class_names = [unicodedata.normalize("NFC", name) for name in class_names]
    where = "data.class_names" if config.class_names else listed
    if len(set(class_names)) < len(class_names):
        fail(where, "a name comes twice", "Names of classes must differ")
    if class_names and len(class_names) != labels.shape[1]:
        do = "Give one for each"
        fail(where, f"{len(class_names)} names for {labels.shape[1]} columns of label.mat", do)
    files = [_image_file(path, config.image_root, name) for name in names]
    owners: dict[Path, str] = {}
    for number, (name, file) in enumerate(zip(names, files, strict=True), 1):
        if (owner := owners.setdefault(file, name)) != name:
            found = f"{owner[-80:]!r} and {name[-80:]!r} both lead to {file}"
            where = f"{path / 'index.mat'}: item {number}"
            fail(where, found, "Keep the folders that their names have")
    return Pairs(names, captions, further, files, labels, class_names)


def _image_file(path: Path, root: str, name: str) -> Path:
    """The image that a name leads to below the folder of images, with either system's separators:
    with the folders in its name where they are there, else by its base name.
    """
    own, folder = PureWindowsPath(name), Path(root).parts
    parts = tuple(part for part in own.parts if part not in (own.anchor, ".."))
    if parts[: len(folder)] == folder:
        parts = parts[len(folder) :]
    whole = path.joinpath(root, *parts)
    return (whole if whole.parent.is_dir() else path / root / own.name).resolve()


def split(pairs: Pairs, config: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the training, database and query items: as the files say, else drawn."""
    if not pairs.roles:
        return draw(pairs.files, config)
    train, database, query = (
        np.flatnonzero(np.array(pairs.roles) == role) for role in ("train", "database", "query")
    )
    if len(train) < 2 or len(query) < 1:
        found = f"{plural(len(train), 'training row')} and {plural(len(query), 'query')}"
        fail(f"{config.path}: column split", found, "It must have at least 2 and 1")
    learned = {pairs.files[row] for row in train.tolist()}
    if shared := sum(pairs.files[row] in learned for row in query.tolist()):
        note(f"{config.path}: the images of {plural(shared, 'query')} are trained on too")
    if not len(database):
        note(f"{config.path}: no row is of the database: the training items are")
    return train, database if len(database) else train, query


def draw(images: Sequence[object], config: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the training, database and query items by a seeded permutation of their images, as
    the releases draw them (NumPy's legacy generator, queries first). Items of one image stay
    together, so that there may be a few more of each than was asked for.

    The database is all but the query items; the training items are part of it. Without numbers of
    them a tenth are queries, and all others are trained on. Raises VhablError where there are too
    few items.
    """
    items = len(images)
    asked = config.query or max(1, round(items / 10))
    wanted = config.train or items - asked
    if asked < 1 or wanted < 2 or asked + wanted > items:
        do = f"There must be at least 1 and 2, together at most the {items} items"
        fail("data.query and data.train", f"{asked} queries and {wanted} training items", do)
    everything, ends = drawn_together(images, np.random.RandomState(config.split_seed))
    query = int(ends[np.searchsorted(ends, asked)])
    train = int(ends[np.searchsorted(ends, min(query + wanted, items))])
    if train == query:
        bad_value("data.query", config.query, "less: one image has all other items")
    return everything[query:train], everything[query:], everything[:query]


def drawn_together(
    images: Sequence[object], generator: np.random.RandomState | np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all items in the order of a permutation of their images, and where the items of
    each image end.
    """
    rows: dict[object, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    groups = [np.array(own) for own in rows.values()]
    drawn = [groups[number] for number in generator.permutation(len(groups))]
    return np.concatenate(drawn), np.cumsum([len(own) for own in drawn])


@dataclass(frozen=True)
class Roles:
    """Training items, database and queries as an encoder takes them."""

    splits: tuple[Split, Split, Split]
    vocabulary: tuple[str, ...]  # the words that are counted, where they are
    notes: list[str]


def to_splits(pairs: Pairs, config: DataConfig, encoder: EncoderConfig) -> Roles:
    """Draw training items, database and queries: images as pixels or descriptors, captions as
    tokens or a bag of the words that the training captions have.

    Raises VhablError where there are too few items, or an image that is read here is missing or
    damaged.
    """
    rows = split(pairs, config)
    ids = np.array(pairs.ids)
    image: np.ndarray | Rows
    text: np.ndarray | Rows
    vocabulary, notes = list[str](), list[str]()
    if encoder.name == "features":
        image = describe_images(pairs.files)
    else:
        image = Rows(pictures(pairs.files, config, encoder).in_memory(), np.arange(len(ids)))
    if encoder.name == "clip":
        text, notes = _tokens(pairs, encoder)
    else:
        if any(pairs.further):
            notes = [f"{plural(sum(map(len, pairs.further)), 'further caption')}: not read"]
        if marked := next(filter(_HTML.search, pairs.captions), None):
            notes.append(f"captions hold HTML, whose names count as words: {marked[:80]!r}")
        vocabulary = _vocabulary([pairs.captions[i] for i in rows[0]], config.min_count)
        text = bag_of_words(pairs.captions, vocabulary)
    first: dict[Stored, int] = {}
    numbers = np.array([first.setdefault(file, row) for row, file in enumerate(pairs.files)])
    everything = Split(ids, image, text, pairs.labels, pictures=numbers)
    train, database, query = (everything.take(some) for some in rows)
    return Roles((train, database, query), tuple(vocabulary), notes)


def describe_images(files: Sequence[Picture]) -> np.ndarray:
    """Descriptors of images: float32 [N, 1120]. Raises VhablError where one cannot be read."""
    with ThreadPoolExecutor() as pool:
        described = pool.map(lambda file: describe_image(open_image(file)), files)
        return np.stack(list(described)).astype(np.float32)


def pictures(
    files: Sequence[Picture],
    config: DataConfig,
    encoder: EncoderConfig,
    kind: type[ImageFiles] = ImageFiles,
) -> ImageFiles:
    """Images as the pixels that an encoder takes, read when they are indexed."""
    squeeze = encoder.squeeze
    if encoder.name == "cnn":
        size = encoder.side or cnn.SIDE
    else:
        size = open_clip.picture_size(encoder.model)
        squeeze = open_clip.squeezed(encoder.model, encoder.weights, squeeze)
    crop = size if encoder.augment else 0
    return kind(files, encoder.resize or size, squeeze, config.workers, crop)


def _tokens(pairs: Pairs, encoder: EncoderConfig) -> tuple[Rows, list[str]]:
    """All captions of each item as token ids, and notes."""
    counts = np.array([1 + len(others) for others in pairs.further])
    first = np.cumsum(counts) - counts
    captions = [
        caption
        for one, others in zip(pairs.captions, pairs.further, strict=True)
        for caption in (one, *others)
    ]
    tokens, too_long = open_clip.tokenise(captions, encoder.words)
    empty = sum(not caption.strip() for caption in captions)
    notes = []
    if too_long:
        notes.append(f"{plural(too_long, 'caption')} longer than {encoder.words} tokens: cut")
    if empty:
        notes.append(f"{plural(empty, 'empty caption')}: kept, without a word")
    return Rows(tokens, first, counts), notes


def describe_pairs(pairs: Pairs) -> list[str]:
    """What the items are, in words, with the first one as it was read."""
    names = pairs.class_names or numbers(pairs.labels)
    own = [name for name, has in zip(names, pairs.labels[0], strict=True) if has]
    return [
        plural(len(pairs.ids), "pair"),
        f"item 1: image {pairs.files[0]}",
        f"item 1: caption {pairs.captions[0][:80]!r}",
        f"item 1: labels {', '.join(own) or 'none'}",
        *describe(pairs.labels, names),
        plural(sum(not caption.strip() for caption in pairs.captions), "empty caption"),
        plural(sum(map(len, pairs.further)), "further caption"),
        plural(len(pairs.files) - len(set(pairs.files)), "item") + " with the image of another one",
        plural(_copies(pairs.files), "image file") + " with the bytes of another one",
    ]


def _copies(files: Sequence[Stored]) -> int:
    """How many image files have the bytes of another one."""
    paths = {file for file in files if isinstance(file, Path) and file.is_file()}
    with ThreadPoolExecutor() as pool:
        digests = set(pool.map(lambda file: blake2b(file.read_bytes()).digest(), paths))
    return len(paths) - len(digests)


def bad_images(pairs: Pairs) -> list[str]:
    """A message for every image that is missing or cannot be read."""

    def problem(file: Stored) -> str | None:
        try:
            open_image(file)
        except VhablError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(problem, pairs.files)
        bar = tqdm(found, "images", len(pairs.files), unit="image", disable=None)  # on terminals
        return [text for text in bar if text]


def _column(path: Path, name: str) -> np.ndarray:
    file = path / f"{name}.mat"
    arrays = read_mat(file, _KEYS[name])
    found = [k for k in _KEYS[name] if k in arrays]
    if not found:
        fail(file, f"no key {' or '.join(_KEYS[name])}", "It must have one of them")
    return arrays[found[0]]


def _texts(path: Path, name: str) -> list[list[str]]:
    """The texts of each item, at least one (an empty one where there is none)."""
    file, lines = path / f"{name}.mat", path / f"{name}.txt"
    if not file.exists():  # NUS-WIDE's captions are lines, one an item
        if not lines.exists():
            fail(file, "no such file", f"Give it, or {lines.name} with a line for each item")
        return [[line] for line in _lines(lines)]
    return [_cell(file, cell) for cell in _column(path, name).reshape(-1)]


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(file, "its bytes are not UTF-8", "Save it as UTF-8, with a line for each item")
    # Not splitlines: a caption may hold other characters that it takes for an end.
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _cell(file: Path, cell: object) -> list[str]:
    found = list(cell.flat) if isinstance(cell, np.ndarray) else [cell]
    for text in found:
        if not isinstance(text, str):
            fail(file, f"a cell of type {type(text).__name__}", "All cells must be texts")
    return [str(text).rstrip("\n") for text in found] or [""]


# Letters of scripts that put no spaces between words, and words of all others with their marks.
_UNSPACED = (
    r"[[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]"
    r"&&[\p{L}\p{N}\p{M}]]"
)
_SPACED = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]*"
_WORDS = regex.compile(
    rf"(?V1)(?P<unspaced>{_UNSPACED}+)|{_SPACED}(?:\u2019[\p{{L}}\p{{N}}\p{{M}}]+)?"
)


_HTML = re.compile(r"&#?\w+;|</?(?:a|b|br|div|i|img|p|span)\b[^>]*>", re.IGNORECASE)
_UNSEEN = re.compile("[\u00ad\u0640\u200b-\u200d\u2060\ufeff]")  # soft hyphens, joiners, tatweel


def words(caption: str) -> list[str]:
    """Words of letters, marks and digits, in one form of case, width and apostrophe; of scripts
    without spaces between words, such as Chinese, characters and pairs of them.

    >>> words("Man's best friend: dog, pet!")
    ['man’s', 'best', 'friend', 'dog', 'pet']
    >>> words("红色车")
    ['红', '色', '车', '红色', '色车']
    """
    found: list[str] = []
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    text = _UNSEEN.sub("", text).replace("'", "\u2019")
    for match in _WORDS.finditer(text):
        if match["unspaced"]:
            characters = regex.findall(r"\X", match[0])
            found += [*characters, *(a + b for a, b in pairwise(characters))]
        else:
            found.append(match[0])
    return found


def _vocabulary(captions: Sequence[str], min_count: int) -> list[str]:
    """Words that at least `min_count` of the captions have, in alphabetical order."""
    counts = Counter(word for caption in captions for word in set(words(caption)))
    vocabulary = sorted(word for word in counts if counts[word] >= min_count)
    if not vocabulary:
        do = "Set a smaller number"
        fail("data.min_count", f"no word occurs in {min_count} of the training captions", do)
    return vocabulary


def bag_of_words(captions: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """Which words of a vocabulary each caption has: float32 [N, words] of 0 and 1."""
    column = {word: i for i, word in enumerate(vocabulary)}
    result = np.zeros((len(captions), len(vocabulary)), np.float32)
    for row, caption in enumerate(captions):
        result[row, [column[w] for w in words(caption) if w in column]] = 1
    return result
