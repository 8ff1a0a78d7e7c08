"""MATLAB files of both versions, feature files and image-text pairs, whole and damaged."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import re
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from helpers import picture_arrays, write_arrays, write_feature_file
from mat73 import write_mat73
from PIL import Image

from vhabl.data import __main__ as data_command
from vhabl.data import collection, load, validation_split, without
from vhabl.data.features import load_features
from vhabl.data.images import ImageFiles, open_image, read, read_pixels, read_whole, to_pixels
from vhabl.data.matlab import is_hdf5, read_mat
from vhabl.data.pairs import (
    Pairs,
    describe_images,
    describe_pairs,
    draw,
    read_pairs,
    to_splits,
    words,
)
from vhabl.data.table import read_items, read_table
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import VhablError
from vhabl.types import Rows, Split

PROJECT = Path(__file__).resolve().parents[2]
EMOJI = PROJECT / "dataset" / "emoji"
WIKI = PROJECT.parent / "shared" / "data" / "wiki"
ROWS = {"tr": 5, "db": 6, "te": 3}
KEYS = [f"{part}_{role}" for role in ROWS for part in "ITL"]

Write = Callable[[Path, dict[str, Any]], None]


def cell_column(content: list[Any]) -> np.ndarray:
    """A list as the cell array that savemat writes: N x 1, lists in it as cells in cells."""
    cells = np.empty((len(content), 1), object)
    for row, value in enumerate(content):
        cells[row, 0] = cell_column(value) if isinstance(value, list) else value
    return cells


def write_mat5(path: Path, variables: dict[str, Any], compress: bool = False) -> None:
    content = {k: cell_column(v) if isinstance(v, list) else v for k, v in variables.items()}
    with path.open("wb") as file:  # given a path, savemat would add .mat to other names
        scipy.io.savemat(file, content, do_compression=compress)


def write_mat5_compressed(path: Path, variables: dict[str, Any]) -> None:
    write_mat5(path, variables, compress=True)


def write_mat73_bare(path: Path, variables: dict[str, Any]) -> None:
    write_mat73(path, variables, header=False)


WRITERS: dict[str, Write] = {
    "5": write_mat5,
    "5 compressed": write_mat5_compressed,
    "7.3": write_mat73,
    "7.3 without header": write_mat73_bare,
}
BOTH: dict[str, Write] = {"5": write_mat5, "7.3": write_mat73}
each_version = pytest.mark.parametrize("write", BOTH.values(), ids=BOTH)


def feature_arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for role, rows in ROWS.items():
        arrays[f"I_{role}"] = rng.normal(size=(rows, 4))
        arrays[f"T_{role}"] = (rng.random((rows, 2)) < 0.5).astype(np.uint8)
        arrays[f"L_{role}"] = np.eye(3, dtype=np.uint8)[np.arange(rows) % 3]
    return arrays


def features_config(path: Path | str = "f.mat") -> DataConfig:
    return DataConfig(name="own", kind="features", path=str(path))


def assert_fails(call: Callable[[], Any], path: Path, parts: list[str]) -> None:
    with pytest.raises(VhablError) as caught:
        call()
    message = str(caught.value)
    for part in (str(path), ". ", *parts):
        assert part in message, message


def assert_equal_splits(found: tuple[Split, ...], expected: tuple[Split, ...]) -> None:
    for split, other in zip(found, expected, strict=True):
        for name in ("ids", "image", "text", "labels"):
            array, own = getattr(split, name), getattr(other, name)
            assert array.dtype == own.dtype
            np.testing.assert_array_equal(array, own, err_msg=name)


# Variables of MATLAB files

GRID = np.arange(6).reshape(2, 3)  # not square: a forgotten transposition shows
HALF_EMPTY = np.array([[0.0, 1.5, 0.0], [2.5, 0.0, 0.0]])
NUMBERS: dict[str, tuple[Any, Any]] = {  # what is written, what is read
    "double": (GRID / 7, GRID / 7),
    "single": (GRID.astype(np.float32), GRID),
    "int16": (GRID.astype(np.int16) - 3, GRID - 3),
    "uint8": (GRID.astype(np.uint8), GRID),
    "int64": (GRID.astype(np.int64), GRID),
    "logical": (GRID % 2 == 0, GRID % 2 == 0),
    "scalar": (np.array([[7.0]]), [[7]]),
    "row": (GRID[:1].astype(float), [[0, 1, 2]]),
    "column": (GRID[:, :1].astype(float), [[0], [3]]),
    "sparse": (scipy.sparse.csc_matrix(HALF_EMPTY), HALF_EMPTY),
    "sparse logical": (scipy.sparse.csc_matrix(HALF_EMPTY > 0), HALF_EMPTY > 0),
    "sparse zeros": (scipy.sparse.csc_matrix((2, 3)), np.zeros((2, 3))),
    "three ways": (np.arange(24.0).reshape(2, 3, 4), np.arange(24.0).reshape(2, 3, 4)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_read_as_written(tmp_path: Path, write: Write, kind: str) -> None:
    written, expected = NUMBERS[kind]
    path = tmp_path / "x.mat"
    write(path, {"x": written})
    found = read_mat(path)
    assert list(found) == ["x"]
    assert type(found["x"]) is np.ndarray and found["x"].dtype.kind in "fiub"
    np.testing.assert_array_equal(found["x"], expected)


TEXTS: dict[str, tuple[Any, list[Any]]] = {
    "one text": ("a dog", ["a dog"]),
    "cells": (["a dog", "two cats"], ["a dog", "two cats"]),
    "one cell": (["a dog"], ["a dog"]),
    "empty cell": (["a dog", "", "cat"], ["a dog", "", "cat"]),
    "letters of the world": (
        ["São Tomé", "日本", "\U0001f600"],
        ["São Tomé", "日本", "\U0001f600"],
    ),
    "rows of a char matrix": (np.array(["dog", "a cat"]), ["dog", "a cat"]),
}


@each_version
@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_read_as_written(tmp_path: Path, write: Write, kind: str) -> None:
    written, expected = TEXTS[kind]
    path = tmp_path / "x.mat"
    write(path, {"x": written})
    found = read_mat(path)["x"]
    assert found.reshape(-1).tolist() == expected
    assert all(isinstance(text, str) for text in found.reshape(-1))


def test_cells_keep_their_orientation(tmp_path: Path) -> None:
    shapes = []
    for write in BOTH.values():
        path = tmp_path / "x.mat"
        write(path, {"x": ["a", "b", "c"]})
        shapes.append(read_mat(path)["x"].shape)
    assert shapes == [(3, 1), (3, 1)]


@each_version
def test_only_the_keys_asked_for_are_read(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "x.mat"
    write(path, {"x": GRID, "y": GRID, "s": {"a": GRID}})
    assert list(read_mat(path, ["y", "z"])) == ["y"]


@pytest.mark.parametrize(
    ("write", "hdf5"), [(write_mat5, False), (write_mat73, True), (write_mat73_bare, True)]
)
@pytest.mark.parametrize("name", ["x.mat", "x.h5", "x.hdf5", "x"])
def test_the_content_tells_the_version_not_the_name(
    tmp_path: Path, write: Write, hdf5: bool, name: str
) -> None:
    path = tmp_path / name
    write(path, {"x": GRID})
    assert is_hdf5(path) is hdf5
    np.testing.assert_array_equal(read_mat(path)["x"], GRID)


def test_a_big_endian_file_is_read(tmp_path: Path) -> None:
    """By hand: header, then one 2 x 1 double matrix 'x' of [1, 2] in big-endian order."""

    def element(kind: int, content: bytes) -> bytes:
        size = len(content)
        return kind.to_bytes(4, "big") + size.to_bytes(4, "big") + content + bytes(-size % 8)

    matrix = (
        element(6, (6).to_bytes(4, "big") + bytes(4))
        + element(5, (2).to_bytes(4, "big") + (1).to_bytes(4, "big"))
        + element(1, b"x")
        + element(9, np.array([1.0, 2.0], ">f8").tobytes())
    )
    path = tmp_path / "x.mat"
    path.write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(116) + bytes(8) + b"\x01\x00MI" + element(14, matrix)
    )
    assert read_mat(path)["x"].tolist() == [[1], [2]]


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("I_tr.csv", "1,2,3\n" * 100)
    return file.getvalue()


FOREIGN = {
    "empty": (b"", "an empty file"),
    "text": (b"I_tr,T_tr\n" * 100, "I_tr"),
    "short text": (b"1 2 3", "begins with b'1 2 3'"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(1000), "PNG"),
    "zip": (zip_bytes(), "PK"),
    "zeros": (bytes(1000), "a file that begins with"),
    "header of 7.3 alone": (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "MATLAB"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    content, found = FOREIGN[name]
    path = tmp_path / "f.mat"
    path.write_bytes(content)
    assert_fails(lambda: read_mat(path), path, [found, "MATLAB 5 or 7.3"])


def test_a_folder_and_no_file_are_named(tmp_path: Path) -> None:
    assert_fails(lambda: read_mat(tmp_path), tmp_path, ["a folder"])
    path = tmp_path / "absent.mat"
    assert_fails(lambda: read_mat(path), path, ["no such file"])


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_cut_at_any_place_is_named(tmp_path: Path, write: Write) -> None:
    whole, path = tmp_path / "whole.mat", tmp_path / "cut.mat"
    # Doubles: a cut in the padding after bytes would lose nothing.
    write(whole, {k: v.astype(np.float64) for k, v in feature_arrays().items()})
    content = whole.read_bytes()
    step = max(1, len(content) // 100)
    for cut in (*range(0, len(content), step), len(content) - 1):
        path.write_bytes(content[:cut])
        assert_fails(lambda: load_features(path, features_config()), path, [])


def test_damaged_bytes_of_hdf5_give_arrays_or_a_message(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.mat", tmp_path / "damaged.mat"
    write_mat73(whole, feature_arrays())
    content = whole.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 100)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged number may be too large for float32
            try:
                load_features(path, features_config())
            except VhablError as error:
                assert str(path) in str(error)


def test_damaged_compressed_data_is_named(tmp_path: Path) -> None:
    """Places in the numbers alone: scipy can crash on damaged sizes."""
    path = tmp_path / "damaged.mat"
    write_mat5_compressed(path, {"x": np.random.default_rng(0).normal(size=(40, 40))})
    content = path.read_bytes()
    for place in range(len(content) // 2, len(content) - 100, 400):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        assert_fails(lambda: read_mat(path), path, ["damaged"])


def test_a_damaged_class_of_an_array_is_named(tmp_path: Path) -> None:
    """Byte 144 is the class of the first variable; scipy's own code fails on an unknown one."""
    path = tmp_path / "damaged.mat"
    write_mat5(path, {"x": GRID})
    content = bytearray(path.read_bytes())
    content[144] ^= 0xFF
    path.write_bytes(content)
    assert_fails(lambda: read_mat(path), path, ["damaged"])


@pytest.mark.parametrize("how", ["link", "storage", "view", "cell", "sparse"])
def test_hdf5_gives_nothing_of_other_files(how: str, tmp_path: Path) -> None:
    """Who made it may not be allowed to read them."""
    Path("secret").write_bytes(b"secret..")
    with h5py.File("other.h5", "w") as other:
        other["x"] = np.arange(3)
    with h5py.File(tmp_path / "x.mat", "w") as file:
        stored = {"shape": (8,), "dtype": np.uint8, "external": [("secret", 0, 8)]}
        if how == "link":
            file["x"] = h5py.ExternalLink("other.h5", "x")
        if how == "storage":
            file.create_dataset("x", **stored)
        if how == "view":
            layout = h5py.VirtualLayout((3,), np.int64)
            layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
            file.create_virtual_dataset("x", layout)
        if how == "cell":
            there = file.create_dataset("#refs#/a", **stored)
            cells = file.create_dataset("x", (1, 1), h5py.ref_dtype)
            cells[0, 0] = there.ref
        if how == "sparse":
            file.create_group("x").attrs["MATLAB_sparse"] = 1
            file["x"].create_dataset("jc", **stored)
    found = r"x\.mat.*lies in another file"
    with pytest.raises(VhablError, match=found):
        read_mat(tmp_path / "x.mat")


# Feature files


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_features_become_splits(tmp_path: Path, write: Write) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    write(path, arrays)
    splits = load_features(path, features_config())
    for split, role in zip(splits, ("tr", "db", "te"), strict=True):
        assert len(split) == ROWS[role]
        assert (split.image.dtype, split.text.dtype) == (np.float32, np.float32)
        assert split.labels.dtype == np.uint8
        np.testing.assert_array_equal(split.image, arrays[f"I_{role}"].astype(np.float32))
        np.testing.assert_array_equal(split.text, arrays[f"T_{role}"])
        np.testing.assert_array_equal(split.labels, arrays[f"L_{role}"])


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "double": lambda a: a.astype(np.float64),
    "single": lambda a: a.astype(np.float32),
    "int32": lambda a: a.astype(np.int32),
    "logical": lambda a: a > 0,
    "sparse": lambda a: scipy.sparse.csc_matrix(a.astype(np.float64)),
}


@each_version
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_numbers_gives_the_same_splits(
    tmp_path: Path, write: Write, form: str
) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    write_mat5(path, arrays)
    expected = load_features(path, features_config())
    changed = {k: v if k[0] == "I" else FORMS[form](v) for k, v in arrays.items()}
    write(path, changed)
    assert_equal_splits(load_features(path, features_config()), expected)


COLUMNS: dict[str, Callable[[np.ndarray, str], Any]] = {
    "N x 1": lambda c, role: c[:, None],
    "1 x N": lambda c, role: c[None, :],
    "both": lambda c, role: c[None, :] if role == "te" else c[:, None],
    "double": lambda c, role: c[:, None].astype(np.float64),
}


@each_version
@pytest.mark.parametrize("form", COLUMNS)
def test_class_numbers_give_the_labels_that_one_hot_gives(
    tmp_path: Path, write: Write, form: str
) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    write(path, arrays)
    expected = load_features(path, features_config())
    for role, rows in ROWS.items():
        arrays[f"L_{role}"] = COLUMNS[form]((np.arange(rows) % 3 + 1).astype(np.uint8), role)
    write(path, arrays)
    assert_equal_splits(load_features(path, features_config()), expected)


def test_a_class_that_queries_alone_have_is_a_class_of_all(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for role, rows in ROWS.items():
        arrays[f"L_{role}"] = np.ones((rows, 1))
    arrays["L_te"][2] = 4
    write_mat5(path, arrays)
    train, _, query = load_features(path, features_config())
    assert train.labels.tolist() == [[1, 0, 0, 0]] * 5
    assert query.labels.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_one_column_of_0_and_1_is_refused_as_it_may_be_two_classes(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for role, rows in ROWS.items():
        arrays[f"L_{role}"] = np.arange(rows)[:, None] % 2
    write_mat5(path, arrays)
    with pytest.raises(VhablError, match=r"key L_tr.*one column of 0 and 1.*class numbers"):
        load(features_config(path))


def test_features_that_float32_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for role in ROWS:
        arrays[f"I_{role}"] = arrays[f"I_{role}"] + 1.7e9
    write_mat5(path, arrays)
    with pytest.raises(VhablError, match=r"key I_tr.*1\.7e\+09 give or take"):
        load(features_config(path))
    for role, rows in ROWS.items():
        arrays[f"I_{role}"] = np.full((rows, 4), 1.7e9) + 1e6 * np.arange(rows)[:, None]
    write_mat5(path, arrays)
    load(features_config(path))


def test_a_large_class_number_takes_no_square_of_memory(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for role, rows in ROWS.items():
        arrays[f"L_{role}"] = np.full((rows, 1), 40_000)
    write_mat5(path, arrays)
    tracemalloc.start()
    try:
        query = load_features(path, features_config())[2]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert query.labels.shape == (3, 40_000) and query.labels.sum() == 3
    assert peak < 100e6


def test_one_query_with_one_hot_labels_is_no_row_of_class_numbers(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for part in "ITL":
        arrays[f"{part}_te"] = arrays[f"{part}_te"][1:2]
    write_mat5(path, arrays)
    query = load_features(path, features_config())[2]
    assert query.labels.tolist() == [[0, 1, 0]]


def test_ids_follow_the_content(tmp_path: Path) -> None:
    """So that "the database without the training items" is exact."""
    path, arrays = tmp_path / "f.mat", feature_arrays()
    for part in "IT":
        arrays[f"{part}_db"][1:3] = arrays[f"{part}_tr"][3:5]
    arrays["I_db"][4] = arrays["I_tr"][0]  # the image alone is not the item
    arrays["T_db"][4] = 1 - arrays["T_tr"][0]
    write_mat5(path, arrays)
    train, database, _ = load_features(path, features_config())
    assert database.ids[1:3].tolist() == train.ids[3:5].tolist()
    np.testing.assert_array_equal(without(database, train).image, database.image[[0, 3, 4, 5]])


def set_value(key: str, value: float) -> dict[str, Any]:
    arrays = feature_arrays()
    arrays[key] = arrays[key].astype(np.float64)
    arrays[key][1, 0] = value
    return arrays


def set_labels(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    columns = {f"L_{r}": change(np.arange(n)[:, None] % 3 + 1.0) for r, n in ROWS.items()}
    return feature_arrays() | columns


BAD_FEATURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "fewer image rows": (
        feature_arrays() | {"I_te": np.ones((2, 4))},
        ["2 rows in I_te", "3 rows in T_te", "3 rows in L_te"],
    ),
    "fewer text rows": (
        feature_arrays() | {"T_tr": np.ones((4, 2))},
        ["5 rows in I_tr", "4 rows in T_tr", "5 rows in L_tr"],
    ),
    "fewer label rows": (
        feature_arrays() | {"L_db": np.ones((5, 3))},
        ["6 rows in I_db", "6 rows in T_db", "5 rows in L_db"],
    ),
    "image widths": (
        feature_arrays() | {"I_te": np.ones((3, 5))},
        ["4 columns in I_tr", "4 columns in I_db", "5 columns in I_te"],
    ),
    "text widths": (
        feature_arrays() | {"T_db": np.ones((6, 1))},
        ["2 columns in T_tr", "1 columns in T_db", "2 columns in T_te"],
    ),
    "label widths": (
        feature_arrays() | {"L_tr": np.ones((5, 2))},
        ["2 columns in L_tr", "3 columns in L_db", "3 columns in L_te"],
    ),
    "nan": (set_value("I_db", np.nan), ["I_db", "nan in row 2, column 1", "1 such value"]),
    "infinity": (set_value("T_te", np.inf), ["T_te", "inf in row 2, column 1", "finite"]),
    "beyond single": (set_value("I_tr", 1e300), ["I_tr", "1e+300 in row 2", "finite"]),
    "label 2": (set_value("L_tr", 2), ["L_tr", "2 in row 2, column 1", "0 and 1"]),
    "label half": (set_value("L_te", 0.5), ["L_te", "0.5 in row 2, column 1", "0 and 1"]),
    "label negative": (set_value("L_db", -1), ["L_db", "-1 in row 2, column 1", "0 and 1"]),
    "label nan": (set_value("L_db", np.nan), ["L_db", "nan in row 2, column 1", "0 and 1"]),
    "classes from 0": (set_labels(lambda c: c - 1), ["L_tr", "0 in row 1", "from 1"]),
    "fractional class": (set_labels(lambda c: c + 0.5), ["L_tr", "1.5 in row 1", "whole"]),
    "class nan": (
        feature_arrays() | set_labels(lambda c: c) | {"L_te": np.array([[1], [np.nan], [2]])},
        ["L_te", "nan in row 2"],
    ),
    "class of another kind": (set_labels(lambda c: c * 1e6), ["L_tr", "row 1", "class numbers"]),
    "columns and one-hot": (
        set_labels(lambda c: c) | {"L_te": np.eye(3)},
        ["1 columns in L_tr", "1 columns in L_db", "3 columns in L_te"],
    ),
    "no items": (feature_arrays() | {"I_tr": np.zeros((0, 4))}, ["I_tr", "items x features"]),
    "no features": (feature_arrays() | {"T_te": np.zeros((3, 0))}, ["T_te", "items x features"]),
    "no labels": (feature_arrays() | {"L_te": np.zeros((3, 0))}, ["L_te", "items x classes"]),
    "text for numbers": (feature_arrays() | {"I_tr": "features"}, ["I_tr", "items x features"]),
    "texts for labels": (feature_arrays() | {"L_db": ["cat", "dog"]}, ["L_db", "items x classes"]),
    "structure": (feature_arrays() | {"T_db": {"a": GRID}}, ["T_db", "a"]),
    "three ways": (feature_arrays() | {"I_tr": np.ones((5, 2, 2))}, ["I_tr", "(5, 2, 2)"]),
}


@each_version
@pytest.mark.parametrize("name", BAD_FEATURES)
@pytest.mark.filterwarnings("error")  # the message says it all
def test_bad_features_are_named(tmp_path: Path, write: Write, name: str) -> None:
    arrays, parts = BAD_FEATURES[name]
    path = tmp_path / "f.mat"
    write(path, arrays)
    assert_fails(lambda: load_features(path, features_config()), path, parts)


@each_version
@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(tmp_path: Path, write: Write, key: str) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    del arrays[key]
    write(path, {**arrays, "more": GRID})
    assert_fails(lambda: load_features(path, features_config()), path, [f"no key {key}", "more"])


def test_wiki_is_the_same_in_both_versions() -> None:
    paths = [WIKI / "wiki_sift_twt.mat", WIKI / "wiki_sift_twt_v73.mat"]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path.name} is not part of the project and is not beside it")
    v5, v73 = (load_features(path, features_config()) for path in paths)
    assert_equal_splits(v5, v73)
    train, database, query = v5
    assert (len(train), len(database), len(query)) == (2173, 2173, 693)
    assert (train.image.shape[1], train.text.shape[1], train.labels.shape[1]) == (128, 10, 10)
    fingerprints = {load(features_config(path)).fingerprint for path in paths}
    assert len(fingerprints) == 1


# The data set as a whole


def test_items_without_a_label_are_reported(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    arrays["L_db"][[0, 2]] = 0
    arrays["L_te"][1] = 0
    write_mat5(path, arrays)
    found = load(features_config(path))
    assert found.notes == ("database: 2 items without a label", "query: 1 item without a label")
    assert len(found.database) == 6
    write_mat5(path, feature_arrays())
    assert load(features_config(path)).notes == ()


def test_a_label_of_all_and_queries_that_are_trained_on_are_said(tmp_path: Path) -> None:
    path, arrays = tmp_path / "f.mat", feature_arrays()
    arrays["L_db"][:, 1] = 1
    for part in "ITL":
        arrays[f"{part}_te"][:2] = arrays[f"{part}_tr"][:2]
    write_mat5(path, arrays)
    assert load(features_config(path)).notes == (
        "all items to search have the label class 2: any two of them are similar",
        "trained on too: 2 queries",
    )


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("features", "I_tr"), ("pairs", "caption.mat"), ("npy", "train_image_label.npy")],
)
def test_a_missing_data_set_says_where_it_comes_from(
    tmp_path: Path, kind: str, layout: str
) -> None:
    path = tmp_path / "absent"
    config = DataConfig(name="own", kind=kind, path=str(path), source="a page")
    assert_fails(lambda: load(config), path, ["own", "source: a page", layout, "data.path="])


def test_class_names_are_as_many_as_labels_have_columns(tmp_path: Path) -> None:
    path = tmp_path / "f.mat"
    write_mat5(path, feature_arrays())
    config = replace(features_config(path), class_names=["cat", "dog", "owl", "one too many"])
    where = Path("data.class_names")
    assert_fails(lambda: load(config), where, ["4 names for 3 columns of labels"])
    assert load(replace(config, class_names=config.class_names[:3])).class_names[0] == "cat"


def test_fingerprint_follows_the_content_not_the_file(tmp_path: Path) -> None:
    prints = []
    for number, (write, key) in enumerate(
        [
            (write_mat5, ""),
            (write_mat73, ""),
            (write_mat5, "I_tr"),
            (write_mat5, "T_te"),
            (write_mat5, "L_db"),
        ]
    ):
        path, arrays = tmp_path / f"{number}.mat", feature_arrays()
        if key:
            arrays[key][0, 0] = 1 - arrays[key][0, 0]
        write(path, arrays)
        prints.append(load(features_config(path)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_validation_queries_come_from_the_training_items(tmp_path: Path) -> None:
    path = tmp_path / "f.mat"
    write_mat5(path, feature_arrays())
    whole = load(features_config(path))
    found = validation_split(whole, 0.4, seed=1)
    assert len(found.query) == 2 and len(found.train) == 3
    assert found.database is found.train
    assert sorted([*found.query.ids, *found.train.ids]) == sorted(whole.train.ids)
    again = validation_split(whole, 0.4, seed=1)
    assert again.query.ids.tolist() == found.query.ids.tolist()


def test_validation_queries_share_no_image_with_the_training_items(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    rows = [{**TABLE[n % 3], "caption": f"red {n}", "labels": "odd"} for n in range(12)]
    rows[0]["image"] = "a#1.png"  # a name of its own, no second row of a
    (folder / "images" / "a#1.png").write_bytes((folder / "images" / "0.png").read_bytes())
    path = write_table(folder, "jsonl", rows)
    data = load(table_config(path=str(path), query=1, train=11))
    assert len(data.train) in (8, 9, 11)  # without the one, three or four rows of an image
    for seed in range(5):
        found = validation_split(data, 0.3, seed)
        assert len(found.query) + len(found.train) == len(data.train)
        images = [
            {i.split("g#")[0] for i in role.ids.tolist()} for role in (found.query, found.train)
        ]
        assert not images[0] & images[1], images


def test_a_picture_is_known_by_its_file_not_by_the_way_to_it(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "link.png").symlink_to("1.png")
    rows = [{**TABLE[0], "image": name} for name in ("1.png", "sub/../1.png", "link.png", "2.png")]
    pairs = read_table(write_table(folder, "csv", rows), table_config())
    assert pairs.files == [folder / "images" / name for name in ["1.png"] * 3 + ["2.png"]]
    assert "0 image files with the bytes of another one" in describe_pairs(pairs)
    (folder / "images" / "2.png").write_bytes((folder / "images" / "1.png").read_bytes())
    assert "1 image file with the bytes of another one" in describe_pairs(pairs)


def test_a_row_takes_no_id_that_another_one_has(tmp_path: Path) -> None:
    names = ["a.png", "a.png#3", "a.png", "a.png"]  # row 3 would be a.png#3 too
    rows = [{**TABLE[0], "image": name} for name in names]
    path = write_table(write_pairs(tmp_path / "p"), "csv", rows)
    ids = ["a.png", "a.png#3", "a.png#3#3", "a.png#4"]
    assert read_table(path, table_config()).ids == ids


def test_a_picture_is_known_by_its_file_or_bytes_not_by_its_name(tmp_path: Path) -> None:
    """Names that look like rows of one picture, one file by two names, equal bytes without one."""
    folder = write_pairs(tmp_path / "p")
    png = (folder / "images" / "0.png").read_bytes()
    frames = [f"frame#{n}" for n in range(10)]
    for n, name in enumerate(frames):
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(folder / "images" / name, "PNG")
    for number, (cells, pictures) in enumerate((
        (frames, 10),
        (["0.png", "./0.png", "1.png", "./1.png", *frames[:6]], 8),
        ([{"bytes": base64.b64encode(png).decode(), "path": None}] * 2 + frames[:8], 9),
        ([{"bytes": base64.b64encode((folder / "images" / name).read_bytes()).decode(),
           "path": "image.png"} for name in frames], 10),
    )):  # fmt: skip
        rows = [{"image": c, "caption": "red dog", "labels": "odd" if n % 3 else "even"}
                for n, c in enumerate(cells)]  # fmt: skip
        path = write_table(folder, "jsonl", rows)
        data = load(table_config(path=str(path), query=1, train=0))
        everything = np.concatenate([data.query.sources, data.database.sources])
        assert len(set(everything.tolist())) == pictures, number
        assert not set(data.query.sources.tolist()) & set(data.train.sources.tolist())
        held = validation_split(data, 0.3, seed=0)
        assert 0 < len(held.query) <= 4 and len(held.query) + len(held.train) == len(data.train)
        assert len(without(data.database, data.query)) == len(data.database)


# Image-text pairs

CAPTIONS = ["red dog", "red cat", "blue dog", "blue bird", "red bird", "green cat", "odd one"]


def write_pairs(
    folder: Path,
    write: Write = write_mat5,
    captions: list[Any] | None = None,
    keys: tuple[str, str, str] = ("caption", "index", "label"),
    labels: Any = None,
) -> Path:
    """A folder of pairs with small pictures of one colour each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions = CAPTIONS if captions is None else captions
    names = [f"images/{i}.png" for i in range(len(captions))]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (30 * i, 255 - 30 * i, 100)).save(folder / name)
    if labels is None:
        labels = np.eye(2, dtype=np.uint8)[np.arange(len(captions)) % 2]
    write(folder / "caption.mat", {keys[0]: captions})
    write(folder / "index.mat", {keys[1]: names})
    write(folder / "label.mat", {keys[2]: labels})
    return folder


@pytest.mark.parametrize("below", ["", "images/"])
@pytest.mark.parametrize("write", [write_mat5, write_mat73])
def test_images_are_found_with_the_folders_of_their_names(
    tmp_path: Path, write: Write, below: str
) -> None:
    folder = write_pairs(tmp_path / "p", write)
    names = [f"{kind}/{i}.png" for i in range(4) for kind in ("red", "blue")][:7]
    for i, name in enumerate(names):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(folder / "images" / name)
    separators = [name.replace("/", "\\") if i % 2 else name for i, name in enumerate(names)]
    padded = np.array([f"{below}{name}".ljust(40) for name in separators])
    write(folder / "index.mat", {"index": padded})
    pairs = read_pairs(folder, pairs_config())
    assert pairs.files == [folder / "images" / name for name in names]
    assert pairs.ids == [below + name for name in separators]
    (folder / "images" / "red" / "0.png").rename(folder / "images" / "0.png")
    assert read_pairs(folder, pairs_config()).files[0] == folder / "images" / "red" / "0.png"
    for name in ("red", "blue"):
        for file in (folder / "images" / name).iterdir():
            file.rename(folder / "images" / file.name)
        (folder / "images" / name).rmdir()
    with pytest.raises(VhablError, match=r"red/0\.png' and.*blue\\\\0\.png' both"):
        read_pairs(folder, pairs_config())


def pairs_config(**changes: Any) -> DataConfig:
    settings = {"query": 2, "train": 3, "min_count": 1} | changes
    return DataConfig(name="own", kind="pairs", path="pairs", **settings)


def load_pairs(path: Path, config: DataConfig) -> tuple[Split, Split, Split]:
    return to_splits(read_pairs(path, config), config, EncoderConfig()).splits


def by_id(splits: tuple[Split, ...], name: str) -> dict[str, list[float]]:
    """Features of all items by id: the database and the queries are all there are."""
    _, database, query = splits
    return {
        str(i): row.tolist()
        for split in (database, query)
        for i, row in zip(split.ids, getattr(split, name), strict=True)
    }


def test_pairs_become_splits(tmp_path: Path) -> None:
    splits = load_pairs(write_pairs(tmp_path / "p"), pairs_config())
    train, database, query = splits
    order = np.random.RandomState(1).permutation(7)  # the releases' legacy permutation, seed 1
    names = np.array([f"images/{i}.png" for i in range(7)])
    assert query.ids.tolist() == names[order[:2]].tolist()
    assert train.ids.tolist() == names[order[2:5]].tolist()
    assert database.ids.tolist() == names[order[2:]].tolist()
    vocabulary = sorted({w for row in order[2:5] for w in CAPTIONS[row].split()})
    for split, rows in ((train, order[2:5]), (database, order[2:]), (query, order[:2])):
        expected = [[float(w in CAPTIONS[r].split()) for w in vocabulary] for r in rows]
        assert split.text.tolist() == expected
        assert split.labels.tolist() == np.eye(2)[rows % 2].tolist()
        assert (split.image.dtype, split.text.dtype) == (np.float32, np.float32)
    distinct = {tuple(row) for row in by_id(splits, "image").values()}
    assert len(distinct) == 7, "each item has its own image's features"


@pytest.mark.parametrize("separator", ["/", "\\"])
@each_version
def test_pictures_are_found_by_their_whole_path(
    tmp_path: Path, write: Write, separator: str
) -> None:
    """Pictures of one base name in two folders, one beside them, and the same one again."""
    folder = write_pairs(tmp_path / "p", write)
    for name in ("red", "blue"):
        (folder / "images" / name).mkdir()
        Image.new("RGB", (8, 8), name).save(folder / "images" / name / "0.png")
    names = [
        "red/0.png",
        "blue/0.png",
        "lost/1.png",
        "/old/disk/2.png",
        "3.png",
        "red/0.png",
        "4.png",
    ]
    given = [name.replace("/", separator) for name in names]
    write(folder / "index.mat", {"index": np.array(given)})  # a char matrix: padded with blanks
    pairs = read_pairs(folder, pairs_config())
    found = ["red/0.png", "blue/0.png", "1.png", "2.png", "3.png", "red/0.png", "4.png"]
    assert pairs.files == [folder / "images" / name for name in found]
    assert pairs.ids == given
    assert open_image(pairs.files[0]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_pictures_may_lie_in_a_table(tmp_path: Path, ending: str) -> None:
    """As Hugging Face's data sets write them."""
    rows: list[dict[str, Any]] = []
    for color in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption": color,
                     "labels": [color]})  # fmt: skip
    rows[1]["image"]["path"] = "b.png"
    file = tmp_path / f"x.{ending}"
    if ending == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    else:
        for row in rows:
            row["image"]["bytes"] = base64.b64encode(row["image"]["bytes"]).decode()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_table(file, DataConfig("own", "table", str(file)))
    assert pairs.ids == ["1", "b.png"]
    colors = [open_image(picture).getpixel((0, 0)) for picture in pairs.files]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    before = ImageFiles(pairs.files, 8, False, 0).state()
    assert ImageFiles(pairs.files[::-1], 8, False, 0).state() != before
    file = tmp_path / "y.jsonl"
    file.write_text(json.dumps(rows[0] | {"image": {"bytes": "?" * 999}}, default=str))
    with pytest.raises(VhablError, match="row 1: column image") as caught:
        read_table(file, DataConfig("own", "table", str(file)))
    assert "?" * 200 not in str(caught.value)


def test_two_names_of_one_picture_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    names = ["red/0.png", "blue/0.png", *(f"{i}.png" for i in range(2, 7))]
    write_mat5(folder / "index.mat", {"index": names})
    message = r"index\.mat: item 2.*red/0\.png' and 'blue/0\.png' both.*0\.png"
    with pytest.raises(VhablError, match=message):
        read_pairs(folder, pairs_config())


@pytest.mark.parametrize(
    ("seed", "items", "queries", "first_queries", "first_train"),
    [  # the splits of CMCL (seed 1) and PGHMH (seed 1814) on MIRFlickr, NUS-WIDE and MS COCO
        (1, 20_015, 2000, [11550, 16587, 6189, 5542], [1204, 4300, 1160, 6806]),
        (1, 190_421, 2100, [114085, 13813, 155323, 21038], [168487, 89960, 135508, 39379]),
        (1, 122_218, 5000, [89146, 35722, 24652, 90025], [118914, 104544, 84655, 31249]),
        (1814, 24_581, 2000, [21572, 1377, 336, 2853], [14906, 918, 13433, 4788]),
        (1814, 122_218, 5000, [110374, 106988, 64378, 99951], [47900, 644, 2816, 8035]),
    ],
)
def test_the_published_splits_are_drawn(
    seed: int, items: int, queries: int, first_queries: list[int], first_train: list[int]
) -> None:
    config = pairs_config(split_seed=seed, query=queries, train=10_000)
    train, database, query = draw(range(items), config)
    assert query[:4].tolist() == first_queries and train[:4].tolist() == first_train
    assert (len(train), len(query), len(database)) == (10_000, queries, items - queries)
    assert np.array_equal(np.sort(np.concatenate([query, database])), np.arange(items))
    assert np.array_equal(database[:10_000], train)  # the training items are in the database


def test_without_numbers_a_tenth_are_queries() -> None:
    for items, queries in ((20, 2), (24, 2), (4, 1)):
        train, database, query = draw(range(items), pairs_config(query=0, train=0))
        assert len(query) == queries and len(train) == len(database) == items - queries
    assert [len(rows) for rows in draw(range(20), pairs_config(query=0, train=5))] == [5, 18, 2]
    assert [len(rows) for rows in draw(range(20), pairs_config(query=7, train=0))] == [13, 13, 7]


@pytest.mark.parametrize("database", [True, False])
def test_a_table_may_say_its_own_split(
    tmp_path: Path, database: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tmp_path / "p")
    names = ["query", "train", "train", "database" if database else "query", "Train ", "query"]
    column = "split" if database else " Split"
    rows = [{**row, column: name} for row, name in zip(TABLE, names, strict=False)]
    config = table_config(path=str(write_table(folder, "csv", rows)), query=1, train=2)
    data = load(config)
    queries = ["0.png", "5.png"] if database else ["0.png", "3.png", "5.png"]
    assert data.query.ids.tolist() == queries
    assert data.train.ids.tolist() == ["1.png", "2.png", "4.png"]
    assert data.database.ids.tolist() == (["3.png"] if database else data.train.ids.tolist())
    told = capsys.readouterr().err
    assert ("no row is of the database: the training items are" in told) != database
    assert "trained on too" not in told
    rows[5]["image"] = rows[1]["image"]
    load(replace(config, path=str(write_table(folder, "csv", rows))))
    assert "the images of 1 query are trained on too" in capsys.readouterr().err
    rows[3]["image"] = rows[1]["image"]  # in the database, of an image that is trained on
    data = load(replace(config, path=str(write_table(folder, "csv", rows))))
    assert len(data.database) == (1 if database else 3)
    assert len(without(data.database, data.train)) == 0
    for name, message in (("valid", "row 1: column split.*valid"), ("train", "0 quer")):
        only = [{**row, "split": name} for row in TABLE]
        with pytest.raises(VhablError, match=message):
            load(replace(config, path=str(write_table(folder, "csv", only))))
    del rows[0][column]
    with pytest.raises(VhablError, match="row 1: column split"):
        load(replace(config, path=str(write_table(folder, "jsonl", rows))))


def test_items_of_one_image_stay_together() -> None:
    images = ["a", "b", "c", "a", "d", "b", "c", "d", "e", "a", "e", "d"]  # 3 2 2 3 2 items
    for seed in range(20):
        config = pairs_config(split_seed=seed, query=2, train=4)
        train, database, query = draw(images, config)
        asked, learned, others = (
            {images[row] for row in rows} for rows in (query, train, database)
        )
        assert not asked & others and learned <= others and asked | others == set("abcde")
        assert sorted([*query, *database]) == list(range(12))
        assert [row for row in range(12) if images[row] in learned] == sorted(train)
        assert len(query) in (2, 3) and len(asked) == 1 and len(learned) == 2
    with pytest.raises(VhablError, match=r"data\.query.*2.*one image has all other"):
        draw(["a"] * 6, pairs_config(query=2, train=4))


def test_another_seed_draws_other_queries(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    first, again, other = (load_pairs(folder, pairs_config(split_seed=s)) for s in (1, 1, 3))
    assert_equal_splits(first, again)
    assert first[2].ids.tolist() != other[2].ids.tolist()


@pytest.mark.parametrize(
    "keys",
    [
        ("caption", "index", "label"),
        ("tags", "imgs", "category"),
        ("YAll", "FAll", "LAll"),
        ("caption", "index", "labels"),
    ],
)
@each_version
def test_pairs_are_the_same_under_every_name_and_version(
    tmp_path: Path, write: Write, keys: tuple[str, str, str]
) -> None:
    expected = load_pairs(write_pairs(tmp_path / "p"), pairs_config())
    folder = write_pairs(tmp_path / "q", write, keys=keys)
    assert_equal_splits(load_pairs(folder, pairs_config()), expected)


@each_version
@pytest.mark.parametrize("form", ["cells in cells", "char matrices"])
def test_of_several_captions_the_first_is_used(tmp_path: Path, write: Write, form: str) -> None:
    several: dict[str, list[Any]] = {
        "cells in cells": [[c, "another text"] for c in CAPTIONS],
        "char matrices": [np.array([c, "another text"]) for c in CAPTIONS],
    }
    expected = load_pairs(write_pairs(tmp_path / "p"), pairs_config())
    folder = write_pairs(tmp_path / "q", write, captions=several[form])
    assert_equal_splits(load_pairs(folder, pairs_config()), expected)


def test_words_below_the_count_are_left_out(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p", captions=["a b", "a c", "a b d", "a", "a", "a", "a"])
    wide = load_pairs(folder, pairs_config(min_count=1, train=5))[0]
    narrow = load_pairs(folder, pairs_config(min_count=5, train=5))[0]
    assert wide.text.shape[1] > narrow.text.shape[1] == 1


def test_words_of_a_caption() -> None:
    assert words("The dog's BALL, 2 cats_and  Zoë—don’t!") == [
        "the",
        "dog’s",
        "ball",
        "2",
        "cats",
        "and",
        "zoë",
        "don’t",
    ]


def test_a_word_has_one_form() -> None:
    for one, other in (
        ("don't", "don\u2019t"), ("red", "\uff32\uff25\uff24"), ("fish", "\ufb01sh"),
        ("co\u00adoperate", "cooperate"), ("\u30ab\u30e1\u30e9", "\uff76\uff92\uff97"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e"), ("STRASSE", "stra\u00dfe"),
    ):  # fmt: skip
        assert words(one) == words(other) != []


def test_words_in_other_scripts() -> None:
    assert sorted(words("红色汽车")) == sorted(["红", "色", "汽", "车", "红色", "色汽", "汽车"])
    assert words("T恤, 红") == ["t", "恤", "红"]
    assert words("ラーメン") == ["ラ", "ー", "メ", "ン", "ラー", "ーメ", "メン"]
    assert words("ที่นี่") == ["ที่", "นี่", "ที่นี่"]  # vowels and tones are no characters of their own
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("Zoe\u0308 cafe\u0301") == words("Zoë café") == ["zoë", "café"]


def test_words_come_from_training_captions_alone(tmp_path: Path) -> None:
    """New words in a query's caption change nothing for any other item, nor the query's width."""
    folder = write_pairs(tmp_path / "p")
    before = load_pairs(folder, pairs_config())
    changed = shutil.copytree(folder, tmp_path / "q")
    query = before[2].ids[0]
    captions = list(CAPTIONS)
    captions[int(Path(query).stem)] = "unheard words red aardvark"
    write_mat5(changed / "caption.mat", {"caption": captions})
    old, new = (by_id(s, "text") for s in (before, load_pairs(changed, pairs_config())))
    assert old.keys() == new.keys()
    assert {k: v for k, v in old.items() if k != query} == {
        k: v for k, v in new.items() if k != query
    }
    assert len(new[query]) == len(old[query]) and new[query] != old[query]


def test_a_training_caption_does_change_the_words(tmp_path: Path) -> None:
    """The counterpart: without it the test above could not fail."""
    folder = write_pairs(tmp_path / "p")
    before = load_pairs(folder, pairs_config())
    captions = list(CAPTIONS)
    captions[int(Path(before[0].ids[0]).stem)] = "unheard words entirely"
    write_mat5(folder / "caption.mat", {"caption": captions})
    after = load_pairs(folder, pairs_config())
    assert after[0].text.shape[1] != before[0].text.shape[1]


def rewrite(name: str, variables: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: write_mat5(folder / name, variables)


BAD_PAIRS: dict[str, tuple[Callable[[Path], None], dict[str, Any], list[str]]] = {
    "no captions": (
        lambda p: (p / "caption.mat").unlink(),
        {},
        ["caption.mat", "no such file", "caption.txt"],
    ),
    "no labels": (lambda p: (p / "label.mat").unlink(), {}, ["label.mat", "no such file"]),
    "other key": (rewrite("index.mat", {"paths": ["a"]}), {}, ["index.mat", "index or imgs"]),
    "fewer captions": (
        rewrite("caption.mat", {"caption": ["a", "b"]}),
        {},
        ["2 captions, 7 images and 7 label rows"],
    ),
    "numbers for captions": (
        rewrite("caption.mat", {"caption": [np.ones((2, 2))] * 7}),
        {},
        ["caption.mat", "texts"],
    ),
    "class numbers": (
        rewrite("label.mat", {"label": np.arange(7)[:, None]}),
        {},
        ["label.mat", "0 in row 1", "class numbers"],
    ),
    "no class": (rewrite("label.mat", {"label": np.zeros((7, 0))}), {}, ["label.mat", "(7, 0)"]),
    "label texts": (rewrite("label.mat", {"label": ["cat"] * 7}), {}, ["label.mat", "numbers"]),
    "one column": (
        rewrite("label.mat", {"label": np.arange(7)[:, None] % 2}),
        {},
        ["label.mat", "one column of 0 and 1"],
    ),
    "no image": (lambda p: (p / "images" / "3.png").unlink(), {}, ["3.png", "no such file"]),
    "text as image": (
        lambda p: replace_bytes(p / "images" / "3.png", lambda b: b"text"),
        {},
        ["3.png", "cannot be read"],
    ),
    "cut image": (
        lambda p: replace_bytes(p / "images" / "3.png", lambda b: b[: len(b) // 2]),
        {},
        ["3.png", "cannot be read"],
    ),
    "other folder": (lambda p: None, {"image_root": "pictures"}, ["pictures", "no such file"]),
    "class names": (
        lambda p: None,
        {"class_names": ["a", "b", "c"]},
        ["data.class_names", "3 names", "2"],
    ),
    "no query": (lambda p: None, {"query": -1}, ["data.query", "-1 queries and 3"]),
    "one to train on": (lambda p: None, {"train": 1}, ["data.train", "2 queries and 1"]),
    "too many": (lambda p: None, {"train": 6}, ["data.train", "2 queries and 6", "7 items"]),
    "rare words": (lambda p: None, {"min_count": 9}, ["data.min_count", "9"]),
}


def replace_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_named(tmp_path: Path, name: str) -> None:
    damage, changes, parts = BAD_PAIRS[name]
    folder = write_pairs(tmp_path / "p")
    damage(folder)
    with pytest.raises(VhablError) as caught:
        load_pairs(folder, pairs_config(**changes))
    message = str(caught.value)
    for part in (". ", *parts):
        assert part in message, message


def test_shipped_emoji_set_loads() -> None:
    found = load(
        DataConfig(
            name="emoji", kind="pairs", path="dataset/emoji", query=200, train=1000, class_names=[]
        )
    )
    train, database, query = found.train, found.database, found.query
    assert (len(query), len(train), len(database)) == (200, 1000, 1640)
    assert set(train.ids) <= set(database.ids)
    assert not set(query.ids) & set(database.ids)
    assert len(set(database.ids) | set(query.ids)) == 1840
    for split in (train, database, query):
        assert np.isfinite(split.image).all() and np.isfinite(split.text).all()
        assert set(np.unique(split.text)) == {0, 1}
        assert (split.labels.sum(axis=1) > 0).all()
    assert len(without(database, train)) == 640
    assert found.notes == ()


def test_helper_writes_what_matlab_writes(tmp_path: Path) -> None:
    """The reader is tested on these files: they must have MATLAB's header, turn and classes."""
    path = tmp_path / "x.mat"
    write_mat73(path, {"x": GRID.astype(float), "c": ["a dog"], "s": NUMBERS["sparse"][0]})
    head = path.read_bytes()[:520]
    assert head.startswith(b"MATLAB 7.3 MAT-file") and head[124:128] == b"\x00\x02IM"
    assert head[512:] == b"\x89HDF\r\n\x1a\n"
    with h5py.File(path) as file:
        assert file["x"].shape == (3, 2)
        assert file["x"].attrs["MATLAB_class"] == b"double"
        assert file["c"].attrs["MATLAB_class"] == b"cell"
        assert file[file["c"][0, 0]].attrs["MATLAB_class"] == b"char"
        assert file["s"].attrs["MATLAB_sparse"] == 2 and set(file["s"]) == {"data", "ir", "jc"}


def test_a_structure_beside_the_arrays_is_passed_over_and_named_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.mat"
    write_mat73(path, {"x": GRID.astype(float), "options": {"rate": GRID}})
    found = read_mat(path)
    assert found.keys() == {"x"} and np.array_equal(found["x"], GRID)
    with pytest.raises(VhablError, match=r"key options.*a structure.*an array"):
        read_mat(path, ["options"])


# Captions as a text file, and the check of a data set


def test_captions_may_be_lines_of_a_text_file(tmp_path: Path) -> None:
    captions = ["a dog", "", "two\u2028parts of one", "a cat", "tail\t", "Zoë", "last"]
    expected = load_pairs(write_pairs(tmp_path / "p", captions=captions), pairs_config(min_count=1))
    folder = write_pairs(tmp_path / "q", captions=captions)
    (folder / "caption.mat").unlink()
    for end, newline in (("\n", "\n"), ("", "\n"), ("\r\n", "\r\n")):
        (folder / "caption.txt").write_bytes((newline.join(captions) + end).encode())
        assert_equal_splits(load_pairs(folder, pairs_config(min_count=1)), expected)
    (folder / "caption.txt").write_bytes(b"\xff\xfe\n" * 7)
    with pytest.raises(VhablError, match=r"caption\.txt.*bytes.*are not UTF-8"):
        load_pairs(folder, pairs_config())


def test_the_check_names_every_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["  ", *CAPTIONS[1:]]
    folder = write_pairs(tmp_path / "p", captions=captions)
    file = tmp_path / "pairs.yaml"
    file.write_text("name: mine\nkind: pairs\npath: nowhere\nquery: 2\ntrain: 3\nmin_count: 1\n")
    assert data_command.main(["check", str(file), f"data.path={folder}"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "7 pairs", f"item 1: image {folder / 'images' / '0.png'}", "item 1: caption '  '",
        "item 1: labels class 1",
        "2 classes, 1.0 labels an item, 0.0% of the items without a label",
        "  class 1: 4 items", "  class 2: 3 items",
        "1 empty caption", "0 further captions", "0 items with the image of another one",
        "0 image files with the bytes of another one",
        "train: 3 items", "database: 5 items", "query: 2 items", "no problem found",
    ]  # fmt: skip
    with pytest.raises(VhablError, match=r"nowhere.*no such file or folder"):
        data_command.main(["check", str(file)])

    images = sorted(folder.rglob("*.png"))
    images[0].unlink()
    images[2].write_bytes(images[2].read_bytes()[:60])
    images[3].write_bytes(b"")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1)  # all others are absurdly large
    Image.new("RGB", (1, 1)).save(images[4])
    assert data_command.main(["check", str(file), f"data.path={folder}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    named = [next(i for i in images if str(i) in line) for line in lines]
    assert sorted(named) == sorted(set(images) - {images[4]})  # all but the one that is small
    said = dict(zip(named, lines, strict=True))
    assert said[images[0]].startswith("error: ") and "no such file" in said[images[0]]
    assert "cannot be read" in said[images[2]] and "cannot be read" in said[images[3]]
    assert "decompression bomb" in said[images[5]]


def test_pictures_of_too_many_pixels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a JPEG of which fewer are needed and decoded."""
    monkeypatch.setattr("vhabl.data.images.PIXELS", 1000)
    for name, pixels, side, right in (
        ("a.png", 30, 0, True), ("b.png", 40, 6, False), ("c.jpg", 40, 0, False),
        ("d.jpg", 40, 6, True), ("e.jpg", 50, 6, False),
    ):  # fmt: skip
        Image.new("RGB", (pixels, pixels)).save(name)
        with nullcontext() if right else pytest.raises(VhablError, match=f"{pixels} x {pixels} "):
            read_pixels(Path(name), side, False) if side else open_image(Path(name))


def test_the_check_of_disagreeing_files_says_so(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    write_mat5(folder / "caption.mat", {"caption": CAPTIONS[:5]})
    file = tmp_path / "pairs.yaml"
    file.write_text(f"name: mine\nkind: pairs\npath: {folder}\nquery: 2\ntrain: 3\n")
    with pytest.raises(VhablError, match="5 captions, 7 images and 7 label rows"):
        data_command.main(["check", str(file)])
    with pytest.raises(VhablError, match=r"pairs\.yaml: unknown key 'data\.sise'"):
        file.write_text("name: mine\nsise: 2\n")
        data_command.main(["check", str(file)])


# Tables

TABLE: list[dict[str, Any]] = [
    {"image": f"{i}.png", "caption": caption, "labels": ["even", "odd"][i % 2]}
    for i, caption in enumerate(CAPTIONS)
]


def write_table(folder: Path, kind: str, rows: list[dict[str, Any]] = TABLE) -> Path:
    """A table in the folder of `write_pairs`, whose images it names."""
    path = folder / f"items.{kind}"
    columns = list(rows[0])
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if kind == "tsv" else ","
            writer = csv.DictWriter(file, columns, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def table_config(**changes: Any) -> DataConfig:
    return replace(pairs_config(), kind="table", **changes)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_gives_the_same_splits_as_the_raw_layout(tmp_path: Path, kind: str) -> None:
    folder = write_pairs(tmp_path / "p")
    expected = load_pairs(folder, pairs_config())
    found = load(table_config(path=str(write_table(folder, kind))))
    for split, other in zip((found.train, found.database, found.query), expected, strict=True):
        assert split.ids.tolist() == [Path(name).name for name in other.ids]
        for name in ("image", "text", "labels"):
            assert np.array_equal(getattr(split, name), getattr(other, name))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_cells_of_a_table(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Several labels, none, a caption with a line break, an image that comes twice."""
    folder = write_pairs(tmp_path / "p")
    rows = [dict(row) for row in TABLE]
    rows[0]["labels"] = "odd; even ;"
    rows[1]["labels"] = ""
    rows[2]["caption"] = 'two\nlines, "quoted"'
    rows[4]["image"] = rows[3]["image"]
    if kind == "jsonl":
        rows[0]["labels"] = ["odd", "even"]
        rows[1]["labels"] = None
        rows[5]["caption"] = [CAPTIONS[5], "another"]
    path = write_table(folder, kind, rows)
    pairs = read_table(path, table_config())
    assert pairs.class_names == ["even", "odd"]
    assert pairs.ids == ["0.png", "2.png", "3.png", "3.png#5", "5.png", "6.png"]
    assert pairs.labels.tolist() == [[1, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    assert pairs.captions[1] == 'two\nlines, "quoted"' and pairs.captions[4] == CAPTIONS[5]
    assert pairs.files[3] == folder / "images" / "3.png"
    told = capsys.readouterr().err
    assert told == f"note: {path}: 1 row without a label: not trained on or evaluated\n"
    ordered = read_table(path, table_config(class_names=["odd", "even", "third"]))
    assert ordered.labels.shape == (6, 3) and ordered.labels[0].tolist() == [1, 1, 0]


def labelled(tmp_path: Path, kind: str, cells: list[Any], **changes: Any) -> Pairs:
    folder = write_pairs(tmp_path / "p")
    rows = [{**TABLE[row], "labels": cell} for row, cell in enumerate(cells)]
    return read_table(write_table(folder, kind, rows), table_config(**changes))


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("jsonl", [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], None]),
        ("jsonl", [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], "nan"]),
        ("parquet", [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], None]),
        ("csv", ["1;0;0;1", "0;1;0;0", "0;0;0;0", ""]),
        ("csv", ["[1, 0, 0, 1]", "[0, 1, 0, 0]", "[0, 0, 0, 0]", "NaN"]),
        ("csv", ["True;False;False;True", "false;true;false;false", "0;0;0;0", ""]),
    ],
)
def test_a_0_or_1_for_each_class_is_a_row_of_labels(
    tmp_path: Path, kind: str, cells: list[Any]
) -> None:
    names = ["red", "square", "big", "old"]
    pairs = labelled(tmp_path, kind, cells, class_names=names)
    assert pairs.class_names == names and pairs.ids == ["0.png", "1.png"]
    assert pairs.labels.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]
    with pytest.raises(VhablError, match=r"labels.*4 numbers of 0 and 1 a row"):
        labelled(tmp_path / "without", kind, cells)
    with pytest.raises(VhablError, match=r"a row.*data\.class_names"):
        labelled(tmp_path / "fewer", kind, cells, class_names=names[:3])


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("csv", ["['red', 'square']", "['square']", "[]", "nan"]),
        ("csv", ['["red", "square"]', '["square"]', "[]", " "]),
        ("csv", ["('red', 'square')", "('square',)", "[None]", " "]),
        ("jsonl", [["red", "square"], "square", [], float("nan")]),
        ("jsonl", [["square", None, "red", ""], ["square"], [None], None]),
    ],
)
def test_lists_of_labels_are_names_and_what_is_missing_is_none(
    tmp_path: Path, kind: str, cells: list[Any]
) -> None:
    pairs = labelled(tmp_path, kind, cells)
    assert pairs.class_names == ["red", "square"]
    assert pairs.labels.tolist() == [[1, 1], [0, 1]]


def test_class_numbers_are_names_even_where_they_are_0_and_1(tmp_path: Path) -> None:
    for kind, cells in (("csv", ["0", "1", "0"]), ("jsonl", [0, 1, 0.0]), ("jsonl", [[0], [1], 0])):
        pairs = labelled(tmp_path / kind / str(len(str(cells))), kind, cells)
        assert pairs.class_names == ["0", "1"]
        assert pairs.labels.tolist() == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("csv", "[1 0 0 1]"),
        ("csv", "['red' 'square']"),
        ("csv", "{'red'}"),
        ("csv", "[['red'], ['square']]"),
        ("csv", "1 0 0 1"),
        ("csv", "('red')"),
        ("csv", "[1.5.2]"),
        ("csv", "-1;1"),
        ("csv", "0.9;0.1"),
        ("jsonl", -1),
        ("csv", "[" * 10_000),
        ("jsonl", [["red"], ["square"]]),
        ("jsonl", [{"name": "red"}]),
        ("jsonl", {"name": "red"}),
        ("jsonl", True),
        ("jsonl", [True, False]),
        ("jsonl", 0.5),
    ],
)
def test_a_cell_that_holds_no_names_is_refused(tmp_path: Path, kind: str, cell: Any) -> None:
    message = r"items\..*: row 2: column labels: .*(Give names of classes|between 0 and 1)"
    with pytest.raises(VhablError, match=message) as caught:
        labelled(tmp_path, kind, ["square", cell])
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 250


def test_class_names_that_may_be_one_or_several_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["Red", "red ", "blue, square", "caf\u00e9", "cafe\u0301"]
    assert labelled(tmp_path, "jsonl", cells).class_names == ["Red", "blue, square", "café", "red"]
    said = capsys.readouterr().err
    assert "the classes 'Red' and 'red' differ in case or marks alone" in said
    assert "is 'blue, square' one class? data.separator is ';'" in said
    labelled(tmp_path / "b", "csv", ["red;blue", "square", "men's", "1.0", "C++", "10;2"])
    assert capsys.readouterr().err == ""
    for number, name in enumerate(
        ["a\uff1bb", "a\u3001b", "a\tb", "'a'", "a\u200b", "None", "0110"]
    ):
        labelled(tmp_path / str(number), "csv", ["red", name])
        assert f"is {name!r} one class?" in capsys.readouterr().err
    with pytest.raises(VhablError, match=r"row 2: column labels: '&amp;' in .*Write '&'"):
        labelled(tmp_path / "entity", "csv", ["red", "Food &amp; Drink"])


def test_classes_that_may_be_one_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, other in enumerate(
        ["red\u00a0car", "red  car", "red_car", "Red-Car", "red\u2013car"]
    ):
        labelled(tmp_path / str(number), "csv", ["red car", other, "-", "?"])
        assert "differ in case or marks alone" in capsys.readouterr().err
    labelled(tmp_path / "parts", "csv", ["red square", "red", "square"])
    assert "is 'red square' one class?" in capsys.readouterr().err


def test_columns_that_are_not_read_are_said_where_one_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": "0.png", "Caption": "a dog", "labels": "x", "split": "train", "more": 1}]
    path = write_table(write_pairs(tmp_path / "p"), "csv", rows)
    read_items(path, table_config())
    assert f"{path}: no column caption; not read: Caption, more" in capsys.readouterr().err
    path = write_table(write_pairs(tmp_path / "q"), "csv", [{**TABLE[0], "more": 1}])
    read_items(path, table_config())
    assert capsys.readouterr().err == ""


def test_captions_that_words_do_not_read_are_said(tmp_path: Path) -> None:
    rows = [{**row, "caption": [row["caption"], "other"]} for row in TABLE]
    rows[3]["caption"] = "salt &amp; pepper<br>"
    config = table_config(path=str(write_table(write_pairs(tmp_path / "p"), "jsonl", rows)))
    assert load(config).notes == (
        "6 further captions: not read",
        "captions hold HTML, whose names count as words: 'salt &amp; pepper<br>'",
    )


def test_class_names_are_compared_as_they_look(tmp_path: Path) -> None:
    pairs = labelled(tmp_path, "csv", ["caf\u00e9", "tea"], class_names=["cafe\u0301", "tea"])
    assert pairs.labels.tolist() == [[1, 0], [0, 1]]
    cells = ["1;0", "0;1"]
    pairs = labelled(tmp_path / "b", "csv", cells, class_names=["cafe\u0301", "tea"])
    assert pairs.labels.tolist() == [[1, 0], [0, 1]]


def test_a_byte_order_mark_is_no_part_of_a_class_name(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    content = "\ufeffred \nblue\n"
    (folder / "classes.txt").write_text(content, encoding="utf-8")
    assert read_pairs(folder, pairs_config()).class_names == ["red", "blue"]
    (folder / "classes.txt").write_text("red\nred\n")
    with pytest.raises(VhablError, match=r"classes\.txt: a name comes twice"):
        read_pairs(folder, pairs_config())


def test_captions_are_texts_or_lists_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tmp_path / "p")
    cells = ["['a dog', 'two dogs']", "[1.5.2]", '["one"]', "[]", "[1, 2]"]
    rows = [{**TABLE[row], "caption": cell} for row, cell in enumerate(cells)]
    pairs = read_table(write_table(folder, "csv", rows), table_config())
    assert pairs.captions == ["a dog", "[1.5.2]", "one", "[1, 2]"]
    assert pairs.further == [["two dogs"], [], [], []]
    cells = ["('a dog', 'two dogs')", "[None]", "['a dog', None]", "(a dog)", "None", "<NA>"]
    rows = [{**TABLE[row], "caption": cell} for row, cell in enumerate(cells)]
    pairs = read_table(write_table(folder, "csv", rows), table_config())
    assert pairs.captions == ["a dog", "a dog", "(a dog)"] and pairs.further[0] == ["two dogs"]
    rows[1]["caption"] = "['a dog' 'two dogs']"  # as NumPy prints
    with pytest.raises(VhablError, match=r"row 2: column caption: .*Give a text"):
        read_table(write_table(folder, "csv", rows), table_config())
    capsys.readouterr()
    cells = [None, "", [None], [None, "a dog"], []]
    rows = [{**TABLE[row], "caption": cell} for row, cell in enumerate([*cells, float("nan")])]
    path = write_table(folder, "jsonl", rows)
    pairs = read_table(path, table_config())
    assert pairs.ids == ["1.png", "3.png"] and pairs.captions == ["", "a dog"]
    assert "4 rows without a caption: not trained on or evaluated" in capsys.readouterr().err
    everything = collection(table_config(path=str(path)), EncoderConfig())
    assert everything.texts == [None, "", None, "a dog", None, None]
    for cell in ({"raw": "a dog"}, [{"en": "a dog"}], '{"raw": "a dog"}', True, [["a"]], 3):
        rows[1]["caption"] = cell
        path = write_table(folder, "jsonl", rows)
        with pytest.raises(VhablError, match=r"row 2: column caption: .*Give a text"):
            read_table(path, table_config())


def test_columns_of_a_table_have_names_of_their_own(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p")
    rows = [{"file": r["image"], "text": r["caption"], "tags": r["labels"]} for r in TABLE]
    names = {"image_column": "file", "caption_column": "text", "label_column": "tags"}
    found = read_table(write_table(folder, "csv", rows), table_config(**names))
    assert found.captions == CAPTIONS
    with pytest.raises(VhablError, match=r"no column .image., only file, text, tags.*image_column"):
        read_table(folder / "items.csv", table_config())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            b"image,caption,labels\n1.png,x,even\n,x,odd\n",
            "row 2: column image: ''. Give a file name",
        ),
        ("a.csv", b"image,caption,labels\n1.png,x,\n", "column labels: no row has a label"),
        ("a.csv", b"", "column labels: no row has a label"),
        ("a.csv", b"image,caption,labels\n\xff,x,y\n", "line 2: its bytes are not UTF-8"),
        (
            "a.csv",
            "image,caption,labels\n1,\u72d7,x\n".encode("gbk"),
            "line 2: its bytes are not UTF-8. Save it",
        ),
        ("a.jsonl", '{"caption": "é"}'.encode("utf-16"), "line 1: its bytes are not UTF-8"),
        ("a.csv", b"image;caption;labels\n1.png;a;x\n", "line 1: ';' stands between the columns"),
        ("a.csv", b"\nimage,caption,labels\n1.png,a,x\n", "line 1: its columns are without names"),
        ("a.csv", b"image,caption,caption,labels\n1.png,a,b,x\n", "line 1: its columns are image"),
        ("a.jsonl", b'{"image": "1.png", "image": "2.png"}\n', "line 1: this is not JSON (a key"),
        (
            "a.tsv",
            b'image\tcaption\tlabels\n1.png\t"a\tx\n2.png\tb"\ty\n',
            "row 1: a quote that holds other cells or rows",
        ),
        (
            "a.jsonl",
            json.dumps({"image": "QUJD" * 999, "caption": "a", "labels": "x"}).encode(),
            "row 1: column image: 'QUJDQUJD",
        ),
        (
            "a.jsonl",
            b'{"image": "n\\u0000.png", "caption": "a", "labels": "x"}\n',
            "row 1: column image: 'n",
        ),
        (
            "a.jsonl",
            b'{"image": "n\\ud83d.png", "caption": "a", "labels": "x"}\n',
            "row 1: column image: 'n",
        ),
        ("a.csv", b'image,caption,labels\n1.png,"x"y,even\n', "it cannot be read"),
        ("a.csv", b"image,caption,labels\n1.png,a, b,even\n", "row 1: more or fewer cells"),
        ("a.csv", b"image,caption,labels\n1.png,a\n", "row 1: more or fewer cells"),
        ("a.jsonl", b'{"image": "1.png"\n', "line 1: this is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: this is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: a list. Each line must be an object"),
        ("a.xlsx", b"x", "no table ends with '.xlsx'"),
        ("a.parquet", b"x", "a.parquet: "),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VhablError, match=re.escape(said)) as caught:
        read_table(path, table_config())
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    path = write_table(write_pairs(tmp_path / "p"), "csv")
    with pytest.raises(VhablError, match=r"items\.csv: row 2.*label 'odd.*of"):
        read_table(path, table_config(class_names=["even"]))


# HQ's arrays

ARRAYS = DataConfig(name="own", kind="npy", path="arrays", workers=0)
CNN = EncoderConfig("cnn", "alexnet", "")


def feature_images(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same items with features in place of pictures."""
    return arrays | {
        name: values.reshape(len(values), -1)[:, :6] / 7.0
        for name, values in arrays.items()
        if name.endswith("_image")
    }


def test_features_in_arrays_are_those_of_a_feature_file(tmp_path: Path) -> None:
    arrays = feature_images(picture_arrays())
    write_arrays(tmp_path / "arrays", arrays)
    parts = {"I": "image", "T": "text", "L": "label"}
    arrays["train_label"] = arrays["train_image_label"]
    roles = {"tr": ["train"], "db": ["train", "vali"], "te": ["test"]}
    write_mat5(
        tmp_path / "f.mat",
        {
            f"{key}_{role}": np.concatenate([arrays[f"{name}_{part}"] for name in names])
            for role, names in roles.items()
            for key, part in parts.items()
        },
    )
    found, expected = load(ARRAYS), load(features_config(tmp_path / "f.mat"))
    for role in ("train", "database", "query"):
        own, other = getattr(found, role), getattr(expected, role)
        for part in ("image", "text", "labels"):
            np.testing.assert_array_equal(getattr(own, part), getattr(other, part))
            assert getattr(own, part).dtype == getattr(other, part).dtype
    assert [len(s) for s in (found.train, found.database, found.query)] == [24, 29, 7]
    assert found.fingerprint == expected.fingerprint and found.vocabulary == ()
    assert found.notes == ("vali: 5 items, in the database and in nothing else",)
    assert len(without(found.database, found.train)) == 5
    assert not np.isin(found.query.ids, found.database.ids).any()


def test_class_numbers_in_arrays_need_no_second_axis(tmp_path: Path) -> None:
    arrays = feature_images(picture_arrays())
    labels = [name for name in arrays if name.endswith("label")]
    numbers = {name: np.arange(len(arrays[name])) % 3 + 1 for name in labels}
    write_arrays(tmp_path / "arrays", arrays | numbers)
    found = load(ARRAYS)
    assert found.query.labels.tolist() == [[int(n % 3 == c) for c in range(3)] for n in range(7)]
    assert found.train.labels.sum(axis=0).tolist() == [8, 8, 8]
    write_arrays(tmp_path / "arrays", arrays | {name: n - 1 for name, n in numbers.items()})
    with pytest.raises(VhablError, match=r"label\.npy: 0 in row 1.*whole class numbers from 1"):
        load(ARRAYS)


@pytest.mark.parametrize("held", [True, False])
def test_pictures_in_arrays_become_pixels(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory where they are few; else they stay in their files, and are read when indexed."""
    arrays = picture_arrays()
    arrays["train_image"] = np.asfortranarray(arrays["train_image"])  # another order of axes
    write_arrays(tmp_path / "arrays", arrays)
    if not held:
        monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 0)
    data = load(ARRAYS, CNN)
    names = ("train_image", "vali_image", "test_image")
    pictures = [Image.fromarray(p) for name in names for p in arrays[name]]
    expected = np.stack([to_pixels(picture, 224, False) for picture in pictures])
    for split, rows in (
        (data.train, slice(0, 24)), (data.database, slice(0, 29)), (data.query, slice(29, 36)),
    ):  # fmt: skip
        assert isinstance(split.image, Rows) and isinstance(split.text, np.ndarray)
        np.testing.assert_array_equal(split.image[:], expected[rows])
        assert isinstance(split.image.store, np.ndarray) == held
    if not held:
        store = data.train.image.store
        assert all(isinstance(array, np.memmap) for array in store.files.arrays)
    batches = [np.array([3, 0]), np.array([6])]
    for rows, inputs in zip(batches, read(data.query, batches), strict=True):
        np.testing.assert_array_equal(inputs.image.numpy(), expected[29 + rows])
    squeezed = load(ARRAYS, replace(CNN, resize=230, squeeze=True)).query.image[:]
    np.testing.assert_array_equal(squeezed[2], to_pixels(pictures[31], 230, True))
    crops = load(ARRAYS, replace(CNN, augment=True)).query.image.crops(
        np.array([2]), np.array([[0, 0.999]])
    )
    whole = read_whole(pictures[31], 224, False)  # 14 x 10 become 313 x 224
    np.testing.assert_array_equal(crops, [whole[:, :, 313 - 224 :]])
    monkeypatch.setattr("vhabl.data.npy.CHUNK", 7)
    described = load(ARRAYS)
    np.testing.assert_array_equal(described.database.image, describe_images(pictures[:29]))
    assert described.query.ids.tolist() == data.query.ids.tolist()


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("scale", ["255", "1", "normalised"])
def test_real_pictures_are_read_as_those_of_8_bits(
    tmp_path: Path, scale: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array on its own scale; what numbers it has decides, over all of its pictures."""
    monkeypatch.setattr("vhabl.data.npy.CHUNK", 7)
    arrays = picture_arrays()
    arrays["train_image"][0, 0, 0] = (0, 130, 255)
    arrays["train_image"][-7:] //= 4  # the last pictures alone would not tell
    write_arrays(tmp_path / "arrays", arrays)
    expected = load(ARRAYS, CNN)
    change = {
        "255": lambda a: a * 1.0,
        "1": lambda a: a / 255,
        "normalised": lambda a: (a / 255 - IMAGENET[0]) / IMAGENET[1],
    }[scale]
    for name in ("train_image", "test_image"):
        arrays[name] = change(arrays[name]).astype(kind)
    write_arrays(tmp_path / "arrays", arrays)
    found = load(ARRAYS, CNN)
    for role in ("train", "database", "query"):
        own, other = getattr(found, role), getattr(expected, role)
        np.testing.assert_array_equal(own.image[:], other.image[:])


def test_texts_in_another_order_keep_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the release has them: the training texts are permuted against the images."""
    arrays = feature_images(picture_arrays())
    write_arrays(tmp_path / "arrays", arrays)
    paired = load(ARRAYS)
    assert paired.spec.paired and paired.database.text_labels is None
    order = np.arange(24)
    np.random.RandomState(10).shuffle(order)
    for name in ("train_text", "train_text_label"):
        arrays[name] = arrays[name][order]
    write_arrays(tmp_path / "arrays", arrays)
    data = load(ARRAYS)
    differ = int((arrays["train_text_label"] != arrays["train_image_label"]).any(axis=1).sum())
    assert data.notes[1:] == (
        f"train: {differ} texts with other labels than the image of the row: images and texts are "
        "no pairs",
    )
    assert not data.spec.paired and data.query.text_labels is None
    of_texts = np.concatenate([arrays["train_text_label"], arrays["vali_label"]])
    np.testing.assert_array_equal(data.train.labels, arrays["train_image_label"])
    np.testing.assert_array_equal(data.train.text_labels, arrays["train_text_label"])
    np.testing.assert_array_equal(data.database.labels, paired.database.labels)
    np.testing.assert_array_equal(data.database.text_labels, of_texts)
    np.testing.assert_array_equal(data.query.labels_of_texts, arrays["test_label"])
    part = validation_split(data, 0.25, 3)
    for split in (part.train, part.database, part.query):
        rows = np.flatnonzero(np.isin(data.train.ids, split.ids))
        np.testing.assert_array_equal(split.text_labels, data.train.text_labels[rows])
    assert_fails(
        lambda: collection(ARRAYS, EncoderConfig()), Path("arrays"), ["not one item", "needs pairs"]
    )
    arrays["train_text_label"][0] = np.roll(arrays["train_text_label"][0], 1)  # nothing else moves
    write_arrays(tmp_path / "arrays", arrays)
    assert load(ARRAYS).fingerprint not in (data.fingerprint, paired.fingerprint)


@pytest.mark.parametrize("kind", ["features", "pairs"])
def test_training_texts_in_a_seeded_order(kind: str, tmp_path: Path) -> None:
    """The order of the release, on data that come as pairs: only the training texts move."""
    if kind == "features":
        config, encoder = features_config(write_feature_file(tmp_path / "f.mat")), EncoderConfig()
    else:  # pixels and tokens, which stay where they are
        config = replace(pairs_config(), path=str(write_pairs(tmp_path / "p")))
        encoder = EncoderConfig("clip", "ViT-B-32", "")
    pairs, data = load(config, encoder), load(replace(config, text_order=10), encoder)
    np.random.seed(10)
    order = np.arange(len(pairs.train))
    np.random.shuffle(order)
    train = data.train
    np.testing.assert_array_equal(train.ids, pairs.train.ids)
    np.testing.assert_array_equal(train.image[:], pairs.train.image[:])
    np.testing.assert_array_equal(train.labels, pairs.train.labels)
    np.testing.assert_array_equal(train.text[:], pairs.train.text[order])
    np.testing.assert_array_equal(train.text_labels, pairs.train.labels[order])
    for role in ("database", "query"):
        own, other = getattr(data, role), getattr(pairs, role)
        assert own.text_labels is None
        for part in ("ids", "image", "text", "labels"):
            np.testing.assert_array_equal(getattr(own, part)[:], getattr(other, part)[:])
    assert pairs.spec.paired and not data.spec.paired and data.fingerprint != pairs.fingerprint


@pytest.mark.parametrize("held", [True, False])
def test_the_digests_of_arrays_see_every_picture(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2**28 if held else 0)
    arrays, prints, states = picture_arrays(train=24 if held else 520), [], []
    for change in ("", "train_image", "vali_image", "test_image", "test_text", "again"):
        if change in arrays:  # the second picture, which is not in the sample of 520
            arrays[change].reshape(len(arrays[change]), -1)[1, :30] += 1
        write_arrays(tmp_path / "arrays", arrays)
        data = load(ARRAYS, CNN)
        prints.append(data.fingerprint)
        states.append(None if held else data.train.image.store.state())
    assert len(set(prints)) == 5 and prints[-1] == prints[-2]
    assert held or len(set(states)) == 4  # of pictures alone


def test_a_query_that_is_a_training_item_too_is_the_same_item(tmp_path: Path) -> None:
    arrays = picture_arrays()
    for part in ("image", "text"):
        arrays[f"test_{part}"][2] = arrays[f"train_{part}"][9]
    arrays["test_image"][4] = arrays["train_image"][9]  # the image alone is not the item
    data = load(replace(ARRAYS, path=str(write_arrays(tmp_path / "arrays", arrays))), CNN)
    assert data.query.ids[2] == data.train.ids[9]
    assert np.isin(data.query.ids, data.database.ids).tolist() == [False] * 2 + [True] + [False] * 4


def with_value(name: str, value: Any, at: tuple[int, ...] = (1, 0)) -> dict[str, np.ndarray]:
    arrays = picture_arrays()
    arrays[name] = arrays[name].astype(float)
    arrays[name][at] = value
    return arrays


def with_array(name: str, change: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
    arrays = picture_arrays()
    return arrays | {name: change(arrays[name])}


IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean and spread of channels


def objects(values: np.ndarray) -> np.ndarray:
    return values.astype(object)


PICTURES = "items x height x width x 3 of uint8 or real numbers"
BAD_ARRAYS: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "objects": (with_array("train_image", objects), ["train_image.npy", "damaged or of another"]),
    "label objects": (with_array("vali_label", objects), ["vali_label.npy", "damaged or"]),
    "no items": (with_array("test_text", lambda a: a[:0]), ["test_text.npy"]),
    "a number": (with_array("test_text", lambda a: np.array(3.0)), ["test_text.npy", "()"]),
    "words": (with_array("test_text", lambda a: a.astype(str)), ["test_text.npy", "<U"]),
    "channels first": (
        with_array("test_image", lambda a: a.transpose(0, 3, 1, 2)),
        ["test_image.npy", "shape (7, 3, 10, 14) of type uint8", PICTURES],
    ),
    "grey": (with_array("vali_image", lambda a: a[..., 0]), ["vali_image.npy", PICTURES]),
    "four channels": (
        with_array("vali_image", lambda a: a[..., [0, 1, 2, 2]]),
        ["vali_image.npy", "(5, 10, 14, 4)", PICTURES],
    ),
    "whole numbers": (
        with_array("train_image", lambda a: a.astype(np.int32)),
        ["train_image.npy", "int32", PICTURES],
    ),
    "pictures of -1 to 1": (
        with_array("vali_image", lambda a: a / 127.5 - 1),
        ["vali_image.npy", "numbers from -1 to ", "0 to 1, 0 to 255, or levels"],
    ),
    "pictures over their spread": (
        with_array("test_image", lambda a: a / 60),
        ["test_image.npy", "numbers from 0 to ", "0 to 1, 0 to 255, or levels"],
    ),
    "pictures beyond 255": (
        with_array("test_image", lambda a: a * 2.0),
        ["test_image.npy", "numbers from 0 to ", "0 to 1, 0 to 255, or levels"],
    ),
    "other pixels normalised": (
        with_array("train_image", lambda a: ((a + 0.5) / 255 - IMAGENET[0]) / IMAGENET[1]),
        ["train_image.npy", "0 to 1, 0 to 255, or levels"],
    ),
    "picture nan": (
        with_value("vali_image", np.nan, (4, 9, 13, 2)),
        ["vali_image.npy", "numbers that are not finite"],
    ),
    "pictures and features": (
        with_array("test_image", lambda a: a[:, 0, :, 0]),
        ["4 axes in train_image", "2 axes in test_image"],
    ),
    "fewer images": (
        with_array("test_image", lambda a: a[1:]),
        ["6 rows in test_image", "7 rows in test_text", "7 rows in test_label"],
    ),
    "fewer texts": (
        with_array("train_text", lambda a: a[1:]),
        ["24 rows in train_image", "23 rows in train_text", "24 rows in train_text_label"],
    ),
    "fewer labels": (
        with_array("train_text_label", lambda a: a[1:]),
        ["24 rows in train_image_label", "23 rows in train_text_label"],
    ),
    "other words": (
        with_array("vali_text", lambda a: a[:, 1:]),
        ["9 columns in train_text", "8 columns in vali_text"],
    ),
    "other classes": (
        with_array("test_label", lambda a: a[:, 1:]),
        ["3 columns in train_image_label", "2 columns in test_label"],
    ),
    "nan": (with_value("vali_text", np.nan), ["vali_text.npy", "nan in row 2, column 1", "finite"]),
    "infinity": (with_value("train_text", np.inf), ["train_text.npy", "inf in row 2", "finite"]),
    "label 2": (with_value("test_label", 2), ["test_label.npy", "2 in row 2, column 1", "0 and 1"]),
    "label nan": (with_value("vali_label", np.nan), ["vali_label.npy", "nan in row 2", "0 and 1"]),
    "feature nan": (
        feature_images(picture_arrays()) | {"test_image": np.full((7, 6), np.nan)},
        ["test_image.npy", "nan in row 1, column 1 (42 such values)", "finite"],
    ),
    "feature widths": (
        feature_images(picture_arrays()) | {"test_image": np.ones((7, 5))},
        ["6 columns in train_image", "5 columns in test_image"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.filterwarnings("error")
def test_bad_arrays_are_named(tmp_path: Path, name: str) -> None:
    arrays, parts = BAD_ARRAYS[name]
    write_arrays(tmp_path / "arrays", arrays)
    assert_fails(lambda: load(ARRAYS), Path("arrays"), parts)


@pytest.mark.parametrize("name", picture_arrays())
def test_a_missing_or_foreign_array_is_named(tmp_path: Path, name: str) -> None:
    folder = write_arrays(tmp_path / "arrays", picture_arrays())
    file, archive = folder / f"{name}.npy", folder / "x.npz"
    where = Path("arrays") / file.name
    whole = file.read_bytes()
    np.savez(archive, a=np.ones(3))
    contents = (b"", b"text", whole[:40], whole[:-1], pickle.dumps({"a": 1}), archive.read_bytes())
    for content in contents:
        file.write_bytes(content)
        assert_fails(lambda: load(ARRAYS), where, ["an array of numbers"])
    file.unlink()
    assert_fails(lambda: load(ARRAYS), where, ["no such file", "train_image_label.npy"])
    file.mkdir()
    assert_fails(lambda: load(ARRAYS), where, ["no such file"])


class Code:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("trace"),)


def test_no_code_in_arrays_is_run(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", picture_arrays())
    np.save(folder / "test_label.npy", np.array([Code()]), allow_pickle=True)
    assert_fails(
        lambda: load(ARRAYS), Path("arrays/test_label.npy"), ["damaged or of another kind"]
    )
    (folder / "test_label.npy").write_bytes(pickle.dumps(Code()))
    assert_fails(
        lambda: load(ARRAYS), Path("arrays/test_label.npy"), ["damaged or of another kind"]
    )
    assert not Path("trace").exists()


def test_arrays_are_refused_where_an_encoder_takes_other_inputs(tmp_path: Path) -> None:
    where = Path("encoder.name")
    write_arrays(tmp_path / "arrays", picture_arrays())
    towers = EncoderConfig("clip", weights="")
    assert_fails(lambda: load(ARRAYS, towers), where, ["'clip'", "bags of words", "arrays"])
    write_arrays(tmp_path / "arrays", feature_images(picture_arrays()))
    parts = ["features", "train_image.npy", "N x h x w x 3"]
    assert_fails(lambda: load(ARRAYS, CNN), where, parts)
    named = replace(ARRAYS, class_names=["one", "two"])
    assert_fails(lambda: load(named), Path("data.class_names"), ["2 names", "3 columns of labels"])


def test_the_check_looks_at_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_arrays(tmp_path / "arrays", picture_arrays())
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nkind: npy\npath: arrays\n")
    assert data_command.main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    first, *classes = out.splitlines()[:-4]
    assert first.endswith("labels an item, 0.0% of the items without a label")
    assert [line.partition(":")[0] for line in classes] == [f"  class {n}" for n in (1, 2, 3)]
    assert out.splitlines()[-4:] == [
        "train: 24 items", "database: 29 items", "query: 7 items", "no problem found",
    ]  # fmt: skip
    assert err == "note: vali: 5 items, in the database and in nothing else\n"
