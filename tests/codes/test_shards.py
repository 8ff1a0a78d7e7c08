"""Codes that several processes make in parts: the same as those of one, whatever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ended,
    pair_config,
    small_config,
    torchrun,
    write_feature_file,
    write_pair_folder,
)

from vhabl import encode, train
from vhabl.codes import shards
from vhabl.codes.shards import Part, Shard
from vhabl.config import override
from vhabl.data import collection
from vhabl.data import load as load_data
from vhabl.system import distributed
from vhabl.system.distributed import Ranks
from vhabl.system.errors import VhablError, note
from vhabl.training import run_folder

BRIEF = ["out=run", "epochs=1", "validation.fraction=0", "data.workers=0", "encoder.cache=none"]


@pytest.mark.parametrize("count", [0, 1, 20, 21, 22])
@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("size", [1, 3, 30])
def test_ranks_have_whole_batches_and_every_item_once(count: int, batch: int, size: int) -> None:
    found = [shards.rows(count, batch, rank, size) for rank in range(size)]
    items = [list(range(count))[rows] for rows in found]
    assert [item for part in items for item in part] == list(range(count))
    assert all(part[0] % batch == 0 for part in items if part)
    sizes = [-(-len(part) // batch) for part in items]
    assert max(sizes) - min(sizes) <= 1


def test_a_signature_changes_with_all_that_decides_codes(tmp_path: Path) -> None:
    picture, text = tmp_path / "a.png", ["a \ud800 text", "b"]
    picture.write_bytes(b"one")
    features = np.ones((2, 3), np.float32)
    given = [
        (["run", "8"], ["1", "2"], [picture], text),
        (["run", "16"], ["1", "2"], [picture], text),
        (["run8", ""], ["1", "2"], [picture], text),
        (["run", "8"], ["12", ""], [picture], text),
        (["run", "8"], ["1", "2"], None, text),
        (["run", "8"], ["1", "2"], [], text),
        (["run", "8"], ["1", "2"], [tmp_path / "b.png"], text),
        (["run", "8"], ["1", "2"], [picture], None),
        (["run", "8"], ["1", "2"], [picture], ["b", text[0]]),
        (["run", "8"], ["1", "2"], None, features),
        (["run", "8"], ["1", "2"], features, None),
        (["run", "8"], ["1", "2"], None, features + np.eye(2, 3, dtype=np.float32)),
        (["run", "8"], ["1", "2"], None, features.reshape(3, 2)),
    ]
    found = [shards.signature(*values) for values in given]
    assert len(set(found)) == len(found)
    assert found == [shards.signature(*values) for values in given]
    was = picture.stat().st_mtime_ns
    picture.write_bytes(b"two")
    os.utime(picture, ns=(was + 1, was + 1))
    changed = shards.signature(*given[0])
    picture.write_bytes(b"three")
    os.utime(picture, ns=(was, was))
    assert len({found[0], changed, shards.signature(*given[0])}) == 3


def part(first: int, count: int) -> Part:
    codes = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1)
    return Part(first, [f"id {first + n}" for n in range(count)], {"fused": codes}, cut=count)


def written(number: int, content: Part) -> Shard:
    shard = Shard(Path(f"{number}.npz"), f"signature {number}")
    shard.write(content)
    return shard


def test_only_a_whole_shard_of_the_same_signature_is_read() -> None:
    shard = written(1, part(4, 3))
    found = shard.read()
    assert found is not None and found.codes["fused"].tolist() == [[4], [5], [6]]
    assert (found.first, list(found.ids), found.cut) == (4, ["id 4", "id 5", "id 6"], 3)
    assert Shard(shard.path, "another").read() is None
    assert Shard(Path("nowhere.npz"), shard.signature).read() is None
    whole = shard.path.read_bytes()
    at = whole.index(bytes([4, 5, 6]))
    for damaged in (whole[:-1], whole[: at + 1], whole[:at] + b"\7" + whole[at + 1 :], b""):
        shard.path.write_bytes(damaged)
        assert shard.read() is None


def test_parts_that_do_not_make_the_whole_are_not_merged() -> None:
    found = [written(n, content) for n, content in enumerate((part(0, 3), part(3, 0), part(3, 2)))]
    ids = [f"id {n}" for n in range(5)]
    whole = shards.merge(found, ids)
    assert (whole.ids, whole.first, whole.cut) == (ids, 0, 5)
    assert whole.codes["fused"].tolist() == [[0], [1], [2], [3], [4]]
    uneven = Part(5, ["id 5"], {"fused": np.zeros((2, 1), np.uint8)})
    for some, wanted, message in (
        (found[:2], ids, "ids of 3 items.*5 asked for"),
        (found, [*ids[:4], "other"], r"ids of 5 items.*5 asked for"),
        ([found[2], found[0]], ids, "2.npz: items from number 3 on, not from 0"),
        ([found[0], found[0]], ids, "0.npz: items from number 0 on, not from 3"),
        ([*found, written(3, uneven)], [*ids, "id 5"], "3.npz: items from number 5 on"),
        ([*found, Shard(Path("9.npz"), "")], ids, "9.npz: no such shard, or another"),
    ):
        with pytest.raises(VhablError, match=message):
            shards.merge(some, wanted)


# -- the command, its ranks one after the other ----------------------------------------------------


@dataclass(frozen=True)
class InTurn(Ranks):
    """A rank that runs alone, rank 0 last: it is told what the others said before it."""

    said: dict[int, list[object]] = field(default_factory=dict)

    def gather(self, value):
        mine = self.said.setdefault(self.rank, [])
        mine.append(value)
        turn = len(mine) - 1
        if self.rank > 0:
            return [value] * self.size
        return [self.said[rank][turn] for rank in range(self.size)]


@contextmanager
def muted(here: Ranks) -> Iterator[Ranks]:
    with distributed._muted(here.rank > 0):
        yield here


def run(size: int, *arguments: object, only: int | None = None) -> list[int]:
    """The exit codes of all ranks, rank 0 first; only: the number of ranks that run, the last."""
    said: dict[int, list[object]] = {}
    codes = []
    for rank in reversed(range(0 if only is None else size - only, size)):
        note.cache_clear()  # each rank is a process
        here = InTurn(rank, size, rank, said) if size > 1 else Ranks()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "joined", lambda here=here: muted(here))
            try:
                codes.append(encode.main([*map(str, arguments), "--quiet", "--device", "cpu"]))
            except SystemExit as left:
                codes.append(left.code)
    return codes[::-1]


def trained(config) -> None:
    train.train(config, load_data(config.data, config.encoder), progress_bar=False)


@pytest.fixture
def batches_of_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhabl.encoders.Encoder.batch", 7)
    monkeypatch.setattr("vhabl.encoders.ClipEncoder.batch", 7)


@pytest.fixture
def pairs(tmp_path: Path, batches_of_7: None) -> Path:
    """A run named `run` on 60 pairs, of 9 batches, and a table of them."""
    folder = write_pair_folder(tmp_path / "p")
    trained(pair_config(folder, "cmcl", *BRIEF))
    rows = [f'{n}.png,"{"red " * (n % 20)}one"' for n in range(60)]  # some longer than 12 tokens
    (folder / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return folder


def content(path: str | Path) -> dict[str, tuple[str, bytes]]:
    with np.load(path) as file:
        return {name: (file[name].dtype.str, file[name].tobytes()) for name in file.files}


def test_any_number_of_ranks_writes_what_one_does(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--checkpoint", "run", "--table", pairs / "t.csv", "--bits", 8, "--out"]
    assert run(1, *asked, "1.npz") == [0]
    out, err = capsys.readouterr()
    assert out == "1.npz: codes of 8 bits: image 60, text 60\n"
    assert err == "note: 30 texts longer than 12 tokens: cut\n"
    for size in (2, 4, 20):
        assert run(size, *asked, f"{size}.npz") == [0] * size
        assert content("1.npz") == content(f"{size}.npz")
        assert capsys.readouterr() == (out.replace("1.npz", f"{size}.npz"), err)
        assert not Path(f"{size}.npz.shards").exists()
    assert list(content("1.npz")) == ["bits", "run", "texts", "ids", "image", "text"]


def test_shards_that_are_whole_and_right_are_kept(
    pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--checkpoint", "run", "--table", pairs / "t.csv", "--out", "c.npz"]
    run(1, *asked)
    one = content("c.npz")
    Path("c.npz").unlink()
    folder = Path("c.npz.shards")
    real, made = encode.Model._encode, []

    def counted(self, images, texts, *others):
        made.append(len(texts))
        return real(self, images, texts, *others)

    monkeypatch.setattr(encode.Model, "_encode", counted)

    def again(kept: list[int], encoded: list[int], size: int = 4, *more: object) -> None:
        """The command is run whole: which shards it keeps, how many items each rank encodes."""
        made.clear()
        capsys.readouterr()
        run(size, *asked, *more)
        err = capsys.readouterr().err.splitlines()
        assert err[: len(kept)] == [f"note: kept shard {n} of {size}" for n in kept]
        assert len(err) == len(kept) + 1 and made[::-1] == encoded and not folder.exists()
        if not more:
            assert content("c.npz") == one
        Path("c.npz").unlink()

    run(4, *asked, only=3)
    assert sorted(p.name for p in folder.iterdir()) == [f"{n}-of-4.npz" for n in (2, 3, 4)]
    again([2, 3, 4], [14])
    run(4, *asked, only=3)
    (folder / "3-of-4.npz").write_bytes((folder / "3-of-4.npz").read_bytes()[:-9])
    again([2, 4], [14, 14])
    run(4, *asked, only=3)
    os.utime(pairs / "images" / "59.png")
    again([2, 3], [14, 18])
    run(4, *asked, only=3)
    again([], [28, 32], 2)  # those of 4 ranks are left alone, and then removed
    run(4, *asked, only=3)
    again([], [14, 14, 14, 18], 4, "--bits", 8)
    run(4, *asked, only=3)
    table = (pairs / "t.csv").read_text()
    (pairs / "t.csv").write_text(table.replace('59.png,"', '59.png,"blue '))
    again([2, 3], [14, 18], 4, "--image-root", "images")
    load = run_folder.load
    for change in (
        lambda found: replace(found, digest="of other weights"),
        lambda found: replace(found, config=override(found.config, ["encoder.squeeze=true"])),
    ):
        run(4, *asked, only=3)
        monkeypatch.setattr(run_folder, "load", lambda path, change=change: change(load(path)))
        again([], [14, 14, 14, 18], 4, "--image-root", "images")
        monkeypatch.setattr(run_folder, "load", load)


def test_what_fails_on_any_rank_is_said_once_by_rank_0(
    pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = pairs / "images" / "59.png"  # of the last rank
    asked = ["--checkpoint", "run", "--table", pairs / "t.csv", "--out", "c.npz"]
    whole = picture.read_bytes()
    picture.write_bytes(b"")
    with pytest.raises(VhablError, match=r"59\.png.*image.*cannot be read"):
        run(3, *asked)
    assert not Path("c.npz").exists() and capsys.readouterr() == ("", "")
    assert sorted(p.name for p in Path("c.npz.shards").iterdir()) == ["1-of-3.npz", "2-of-3.npz"]
    assert run(3, *asked, only=1) == [0]  # the rank itself leaves the word to rank 0
    picture.write_bytes(whole)
    assert run(3, *asked) == [0] * 3
    assert capsys.readouterr().err.startswith("note: kept shard 1 of 3\nnote: kept shard 2 of 3\n")
    Path("file").touch()
    for given, message in (
        (
            ["--checkpoint", "nowhere", "--text", "a", "--out", "c.npz"],
            r"nowhere.*no such folder",
        ),
        (["--checkpoint", "run", "--text", "a"], "--out: 3 processes cannot print codes"),
        ([*asked, "a=b"], "argument a=b: it is a key of a data set. Give one: --data"),
        ([*asked, "--bits", 9], "bits is 9, but must be a code length"),
        ([*asked[:-1], "c.txt"], "--out is c.txt, but must be a name that ends with .npz"),
    ):
        with pytest.raises(VhablError, match=message):
            run(3, *given)
        assert run(3, *given, only=2) == [0, 0] and capsys.readouterr() == ("", "")
    with pytest.raises(OSError):
        run(3, *asked[:-1], "file/c.npz")
    assert run(3, *asked[:-1], "file/c.npz", only=2) == [0, 0]
    assert run(3, "--nonsense") == [2, 0, 0]
    assert capsys.readouterr().err.count("usage: python -m vhabl.encode") == 1


def test_every_item_of_a_data_set_is_encoded(batches_of_7: None, tmp_path: Path) -> None:
    """Of a feature file the database; of a table also rows without a label."""
    file = write_feature_file(tmp_path / "f.mat")
    config = small_config(file, "vh_abl", "out=run", "epochs=1", "validation.fraction=0")
    trained(config)
    Path("d.yaml").write_text("name: mine\nkind: features\npath: nowhere.mat\n")
    asked = ["--checkpoint", "run", "--data", "d.yaml", f"data.path={file}", "--out"]
    assert run(1, *asked, "1.npz") == [0] and run(12, *asked, "12.npz") == [0] * 12  # 9 batches
    assert content("1.npz") == content("12.npz")
    data = load_data(config.data).database
    found = np.load("1.npz")
    codes = encode.load("run").encode(data.image, data.text)["fused"]
    assert found["ids"].tolist() == [f"item {n + 1}" for n in range(60)]
    assert np.array_equal(encode.code_files.unpack(found["fused"], 16), codes)
    folder = write_pair_folder(tmp_path / "p")
    (folder / "t.csv").write_text("image,caption,labels\n0.png,one,x\n1.png,two,\n")
    Path("t.yaml").write_text(f"name: mine\nkind: table\npath: {folder / 't.csv'}\n")
    table = collection(encode.load_data_config("t.yaml", []), config.encoder)
    assert table.ids == ["0.png", "1.png"] and table.texts == ["one", "two"]
    assert table.images == [folder / "images" / name for name in table.ids]
    assert table.labels.tolist() == [[1], [0]] and table.class_names == ["x"]


# -- ranks -----------------------------------------------------------------------------------------


def test_a_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = Ranks(5, 8, 1)
    asked = ("auto", "cuda", "cpu", "cuda:0")
    assert [here.device(name) for name in asked] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    assert [Ranks().device(name) for name in asked] == list(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [here.device(name) for name in asked] == list(asked)


def test_only_torchrun_makes_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with distributed.joined() as here:
        assert here == Ranks()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.joined() as here:
        assert here == Ranks()


def test_a_rank_that_died_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed.dist, "all_gather_object", closed)
    for rank in (0, 1):
        with pytest.raises(VhablError, match=r"processes.*one.*died or cannot be"):
            Ranks(rank, 3, rank).everywhere(lambda: 1)


# -- whole processes -------------------------------------------------------------------------------

DYING = """
import os, signal, time
from pathlib import Path
from vhabl import encode
from vhabl.system import errors

real = encode.Model._encode

def dying(*arguments):
    if os.environ["RANK"] == "1":
        while not Path("two.npz.shards/1-of-2.npz").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

encode.Model._encode = dying
errors.run(encode.main)
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_rank_ends_the_command_and_the_next_run_goes_on(tmp_path: Path) -> None:
    file = write_feature_file(tmp_path / "f.mat", train=5000)  # 3 batches
    config = small_config(file, "vh_abl", "out=run", "epochs=1", "validation.fraction=0",
                          "batch_size=512")  # fmt: skip
    trained(config)
    Path("d.yaml").write_text(f"name: mine\nkind: features\npath: {file}\n")
    Path("dying.py").write_text(DYING)
    asked = ["--checkpoint", "run", "--data", "d.yaml", "--quiet", "--device", "cpu", "--out"]

    assert run(1, *asked, "one.npz") == [0]
    code, out, err = ended(torchrun("dying.py", *asked, "two.npz"))
    assert code != 0 and f"Signal {signal.SIGKILL.value}" in err
    assert out == "" and not Path("two.npz").exists()
    assert [p.name for p in Path("two.npz.shards").iterdir()] == ["1-of-2.npz"]
    code, out, err = ended(torchrun("-m", "vhabl.encode", *asked, "two.npz"))
    assert code == 0, err
    assert out == "two.npz: codes of 16 bits: fused 5,000\n"
    assert "note: kept shard 1 of 2\n" in err and "shard 2" not in err
    assert content("one.npz") == content("two.npz") and not Path("two.npz.shards").exists()
    code, _, err = ended(torchrun("-m", "vhabl.encode", *asked, "two.txt"))
    assert code != 0 and err.count("error: --out is two.txt, but must be") == 1
