"""Files to splits. Nothing above this package knows a file format; no model knows a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vhabl.data.features import load_features
from vhabl.data.images import ImageFiles, rows_in_order
from vhabl.data.labels import numbers
from vhabl.data.npy import load_arrays
from vhabl.data.pairs import Pairs, Roles, drawn_together, read_pairs, to_splits
from vhabl.data.table import read_table
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import VhablError, fail, plural
from vhabl.system.files import locate
from vhabl.types import Dataset, Rows, Split, Stored

__all__ = ["Collection", "collection", "describe", "items", "load", "validation_split", "without"]


def load(config: DataConfig, encoder: EncoderConfig | None = None) -> Dataset:
    """Read the data set of a recipe, as its encoder takes it: by default as features.

    Raises VhablError where files are missing, with where such files come from and the layout
    expected, and where a file's content does not fit.
    """
    path = locate(config.path)
    if not path.exists():
        raise VhablError(missing_message(config))
    encoder = encoder or EncoderConfig()
    class_names = config.class_names
    if config.kind == "features":
        if encoder.name != "features":
            what = f"it takes pictures and captions, and {config.path} holds features"
            do = "Set encoder.name=features, or choose another data set"
            fail(f"encoder.name {encoder.name!r}", what, do)
        roles = Roles(load_features(path, config), (), [])
    elif config.kind == "npy":
        roles = load_arrays(path, config, encoder)
    else:
        pairs = items(config)
        class_names = pairs.class_names
        roles = to_splits(pairs, config, encoder)
    train, database, query = roles.splits
    if config.text_order >= 0:
        train = _in_text_order(train, config.text_order)
    classes = train.labels.shape[1]
    if class_names and len(class_names) != classes:
        do = "Give one for each"
        fail("data.class_names", f"{len(class_names)} names for {classes} columns of labels", do)
    unlabelled = [
        f"{role}: {plural(count, 'item')} without a label"
        for role, split in (("train", train), ("database", database), ("query", query))
        if (count := int((split.labels.sum(axis=1) == 0).sum()))
    ]
    doubtful = [
        f"all items to search have the label {name}: any two of them are similar"
        for name, has in zip(
            class_names or numbers(database.labels), database.labels.T, strict=True
        )
        if has.all()
    ]
    if not config.has_files and (shared := int(np.isin(query.sources, train.sources).sum())):
        doubtful.append(f"trained on too: {plural(shared, 'query')}")
    fingerprint = _fingerprint(train, database, query)
    return Dataset(
        config.name,
        train,
        database,
        query,
        fingerprint,
        (*roles.notes, *unlabelled, *doubtful),
        tuple(class_names),
        roles.vocabulary,
    )


def _in_text_order(train: Split, seed: int) -> Split:
    """Training items whose texts stand in another order than the images, drawn as HQ's release does
    (NumPy's legacy generator). An item keeps its image, id and place.
    """
    texts = train.take(np.random.RandomState(seed).permutation(len(train)))
    return replace(train, text=texts.text, text_labels=texts.labels_of_texts)


def items(config: DataConfig, unlabelled: bool = False) -> Pairs:
    """The pairs of a data set that has images and captions; unlabelled: also rows of a table that
    have no label. Raises VhablError as `load` does.
    """
    path = locate(config.path)
    if not path.exists():
        raise VhablError(missing_message(config))
    if config.kind == "table":
        return read_table(path, config, unlabelled)
    return read_pairs(path, config)


@dataclass(frozen=True)
class Collection:
    """The items of a data set that a search would find, as `vhabl.Model.encode` takes them.

    images: files, features [N, d], or pictures of arrays; texts: captions (None where an item has
    none), or features [N, d]; labels: [N, C] uint8; class_names: C names, or numbers where the
    classes have none.
    """

    ids: list[str]
    images: Sequence[Stored] | np.ndarray | Rows
    texts: Sequence[str | None] | np.ndarray
    labels: np.ndarray
    class_names: list[str]


def collection(config: DataConfig, encoder: EncoderConfig) -> Collection:
    """All pairs of a data set, with or without a label, or the database of a feature file or of
    arrays, as an encoder takes it. Raises VhablError as `load` does, and for a database whose items
    are not pairs.
    """
    if config.has_files:
        pairs = items(config, unlabelled=True)
        names = pairs.class_names or numbers(pairs.labels)
        texts = [None if n in pairs.no_text else text for n, text in enumerate(pairs.captions)]
        return Collection(pairs.ids, pairs.files, texts, pairs.labels, list(names))
    data = load(config, encoder)
    found = data.database
    if found.text_labels is not None:
        do = "An index needs pairs"
        fail(config.path, "image i and text i of the database are not one item", do)
    ids = [f"item {number + 1}" for number in range(len(found))]
    names = list(data.class_names) or numbers(found.labels)
    return Collection(ids, found.image, found.text[:], found.labels, names)


def missing_message(config: DataConfig) -> str:
    """What is missing, where such files come from, and the layout expected."""
    if config.kind == "features":
        layout = (
            "one MATLAB 5 or 7.3 file with I_tr, T_tr, L_tr (training), I_db, T_db, L_db (database)"
            " and I_te, T_te, L_te (query): items x features, labels items x classes of 0 and 1"
        )
    elif config.kind == "npy":
        layout = (
            "a folder with {train,vali,test}_image.npy (pictures N x h x w x 3, or features), "
            "{train,vali,test}_text.npy (features), train_image_label.npy, train_text_label.npy, "
            "vali_label.npy and test_label.npy (labels items x classes of 0 and 1)"
        )
    elif config.kind == "table":
        layout = "a .csv, .tsv, .jsonl or .parquet table with image, caption and labels"
    else:
        layout = (
            "a folder with caption.mat, index.mat, label.mat and the images that index.mat names"
        )
    source = f"\n  source: {config.source}" if config.source else ""
    return (
        f"{config.path}: no such file or folder. It is the data set {config.name!r}"
        f"{source}\n  layout: {layout}"
        f"\n  another place: data.path=PATH"
        f"\n  without any file: bash flickr.sh --demo trains on the data set shipped with vhabl"
    )


def _fingerprint(*splits: Split) -> str:
    """A short digest of the content: the same data from another file format has the same one.

    Pictures that stay in their files would take an hour to read: the marks of all and the pixels of
    a sample stand for them.
    """
    digest = hashlib.sha256()  # in hardware where there is any
    for split in splits:
        digest.update(repr((split.image.shape, split.text.shape, split.labels.shape)).encode())
        digest.update(np.packbits(split.labels).tobytes())
        if split.text_labels is not None:
            digest.update(np.packbits(split.text_labels).tobytes())
        for part in (split.image, split.text):
            rows = rows_in_order(len(split), 4096)
            if isinstance(part, Rows) and isinstance(part.store, ImageFiles):
                digest.update(part.store.marks(part.first).tobytes())
                rows = [np.arange(0, len(split), max(1, len(split) // 256))]
            elif isinstance(part, Rows) and part.count is not None:  # all captions of the items
                digest.update(np.ascontiguousarray(part.store[:]).tobytes())
            for some in rows:
                digest.update(np.ascontiguousarray(part[some]).tobytes())
    return digest.hexdigest()[:32]


def describe(data: Dataset) -> str:
    """What was read, in one line."""
    labels = data.database.labels
    return (
        f"{data.name}: {plural(len(labels), 'item')} to search, {len(data.train):,} to train on, "
        f"{plural(len(data.query), 'query')}, {labels.shape[1]} classes, "
        f"{labels.sum(axis=1).mean():.1f} labels an item"
    )


def validation_split(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The training items alone as a data set: a seeded share as queries, the others as both the
    training set and the database. Items of one image stay together. Model selection sees nothing
    else.
    """
    order, ends = drawn_together(dataset.train.sources.tolist(), np.random.default_rng(seed))
    queries = ends[np.searchsorted(ends, max(1, round(fraction * len(order))))]
    query = dataset.train.take(np.sort(order[:queries]))
    rest = dataset.train.take(np.sort(order[queries:]))
    return replace(dataset, train=rest, database=rest, query=query)


def without(split: Split, others: Split) -> Split:
    """The items of a split whose image is none of the others'."""
    return split.take(np.flatnonzero(~np.isin(split.sources, others.sources)))
