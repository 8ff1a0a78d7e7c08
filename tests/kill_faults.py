"""Kill a piece of work at random moments, run the same command to its end, and compare that with a
run that nothing disturbed: python tests/kill_faults.py WORK KILLS SEED, in an empty folder.

A process of its own, which forks for each try: what it imports is there at once, and no thread of
another test is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import SMALL as WIDTHS
from helpers import pair_overrides, write_feature_file, write_pair_folder

from vhabl import encode, train
from vhabl.config import CONFIG_DIR
from vhabl.report import __main__ as report
from vhabl.search import __main__ as search
from vhabl.training.trainer import Trainer

INPUTS = Path("inputs")
DATE = 116  # bytes at the beginning of a MATLAB file, with the time when it was written
EPOCHS = Path("epochs")  # a byte for each epoch that was finished
SMALL = ["bits=[8,16]", "batch_size=16", "device=cpu", "codes=none", "save_every=1"]


def common(method: str) -> list[str]:
    return ["--quiet", "--no-table", "--config", str(CONFIG_DIR / f"{method}.yaml"), *SMALL,
            *WIDTHS[method]]  # fmt: skip


def on_pairs(method: str, *more: str) -> list[str]:
    return [*common(method), *pair_overrides(INPUTS / "pairs"), "validation.fraction=0",
            "data.workers=0", *more]  # fmt: skip


def training(folder: Path) -> None:
    train.main([
        *common("vh_abl"), "data=wiki", f"data.path={INPUTS / 'features.mat'}",
        "data.class_names=[]", "model.net.members=1", "epochs=6", "validation.every=2",
        "validation.fraction=0.1",
        "resume=true", f"out={folder / 'run'}", f"codes={folder / 'codes'}",
    ])  # fmt: skip


def caching(folder: Path) -> None:
    train.main(on_pairs(
        "vh_abl_clip", "epochs=1", "resume=true", f"encoder.cache={folder / 'cache'}",
        "encoder.tune=frozen", f"out={folder / 'run'}",
    ))  # fmt: skip


def encoding(folder: Path) -> None:
    encode.main(["--checkpoint", str(INPUTS / "run"), "--table", str(INPUTS / "pairs" / "t.csv"),
                 "--out", str(folder / "codes.npz"), "--quiet"])  # fmt: skip


def indexing(folder: Path) -> None:
    if not (folder / "index").exists():  # the command refuses to write one twice
        search.main(["build", "--checkpoint", str(INPUTS / "run"), "--out", str(folder / "index"),
                     "--graph", "ivf", "--quiet"])  # fmt: skip


def reporting(folder: Path) -> None:
    report.main([str(INPUTS / "run"), "--out", str(folder / "report")])


WORKS: dict[str, Callable[[Path], None]] = {
    work.__name__: work for work in (training, caching, encoding, indexing, reporting)
}


def prepare() -> None:
    INPUTS.mkdir()
    write_feature_file(INPUTS / "features.mat")
    pairs = write_pair_folder(INPUTS / "pairs")
    rows = "".join(f"{number}.png,picture {number}\n" for number in range(60))
    (pairs / "t.csv").write_text("image,caption\n" + rows, encoding="utf-8")


def trained() -> None:
    train.main(on_pairs(
        "hiamh", "encoder.name=features", "data.min_count=1", "epochs=3", "model.net.members=1",
        f"out={INPUTS / 'run'}",
    ))  # fmt: skip


def forked(run: Callable[[], object], seconds: float | None = None) -> bool:
    """Run in a process of its own, killed after so many seconds: whether it came to its end."""
    process = os.fork()
    if process == 0:
        try:
            quiet = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit(f"failed:\n{Path('output').read_text(encoding='utf-8')[-3000:]}")
    return True


def counted_epochs() -> None:
    """From now on every epoch that was finished is a byte more."""
    real = Trainer.train_epoch

    def counted(self: Trainer) -> dict[str, float]:
        terms = real(self)
        with EPOCHS.open("ab") as file:
            file.write(b".")
        return terms

    Trainer.train_epoch = counted  # type: ignore[method-assign]


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for what tells of the time and place, and temporary ones."""
    varying = ("environment.json", "events.out", ".svg", ".png", ".pdf")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".tmp" not in str(path.relative_to(folder)):
            varies = any(part in path.name for part in varying)
            name = str(path.relative_to(folder)).split("events.out")[0]
            text = path.read_bytes().replace(os.fsencode(folder.name), b"FOLDER")
            text = text[DATE:] if path.suffix == ".mat" else text
            found[name] = b"" if varies else text
    return found


def main(name: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    work, draw = WORKS[name], random.Random(seed)
    prepare()
    forked(trained)
    counted_epochs()
    forked(lambda: work(Path("whole")))
    started = time.perf_counter()
    shutil.rmtree("whole")
    forked(lambda: work(Path("whole")))
    whole, expected = time.perf_counter() - started, content(Path("whole"))
    killed, parts, longest = 0, Path("parts"), 0
    of_one = EPOCHS.stat().st_size // 2 if EPOCHS.exists() else 0
    while killed < kills:
        shutil.rmtree(parts, ignore_errors=True)
        EPOCHS.unlink(missing_ok=True)
        tries, ended = 0, False
        while not ended and killed < kills and tries < 12:
            begin = draw.choice([0.0, 0.8 * whole])  # the end is where most is written
            ended = forked(lambda: work(parts), draw.uniform(begin, whole))
            killed, tries = killed + (not ended), tries + (not ended)
            left = content(parts)
            for file in left.keys() & expected:
                if left[file] != expected[file]:
                    sys.exit(f"after {tries} kills (seed {seed}) a part of {file}")
            ended = ended or left == expected  # killed when all was done
        if not ended:
            forked(lambda: work(parts))
        found = content(parts)
        if found != expected:
            names = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
            sys.exit(f"after {tries} kills (seed {seed}) other files: {', '.join(names)}")
        again = (EPOCHS.stat().st_size if EPOCHS.exists() else 0) - of_one
        if again > tries:
            sys.exit(f"after {tries} kills (seed {seed}) {again} epochs were trained twice")
        longest = max(longest, tries)
    print(f"{name}: {killed} kills, at most {longest} in one work of {whole:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
