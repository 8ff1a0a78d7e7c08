"""Rows of real retrieved items: a query and its nearest items, right and wrong ones marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vhabl.data import items
from vhabl.data.images import open_image
from vhabl.evaluation.records import own_positions
from vhabl.metrics import hamming_distances
from vhabl.settings import DataConfig
from vhabl.types import Codes, Dataset, Stored

THUMBNAIL = 96  # pixels, the longer side


@dataclass(frozen=True)
class Item:
    """One pair as it is shown. image is None where the data set has features only."""

    caption: str
    classes: str
    image: Stored | None

    @property
    def source(self) -> str:
        """The image as a data URI that holds a thumbnail."""
        assert self.image is not None
        small = open_image(self.image)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        stored = io.BytesIO()
        small.save(stored, "WEBP", quality=85)
        return "data:image/webp;base64," + base64.b64encode(stored.getvalue()).decode()


@dataclass(frozen=True)
class Hit:
    item: Item
    distance: int
    right: bool  # shares a label with the query


class Gallery:
    """Shows the items of a data set."""

    def __init__(self, config: DataConfig, data: Dataset) -> None:
        self.data = data
        self.own = own_positions(data.query.sources, data.database.sources)
        self.pairs: dict[str, tuple[str, Stored]] = {}
        names = config.class_names
        if config.has_files:
            pairs = items(config)
            shown = zip(pairs.captions, pairs.files, strict=True)
            self.pairs = dict(zip(pairs.ids, shown, strict=True))
            names = pairs.class_names
        numbered = [f"class {c + 1}" for c in range(data.spec.classes)]
        self.class_names = np.array(names if len(names) == len(numbered) else numbered)

    def item(self, name: object, labels: np.ndarray, otherwise: str) -> Item:
        caption, image = self.pairs.get(str(name), (otherwise, None))
        return Item(caption, ", ".join(self.class_names[labels > 0]) or "no label", image)

    def row(self, codes: Codes, query: int, top: int) -> tuple[Item, list[Hit]]:
        """A query and the `top` items nearest to it; items at equal distance in their order."""
        data = self.data
        distances = hamming_distances(codes.query[query : query + 1], codes.database)[0]
        nearest = np.argsort(distances, kind="stable")[: top + 1]
        if self.own is not None:
            nearest = nearest[nearest != self.own[query]]
        nearest = nearest[:top]
        labels = codes.query_labels[query]
        hits = [
            Hit(
                self.item(data.database.ids[i], codes.database_labels[i], f"item {i + 1}"),
                int(distances[i]),
                bool((labels & codes.database_labels[i]).any()),
            )
            for i in nearest
        ]
        return self.item(data.query.ids[query], labels, f"query {query + 1}"), hits


def sample_of_queries(codes: Codes, count: int, seed: int = 0) -> Sequence[int]:
    """Query numbers drawn at random, so that nobody has chosen them."""
    total = len(codes.query)
    drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    return [int(q) for q in np.sort(drawn)]
