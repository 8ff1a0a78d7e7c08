"""A trained method and a data set become codes, and codes become records of measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vhabl.data import without
from vhabl.data.images import read, rows_in_order
from vhabl.methods.base import HashingMethod
from vhabl.metrics import (
    HEADLINE,
    MEASURES,
    WITH_HIT,
    Value,
    code_statistics,
    curves,
    evaluate,
    evaluate_orders,
)
from vhabl.nn import quantisation
from vhabl.system.errors import note, plural
from vhabl.types import Batch, Codes, Dataset, Split

CLASSIFIER = "linear classifier"  # titles by which a table knows the reference rows
REAL_VALUED = " (real-valued)"
QUANTISED, TWO_STAGE, LOSSLESS = " (quantised)", " (two-stage)", " (lossless)"
NOT_BINARY = (REAL_VALUED, QUANTISED, TWO_STAGE, LOSSLESS)  # how titles of other searches end
SHORTLIST = 100  # items that the first stage of a two-stage search keeps


@dataclass(frozen=True)
class Record:
    """One row of metrics.json; tables and plots are made from these and from nothing else."""

    method: str
    data: str
    task: str  # fused | i2t | t2i | i2f | t2f (an image or a text alone against pairs)
    bits: int
    measure: str
    value: float
    seed: int
    ties: str
    oracle_labels: bool
    queries: int
    queries_without_match: int
    database: str  # all | without_train
    own_items: str = "none"  # queries that are in the database themselves: none | left_out | kept

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def shown(method: str, oracle_labels: bool) -> str:
    """A method's name in tables and plots: a result with oracle labels says so, once.

    >>> shown("PGHMH", True), shown("PGHMH (oracle labels)", True)
    ('PGHMH (oracle labels)', 'PGHMH (oracle labels)')
    """
    said = not oracle_labels or "oracle labels" in method
    return method if said else f"{method} (oracle labels)"


def batches_in_order(method: HashingMethod, split: Split) -> Iterator[Batch]:
    """All items in their order, in batches of a fixed size, on the method's device. Among ranks
    that share out the encoder's work, inputs are those of this rank's share.
    """
    device = next(method.parameters()).device
    rows = rows_in_order(len(split), method.encoder.batch)
    shares = [method.encoder.ranks.part(index) for index in rows]
    # All at once, as the host waits for each copy.
    labels = torch.from_numpy(split.labels).to(device)
    of_texts = None if split.text_labels is None else torch.from_numpy(split.text_labels).to(device)
    index = torch.arange(len(split), device=device)
    for there, inputs in zip(rows, read(split, shares, device=device), strict=True):
        its = slice(there[0], there[-1] + 1)
        texts = None if of_texts is None else of_texts[its].float()
        yield Batch(inputs.to(device), labels[its].float(), index[its], texts)


def encode(
    method: HashingMethod,
    split: Split,
    lengths: Sequence[int],
    only: str = "",
    progress_bar: bool = False,
) -> dict[int, dict[str, np.ndarray]]:
    """Codes of all items at each length: {bits: {view: int8 [N, bits]}}.

    only: `image` or `text`, for codes of that modality alone. No label is passed on, but to a
    method with oracle labels, whose results say so.
    """

    def run(batch: Batch) -> dict[int, dict[str, Tensor]]:
        inputs = batch.inputs.only(only) if only else batch.inputs
        if method.oracle_labels:
            return method.encode_oracle(inputs, batch.labels, lengths)
        return method.encode_lengths(inputs, lengths)

    return _of_all(method, split, run, torch.int8, progress_bar)


def relaxed_codes(
    method: HashingMethod,
    split: Split,
    lengths: Sequence[int],
    only: str = "",
    progress_bar: bool = False,
) -> dict[int, dict[str, np.ndarray]]:
    """Relaxed codes of all items at each length, as `encode` gives codes: float32 [N, bits]."""

    def run(batch: Batch) -> dict[int, dict[str, Tensor]]:
        inputs = batch.inputs.only(only) if only else batch.inputs
        if method.oracle_labels:
            return method.relax_oracle(inputs, batch.labels, lengths)
        return method.relax_lengths(inputs, lengths)

    return _of_all(method, split, run, torch.float32, progress_bar)


@torch.no_grad()
def _of_all(
    method: HashingMethod,
    split: Split,
    run: Callable[[Batch], dict[int, dict[str, Tensor]]],
    dtype: torch.dtype,
    progress_bar: bool = False,
) -> dict[int, dict[str, np.ndarray]]:
    """What `run` gives for every batch of a split, joined."""
    method.eval()
    parts: dict[int, dict[str, list[Tensor]]] = {}
    bar = tqdm(
        total=len(split), desc="encoding", unit="item", disable=None if progress_bar else True
    )
    for batch in batches_in_order(method, split):
        bar.update(len(batch.index))
        for bits, views in run(batch).items():
            for view, rows in views.items():
                chunks = parts.setdefault(bits, {}).setdefault(view, [])
                chunks.append(rows.to(dtype).cpu())
    bar.close()
    return {
        bits: {view: torch.cat(chunks).numpy() for view, chunks in views.items()}
        for bits, views in parts.items()
    }


def to_tasks(
    query: dict[str, np.ndarray],
    database: dict[str, np.ndarray],
    data: Dataset,
    oracle_labels: bool = False,
) -> dict[str, Codes]:
    """The retrieval tasks that a method's views serve: fused, or i2t and t2i. Images are judged by
    their labels and texts by theirs, where these differ.
    """
    of_images = data.query.labels, data.database.labels
    of_texts = data.query.labels_of_texts, data.database.labels_of_texts
    if "fused" in query:
        return {"fused": Codes(query["fused"], database["fused"], *of_images, oracle_labels)}
    i2t, t2i = (of_images[0], of_texts[1]), (of_texts[0], of_images[1])
    return {
        "i2t": Codes(query["image"], database["text"], *i2t, oracle_labels),
        "t2i": Codes(query["text"], database["image"], *t2i, oracle_labels),
    }


def code_tasks(
    method: HashingMethod, data: Dataset, lengths: Sequence[int]
) -> dict[int, dict[str, Codes]]:
    """Codes of queries and database for every length and task."""
    query = encode(method, data.query, lengths)
    database = encode(method, data.database, lengths)
    oracle = method.oracle_labels
    return {bits: to_tasks(query[bits], database[bits], data, oracle) for bits in lengths}


def with_one_modality(
    method: HashingMethod, data: Dataset, found: dict[int, dict[str, Codes]]
) -> dict[int, dict[str, Codes]]:
    """The tasks of `code_tasks` and, where a fused method serves them, queries that have an image
    alone (i2f) or a text alone (t2f).
    """
    if method.stand_in is None:
        return found
    result = {bits: dict(tasks) for bits, tasks in found.items()}
    for task, view in (("i2f", "image"), ("t2f", "text")):
        for bits, views in encode(method, data.query, list(found), view).items():
            result[bits][task] = replace(found[bits]["fused"], query=views["fused"])
    return result


MeasureSet = Literal["headline", "all", "curves"]  # each holds the one before it


def records(
    title: str,
    data: Dataset,
    codes: dict[int, dict[str, Codes]],
    seed: int,
    measures: MeasureSet = "headline",
    keep_own: bool = False,
) -> list[Record]:
    """Measures of codes at every length, on the whole database and, where some of it was trained
    on and some not, on the database without the training items. A query that is in the database
    itself is left out there (keep_own: kept, as some releases do).
    """
    rows: list[Record] = []
    unseen = np.flatnonzero(np.isin(data.database.ids, without(data.database, data.train).ids))
    databases: dict[str, np.ndarray | slice] = {"all": slice(None)}
    if 0 < len(unseen) < len(data.database):
        databases["without_train"] = unseen
    own = {
        name: own_positions(data.query.sources, data.database.sources[items])
        for name, items in databases.items()
    }
    for bits, tasks in codes.items():
        for task, found in tasks.items():
            for database, items in databases.items():
                part = replace(
                    found,
                    database=found.database[items],
                    database_labels=found.database_labels[items],
                )
                kind, left_out = _own_items(own[database], keep_own)
                template = Record(
                    title, data.name, task, bits, "", 0.0, seed, "", found.oracle_labels, 0, 0,
                    database, kind,
                )  # fmt: skip
                rows += measure(part, template, measures, left_out)
    return rows


def real_valued_records(
    method: HashingMethod,
    data: Dataset,
    lengths: Sequence[int],
    seed: int,
    keep_own: bool = False,
    title: str = "",
) -> list[Record]:
    """mAP of searches by more than binary codes, one order of the whole database for each query.

    By the cosine of relaxed codes, before the sign: what binarising costs. Of a method with
    dictionaries also both means of mAP@50/hits, and the bytes that an item takes: by the real
    features of query and database (lossless), by a query's feature and an item's centres
    (quantised), and by these among the `SHORTLIST` items of the smallest Hamming distance
    (two-stage), the others behind them by distance. keep_own: as in `records`; title: as tables
    name the method.
    """
    own = own_positions(data.query.sources, data.database.sources)
    kind, left_out = _own_items(own, keep_own)
    query, database = (
        relaxed_codes(method, split, lengths) for split in (data.query, data.database)
    )
    quantised = method.codebook(method.bits) is not None
    names = ("mAP@all", "mAP@50/hits", f"mAP@50/hits{WITH_HIT}") if quantised else ("mAP@all",)
    asked = tuple(m for m in MEASURES if m.name in names and m.ties == "index")
    rows: list[Record] = []
    for bits in lengths:
        for task, found in to_tasks(query[bits], database[bits], data).items():
            searches = _by_centres(method, bits, found) if quantised else _by_cosine(found)
            for suffix, (cost, orders) in searches.items():
                template = Record(
                    (title or method.title) + suffix, data.name, task, bits, "", 0.0, seed, "real",
                    method.oracle_labels, len(found.query), 0, "all", kind,
                )  # fmt: skip
                labels = found.query_labels, found.database_labels
                for value in evaluate_orders(orders, *labels, asked, left_out):
                    real = replace(value, ties="real")
                    rows.append(_record(template, real, value.measure, value.value))
                if quantised:
                    rows.append(replace(template, measure="bytes an item", value=cost))
    return rows


# Bytes of an item, and the order of the database for each query, by what a title ends with.
Searches = dict[str, tuple[float, Iterator[np.ndarray]]]


def _by_cosine(features: Codes) -> Searches:
    query, database = _unit(features.query), _unit(features.database)
    orders = (np.argsort(-(database @ vector), kind="stable") for vector in query)
    return {REAL_VALUED: (4.0 * features.bits, orders)}


def _by_centres(method: HashingMethod, bits: int, features: Codes) -> Searches:
    centres = method.codebook(bits)
    assert centres is not None
    centres = centres.cpu()
    query, database = torch.from_numpy(features.query), torch.from_numpy(features.database)
    coded = quantisation.assign(database, centres)
    signs = [torch.where(side >= 0, 1.0, -1.0) for side in (query, database)]

    def values(number: int) -> np.ndarray:
        return quantisation.scores(quantisation.tables(query[number], centres), coded).numpy()

    def two_stage(number: int) -> np.ndarray:
        by_distance = np.argsort(-(signs[1] @ signs[0][number]).numpy(), kind="stable")
        first, rest = by_distance[:SHORTLIST], by_distance[SHORTLIST:]
        return np.concatenate([first[np.argsort(-values(number)[first], kind="stable")], rest])

    numbers = range(len(query))
    choice = len(centres) * math.log2(centres.shape[1]) / 8
    return {
        LOSSLESS: (
            4.0 * bits,
            (np.argsort(-(database @ query[n]).numpy(), kind="stable") for n in numbers),
        ),
        QUANTISED: (choice, (np.argsort(-values(n), kind="stable") for n in numbers)),
        TWO_STAGE: (choice + bits / 8, (two_stage(n) for n in numbers)),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _own_items(own: np.ndarray | None, keep: bool) -> tuple[str, np.ndarray | None]:
    """What records say of queries that are in the database themselves, and what is left out."""
    if own is None:
        return "none", None
    return ("kept", None) if keep else ("left_out", own)


def own_positions(queries: np.ndarray, database: np.ndarray) -> np.ndarray | None:
    """Where each query itself is in the database, -1 where it is not: [Q]; None where none is.
    queries, database: what tells items apart (`Split.sources`).
    """
    place = {item: position for position, item in enumerate(database.tolist())}
    own = np.array([place.get(item, -1) for item in queries.tolist()])
    again = np.isin(database, queries).sum() - len(np.unique(own[own >= 0]))
    if again:
        note(f"queries come in the database several times: {plural(int(again), 'copy')} kept there")
    return own if (own >= 0).any() else None


def measure(
    codes: Codes, template: Record, measures: MeasureSet, own: np.ndarray | None = None
) -> list[Record]:
    """Records of one set of codes; the template names them.

    Every measure but those of curves and of the codes alone has a twin over the queries that have
    a match.
    """
    asked = {"headline": HEADLINE}.get(measures, MEASURES)
    if measures != "headline" and len(codes.database) <= 100:
        items = plural(len(codes.database), "item")
        note(f"recall@100 is 1 for any codes: the database has {items}")
    counted = len(asked)
    if measures == "curves":
        named = {(m.name, m.ties) for m in asked}
        asked = (*asked, *(m for m in curves(codes.bits) if (m.name, m.ties) not in named))
    rows: list[Record] = []
    for number, value in enumerate(evaluate(codes, asked, own=own)):
        rows.append(_record(template, value, value.measure, value.value))
        if number < counted:
            rows.append(
                _record(template, value, f"{value.measure} (matched)", value.value_matched_only)
            )
    if measures != "headline":
        for name, share in code_statistics(codes.database).items():
            rows.append(replace(template, measure=name, value=share, queries=len(codes.query)))
    return rows


def _record(template: Record, value: Value, name: str, number: float) -> Record:
    return replace(
        template,
        measure=name,
        value=number,
        ties=value.ties,
        queries=value.queries,
        queries_without_match=value.queries_without_match,
    )


def score(codes: Codes, columns: Sequence[int] | np.ndarray | slice) -> float:
    """mAP@all (expected) of the codes with these bits only."""
    part = replace(codes, query=codes.query[:, columns], database=codes.database[:, columns])
    return evaluate(part)[0].value


INTERVAL = 10  # bits


def interval_scores(codes: Codes) -> dict[str, float]:
    """mAP@all of bits 1-10 alone, of 11-20 alone, and so on: falls where bits are ranked."""
    return {
        f"{first + 1}-{first + INTERVAL}": score(codes, slice(first, first + INTERVAL))
        for first in range(0, codes.bits - INTERVAL + 1, INTERVAL)
    }


def validation_score(method: HashingMethod, data: Dataset, lengths: Sequence[int]) -> float:
    """mAP@all (expected), the mean over lengths and tasks: what model selection compares."""
    scores = [
        evaluate(codes)[0].value
        for tasks in code_tasks(method, data, lengths).values()
        for codes in tasks.values()
    ]
    return float(np.mean(scores))
