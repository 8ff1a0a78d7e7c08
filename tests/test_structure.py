"""The house rules: imports point one way, and no label can reach an encoder."""

from __future__ import annotations

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vhabl
from vhabl import methods
from vhabl.types import Inputs

ROOT = Path(vhabl.__file__).parent

# A part may import from its own level and from those above it in this list.
LEVELS = (
    {"types", "system", "settings"},
    {"nn"},
    {"encoders"},
    {"data"},
    {"methods", "codes", "metrics"},
    {"config"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"train", "eval", "encode", "audit", "studies"},
    {"search"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}


def imported_modules(file: Path) -> set[str]:
    """Modules of vhabl that a file imports, dotted and without `vhabl.`: also inside functions and
    for type checking.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")[1:]
            for alias in node.names:
                module = ROOT.joinpath(*parts, alias.name)
                is_module = module.is_dir() or module.with_suffix(".py").is_file()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name.removeprefix("vhabl.") for name in found if name.startswith("vhabl.")}


def imported_parts(file: Path) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(file)}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(file: Path) -> str:
    """A package's own command is an entry point, which may import everything."""
    return "search" if file.name == "__main__.py" else name_of(file).split(".")[0]


FILES = sorted(f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    assert part in LEVEL, f"{part} has no level: add it to LEVELS"
    for other in imported_parts(file) - {part}:
        assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which is above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a package too. A package and its own modules count as one where it imports them."""
    graph = {name_of(f): imported_modules(f) for f in FILES}
    graph = {
        n: {m for m in to if m in graph and not n.startswith(f"{m}.")} for n, to in graph.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_methods_know_no_data_measures_or_training() -> None:
    for file in (ROOT / "methods").glob("*.py"):
        assert not imported_parts(file) & {"data", "metrics", "training", "evaluation"}, file


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
