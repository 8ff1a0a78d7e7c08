"""The feature file of a maker's pairs: what a pretrained network gives for each image and text.

`--features` writes `<out>_<kind>/features.mat`, the layout of the field: I_tr, T_tr, L_tr, I_db,
T_db, L_db, I_te, T_te and L_te of the common split. It is a MATLAB 7.3 file, since no variable of
an older one holds more than 2 GB.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import makers
import numpy as np
import torch
from makers import Made
from torch import Tensor
from tqdm import tqdm

from vhabl.config import CONFIG_DIR, load_data_config
from vhabl.data.images import ImageFiles, open_image, read
from vhabl.data.pairs import draw, words
from vhabl.encoders import ClipEncoder, cnn, open_clip
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import fail, note, plural
from vhabl.system.files import atomic_path, write_text
from vhabl.training.trainer import pick_device
from vhabl.types import Inputs, Rows, Split

FILE, WORDS = "features.mat", "words.txt"
BOTH = ("cnn", "clip")
USED_BY = {  # the kinds of features that an option is for
    "weights": BOTH, "device": BOTH, "query": BOTH, "train": BOTH,
    "network": ("cnn",), "model": ("clip",),
}  # fmt: skip
NETWORK = "vgg16"  # where no other is named
SHORT_SIDE = 256  # of pictures before they are cut, as torchvision evaluates networks
# What MATLAB writes in front of the HDF5 content: text, no offset, version and byte order.
TEXT = b"MATLAB 7.3 MAT-file, features of image-text pairs"
HEADER = (TEXT.ljust(116) + bytes(8) + b"\x00\x02IM").ljust(512, b"\0")
CLASSES = {"float32": "single", "uint8": "uint8"}  # MATLAB's names


def make(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    data: str,
    read_download: Callable[[argparse.Namespace], Made],
) -> tuple[argparse.Namespace, Made]:
    """Read a download, write its pairs and, with --features, their features.

    data: the file in configs/data that sets the split. What can be refused is refused before
    anything is written, and before the reading where possible. Raises VhablError.
    """
    _add_arguments(parser)
    options = makers.parse(parser, arguments)
    _check(options)
    if not options.features:
        made = read_download(options)
        makers.write(made, options.out, options.force)
        return options, made
    sizes = {"query": options.query, "train": options.train}
    overrides = [f"data.{name}={size}" for name, size in sizes.items() if size is not None]
    config = load_data_config(CONFIG_DIR / "data" / f"{data}.yaml", overrides)
    features: Cnn | Clip = (Cnn if options.features == "cnn" else Clip)(options)
    made = read_download(options)
    rows = draw(made.index, config)
    features.prepare(made, rows[0], config)
    makers.write(made, options.out, options.force)
    write(_folder(options), made, features, rows)
    return options, made


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("feature file")
    group.add_argument(
        "--features",
        choices=BOTH,
        help=f"also write OUT_<kind>/{FILE}. cnn: the second fully connected layer of a network "
        "trained on ImageNet, and a bag of tags (of caption words where there are no tags); "
        "clip: the vectors of both towers, that of the first caption for text",
    )
    group.add_argument(
        "--weights",
        help="a file, or a name to be downloaded; default: those of torchvision (cnn), "
        f"{EncoderConfig.weights} (clip)",
    )
    group.add_argument("--network", choices=cnn.NETWORKS, help=f"of cnn; default: {NETWORK}")
    group.add_argument(
        "--model",
        help="of clip: a name of open_clip's, or a JSON file that describes towers; "
        f"default: {EncoderConfig.model}",
    )
    group.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: auto")
    group.add_argument("--query", type=int, metavar="N", help="items, in place of data.query")
    group.add_argument("--train", type=int, metavar="N", help="items, in place of data.train")


def _check(options: argparse.Namespace) -> None:
    """Raise VhablError where options do not fit together, or the feature file may not be written.

    Sets options.device.
    """
    found = f"--features {options.features}" if options.features else "no --features"
    for name, kinds in USED_BY.items():
        if getattr(options, name) is not None and options.features not in kinds:
            do = f"Add --features {' or '.join(kinds)}"
            fail(f"--{name}", f"it means nothing with {found}", do)
    if not options.features:
        return
    options.device = pick_device(options.device or "auto")
    folder = _folder(options)
    if folder.exists() and not folder.is_dir():
        fail(folder, "it is a file", "Move it, or choose another --out")
    for name in (FILE, WORDS) if options.features == "cnn" else (FILE,):
        path = folder / name
        if path.is_dir():
            fail(path, "it is a folder", "Move it, or choose another --out")
        if path.exists() and not options.force:
            fail(path, "it exists already", "--force replaces it")


def _folder(options: argparse.Namespace) -> Path:
    """Beside the pairs and not among them: a folder of pairs is replaced as a whole."""
    out: Path = options.out
    return out.with_name(f"{out.name}_{options.features}")


# -- the file --------------------------------------------------------------------------------------


def write(
    folder: Path, made: Made, features: Cnn | Clip, rows: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Write the feature file, and the words that its texts count: whole or not at all.

    rows: the training, database and query items. Raises VhablError where an image is damaged.
    """
    try:
        with atomic_path(folder / FILE) as temporary:
            with h5py.File(temporary, "w", userblock_size=len(HEADER)) as file:
                _write_arrays(file, made, features, rows)
                widths = {part: file[f"{part}_db"].shape[0] for part in "IT"}
            with temporary.open("r+b") as raw:
                raw.write(HEADER)
            if features.vocabulary:
                write_text(folder / WORDS, "".join(f"{word}\n" for word in features.vocabulary))
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    train, database, query = (f"{len(items):,}" for items in rows)
    print(
        f"features: {folder / FILE}: {train} training, {database} database and {query} query "
        f"items; image {widths['I']:,}, text {widths['T']:,}"
    )


@torch.no_grad()
def _write_arrays(
    file: h5py.File,
    made: Made,
    features: Cnn | Clip,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    train, database, query = rows
    # The training items come first in the database: no item is encoded twice.
    assert np.array_equal(train, database[: len(train)])
    size = {"tr": len(train), "db": len(database), "te": len(query)}
    batches = [
        (role, start, items[start : start + features.batch])
        for role, items in (("db", database), ("te", query))
        for start in range(0, len(items), features.batch)
    ]

    def put(key: str, start: int, values: np.ndarray) -> None:
        if key not in file:
            shape = (values.shape[1], size[key[2:]])  # MATLAB stores the transposed array
            chunk = (shape[0], min(shape[1], features.batch))  # a batch is written in one piece
            node = file.create_dataset(key, shape, values.dtype, chunks=chunk)
            node.attrs["MATLAB_class"] = np.bytes_(CLASSES[values.dtype.name])
        file[key][:, start : start + len(values)] = values.T

    count = len(made.index)
    nothing = np.zeros((count, 0), np.int64)
    pictures = Rows(features.pictures(made.files), np.arange(count))
    everything = Split(np.arange(count), pictures, nothing, made.labels)
    inputs = read(everything, [items for _, _, items in batches])
    with tqdm(total=len(database) + len(query), desc="features", unit="item", disable=None) as bar:
        for (role, start, items), given in zip(batches, inputs, strict=True):
            assert given.image is not None
            found = {
                "I": features.image(given.image),
                "T": features.text(items),
                "L": made.labels[items],
            }
            for part, values in found.items():
                put(f"{part}_{role}", start, values)
                if role == "db" and start < len(train):
                    put(f"{part}_tr", start, values[: len(train) - start])
            bar.update(len(items))


# -- clip ------------------------------------------------------------------------------------------


class Clip:
    """The pooled, projected vectors of both towers of a CLIP."""

    batch = 256

    def __init__(self, options: argparse.Namespace) -> None:
        given = {name: getattr(options, name) for name in ("model", "weights")}
        given = {name: value for name, value in given.items() if value is not None}
        self.config = EncoderConfig(name="clip", tune="frozen", words=32, **given)
        self.device = options.device
        # Without tokens the encoder standardises by statistics that only training gives.
        self.encoder = ClipEncoder(self.config, tokens=True).to(self.device).eval()
        self.vocabulary: list[str] = []  # the texts' numbers are no words

    def prepare(self, made: Made, train: np.ndarray, config: DataConfig) -> None:
        captions = [first for first, *_ in made.captions]
        self.tokens, too_long = open_clip.tokenise(captions, self.config.words)
        self.workers = config.workers
        if too_long:
            note(f"{plural(too_long, 'caption')} longer than {self.config.words} tokens: cut")

    def pictures(self, files: list[Path]) -> ImageFiles:
        c = self.config
        squeeze = open_clip.squeezed(c.model, c.weights, c.squeeze)
        return ImageFiles(files, self.encoder.size, squeeze, self.workers)

    def image(self, pixels: Tensor) -> np.ndarray:
        return _array(self.encoder(Inputs(pixels.to(self.device), None)).image)

    def text(self, items: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(self.tokens[items]).to(self.device)
        return _array(self.encoder(Inputs(None, tokens)).text)


# -- cnn -------------------------------------------------------------------------------------------


class Cnn:
    """A network's second fully connected layer, and a bag of tags or words of 0 and 1."""

    batch = 32  # the first layers of VGG need 25 MB for each picture

    def __init__(self, options: argparse.Namespace) -> None:
        weights = options.weights or "DEFAULT"  # the newest
        network = cnn.build_network(options.network or NETWORK, weights, "--weights ")
        self.network = network.to(options.device).eval()
        self.device = options.device
        mean, spread = (torch.tensor(x).view(3, 1, 1) for x in (cnn.MEAN, cnn.SPREAD))
        self.mean, self.spread = mean.to(self.device), spread.to(self.device)

    def prepare(self, made: Made, train: np.ndarray, config: DataConfig) -> None:
        self.made, self.workers = made, config.workers
        self.vocabulary = made.words
        if not made.tags:
            self.vocabulary = frequent_words([made.captions[i] for i in train], config.min_count)
        self.column = {word: column for column, word in enumerate(self.vocabulary)}

    def pictures(self, files: list[Path]) -> ImageFiles:
        return ImageNetFiles(files, cnn.SIDE, False, self.workers)

    def image(self, pixels: Tensor) -> np.ndarray:
        x = pixels.to(self.device).float() / 255
        return _array(self.network((x - self.mean) / self.spread))

    def text(self, items: np.ndarray) -> np.ndarray:
        """uint8 [B, words]."""
        result = np.zeros((len(items), len(self.vocabulary)), np.uint8)
        for row, item in enumerate(items):
            result[
                row, [self.column[term] for term in self._terms(item) if term in self.column]
            ] = 1
        return result

    def _terms(self, item: int) -> list[str]:
        """An item's tags, whole: some have spaces. Its captions' words where there are no tags."""
        if self.made.tags:
            return self.made.tags[item]
        return words(" ".join(self.made.captions[item]))


class ImageNetFiles(ImageFiles):
    """Images as torchvision prepares them for networks trained on ImageNet, up to their scaling."""

    def __getitem__(self, rows: Any) -> np.ndarray:
        from torchvision.transforms import functional

        def pixels(row: int) -> np.ndarray:
            image = functional.resize(open_image(self.files[row]), SHORT_SIDE)
            return np.asarray(functional.center_crop(image, self.side)).transpose(2, 0, 1)

        numbers = np.arange(len(self.files))[rows]
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(pixels, numbers.tolist())))


def frequent_words(captions: Iterable[list[str]], min_count: int) -> list[str]:
    """Words that at least so many captions have, all captions of an item counted, by alphabet."""
    counts = Counter(word for own in captions for caption in own for word in set(words(caption)))
    result = sorted(word for word, count in counts.items() if count >= min_count)
    if not result:
        do = "Take more training items (--train)"
        fail("captions of the training items", f"no word occurs in {min_count} of them", do)
    return result


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
