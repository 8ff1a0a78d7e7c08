"""FAISS's approximate indexes of codes: `ivf` scans the nearest clusters, `hnsw` follows a graph of
neighbours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vhabl.system.errors import brief, fail

Graph = Literal["ivf", "hnsw"]
GRAPHS: tuple[Graph, ...] = get_args(Graph)
NEIGHBOURS = 32  # of an item in a graph
PER_CLUSTER = 39  # FAISS asks for so many items to place a cluster


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
