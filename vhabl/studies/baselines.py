"""Reference rows for every table, on the same features: chance, random projections (LSH), ITQ, and
the labels that a linear classifier predicts.

python -m vhabl.studies.baselines data=emoji bits=[16,32,64,128]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vhabl.config import load_baselines
from vhabl.data import load as load_data
from vhabl.encoders import FeatureScaling
from vhabl.evaluation.records import CLASSIFIER, Record, records, to_tasks
from vhabl.report import print_table
from vhabl.system import errors
from vhabl.system.files import write_json
from vhabl.types import Codes, Dataset, Split


class Features:
    """Image and text features side by side, float32 [N, d]: each modality with mean 0 and mean
    variance 1 on the training items, so that neither drowns the other. The first `image` columns
    are the image's.
    """

    def __init__(self, data: Dataset) -> None:
        self.scaling = FeatureScaling(data.spec)
        self.scaling.fit(data.train, "global")
        self.image = data.spec.image_dim

    def __call__(self, split: Split) -> np.ndarray:
        scaled = self.scaling(split.inputs())
        assert scaled.image is not None and scaled.text is not None
        return np.concatenate([scaled.image.numpy(), scaled.text.numpy()], axis=1)


def constant(x: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """Chance: every item has the same code, so every order of the database is equally likely."""
    return np.zeros((x.shape[1], bits), np.float32)


def constant_both(
    image: np.ndarray, text: np.ndarray, bits: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chance for two modalities."""
    return constant(image, bits, seed), constant(text, bits, seed)


def lsh(x: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """Projection of a seeded Gaussian matrix: [d, bits] (Charikar, STOC 2002)."""
    return np.random.default_rng(seed).standard_normal((x.shape[1], bits)).astype(np.float32)


def itq(x: np.ndarray, bits: int, seed: int) -> np.ndarray | None:
    """PCA and the rotation of least quantisation error: [d, bits] (Gong & Lazebnik, CVPR 2011).

    None where the training items x [N, d] have fewer than `bits` principal directions.
    """
    if min(len(x) - 1, x.shape[1]) < bits:
        return None
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    turn = itq_rotation(x @ directions[:bits].T, seed)
    return (turn @ directions[:bits]).T.astype(np.float32)


def itq_rotation(projected: np.ndarray, seed: int) -> np.ndarray:
    """The rotation [bits, bits] that brings rows [N, bits] nearest to their signs."""
    import faiss

    bits = projected.shape[1]
    rotation = faiss.ITQMatrix(bits)
    rotation.seed = seed
    rotation.train(np.ascontiguousarray(projected, dtype=np.float32))
    return faiss.vector_to_array(rotation.A).reshape(bits, bits)


CCA_RIDGE = 0.1  # share of the mean variance that is added to each variance


def cca_itq(
    image: np.ndarray, text: np.ndarray, bits: int, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions of both modalities with the highest correlation, each weighted by it, and one ITQ
    rotation for both: [d_image, bits] and [d_text, bits] (Gong et al., IJCV 2014).

    None where a modality has fewer than `bits` dimensions.
    """
    if min(len(image) - 1, image.shape[1], text.shape[1]) < bits:
        return None

    def whitening(x: np.ndarray) -> np.ndarray:  # (d, d)
        covariance = x.T @ x / len(x)
        ridge = CCA_RIDGE * np.trace(covariance) / len(covariance)
        lower = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
        return np.linalg.inv(lower).T

    a, b = whitening(image.astype(np.float64)), whitening(text.astype(np.float64))
    left, correlation, right = np.linalg.svd(a.T @ (image.T @ text / len(image)) @ b)
    a = a @ left[:, :bits] * correlation[:bits]
    b = b @ right[:bits].T * correlation[:bits]
    turn = itq_rotation(np.concatenate([image @ a, text @ b]), seed)
    return (a @ turn.T).astype(np.float32), (b @ turn.T).astype(np.float32)


def classifier_codes(
    x: np.ndarray, labels: np.ndarray, others: Sequence[np.ndarray], seed: int
) -> list[np.ndarray]:
    """Predicted labels as a code of +-1, one bit a class: int8 [M, C] for each of others [M, d].

    x [N, d] and labels [N, C] are the training items. A linear classifier by logistic regression:
    where it beats a hash, the hash adds nothing to knowing the classes (Sablayrolles et al., ICASSP
    2017). The penalty on squared weights is the one of `PENALTIES` that names the most classes of a
    tenth of the training items. Where every training item has one class, the likeliest class is
    predicted, else those above one half.
    """
    single = bool((labels.sum(axis=1) == 1).all())
    y = labels.astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    held_out, fit = np.split(order, [max(1, len(x) // 10)])

    def agreement(penalty: float) -> float:
        logits = logistic_regression(x[fit], y[fit], penalty, single)(x[held_out])
        return float((predicted(logits, single) == y[held_out]).mean())

    best = max(PENALTIES, key=agreement)
    classifier = logistic_regression(x, y, best, single)
    return [np.where(predicted(classifier(new), single), 1, -1).astype(np.int8) for new in others]


def predicted(logits: np.ndarray, single: bool) -> np.ndarray:
    """Classes that logits name: bool [N, C]."""
    if single:
        return logits == logits.max(axis=1, keepdims=True)
    return logits > 0


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def logistic_regression(
    x: np.ndarray, y: np.ndarray, penalty: float, single: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of new items [N, d] -> [N, C], from a fit by L-BFGS on x [N, d] and y [N, C]."""
    features, target = torch.from_numpy(x), torch.from_numpy(y)
    weight = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ weight + bias
        if single:
            loss = F.cross_entropy(logits, target)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, target)
        loss = loss + penalty * weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    w, b = weight.detach().numpy(), bias.detach().numpy()
    return lambda new: new @ w + b


def baseline_records(data: Dataset, lengths: Sequence[int], seed: int) -> list[Record]:
    """Rows of all baselines, measured as every method is: for the fused task, and for the two
    cross-modal ones. Where images and texts are not pairs there is chance alone: the others learn
    from pairs.
    """
    if not data.spec.paired:
        blank = [[np.zeros((len(s), 1), np.float32)] * 2 for s in (data.query, data.database)]
        return _cross_row("chance", constant_both, data, [blank[0], *blank], lengths, seed)
    features = Features(data)
    train, query, database = (features(s) for s in (data.train, data.query, data.database))
    sides = [np.split(x, [features.image], axis=1) for x in (train, query, database)]
    return [
        *_fused_records(data, train, query, database, lengths, seed),
        *_cross_row("chance", constant_both, data, sides, lengths, seed),
        *_cross_row("CCA + ITQ", cca_itq, data, sides, lengths, seed),
    ]


def _fused_records(
    data: Dataset,
    train: np.ndarray,
    query: np.ndarray,
    database: np.ndarray,
    lengths: Sequence[int],
    seed: int,
) -> list[Record]:
    labels = data.query.labels, data.database.labels
    rows: list[Record] = []
    for title, fit in (("chance", constant), ("LSH", lsh), ("ITQ", itq)):
        found = {}
        for bits in lengths:
            projection = fit(train, bits, seed)
            if projection is not None:
                q, db = _signs(query @ projection), _signs(database @ projection)
                found[bits] = {"fused": Codes(q, db, *labels)}
        rows += records(title, data, found, seed, "curves")
    q, db = classifier_codes(train, data.train.labels, (query, database), seed)
    codes = Codes(q, db, *labels)
    return rows + records(CLASSIFIER, data, {codes.bits: {"fused": codes}}, seed, "curves")


def _cross_row(
    title: str,
    fit: Callable[..., tuple[np.ndarray, np.ndarray] | None],
    data: Dataset,
    sides: Sequence[Sequence[np.ndarray]],
    lengths: Sequence[int],
    seed: int,
) -> list[Record]:
    """sides: image and text features of the training, query and database items."""
    train, query, database = sides
    found = {}
    for bits in lengths:
        pair = fit(train[0], train[1], bits, seed)
        if pair is not None:
            q, db = (
                {"image": _signs(image @ pair[0]), "text": _signs(text @ pair[1])}
                for image, text in (query, database)
            )
            found[bits] = to_tasks(q, db, data)
    return records(title, data, found, seed, "curves")


def _signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1, -1).astype(np.int8)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vhabl.studies.baselines", description=__doc__)
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
