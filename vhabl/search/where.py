"""Filters by label: label = 'cat' and not (label in ('dog', 'owl') or label != 'pet').

An item may have several labels: `label = 'x'` says that x is one of them, `label != 'x'` that it
is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from vhabl.errors import fail

_TOKEN = re.compile(r"\s*(?:('(?:[^']|'')*')|(\"(?:[^\"]|\"\")*\")|(!=|=|\(|\)|,)|(\w+)|(\S))")
_FORM = "label = 'NAME', != or in ('NAME', ...), joined by and, or, not and brackets"


@dataclass(frozen=True)
class Filter:
    """One node: `has` with a class number, or `not`, `and`, `or` over parts."""

    kind: str
    parts: tuple[Filter, ...] = ()
    label: int = -1

    def mask(self, labels: np.ndarray) -> np.ndarray:
        """Which items pass, [N] uint8, of labels packed as little-endian bits [N, ceil(C / 8)]."""
        if self.kind == "has":
            return (labels[:, self.label >> 3] >> np.uint8(self.label & 7)) & np.uint8(1)
        found = [part.mask(labels) for part in self.parts]
        if self.kind == "not":
            return found[0] ^ np.uint8(1)
        first, second = found
        return first & second if self.kind == "and" else first | second


def parse(text: str, class_names: Sequence[str]) -> Filter:
    """Raises VhablError naming what is wrong, or a label that there is not."""
    tokens = [match for match in _TOKEN.finditer(text) if match.group().strip()]
    return _Parser(text, tokens, list(class_names)).whole()


class _Parser:
    def __init__(self, text: str, tokens: list[re.Match[str]], names: list[str]) -> None:
        self.text, self.names, self.at = text, names, 0
        self.tokens = [token.group().strip() for token in tokens]

    def whole(self) -> Filter:
        found = self._either()
        if self.at < len(self.tokens):
            self._refuse()
        return found

    def _either(self) -> Filter:
        found = self._both()
        while self._takes("or"):
            found = Filter("or", (found, self._both()))
        return found

    def _both(self) -> Filter:
        found = self._one()
        while self._takes("and"):
            found = Filter("and", (found, self._one()))
        return found

    def _one(self) -> Filter:
        if self._takes("not"):
            return Filter("not", (self._one(),))
        if self._takes("("):
            found = self._either()
            self._needs(")")
            return found
        self._needs("label")
        if self._takes("="):
            return self._has()
        if self._takes("!="):
            return Filter("not", (self._has(),))
        self._needs("in")
        self._needs("(")
        found = self._has()
        while self._takes(","):
            found = Filter("or", (found, self._has()))
        self._needs(")")
        return found

    def _has(self) -> Filter:
        token = self._next()
        if len(token) < 2 or token[0] not in "'\"":
            self.at -= 1
            self._refuse()
        quote = token[0]
        name = token[1:-1].replace(2 * quote, quote)
        if name not in self.names:
            near = get_close_matches(name, self.names, 3, 0.0)
            fail(f"filter {self.text!r}: label", repr(name), f"one such as {', '.join(near)}")
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
        fail(f"filter {self.text!r}", found, _FORM)
