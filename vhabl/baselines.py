"""Reference rows for every table: chance, random projections (LSH) and ITQ, on the same features.

python -m vhabl.baselines data=emoji bits=[16,32,64,128]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vhabl import errors
from vhabl.config import load_baselines
from vhabl.data import load as load_data
from vhabl.encoders import FeatureScaling
from vhabl.evaluator import Record, records
from vhabl.files import write_json
from vhabl.report import print_table
from vhabl.types import Codes, Dataset, Split


class Features:
    """Image and text features side by side, float32 [N, d]: each modality with mean 0 and mean
    variance 1 on the training items, so that neither drowns the other.
    """

    def __init__(self, data: Dataset) -> None:
        self.scaling = FeatureScaling(data.spec)
        self.scaling.fit(data.train.inputs(), "global")

    def __call__(self, split: Split) -> np.ndarray:
        scaled = self.scaling(split.inputs())
        assert scaled.image is not None and scaled.text is not None
        return np.concatenate([scaled.image.numpy(), scaled.text.numpy()], axis=1)


def constant(x: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """Chance: every item has the same code, so every order of the database is equally likely."""
    return np.zeros((x.shape[1], bits), np.float32)


def lsh(x: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """Projection of a seeded Gaussian matrix: [d, bits] (Charikar, STOC 2002)."""
    return np.random.default_rng(seed).standard_normal((x.shape[1], bits)).astype(np.float32)


def itq(x: np.ndarray, bits: int, seed: int) -> np.ndarray | None:
    """PCA and the rotation of least quantisation error: [d, bits] (Gong & Lazebnik, CVPR 2011).

    None where the training items x [N, d] have fewer than `bits` principal directions.
    """
    import faiss

    if min(len(x) - 1, x.shape[1]) < bits:
        return None
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    projected = np.ascontiguousarray(x @ directions[:bits].T)
    rotation = faiss.ITQMatrix(bits)
    rotation.seed = seed
    rotation.train(projected)
    turn = faiss.vector_to_array(rotation.A).reshape(bits, bits)
    return (turn @ directions[:bits]).T.astype(np.float32)


def baseline_records(data: Dataset, lengths: Sequence[int], seed: int) -> list[Record]:
    """Chance, LSH and ITQ rows for a fused task, measured as every method is."""
    features = Features(data)
    train, query, database = (features(s) for s in (data.train, data.query, data.database))
    labels = data.query.labels, data.database.labels
    rows: list[Record] = []
    for title, fit in (("chance", constant), ("LSH", lsh), ("ITQ", itq)):
        found = {}
        for bits in lengths:
            projection = fit(train, bits, seed)
            if projection is not None:
                q, db = (np.where(x @ projection >= 0, 1, -1) for x in (query, database))
                codes = Codes(q.astype(np.int8), db.astype(np.int8), *labels)
                found[bits] = {"fused": codes}
        rows += records(title, data, found, seed)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vhabl.baselines", description=__doc__)
    parser.add_argument("--quiet", action="store_true", help="print no table")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="data=NAME, data.path=PATH, bits=[...], seed=N, out=DIR",
    )
    given = parser.parse_intermixed_args(arguments)
    config = load_baselines(given.overrides)
    data = load_data(config.data)
    rows = baseline_records(data, config.bits, config.seed)
    out = config.out or Path("checkpoint", config.data.name, "baselines", str(config.seed))
    write_json(Path(out) / "metrics.json", [row.as_dict() for row in rows])
    if not given.quiet:
        print_table(rows)
    return 0


if __name__ == "__main__":
    errors.run(main)
