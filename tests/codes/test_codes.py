"""Binary codes: the sign, packing, and the code files of the releases."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mat73 import write_mat73

from vhabl import codes
from vhabl.nn.quantisation import binarise
from vhabl.system.errors import VhablError
from vhabl.system.files import Unwritable
from vhabl.types import Codes

BITS = 13  # not a multiple of 8: the last byte of a packed code is padded
FUSED_KEYS = ["val_B", "retrieval_B", "L_te", "L_db"]
CROSS_KEYS = ["q_img", "q_txt", "r_img", "r_txt", "q_l", "r_l"]


def signs(rows: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (rows, bits))


def labels(rows: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((rows, 3)) < 0.5).astype(np.uint8)


def fused_tasks() -> dict[str, Codes]:
    return {"fused": Codes(signs(4, BITS, 1), signs(6, BITS, 2), labels(4, 3), labels(6, 4))}


def cross_tasks() -> dict[str, Codes]:
    query_labels, database_labels = labels(4, 3), labels(6, 4)
    return {
        "i2t": Codes(signs(4, BITS, 1), signs(6, BITS, 2), query_labels, database_labels),
        "t2i": Codes(signs(4, BITS, 5), signs(6, BITS, 6), query_labels, database_labels),
    }


def with_mono_modal(tasks: dict[str, Codes]) -> dict[str, Codes]:
    """What a file of these tasks loads as: a cross file serves i2i and t2t too."""
    if "fused" in tasks:
        return tasks
    i2t, t2i = tasks["i2t"], tasks["t2i"]
    sides = {"i2i": (i2t, t2i), "t2t": (t2i, i2t)}
    return tasks | {
        task: Codes(q.query, d.database, q.query_labels, d.database_labels)
        for task, (q, d) in sides.items()
    }


def unpaired_tasks() -> dict[str, Codes]:
    """Texts have other labels than images."""
    i2t, t2i = cross_tasks().values()
    return {
        "i2t": replace(i2t, database_labels=labels(6, 7)),
        "t2i": replace(t2i, query_labels=labels(4, 8)),
    }


def fused_arrays() -> dict[str, Any]:
    found = fused_tasks()["fused"]
    arrays = found.query, found.database, found.query_labels, found.database_labels
    return dict(zip(FUSED_KEYS, arrays, strict=True))


def cross_arrays() -> dict[str, Any]:
    i2t, t2i = cross_tasks().values()
    arrays = (
        i2t.query,
        t2i.query,
        t2i.database,
        i2t.database,
        i2t.query_labels,
        i2t.database_labels,
    )
    return dict(zip(CROSS_KEYS, arrays, strict=True))


def assert_equal_tasks(found: dict[str, Codes], expected: dict[str, Codes]) -> None:
    assert list(found) == list(expected)
    for task, own in expected.items():
        for name, dtype in (
            ("query", np.int8),
            ("database", np.int8),
            ("query_labels", np.uint8),
            ("database_labels", np.uint8),
        ):
            array = getattr(found[task], name)
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, getattr(own, name), err_msg=f"{task} {name}")


def test_labels_may_be_class_numbers_and_one_column_of_0_and_1_is_refused(tmp_path: Path) -> None:
    arrays = fused_arrays()
    numbers = {"L_te": np.array([1, 2, 3, 1]), "L_db": np.array([1, 2, 3, 3, 2, 1])}
    path = tmp_path / "codes.mat"
    scipy.io.savemat(path, arrays | {name: n[:, None] for name, n in numbers.items()})
    found = codes.load(path)["fused"]
    assert found.query_labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert found.database_labels.argmax(axis=1).tolist() == [0, 1, 2, 2, 1, 0]
    scipy.io.savemat(path, arrays | {name: n[:, None] % 2 for name, n in numbers.items()})
    assert_load_fails(path, ["L_te", "one column of 0 and 1", "class numbers from 1"])


# The sign and packing


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_of_either_sign_is_plus_one(dtype: torch.dtype) -> None:
    h = torch.tensor([[0.0, -0.0, 1e-7, -1e-7], [1.0, -1.0, torch.inf, -torch.inf]], dtype=dtype)
    found = binarise(h)
    assert found.dtype == dtype
    assert found.tolist() == [[1, 1, 1, -1], [1, -1, 1, -1]]


def test_first_bit_is_the_lowest_of_the_first_byte() -> None:
    minus = -np.ones(10, np.int8)
    one_bit = np.where(np.eye(10, dtype=bool), 1, minus)
    assert codes.pack(one_bit).tolist() == [
        [1, 0],
        [2, 0],
        [4, 0],
        [8, 0],
        [16, 0],
        [32, 0],
        [64, 0],
        [128, 0],
        [0, 1],
        [0, 2],
    ]
    # bits 0, 1, 4 and 9: 1 + 2 + 16 = 19, and 2 in the second byte
    code = minus.copy()
    code[[0, 1, 4, 9]] = 1
    assert codes.pack(code[None]).tolist() == [[19, 2]]
    assert codes.unpack(np.array([[19, 2]], np.uint8), 10).tolist() == [code.tolist()]


@given(bits=st.integers(1, 1100), rows=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_packing_and_unpacking_give_the_same_codes(bits: int, rows: int, seed: int) -> None:
    own = signs(rows, bits, seed)
    packed = codes.pack(own)
    assert packed.shape == (rows, (bits + 7) // 8) and packed.dtype == np.uint8
    if bits % 8:
        assert (packed[:, -1] < 1 << bits % 8).all(), "the padding is zero"
    found = codes.unpack(packed, bits)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, own)


# Files out and in


@pytest.mark.parametrize("make", [fused_tasks, cross_tasks, unpaired_tasks])
def test_saved_codes_load_as_the_same_codes(
    tmp_path: Path, make: Callable[[], dict[str, Codes]]
) -> None:
    mat, npz = codes.save(tmp_path / "new" / "folder", "Ours", "wiki", make())
    assert (mat.suffix, npz.suffix) == (".mat", ".npz") and mat.stem == npz.stem
    for path in (mat, npz):
        assert_equal_tasks(codes.load(path), with_mono_modal(make()))


def test_fused_file_is_as_the_releases_write_it(tmp_path: Path) -> None:
    mat, npz = codes.save(tmp_path, "Ours", "flickr25k", fused_tasks())
    assert mat.name == "Ours_13-flickr25k_bits.mat" and npz.name == "Ours_13-flickr25k_bits.npz"
    assert_mat_holds(mat, fused_arrays(), code_keys=["val_B", "retrieval_B"])


def test_cross_file_is_as_the_releases_write_it(tmp_path: Path) -> None:
    mat, npz = codes.save(tmp_path, "CMCL", "flickr25k", cross_tasks())
    assert_mat_holds(mat, cross_arrays(), code_keys=["q_img", "q_txt", "r_img", "r_txt"])
    assert mat.name == "CMCL_13-flickr25k_bits.mat" and npz.name == "CMCL_13-flickr25k_bits.npz"


def test_a_file_has_the_labels_of_images_and_of_texts_where_they_differ(tmp_path: Path) -> None:
    mat, _ = codes.save(tmp_path, "HQ", "mirflickr", unpaired_tasks())
    i2t, t2i = unpaired_tasks().values()
    of_texts = {"q_txt_l": t2i.query_labels, "r_txt_l": i2t.database_labels}
    assert_mat_holds(mat, cross_arrays() | of_texts, ["q_img", "q_txt", "r_img", "r_txt"])
    content = scipy.io.loadmat(mat)
    del content["q_txt_l"]
    scipy.io.savemat(tmp_path / "part.mat", {k: v for k, v in content.items() if k[0] != "_"})
    with pytest.raises(VhablError, match=r"part\.mat.*key q_txt_l"):
        codes.load(tmp_path / "part.mat")


def assert_mat_holds(path: Path, arrays: dict[str, np.ndarray], code_keys: list[str]) -> None:
    content = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
    assert content.keys() == arrays.keys()
    for key, array in content.items():
        assert array.dtype == (np.float32 if key in code_keys else np.uint8)
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)


def test_a_packed_file_in_another_order_of_bits_is_refused(tmp_path: Path) -> None:
    """Where the length is no multiple of 8: then the bits beyond it are 0 in our order alone."""
    tasks = fused_tasks()
    assert BITS % 8
    _, npz = codes.save(tmp_path, "Ours", "wiki", tasks)
    with np.load(npz) as content:
        arrays = dict(content.items())
    for key, signs in (("val_B", tasks["fused"].query), ("retrieval_B", tasks["fused"].database)):
        arrays[key] = np.packbits(signs > 0, axis=1)
    np.savez(npz, **arrays)
    with pytest.raises(VhablError, match=rf"val_B: more than {BITS} bits a code, or another order"):
        codes.load(npz)


def test_the_length_of_a_file_is_that_of_its_codes(tmp_path: Path) -> None:
    _, npz = codes.save(tmp_path, "Ours", "wiki", fused_tasks())
    with np.load(npz) as content:
        arrays = dict(content.items()) | {"val_B": fused_tasks()["fused"].query}
    np.savez(npz, **arrays | {"bits": BITS})
    assert codes.load(npz)["fused"].bits == BITS
    np.savez(npz, **arrays | {"bits": BITS - 1})
    with pytest.raises(VhablError, match=rf"val_B: {BITS} bits a code. Key bits says {BITS - 1}"):
        codes.load(npz)


def test_packed_file_holds_bytes_and_the_length(tmp_path: Path) -> None:
    _, npz = codes.save(tmp_path, "Ours", "wiki", fused_tasks())
    with np.load(npz) as content:
        assert set(content.files) == {"bits", *FUSED_KEYS}
        assert content["bits"] == BITS
        assert content["val_B"].dtype == np.uint8 and content["val_B"].shape == (4, 2)


@pytest.mark.parametrize(
    "as_published",
    [
        pytest.param(lambda b: b.astype(np.float32), id="single"),
        pytest.param(lambda b: b.astype(np.float64), id="double"),
        pytest.param(lambda b: b, id="int8"),
        pytest.param(lambda b: (b > 0).astype(np.uint8), id="zero and one"),
        pytest.param(lambda b: b > 0, id="logical"),
    ],
)
@pytest.mark.parametrize("write", [scipy.io.savemat, write_mat73], ids=["5", "7.3"])
def test_codes_of_other_programs_load(
    tmp_path: Path,
    write: Callable[[Path, dict[str, Any]], None],
    as_published: Callable[[np.ndarray], np.ndarray],
) -> None:
    path = tmp_path / "codes.mat"
    arrays = fused_arrays()
    for key in ("val_B", "retrieval_B"):
        arrays[key] = as_published(arrays[key])
    for key in ("L_te", "L_db"):
        arrays[key] = arrays[key].astype(np.float32)
    write(path, arrays)
    assert_equal_tasks(codes.load(path), fused_tasks())


def test_the_zeros_of_a_sign_function_are_ones_and_the_user_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "codes.mat"
    arrays = fused_arrays()
    zeros = np.zeros_like(arrays["val_B"], bool)
    zeros[:2, 1:4] = True
    arrays["val_B"] = np.where(zeros, 0, arrays["val_B"])
    scipy.io.savemat(path, arrays)
    found = codes.load(path)["fused"].query
    assert (found[zeros] == 1).all()
    assert np.array_equal(found[~zeros], fused_tasks()["fused"].query[~zeros])
    told = capsys.readouterr().err
    assert told == f"note: {path}: key val_B: 6 zeros of a sign function taken as +1\n"


# Bad input: the message names the file, the key, and what was found


def replaced(key: str, change: Callable[[np.ndarray], Any], cross: bool = False) -> dict[str, Any]:
    arrays = cross_arrays() if cross else fused_arrays()
    arrays[key] = change(arrays[key])
    return arrays


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float64)
        array[1, 2] = value
        return array

    return change


BAD_ARRAYS = {
    "a half": (replaced("val_B", with_value(0.5)), ["val_B", "0.5", "-1 and +1"]),
    "nan code": (replaced("val_B", with_value(np.nan)), ["val_B", "nan", "-1 and +1"]),
    "relaxed codes": (replaced("val_B", lambda b: b * 0.9), ["val_B", "0.9", "-1 and +1"]),
    "2 for 1": (replaced("q_txt", with_value(2), cross=True), ["q_txt", "2", "-1 and +1"]),
    "text codes": (replaced("val_B", lambda b: "codes"), ["val_B", "U5", "items x bits"]),
    "structure": (replaced("val_B", lambda b: {"a": 1}), ["val_B", "items x bits"]),
    "complex codes": (replaced("val_B", lambda b: b * 1j), ["val_B", "complex", "items x bits"]),
    "no codes": (replaced("val_B", lambda b: b[:0]), ["val_B", "(0, 13)", "items x bits"]),
    "differing bits": (
        replaced("retrieval_B", lambda b: b[:, :8]),
        ["val_B", "retrieval_B", "13 bits", "8 in"],
    ),
    "differing bits across": (
        replaced("r_img", lambda b: b[:, :8], cross=True),
        ["q_txt", "r_img", "13 bits", "8 in"],
    ),
    "differing classes": (
        replaced("L_db", lambda y: y[:, :2]),
        ["L_te", "L_db", "3 columns in L_te, 2 columns in L_db"],
    ),
    "label 2": (replaced("L_te", with_value(2)), ["L_te", "2 in row", "0 and 1"]),
    "label nan": (replaced("r_l", with_value(np.nan), cross=True), ["r_l", "nan", "0 and 1"]),
    "label text": (replaced("L_te", lambda y: "cat"), ["L_te", "U3", "items x classes"]),
    "too few queries": (replaced("val_B", lambda b: b[:3]), ["val_B", "3 codes", "4 label rows"]),
    "too few items": (
        replaced("retrieval_B", lambda b: b[:5]),
        ["retrieval_B", "5 codes", "6 label rows"],
    ),
    "too few texts": (
        replaced("r_txt", lambda b: b[:5], cross=True),
        ["r_txt", "5 codes", "6 label rows"],
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path: Path, name: str) -> None:
    arrays, parts = BAD_ARRAYS[name]
    path = tmp_path / "codes.mat"
    scipy.io.savemat(path, arrays)
    assert_load_fails(path, parts)


@pytest.mark.parametrize("key", FUSED_KEYS + CROSS_KEYS)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    arrays = fused_arrays() if key in FUSED_KEYS else cross_arrays()
    del arrays[key]
    path = tmp_path / "codes.mat"
    scipy.io.savemat(path, arrays)
    assert_load_fails(path, [key, ". "])


def assert_load_fails(path: Path, parts: list[str]) -> None:
    with pytest.raises(VhablError) as caught:
        codes.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message, message


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
@pytest.mark.parametrize("make", [fused_tasks, cross_tasks, unpaired_tasks])
def test_a_truncated_file_is_named(
    tmp_path: Path, suffix: str, make: Callable[[], dict[str, Codes]]
) -> None:
    saved = codes.save(tmp_path, "Ours", "wiki", make())
    content = {p.suffix: p for p in saved}[suffix].read_bytes()
    path = tmp_path / f"cut{suffix}"
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        assert_load_fails(path, [". "])


def test_a_file_that_holds_no_codes_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# A text\n")
    assert_load_fails(path, ["README.md", "begins with", "a code file"])


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not a code file\n", b"\x89PNG\r\n\x1a\n" + bytes(600)],
    ids=["empty", "text", "picture"],
)
def test_a_foreign_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"codes{suffix}"
    path.write_bytes(content)
    assert_load_fails(path, [". "])


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
def test_no_file_and_a_folder_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"codes{suffix}"
    assert_load_fails(path, [". "])
    path.mkdir()
    assert_load_fails(path, [". "])


def packed_arrays() -> dict[str, Any]:
    arrays = fused_arrays()
    packed = {k: codes.pack(arrays[k]) for k in ("val_B", "retrieval_B")}
    return arrays | packed | {"bits": np.int64(BITS)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param({"bits": None}, ["key bits"], id="no length"),
        pytest.param({"bits": np.float64(13)}, ["key bits"], id="fractional type"),
        pytest.param({"bits": np.int64(17)}, ["val_B", "2 bytes", "17 bits"], id="longer"),
        pytest.param({"bits": np.int64(8)}, ["val_B", "2 bytes", "8 bits"], id="shorter"),
        pytest.param({"bits": np.int64(0)}, ["val_B", "0 bits"], id="zero"),
        pytest.param({"bits": np.int64(-13)}, ["val_B", "-13 bits"], id="negative"),
        pytest.param({"val_B": np.array(["a"])}, ["val_B", "U1"], id="texts"),
        pytest.param({"val_B": np.array([{}])}, [". "], id="objects"),
        pytest.param({"L_te": None}, ["L_te"], id="no labels"),
    ],
)
def test_a_bad_packed_file_is_named(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    path = tmp_path / "codes.npz"
    arrays = {k: v for k, v in (packed_arrays() | change).items() if v is not None}
    np.savez(path, **arrays)
    assert_load_fails(path, parts)


def test_a_single_array_named_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    with path.open("wb") as file:
        np.save(file, signs(4, BITS, 1))
    assert_load_fails(path, [". "])


def test_an_archive_of_other_files_is_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bits", "13")
        archive.writestr("val_B", "text")
    assert_load_fails(path, [". "])


def test_damaged_bytes_never_give_another_error(tmp_path: Path) -> None:
    """Codes or a message: also where another program compressed the file."""
    whole, path = tmp_path / "whole.npz", tmp_path / "damaged.npz"
    np.savez_compressed(whole, **packed_arrays())
    content = whole.read_bytes()
    for place in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            codes.load(path)
        except VhablError as error:
            assert str(path) in str(error)


# A write that fails


@pytest.mark.parametrize(("module", "function"), [(scipy.io, "savemat"), (np, "savez")])
def test_a_failing_write_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    first = codes.save(tmp_path, "Ours", "wiki", fused_tasks())
    before = {p: p.read_bytes() for p in first}

    def fill_the_disk(file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"half of it")
        else:
            file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    found = fused_tasks()["fused"]
    other = {
        "fused": Codes(-found.query, found.database, found.query_labels, found.database_labels)
    }
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fill_the_disk)
        with pytest.raises(Unwritable, match="No space"):
            codes.save(tmp_path, "Ours", "wiki", other)
        with pytest.raises(Unwritable, match="No space"):
            codes.save(tmp_path / "new", "Ours", "wiki", other)
    assert {p for p in tmp_path.iterdir() if p.is_file()} == set(first), "no temporary file stays"
    failed = first[0 if function == "savemat" else 1]
    assert failed.read_bytes() == before[failed], "the old file is whole"
    for path in (tmp_path / "new").iterdir():  # what was written before the failure is whole
        assert_equal_tasks(codes.load(path), other)
