"""MATLAB 7.3 files as MATLAB writes them: HDF5, arrays transposed, a class on every variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse

HEADER_BYTES = 512
_CLASSES = {"float64": "double", "float32": "single", "bool": "logical"}


def write_mat73(path: Path, variables: dict[str, Any], header: bool = True) -> None:
    """Write arrays, sparse matrices, texts, cell columns (lists) and structures (dicts).

    header: with MATLAB's 512 bytes in front of the HDF5 content, as MATLAB itself writes them.
    """
    with h5py.File(path, "w", userblock_size=HEADER_BYTES if header else 0) as file:
        for name, value in variables.items():
            _write(file, name, value)
    if header:
        text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, HDF5 schema 1.00 ."
        with path.open("rb+") as raw:
            raw.write(text.ljust(116) + bytes(8) + b"\x00\x02IM")


def _write(file: h5py.File, name: str, value: Any) -> None:
    if scipy.sparse.issparse(value):
        _write_sparse(file, name, value)
    elif isinstance(value, dict):
        group = file.create_group(name)
        for field, content in value.items():
            _write(file, f"{name}/{field}", content)
        _mark(group, "struct")
    elif isinstance(value, list):
        references = [_write_cell(file, content) for content in value]
        cells = np.array([references], dtype=h5py.ref_dtype)  # (1, N): a column, transposed
        _mark(file.create_dataset(name, data=cells), "cell")
    elif isinstance(value, str):
        _write_char(file, name, [value])
    elif value.dtype.kind == "U":  # a char matrix: one text in each row, padded with blanks
        _write_char(file, name, [text.ljust(value.dtype.itemsize // 4) for text in value])
    else:
        kind = _CLASSES.get(value.dtype.name, value.dtype.name)
        stored = value.astype(np.uint8) if value.dtype == bool else value
        if value.size == 0:
            _write_empty(file, name, kind, value.shape)
        else:
            _mark(file.create_dataset(name, data=stored.T), kind)


def _write_cell(file: h5py.File, content: Any) -> h5py.Reference:
    place = f"#refs#/c{len(file.require_group('#refs#'))}"
    if isinstance(content, list):  # take the name before the inner cells take theirs
        file.create_dataset(f"{place}_taken", data=0)
    _write(file, place, content)
    return file[place].ref


def _write_char(file: h5py.File, name: str, rows: list[str]) -> None:
    units = np.array([np.frombuffer(text.encode("utf-16-le"), "<u2") for text in rows])
    if units.size == 0:
        _write_empty(file, name, "char", (0, 0))
        return
    _mark(file.create_dataset(name, data=units.T), "char")


def _write_sparse(file: h5py.File, name: str, value: Any) -> None:
    matrix = scipy.sparse.csc_matrix(value)
    group = file.create_group(name)
    if matrix.nnz:  # MATLAB leaves both out of a matrix of zeros
        group["data"] = matrix.data.astype(np.uint8) if matrix.dtype == bool else matrix.data
        group["ir"] = matrix.indices.astype(np.uint64)
    group["jc"] = matrix.indptr.astype(np.uint64)
    group.attrs["MATLAB_sparse"] = np.uint64(matrix.shape[0])
    _mark(group, _CLASSES[matrix.dtype.name])


def _write_empty(file: h5py.File, name: str, kind: str, shape: tuple[int, ...]) -> None:
    """MATLAB stores the sizes of an empty array in its place."""
    node = file.create_dataset(name, data=np.array(shape, np.uint64))
    node.attrs["MATLAB_empty"] = np.uint8(1)
    _mark(node, kind)


def _mark(node: h5py.Dataset | h5py.Group, kind: str) -> None:
    node.attrs["MATLAB_class"] = np.bytes_(kind)
    if kind == "char":
        node.attrs["MATLAB_int_decode"] = np.int32(2)
    if kind == "logical":
        node.attrs["MATLAB_int_decode"] = np.int32(1)
