"""What a run folder holds, and how it is written and read.

config.yaml          the configuration, whole
weights.safetensors  parameters and buffers; its header repeats the configuration and the data's
                     widths and digest, so that the file alone is a model, and has their own digest
metrics.json         a flat list of records
history.json         losses and validation of every epoch
split.json           which items were drawn as queries and for training (pairs and tables)
environment.json     versions, device, git revision, command
tensorboard/         the same losses as scalars
state.pt             while training is under way: what `resume=true` goes on from
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vhabl.config import (
    Config,
    build_method,
    first_difference,
    flat,
    from_yaml,
    override,
    stored,
    to_yaml,
)
from vhabl.data import load as load_data
from vhabl.encoders import digest_of
from vhabl.evaluation.records import Record, code_tasks
from vhabl.methods.base import HashingMethod
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.errors import brief, fail
from vhabl.system.files import PROJECT, atomic_path, read_rows, write_json, write_text
from vhabl.training.feature_cache import frozen_outputs
from vhabl.training.trainer import pick_device
from vhabl.types import Codes, Dataset, DataSpec

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
HISTORY_FILE = "history.json"
_PACKAGES = ("torch", "numpy", "scipy", "h5py", "safetensors", "faiss-cpu")


_ROW = ("data.name", "method", "variant", "oracle_labels")  # what a row of a table is of


@dataclass(frozen=True)
class Run:
    """A finished run as read from its folder."""

    folder: Path
    config: Config
    method: HashingMethod
    fingerprint: str
    digest: str  # of the weights


def save(
    folder: Path,
    config: Config,
    method: HashingMethod,
    data: Dataset,
    rows: list[Record],
    history: list[dict[str, Any]],
) -> None:
    """Write a finished run. Each file is whole at any moment."""
    write_text(folder / CONFIG_FILE, to_yaml(config))
    tensors = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
    header = {
        "config": to_yaml(config),
        "spec": json.dumps(asdict(data.spec)),
        "fingerprint": data.fingerprint,
        "digest": digest_of(sorted(tensors.items())),
    }
    with atomic_path(folder / WEIGHTS_FILE) as path:
        save_file(tensors, str(path), metadata=header)
    write_json(folder / HISTORY_FILE, history)
    if config.data.has_files:  # arrays come with their split
        drawn = {"query": data.query.ids.tolist(), "train": data.train.ids.tolist()}
        write_json(folder / "split.json", drawn)
    write_json(folder / "environment.json", environment())
    write_json(folder / METRICS_FILE, [row.as_dict() for row in rows])


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command: what a reader needs to repeat a run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
        "command": ["python", *sys.argv],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def load(folder: Path) -> Run:
    """Read a run's model from its weights file alone.

    Raises VhablError where there is no finished run, or the file is damaged or does not fit.
    """
    path = folder / WEIGHTS_FILE
    if not folder.exists():
        fail(folder, "no such folder", "Give the folder of a finished run")
    if not path.is_file():
        fail(
            folder,
            "no weights.safetensors is in it",
            "Give the folder of a finished run"
            + (" (resume=true goes on with this one)" if (folder / "state.pt").exists() else ""),
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        spec = _read_spec(header["spec"])
        text, fingerprint, digest = header["config"], header["fingerprint"], header["digest"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        do = "It must be weights saved by vhabl.train"
        fail(path, f"the file is damaged or of another kind ({brief(error)})", do)
    config = from_yaml(text, path)
    with torch.device("meta"):  # shapes alone: nothing is allocated before they fit
        expected = build_method(config, spec, pretrained=False)
    wrong = _mismatch(expected.state_dict(), tensors)
    if not wrong and digest_of(sorted(tensors.items())) != digest:
        wrong = "other values than were saved"
    if wrong:
        do = f"It must have the tensors of {expected.title} as its configuration describes it"
        fail(path, wrong, do)
    method = build_method(config, spec, pretrained=False)
    method.load_state_dict(tensors)
    return Run(folder, config, method.eval(), fingerprint, digest)


def _read_spec(text: str) -> DataSpec:
    """Raises ValueError, TypeError or RecursionError for what `save` did not write."""
    spec = DataSpec(**json.loads(text))
    sizes = (spec.image_dim, spec.text_dim, spec.classes, spec.train_items)
    if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    for names in (spec.class_names, spec.vocabulary, [spec.name]):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names that are no texts")
    return spec


def _mismatch(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    for name, tensor in expected.items():
        if name not in found:
            return f"no tensor {name}"
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            return f"{name} of shape {tuple(found[name].shape)} and type {found[name].dtype}"
        if found[name].is_floating_point() and not torch.isfinite(found[name]).all():
            return f"values in {name} that are not finite"
    extra = sorted(found.keys() - expected.keys())
    return f"an unknown tensor {extra[0]}" if extra else ""


def check_data(run: Run, data: Dataset) -> None:
    """Raise VhablError where a data set is not the one that the run was trained on."""
    if data.fingerprint == run.fingerprint:
        return
    spec = run.method.spec
    fail(
        run.folder / WEIGHTS_FILE,
        f"trained on {spec.name!r} (image {spec.image_dim}, text {spec.text_dim}, "
        f"{spec.classes} classes, {spec.train_items} training items)",
        f"The data are {data.name!r} (image {data.spec.image_dim}, text {data.spec.text_dim}, "
        f"{data.spec.classes} classes, {data.spec.train_items} training items; "
        f"content digest {data.fingerprint[:8]})",
    )


def find(folder: Path) -> list[Path]:
    """Folders of finished runs at or below a folder, in order of their path."""
    if not folder.exists():
        fail(folder, "no such folder", "Give a run folder, or a folder above several runs")
    found = sorted(path.parent for path in folder.rglob(WEIGHTS_FILE))
    if not found:
        do = "Give a run folder, or a folder above several runs"
        fail(folder, "no finished run (weights.safetensors) is in it", do)
    return found


def require_own(folder: Path, config: Config) -> None:
    """Raise VhablError where a folder has the finished run of another method, data set or seed."""
    if not (folder / WEIGHTS_FILE).is_file():
        return
    there, here = stored(folder / CONFIG_FILE), flat(config)
    for key in (*_ROW, "seed"):
        if there.get(key) != here.get(key):
            found = f"the finished run in it has {key}={there.get(key)}, this one {here.get(key)}"
            fail(folder, found, "Choose another folder: out=FOLDER")


def require_alike(folders: Iterable[Path]) -> None:
    """Raise VhablError where runs of one row of a table differ in more than their seed, or do not
    differ in it.
    """
    first: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    seeds: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        keys = stored(folder / CONFIG_FILE) | {"the digest of its data": _fingerprint(folder)}
        row = tuple(keys.get(k) for k in _ROW)
        other, theirs = first.setdefault(row, (folder, keys))
        difference = first_difference(theirs | {"seed": 0}, keys | {"seed": 0})
        if difference:
            key, a, b = difference
            do = "Seeds of one setting alone are averaged; variant=NAME keeps another one apart"
            fail(folder, f"{key}={b}, where {other} has {a}", do)
        if (same := seeds.setdefault((*row, keys.get("seed")), folder)) != folder:
            fail(folder, f"its seed is that of {same}", "Give each seed of a setting once")


def _fingerprint(folder: Path) -> str | None:
    """The digest of the data of a run; None where its weights are damaged, which `load` says."""
    try:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except (SafetensorError, OSError):
        return None


def encoded(
    found: Iterable[Run], bits: Sequence[int] | None, overrides: Sequence[str]
) -> Iterator[tuple[Run, Dataset, dict[int, dict[str, Codes]]]]:
    """Each run, its data and its codes of the lengths asked for, or of those it was trained for."""
    data: Dataset | None = None
    read: tuple[DataConfig, EncoderConfig] | None = None
    for run in found:
        config = override(run.config, overrides)
        if data is None or (config.data, config.encoder) != read:  # the same data are shared
            data, read = load_data(config.data, config.encoder), (config.data, config.encoder)
        check_data(run, data)
        method = run.method.to(pick_device(config.device))
        data = frozen_outputs(method.encoder, data, config.encoder)
        yield run, data, code_tasks(method, data, bits or config.bits)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Losses and validation of every epoch. Raises VhablError where the file is damaged."""
    path = folder / HISTORY_FILE
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8")))
        terms: dict[str, set[str]] = {}
        for row in rows:
            if row["phase"] not in ("select", "final") or type(row["epoch"]) is not int:
                raise ValueError("no phase or epoch")
            numbers = {name: value for name, value in row.items() if name != "phase"}
            if not all(isinstance(value, int | float) for value in numbers.values()):
                raise ValueError("a loss that is no number")
            for value in numbers.values():
                float(value)  # an integer may be too large
            own = row.keys() - {"validation"}
            if "loss" not in own or own != terms.setdefault(row["phase"], own):
                raise ValueError("other losses than before, or none")
        if not rows:
            raise ValueError("no epoch")
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as e:
        fail(path, f"this is no list of epochs ({brief(e)})", "It must be what training writes")
    return rows


def read_records(path: Path) -> list[Record]:
    """Read a metrics.json. Raises VhablError where it is not a list of records."""
    return read_rows(path, Record, "vhabl.train")
