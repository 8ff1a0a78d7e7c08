"""README and docs: links lead somewhere, the site builds, and every command works."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, write_feature_file
from PIL import Image

from vhabl.__main__ import COMMANDS
from vhabl.system.errors import VhablError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for the placeholders of the pages.
FILLED = {
    "FILE": "features.mat",
    "RUN": "checkpoint/emoji/vh_abl_clip/0",
    "INDEX": "index",
    "DIR": "images",
}
# Data sets and servers that are not here: their commands end with one message that says so.
ABSENT = ("mirflickr", "nuswide", "coco", "SOURCE")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


@pytest.mark.e2e
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Model" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, comments and continuation lines resolved."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


def test_every_command_of_the_docs_is_known() -> None:
    """By name: those that the next test does not run are scripts, installers or servers."""
    known = {"vhabl", "bash", "pip", "python", "torchrun", "source", "git"}
    for page in PAGES:
        for words in commands(page):
            rest = [w for w in words if not re.fullmatch(r"[A-Z_]+=.*", w)]
            assert rest[0] in known, (page.name, words)
            if rest[0] in ("bash", "python") and not rest[1].startswith("-"):
                assert (ROOT / rest[1]).is_file(), (page.name, words)


def prepare(folder: Path) -> None:
    """Files by the names that the pages use."""
    write_feature_file(folder / "features.mat", classes=10)
    (folder / "configs").symlink_to(ROOT / "configs")
    images = folder / "images"
    images.mkdir()
    emoji = sorted((ROOT / "dataset" / "emoji" / "images").iterdir())
    rows = ["image,caption,labels"]
    for number in range(60):
        Image.open(emoji[number]).convert("RGB").save(images / f"{number}.jpg")
        rows.append(f"{number}.jpg,red fruit {number % 7},{'ab'[number % 2]}")
    for name in ("a.jpg", "b.jpg", "photo.jpg"):
        shutil.copy(images / "0.jpg", folder / name)
    table = "\n".join(rows) + "\n"
    (folder / "items.csv").write_text(table)
    (folder / "more.csv").write_text("".join(re.sub(r",[^,]*$", "\n", row) for row in rows))
    (folder / "mine.yaml").write_text("name: mine\nkind: table\npath: items.csv\nquery: 10\n")


def filled(word: str) -> str:
    for name, value in FILLED.items():
        word = re.sub(rf"\b{name}\b", value, word)
    return word


@pytest.mark.e2e
@pytest.mark.slow
def test_every_vhabl_command_of_the_docs_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small runs, in the order of the pages, with one epoch in place of the recipe's."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    small = ["--quiet", "epochs=1", "device=cpu", "validation.fraction=0"]
    train = importlib.import_module(COMMANDS["train"][0])
    for recipe in ("vh_abl", "vh_abl_clip"):
        assert train.main(["--config", recipe, "data=emoji", *small]) == 0
    failed, done = [], list[list[str]]()
    for page in PAGES:
        for words in commands(page):
            if words[0] != "vhabl" or "serve" in words or "milvus" in words or words in done:
                continue
            done.append(words)
            command, *given = [filled(word) for word in words[1:]]
            if command == "train" and not {"--help", "--print-config"} & set(given):
                given += small
            if command == "ablation":
                given += ["epochs=1", "device=cpu", "--seeds", "0", "--only", "members"]
            if given[:1] == ["build"]:
                shutil.rmtree(given[given.index("--out") + 1], ignore_errors=True)
            try:
                code = importlib.import_module(COMMANDS[command][0]).main(given) or 0
            except SystemExit as left:
                code = left.code or 0
            except VhablError as error:
                absent = any(name in " ".join(words) for name in ABSENT)
                code = 0 if absent and "no such file" in str(error) else str(error)
            if code != 0:
                failed.append(f"{page.name}: {' '.join(words)}\n  {code}")
    assert not failed, "\n".join(failed)
