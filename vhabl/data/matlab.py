"""MATLAB files of versions 5 and 7.3, told apart by their content and never by their name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import scipy.sparse

from vhabl.system.apart import BLOCK, Blocks, read_apart
from vhabl.system.errors import fail

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_EXPECTED = "a MATLAB 5 or 7.3 file"


def is_hdf5(path: Path, expected: str = _EXPECTED) -> bool:
    """Whether a file is HDF5, with or without MATLAB's 512-byte header. Raises VhablError, which
    says what was expected.
    """
    try:
        with path.open("rb") as file:
            head = file.read(520)
    except FileNotFoundError:
        fail(path, "no such file", f"Give {expected}")
    except IsADirectoryError:
        fail(path, "it is a folder", f"Give {expected}")
    if head[:8] == _HDF5_SIGNATURE or head[512:520] == _HDF5_SIGNATURE:
        return True
    # A MATLAB 5 header is 124 bytes of text and offsets, then version 0x0100 and an endian mark.
    if len(head) >= 128 and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        return False
    found = f"a file that begins with {head[:8]!r}" if head else "an empty file"
    fail(path, found, f"It must be {expected}")


def read_mat(
    path: Path, keys: Iterable[str] | None = None, expected: str = _EXPECTED
) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file as dense arrays in MATLAB's orientation.

    Version 7.3 stores each array transposed; it is turned back here. Sparse matrices become dense;
    cell arrays of strings become object arrays of str, rows of char matrices texts without the
    blanks at their ends. keys: read these only, where present. The file is read by another
    process (`vhabl.system.apart`). Raises VhablError where it is missing, damaged or of another
    kind, which says what was expected.
    """
    wanted = None if keys is None else set(keys)
    read = _read_hdf5 if is_hdf5(path, expected) else _read_v5
    return read_apart(path, lambda: read(path, wanted), expected)


def _read_v5(path: Path, wanted: set[str] | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, _, _ in scipy.io.whosmat(path):
        if wanted is None or name in wanted:
            yield name, _dense(scipy.io.loadmat(path, variable_names=[name])[name])


def _dense(value: Any) -> np.ndarray:
    if scipy.sparse.issparse(value):
        return _checked(value).toarray()
    array = np.asarray(value)
    if array.dtype == object:  # a cell array: unwrap the 1-element arrays around its strings
        return np.frompyfunc(_unwrap, 1, 1)(array)
    return _unpadded(array)


def _unpadded(array: np.ndarray) -> np.ndarray:
    """Without the blanks that make the rows of a char matrix equally long."""
    return np.char.rstrip(array, " ") if array.dtype.kind == "U" and array.size > 1 else array


def _unwrap(cell: Any) -> Any:
    while isinstance(cell, np.ndarray) and cell.size == 1:
        cell = cell.flat[0]
    if isinstance(cell, np.ndarray) and cell.size == 0:
        return ""
    if isinstance(cell, np.ndarray) and cell.dtype == object:  # a cell array in a cell
        return np.frompyfunc(_unwrap, 1, 1)(cell)
    if isinstance(cell, np.ndarray):
        return _unpadded(cell)
    return str(cell) if isinstance(cell, np.str_) else cell


def _checked(matrix: Any) -> Any:
    """A sparse matrix whose indices lie within it. Raises ValueError where they do not."""
    matrix.check_format(full_check=True)
    return matrix


def _read_hdf5(path: Path, wanted: set[str] | None) -> Iterator[tuple[str, np.ndarray | Blocks]]:
    with h5py.File(path, "r") as file:
        for name in file:
            if name.startswith("#") or (wanted is not None and name not in wanted):
                continue
            node = _held(file, name)
            if wanted is None and node.attrs.get("MATLAB_class") == b"struct":
                continue  # it stands beside the arrays
            yield name, _in_blocks(node) if _is_numeric(node) else _hdf5_value(file, node)


def _held(place: h5py.Group, name: str | h5py.Reference) -> h5py.Group | h5py.Dataset:
    """A part of a file. Raises ValueError where its content lies in another one: who made this file
    may not be allowed to read that.
    """
    node = place[name]
    elsewhere = h5py.h5f.get_name(node.id) != h5py.h5f.get_name(place.id)
    if isinstance(node, h5py.Dataset):
        stored = node.id.get_create_plist()
        elsewhere |= stored.get_external_count() > 0 or stored.get_layout() == h5py.h5d.VIRTUAL
    if elsewhere:
        raise ValueError(f"{node.name} lies in another file")
    return node


def _is_numeric(node: h5py.Group | h5py.Dataset) -> bool:
    return (
        isinstance(node, h5py.Dataset)
        and node.ndim > 0
        and node.dtype.kind in "fiub"
        and node.attrs.get("MATLAB_class") not in (b"cell", b"char")
        and not node.attrs.get("MATLAB_empty", 0)
    )


def _in_blocks(node: h5py.Dataset) -> Blocks:
    """An array of numbers, read by whole chunks of the file."""
    row = node.dtype.itemsize * math.prod(node.shape[1:])
    chunk = node.chunks[0] if node.chunks else 1
    step = chunk * max(1, BLOCK // max(1, row * chunk))
    parts = (node[start : start + step] for start in range(0, node.shape[0], step))
    return Blocks(node.shape, node.dtype, parts, turned=True)


def _hdf5_value(file: h5py.File, node: h5py.Group | h5py.Dataset) -> np.ndarray:
    if isinstance(node, h5py.Group):
        if "MATLAB_sparse" not in node.attrs:
            fail(f"{file.filename}: key {node.name[1:]}", "a structure", "It must be an array")
        columns = _held(node, "jc")[()]
        shape = (int(node.attrs["MATLAB_sparse"]), len(columns) - 1)
        data, rows = [], []  # of a matrix without entries MATLAB stores neither
        if "data" in node:
            data, rows = _held(node, "data")[()], _held(node, "ir")[()]
        return _checked(scipy.sparse.csc_matrix((data, rows, columns), shape=shape)).toarray()
    matlab_class = node.attrs.get("MATLAB_class", b"")
    if node.attrs.get("MATLAB_empty", 0):
        return np.zeros((0, 0))
    array = node[()]
    if matlab_class == b"cell" or h5py.check_ref_dtype(node.dtype) is not None:
        cells = np.empty(array.T.shape, object)
        for place, reference in np.ndenumerate(array.T):
            cells[place] = _unwrap(_hdf5_value(file, _held(file, reference)))
        return cells
    if matlab_class == b"char":
        rows = [_text(row) for row in array.T]  # a row of a char matrix is a text
        return _unpadded(np.array(rows))
    return np.asarray(array).T


def _text(units: np.ndarray) -> str:
    return units.astype("<u2").tobytes().decode("utf-16-le", errors="replace")
