"""vhabl.encode: raw files and strings in, codes out; and what an oracle's results are called."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    CNN,
    array_config,
    pair_config,
    picture_arrays,
    small_config,
    write_arrays,
    write_pair_folder,
)
from PIL import Image

import vhabl
from vhabl import audit, codes, encode, train
from vhabl import eval as evaluation
from vhabl.config import Config
from vhabl.data import load as load_data
from vhabl.evaluation.records import code_tasks, with_one_modality
from vhabl.metrics import evaluate
from vhabl.report.gallery import Gallery
from vhabl.search import Index
from vhabl.system.errors import VhablError
from vhabl.training import run_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pair_folder(tmp_path / "p")


def trained(config: Config) -> list[Path]:
    train.train(config, load_data(config.data, config.encoder), progress_bar=False)
    return sorted(Path("run").iterdir())


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("pghmh", ["encoder.tune=1"]),
        ("cmcl", ["encoder.tune=frozen", "encoder.cache_precision=float32"]),
        ("hq", [*CNN, "encoder.tune=all", "encoder.resize=230", "encoder.squeeze=true"]),
        ("vh_abl", ["model.net.modality_dropout=0.2", "encoder.resize=36", "encoder.squeeze=true"]),
        ("nested_mlp", ["encoder.name=features", "model.modality_dropout=0.2", "data.min_count=1"]),
    ],
)
def test_raw_items_get_the_codes_of_an_evaluation(
    method: str, overrides: list[str], folder: Path, tiny_alexnet: None
) -> None:
    """Of pixels or descriptors, of tokens or words: the same codes as from the data set."""
    config = pair_config(folder, method, "out=run", "validation.fraction=0", *overrides)
    trained(config)
    data = load_data(config.data, config.encoder)
    found = with_one_modality(
        run_folder.load(Path("run")).method, data,
        code_tasks(run_folder.load(Path("run")).method, data, [8]),
    )[8]  # fmt: skip
    names = [folder / "images" / Path(str(i)).name for i in data.query.ids]
    captions = dict(
        zip([f"anywhere/{i}.png" for i in range(60)], all_captions(folder), strict=True)
    )
    texts = [captions[str(i)] for i in data.query.ids]
    model = vhabl.load("run")
    if config.encoder.name != "features":  # the same pixels, which such small models may not show
        kept = config.encoder
        seen = model._image(names)[np.arange(len(names))]
        assert np.array_equal(seen, data.query.image[np.arange(len(names))])
        assert seen.shape[-1] == (kept.resize or 32)
    if model.method.task == "cross":
        images = model.encode(images=names, bits=8)
        both = model.encode(images=names, texts=texts[:3], bits=8)
        assert set(images) == {"image"} and np.array_equal(images["image"], found["i2t"].query)
        assert np.array_equal(both["text"], found["t2i"].query[:3])
        return
    pairs = model.encode(images=names, texts=texts, bits=8)
    assert np.array_equal(pairs["fused"], found["fused"].query)
    assert pairs["fused"].dtype == np.int8 and set(np.unique(pairs["fused"])) <= {-1, 1}
    assert np.array_equal(model.encode(images=list(map(str, names)), bits=8)["fused"],
                          found["i2f"].query)  # fmt: skip
    assert np.array_equal(model.encode(texts=texts, bits=8)["fused"], found["t2f"].query)
    opened = [Image.open(name) for name in names]
    assert np.array_equal(model.encode(images=opened, bits=8)["fused"], found["i2f"].query)
    assert model.encode(texts=[])["fused"].shape == (0, 16)


def all_captions(folder: Path) -> list[str]:
    from vhabl.data.pairs import read_pairs

    return read_pairs(folder, pair_config(folder).data).captions


def test_features_are_encoded_as_arrays(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "out=run", "epochs=1", "validation.fraction=0",
                          "model.net.modality_dropout=0.2")  # fmt: skip
    trained(config)
    data = load_data(config.data)
    model = vhabl.load(Path("run"))
    found = model.encode(images=data.query.image, texts=data.query.text, bits=8)["fused"]
    assert np.array_equal(found, code_tasks(model.method, data, [8])[8]["fused"].query)
    assert model.encode(texts=data.query.text[:3].tolist())["fused"].shape == (3, 16)
    for wrong in (["a.jpg"], np.zeros((2, 5)), np.full((2, 12), np.nan)):
        with pytest.raises(VhablError, match=r"images.*finite.*N, 12"):
            model.encode(images=wrong)


@pytest.mark.parametrize("held", [True, False])
def test_a_model_of_pictures_in_arrays_encodes_files_and_arrays(
    held: bool, tmp_path: Path, tiny_alexnet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a network, from memory or from memory maps; its texts are features."""
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2**28 if held else 0)
    folder = write_arrays(tmp_path / "arrays", picture_arrays())
    config = array_config(folder, "out=run", "validation.fraction=0", "encoder.tune=2")
    written = trained(config)
    assert Path("run/split.json") not in written  # arrays come with their split
    data = load_data(config.data, config.encoder)
    model = vhabl.load("run")
    found = code_tasks(model.method, data, [8])[8]
    ((_, _, again),) = run_folder.encoded([model.run], [8], [])
    assert (again[8]["i2t"].query != found["i2t"].query).mean() < 0.02  # kept as float16
    pictures = [Image.fromarray(x) for x in picture_arrays()["test_image"]]
    for images in (pictures, data.query.image):
        codes_of = model.encode(images=images, texts=picture_arrays()["test_text"], bits=8)
        assert np.array_equal(codes_of["image"], found["i2t"].query)
        assert np.array_equal(codes_of["text"], found["t2i"].query)
    with pytest.raises(VhablError, match=r"texts.*list.*finite.*N, 9"):
        model.encode(texts=["a red car"])
    assert Gallery(config.data, data).item(0, data.query.labels[0], "query 1").caption == "query 1"
    index = Index.build("index", "run", bits=8)
    pictures[0].save("query.png")
    (hit,) = index.search(image="query.png", top=1)
    distances = (found["i2t"].query[:1] != found["i2t"].database).sum(axis=1)
    assert hit.distance == distances.min()
    assert len(index.engine) == len(data.database)
    Path("d.yaml").write_text(f"name: arrays\nkind: npy\npath: {folder}\n", encoding="utf-8")
    asked = ["--checkpoint", "run", "--data", "d.yaml", "--bits", "8", "--quiet"]
    assert encode.main([*asked, "--out", "c.npz"]) == 0
    other = Index.build("other", "run", "d.yaml", codes="c.npz")
    assert other.search(image="query.png", top=9) == index.search(image="query.png", top=9)


def test_a_model_of_features_in_arrays_encodes_arrays(tmp_path: Path) -> None:
    arrays = picture_arrays()
    for role in ("train", "vali", "test"):
        arrays[f"{role}_image"] = arrays[f"{role}_image"].mean(axis=(1, 2))
    folder = write_arrays(tmp_path / "arrays", arrays)
    trained(array_config(folder, "out=run", "validation.fraction=0", "encoder.name=features"))
    model = vhabl.load("run")
    data = load_data(model.run.config.data, model.run.config.encoder)
    found = model.encode(images=arrays["test_image"], texts=arrays["test_text"], bits=8)
    expected = code_tasks(model.method, data, [8])[8]
    assert np.array_equal(found["image"], expected["i2t"].query)
    assert np.array_equal(found["text"], expected["t2i"].query)
    with pytest.raises(VhablError, match=r"images.*list.*finite.*N, 3"):
        model.encode(images=["a.jpg"])


@pytest.fixture
def model(folder: Path) -> encode.Model:
    trained(pair_config(folder, "pghmh", "out=run", "validation.fraction=0", "epochs=1"))
    return vhabl.load("run")


def test_what_cannot_be_encoded_is_said(model: encode.Model, folder: Path) -> None:
    picture = folder / "images" / "0.png"
    closed = Image.open(picture)
    closed.close()
    code = model.encode(texts=["a"], bits=np.int64(8))["fused"]
    assert (code == model.encode(texts=["a"], bits=8)["fused"]).all()
    for given, message in (
        ({}, "images and texts.*neither"),
        ({"images": [picture], "texts": ["a", "b"]}, r"1 image and 2 texts.*as many"),
        ({"texts": ["a"], "bits": 9}, r"bits is 9.*a code length that the model"),
        ({"texts": [], "bits": 9}, r"bits is 9.*a code length that the model"),
        ({"texts": "a red car"}, r"texts.*a str.*a sequence"),
        ({"images": np.zeros((2, 3))}, "images: a ndarray. Give a sequence"),
        ({"texts": ["a", None]}, "texts: None as number 2. Give a text of each"),
        ({"texts": [b"a"]}, "texts: a bytes as number 1. Give str"),
        ({"texts": 3}, "texts: a int. Give a sequence"),
        ({"images": [3]}, "images: a int as number 1. Give str or Path or "),
        ({"texts": ["a"], "bits": "8"}, "bits is '8', but must be a whole number"),
        ({"images": [closed]}, "the image cannot be read"),
        ({"images": [Image.new("RGB", (0, 8))]}, "the image cannot be read"),
        ({"images": [folder / "nowhere.png"]}, r"nowhere.png: no such file"),
    ):
        with pytest.raises(VhablError, match=message):
            model.encode(**given)


def test_an_item_without_a_text_has_the_code_of_its_image_alone(
    model: encode.Model, folder: Path
) -> None:
    files = [folder / "images" / f"{n}.png" for n in range(8)]
    texts = ["red", None, "", None, "blue", "red", None, ""]
    found = model.features(files, texts)["fused"]
    alone = model.features(files)["fused"]
    paired = model.features(files, [text or "" for text in texts])["fused"]
    assert not np.allclose(alone, paired, atol=0.01)
    for row, text in enumerate(texts):
        expected = alone if text is None else paired
        np.testing.assert_allclose(found[row], expected[row], atol=1e-5)
    lines = [json.dumps({"image": f"{n}.png", "caption": text}) for n, text in enumerate(texts)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    assert run("--checkpoint", "run", "--table", folder / "t.jsonl", "--out", "c.npz") == 0
    assert np.array_equal(
        codes.unpack(np.load("c.npz")["fused"], 16), model.encode(files, texts)["fused"]
    )


def test_texts_that_are_cut_are_counted(
    model: encode.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    model.encode(texts=["red " * 30, "red", "blue " * 30])
    assert capsys.readouterr().err == "note: 2 texts longer than 12 tokens: cut\n"


def run(*arguments: object) -> int:
    return encode.main([*map(str, arguments), "--quiet"])


def test_the_command_writes_packed_codes(
    model: encode.Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "notes.txt").write_text("not a picture")
    Image.new("RGB", (40, 40), "red").save(folder / "images" / "OF_A_CAMERA.PNG")
    assert run("--checkpoint", "run", "--images", folder / "images", "--bits", 8,
               "--out", "c.npz") == 0  # fmt: skip
    assert capsys.readouterr().out == "c.npz: codes of 8 bits: fused 61\n"
    content = np.load("c.npz")
    files = sorted(p.name for p in (folder / "images").iterdir() if p.suffix in (".png", ".PNG"))
    assert content["ids"].tolist() == files and content["bits"] == 8
    expected = model.encode(images=[folder / "images" / f for f in files], bits=8)["fused"]
    assert np.array_equal(codes.unpack(content["fused"], 8), expected)
    assert run("--checkpoint", "run", "--text", "a red one", "--text", "blue") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = model.encode(texts=["a red one", "blue"])["fused"]
    assert [line[:2] for line in lines] == [["a red one", "fused"], ["blue", "fused"]]
    assert [[1 if c == "1" else -1 for c in line[2]] for line in lines] == expected.tolist()


def test_a_table_needs_no_labels(
    model: encode.Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("0.png", "a red one"), ("1.png", "")])
    (folder / "texts.jsonl").write_text(json.dumps({"caption": ["first", "second"]}) + "\n")
    assert run("--checkpoint", "run", "--table", folder / "t.csv", "--out", "c.npz") == 0
    content = np.load("c.npz")
    files = [folder / "images" / "0.png", folder / "images" / "1.png"]
    expected = model.encode(images=files, texts=["a red one", ""])["fused"]
    assert np.array_equal(codes.unpack(content["fused"], 16), expected)
    assert content["ids"].tolist() == ["0.png", "1.png"]
    capsys.readouterr()
    assert run("--checkpoint", "run", "--table", folder / "texts.jsonl") == 0
    code = "".join("1" if b > 0 else "0" for b in model.encode(texts=["first"])["fused"][0])
    assert capsys.readouterr().out == f"1\tfused\t{code}\n"
    (folder / "bad.csv").write_text("image,caption\n,x\n")
    (folder / "uneven.jsonl").write_text('{"caption": "a"}\n{"image": "0.png"}\n')
    (folder / "none.csv").write_text("picture,title\na,b\n")
    for name, message in (
        ("bad.csv", "row 1: column image"),
        ("uneven.jsonl", r"row 1.*no.*image.*other rows have"),
        ("none.csv", r"columns.*picture, title.*image, caption or both"),
        ("nowhere.csv", "no such file"),
    ):
        with pytest.raises(VhablError, match=message):
            run("--checkpoint", "run", "--table", folder / name)


def test_nothing_is_written_where_a_picture_is_damaged(model: encode.Model, folder: Path) -> None:
    (folder / "images" / "3.png").write_bytes(b"")
    before = sorted(Path().iterdir())
    with pytest.raises(VhablError, match=r"3\.png.*image.*cannot be read"):
        run("--checkpoint", "run", "--images", folder / "images", "--out", "c.npz")
    (folder / "empty").mkdir()
    for given, message in (
        (folder / "empty", r"empty.*no picture"),
        (folder / "nowhere", r"nowhere.*no such folder"),
    ):
        with pytest.raises(VhablError, match=message):
            run("--checkpoint", "run", "--images", given, "--out", "c.npz")
    with pytest.raises(VhablError, match=r"--out.*c\.txt.*\.npz"):
        run("--checkpoint", "run", "--text", "a", "--out", "c.txt")
    assert sorted(Path().iterdir()) == before


# -- oracle labels ---------------------------------------------------------------------------------


def test_what_is_made_with_oracle_labels_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder, records, code files, table; the audit fails, and nothing can be encoded with it."""
    config = pair_config(folder, "pghmh", "oracle_labels=true", "validation.fraction=0",
                         "codes=codes", "encoder.tune=all", "epochs=6")  # fmt: skip
    assert config.run_folder == Path("checkpoint/emoji/pghmh_oracle_labels/0")
    data = load_data(config.data, config.encoder)
    rows = train.train(config, data, progress_bar=False)
    assert all((row.oracle_labels and row.method == "PGHMH (oracle labels)") or
               row.method == "PGHMH (oracle labels) (real-valued)" for row in rows)  # fmt: skip
    assert {r.task for r in rows} == {"fused", "i2f", "t2f"}
    names = sorted(path.name for path in Path("codes").iterdir())
    assert names[0] == "PGHMH (oracle labels)_16-emoji_bits.mat" and len(names) == 4
    assert all(r.oracle_labels for r in run_folder.read_records(config.run_folder / "metrics.json"))
    assert audit.main(["--checkpoint", str(config.run_folder)]) == audit.LEAK
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "pghmh on emoji (oracle labels)" and said[-1] == "leak"
    with pytest.raises(
        VhablError, match=r"its codes are made from true labels. Give a run without"
    ):
        vhabl.load(config.run_folder)
    kept = run_folder.load(config.run_folder)
    with pytest.raises(VhablError, match=r"bits is 12.*a code length that"):
        list(run_folder.encoded([kept], [12], []))
    assert kept.method.oracle_labels
    ((_, _, found),) = run_folder.encoded([kept], [8], [])
    for written in list(Path("codes").iterdir()):  # the mark is in the file, whatever its name
        renamed = Path(shutil.copy(written, f"honest{written.suffix}"))
        assert all(r.oracle_labels for r in evaluation.evaluate_files([renamed], "headline"))
        audit.main(["--codes", str(renamed)])
        assert f"{renamed} (oracle labels) (fused, " in capsys.readouterr().out
    both = evaluation.compare(config.run_folder, config.run_folder, [8], [])
    assert f"A = {config.run_folder} (oracle labels), B = {config.run_folder} (oracle" in both
    stored = codes.load(Path("codes") / "PGHMH (oracle labels)_8-emoji_bits.mat")["fused"]
    assert np.array_equal(found[8]["fused"].database, stored.database)
    value = next(r.value for r in rows if (r.measure, r.ties, r.bits, r.task, r.database) ==
                 ("mAP@all", "expected", 8, "fused", "all"))  # fmt: skip
    assert evaluate(stored)[0].value == pytest.approx(value, abs=0.02)


def test_an_honest_pghmh_passes_the_audit(model: encode.Model) -> None:
    assert audit.main(["--checkpoint", "run"]) == 0


def test_only_a_method_that_has_an_oracle_takes_one(folder: Path) -> None:
    with pytest.raises(VhablError, match=r"oracle_labels.*True.*false.*cmcl has no such mode"):
        pair_config(folder, "cmcl", "oracle_labels=true")


def test_a_folder_gives_every_picture_and_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    names = ["a.jfif", "b.avif", "c", "d.JPG", "sub/a.png", "sub/deep/e.webp"]
    kinds = ["JPEG", "AVIF", "PNG", "JPEG", "PNG", "WEBP"]
    for name, kind in zip(names, kinds, strict=True):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, kind)
    for name in ("._d.JPG", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    (tmp_path / "other").symlink_to(tmp_path / "sub")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    found = encode.image_files(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in found] == names
    left_out = capsys.readouterr().err
    for part in ("2 files (hidden)", ".DS_Store", "1 file (no", "notes.txt", "2 files (a link"):
        assert part in left_out
