"""An index of one's own pictures and texts, and its search.

    index = Index.build("index", "checkpoint/emoji/hiamh_clip/0", "configs/data/emoji.yaml")
    index = Index.open("index")
    hits = index.search(text="red fruit", top=10, where="label = 'Food & Drink'")
    index = index.add(images=["a.jpg"], texts=["a red apple"], ids=["mine"])

A query is encoded by the model that the index was built with, which it names; the search itself
needs the index alone.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vhabl.codes import pack
from vhabl.config import load_data_config
from vhabl.data import items as read_items
from vhabl.data import load as load_data
from vhabl.encode import Images, Model, Texts
from vhabl.encode import load as load_model
from vhabl.errors import fail
from vhabl.metrics import integer_weights
from vhabl.search import store
from vhabl.search.where import parse
from vhabl.settings import DataConfig

Mode = Literal["exact", "weighted", "prefix"]
MODES = typing.get_args(Mode)
RECALL, RECALL_AT, SAMPLE = 0.99, 100, 200  # what a scan by prefix shall reach, on so many items
BUDGETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the items


@dataclass(frozen=True)
class Hit:
    """A found item. distance: bits that differ; image: its path, or empty."""

    id: str
    distance: int
    caption: str
    image: str
    labels: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}


class Index:
    """An opened index."""

    def __init__(self, found: store.Store, device: str = "auto") -> None:
        self.store = found
        self.device = device
        self._model: Model | None = None

    @classmethod
    def open(cls, folder: str | Path, device: str = "auto") -> Index:
        """Raises VhablError where the folder holds no whole index."""
        return cls(store.Store(Path(folder)), device)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        run: str | Path,
        data: str | Path | None = None,
        bits: int | None = None,
        overrides: Sequence[str] = (),
        device: str = "auto",
        progress_bar: bool = False,
    ) -> Index:
        """Encode every item of a data set and write an index of the codes: whole or not at all.

        data: a file in configs/data, or that of the run by default; bits: the longest length by
        default. Raises VhablError where the folder exists, and as `vhabl.load` and the readers do.
        """
        folder = Path(folder)
        store.check_new(folder)
        model = load_model(run, device)
        bits = model.method.bits if bits is None else bits
        model.method.check_length(bits)
        config = model.run.config.data if data is None else load_data_config(data, overrides)
        inputs, items, class_names = _items_of(config, model)
        codes = model.encode(**inputs, bits=bits, progress_bar=progress_bar)
        packed = {view: pack(rows) for view, rows in codes.items()}
        about = {
            "method": model.run.config.title,
            "task": model.method.task,
            "any_length": model.method.any_length,
            "data": config.name,
            "run": str(Path(run).resolve()),
            "digest": model.run.digest,
            "views": list(packed),
            "bits": bits,
            "importance": _importance(model, bits),
            "class_names": class_names,
        }
        index = cls(store.create(folder, about, packed, items, _recall), device)
        index._model = model
        return index

    @property
    def model(self) -> Model:
        """The model that the codes are of. Raises VhablError where its run is gone or another."""
        if self._model is None:
            meta = self.store.meta
            model = load_model(meta["run"], self.device)
            if model.run.digest != meta["digest"]:
                fail(meta["run"], "another model than the index was built with", meta["method"])
            self._model = model
        return self._model

    # -- search ------------------------------------------------------------------------------------

    def search(
        self,
        text: str | None = None,
        image: str | Path | Image.Image | None = None,
        top: int = 10,
        bits: int | None = None,
        mode: Mode = "exact",
        where: str = "",
        against: str = "",
    ) -> list[Hit]:
        """The nearest items of a text, an image or a pair.

        bits: a shorter length, where the method serves prefixes; mode: `exact`; `weighted`,
        exact too, each bit counted by its importance, where the method learns one; or `prefix`,
        which compares the items with the nearest first bits alone; where: a filter, see
        `vhabl.search.where`; against: `image` or `text`, for the codes of a cross-modal method: by
        default those of the modality that the query is not. Raises VhablError.
        """
        if text is None and image is None:
            fail("query", "neither a text nor an image", "one of them, or both")
        bits = self.check_bits(bits)
        codes = self.model.encode(
            images=None if image is None else [image],
            texts=None if text is None else [text],
            bits=self.store.bits,
        )
        own = "fused" if "fused" in codes else "text" if text is not None else "image"
        if own != "fused" and len(codes) > 1:
            fail("query", "a text and an image", "one of them: the method encodes them apart")
        view = self._view(own, against)
        return self.search_codes(codes[own], view, top, bits, mode, where)[0]

    def check_bits(self, bits: int | None) -> int:
        """A code length that the index serves. Raises VhablError."""
        whole: int = self.store.bits
        if bits is None or bits == whole:
            return whole
        if not self.store.meta["any_length"]:
            fail("key bits", str(bits), f"{whole}, the only length of this index")
        if not 1 <= bits <= whole:
            fail("key bits", str(bits), f"a length from 1 to {whole}, which the index has")
        return bits

    def _view(self, own: str, against: str) -> str:
        views = self.store.views
        if not against:
            other = {"text": "image", "image": "text"}.get(own, own)
            return other if other in views else views[0]
        if against not in views:
            fail("key against", repr(against), " or ".join(views))
        return against

    def search_codes(
        self,
        codes: np.ndarray,
        view: str,
        top: int = 10,
        bits: int | None = None,
        mode: Mode = "exact",
        where: str = "",
    ) -> list[list[Hit]]:
        """The nearest items of each +-1 code [Q, bits of the index]. Raises VhablError."""
        bits = self.check_bits(bits)
        if codes.ndim != 2 or codes.shape[1] != self.store.bits:
            fail("codes", f"shape {codes.shape}", f"[N, {self.store.bits}], as the index has")
        if top < 1:
            fail("key top", str(top), "at least 1")
        if mode not in MODES:
            fail("key mode", repr(mode), " or ".join(MODES))
        weights = self.store.meta["importance"]
        if mode == "weighted" and weights is None:
            fail("key mode", "'weighted'", f"exact or prefix: {self.store.meta['method']} has none")
        budget = self.store.meta["recall"][view]["budget"] if mode == "prefix" else 1.0
        chosen = None
        if where:
            wanted = parse(where, self.store.class_names)
            chosen = [wanted.mask(segment.labels) for segment in self.store.segments]
        of_bits = np.array(weights[:bits]) if mode == "weighted" else None
        found = self.store.scan(view, pack(codes), bits, top, budget, chosen, of_bits)
        return [
            [self._hit(int(d), int(s), int(i)) for d, s, i in zip(*rows, strict=True) if i >= 0]
            for rows in zip(*found, strict=True)
        ]

    def _hit(self, distance: int, segment: int, item: int) -> Hit:
        texts = self.store.texts(segment, item)
        labels = tuple(self.store.labels(segment, item))
        return Hit(texts["ids"], distance, texts["captions"], texts["images"], labels)

    # -- changes -----------------------------------------------------------------------------------

    def add(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        ids: Sequence[str] = (),
        labels: Sequence[Sequence[str]] | None = None,
    ) -> Index:
        """Encode items and add them. labels: names of each item's classes, none by default. Raises
        VhablError, and adds none, where an id is there already, or something does not fit.
        """
        codes = self.model.encode(images=images, texts=texts, bits=self.store.bits)
        missing = [view for view in self.store.views if view not in codes]
        if missing:
            fail("items", f"no {missing[0]}", f"{' and '.join(self.store.views)} of each")
        if any(len(rows) != len(ids) for rows in codes.values()):
            fail("ids", str(len(ids)), f"{len(next(iter(codes.values())))}, as there are items")
        names = self.store.class_names
        matrix = np.zeros((len(ids), len(names)), np.uint8)
        for row, own in enumerate(labels or [()] * len(ids)):
            for name in own:
                if name not in names:
                    fail(f"labels of {ids[row]}", repr(name), "a class of the index")
                matrix[row, names.index(name)] = 1
        captions = [""] * len(ids) if texts is None else [_caption(text) for text in texts]
        paths = [""] * len(ids) if images is None else [_path(image) for image in images]
        items = store.Items(list(ids), captions, paths, matrix)
        packed = {view: pack(codes[view]) for view in self.store.views}
        self.store = self.store.add(packed, items)
        return self

    def delete(self, ids: Sequence[str]) -> Index:
        """Raises VhablError, and deletes none, for an id that there is not."""
        self.store = self.store.delete(ids)
        return self


def _importance(model: Model, bits: int) -> list[int] | None:
    """Integer weights of the bits, where the method learns such."""
    weights = model.method.bit_importance()
    if weights is None:
        return None
    return list(map(int, integer_weights(weights[:bits].cpu().numpy())[0]))


def _recall(found: store.Store) -> dict[str, Any]:
    """How much of each view a scan by prefix has to compare, measured on a sample of the items:
    any item that is not farther than the last exact one counts as found.
    """
    measured = {}
    (segment,) = found.segments
    rows = np.random.default_rng(0).choice(segment.size, min(SAMPLE, segment.size), False)
    top = min(RECALL_AT, segment.size)
    for view in found.views:
        sample = segment.words[view][rows].view(np.uint8)[:, : math.ceil(found.bits / 8)]
        exact, _, _ = found.scan(view, sample, found.bits, top)
        for budget in BUDGETS:
            near, _, _ = found.scan(view, sample, found.bits, top, budget)
            reached = float((near <= exact[:, -1:]).mean())
            if reached >= RECALL:
                break
        measured[view] = {"budget": budget, "recall": reached, "at": top, "queries": len(rows)}
    return {"recall": measured}


def _caption(text: Any) -> str:
    return text if isinstance(text, str) else ""  # features have none


def _path(image: Any) -> str:
    return str(Path(image).resolve()) if isinstance(image, str | Path) else ""


def _items_of(config: DataConfig, model: Model) -> tuple[dict[str, Any], store.Items, list[str]]:
    """What the model takes of all items of a data set, what the index keeps of them, and the names
    of the classes.
    """
    if config.has_files:
        pairs = read_items(config, unlabelled=True)
        names = _named(pairs.class_names, pairs.labels)
        kept = store.Items(
            pairs.ids, pairs.captions, [str(file.resolve()) for file in pairs.files], pairs.labels
        )
        return {"images": pairs.files, "texts": pairs.captions}, kept, names
    data = load_data(config, model.run.config.encoder)
    found = data.database
    names = _named(data.class_names, found.labels)
    ids = [f"item {number + 1}" for number in range(len(found))]
    blank = [""] * len(found)
    inputs = {"images": found.image, "texts": found.text}
    return inputs, store.Items(ids, blank, blank, found.labels), names


def _named(names: Sequence[str], labels: np.ndarray) -> list[str]:
    """Names of the classes, or their numbers where they have none."""
    return list(names) or [f"class {c + 1}" for c in range(labels.shape[1])]
