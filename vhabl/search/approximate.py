"""Searches that do not compare every item, and how much each of them finds.

`prefix` meets the items with the nearest first bits (`vhabl.search.scan`), `ivf` those of the
nearest clusters, `hnsw` those that a graph of neighbours leads to (both FAISS), and `two-stage`
ranks the nearest, found by prefix, by what a codebook says of their features. Each has one setting,
which is chosen on a sample when an index is built: the smallest that reaches the recall wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vhabl.errors import brief, fail
from vhabl.search.engine import Mode

if TYPE_CHECKING:
    from vhabl.search.store import Store

Graph = Literal["ivf", "hnsw"]
GRAPHS: tuple[Graph, ...] = get_args(Graph)
RECALL, RECALL_AT, SAMPLE = 0.99, 100, 200  # what is wanted, of so many nearest, on so many items
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the items, or of the clusters
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)  # candidates that a graph's search holds
SETTINGS: dict[Mode, Sequence[float]] = {"prefix": SHARES, "ivf": SHARES, "hnsw": WIDTHS}
NEIGHBOURS = 32  # of an item in a graph
PER_CLUSTER = 39  # FAISS asks for so many items to place a cluster
TWO_STAGE_AT = 10  # the ranks that a second stage is judged by
LOST = 0.01  # what it may lose of them


def build(packed: np.ndarray, kind: Graph) -> Any:
    """A FAISS index of codes [N, B], numbered by row."""
    import faiss

    bits = 8 * packed.shape[1]
    index: Any
    if kind == "hnsw":
        index = faiss.IndexBinaryHNSW(bits, NEIGHBOURS)
    else:
        clusters = max(1, min(round(4 * math.sqrt(len(packed))), len(packed) // PER_CLUSTER))
        index = faiss.index_binary_factory(bits, f"BIVF{clusters}")
        index.cp.min_points_per_centroid = 1  # else it warns where there are fewer than 39 items
        index.train(packed)
    index.add(packed)
    return index


def write(index: Any, file: Path) -> None:
    import faiss

    faiss.write_index_binary(index, str(file))


def load(file: Path) -> Any:
    """Raises VhablError where FAISS cannot read it."""
    import faiss

    try:
        return faiss.read_index_binary(str(file))
    except RuntimeError as error:
        fail(file, f"FAISS cannot read it ({brief(error)})", "It must be what vhabl.search wrote")


def nearest(
    index: Any, packed: np.ndarray, top: int, setting: float, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows [Q, top] of what a FAISS index finds for codes [Q, B]; -1 behind them.

    setting: the share of the clusters, or the width of a graph's search; allowed: 0 for items that
    take no part, [N]: more are asked for then, and those without part are left out.
    """
    ask = min(top if allowed is None else 4 * top, index.ntotal)
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = max(int(setting), ask)
    else:
        index.nprobe = max(1, math.ceil(setting * index.nlist))
    distance, row = index.search(packed, ask)
    row = row.astype(np.int64)
    if allowed is not None:
        row = np.where((row >= 0) & (allowed[row] > 0), row, -1)
    order = np.argsort(np.where(row < 0, np.iinfo(np.int32).max, distance), axis=1, kind="stable")
    order = order[:, :top]
    row = np.take_along_axis(row, order, axis=1)
    return np.where(row < 0, -1, np.take_along_axis(distance, order, axis=1)), row


def measure(store: Store, features: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """What each mode finds in each view of a new index, on a sample of its items: `recall` as the
    index's description has it, {view: {mode: {setting, recall, at, queries}}}.

    The queries are codes of the other modality where there are two. Any item that is not farther
    than the last exact one counts as found. features: {view: [N, d]} in the order of the store's
    items, for a second stage, which is compared with a ranking by the features themselves: its
    setting is the smallest that finds as much as with an exact first stage, but for `LOST`.
    """
    (segment,) = store.segments
    items = np.random.default_rng(0).choice(segment.size, min(SAMPLE, segment.size), False)
    found: dict[str, dict[str, Any]] = {}
    for view in store.views:
        asking = store.views[store.views[0] == view] if len(store.views) > 1 else view
        packed = segment.packed(asking, items)
        top = min(RECALL_AT, segment.size)
        farthest = store.scan(view, packed, store.bits, top)[0][:, -1:]
        found[view] = {}
        for mode, settings in SETTINGS.items():
            if mode in GRAPHS and mode not in store.meta["graphs"]:
                continue
            for setting in settings:
                near = store.scan(view, packed, store.bits, top, mode, setting)[0]
                reached = float(((near >= 0) & (near <= farthest)).mean())
                if reached >= RECALL:
                    break
            found[view][mode] = _said(setting, reached, top, items)
        if features:
            vectors, own = features[asking][items], features[view]
            found[view]["two-stage"] = _second_stage(store, view, packed, vectors, own)
    return {"recall": found}


def _second_stage(
    store: Store, view: str, packed: np.ndarray, vectors: np.ndarray, features: np.ndarray
) -> dict[str, float]:
    top = min(TWO_STAGE_AT, len(features))
    scores = vectors @ features.T  # (sample, N)
    last = np.partition(scores, -top, axis=1)[:, -top, None]

    def recall(setting: float) -> float:
        (_, _, hits), _ = store.two_stage(view, packed, vectors, top, setting)
        return float((np.take_along_axis(scores, hits, axis=1) >= last).mean())

    enough = recall(1.0) - LOST
    for setting in SHARES:
        reached = recall(setting)
        if reached >= enough:
            break
    return _said(setting, reached, top, vectors)


def _said(setting: float, recall: float, top: int, items: np.ndarray) -> dict[str, float]:
    return {"setting": setting, "recall": recall, "at": top, "queries": len(items)}
