"""Code files, read and written: the releases' .mat layout, and .npz of packed bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from vhabl.codes.bits import pack, unpack
from vhabl.data.labels import as_labels
from vhabl.data.matlab import read_mat
from vhabl.system.errors import brief, fail, note, plural
from vhabl.system.files import atomic_path, check_archive
from vhabl.types import Codes

_ORACLE = "oracle_labels"
_LAYOUT = (
    "a code file of val_B, retrieval_B, L_te, L_db (fused) or "
    "q_img, q_txt, r_img, r_txt, q_l, r_l (cross)"
)


def mat_name(title: str, bits: int, data: str) -> str:
    """The releases' name of a code file: `VH-ABL_16-wiki_bits.mat`."""
    return f"{title}_{bits}-{data}_bits.mat"


def save(folder: Path, title: str, data: str, tasks: dict[str, Codes]) -> list[Path]:
    """Write one code length in the releases' .mat layout and as packed bits (.npz).

    tasks: {"fused": codes}, or {"i2t": codes, "t2i": codes} where the query of i2t and the database
    of t2i are the images' codes. The .npz holds the same arrays packed, with `bits`.

    Where texts have other labels than images, q_l and r_l are those of the images, and q_txt_l and
    r_txt_l those of the texts. Codes made from the labels that judge them have the key
    `oracle_labels` in both.
    """
    first = next(iter(tasks.values()))
    if "fused" in tasks:
        arrays = {"val_B": first.query, "retrieval_B": first.database}
        labels = {"L_te": first.query_labels, "L_db": first.database_labels}
    else:
        i2t, t2i = tasks["i2t"], tasks["t2i"]
        arrays = {
            "q_img": i2t.query,
            "q_txt": t2i.query,
            "r_img": t2i.database,
            "r_txt": i2t.database,
        }
        labels = {"q_l": i2t.query_labels, "r_l": t2i.database_labels}  # of images
        of_texts = {"q_txt_l": t2i.query_labels, "r_txt_l": i2t.database_labels}
        if not all(map(np.array_equal, labels.values(), of_texts.values())):
            labels |= of_texts
    if first.oracle_labels:
        labels[_ORACLE] = np.array(1, np.uint8)
    mat = folder / mat_name(title, first.bits, data)
    with atomic_path(mat) as path:
        content = {k: v.astype(np.float32) for k, v in arrays.items()} | labels
        scipy.io.savemat(path, content, do_compression=True)
    npz = mat.with_suffix(".npz")
    with atomic_path(npz) as path, path.open("wb") as file:
        packed: dict[str, Any] = {k: pack(v) for k, v in arrays.items()} | labels
        np.savez(file, bits=np.int64(first.bits), **packed)
    return [mat, npz]


def load(path: Path) -> dict[str, Codes]:
    """Read a code file in the releases' .mat layouts or a packed .npz: {task: Codes}.

    A fused file has one task; a cross file has i2t and t2i, and the mono-modal i2i and t2t, in
    which images and texts are judged by their own labels where the file has both (`save`).

    Raises VhablError where a key is missing, a code is not +-1 (or 0/1), or sizes disagree.
    """
    arrays = read_npz(path) if path.suffix == ".npz" else read_mat(path, expected=_LAYOUT)
    if "val_B" in arrays and "retrieval_B" in arrays:
        judges = {"val_B": "L_te", "retrieval_B": "L_db"}
        tasks = {"fused": ("val_B", "retrieval_B")}
    elif {"q_img", "q_txt", "r_img", "r_txt"} <= arrays.keys():
        judges = {"q_img": "q_l", "q_txt": "q_l", "r_img": "r_l", "r_txt": "r_l"}
        if "q_txt_l" in arrays or "r_txt_l" in arrays:
            judges |= {"q_txt": "q_txt_l", "r_txt": "r_txt_l"}
        tasks = {
            "i2t": ("q_img", "r_txt"),
            "t2i": ("q_txt", "r_img"),
            "i2i": ("q_img", "r_img"),
            "t2t": ("q_txt", "r_txt"),
        }
    else:
        fail(path, f"its keys are {', '.join(sorted(arrays)) or 'none'}", f"It must be {_LAYOUT}")
    needed = dict.fromkeys(judges.values())
    for key in needed:
        if key not in arrays:
            fail(path, f"no key {key}", f"It must be {_LAYOUT}")
    labels = as_labels(path, {key: arrays[key] for key in needed}, lambda key: f"{path}: key {key}")
    result = {}
    for task, (query_key, database_key) in tasks.items():
        query = _codes(path, query_key, arrays[query_key])
        database = _codes(path, database_key, arrays[database_key])
        if query.shape[1] != database.shape[1]:
            what = f"{query.shape[1]} bits in {query_key}, {database.shape[1]} in {database_key}"
            fail(path, what, "Both must have as many")
        query_labels, database_labels = labels[judges[query_key]], labels[judges[database_key]]
        for key, codes, rows in (
            (query_key, query, query_labels),
            (database_key, database, database_labels),
        ):
            if len(codes) != len(rows):
                do = "Give one for each"
                fail(f"{path}: key {key}", f"{len(rows)} label rows for {len(codes)} codes", do)
        oracle = _ORACLE in arrays
        result[task] = Codes(query, database, query_labels, database_labels, oracle)
    return result


def texts(array: np.ndarray) -> list[str]:
    """The strings of an array of text. Raises ValueError or SystemError where it holds none."""
    if array.dtype.kind != "U" or array.ndim > 1:
        raise ValueError(f"shape {array.shape} of {array.dtype}")
    found: list[str] = np.atleast_1d(array).tolist()
    return found


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz of packed codes, codes unpacked to +-1. Raises VhablError."""
    expected = "an .npz of packed codes"
    try:
        check_archive(path)  # np.load would also take a single array
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file.items())
        for array in arrays.values():
            if isinstance(array, np.ndarray) and array.dtype.kind == "U":
                texts(array)
    except FileNotFoundError:
        fail(path, "no such file", f"Give {expected}")
    except Exception as error:  # damaged bytes raise many types
        fail(path, f"it cannot be read ({brief(error)})", f"It must be {expected}")
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        fail(path, "an archive of other files", f"It must be {expected}")
    bits = arrays.pop("bits", None)
    if bits is None or bits.size != 1 or not np.issubdtype(bits.dtype, np.integer):
        fail(path, "no key bits", "It must say the code length")
    length = int(bits.reshape(-1)[0])
    for key, array in arrays.items():
        if array.ndim != 2 or key.lower().startswith("l_") or key.endswith("_l"):
            continue
        if array.dtype != np.uint8 and array.shape[1] != length:
            fail(f"{path}: key {key}", f"{array.shape[1]} bits a code", f"Key bits says {length}")
        if array.dtype == np.uint8:
            if length < 1 or array.shape[1] != -(-length // 8):
                do = f"{length} bits take {-(-length // 8)}"
                fail(f"{path}: key {key}", f"{array.shape[1]} bytes a code", do)
            if length % 8 and (array[:, -1] >> length % 8).any():
                found = f"more than {length} bits a code, or another order of bits"
                fail(f"{path}: key {key}", found, "Pack as vhabl.codes.pack does")
            arrays[key] = unpack(array, length)
    return arrays


def _codes(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiub":
        do = "It must be numbers, items x bits"
        fail(f"{path}: key {key}", f"shape {values.shape} of type {values.dtype}", do)
    found = np.unique(values)
    if not np.isin(found, (-1, 0, 1)).all():
        shown = ", ".join(f"{v:g}" for v in found[~np.isin(found, (-1, 0, 1))][:3])
        fail(
            f"{path}: key {key}", f"values such as {shown}", "Codes must be -1 and +1 (or 0 and 1)"
        )
    if -1 in found and 0 in found:
        zeros = int((values == 0).sum())
        note(f"{path}: key {key}: {plural(zeros, 'zero')} of a sign function taken as +1")
        return np.where(values >= 0, 1, -1).astype(np.int8)
    return np.where(values > 0, 1, -1).astype(np.int8)
