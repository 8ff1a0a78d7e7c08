"""An index of one's own pictures and texts, and its search.

    index = Index.build("index", "checkpoint/emoji/hiamh_clip/0", "configs/data/emoji.yaml")
    index = Index.open("index")
    hits = index.search(text="red fruit", top=10, where="label = 'Food & Drink'")
    index = index.add(images=["a.jpg"], texts=["a red apple"], ids=["mine"])

A query is encoded by the model that the index was built with, which it names; the search itself
needs the index alone. Codes are held by an engine (`vhabl.search.engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vhabl.codes import pack
from vhabl.config import load_data_config
from vhabl.data import Collection, collection
from vhabl.data.images import Picture
from vhabl.encode import Images, Model, Texts, read_codes
from vhabl.encode import load as load_model
from vhabl.metrics import integer_weights
from vhabl.nn import quantisation
from vhabl.search import faiss_index, scan, store, tuning
from vhabl.search.engine import (
    ABOUT,
    ENGINES,
    META,
    Engine,
    Hit,
    Items,
    Mode,
    Query,
    check_new,
    read_meta,
)
from vhabl.search.where import parse
from vhabl.system.errors import bad_value, fail, plural
from vhabl.types import take


@dataclass(frozen=True)
class Encoded:
    """Packed codes {view: [N, B]} of items or queries and, where a method has dictionaries, the
    features {view: [N, bits]} that they are the signs of.
    """

    codes: dict[str, np.ndarray]
    features: dict[str, np.ndarray]


class Index:
    """An opened index."""

    def __init__(self, engine: Engine, device: str = "auto") -> None:
        self.engine = engine
        self.device = device
        self._model: Model | None = None

    @classmethod
    def open(cls, folder: str | Path, device: str = "auto") -> Index:
        """Raises VhablError for a folder without a whole index, or an engine without answer."""
        folder = Path(folder)
        meta = read_meta(folder)
        for name in ABOUT.keys() - meta.keys():
            fail(folder / META, f"no {name} is in it", "Build the index again")
        if meta["engine"] == "milvus":
            from vhabl.search.milvus import Collection

            return cls(Collection(folder), device)
        return cls(store.Store(folder), device)

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
        graphs: Sequence[faiss_index.Graph] = (),
        engine: str = "folder",
        uri: str = "",
        codes: str | Path | None = None,
    ) -> Index:
        """Encode every item of a data set and write an index of the codes: whole or not at all.

        data: a file in configs/data, or that of the run by default; bits: the longest length by
        default; graphs: `ivf`, `hnsw` or both, of FAISS, for searches that take less time and may
        miss items; engine: `folder` or `milvus`, then with the `uri` of a server or of an embedded
        file, by default one in the folder; codes: a file of `vhabl.encode` with the codes of these
        items by this run, instead of encoding them (without features for a second stage). Raises
        VhablError where the folder exists, and as `vhabl.load` and the readers do.
        """
        folder = Path(folder)
        check_new(folder)
        if engine not in ENGINES:
            bad_value("engine", repr(engine), " or ".join(ENGINES))
        if engine == "milvus" and graphs:
            fail(
                f"graphs {' and '.join(graphs)}", "Milvus has indexes of its own", "Leave them out"
            )
        for kind in graphs:
            if kind not in faiss_index.GRAPHS:
                bad_value("graphs", repr(kind), " or ".join(faiss_index.GRAPHS))
        if uri and engine != "milvus":
            do = "Leave it out, or choose that engine"
            fail(f"uri {uri!r}", "the engine milvus alone has one", do)
        model = load_model(run, device)
        if bits is not None:
            bits = model.method.check_length(bits)
        config = model.run.config.data if data is None else load_data_config(data, overrides)
        found = collection(config, model.run.config.encoder)
        centres = None
        if codes is not None:
            signs = read_codes(Path(codes), model, found.ids, found.texts, bits)
            bits = next(iter(signs.values())).shape[1]
            _require_codes_of(model, found, signs, codes)
            encoded = _packed(signs)
        else:
            bits = model.method.bits if bits is None else bits
            centres = model.method.codebook(bits) if engine == "folder" else None
            second = centres is not None
            encoded = _encode(model, bits, second, found.images, found.texts, progress_bar)
        views = list(encoded.codes)
        items = _kept(found.ids, found.images, found.texts, found.labels)
        about = {
            "method": model.run.config.title,
            "task": model.method.task,
            "any_length": model.method.any_length,
            "data": config.name,
            "run": str(Path(run).resolve()),
            "digest": model.run.digest,
            "views": views,
            "bits": bits,
            "importance": _importance(model, bits),
            "class_names": found.class_names,
        }
        built: Engine
        if engine == "milvus":
            from vhabl.search import milvus

            built = milvus.create(folder, uri, about, encoded.codes, items)
        else:
            order, _ = scan.buckets(encoded.codes[views[0]])  # as the store has items
            features = {view: rows[order] for view, rows in encoded.features.items()}
            built = store.create(
                folder, about, encoded.codes, _with_choices(items, encoded, centres),
                partial(tuning.measure, features=features), graphs,
                None if centres is None else centres.cpu().numpy(),
            )  # fmt: skip
        index = cls(built, device)
        index._model = model
        return index

    @property
    def model(self) -> Model:
        """The model that the codes are of. Raises VhablError where its run is gone or another."""
        if self._model is None:
            meta = self.engine.meta
            model = load_model(meta["run"], self.device)
            if model.run.digest != meta["digest"]:
                do = "Put the run back, or build the index again"
                fail(meta["run"], f"its weights are not those of the index ({meta['method']})", do)
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
        like: str | None = None,
    ) -> list[Hit]:
        """The nearest items of a text, an image or a pair, or of an item of the index.

        bits: a shorter length, where the method serves prefixes; where: a filter, see
        `vhabl.search.where`; against: `image` or `text`, for the codes of a cross-modal method: by
        default those of the modality that the query is not; like: the id of an item.

        mode: `exact`; `weighted`, exact too, each bit counted by its importance, where the method
        learns one; `prefix`, which compares the items with the nearest first bits alone;
        `two-stage`, which ranks the nearest by dictionaries, where the method has them; `ivf` and
        `hnsw`, where the index has these graphs. Raises VhablError.
        """
        bits = self.check(top, bits, mode)
        if like is not None:
            if text is not None or image is not None:
                fail("query", "an item beside a text or an image", "Give one of them")
            view = self.view("", against)
            return self.find(view, self.engine.item(like)[1][view][None], top, bits, mode, where)[0]
        own, asked = self.encode_query(text, image)
        view = self.view(own, against)
        features = asked.features.get(own)
        return self.find(view, asked.codes[own], top, bits, mode, where, features)[0]

    def encode_query(
        self, text: str | None = None, image: str | Path | Image.Image | None = None
    ) -> tuple[str, Encoded]:
        """The view of a query's code, and its codes. Raises VhablError where it has none."""
        if text is None and image is None:
            fail("query", "neither a text nor an image", "Give one of them, or both")
        if text is not None and image is None:
            self.model.unknown_words(text)  # raises where it knows none
        asked = self._encode(
            images=None if image is None else [image], texts=None if text is None else [text]
        )
        own = "fused" if "fused" in asked.codes else "text" if text is not None else "image"
        if own != "fused" and len(asked.codes) > 1:
            fail("query", "a text and an image", "Give one of them: the method encodes them apart")
        return own, asked

    def check(self, top: int, bits: int | None, mode: Mode) -> int:
        """The code length asked for. Raises VhablError for what the index does not serve."""
        if not isinstance(top, Integral) or top < 1:
            bad_value("top", top, "at least 1")
        modes, method = self.engine.modes, self.engine.meta["method"]
        if mode not in modes:
            bad_value("mode", repr(mode), f"{' or '.join(modes)}, as the index of {method} has")
        whole = self.engine.bits
        if bits is None or bits == whole:
            return whole
        if not self.engine.meta["any_length"]:
            bad_value("bits", bits, f"{whole}, the only length of this index")
        if not isinstance(bits, Integral) or not 1 <= bits <= whole:
            bad_value("bits", bits, f"a length from 1 to {whole}, which the index has")
        if mode in faiss_index.GRAPHS or not self.engine.prefixes:
            bad_value("bits", bits, f"{whole}: mode {mode} of this index compares whole codes")
        return int(bits)

    def view(self, own: str, against: str) -> str:
        """The codes that a query of the view `own` is compared with. Raises VhablError."""
        views = self.engine.views
        if not against:
            other = {"text": "image", "image": "text"}.get(own, own)
            return other if other in views else views[0]
        if against not in views:
            bad_value("against", repr(against), " or ".join(views))
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
        bits = self.check(top, bits, mode)
        if codes.ndim != 2 or codes.shape[1] != self.engine.bits:
            fail("codes", f"shape {codes.shape}", f"The index needs [N, {self.engine.bits}]")
        if not np.isin(codes, (-1, 1)).all():
            fail("codes", "values other than -1 and +1", "Give what a model's encode gives")
        return self.find(self.view("", view), pack(codes), top, bits, mode, where)

    def find(
        self,
        view: str,
        packed: np.ndarray,
        top: int,
        bits: int,
        mode: Mode,
        where: str,
        features: np.ndarray | None = None,
    ) -> list[list[Hit]]:
        """The nearest items of checked queries [Q, B]. Raises VhablError for a wrong filter, and
        for a second stage without features.
        """
        wanted = parse(where, self.engine.class_names) if where else None
        if mode == "two-stage" and features is None:
            fail("mode two-stage", "a code has no features", "Give a text or an image")
        return self.engine.find(Query(view, packed, bits, top, mode, wanted, features))

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
        _require_texts(ids)
        encoded = self._encode(images, texts)
        missing = [view for view in self.engine.views if view not in encoded.codes]
        if missing:
            do = f"Give {' and '.join(self.engine.views)} of each"
            fail("items", f"no {missing[0]} is given", do)
        if any(len(rows) != len(ids) for rows in encoded.codes.values()):
            found = len(next(iter(encoded.codes.values())))
            fail("ids", f"{len(ids)} for {found} items", "Give one for each")
        names = self.engine.class_names
        matrix = np.zeros((len(ids), len(names)), np.uint8)
        if labels is not None and len(labels) != len(ids):
            do = "Give one for each, empty where an item has none"
            fail("labels", f"{plural(len(labels), 'list')} for {plural(len(ids), 'item')}", do)
        for row, own in enumerate(labels or []):
            if isinstance(own, str):
                fail(f"labels of {ids[row]}", f"the text {own!r}", "Give a list of names")
            for name in own:
                if name not in names:
                    do = "Give names of its classes"
                    fail(f"labels of {ids[row]}", f"{name!r} is no class of the index", do)
                matrix[row, names.index(name)] = 1
        kept = _kept(ids, images, texts, matrix)
        centres = self.model.method.codebook(self.engine.bits) if encoded.features else None
        items = _with_choices(kept, encoded, centres)
        packed = {view: encoded.codes[view] for view in self.engine.views}
        self.engine = self.engine.add(packed, items)
        return self

    def delete(self, ids: Sequence[str]) -> Index:
        """Raises VhablError, and deletes none, for an id that there is not."""
        _require_texts(ids)
        self.engine = self.engine.delete(ids)
        return self

    def _encode(self, images: Images | None, texts: Texts | None) -> Encoded:
        features = "two-stage" in self.engine.modes
        return _encode(self.model, self.engine.bits, features, images, texts)


def _require_texts(ids: Sequence[str]) -> None:
    if isinstance(ids, str) or not all(isinstance(identity, str) for identity in ids):
        fail("ids", f"a {type(ids).__name__}, or numbers in it", "Give a list of texts")


def _encode(
    model: Model,
    bits: int,
    features: bool,
    images: Images | None,
    texts: Texts | None,
    progress_bar: bool = False,
) -> Encoded:
    if not features:
        return _packed(model.encode(images, texts, bits, progress_bar))
    found = model.features(images, texts, bits, progress_bar)
    signs = {view: np.where(rows >= 0, 1, -1) for view, rows in found.items()}
    return replace(_packed(signs), features=found)


def _require_codes_of(
    model: Model, found: Collection, signs: dict[str, np.ndarray], path: str | Path
) -> None:
    """Raise VhablError where a few of the items, encoded again, have other codes: more than
    another device rounds to.
    """
    rows = np.unique(np.linspace(0, len(found.ids) - 1, 8).astype(int))
    bits = next(iter(signs.values())).shape[1]
    again = model.encode(take(found.images, rows), take(found.texts, rows), bits)
    differ = float(np.mean([signs[view][rows] != some for view, some in again.items()]))
    if differ > 0.1:
        what = f"{differ:.0%} of the bits of {len(rows)} items are others when encoded again"
        fail(path, what, "Encode these data with this run")


def _packed(signs: dict[str, np.ndarray]) -> Encoded:
    return Encoded({view: pack(rows) for view, rows in signs.items()}, {})


def _with_choices(items: Items, encoded: Encoded, centres: torch.Tensor | None) -> Items:
    """Items with what stands for their features, in the smallest type that holds it."""
    if centres is None:
        return items
    kind = np.uint8 if centres.shape[1] <= 256 else np.uint16
    choices = {
        view: quantisation.assign(torch.from_numpy(rows), centres.cpu()).numpy().astype(kind)
        for view, rows in encoded.features.items()
    }
    return replace(items, choices=choices)


def _importance(model: Model, bits: int) -> list[int] | None:
    """Integer weights of the bits, where the method learns such."""
    weights = model.method.bit_importance()
    if weights is None:
        return None
    return list(map(int, integer_weights(weights[:bits].cpu().numpy())[0]))


def _kept(
    ids: Sequence[str], images: Images | None, texts: Texts | None, labels: np.ndarray
) -> Items:
    """What an index keeps of items: captions and paths of those that have some."""
    blank = [""] * len(ids)
    captions = blank
    if isinstance(texts, Sequence):
        captions = [text if isinstance(text, str) else "" for text in texts]
    paths = [_path(image) for image in images] if isinstance(images, Sequence) else blank
    return Items(list(ids), captions, paths, labels)


def _path(image: str | Picture) -> str:
    return str(Path(image).resolve()) if isinstance(image, str | Path) else ""
