"""A trained method and a data set become codes, and codes become records of measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from vhabl.data import without
from vhabl.methods.base import HashingMethod
from vhabl.metrics import HEADLINE, Measure, Value, evaluate
from vhabl.types import Batch, Codes, Dataset, Split

ENCODE_BATCH = 2048  # items encoded at once; part of the protocol, so that results repeat


@dataclass(frozen=True)
class Record:
    """One row of metrics.json; tables and plots are made from these and from nothing else."""

    method: str
    data: str
    task: str  # fused | i2t | t2i
    bits: int
    measure: str
    value: float
    seed: int
    ties: str
    oracle_labels: bool
    queries: int
    queries_without_match: int
    database: str  # all | without_train

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def batches_in_order(split: Split, device: torch.device) -> Iterator[Batch]:
    """All items in their order, in batches of a fixed size."""
    inputs, labels = split.inputs(), torch.from_numpy(split.labels)
    for start in range(0, len(split), ENCODE_BATCH):
        rows = slice(start, min(start + ENCODE_BATCH, len(split)))
        index = torch.arange(rows.start, rows.stop)
        yield Batch(inputs.take(rows).to(device), labels[rows].float().to(device), index.to(device))


@torch.no_grad()
def encode(
    method: HashingMethod, split: Split, lengths: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Codes of all items at each length: {bits: {view: int8 [N, bits]}}. No label is passed on."""
    device = next(method.parameters()).device
    parts: dict[int, dict[str, list[Tensor]]] = {bits: {} for bits in lengths}
    for batch in batches_in_order(split, device):
        for bits, views in method.encode_lengths(batch.inputs, lengths).items():
            for view, codes in views.items():
                parts[bits].setdefault(view, []).append(codes.to(torch.int8).cpu())
    return {
        bits: {view: torch.cat(chunks).numpy() for view, chunks in views.items()}
        for bits, views in parts.items()
    }


def to_tasks(
    query: dict[str, np.ndarray], database: dict[str, np.ndarray], data: Dataset
) -> dict[str, Codes]:
    """The retrieval tasks that a method's views serve: fused, or i2t and t2i."""
    labels = data.query.labels, data.database.labels
    if "fused" in query:
        return {"fused": Codes(query["fused"], database["fused"], *labels)}
    return {
        "i2t": Codes(query["image"], database["text"], *labels),
        "t2i": Codes(query["text"], database["image"], *labels),
    }


def code_tasks(
    method: HashingMethod, data: Dataset, lengths: Sequence[int]
) -> dict[int, dict[str, Codes]]:
    """Codes of queries and database for every length and task."""
    method.eval()
    query = encode(method, data.query, lengths)
    database = encode(method, data.database, lengths)
    return {bits: to_tasks(query[bits], database[bits], data) for bits in lengths}


def records(
    title: str,
    data: Dataset,
    codes: dict[int, dict[str, Codes]],
    seed: int,
    measures: tuple[Measure, ...] = HEADLINE,
) -> list[Record]:
    """Measures of codes at every length, on the whole database and, where some of it was trained
    on and some not, on the database without the training items.
    """
    rows: list[Record] = []
    unseen = np.flatnonzero(np.isin(data.database.ids, without(data.database, data.train).ids))
    for bits, tasks in codes.items():
        for task, found in tasks.items():
            databases = {"all": found}
            if 0 < len(unseen) < len(data.database):
                databases["without_train"] = Codes(
                    found.query,
                    found.database[unseen],
                    found.query_labels,
                    found.database_labels[unseen],
                )
            for database, part in databases.items():
                for value in evaluate(part, measures):
                    rows += to_records(value, title, data.name, task, bits, seed, database)
    return rows


def to_records(
    value: Value, title: str, data: str, task: str, bits: int, seed: int, database: str
) -> list[Record]:
    """The headline record, and its twin over the queries that have a match."""
    both = ((value.measure, value.value), (f"{value.measure} (matched)", value.value_matched_only))
    return [
        Record(
            title,
            data,
            task,
            bits,
            name,
            number,
            seed,
            value.ties,
            False,
            value.queries,
            value.queries_without_match,
            database,
        )
        for name, number in both
    ]


def validation_score(method: HashingMethod, data: Dataset, lengths: Sequence[int]) -> float:
    """mAP@all (expected), the mean over lengths and tasks: what model selection compares."""
    scores = [
        evaluate(codes)[0].value
        for tasks in code_tasks(method, data, lengths).values()
        for codes in tasks.values()
    ]
    return float(np.mean(scores))
