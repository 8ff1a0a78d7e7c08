"""The setting of each approximate search, chosen on a sample when an index is built: the smallest
that reaches the recall wanted.

`prefix` scans the items with the nearest first bits, `ivf` and `hnsw` are FAISS's, and `two-stage`
ranks the nearest by prefix by what a codebook says of their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vhabl.search.engine import Mode
from vhabl.search.faiss_index import GRAPHS
from vhabl.search.store import Store

RECALL, RECALL_AT, SAMPLE = 0.99, 100, 200  # what is wanted, of so many nearest, on so many items
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the items, or of the clusters
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)  # candidates that a graph's search holds
SETTINGS: dict[Mode, Sequence[float]] = {"prefix": SHARES, "ivf": SHARES, "hnsw": WIDTHS}
TWO_STAGE_AT = 10  # the ranks that a second stage is judged by
LOST = 0.01  # what it may lose of them


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
