"""The methods. A file in this folder is a method; its name is its registration."""

from __future__ import annotations

import importlib
import pkgutil

from vhabl.methods.base import HashingMethod

_NOT_METHODS = {"base"}


def names() -> list[str]:
    """Names of all methods, for `method: NAME` in a recipe."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS)


def get(name: str) -> type[HashingMethod]:
    """The method class that the file `vhabl/methods/<name>.py` defines."""
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, HashingMethod)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} defines {len(found)} methods; expected one")
    return found[0]
