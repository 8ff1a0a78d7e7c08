"""vhabl installed from a wheel, its one command, and recipes and data sets by name or by file."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, write_feature_file

import vhabl
from vhabl import __main__ as program
from vhabl.config import load, load_data_config
from vhabl.system.errors import VhablError


def own_data_set(folder: Path) -> Path:
    folder.mkdir()
    write_feature_file(folder / "features.mat")
    described = folder / "mine.yaml"
    described.write_text("name: mine\nkind: features\npath: features.mat\n")
    return described


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of a wheel, as pip unpacks it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # what is committed or about to be, so that no build stays in ROOT
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, check=True, capture_output=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("vhabl-*.whl")
    assert wheel.name.startswith(f"vhabl-{vhabl.__version__}-")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


@pytest.mark.e2e
@pytest.mark.slow
def test_a_wheel_trains_and_searches_from_another_folder(installed: Path, tmp_path: Path) -> None:
    def run(*arguments: str, below: str = ".") -> str:
        folder = tmp_path / below
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "vhabl", *arguments], cwd=folder, capture_output=True, text=True,
            check=False, env={**os.environ, "PYTHONPATH": str(installed)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    mine = own_data_set(tmp_path / "mine")
    given = ["bits=[8,16]", "epochs=1", "device=cpu", "validation.fraction=0", "codes=none"]
    run("train", "--quiet", "--config", "vh_abl", "data=emoji", *given)
    run("train", "--quiet", "--config", "vh_abl", f"data={mine}", *given)
    assert "VH-ABL" in run(
        "eval", "--checkpoint", "../checkpoint/emoji/vh_abl/0", below="elsewhere"
    )
    assert "VH-ABL" in run("eval", "--checkpoint", "../checkpoint/mine/vh_abl/0", below="elsewhere")
    run("search", "build", "--quiet", "--checkpoint", "checkpoint/emoji/vh_abl/0", "--out", "index")
    found = run("search", "query", "../index", "--like", "images/1f34e.png", below="elsewhere")
    assert "images/1f34e.png" in found


def test_one_command_runs_each(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (module, what) in program.COMMANDS.items():
        if name == "train":  # its help has the keys of recipes too
            assert program.main([name, "--help"]) == 0
        else:
            with pytest.raises(SystemExit) as left:
                program.main([name, "--help"])
            assert left.value.code == 0
        printed = capsys.readouterr().out
        assert f"usage: python -m {module.removesuffix('.__main__')}" in printed and what
    with pytest.raises(SystemExit):
        program.main(["--version"])
    assert capsys.readouterr().out == f"vhabl {vhabl.__version__}\n"


def test_a_recipe_goes_by_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = load("vh_abl", ["data=emoji"])
    assert named == load(ROOT / "configs" / "vh_abl.yaml", ["data=emoji"])
    Path("vh_abl").write_text("method: hiamh\n")  # a file of that name comes first
    assert load("vh_abl", ["data=emoji"]).method == "hiamh"
    with pytest.raises(VhablError, match="vh_able: no such file"):
        load("vh_able", ["data=emoji"])


def test_a_data_set_goes_by_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is meant from its folder, and is stored absolute."""
    features = own_data_set(tmp_path / "mine").resolve().with_name("features.mat")
    monkeypatch.chdir(tmp_path)
    config = load("vh_abl", ["data=mine/mine.yaml"])
    assert config.data.name == "mine" and Path(config.data.path) == features
    described = load_data_config("mine/mine.yaml", [])
    assert Path(described.path).resolve() == features
    config = load("vh_abl", ["data=wiki", "data.path=mine/features.mat"])
    assert Path(config.data.path) == features
    assert load("vh_abl", ["data=emoji"]).data.path == "dataset/emoji"  # found below the project
    monkeypatch.chdir(ROOT / "dataset")  # a folder of the clone, whose paths are not the clone's
    config = load("vh_abl", ["data=emoji", "data.path=emoji"])
    assert Path(config.data.path) == (ROOT / "dataset" / "emoji").resolve()
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("method: vh_abl\nfor_data: {mine: {epochs: 7}}\n")
    assert load("own.yaml", ["data=mine/mine.yaml"]).epochs == 7
    with pytest.raises(VhablError, match=r"none\.yaml: no such file"):
        load("vh_abl", ["data=none.yaml"])
    with pytest.raises(
        VhablError, match=r"data is 'min', but must be a \.yaml file, or one of coco"
    ):
        load("vh_abl", ["data=min"])
