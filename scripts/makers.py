"""What the makers of pairs share: checks of an official download, and the writer of the raw layout.

A maker reads its download into a `Made`; `write` puts that into a folder that `read_pairs` reads.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
import scipy.io

from vhabl.system.errors import fail, plural

WRITTEN = {"caption.mat", "index.mat", "label.mat", "classes.txt", "words.txt"}
MAT_HEADER = b"MATLAB 5.0 MAT-file, image-text pairs".ljust(116)

AnyPath = TypeVar("AnyPath", bound=PurePath)


@dataclass(frozen=True)
class Made:
    """The items that a maker chose from a download, in the order of their rows."""

    index: list[str]  # the image's path as the download lists it, with slashes
    files: list[Path]  # where the image lies: absolute, of the base name that the index has
    captions: list[list[str]]  # one or more an item; a single empty one where there is none
    labels: np.ndarray  # [N, C] uint8 in {0, 1}
    class_names: list[str]  # C, in the order of the columns
    words: list[str] = field(default_factory=list)  # the tag vocabulary, where there is one
    tags: list[list[str]] = field(default_factory=list)  # an item's tags, also those not in words


def parser(description: str, download: str, out: str) -> argparse.ArgumentParser:
    """The arguments that all makers have."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("source", type=Path, help=f"folder of the unpacked {download}")
    result.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
    result.add_argument(
        "--force", action="store_true", help="replace what a maker wrote to --out before"
    )
    return result


def parse(arguments: argparse.ArgumentParser, given: list[str]) -> argparse.Namespace:
    """The arguments, both folders absolute. Raises VhablError where one cannot be used."""
    options = arguments.parse_args(given)
    options.source, options.out = options.source.resolve(), options.out.resolve()
    if not options.source.is_dir():
        fail(options.source, "no such folder", "Give the folder of the unpacked download")
    check_out(options.out, options.force)  # reading takes minutes: refuse before it
    return options


def check_out(out: Path, force: bool) -> None:
    """Raise VhablError unless a build may take the place of `out`.

    Even force replaces files of a maker only: they can be made again, others perhaps not.
    """
    if out.exists() and not out.is_dir():
        fail(out, "it is a file", "Give a folder as --out")
    content = sorted(out.iterdir()) if out.exists() else []
    foreign = [path.name for path in content if not _is_written(path)]
    if foreign:
        others = f" and {plural(len(foreign) - 1, 'other')}" if foreign[1:] else ""
        fail(out, f"it holds {foreign[0]}{others}, which no maker wrote", "Choose another --out")
    if content and not force:
        fail(out, "it was made before", "--force replaces it")


def _is_written(path: Path) -> bool:
    if path.name == "images":  # real images may be the only copy
        return path.is_symlink() or (path.is_dir() and all(p.is_symlink() for p in path.iterdir()))
    return path.name in WRITTEN and path.is_file()


def find(places: list[Path], download: str) -> Path:
    """The first place that exists. Raises VhablError, naming the download it is a part of."""
    for place in places:
        if place.exists():
            return place
    first, *others = dict.fromkeys(places)
    nor = "".join(f", nor {place}" for place in others)
    fail(first, f"no such file or folder{nor}", f"Unpack this part of {download}")


def read_lines(path: Path, content: str, pattern: str = ".*") -> list[str]:
    """A text file's lines without the space around them, up to the last that is not empty.

    content: what a line holds, for messages. Raises VhablError where the file is no UTF-8 text or
    a line does not match the pattern.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(path, f"its bytes are not UTF-8 (at {error.start})", f"It must have {content}")
    except IsADirectoryError:
        fail(path, "it is a folder", f"It must be a file with {content}")
    # Not splitlines: a tag may hold other characters that it takes for an end.
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    bad = {line for line in set(lines) if not re.fullmatch(pattern, line)}
    for number, line in enumerate(lines if bad else [], 1):
        if line in bad:
            fail(f"{path}: line {number}", repr(line), f"The file must have {content}")
    return lines


def require_images(files: list[Path], download: str) -> None:
    """Raise VhablError where images are missing: names the first and says how many there are."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        what = f"no such file; {len(missing):,} of {plural(len(files), 'image')} are missing"
        fail(missing[0], what, f"Get the images of {download}")


def by_base_name(paths: Iterable[AnyPath]) -> dict[str, AnyPath]:
    """Paths by their base name. Raises VhablError where two have the same one."""
    result: dict[str, AnyPath] = {}
    for path in paths:
        if path.name in result:
            do = "Images are found by their base names, which must differ"
            fail(path, f"{result[path.name]} has the same base name", do)
        result[path.name] = path
    return result


def write(made: Made, out: Path, force: bool = False) -> None:
    """Write the raw layout as a whole: `out` is as before until all of it is there.

    `out/images` is a link to the folder of the images or, where there are several, a folder of
    links to the images. Raises VhablError where there is no item, images share a base name or
    `out` may not be replaced, and OSError.
    """
    check_out(out, force)
    if not made.index:
        fail("selection", "no item is in it", "Choose a part with items")
    by_base_name(map(PurePath, made.index))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.tmp")
    if work.exists():  # left by a run that was killed
        shutil.rmtree(work)
    new, old = work / "new", work / "old"
    try:
        new.mkdir(parents=True)
        _write_files(made, new)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)


def _write_files(made: Made, folder: Path) -> None:
    captions = made.captions
    one_each = all(len(own) == 1 for own in captions)
    content = [own[0] for own in captions] if one_each else [_cells(own) for own in captions]
    _write_mat(folder / "caption.mat", {"caption": _cells(content)})
    _write_mat(folder / "index.mat", {"index": _cells(made.index)})
    _write_mat(folder / "label.mat", {"label": made.labels})
    _write_text(folder / "classes.txt", made.class_names)
    if made.words:
        _write_text(folder / "words.txt", made.words)
    images = folder / "images"
    folders = {file.parent for file in made.files}
    if len(folders) == 1:
        images.symlink_to(folders.pop(), target_is_directory=True)
    else:
        images.mkdir()
        for file in made.files:
            (images / file.name).symlink_to(file)


def _cells(content: list[str] | list[np.ndarray]) -> np.ndarray:
    """An N x 1 MATLAB cell array."""
    cells = np.empty((len(content), 1), object)
    for row, value in enumerate(content):
        cells[row, 0] = value
    return cells


def _write_mat(path: Path, variables: dict[str, np.ndarray]) -> None:
    scipy.io.savemat(path, variables, do_compression=True)
    with path.open("r+b") as file:
        file.write(MAT_HEADER)  # SciPy's holds the date: the same input is to give the same bytes


def _write_text(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def describe(made: Made, published: dict[str, int]) -> str:
    """What was made, a line each, beside the counts that papers give (pairs, classes, tags)."""
    found = {
        "pairs": len(made.index),
        "classes": len(made.class_names),
        "tags": len(made.words),
    }
    lines = []
    for name, count in published.items():
        same = found[name] == count
        lines.append(
            f"{name}: {found[name]:,}" + (", as published" if same else f"; published {count:,}")
        )
    sizes = [len(own) for own in made.captions if any(own)]
    lines.append(f"empty captions: {len(made.captions) - len(sizes):,}")
    if sizes:
        low, high = min(sizes), max(sizes)
        lines.append(f"captions an item: {low}" + (f" to {high}" if high > low else ""))
    return "\n".join(lines)
