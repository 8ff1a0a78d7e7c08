"""Published results, from configs/published.yaml: beside ours in tables, and in audits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import yaml

from vhabl.system.files import PROJECT

FILE = PROJECT / "configs" / "published.yaml"
# How data sets are called in the names of files and folders.
_ALIASES = {"mirflickr": ("flickr",), "nuswide": ("nus",), "coco": ("coco",)}


@dataclass(frozen=True)
class Published:
    """The figures of one method as its source gives them. values: {data: {task: one per bits}}.

    Empty lists stand for a table that exists but was not found as text.
    """

    method: str
    bits: list[int]
    values: dict[str, dict[str, list[float]]]
    protocol: str
    source: str
    oracle_labels: bool = False
    measure: str | None = None  # under its unmistakable name; None: not stated
    queries: dict[str, int] = field(default_factory=dict)  # {data: number}
    epoch: str | None = None  # what the best epoch was chosen on


@cache
def published() -> tuple[Published, ...]:
    """Every entry of the file, in its order."""
    return tuple(Published(**entry) for entry in yaml.safe_load(FILE.read_text(encoding="utf-8")))


def data_set_of(name: str) -> str | None:
    """The data set that a file or folder name speaks of.

    >>> data_set_of("Ours_16-flickr25k_bits.mat")
    'mirflickr'
    """
    for data, parts in _ALIASES.items():
        if any(part in name.lower() for part in parts):
            return data
    return None


def best_honest(name: str, task: str, bits: int) -> tuple[float, Published] | None:
    """The highest figure for the data set that `name` speaks of, without oracle labels."""
    data = data_set_of(name)
    found = [
        (entry.values[data][task][entry.bits.index(bits)], entry)
        for entry in published()
        if data in entry.values
        and task in entry.values[data]
        and bits in entry.bits
        and not entry.oracle_labels
    ]
    return max(found, key=lambda pair: pair[0], default=None)
