"""Filters by label: label = 'cat' and not (label in ('dog', 'owl') or label != 'pet').

An item may have several labels: `label = 'x'` says that x is one of them, `label != 'x'` that it
is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from unicodedata import normalize

import numpy as np

from vhabl.system.errors import fail

_TOKEN = re.compile(r"\s*(?:('(?:[^']|'')*')|(\"(?:[^\"]|\"\")*\")|(!=|=|\(|\)|,)|(\w+)|(\S))")
DEEPEST = 50  # brackets and negations in each other
_FORM = "label = 'NAME', != or in ('NAME', ...), joined by and, or, not and brackets"


@dataclass(frozen=True)
class Filter:
    """One node: `has` with a class number, `not` over one part, `and` or `or` over several."""

    kind: str
    parts: tuple[Filter, ...] = ()
    label: int = -1

    def mask(self, labels: np.ndarray) -> np.ndarray:
        """Which items pass, [N] uint8, of labels packed as little-endian bits [N, ceil(C / 8)]."""
        if self.kind == "has":
            return (labels[:, self.label >> 3] >> np.uint8(self.label & 7)) & np.uint8(1)
        if self.kind == "not":
            return self.parts[0].mask(labels) ^ np.uint8(1)
        join = np.bitwise_and if self.kind == "and" else np.bitwise_or
        found = self.parts[0].mask(labels)
        for part in self.parts[1:]:
            found = join(found, part.mask(labels))
        return found


def parse(text: str, class_names: Sequence[str]) -> Filter:
    """Raises VhablError naming what is wrong, or a label that there is not."""
    text = normalize("NFC", text)
    tokens = [match for match in _TOKEN.finditer(text) if match.group().strip()]
    return _Parser(text, tokens, list(class_names)).whole()


def _joined(kind: str, parts: Sequence[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else Filter(kind, tuple(parts))


class _Parser:
    def __init__(self, text: str, tokens: list[re.Match[str]], names: list[str]) -> None:
        self.text, self.names, self.at, self.depth = text, names, 0, 0
        self.tokens = [token.group().strip() for token in tokens]

    def whole(self) -> Filter:
        found = self._either()
        if self.at < len(self.tokens):
            self._refuse()
        return found

    def _either(self) -> Filter:
        parts = [self._both()]
        while self._takes("or"):
            parts.append(self._both())
        return _joined("or", parts)

    def _both(self) -> Filter:
        parts = [self._one()]
        while self._takes("and"):
            parts.append(self._one())
        return _joined("and", parts)

    def _one(self) -> Filter:
        if self._takes("not"):
            return Filter("not", (self._within(self._one),))
        if self._takes("("):
            found = self._within(self._either)
            self._needs(")")
            return found
        self._needs("label")
        if self._takes("="):
            return self._has()
        if self._takes("!="):
            return Filter("not", (self._has(),))
        self._needs("in")
        self._needs("(")
        parts = [self._has()]
        while self._takes(","):
            parts.append(self._has())
        self._needs(")")
        return _joined("or", parts)

    def _within(self, part: Callable[[], Filter]) -> Filter:
        self.depth += 1
        if self.depth > DEEPEST:
            fail("filter", f"more than {DEEPEST} brackets in each other", f"Write {_FORM}")
        found = part()
        self.depth -= 1
        return found

    def _has(self) -> Filter:
        token = self._next()
        if len(token) < 2 or token[0] not in "'\"":
            self.at -= 1
            self._refuse()
        quote = token[0]
        name = token[1:-1].replace(2 * quote, quote)
        if name not in self.names:
            near = ", ".join(get_close_matches(name, self.names, 3, 0.0))
            do = f"Did you mean {near}?" if near else "The index has no labels"
            fail(f"filter {self.text!r}", f"no label {name!r}", do)
        return Filter("has", label=self.names.index(name))

    def _next(self) -> str:
        token = self.tokens[self.at] if self.at < len(self.tokens) else ""
        self.at += 1
        return token

    def _takes(self, word: str) -> bool:
        found = self.at < len(self.tokens) and self.tokens[self.at].lower() == word
        self.at += found
        return found

    def _needs(self, word: str) -> None:
        if not self._takes(word):
            self._refuse()

    def _refuse(self) -> None:
        found = self.tokens[self.at] if self.at < len(self.tokens) else "its end"
        fail(f"filter {self.text!r}", f"it cannot be read at {found}", f"Write {_FORM}")
