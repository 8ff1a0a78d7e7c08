"""MATLAB files of versions 5 and 7.3, told apart by their content and never by their name."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import scipy.sparse

from vhabl.errors import VhablError, brief, fail

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_EXPECTED = "a MATLAB 5 or 7.3 file"


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, with or without MATLAB's 512-byte header. Raises VhablError."""
    try:
        with path.open("rb") as file:
            head = file.read(520)
    except FileNotFoundError:
        fail(path, "no such file", _EXPECTED)
    except IsADirectoryError:
        fail(path, "a folder", _EXPECTED)
    if head[:8] == _HDF5_SIGNATURE or head[512:520] == _HDF5_SIGNATURE:
        return True
    # A MATLAB 5 header is 124 bytes of text and offsets, then version 0x0100 and an endian mark.
    if len(head) >= 128 and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        return False
    fail(
        path,
        f"{len(head)} bytes that begin with {head[:8]!r}" if head else "an empty file",
        _EXPECTED,
    )


def read_mat(path: Path, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file as dense arrays in MATLAB's orientation.

    Version 7.3 stores each array transposed; it is turned back here. Sparse matrices become dense;
    cell arrays of strings become object arrays of str. keys: read these only, where present.
    Raises VhablError where the file is missing, damaged or of another kind.
    """
    wanted = None if keys is None else set(keys)
    hdf5 = is_hdf5(path)
    try:
        return _read_hdf5(path, wanted) if hdf5 else _read_v5(path, wanted)
    except (VhablError, MemoryError):
        raise
    except FileNotFoundError:
        raise
    # The readers raise many types on damaged bytes; none of them can be told from the others.
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RuntimeError,
        EOFError,
        AttributeError,
        NotImplementedError,
        OverflowError,
        zlib.error,
        UnicodeDecodeError,
        NameError,
    ) as error:
        fail(path, f"a damaged or truncated file ({brief(error)})", _EXPECTED)


def _read_v5(path: Path, wanted: set[str] | None) -> dict[str, np.ndarray]:
    names = None if wanted is None else sorted(wanted)
    content = scipy.io.loadmat(path, variable_names=names)
    return {k: _dense(v) for k, v in content.items() if not k.startswith("__")}


def _dense(value: Any) -> np.ndarray:
    if scipy.sparse.issparse(value):
        return np.asarray(value.todense())
    array = np.asarray(value)
    if array.dtype == object:  # a cell array: unwrap the 1-element arrays around its strings
        return np.frompyfunc(_unwrap, 1, 1)(array)
    return array


def _unwrap(cell: Any) -> Any:
    while isinstance(cell, np.ndarray) and cell.size == 1:
        cell = cell.flat[0]
    if isinstance(cell, np.ndarray) and cell.size == 0:
        return ""
    if isinstance(cell, np.ndarray) and cell.dtype == object:  # a cell array in a cell
        return np.frompyfunc(_unwrap, 1, 1)(cell)
    return str(cell) if isinstance(cell, np.str_) else cell


def _read_hdf5(path: Path, wanted: set[str] | None) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        names = [k for k in file if not k.startswith("#") and (wanted is None or k in wanted)]
        return {name: _hdf5_value(file, file[name]) for name in names}


def _hdf5_value(file: h5py.File, node: h5py.Group | h5py.Dataset) -> np.ndarray:
    if isinstance(node, h5py.Group):
        if "MATLAB_sparse" not in node.attrs:
            raise ValueError(f"{node.name} is a structure, not an array")
        columns = node["jc"][()]
        shape = (int(node.attrs["MATLAB_sparse"]), len(columns) - 1)
        data, rows = (node["data"][()], node["ir"][()]) if "data" in node else ([], [])
        return scipy.sparse.csc_matrix((data, rows, columns), shape=shape).toarray()
    matlab_class = node.attrs.get("MATLAB_class", b"")
    if node.attrs.get("MATLAB_empty", 0):
        return np.zeros((0, 0))
    array = node[()]
    if matlab_class == b"cell" or h5py.check_ref_dtype(node.dtype) is not None:
        cells = np.empty(array.T.shape, object)
        for place, reference in np.ndenumerate(array.T):
            cells[place] = _unwrap(_hdf5_value(file, file[reference]))
        return cells
    if matlab_class == b"char":
        return np.array([_text(row) for row in array.T])  # a row of a char matrix is a text
    return np.asarray(array).T


def _text(units: np.ndarray) -> str:
    return units.astype("<u2").tobytes().decode("utf-16-le", errors="replace")
