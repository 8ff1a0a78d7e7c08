"""The commands as a user meets them: results, and one clear message with exit code 2."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from helpers import SHARED, SMALL, small_config, write_feature_file
from safetensors import safe_open
from safetensors.torch import save_file

from vhabl import encode, train
from vhabl import eval as evaluation
from vhabl.config import CONFIG_DIR, load, load_baselines, recipes
from vhabl.data import load as load_data
from vhabl.report import __main__ as report
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.studies import baselines, importance
from vhabl.system import errors
from vhabl.training import run_folder as runs
from vhabl.types import Dataset

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "configs" / "vh_abl.yaml")


def call(main: object, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run an entry point as a command line would, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        errors.run(main)
    return int(left.value.code or 0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(main: object, *arguments: object) -> tuple[int, str, str]:
        code = call(main, *arguments, monkeypatch=monkeypatch)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def training(path: Path, *more: str) -> list[str]:
    return [
        "--config", RECIPE, "--quiet", "data=wiki", "data.class_names=[]",
        f"data.path={path}", "bits=[8,16]", "epochs=4",
        "validation.every=2", "validation.fraction=0.1", "batch_size=16", "device=cpu",
        *SMALL["vh_abl"], *more,
    ]  # fmt: skip


@pytest.fixture
def run_folder(feature_file: Path, command) -> Path:
    code, _, err = command(train.main, *training(feature_file))
    assert code == 0, err
    return Path("checkpoint/wiki/vh_abl/0")


def one_message(err: str) -> str:
    """The only line of an error; no traceback."""
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


# -- results ---------------------------------------------------------------------------------------


def test_evaluation_repeats_the_numbers_of_training(run_folder: Path, command) -> None:
    stored = json.loads((run_folder / "metrics.json").read_text())
    code, out, _ = command(
        evaluation.main, "--checkpoint", run_folder, "--json", "--measures", "curves"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == stored


def test_evaluation_serves_any_length_up_to_the_longest(run_folder: Path, command) -> None:
    code, out, _ = command(evaluation.main, "--checkpoint", run_folder, "--bits", "12", "--json")
    assert code == 0 and {json.loads(line)["bits"] for line in out.splitlines()} == {12}
    for bits in ("0", "17"):
        code, _, err = command(evaluation.main, "--checkpoint", run_folder, "--bits", bits)
        assert code == 2
        assert f"bits is {bits}, but must be a code length from 1 to 16" in one_message(err)


def test_a_folder_above_seeds_gives_mean_and_deviation(
    feature_file: Path,
    run_folder: Path,
    command,
) -> None:
    command(train.main, *training(feature_file, "seed=1"))
    values = [
        json.loads(Path(f"checkpoint/wiki/vh_abl/{seed}/metrics.json").read_text())[0]["value"]
        for seed in (0, 1)
    ]
    code, out, _ = command(evaluation.main, "--checkpoint", run_folder.parent)
    assert code == 0
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in out
    seed_one = {p.name for p in Path("flickrhashcode/wiki/seed1").iterdir()}
    assert "VH-ABL_8-wiki_bits.mat" in seed_one


def test_code_files_give_one_json_line_a_measure(run_folder: Path, command) -> None:
    file = Path("flickrhashcode/wiki/VH-ABL_16-wiki_bits.mat")
    code, out, _ = command(evaluation.main, "--codes", file, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    stored = json.loads((run_folder / "metrics.json").read_text())
    expected = next(r["value"] for r in stored if r["bits"] == 16)
    assert rows[0]["measure"] == "mAP@all" and rows[0]["value"] == expected
    assert len({(r["measure"], r["ties"]) for r in rows}) == len(rows)


@pytest.mark.skipif(not (SHARED / "flickrhashcode").exists(), reason="published codes not here")
def test_published_codes_by_the_command_line(command) -> None:
    file = SHARED / "flickrhashcode" / "Ours_16-flickr25k_bits.mat"
    code, out, _ = command(evaluation.main, "--codes", file, "--json", "--measures", "headline")
    assert code == 0
    assert json.loads(out.splitlines()[0])["value"] == pytest.approx(0.976048, abs=1e-6)


def test_baselines_and_report(feature_file: Path, run_folder: Path, command) -> None:
    code, out, _ = command(
        baselines.main,
        "data=wiki",
        "data.class_names=[]",
        f"data.path={feature_file}",
        "bits=[8,16,512]",
    )
    assert code == 0
    rows = json.loads(Path("checkpoint/wiki/baselines/0/metrics.json").read_text())
    headline = [r for r in rows if (r["measure"], r["ties"]) == ("mAP@all", "expected")]
    chance = [r["value"] for r in headline if r["method"] == "chance"]
    assert max(chance) - min(chance) < 1e-12 and 0.2 < chance[0] < 0.35  # 4 classes
    assert {r["bits"] for r in rows if r["method"] == "ITQ"} == {8, 16}  # 512 are too many for PCA
    classifier = [r for r in headline if r["method"] == "linear classifier"]
    assert [r["bits"] for r in classifier] == [4] and classifier[0]["value"] > 0.5
    code, out, _ = command(report.main, "checkpoint/wiki")
    assert code == 0
    assert [n for n in ("chance", "LSH", "ITQ", "VH-ABL") if f"| {n} " in out] == [
        "chance", "LSH", "ITQ", "VH-ABL",
    ]  # fmt: skip
    assert "| i2t " not in out and "CCA" not in out  # no method here serves that task
    code, out, _ = command(report.main, "checkpoint/wiki/baselines", "--table-only")
    assert code == 0 and "| CCA + ITQ " in out
    code, out, _ = command(report.main, "checkpoint/wiki")
    page = Path("checkpoint/wiki/report/index.html")
    assert f"report: {page}" in out and "VH-ABL, 16 bits" in page.read_text(encoding="utf-8")
    absent = feature_file.parent / "dataset"
    code, _, err = command(report.main, "checkpoint/wiki", absent)  # one of two is enough
    assert code == 2 and f"{absent}: no metrics.json" in one_message(err)
    code, _, err = command(report.main, "checkpoint/wiki", "--measure", "map@al")
    assert code == 2 and "--measure is map@al, but must be a measure such as mAP@all" in err
    for measure in ("mAP@50/hits", "bit balance"):  # in index order, and without any
        found = {r["value"] for r in json.loads((run_folder / "metrics.json").read_text())
                 if r["measure"] == measure and r["bits"] == 16}  # fmt: skip
        _, out, _ = command(report.main, run_folder, "--table-only", "--measure", measure)
        assert found and any(f"| {value:.4f} " in out for value in found)


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("metrics.json", "{}", "no list"),
        ("metrics.json", "[1]", "'int' object has no attribute"),
        ("metrics.json", '[{"method": "X"}]', "missing 11 required"),
        ("metrics.json", '[{"metod": "X"}]', "an unknown 'metod'"),
        ("metrics.json", '[{"bits": "16"}]', "bits '16' in row 1"),
        ("metrics.json", '[{"bits": 16.5}]', "bits 16.5 in row 1"),
        ("metrics.json", '[{"value": true}]', "value True in row 1"),
        ("metrics.json", '[{"oracle_labels": 0}]', "oracle_labels 0 in row 1"),
        ("metrics.json", "[" * 100_000, "recursion"),
        ("history.json", "7", "'int' object is not iterable"),
        ("history.json", '[{"phase": "final"}]', "'epoch'"),
        ("history.json", '[{"phase": 1, "epoch": 1}]', "no phase or epoch"),
        ("history.json", '[{"phase": "final", "epoch": 1, "loss": "low"}]', "a loss that is no"),
    ],
)
def test_a_report_of_odd_files(
    file: str, content: str, found: str, run_folder: Path, command
) -> None:
    (run_folder / file).write_text(content, encoding="utf-8")
    code, _, err = command(report.main, run_folder)
    message = one_message(err)
    assert code == 2 and f"{file}: this is no list of" in message
    assert found in message


def test_names_that_are_no_text_are_printed() -> None:
    """File names may hold any bytes; results with such a name are not lost."""
    program = "from vhabl.system import errors; errors.run(lambda _: print('caf\\udce9.png'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0 and done.stdout == b"caf\\udce9.png\n"


def test_places_that_cannot_hold_results_are_found_before_training(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch, command
) -> None:
    Path("file").touch()
    monkeypatch.setattr(train.Trainer, "run", None)
    for key in ("codes", "out"):
        code, _, err = command(train.main, *training(feature_file, f"{key}=file"))
        found = "file: file exists. Give a file or folder that can be used"
        assert code == 2 and found in one_message(err)


def test_a_report_without_its_data_says_what_it_leaves_out(
    feature_file: Path, run_folder: Path, command
) -> None:
    moved = feature_file.rename(feature_file.with_name("moved.mat"))
    code, _, err = command(report.main, run_folder, "--out", "made")
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith("note: no codes and no retrieved items in the report: ")
    text = Path("made/index.html").read_text(encoding="utf-8")
    assert "Retrieved items" not in text and Path("made/plots/training.png").exists()
    code, _, err = command(report.main, run_folder, f"data.path={moved}", "--out", "made")
    assert code == 0 and err == ""
    assert "Retrieved items" in Path("made/index.html").read_text(encoding="utf-8")
    code, out, _ = command(report.main, run_folder, "--table-only", "--out", "none")
    assert code == 0 and "VH-ABL" in out and not Path("none").exists()


def test_two_runs_are_compared(feature_file: Path, run_folder: Path, command) -> None:
    code, out, _ = command(evaluation.main, "--compare", run_folder, run_folder)
    assert code == 0
    assert out.count("A - B +0.0000  p = 1.0000  (1 and 1 seeds, 20 queries)") == 2  # lengths
    other = [a for a in training(feature_file) if not a.startswith("seed=")]
    assert command(train.main, *other, "seed=1")[0] == 0
    seeds = run_folder.parent
    code, out, _ = command(evaluation.main, "--compare", seeds, run_folder, "--bits", "12")
    assert code == 0 and "fused 12 bits" in out and "(2 and 1 seeds, 20 queries)" in out
    code, _, err = command(evaluation.main, "--compare", run_folder, "nowhere")
    assert code == 2 and "nowhere" in one_message(err)


def test_runs_of_different_settings_are_not_averaged(feature_file: Path, command) -> None:
    few = [a for a in training(feature_file) if not a.startswith("epochs")]
    for more in (["seed=0", "epochs=1"], ["seed=1", "epochs=1"],
                 ["seed=2", "epochs=2", "variant=long"]):  # fmt: skip
        assert command(train.main, *few, *more)[0] == 0
    for main, folder in ((report.main, "checkpoint"), (evaluation.main, "--checkpoint=checkpoint")):
        code, out, err = command(main, folder)
        assert code == 0 and "VH-ABL (long)" in out, err
    assert command(train.main, *few, "seed=2", "epochs=2")[0] == 0
    compared = ["--compare", "checkpoint/wiki/vh_abl", "checkpoint/wiki/vh_abl"]
    for main, given in (
        (report.main, ["checkpoint"]),
        (evaluation.main, ["--checkpoint", "checkpoint"]),
        (evaluation.main, compared),
    ):
        code, _, err = command(main, *given)
        assert code == 2 and "vh_abl/2: epochs=2, where checkpoint/wiki/" in one_message(err)


def test_seeds_are_of_the_same_data_and_differ(feature_file: Path, command, tmp_path: Path) -> None:
    assert command(train.main, *training(feature_file))[0] == 0
    (run,) = [path.parent for path in Path("checkpoint").rglob("config.yaml")]
    shutil.copytree(run, run.parent / "copy")
    for main, given in (
        (report.main, ["checkpoint"]),
        (evaluation.main, ["--checkpoint", run.parent]),
    ):
        code, _, err = command(main, *given)
        assert code == 2 and f"copy: its seed is that of {run}" in one_message(err)
    shutil.rmtree(run.parent / "copy")
    other = write_feature_file(tmp_path / "other.mat", seed=1)
    few = [a for a in training(other) if not a.startswith("seed=")]
    assert command(train.main, *few, "seed=1")[0] == 0
    code, _, err = command(report.main, "checkpoint")
    assert code == 2 and "1: data.path=" in one_message(err)
    code, _, err = command(evaluation.main, "--compare", run, run.parent / "1")
    assert code == 2 and "20 and 20 queries, whose labels differ" in one_message(err)
    shutil.rmtree(run.parent / "1")
    other.rename(feature_file)
    assert command(train.main, *training(feature_file), "seed=1")[0] == 0
    code, _, err = command(report.main, "checkpoint")
    assert code == 2 and "1: the digest of its data=" in one_message(err)


def test_a_finished_run_is_not_replaced_by_another_one(feature_file: Path, command) -> None:
    assert command(train.main, *training(feature_file, "out=own"))[0] == 0
    weights = Path("own/weights.safetensors").read_bytes()
    for more, found in (
        (["seed=7"], "seed=0, this one 7"),
        (["variant=long"], "variant=, this one long"),
    ):
        few = [a for a in training(feature_file, "out=own") if not a.startswith("seed=")]
        code, _, err = command(train.main, *few, *more)
        assert code == 2 and f"own: the finished run in it has {found}" in err
        assert Path("own/weights.safetensors").read_bytes() == weights
    assert command(train.main, *training(feature_file, "out=own", "epochs=1"))[0] == 0
    assert Path("own/weights.safetensors").read_bytes() != weights


def test_a_missing_run_is_named_by_its_folder(command) -> None:
    code, _, err = command(encode.main, "--checkpoint", "no/run", "--text", "a")
    assert code == 2 and "no/run: no such folder" in one_message(err)


def test_a_note_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("one", "two", "one"):
        errors.note(text)
    assert capsys.readouterr().err == "note: one\nnote: two\n"


def test_training_says_what_it_read(feature_file: Path, command) -> None:
    code, _, err = command(train.main, *training(feature_file))
    told = (
        "note: wiki: 60 items to search, 60 to train on, 20 queries, 4 classes, 1.0 labels an item"
    )
    assert code == 0 and err.splitlines()[0] == told


def test_a_bar_is_drawn_at_a_terminal_alone(feature_file: Path, command) -> None:
    arguments = [a for a in training(feature_file) if a != "--quiet"]
    code, _, err = command(train.main, *arguments)
    assert code == 0 and "epoch" not in err


def test_help_and_print_config(feature_file: Path, command) -> None:
    code, out, _ = command(train.main, "--help")
    assert code == 0 and "validation.fraction" in out and "model.weights" not in out
    code, out, _ = command(train.main, "--config", RECIPE, "--help")
    assert code == 0 and "validation.fraction" in out and "model.weights.importance" in out
    code, out, _ = command(train.main, *training(feature_file), "--print-config", "epochs=9")
    assert code == 0 and "epochs: 9\n" in out and f"path: {feature_file}" in out
    assert not Path("checkpoint").exists()


def test_importance_experiments_write_csv_and_plots(feature_file: Path, command) -> None:
    common = [a for a in training(feature_file) if a not in ("--quiet",)]
    code, out, err = command(importance.main, "ranking", *common, "--seeds", "0", "1")
    assert code == 0, err
    folder = Path("checkpoint/wiki/vh_abl/importance")
    for name in ("ranking", "intervals"):
        assert (folder / f"{name}.csv").read_text().count("\n") > 2
        assert (folder / f"{name}.png").stat().st_size > 1000
        assert (folder / f"{name}.svg").exists()
    for order in ("learned", "random", "variance", "greedy"):
        assert f"  {order} " in out


def test_two_feature_file_versions_train_to_identical_codes(command) -> None:
    files = [SHARED / "wiki" / f"wiki_sift_twt{v}.mat" for v in ("", "_v73")]
    if not all(f.exists() for f in files):
        pytest.skip("the Wiki features are not here")
    for number, file in enumerate(files):
        arguments = training(file, f"out=run{number}", f"codes=codes{number}", "epochs=2")
        code, _, err = command(train.main, *arguments, "batch_size=512")
        assert code == 0, err
    for path in Path("codes0").glob("*.npz"):
        with np.load(path) as a, np.load(Path("codes1", path.name)) as b:
            assert all(np.array_equal(a[k], b[k]) for k in a)


# -- bad input -------------------------------------------------------------------------------------


def damaged(path: Path, how: str) -> Path:
    content = scipy.io.loadmat(path)
    content = {k: v for k, v in content.items() if not k.startswith("__")}
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
        return path
    if how == "foreign":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
        return path
    if how == "missing key":
        del content["T_db"]
    elif how == "rows":
        content["T_te"] = content["T_te"][:-1]
    elif how == "nan":
        content["I_db"][3, 4] = np.nan
    elif how == "labels":
        content["L_te"][0, 1] = 2
    scipy.io.savemat(path, content)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"features\.mat: the file is damaged or truncated"),
        ("foreign", r"features\.mat: .*PNG.*must be a MATLAB 5 or 7\.3 file"),
        ("missing key", r"features\.mat: no key T_db, only .*must have I_tr, T_tr"),
        ("rows", r"features\.mat: 20 rows in I_te, 19 rows in T_te.*must be the same"),
        ("nan", r"key I_db: nan in row 4, column 5 .*must be finite numbers"),
        ("labels", r"key L_te: 2 in row 1, column 2\. Labels must be 0 and 1"),
    ],
)
def test_bad_feature_files(feature_file: Path, how: str, message: str, command) -> None:
    code, _, err = command(train.main, *training(damaged(feature_file, how)))
    assert code == 2 and re.search(message, one_message(err)), err
    assert not Path("checkpoint").exists() and not Path("flickrhashcode").exists()


def test_texts_in_another_order_are_refused_where_pairs_are_needed(
    feature_file: Path, command
) -> None:
    given = training(feature_file, "data.text_order=10")
    code, _, err = command(train.main, *given)
    said = "data set wiki: image i and text i are not one item. VH-ABL needs pairs"
    assert code == 2 and one_message(err).endswith(said)
    code, _, err = command(train.main, *training(feature_file, "data.text_order=-2"))
    assert code == 2 and "data.text_order is -2, but must be -1, or a seed" in err


def test_missing_data_says_where_it_comes_from(command) -> None:
    for data, parts in (
        ("mirflickr_cnn", ("mir_cnn_twt.mat: no such file", "I_tr")),
        ("mirflickr", ("flickr25k: no such file", "scripts/make_flickr.py", "caption.mat")),
    ):
        code, _, err = command(train.main, "--config", RECIPE, f"data={data}")
        assert code == 2
        for part in (*parts, "source:", "layout:", "--demo"):
            assert part in err


def test_a_publications_own_split_is_chosen_by_the_recipe(command) -> None:
    for recipe, protocol, folder in (
        (RECIPE, "own", "dataset/flickr25k_cnn"),
        (RECIPE, "common", "dataset/flickr25k:"),
        (RECIPE.replace("vh_abl", "pghmh"), "own", "dataset/flickr25k_all"),
        (RECIPE.replace("vh_abl", "cmcl"), "own", "dataset/flickr25k:"),
        (RECIPE.replace("vh_abl", "hq_alexnet"), "own", "dataset/mirflickr_hq"),
        (RECIPE.replace("vh_abl", "hq_published"), "own", "dataset/mirflickr_hq"),
    ):
        code, _, err = command(
            train.main, "--config", recipe, "data=mirflickr", f"protocol={protocol}"
        )
        assert code == 2 and folder in err
    assert "protocol is 'mine', but must be common or own" in command(
        train.main, "--config", RECIPE, "data=emoji", "protocol=mine")[2]  # fmt: skip


def test_no_recipe_and_a_wrong_method(command) -> None:
    code, _, err = command(train.main, "epochs=3")
    assert code == 2 and "--config: it is missing. Add --config NAME, of cmcl" in one_message(err)
    code, _, err = command(train.main, "--config", "none.yaml")
    assert code == 2 and "none.yaml: no such file" in one_message(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_asked_for_and_absent(feature_file: Path, command) -> None:
    code, _, err = command(train.main, *training(feature_file, "device=cuda"))
    assert code == 2 and "device 'cuda': 0 CUDA devices" in one_message(err)
    assert not Path("checkpoint").exists()


def test_a_checkpoint_of_another_data_set(run_folder: Path, tmp_path: Path, command) -> None:
    other = write_feature_file(tmp_path / "other.mat", seed=9)
    arguments = ["--checkpoint", run_folder, f"data.path={other}"]
    code, _, err = command(evaluation.main, *arguments)
    assert code == 2 and re.search(r"weights\.safetensors: trained on .*The data are", err)


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "bit", "tensors", "header"])
def test_a_damaged_checkpoint(run_folder: Path, how: str, command) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = run_folder / "weights.safetensors"
    with safe_open(str(weights), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "text":
        weights.write_text("not weights")
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "bit":
        content = bytearray(weights.read_bytes())
        content[-6] ^= 1
        weights.write_bytes(content)
    elif how == "tensors":
        tensors.pop("classifier.bias")
        save_file(tensors, str(weights), metadata=header)
    else:
        save_file(tensors, str(weights))
    code, _, err = command(evaluation.main, "--checkpoint", run_folder)
    found = {"bit": r"other values than were saved", "tensors": r"no tensor classifier\.bias"}
    assert code == 2 and re.search(rf"weights\.safetensors: {found.get(how, '')}", one_message(err))


def test_no_run_in_the_folder(tmp_path: Path, command) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        code, _, err = command(evaluation.main, "--checkpoint", folder)
        assert code == 2 and "Give a run folder" in one_message(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_no_permission_to_write(feature_file: Path, tmp_path: Path, command) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code, _, err = command(train.main, *training(feature_file, f"out={closed}/run"))
    assert code == 2 and ": no permission" in one_message(err)


def test_a_place_that_cannot_be_written(feature_file: Path, command) -> None:
    """A file where a folder must be: as clear for the superuser as for anyone."""
    Path("checkpoint").write_text("in the way")
    code, _, err = command(train.main, *training(feature_file))
    assert code == 2 and "checkpoint" in one_message(err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_while_writing_codes(
    feature_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    command,
) -> None:
    real = scipy.io.savemat

    def full(path: Path, *arguments: object, **named: object) -> None:
        real(path, *arguments, **named)
        with open("/dev/full", "wb", buffering=0) as disk:  # noqa: PTH123
            disk.write(path.read_bytes())

    monkeypatch.setattr(scipy.io, "savemat", full)
    code, _, err = command(train.main, *training(feature_file))
    assert code == 2 and ": No space left on device" in one_message(err)
    assert not [p for p in Path("flickrhashcode").rglob("*") if p.is_file()]
    assert not Path("checkpoint/wiki/vh_abl/0/metrics.json").exists()


# -- whole processes -------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_module_runs_as_a_program(feature_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = program("vhabl.train", *training(feature_file))
    assert done.returncode == 0, done.stderr
    assert "| VH-ABL " in done.stdout
    bad = program("vhabl.train", *training(feature_file, "epoch=1"))
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert "Did you mean 'epochs'?" in bad.stderr


@pytest.mark.parametrize(
    "module",
    ["train", "eval", "encode", "audit", "studies.baselines", "studies.ablation",
     "studies.importance", "report.__main__", "data.__main__", "search.__main__"],
)  # fmt: skip
def test_every_argument_has_a_help(module: str, command, monkeypatch: pytest.MonkeyPatch) -> None:
    adding, without = argparse.ArgumentParser.add_argument, []

    def add(parser: argparse.ArgumentParser, *names: str, **given: object) -> argparse.Action:
        without.extend(names if not given.get("help") else ())
        return adding(parser, *names, **given)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add)
    code, out, _ = command(importlib.import_module(f"vhabl.{module}").main, "--help")
    assert code == 0 and "usage" in out and without == []


@pytest.mark.parametrize(
    ("given", "spin"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    given: dict[str, str], spin: str | None
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-m", "vhabl.train", "--help"], cwd=ROOT, check=True, text=True,
        env={**environment, **given, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch does not use libgomp here")
    assert (f"GOMP_SPINCOUNT = '{spin}'" in done.stderr) == (spin is not None)
    assert ("GOMP_SPINCOUNT = '30000'" in done.stderr) == (spin == "30000")


@pytest.mark.e2e
def test_a_second_set_up_does_nothing_and_the_scripts_name_wrong_arguments() -> None:
    def bash(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    for script in ("flickr.sh", "coco.sh", "nuswide.sh"):
        wrong = bash(script, "vhabl")
        assert wrong.returncode == 2 and "Choose among" in wrong.stderr
        wrong = bash(script, "--protocol", "mine")
        assert wrong.returncode == 2 and "is 'mine', but must be common or own" in wrong.stderr
        told = " ".join(bash(script, "--help").stdout.split())
        assert "common trains our recipes on one split" in told
        assert "own trains the published recipes (configs/<method>_published.yaml)" in told
        assert "set -e" not in told  # the text ends where the program begins
    told = bash("scripts/ablate.sh", "--help")
    assert (
        told.returncode == 0 and "METHOD data=NAME" in told.stdout and "set -e" not in told.stdout
    )
    if (ROOT / ".venv" / "vhabl-setup").exists():
        again = bash("scripts/setup.sh")
        assert again.returncode == 0 and again.stderr == "" and again.stdout == ""


def test_every_published_recipe_is_trained_on_the_split_of_its_publication() -> None:
    script = (ROOT / "scripts" / "reproduce.sh").read_text(encoding="utf-8")
    (own,) = re.findall(r"== own \]\]; then\s+recipes=\(([^)]*)\)", script)
    published = {p.stem for p in recipes() if p.stem.endswith("_published")}
    assert set(own.split()) == published
    methods = {"vh_abl", "hiamh", "cmcl", "hq", "pghmh"}
    assert published == {f"{method}_published" for method in methods}
    for name in published:
        for data in ("mirflickr", "nuswide"):
            config = load(CONFIG_DIR / f"{name}.yaml", [f"data={data}", "protocol=own"])
            assert config.variant == "published" and config.title.endswith(" (published)")
            assert config.data.name.startswith(data)


def test_a_difference_of_two_runs_is_a_less_b(
    feature_file: Path, run_folder: Path, command
) -> None:
    """A folder of seeds counts with the mean of its seeds."""
    assert command(train.main, *training(feature_file, "seed=1"))[0] == 0
    stored = [
        json.loads(Path(f"checkpoint/wiki/vh_abl/{seed}/metrics.json").read_text())
        for seed in (0, 1)
    ]
    first, second = (
        next(r["value"] for r in rows if r["bits"] == 8 and r["ties"] == "expected")
        for rows in stored
    )
    other = run_folder.parent / "1"
    code, out, _ = command(evaluation.main, "--compare", run_folder, other, "--bits", "8")
    assert code == 0
    assert f"A {first:.4f}  B {second:.4f}  A - B {first - second:+.4f}" in out
    mean = (first + second) / 2
    code, out, _ = command(evaluation.main, "--compare", run_folder.parent, other, "--bits", "8")
    assert code == 0
    assert f"A {mean:.4f}  B {second:.4f}  A - B {mean - second:+.4f}" in out


def test_a_query_in_the_database_is_left_out_by_every_command(
    feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command
) -> None:
    real = load_data

    def inside(config: DataConfig, encoder: EncoderConfig) -> Dataset:
        data = real(config, encoder)
        return replace(data, query=data.database.take(np.arange(8)))

    for module in (train, runs):
        monkeypatch.setattr(module, "load_data", inside)
    assert command(train.main, *training(feature_file))[0] == 0
    folder = Path("checkpoint/wiki/vh_abl/0")
    _, out, _ = command(evaluation.main, "--checkpoint", folder, "--json", "--bits", "8")
    left_out = json.loads(out.splitlines()[0])
    _, out, _ = command(
        evaluation.main, "--checkpoint", folder, "--json", "--bits", "8", "--keep-own"
    )
    kept = json.loads(out.splitlines()[0])
    assert (left_out["own_items"], kept["own_items"]) == ("left_out", "kept")
    assert kept["value"] > left_out["value"]
    _, out, _ = command(evaluation.main, "--compare", folder, folder, "--bits", "8")
    assert f"A {left_out['value']:.4f} " in out


def test_code_files_take_no_override(run_folder: Path, command) -> None:
    file = Path("flickrhashcode/wiki/VH-ABL_16-wiki_bits.mat")
    for more in (["--bits", "8"], ["device=cpu"]):
        code, _, err = command(evaluation.main, *more, "--codes", file)
        assert code == 2 and "--codes: neither --bits nor" in one_message(err)


def test_runs_on_several_data_sets_below_one_folder(
    feature_file: Path, tmp_path: Path, command
) -> None:
    other = write_feature_file(tmp_path / "other.mat", seed=9)
    for number, path in enumerate((feature_file, other)):
        assert command(train.main, *training(path, f"out=runs/{number}", "epochs=1"))[0] == 0
    code, out, err = command(evaluation.main, "--checkpoint", "runs", "--json", "--bits", "8")
    assert code == 0, err
    assert len(out.splitlines()) == 4  # mAP@all and its twin, of two runs


def test_the_history_of_a_run_has_every_epoch(run_folder: Path) -> None:
    history = json.loads((run_folder / "history.json").read_text())
    selected = [row for row in history if row["phase"] == "select"]
    assert [row["epoch"] for row in selected] == [1, 2, 3, 4]
    assert ["validation" in row for row in selected] == [False, True, False, True]
    best = max(selected[1::2], key=lambda row: row["validation"])["epoch"]
    final = [row["epoch"] for row in history if row["phase"] == "final"]
    assert final == list(range(1, best + 1))
    assert all(row["loss"] > 0 for row in history)


def test_records_carry_the_seed_of_their_run(feature_file: Path, command) -> None:
    """What a table counts as several seeds is told apart by this alone."""
    assert command(train.main, *training(feature_file, "seed=3", "epochs=1"))[0] == 0
    folder = Path("checkpoint/wiki/vh_abl/3")
    found = [json.loads((folder / "metrics.json").read_text())]
    _, out, _ = command(evaluation.main, "--checkpoint", folder, "--json", "--measures", "all")
    found.append([json.loads(line) for line in out.splitlines()])
    command(
        baselines.main,
        "data=wiki",
        "data.class_names=[]",
        f"data.path={feature_file}",
        "bits=[8]",
        "seed=3",
    )
    found.append(json.loads(Path("checkpoint/wiki/baselines/3/metrics.json").read_text()))
    assert [{row["seed"] for row in rows} for rows in found] == [{3}] * 3
    assert all("VH-ABL (real-valued)" in {row["method"] for row in rows} for rows in found[:2])


@pytest.mark.parametrize("how", ["not finite", "another shape", "one too many"])
def test_a_checkpoint_whose_tensors_do_not_fit(run_folder: Path, how: str, command) -> None:
    weights = run_folder / "weights.safetensors"
    with safe_open(str(weights), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if how == "not finite":
        tensors["bias"][1] = float("nan")
        message = "values in bias that are not finite"
    elif how == "another shape":
        tensors["bias"] = torch.zeros(9)
        message = "bias of shape (9,)"
    else:
        tensors["extra"] = torch.zeros(1)
        message = "an unknown tensor extra"
    save_file(tensors, str(weights), metadata=header)
    code, _, err = command(evaluation.main, "--checkpoint", run_folder)
    assert code == 2 and f"weights.safetensors: {message}" in one_message(err)


def test_projections_follow_the_seed_and_need_enough_items() -> None:
    x = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    for fit in (baselines.lsh, baselines.itq):
        first, again, other = (fit(x, 4, seed) for seed in (0, 0, 1))
        assert first is not None and again is not None and other is not None
        assert np.array_equal(first, again) and not np.allclose(first, other)
    assert baselines.itq(x, 9, 0) is None  # 9 items span 8 directions about their mean
    found = baselines.itq(x, 3, 0)
    assert found is not None
    assert np.allclose(found.T @ found, np.eye(3), atol=1e-4)
    strongest = np.linalg.svd(x, full_matrices=False)[2][:3]
    assert np.allclose(found @ (found.T @ strongest.T), strongest.T, atol=1e-4)


def test_baselines_are_drawn_by_the_seed(feature_file: Path) -> None:
    data = load_data(small_config(feature_file).data)
    runs_of_seeds = [baselines.baseline_records(data, [8], seed) for seed in (0, 1)]
    for title, drawn in (("chance", False), ("LSH", True), ("ITQ", True)):
        first, second = ([r.value for r in rows if r.method == title] for rows in runs_of_seeds)
        assert (first != second) == drawn, title


def test_itq_turns_principal_directions_to_the_least_quantisation_error() -> None:
    """Least error is most mean |projection|. Of normal data that is sqrt(2 / pi) times each
    bit's deviation, and most where the turn gives every bit the same variance.
    """
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(8, 8)))[0]
    x = random.normal(size=(2000, 8)) * [16, 4, 2, 1, 0.5, 0.5, 0.5, 0.5] @ turn
    x = x.astype(np.float32)
    variance = np.linalg.eigvalsh(x.T @ x / len(x))[-4:].mean()
    for seed in range(5):
        projection = baselines.itq(x, 4, seed)
        assert projection is not None
        found = np.abs(x @ projection).mean()
        assert found == pytest.approx(np.sqrt(2 / np.pi * variance), rel=0.02)


@pytest.mark.parametrize("single", [True, False])
def test_logistic_regression_is_where_its_penalised_loss_is_flat(single: bool) -> None:
    """The gradient of the loss cancels that of 0.1 |weight|^2; the bias has no penalty."""
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 4)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[random.integers(3, size=50)]
    classify = baselines.logistic_regression(x, y, 0.1, single)
    weight = classify(np.eye(4, dtype=np.float32)) - classify(np.zeros((1, 4), np.float32))
    logits = torch.from_numpy(classify(x))
    chances = logits.softmax(dim=1) / 50 if single else logits.sigmoid() / 150
    slope = chances.numpy() - y / (50 if single else 150)
    assert np.allclose(x.T @ slope, -2 * 0.1 * weight, atol=1e-4) and np.abs(weight).max() > 0.01
    assert np.allclose(slope.sum(axis=0), 0, atol=1e-4)


def test_the_classifier_has_the_penalty_that_serves_held_out_items_best(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All penalties but one are made to give opposite answers."""
    real = baselines.logistic_regression
    fitted, asked = [], []

    def spoiled(
        x: np.ndarray, y: np.ndarray, penalty: float, single: bool
    ) -> Callable[[np.ndarray], np.ndarray]:
        fitted.append((len(x), penalty))
        classify = real(x, y, penalty, single)

        def answer(new: np.ndarray) -> np.ndarray:
            asked.append(len(new))
            return classify(new) * (1 if penalty == 1e-2 else -1)

        return answer

    monkeypatch.setattr(baselines, "logistic_regression", spoiled)
    data = load_data(small_config(feature_file).data)
    baselines.baseline_records(data, [8], 0)
    assert fitted == [*((54, penalty) for penalty in baselines.PENALTIES), (60, 1e-2)]
    assert asked == [6, 6, 6, 6, 20, 60]


def test_baselines_measure_features_on_the_training_items(feature_file: Path) -> None:
    data = load_data(small_config(feature_file).data)
    features = baselines.Features(data)(data.train)
    assert np.allclose(features.mean(axis=0), 0, atol=1e-4)
    parts = features[:, :12], features[:, 12:]
    assert [p.var(axis=0).mean() for p in parts] == pytest.approx([1, 1], abs=0.05)


def test_cca_finds_what_two_modalities_share() -> None:
    """Two shared signals under rotations and noise: their codes agree across the modalities."""
    random = np.random.default_rng(0)
    shared = random.normal(size=(400, 2))
    views = []
    for width in (9, 7):
        turn = np.linalg.qr(random.normal(size=(width, width)))[0]
        noise = random.normal(size=(400, width - 2)) * 2  # louder than what is shared
        view = np.concatenate([shared + 0.1 * random.normal(size=(400, 2)), noise], axis=1) @ turn
        views.append((view - view.mean(axis=0)).astype(np.float32))
    for seed in range(3):
        pair = baselines.cca_itq(views[0], views[1], 2, seed)
        assert pair is not None and pair[0].shape == (9, 2) and pair[1].shape == (7, 2)
        codes = [x @ p >= 0 for x, p in zip(views, pair, strict=True)]
        assert (codes[0] == codes[1]).mean() > 0.9
        swapped = [x @ p >= 0 for x, p in zip(views, (pair[0], pair[1][:, ::-1]), strict=True)]
        assert (swapped[0] == swapped[1]).mean() < 0.7
    assert baselines.cca_itq(views[0], views[1], 8, 0) is None  # more bits than text dimensions


def test_baselines_have_rows_for_the_cross_modal_tasks(feature_file: Path) -> None:
    rows = baselines.baseline_records(load_data(small_config(feature_file).data), [4, 8], 0)
    found = {
        (r.method, r.task, r.bits): r.value
        for r in rows
        if (r.measure, r.ties) == ("mAP@all", "expected")
    }
    for task in ("i2t", "t2i"):
        assert found["chance", task, 8] == pytest.approx(found["chance", "fused", 8])
        assert found["CCA + ITQ", task, 4] > found["chance", task, 4] + 0.2
    assert found["CCA + ITQ", "i2t", 4] != found["CCA + ITQ", "t2i", 4]


def test_a_run_on_pairs_says_which_items_were_drawn(feature_file: Path, command) -> None:
    small = ["bits=[8]", "epochs=1", "validation.fraction=0", "model.dim=8", "device=cpu"]
    recipe = ROOT / "configs" / "nested_mlp.yaml"
    code, _, err = command(train.main, "--config", recipe, "--quiet", "data=emoji", *small)
    assert code == 0, err
    drawn = json.loads(Path("checkpoint/emoji/nested_mlp/0/split.json").read_text())
    data = load_data(load_baselines(["data=emoji"]).data)
    assert drawn["query"] == data.query.ids.tolist() and len(drawn["query"]) == 200
    assert drawn["train"] == data.train.ids.tolist() and len(drawn["train"]) == 1000
    assert command(train.main, *training(feature_file, "epochs=1"))[0] == 0
    assert not Path("checkpoint/wiki/vh_abl/0/split.json").exists()  # the file has its split
