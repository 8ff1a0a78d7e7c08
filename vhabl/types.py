"""The values that cross a border between parts of vhabl; all are immutable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a method may see of its items when it encodes them. There is no label here.

    image: [B, d_image] float32, or None where the items have no image
    text:  [B, d_text] float32, or None where the items have no text
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

    def to(self, device: torch.device) -> Inputs:
        return Inputs(
            image=None if self.image is None else self.image.to(device),
            text=None if self.text is None else self.text.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """A training batch: inputs, labels [B, C] float32 in {0, 1}, the items' training rows [B]."""

    inputs: Inputs
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class DataSpec:
    """What a method may know of a data set before it sees an item: widths and counts."""

    name: str
    image_dim: int
    text_dim: int
    classes: int
    train_items: int


@dataclass(frozen=True)
class Split:
    """Items of one role (training, database or query).

    ids identify an item across splits, so that "database without the training items" is exact;
    image [N, d_image] float32, text [N, d_text] float32, labels [N, C] uint8 in {0, 1}.
    """

    ids: np.ndarray
    image: np.ndarray
    text: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        return Split(self.ids[rows], self.image[rows], self.text[rows], self.labels[rows])

    def inputs(self) -> Inputs:
        return Inputs(torch.from_numpy(self.image), torch.from_numpy(self.text))


@dataclass(frozen=True)
class Dataset:
    """A data set in the field's three roles. Training items may be part of the database."""

    name: str
    train: Split
    database: Split
    query: Split
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name=self.name,
            image_dim=self.train.image.shape[1],
            text_dim=self.train.text.shape[1],
            classes=self.train.labels.shape[1],
            train_items=len(self.train),
        )


@dataclass(frozen=True)
class Codes:
    """Binary codes of queries and database for one retrieval task, with the labels that judge them.

    query [Q, bits] and database [N, bits]: int8 in {-1, +1}, the most important bit first where the
    method ranks bits; query_labels [Q, C] and database_labels [N, C]: uint8 in {0, 1}, or degrees
    from 0 up, which the measures with a graded gain follow.
    """

    query: np.ndarray
    database: np.ndarray
    query_labels: np.ndarray
    database_labels: np.ndarray

    @property
    def bits(self) -> int:
        return self.query.shape[1]
