"""The house rules: imports point one way, and no label can reach an encoder."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import vhabl
from vhabl import methods
from vhabl.types import Inputs

ROOT = Path(vhabl.__file__).parent

# A part may import from its own level and from those above it in this list.
LEVELS = (
    {"errors", "types"},
    {"files", "apart", "matfile", "published", "ranks", "settings", "stopping"},
    {"labels", "weights"},
    {"openclip", "cnn"},
    {"layers", "losses", "codes", "codebooks", "metrics", "optim", "scalars", "shards"},
    {"data", "encoders"},
    {"methods"},
    {"config"},
    {"evaluator", "cache"},
    {"trainer", "report", "runs"},
    {"train", "eval", "encode", "ablation", "audit", "baselines", "importance", "search"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}


def imported_parts(file: Path) -> set[str]:
    """Parts of vhabl that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vhabl.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "vhabl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vhabl."):
            found.add(str(node.module).split(".")[1])
    return found


def part_of(file: Path) -> str:
    """A package's own command is an entry point, which may import everything."""
    if file.name == "__main__.py":
        return "train"
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    assert part in LEVEL, f"{part} has no level: add it to LEVELS"
    for other in imported_parts(file) - {part}:
        assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which is above it"


def test_methods_know_no_data_measures_or_training() -> None:
    for file in (ROOT / "methods").glob("*.py"):
        assert not imported_parts(file) & {"data", "metrics", "trainer", "evaluator"}, file


def test_no_star_imports() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), file


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("function", ["embed", "relax_lengths", "encode", "encode_lengths"])
def test_no_encoder_has_a_label_parameter(name: str, function: str) -> None:
    parameters = inspect.signature(getattr(methods.get(name), function)).parameters
    assert not [p for p in parameters if "label" in p or p in ("y", "batch")]
    assert set(parameters) <= {"self", "inputs", "bits", "lengths"}


def test_inputs_hold_no_label() -> None:
    assert set(Inputs.__dataclass_fields__) == {"image", "text"}
