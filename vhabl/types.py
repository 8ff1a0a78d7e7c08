"""The values that cross a border between parts of vhabl; all are immutable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a method may see of its items when it encodes them. There is no label here.

    image: features [B, d_image] float32, or pixels [B, 3, S, S] uint8
    text:  features [B, d_text] float32, or token ids [B, L] int64 with zeros after the last one
    None stands for a modality that the items do not have. What a frozen network made of pixels or
    tokens takes their place, float of any shape [B, ...].
    """

    image: Tensor | None
    text: Tensor | None

    def __len__(self) -> int:
        present = self.image if self.image is not None else self.text
        return 0 if present is None else len(present)

    def take(self, rows: Tensor | slice) -> Inputs:
        """The same inputs for the given rows only."""
        return Inputs(
            image=None if self.image is None else self.image[rows],
            text=None if self.text is None else self.text[rows],
        )

    def only(self, view: str) -> Inputs:
        """The same items with one modality alone: `image` or `text`."""
        return Inputs(self.image, None) if view == "image" else Inputs(None, self.text)

    def pin_memory(self) -> Inputs:
        """The same inputs in memory from which a GPU copies while the host goes on."""
        return Inputs(
            image=None if self.image is None else self.image.pin_memory(),
            text=None if self.text is None else self.text.pin_memory(),
        )

    def to(self, device: torch.device) -> Inputs:
        return Inputs(
            image=None if self.image is None else self.image.to(device, non_blocking=True),
            text=None if self.text is None else self.text.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Embeddings:
    """What an encoder makes of its inputs; None where there is no such thing.

    image, text: [B, d_image] and [B, d_text], one vector an item
    patches: [B, P, d_image], one vector for each part of the picture
    words: [B, L, d_text], one vector for each token of the text, and word_mask [B, L]: True at
    tokens, False at the end-of-text token and at padding. Of an encoder with `tokens` "hidden"
    they are the last hidden states, [B, L, w], those of end-of-text tokens among them
    """

    image: Tensor | None
    text: Tensor | None
    patches: Tensor | None = None
    words: Tensor | None = None
    word_mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A training batch: inputs, labels [B, C] float32 in {0, 1}, the items' training rows [B].

    text_labels: those of the texts, where image i and text i are not one item; then `labels` are
    those of the images.
    """

    inputs: Inputs
    labels: Tensor
    index: Tensor
    text_labels: Tensor | None = None

    @property
    def labels_of_texts(self) -> Tensor:
        return self.labels if self.text_labels is None else self.text_labels


@dataclass(frozen=True)
class Embedded:
    """A picture that a table holds itself: its name and the bytes of its file, which are what makes
    it the same as another one.
    """

    name: str = field(compare=False)
    content: bytes

    def __str__(self) -> str:
        return self.name


Stored = Path | Embedded  # a picture that is not read yet


@dataclass(frozen=True)
class DataSpec:
    """What a method may know of a data set before it sees an item.

    image_dim, text_dim: the last dimension of an item's input: the width of features, the side of
    pictures, the length of texts in tokens.
    class_names: in label order, empty where the data set does not name them.
    vocabulary: the words that a bag of words counts, in its order; empty for other texts.
    paired: image i and text i are one item in every role.
    """

    name: str
    image_dim: int
    text_dim: int
    classes: int
    train_items: int
    class_names: Sequence[str] = ()
    vocabulary: Sequence[str] = ()
    paired: bool = True


class Store(Protocol):
    """An array of items that is read where it is indexed: in memory, in a file, in many files."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@runtime_checkable
class CropStore(Store, Protocol):
    """Pictures of which a part at any place can be read."""

    def crops(self, rows: np.ndarray, corners: np.ndarray) -> np.ndarray: ...


class Rows:
    """Items of a store, read when they are indexed; an item may have several alternatives.

    Item i has the rows first[i] ... first[i] + count[i] - 1 of the store. Indexing takes the first
    of them, so that what is computed from it is repeatable; `drawn` takes any.
    """

    def __init__(self, store: Store, first: np.ndarray, count: np.ndarray | None = None) -> None:
        self.store = store
        self.first = first
        self.count = count if count is not None and (count > 1).any() else None

    def __len__(self) -> int:
        return len(self.first)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.first), *self.store.shape[1:])

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.store[self.first[rows]]

    def take(self, rows: np.ndarray | slice) -> Rows:
        """The given items, unread."""
        return Rows(self.store, self.first[rows], None if self.count is None else self.count[rows])

    def drawn(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """One of each item's alternatives, by a number in [0, 1) for each item."""
        if self.count is None:
            return self[rows]
        return self.store[self.first[rows] + (draws * self.count[rows]).astype(np.int64)]

    def crops(self, rows: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """A square part of each picture, [B, 3, S, S]. corners [B, 2] in [0, 1): how far down and
        across it begins, of all places where it fits.
        """
        assert isinstance(self.store, CropStore)
        return self.store.crops(self.first[rows], corners)


def take(values: Any, rows: Any) -> Any:
    """The given items, by numbers [N] or as a slice, of an array, of `Rows` (unread) or a list."""
    if isinstance(values, Rows):
        return values.take(rows)
    if isinstance(values, np.ndarray) or isinstance(rows, slice):
        return values[rows]
    return [values[row] for row in rows]


@dataclass(frozen=True)
class Split:
    """Items of one role (training, database or query).

    ids identify an item across splits, so that "database without the training items" is exact;
    image and text: features [N, d], or pixels and token ids as in `Inputs`; labels [N, C] uint8 in
    {0, 1}; text_labels: those of the texts, where image i and text i are not one item: then
    `labels` are those of the images; pictures: a number for each item, the same where the picture
    is the same, also in other splits.
    """

    ids: np.ndarray
    image: np.ndarray | Rows
    text: np.ndarray | Rows
    labels: np.ndarray
    text_labels: np.ndarray | None = None
    pictures: np.ndarray | None = None

    @property
    def labels_of_texts(self) -> np.ndarray:
        return self.labels if self.text_labels is None else self.text_labels

    @property
    def sources(self) -> np.ndarray:
        """What an item shares with the others of its picture: its number, else the item's id."""
        return self.ids if self.pictures is None else self.pictures

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """The given items; what is not in memory is not read."""
        of_texts = None if self.text_labels is None else self.text_labels[rows]
        rest = self.labels[rows], of_texts, None if self.pictures is None else self.pictures[rows]
        return Split(self.ids[rows], take(self.image, rows), take(self.text, rows), *rest)

    @property
    def bytes(self) -> int:
        """Size of all inputs."""
        total = 0
        for part in (self.image, self.text):
            dtype = part.store.dtype if isinstance(part, Rows) else part.dtype
            total += math.prod(part.shape) * dtype.itemsize
        return total

    def inputs(
        self,
        rows: np.ndarray | slice = slice(None),
        draws: np.ndarray | None = None,
        corners: np.ndarray | None = None,
    ) -> Inputs:
        """The inputs of the given items. draws: a number in [0, 1) for each of the rows, which
        chooses among the captions of an item; without them it is the first. corners: where pictures
        are cut, as in `Rows.crops`; without them it is the centre.
        """
        image, text = self.image, self.text
        if draws is not None and isinstance(text, Rows):
            assert isinstance(rows, np.ndarray)
            words = text.drawn(rows, draws)
        else:
            words = text[rows]
        if corners is not None and isinstance(image, Rows):
            assert isinstance(rows, np.ndarray)
            pixels = image.crops(rows, corners)
        else:
            pixels = image[rows]
        return Inputs(torch.from_numpy(pixels), torch.from_numpy(words))


@dataclass(frozen=True)
class Dataset:
    """A data set in the field's three roles. Training items may be part of the database."""

    name: str
    train: Split
    database: Split
    query: Split
    fingerprint: str
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name=self.name,
            image_dim=self.train.image.shape[-1],
            text_dim=self.train.text.shape[-1],
            classes=self.train.labels.shape[1],
            train_items=len(self.train),
            class_names=self.class_names,
            vocabulary=self.vocabulary,
            paired=all(s.text_labels is None for s in (self.train, self.database, self.query)),
        )


@dataclass(frozen=True)
class Codes:
    """Binary codes of queries and database for one retrieval task, with the labels that judge them.

    query [Q, bits] and database [N, bits]: int8 in {-1, +1}, the most important bit first where the
    method ranks bits; query_labels [Q, C] and database_labels [N, C]: uint8 in {0, 1}, or degrees
    from 0 up, which the measures with a graded gain follow. oracle_labels: the codes were made from
    the labels that judge them; whatever is made of them says so.
    """

    query: np.ndarray
    database: np.ndarray
    query_labels: np.ndarray
    database_labels: np.ndarray
    oracle_labels: bool = False

    @property
    def bits(self) -> int:
        return self.query.shape[1]
