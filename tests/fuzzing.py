"""Damage small valid files of every format, and read each as a command does:
python tests/fuzzing.py FIRST COUNT [READER[:NUMBER] ...], in an empty folder.

Case N of a reader is the same file whenever it is made, so that READER:N repeats one alone. A
reader may succeed, or end with exit code 2 and a message; it may not do anything else, compute for
longer than SECONDS, take more than MEMORY, or write a file. Cases run one after the other in a
forked process that this one watches: where it dies, the case has failed, and the next one goes on.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import scipy.sparse
import torch
from helpers import (
    TINY_TOWERS,
    TinyAlexNet,
    pair_overrides,
    picture_arrays,
    write_arrays,
    write_feature_file,
    write_pair_folder,
)
from mat73 import write_mat73
from mutations import Mutate, any_bytes, mutation
from PIL import Image
from safetensors.torch import save_file

from vhabl import codes, encode, train
from vhabl import eval as evaluation
from vhabl.codes.shards import Part, Shard
from vhabl.config import CONFIG_DIR, load
from vhabl.data import __main__ as data_command
from vhabl.data import load as load_data
from vhabl.data.images import open_image, read_pixels, to_pixels
from vhabl.data.table import read_items
from vhabl.encoders import cnn, open_clip
from vhabl.encoders.weights import read_state
from vhabl.report import __main__ as report
from vhabl.report.figures import training_curves
from vhabl.search import __main__ as search
from vhabl.search.page import uploaded
from vhabl.search.store import _checksum
from vhabl.search.where import parse
from vhabl.settings import DataConfig
from vhabl.system import errors
from vhabl.training import run_folder
from vhabl.training.feature_cache import _open as open_cache
from vhabl.training.trainer import Progress, Trainer
from vhabl.types import Codes

SECONDS = 10  # of computing; other work on the machine may make them more
MEMORY = 2**30
WHOLE, CASE = Path("whole"), Path("case")  # valid files, and a copy of which one is damaged
PAIR_DATA = str(CONFIG_DIR / "data" / "emoji.yaml")


@dataclass(frozen=True)
class Reader:
    """make: writes valid files into a folder; read: what a command does with one of them, given as
    a path below a copy of that folder; names: patterns of those that are damaged.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    names: tuple[str, ...] = ("**/*",)
    seal: Callable[[Path], object] | None = None  # what else a forger would change


READERS: dict[str, Reader] = {}


def reader(
    make: Callable[[Path], object], *names: str
) -> Callable[[Callable[[Path], object]], None]:
    def add(read: Callable[[Path], object]) -> None:
        READERS[read.__name__] = Reader(make, read, names or ("**/*",))

    return add


def restored(name: str) -> None:
    shutil.rmtree(CASE, ignore_errors=True)
    shutil.copytree(WHOLE / name, CASE)


# -- MATLAB files ----------------------------------------------------------------------------------


def feature_variables() -> dict[str, Any]:
    path = write_feature_file(Path("features.mat"), train=8)
    return {k: v[:8] for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}


def make_features(folder: Path) -> None:
    arrays = feature_variables()
    sparse = {k: scipy.sparse.csc_matrix(v) if k[0] == "L" else v for k, v in arrays.items()}
    scipy.io.savemat(folder / "plain.mat", arrays)
    scipy.io.savemat(folder / "packed.mat", arrays, do_compression=True)
    scipy.io.savemat(folder / "sparse.mat", sparse)


def make_features_73(folder: Path) -> None:
    arrays = feature_variables()
    sparse = {k: scipy.sparse.csc_matrix(v) if k[0] == "L" else v for k, v in arrays.items()}
    write_mat73(folder / "plain.mat", arrays)
    write_mat73(folder / "sparse.mat", sparse, header=False)
    with h5py.File(folder / "packed.mat", "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value.T, chunks=True, compression="gzip", shuffle=True)


def check_features(path: Path) -> None:
    wiki = str(CONFIG_DIR / "data" / "wiki.yaml")
    data_command.main(["check", wiki, f"data.path={path}", "data.class_names=[]"])


@reader(make_features)
def features(path: Path) -> None:
    check_features(path)


@reader(make_features_73)
def features_73(path: Path) -> None:
    check_features(path)


def make_pairs(folder: Path) -> None:
    write_pair_folder(folder, items=6, side=12)
    (folder / "classes.txt").write_text("red\ngreen\nblue\nwhite\n", encoding="utf-8")


def make_pairs_73(folder: Path) -> None:
    write_pair_folder(folder, items=6, side=12)
    captions = ["a", ["b", "b again"], "", "c", "d", "\U0001f600"]
    write_mat73(folder / "caption.mat", {"caption": captions})
    write_mat73(folder / "index.mat", {"index": [f"{n}.png" for n in range(6)]}, header=False)
    write_mat73(folder / "label.mat", {"label": np.eye(6, 4)})


def make_lines(folder: Path) -> None:
    make_pairs(folder)
    (folder / "caption.mat").unlink()
    (folder / "caption.txt").write_text("a\nb c\nd\n\ne\nf\n", encoding="utf-8")


def check_pairs(path: Path) -> None:
    given = [f"data.path={path.parent}", "data.class_names=[]", "data.query=2", "data.train=3"]
    data_command.main(["check", PAIR_DATA, *given])


@reader(make_pairs, "*.mat")
def pairs(path: Path) -> None:
    check_pairs(path)


@reader(make_pairs_73, "*.mat")
def pairs_73(path: Path) -> None:
    check_pairs(path)


@reader(make_lines, "*.txt")
def pair_texts(path: Path) -> None:
    check_pairs(path)


def some_codes(bits: int = 12) -> Codes:
    rng = np.random.default_rng(0)
    query, database = (np.where(rng.random((n, bits)) < 0.5, 1, -1) for n in (5, 9))
    labels = [np.eye(3, dtype=np.uint8)[rng.integers(3, size=n)] for n in (5, 9)]
    return Codes(query.astype(np.int8), database.astype(np.int8), *labels, False)


def make_codes(folder: Path) -> None:
    codes.save(folder, "fused", "wiki", {"fused": some_codes()})
    codes.save(folder, "cross", "wiki", {"i2t": some_codes(), "t2i": some_codes()})


def make_codes_73(folder: Path) -> None:
    make_codes(folder)
    for path in [*folder.iterdir()]:
        if path.suffix == ".mat":
            found = {k: v for k, v in scipy.io.loadmat(path).items() if k[0] != "_"}
            write_mat73(path, found)
        else:
            path.unlink()


def evaluate(path: Path) -> None:
    evaluation.main(["--codes", str(path), "--measures", "headline", "--json"])


@reader(make_codes)
def code_files(path: Path) -> None:
    evaluate(path)


@reader(make_codes_73)
def code_files_73(path: Path) -> None:
    evaluate(path)


# -- arrays, tables, pictures ----------------------------------------------------------------------


@reader(lambda folder: write_arrays(folder, picture_arrays(5, 3, 4)))
def arrays(path: Path) -> None:
    hq = str(CONFIG_DIR / "data" / "mirflickr_hq.yaml")
    data_command.main(["check", hq, f"data.path={path.parent}", "data.class_names=[]"])


def make_tables(folder: Path) -> None:
    rows = [(f"{n}.png", f'a "{n}", that', "red;small" if n % 2 else "blue") for n in range(6)]
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        lines = [mark.join(("image", "caption", "labels"))]
        for image, caption, labels in rows:
            lines.append(mark.join((image, '"' + caption.replace('"', '""') + '"', labels)))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [
        {"image": i, "caption": [c, "more"] if n % 2 else c, "labels": labels.split(";")}
        for n, (i, c, labels) in enumerate(rows)
    ]
    text = "\n".join(map(json.dumps, records))
    (folder / "t.jsonl").write_text(text + "\n", encoding="utf-8")
    (folder / "images").mkdir()
    for name, _, _ in rows:
        Image.new("RGB", (9, 9), "red").save(folder / "images" / name)


@reader(make_tables, "t.*")
def tables(path: Path) -> None:
    read_items(path, DataConfig("table", "table", str(path)))
    table = str(CONFIG_DIR / "data" / "table.yaml")
    data_command.main(["check", table, f"data.path={path}", "data.query=2", "data.train=3"])


def make_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(24, 30, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels)
    few, deep = colour.quantize(16), Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 250)
    for name, image, options in (
        ("a.jpg", colour, {}), ("progressive.jpg", colour, {"progressive": True}),
        ("cmyk.jpg", colour.convert("CMYK"), {}), ("a.png", clear, {}), ("few.png", few, {}),
        ("deep.png", deep, {}), ("a.gif", few, {}), ("a.bmp", colour, {}),
        ("moving.gif", few, {"save_all": True, "append_images": [few.rotate(90)]}),
        ("a.webp", clear, {}), ("whole.webp", colour, {"lossless": True}),
        ("moving.webp", clear, {"save_all": True, "append_images": [clear.rotate(90)]}),
        ("a.tif", colour, {}), ("packed.tif", colour, {"compression": "tiff_lzw"}),
        ("deflate.tif", clear, {"compression": "tiff_adobe_deflate"}), ("deep.tif", deep, {}),
        ("float.tif", deep.convert("F"), {}),
    ):  # fmt: skip
        image.save(folder / name, **options)


@reader(make_images)
def images(path: Path) -> None:
    open_image(path)
    read_pixels(path, 16, False)
    to_pixels(uploaded(path.read_bytes()), 16, False)


# -- configurations and records --------------------------------------------------------------------


def make_recipes(folder: Path) -> None:
    for path in CONFIG_DIR.glob("*.yaml"):
        if path.stem != "published":
            shutil.copy(path, folder)


@reader(make_recipes)
def recipes(path: Path) -> None:
    train.main(["--config", str(path), "data=wiki", "--print-config"])


def make_data_files(folder: Path) -> None:
    make_tables(folder)
    text = f"name: own\nkind: table\npath: {folder.resolve()}/t.csv\nquery: 2\ntrain: 3\n"
    (folder / "own.yaml").write_text(text + "class_names: [red, small, blue]\n", encoding="utf-8")


@reader(make_data_files, "own.yaml")
def data_files(path: Path) -> None:
    data_command.main(["check", str(path)])


@reader(lambda folder: (folder / "f.txt").write_text("label = 'a' and not (label in ('b','c'))"))
def filters(path: Path) -> None:
    parse(path.read_text(encoding="utf-8", errors="replace"), ["a", "b", "c"])


@reader(lambda folder: (folder / "f.txt").write_text("bits=[8,16]"))
def overrides(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    train.main(["--config", str(CONFIG_DIR / "vh_abl.yaml"), "data=wiki", "--print-config", text])


def make_towers(folder: Path) -> None:
    resnet = (CONFIG_DIR / "clip" / "tiny.json").read_text(encoding="utf-8")
    (folder / "resnet.json").write_text(resnet, encoding="utf-8")
    (folder / "vit.json").write_text(json.dumps(TINY_TOWERS), encoding="utf-8")


@reader(make_towers)
def towers(path: Path) -> None:
    recipe = str(CONFIG_DIR / "vh_abl_clip.yaml")
    load(recipe, ["data=emoji", f"encoder.model={path}"])
    open_clip.picture_size(str(path))
    open_clip.build_towers(str(path), "")


# -- runs ------------------------------------------------------------------------------------------

SMALL = ["bits=[8,16]", "batch_size=16", "device=cpu", "codes=none", "validation.fraction=0",
         "model.net.dim=16", "model.net.image_hidden=16", "model.net.text_hidden=16"]  # fmt: skip


def recipe(folder: Path, *more: str) -> list[str]:
    given = [*pair_overrides(folder / "pairs"), "encoder.name=features", "data.min_count=1",
             "model.net.modality_dropout=0.1"]  # fmt: skip
    return [*given, *SMALL, f"out={folder / 'run'}", *more]


def make_run(folder: Path) -> None:
    """Trained once for all readers."""
    done = Path("trained")
    if not done.exists():
        write_pair_folder(done / "pairs", items=60, side=12)
        quiet = ["--quiet", "--no-table", "--config", str(CONFIG_DIR / "hiamh.yaml")]
        train.main([*quiet, *recipe(done.resolve(), "epochs=1")])
    shutil.copytree(done / "run", folder / "run")


@reader(make_run, "run/weights.safetensors")
def weights(path: Path) -> None:
    encode.main(["--checkpoint", str(path.parent), "--text", "a red picture", "--quiet"])


@reader(make_run, "run/metrics.json")
def records(path: Path) -> None:
    report.main([str(path.parent), "--table-only"])


@reader(make_run, "run/history.json")
def history(path: Path) -> None:
    training_curves({"own": run_folder.read_history(path.parent)})


def trainer() -> Trainer:
    given = recipe(Path("trained").resolve(), "epochs=2", "resume=true")
    config = load(CONFIG_DIR / "hiamh.yaml", [*given, f"out={CASE.resolve()}"])
    found = Trainer(config, load_data(config.data, config.encoder), progress_bar=False)
    found.begin()
    return found


def make_state(folder: Path) -> None:
    make_run(folder)
    shutil.rmtree(folder / "run")
    begun = trainer()
    begun.progress.history.append({"phase": "final", "epoch": 1, **begun.train_epoch()})
    begun.progress.epoch = 1
    begun.state_path = folder / "state.pt"
    begun.save_state()


@reader(make_state)
def state(path: Path) -> None:
    if "trainer" not in READY:
        READY["trainer"] = trainer()
    found = READY["trainer"]
    found.state_path = path
    saved = found.read_state()
    found.progress = Progress(**saved["progress"])
    found.restore(saved)


READY: dict[str, Any] = {}


def make_encoded(folder: Path) -> None:
    make_run(folder)
    table = folder / "t.csv"
    table.write_text("caption\na red picture\nblue\nwhite, so to say\n".replace(", ", " "))
    encode.main(["--checkpoint", str(folder / "run"), "--table", str(table), "--quiet",
                 "--out", str(folder / "codes.npz")])  # fmt: skip


@reader(make_encoded, "codes.npz")
def encoded(path: Path) -> None:
    if "model" not in READY:
        READY["model"] = encode.load(path.parent / "run")
    texts = ["a red picture", "blue", "white so to say"]
    encode.read_codes(path, READY["model"], ["1", "2", "3"], texts)


@reader(lambda f: Shard(f / "s.npz", "x").write(Part(0, ["a"], {"fused": np.ones((1, 2), "u1")})))
def shards(path: Path) -> None:
    Shard(path, "x").read()


class TinyTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Linear(3, 2)
        self.logit_scale = torch.nn.Parameter(torch.ones([]))


def make_clip_weights(folder: Path) -> None:
    state = TinyTowers().state_dict()
    save_file(state, str(folder / "w.safetensors"))
    torch.save({"state_dict": state, "epoch": 1}, folder / "w.pt")
    torch.jit.save(torch.jit.script(TinyTowers()), folder / "script.pt")


@reader(make_clip_weights)
def clip_weights(path: Path) -> None:
    open_clip.load_weights(TinyTowers(), "RN50", str(path))


def make_cnn_weights(folder: Path) -> None:
    state = TinyAlexNet().state_dict()
    torch.save(state, folder / "w.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "w.safetensors")


@reader(make_cnn_weights)
def cnn_weights(path: Path) -> None:
    cnn.check_state(TinyAlexNet(), read_state(path), str(path), "alexnet")


def make_cache(folder: Path) -> None:
    with h5py.File(folder / "c.h5", "w") as file:
        for view in ("image", "text"):
            file.create_dataset(view, data=np.arange(60, dtype=np.float16).reshape(6, 10))
        file.attrs["made_with"] = json.dumps({"layout": "1"})
        file.attrs["checksums"] = json.dumps({"image": 0, "text": 0})


@reader(make_cache)
def caches(path: Path) -> None:
    open_cache(path, {"layout": "1"}, ["image", "text"])


def make_index(folder: Path) -> None:
    make_run(folder)
    search.main(["build", "--checkpoint", str(folder / "run"), "--out", str(folder / "index"),
                 "--graph", "ivf", "--graph", "hnsw", "--quiet"])  # fmt: skip


@reader(make_index, "index/**/*")
def indexes(path: Path) -> None:
    folder = path
    while folder.name != "index":
        folder = folder.parent
    search.main(["query", str(folder), "--like", "anywhere/3.png", "--where", "label = 'red'"])
    for mode in ("ivf", "hnsw", "prefix", "weighted"):
        search.main(["query", str(folder), "--like", "anywhere/3.png", "--mode", mode])
    search.main(["info", str(folder)])


def seal(path: Path) -> None:
    """Put the size and checksum of a changed file into the description of its index."""
    meta = path.parent.parent / "index.json"
    if meta.is_file():
        text = json.loads(meta.read_text(encoding="utf-8"))
        text["segments"][path.parent.name]["files"][path.name] = _checksum(path)
        meta.write_text(json.dumps(text), encoding="utf-8")


READERS["descriptions"] = Reader(make_index, READERS["indexes"].read, ("index/index.json",))
# FAISS's own files can crash it: they are trusted as far as their checksums go.
READERS["forged_indexes"] = Reader(
    make_index, READERS["indexes"].read, ("index/*/*.npy", "index/*/*.bin"), seal
)

# -- cases -----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the cases of a reader came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    memory: int = 0
    failed: list[str] = field(default_factory=list)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return [(str(path), s.st_size, s.st_mtime_ns) for path, s in found if path.is_file()]


def memory(key: str) -> int:
    """VmHWM, the highest since it was reset, or VmRSS, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def of_children() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def computed(process: int) -> float:
    """Seconds that a process has computed, with its children, those at work too."""
    found = 0.0
    for number in (process, *children_of(process)):
        with suppress(OSError):  # a child may just have ended
            fields = Path(f"/proc/{number}/stat").read_text(encoding="ascii").rpartition(")")[2]
            found += sum(map(int, fields.split()[11:15])) / os.sysconf("SC_CLK_TCK")
    return found


def children_of(process: int) -> list[int]:
    with suppress(OSError):
        path = Path(f"/proc/{process}/task/{process}/children")
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    return []


def damaged(name: str, number: int) -> tuple[Path, bytes]:
    """The file of a case and what it holds."""
    rng = random.Random(f"{name} {number}")
    files = sorted({p for n in READERS[name].names for p in (WHOLE / name).glob(n) if p.is_file()})
    file = rng.choice(files)
    mutate: Mutate = any_bytes if rng.random() < 0.05 else mutation(file.name)
    return file.relative_to(WHOLE / name), mutate(file.read_bytes(), rng)


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """`read`, `refused`, or what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors.run(lambda _: (read(path), 0)[1])
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        at = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return f"{type(error).__name__}: {str(error)[:200]} at {at}"
    said = err.getvalue()
    if code == 0:
        return "read"
    if code == 2 and "error: " in said and "Traceback (most" not in said:
        return "refused"
    return f"exit code {code}: {said[-300:]}"


def work(name: str, first: int, count: int, report: int) -> None:
    """Run cases one after the other, and write what each came to."""
    reader = READERS[name]
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, first + count):
        file, content = damaged(name, number)
        path = CASE / file
        path.write_bytes(content)
        if reader.seal is not None:
            reader.seal(path)
        before, children = listing(Path()), of_children()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        held, started = memory("VmRSS"), computed(os.getpid())
        os.write(report, json.dumps([number]).encode() + b"\n")
        found = outcome(reader.read, path)
        seconds, grown = computed(os.getpid()) - started, memory("VmHWM") - held
        if of_children() > children:
            grown += max(0, of_children() - held)
        changed = sorted(set(listing(Path())) ^ set(before))
        if found in ("read", "refused"):
            if grown > MEMORY:
                found = f"{grown / 2**20:,.0f} MB of memory ({found})"
            elif changed:
                found = f"changed {changed[0][0]}"
        if reader.seal is None:
            shutil.copyfile(WHOLE / name / file, path)
        else:
            restored(name)
        os.write(report, json.dumps([number, found, seconds, grown]).encode() + b"\n")


def run(name: str, first: int, count: int) -> Tally:
    """Cases of a reader, in processes that are watched."""
    whole = WHOLE / name
    if not whole.exists():
        whole.mkdir(parents=True)
        READERS[name].make(whole)
    restored(name)
    for file, _ in (damaged(name, number) for number in range(3)):
        found = outcome(READERS[name].read, CASE / file)
        if found != "read":
            sys.exit(f"{name}: the valid {file} is not read: {found}")
    tally, next_one = Tally(), first
    while next_one < first + count:
        next_one = watch(name, next_one, first + count, tally)
    return tally


def watch(name: str, first: int, end: int, tally: Tally) -> int:
    """Run cases in a new process until one ends it; the number of the next case."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(ours)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work(name, first, end - first, theirs)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    at, begun, rest, since, started = first, False, b"", 0.0, time.monotonic()
    while True:
        if not select.select([ours], [], [], 1)[0]:
            waited = time.monotonic() - started
            if begun and (computed(process) - since > SECONDS or waited > 12 * SECONDS):
                os.kill(process, signal.SIGKILL)
                begun = False
            continue
        block = os.read(ours, 65536)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            at, *done = json.loads(line)
            begun, since, started = not done, computed(process), time.monotonic()
            if done:
                found, seconds, grown = done
                tally.outcomes[found if found in ("read", "refused") else "failed"] += 1
                tally.longest = max(tally.longest, seconds)
                tally.memory = max(tally.memory, grown)
                if found not in ("read", "refused"):
                    tally.failed.append(f"{name}:{at}: {found}")
    os.close(ours)
    _, status = os.waitpid(process, 0)
    if status == 0:
        return end
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        sys.exit(f"{name}: no case after {at} ({code})")
    said = f"no end in {SECONDS} s" if code == -signal.SIGKILL else f"the process died ({code})"
    tally.outcomes["failed"] += 1
    tally.failed.append(f"{name}:{at}: {said}")
    restored(name)
    return at + 1


def main(first: int, count: int, names: list[str]) -> int:
    torch.set_num_threads(1)
    failed = []
    for chosen in names or READERS:
        name, _, number = chosen.partition(":")
        started = time.perf_counter()
        tally = run(name, int(number), 1) if number else run(name, first, count)
        failed += tally.failed
        kinds = [f"{tally.outcomes[kind]:,} {kind}" for kind in ("read", "refused", "failed")]
        print(f"{chosen}: {', '.join(kinds)}; at most {tally.longest:.1f} s and "
              f"{tally.memory / 2**20:,.0f} MB; {time.perf_counter() - started:.0f} s",
              flush=True)  # fmt: skip
    for line in failed:
        print(f"failed: {line}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
