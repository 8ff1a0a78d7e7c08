"""Scans against a sort of all distances; the index on disk."""

from __future__ import annotations

import json
import shutil
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import COLOURS, pair_config, write_feature_file, write_pair_folder

from vhabl import encode, train
from vhabl.codes import pack
from vhabl.config import CONFIG_DIR, load
from vhabl.data import items as read_items
from vhabl.data import load as load_data
from vhabl.data.pairs import Pairs
from vhabl.metrics import integer_weights
from vhabl.nn import quantisation
from vhabl.search import Index, __main__, engine, faiss_index, milvus, scan, store, tuning
from vhabl.search.where import parse
from vhabl.system import errors
from vhabl.system.errors import VhablError
from vhabl.system.files import alone


def signs(count: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (count, bits))


def nearest(
    query: np.ndarray, database: np.ndarray, bits: int, top: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sort all distances; rows of equal distance in their order, -1 behind those allowed."""
    distance = (query[:, None, :bits] != database[None, :, :bits]).sum(axis=2)
    if allowed is not None:
        distance = np.where(allowed > 0, distance, 9999)
    rows = np.argsort(distance, axis=1, kind="stable")[:, :top]
    found = np.take_along_axis(distance, rows, axis=1)
    return np.where(found == 9999, -1, found), np.where(found == 9999, -1, rows)


@pytest.mark.parametrize("bits", [1, 7, 16, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("top", [1, 10, 500])
def test_the_exact_scan_equals_a_sort(bits: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, database = signs(9, bits, 1), signs(400, bits, 2)
    database[300:] = database[:100]  # ties
    allowed = (np.arange(400) % 3 > 0).astype(np.uint8)
    words = scan.to_words(pack(query)), scan.to_words(pack(database))
    for some in (None, allowed):
        found = scan.exact(*words, bits, top, some)
        for mine, theirs in zip(found, nearest(query, database, bits, top, some), strict=True):
            assert np.array_equal(mine, theirs)
    shorter = max(1, bits - 5)  # a prefix of the stored codes
    found = scan.exact(*words, shorter, top)
    for mine, theirs in zip(found, nearest(query, database, shorter, top), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("bits", [20, 64, 100])
def test_the_scan_by_weights_equals_a_sort(bits: int) -> None:
    query, database = signs(5, 128, 1), signs(300, 128, 2)
    weights = np.random.default_rng(0).integers(0, 100, bits)
    distance = ((query[:, None, :bits] != database[None, :, :bits]) * weights).sum(axis=2)
    words = scan.to_words(pack(query)), scan.to_words(pack(database))
    found = scan.exact(*words, bits, 30, weights=weights)
    rows = np.argsort(distance, axis=1, kind="stable")[:, :30]
    assert np.array_equal(found[1], rows)
    assert np.array_equal(found[0], np.take_along_axis(distance, rows, axis=1))


def test_queries_on_several_threads_are_answered_alike() -> None:
    query, database = pack(signs(7, 64, 1)), pack(signs(900, 64, 2))
    order, starts = scan.buckets(database)
    words = scan.to_words(query), scan.to_words(database[order])
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    centres = np.random.default_rng(1).normal(size=(2, 9, 5)).astype(np.float32)
    choices = np.random.default_rng(2).integers(0, 9, (7, 4, 2))
    sums = centres[0][choices[..., 0]] + centres[1][choices[..., 1]]
    alone = None
    for threads in (1, 3, 16):
        torch.set_num_threads(threads)
        found = (
            *scan.exact(*words, 64, 20),
            *scan.by_prefix(*words, starts, 64, 20, 100),
            scan.by_centres(features, centres, choices),
        )
        alone = alone or found
        for one, other in zip(alone, found, strict=True):
            assert one.shape == other.shape and np.array_equal(one, other)
    assert np.allclose(found[-1], np.einsum("qd,qrd->qr", features, sums), atol=1e-5)


def test_a_scan_of_many_chunks() -> None:
    query, database = signs(3, 64, 1), signs(40_000, 64, 2)
    found = scan.exact(scan.to_words(pack(query)), scan.to_words(pack(database)), 64, 50)
    for mine, theirs in zip(found, nearest(query, database, 64, 50), strict=True):
        assert np.array_equal(mine, theirs)
    assert scan.exact(scan.to_words(pack(query)), np.zeros((0, 1), np.uint64), 64, 5)[0].size == 0


@pytest.mark.parametrize("bits", [16, 40, 128])
def test_a_scan_by_prefix_without_a_limit_is_exact(bits: int) -> None:
    query, database = signs(9, 128, 1), signs(3000, 128, 2)
    database[1000:] = np.where(np.random.default_rng(3).random((2000, 128)) < 0.1, -1, 1)
    order, starts = scan.buckets(pack(database))
    database = database[order]
    allowed = (np.arange(3000) % 3 > 0).astype(np.uint8)
    packed = pack(query)
    words = scan.to_words(packed), scan.to_words(pack(database))
    for some in (None, allowed):
        expected = nearest(query, database, bits, 50, some)
        found = scan.by_prefix(words[0], words[1], starts, bits, 50, 3000, some)
        assert np.array_equal(found[0], expected[0])
        distance = (query[:, None, :bits] != database[None, :, :bits]).sum(axis=2)
        assert np.array_equal(np.take_along_axis(distance, found[1], axis=1), found[0])
        assert all(len(set(rows)) == 50 for rows in found[1].tolist())


def test_a_scan_by_prefix_goes_on_while_an_item_may_be_nearer() -> None:
    """Hundreds of items differ in 5 bits behind the prefix; one in 4 bits of the prefix itself."""
    query = np.ones((1, 32), np.int8)
    database = np.ones((400, 32), np.int8)
    database[:, 20:25] = -1
    database[123] = 1
    database[123, 3:7] = -1
    order, starts = scan.buckets(pack(database))
    words = scan.to_words(pack(query)), scan.to_words(pack(database[order]))
    found = scan.by_prefix(words[0], words[1], starts, 32, 1, 400)
    assert found[0].tolist() == [[4]] and order[found[1][0, 0]] == 123


def test_a_scan_by_prefix_stops_at_its_budget() -> None:
    """It has met all of the nearest buckets, and no more of them than needed."""
    query, database = signs(4, 64, 1), signs(5000, 64, 2)
    order, starts = scan.buckets(pack(database))
    database = database[order]
    packed = pack(query)
    words = scan.to_words(packed), scan.to_words(pack(database))
    found = scan.by_prefix(words[0], words[1], starts, 64, 5, 300)
    ahead = (query[:, None, :16] != database[None, :, :16]).sum(axis=2)
    for q in range(4):
        met = np.sort(ahead[q])[299]
        possible = ahead[q] < met  # surely met
        whole = (query[q] != database).sum(axis=1)
        assert found[0][q, 0] <= whole[possible].min()
        assert (ahead[q][found[1][q]] <= met + 1).all()
    few = scan.by_prefix(words[0], words[1], starts, 64, 40, 1)
    assert (few[1] >= 0).all()  # as many as asked for, whatever the budget


# -- filters ---------------------------------------------------------------------------------------

NAMES = ["cat", "dog", "owl's", 'a "b"', "Food & Drink", "or", "x6", "x7", "x8", "x9"]
LABELS = np.random.default_rng(0).random((50, 10)) < 0.4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label = 'cat'", LABELS[:, 0]),
        ("label='x9'", LABELS[:, 9]),
        ("label != 'Food & Drink'", ~LABELS[:, 4]),
        ("label = 'owl''s'", LABELS[:, 2]),
        ('label = "a ""b"""', LABELS[:, 3]),
        ("LABEL IN ('cat', 'dog' , 'x8')", LABELS[:, 0] | LABELS[:, 1] | LABELS[:, 8]),
        ("label='cat' or label='dog' and label='or'", LABELS[:, 0] | LABELS[:, 1] & LABELS[:, 5]),
        ("(label='cat' or label='dog') and not label='or'",
         (LABELS[:, 0] | LABELS[:, 1]) & ~LABELS[:, 5]),
        ("not not label='cat'", LABELS[:, 0]),
        ("not (label='cat' and label='dog')", ~(LABELS[:, 0] & LABELS[:, 1])),
    ],
)  # fmt: skip
def test_a_filter_chooses_items(text: str, expected: np.ndarray) -> None:
    packed = np.packbits(LABELS, axis=1, bitorder="little")
    found = parse(text, NAMES).mask(packed)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label = 'cow'", "no label 'cow'. Did you mean owl's"),
        ("label = cat", "read at cat. Write label = 'NAME'"),
        ("label = 'cat", "read at 'cat. Write|read at '. Write"),
        ("label = 'cat' label = 'dog'", "read at label. Write"),
        ("caption = 'cat'", "read at caption. Write"),
        ("label = 'cat' and", "read at its end. Write"),
        ("(label = 'cat'", "read at its end. Write"),
        ("label in ()", r"read at \). Write"),
        ("", "read at its end. Write"),
        ("label > 'cat'", "read at >. Write"),
    ],
)
def test_a_filter_that_is_none(text: str, message: str) -> None:
    with pytest.raises(VhablError, match=message):
        parse(text, NAMES)


def test_tables_are_read_with_the_columns_of_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["image,text,tags"] + [
        f"{n}.png,{('red', 'blue')[n % 2]} one,{('red', 'blue')[n % 2]}" for n in range(20)
    ]
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    table = ["data=table", f"data.path={folder / 't.csv'}", "data.caption_column=text",
             "data.label_column=tags", "data.query=0", "data.train=0"]  # fmt: skip
    config = load(
        CONFIG_DIR / "nested_mlp.yaml",
        [*table, "data.min_count=1", "validation.fraction=0", "epochs=1", "bits=16", "out=own",
         "codes=none", "device=cpu", "data.workers=0", "model.modality_dropout=0.2"],
    )  # fmt: skip
    train.train(config, load_data(config.data, config.encoder), progress_bar=False)
    built = Index.build("own index", "own")
    more = folder / "more.csv"
    more.write_text("image,text,tags\n21.png,a red one,red\n")
    assert __main__.main(["add", "own index", "--table", str(more)]) == 0
    hit = Index.open("own index").engine.item("21.png")[0]
    assert hit.labels == ("red",) and hit.caption == "a red one" and len(built.engine) == 20
    capsys.readouterr()
    assert encode.main(["--checkpoint", "own", "--table", str(more), "--quiet"]) == 0
    picture = folder / "images" / "21.png"
    expected = built.model.encode([picture], ["a red one"])["fused"][0]
    text = "".join("1" if bit > 0 else "0" for bit in expected)
    assert capsys.readouterr().out == f"21.png\tfused\t{text}\n"
    more.write_text("image,text,tags\n21.png,rot,red\n22.png,,red\n23.png,grün,red\n")
    assert encode.main(["--checkpoint", "own", "--table", str(more), "--quiet"]) == 0
    assert "2 texts without a word that the model knows, such as 'rot'" in capsys.readouterr().err


def test_words_that_a_model_does_not_know_are_said(
    index: Index, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["query", "index", "--text", "a red zyzzyva"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 10 and "note: the model does not know zyzzyva\n" in err
    assert __main__.main(["query", "index", "--text", "a red picture"]) == 0
    assert "does not know" not in capsys.readouterr().err
    for text in ("qwertz asdf", "狗", "..."):
        with pytest.raises(VhablError, match="text: the model knows no word of "):
            index.search(text=text)
        with pytest.raises(VhablError, match="text: the model knows no word of "):
            encode.main(["--checkpoint", index.engine.meta["run"], "--text", text])


def test_a_filter_on_an_index_without_labels_says_so() -> None:
    with pytest.raises(VhablError, match=r"filter.*index has no labels"):
        parse("label = 'cat'", [])


def test_a_caption_takes_one_line_of_a_terminal() -> None:
    assert __main__.one_line("two\n lines\t of  \x1b[31mred") == r"two lines of \x1b[31mred"
    long = __main__.one_line("狗" * 500)
    assert len(long) == 200 and long == "狗" * 197 + "..."
    family = "👨‍👩‍👧 नमस्ते"  # joiners and marks are no control characters
    assert __main__.one_line(family) == family


def test_rows_that_are_added_keep_their_labels_and_may_share_a_picture(
    index: Index, folder: Path
) -> None:
    name = index.engine.class_names[0]
    rows = ["image,caption,labels", f"0.png,new one,{name}", "0.png,new two,", f"1.png,new,{name}"]
    (folder / "more.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert __main__.main(["add", "index", "--table", str(folder / "more.csv")]) == 0
    made = Index.open("index")
    found = [made.engine.item(identity)[0].labels for identity in ("0.png", "0.png#2", "1.png")]
    assert [list(labels) for labels in found] == [[name], [], [name]]
    (folder / "more.csv").write_text("image,caption,labels\n0.png,a,no such\n", encoding="utf-8")
    with pytest.raises(VhablError, match="'no such' is no class"):
        __main__.main(["add", "index", "--table", str(folder / "more.csv")])


# -- codes on disk ---------------------------------------------------------------------------------

ABOUT = {
    "method": "own", "task": "cross", "any_length": True, "data": "own", "run": "run", "digest": "",
    "views": ["image", "text"], "bits": 24, "importance": None, "class_names": ["a", "b", "c"],
}  # fmt: skip


def items(count: int, begin: int = 0) -> engine.Items:
    numbers = range(begin, begin + count)
    labels = np.array([[n % 2 == 0, n % 3 == 0, n % 5 == 0] for n in numbers], np.uint8)
    captions = [f"caption {n}" * (n % 4) for n in numbers]
    ids, images = [f"id {n} \u00e9" for n in numbers], [f"{n}.png" for n in numbers]
    return engine.Items(ids, captions, images, labels)


def two_views(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"image": signs(count, 24, seed), "text": signs(count, 24, seed + 100)}


def packed(codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {view: pack(rows) for view, rows in codes.items()}


@pytest.fixture
def small(tmp_path: Path) -> store.Store:
    return store.create(
        tmp_path / "index", ABOUT, packed(two_views(60, 1)), items(60), lambda _: {}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_items_are_found_with_what_belongs_to_them(small: store.Store) -> None:
    """By id and by scan, in each view, after items were added and deleted."""
    codes, other = two_views(60, 1), two_views(40, 7)
    small = small.add(packed(other), items(40, 60))
    assert len(small) == 100 and small.locate("id 7") is None
    dead = [3, 17, 71, 99]
    small = small.delete([f"id {n} \u00e9" for n in dead[:1]])
    small = small.delete([f"id {n} \u00e9" for n in dead[1:]])
    assert len(small) == 96 and len(store.Store(small.folder)) == 96
    everything = items(100)
    query = signs(5, 24, 50)
    for view in ("image", "text"):
        whole = np.concatenate([codes[view], other[view]])
        distance = (query[:, None] != whole[None]).sum(axis=2)
        distance[:, dead] = 999
        for mode in (("exact", 1.0), ("prefix", 0.9999)):
            found = small.scan(view, pack(query), 24, 120, *mode)
            assert np.array_equal(found[0][:, :96], np.sort(distance, axis=1)[:, :96])
            assert (found[2][:, 96:] == -1).all()
            for q in range(5):
                seen = set()
                for d, s, i in zip(*(part[q, :96] for part in found), strict=True):
                    texts = small.texts(s, i)
                    n = everything.ids.index(texts["ids"])
                    assert distance[q, n] == d and small.locate(texts["ids"]) == (s, i)
                    assert texts["captions"] == everything.captions[n]
                    assert texts["images"] == f"{n}.png"
                    own = [c for c, has in zip("abc", everything.labels[n], strict=True) if has]
                    assert small.labels(s, i) == own
                    seen.add(n)
                assert len(seen) == 96
    found = small.scan("text", pack(query), 24, 120, chosen=[
        parse("label = 'b'", "abc").mask(segment.labels) for segment in small.segments
    ])  # fmt: skip
    assert (found[2] >= 0).sum(axis=1).tolist() == [sum(n % 3 == 0 for n in range(100)) - 2] * 5
    names = [p.name for p in small.folder.rglob("alive*")]
    assert len(names) == 2  # one a segment, none that nothing names


def test_what_cannot_be_changed_is_left_as_it_was(small: store.Store, tmp_path: Path) -> None:
    before = content(small.folder)
    for change, message in (
        (lambda: small.add(packed(two_views(2, 3)), items(2, 59)), "id 59 \u00e9: an item"),
        (lambda: small.delete(["id 5 \u00e9", "id 60 \u00e9"]), "id 60 \u00e9: no item"),
        (lambda: small.add(packed(two_views(0, 3)), items(0)), "items: none is given"),
        (lambda: small.add(packed(two_views(2, 3)), engine.Items(["x"] * 2, [""] * 2, [""] * 2,
                                                               np.zeros((2, 3), np.uint8))),
         "id x: it comes twice"),
        (lambda: store.create(small.folder, ABOUT, packed(two_views(9, 3)), items(9), lambda _: {}),
         "index: it exists already"),
    ):  # fmt: skip
        with pytest.raises(VhablError, match=message):
            change()
        assert content(small.folder) == before
    with pytest.raises(RuntimeError):
        store.create(tmp_path / "new", ABOUT, packed(two_views(9, 3)), items(9), fails)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index"]
    (small.folder / "segment-0001").mkdir()  # of a process that was killed
    (small.folder / "segment-0001" / "ids.bin").touch()
    assert len(small.add(packed(two_views(2, 3)), items(2, 60))) == 62


def test_an_id_is_free_again_when_its_item_is_deleted(small: store.Store) -> None:
    small = small.delete(["id 7 \u00e9"])
    assert small.locate("id 7 \u00e9") is None
    with pytest.raises(VhablError, match="id 7 \u00e9: no item"):
        small.delete(["id 7 \u00e9"])
    small = small.add(packed(two_views(1, 3)), items(1, 7))
    assert small.locate("id 7 \u00e9") == (1, 0) and len(small) == 60


def test_what_two_processes_add_is_kept(small: store.Store) -> None:
    """Each opened the index before the other changed it."""
    other = store.Store(small.folder)
    small.add(packed(two_views(5, 3)), items(5, 60))
    other = other.delete(["id 7 \u00e9"]).add(packed(two_views(5, 4)), items(5, 70))
    assert len(other) == 69 and other.locate("id 61 \u00e9") and other.locate("id 71 \u00e9")
    with pytest.raises(VhablError, match="id 62 \u00e9: an item"):
        small.add(packed(two_views(1, 3)), items(1, 62))
    for change in (
        lambda: small.add(packed(two_views(1, 3)), items(1, 99)),
        lambda: small.delete(["id 8 \u00e9"]),
    ):
        with alone(small.folder), pytest.raises(VhablError, match="another process writes to it"):
            change()


def fails(_: store.Store) -> dict[str, object]:
    raise RuntimeError


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("segment-0000/codes_image.npy", lambda b: b[:-1], "codes_image.npy: 307 bytes"),
        ("segment-0000/codes_text.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
        ("segment-0000/starts_text.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
        ("segment-0000/rows_text.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
        ("segment-0000/ids.bin", None, r"ids\.bin: no such file\. index\.json says 4\d\d bytes"),
        ("index.json", None, r"index: no index\.json"),
        ("index.json", lambda b: b[:40], "description is damaged"),
        ("index.json", lambda b: b"[]", "description is damaged"),
        (
            "index.json",
            lambda b: b.replace(b'"format": 2', b'"format": 1'),
            "format 1 in place of 2",
        ),
        ("index.json", lambda b: b.replace(b'"alive"', b'"dead"'), "a segment without"),
    ],
)
def test_a_damaged_index(small: store.Store, file: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = small.folder / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(VhablError, match=message):
        store.Store(small.folder)


def test_all_of_an_index_can_be_verified(small: store.Store) -> None:
    small.verify()
    path = small.folder / "segment-0000" / "captions.bin"
    path.write_bytes(b"C" + path.read_bytes()[1:])
    with pytest.raises(VhablError, match=r"captions\.bin: its checksum is not that of"):
        store.Store(small.folder).verify()


# -- with a model ----------------------------------------------------------------------------------


def trained(folder: Path, method: str, *overrides: str) -> None:
    config = pair_config(folder, method, "encoder.name=features", "data.min_count=1",
                         "validation.fraction=0", "epochs=40", *overrides)  # fmt: skip
    train.train(config, load_data(config.data, config.encoder), progress_bar=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pair_folder(tmp_path / "pairs")


@pytest.fixture
def index(folder: Path) -> Index:
    trained(folder, "nested_mlp", "model.modality_dropout=0.2", "out=run")
    return Index.build("index", "run")


def read_pairs_of(index: Index) -> Pairs:
    return read_items(index.model.run.config.data)


def brute(index: Index, codes: np.ndarray, bits: int, view: str = "fused") -> list[int]:
    """Sorted distances to all pairs of the folder, encoded again."""
    pairs = read_pairs_of(index)
    own = index.model.encode(images=pairs.files, texts=pairs.captions)[view]
    return sorted((own[:, :bits] != codes[:bits]).sum(axis=1).tolist())


def test_a_fused_index_is_asked_with_a_text_an_image_or_both(index: Index, folder: Path) -> None:
    index = Index.open("index")
    picture = folder / "images" / "4.png"
    for given in ({"text": "a red picture"}, {"image": picture}, {"text": "", "image": picture}):
        code = index.model.encode(
            images=[given["image"]] if "image" in given else None,
            texts=[given["text"]] if "text" in given else None,
        )["fused"][0]  # fmt: skip
        for bits in (None, 8, 5):
            hits = index.search(**given, top=60, bits=bits)
            assert [hit.distance for hit in hits] == brute(index, code, bits or 16)
    first = index.search(text="a red picture", top=3)
    assert all(hit.caption.startswith(f"a {hit.labels[0]}") or not hit.caption for hit in first)
    assert first == index.search(text="a red picture", top=3, mode="prefix")
    only = index.search(text="a red picture", top=60, where="label != 'red'")
    assert {hit.labels for hit in only} == {(name,) for name in COLOURS if name != "red"}
    assert Path(first[0].image).is_file() and json.dumps(first[0].as_dict())


def test_items_come_and_go(index: Index, folder: Path) -> None:
    picture = folder / "images" / "4.png"
    index.add(images=[picture], texts=["the only one"], ids=["mine"], labels=[["blue"]])
    (hit, *_) = Index.open("index").search(text="the only one", image=picture, top=1)
    assert hit.distance == 0 and len(index.engine) == 61
    found = {h.id: h for h in index.search(text="the only one", image=picture, top=61)}
    assert found["mine"].labels == ("blue",) and found["mine"].image == str(picture)
    index.delete(["mine"])
    assert "mine" not in {h.id for h in index.search(text="a picture", top=61)}
    for given, message in (
        ({"texts": ["a"], "ids": ["a", "b"]}, "ids: 2 for 1 items"),
        ({"texts": ["a"], "ids": ["n"], "labels": [["pink"]]}, "labels of n: 'pink' is no class"),
        ({"texts": ["a"], "ids": ["n"], "labels": []}, "labels: 0 lists for 1 item"),
        ({"texts": ["a"], "ids": ["n"], "labels": ["red"]}, "labels of n: the text 'red'"),
        ({"texts": ["a"], "ids": [1]}, "ids: a list, or numbers in it"),
        ({"texts": ["a", "b"], "ids": "no"}, "ids: a str"),
    ):
        with pytest.raises(VhablError, match=message):
            index.add(**given)
    index.add(texts=["a", "b"], ids=["1", "2"])
    with pytest.raises(VhablError, match="ids: a str"):
        index.delete("12")
    assert len(Index.open("index").engine) == 62
    index.delete(["1", "2"])
    assert len(Index.open("index").engine) == 60
    codes = index.model.encode(texts=["red", "blue"])["fused"]
    assert index.search_codes(codes, "fused", np.int64(3), bits=np.int64(8))
    for wrong, view, message in (
        (codes * np.nan, "fused", "codes: values other than"),
        (codes > 0, "fused", "codes: values other than"),
        (codes, "image", "against is 'image', but must be fused"),
    ):
        with pytest.raises(VhablError, match=message):
            index.search_codes(wrong, view)


def test_a_cross_modal_index_answers_in_the_other_modality(folder: Path) -> None:
    trained(folder, "hq", "out=run")
    index = Index.build("index", "run", bits=8)
    assert index.engine.views == ["image", "text"]
    code = index.model.encode(texts=["a red picture"], bits=8)["text"]
    hits = index.search(text="a red picture", top=60)
    own = {view: index.search_codes(code, view, 60)[0] for view in ("image", "text")}
    assert hits == own["image"] == index.search(text="a red picture", top=60, against="image")
    assert own["text"] == index.search(text="a red picture", top=60, against="text") != hits
    picture = folder / "images" / "4.png"
    found = index.search(image=picture, top=60)
    assert found == index.search_codes(index.model.encode(images=[picture], bits=8)["image"],
                                       "text", 60)[0]  # fmt: skip
    for given, message in (
        ({"text": "a", "bits": 4}, "bits is 4, but must be 8, the only length"),
        ({"text": "a", "image": picture}, "a text and an image. Give one of them"),
        ({"text": "a", "against": "fused"}, "against is 'fused', but must be image or text"),
        (
            {"text": "a", "mode": "magic"},
            "mode is 'magic', but must be exact or prefix or two-stage, as",
        ),
        (
            {"text": "a", "mode": "weighted"},
            "is 'weighted', but must be exact or prefix or two-stage, as the index of HQ has",
        ),
        ({"text": "a", "top": 0}, "top is 0"),
        ({}, "query: neither a text nor an image"),
    ):
        with pytest.raises(VhablError, match=message):
            index.search(**given)
    with pytest.raises(VhablError, match=r"items: no image is given. Give image and text of each"):
        index.add(texts=["a"], ids=["x"])
    with pytest.raises(VhablError, match=r"codes: shape \(1, 9\)\. The index needs \[N, 8\]"):
        index.search_codes(np.ones((1, 9), np.int8), "image")


def test_a_scan_by_prefix_compares_as_much_as_it_must(folder: Path) -> None:
    """The smallest share of the items that finds 99 of 100 on a sample, and no smaller one."""
    rng = np.random.default_rng(0)
    centres = signs(40, 64, 1)
    codes = centres[rng.integers(40, size=4000)] * np.where(rng.random((4000, 64)) < 0.05, -1, 1)
    about = {"views": ["fused"], "bits": 64, "class_names": []}
    every = engine.Items([str(n) for n in range(4000)], [""] * 4000, [""] * 4000,
                        np.zeros((4000, 0), np.uint8))  # fmt: skip
    made = store.create(folder / "i", about, {"fused": pack(codes)}, every, tuning.measure)
    chosen = made.meta["recall"]["fused"]["prefix"]
    assert chosen["setting"] < 0.5 and chosen["recall"] >= 0.99
    smaller = tuning.SHARES[tuning.SHARES.index(chosen["setting"]) - 1]
    sample = pack(codes[rng.choice(4000, 300, False)])
    exact = made.scan("fused", sample, 64, 100)[0][:, -1:]
    reached = [(made.scan("fused", sample, 64, 100, "prefix", share)[0] <= exact).mean()
               for share in (smaller, chosen["setting"])]  # fmt: skip
    assert reached[0] < 0.99 and reached[1] > 0.985


def test_a_model_that_is_another_is_refused(index: Index, folder: Path) -> None:
    shutil.rmtree("run")
    trained(folder, "nested_mlp", "model.modality_dropout=0.2", "out=run", "seed=5")
    with pytest.raises(VhablError, match="run: its weights are not those of the index"):
        Index.open("index").search(text="a")
    shutil.rmtree("run")
    with pytest.raises(VhablError, match="run: no such folder"):
        Index.open("index").search(text="a")


def test_the_commands(index: Index, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> str:
        assert __main__.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    said = run("build", "--checkpoint", "run", "--out", "other", "--bits", 8, "--quiet")
    assert said.splitlines()[0] == "other: 60 items of emoji, 1 segment"
    assert "fused, 1 to 8 bits" in said and "mode prefix on fused: compares" in said
    picture = folder / "images" / "4.png"
    lines = run("query", "other", "--text", "a green picture, number 4", "--image", picture,
                "--top", 60).splitlines()  # fmt: skip
    (own,) = [line for line in lines if line.endswith(str(picture))]
    assert len(lines) == 60 and "0  a green picture, number 4  [green]  " in own
    rows = [json.loads(line) for line in run(
        "query", "index", "--image", folder / "images" / "3.png", "--json", "--bits", 8,
        "--where", "label = 'blue'", "--mode", "prefix").splitlines()]  # fmt: skip
    assert len(rows) == 10 and all(row["labels"] == ["blue"] for row in rows)
    (folder / "more.csv").write_text("image,caption\n1.png,new one\n", encoding="utf-8")
    assert "61 items of emoji, 2 segments" in run("add", "index", "--table", folder / "more.csv")
    assert "60 items" in run("delete", "index", "--id", "1.png") and "60 items" in run(
        "info", "index"
    )
    assert run("query", "index", "--text", "a", "--where", "label='red' and label='blue'") == ""


def test_an_index_of_a_table_without_labels(index: Index, folder: Path) -> None:
    (folder / "own.csv").write_text("image,caption\n1.png,one\n2.png,two\n", encoding="utf-8")
    recipe = folder / "own.yaml"
    recipe.write_text(f"name: own\nkind: table\npath: {folder}/own.csv\n", encoding="utf-8")
    mine = Index.build("mine", "run", recipe)
    assert [hit.labels for hit in mine.search(text="a picture")] == [(), ()]
    assert mine.engine.class_names == []


def test_an_index_of_feature_files(tmp_path: Path) -> None:
    from helpers import small_config

    file = write_feature_file(tmp_path / "f.mat")
    config = small_config(file, "vh_abl", "out=run", "epochs=1")
    data = load_data(config.data)
    train.train(config, data, progress_bar=False)
    index = Index.build("index", "run")
    codes = index.model.encode(images=data.query.image, texts=data.query.text)["fused"]
    found = index.search_codes(codes, "fused", 3)
    weights = index.engine.meta["importance"]
    importance = index.model.method.bit_importance()
    assert importance is not None and weights == integer_weights(importance.numpy())[0].tolist()
    everything = index.model.encode(images=data.database.image, texts=data.database.text)["fused"]
    weighted = index.search_codes(codes[:1], "fused", 60, bits=8, mode="weighted")[0]
    expected = ((everything[:, :8] != codes[0, :8]) * np.array(weights[:8])).sum(axis=1)
    assert [hit.distance for hit in weighted] == sorted(expected.tolist())
    index.add(images=data.query.image[:1], texts=data.query.text[:1], ids=["new"])
    (added,) = [h for h in index.search_codes(codes[:1], "fused", 61)[0] if h.id == "new"]
    assert (added.distance, added.caption, added.image) == (0, "", "")
    assert len(found) == 20 and found[0][0].id.startswith("item ")
    assert found[0][0].labels[0].startswith("class ")
    with pytest.raises(VhablError, match=r"texts: .* give finite ones"):
        index.search(text="a red picture")


def test_errors_are_one_message(index: Index, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    for arguments, message in (
        (
            ["build", "--checkpoint", "run", "--out", "index"],
            "error: index: it exists already",
        ),
        (
            ["build", "--checkpoint", "run", "--out", "n", "--bits", "99"],
            "error: bits is 99",
        ),
        (["query", "nowhere", "--text", "a"], "error: nowhere: no index.json"),
        (["query", "index", "--image", "nowhere.png"], "error: nowhere.png: no such file"),
        (["query", "index", "--text", "a", "--bits", "17"], "error: bits is 17"),
    ):
        monkeypatch.setattr("sys.argv", ["x", *arguments])
        with pytest.raises(SystemExit) as left:
            errors.run(__main__.main)
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(message)
        assert not Path("n").exists()


# -- approximate modes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """Codes of 64 bits [4000, 64] about 40 centres."""
    rng = np.random.default_rng(0)
    codes: np.ndarray = signs(40, 64, 1)[rng.integers(40, size=4000)]
    return codes * np.where(rng.random((4000, 64)) < 0.05, -1, 1).astype(np.int8)


def numbered(count: int, begin: int = 0) -> engine.Items:
    names, blank = [str(n) for n in range(begin, begin + count)], [""] * count
    labels = (np.arange(begin, begin + count)[:, None] % 50 == 0).astype(np.uint8)
    return engine.Items(names, blank, blank, labels)


@pytest.mark.parametrize("mode", ["ivf", "hnsw"])
def test_a_graph_finds_nearly_all(clusters: np.ndarray, tmp_path: Path, mode: engine.Mode) -> None:
    about = {"views": ["fused"], "bits": 64, "class_names": ["rare"]}
    whole = {"fused": pack(clusters)}
    made = store.create(
        tmp_path / "i", about, whole, numbered(4000), tuning.measure, [mode]
    )  # fmt: skip
    assert made.modes == ("exact", "prefix", mode)
    said = made.meta["recall"]["fused"][mode]
    assert said["recall"] >= 0.99 and said["at"] == 100 and said["queries"] == 200
    query = clusters[:5] * np.where(np.arange(64) < 3, -1, 1).astype(np.int8)

    def found(opened: store.Store, top: int, wanted: str = "") -> list[list[int]]:
        asked = parse(wanted, ["rare"]) if wanted else None
        both = [
            opened.find(engine.Query("fused", pack(query), 64, top, kind, asked))
            for kind in (mode, "exact")
        ]
        for side in both:
            for q, hits in enumerate(side):
                for hit in hits:
                    assert hit.distance == (clusters[int(hit.id) % 4000] != query[q]).sum()
        near, exact = ([[h.distance for h in rows] for rows in side] for side in both)
        assert all(len(a) == len(b) for a, b in zip(near, exact, strict=True))
        share = [np.mean(np.array(a) <= b[-1]) for a, b in zip(near, exact, strict=True)]
        assert np.mean(share) >= 0.95
        return near

    found(made, 20)
    whole_setting = 1.0 if mode == "ivf" else 4000.0
    graph = made.segments[0].graph("fused", mode)
    exact = made.scan("fused", pack(query), 64, 50)[0]
    assert np.array_equal(
        faiss_index.nearest(graph, pack(query), 50, whole_setting, None)[0], exact
    )
    few = faiss_index.nearest(graph, pack(signs(200, 64, 3)), 50, 0.0, None)[0]
    assert not np.array_equal(few, made.scan("fused", pack(signs(200, 64, 3)), 64, 50)[0])
    # a rare label: what the graph met lacks most of it, and the exact scan answers
    assert len(found(made, 60, "label = 'rare'")[0]) == 60
    some = faiss_index.nearest(graph, pack(query), 9, whole_setting, np.arange(4000) % 50 == 0)[1]
    assert (some[some >= 0] % 50 == 0).all() and (some >= 0).any() and some.shape == (5, 9)
    changed = made.add({"fused": pack(clusters[:300])}, numbered(300, 4000))
    changed = changed.delete([str(n) for n in range(0, 4000, 2)])
    rows = found(store.Store(changed.folder), 30)
    assert len(rows[0]) == 30
    few = store.create(
        tmp_path / "few", about, {"fused": pack(clusters[:3])}, numbered(3), tuning.measure,
        [mode],
    )  # fmt: skip
    assert len(few.find(engine.Query("fused", pack(query), 64, 9, mode))[0]) == 3


def test_modes_are_measured_by_the_queries_that_come(clusters: np.ndarray, tmp_path: Path) -> None:
    """A view is asked with codes of the other one, which may lie elsewhere."""
    about = {"views": ["image", "text"], "bits": 64, "class_names": []}
    other = {"image": pack(clusters), "text": pack(signs(4000, 64, 9))}
    bare = numbered(4000)
    bare = engine.Items(bare.ids, bare.captions, bare.images, bare.labels[:, :0])
    made = store.create(tmp_path / "i", about, other, bare, tuning.measure)
    alone = store.create(tmp_path / "j", about | {"views": ["image"]}, {"image": other["image"]},
                         bare, tuning.measure)  # fmt: skip
    shares = [m.meta["recall"]["image"]["prefix"]["setting"] for m in (made, alone)]
    assert shares[0] > 4 * shares[1]


def test_a_description_without_a_mode_offers_none(clusters: np.ndarray, tmp_path: Path) -> None:
    about = {"views": ["fused"], "bits": 64, "class_names": ["rare"]}
    made = store.create(tmp_path / "i", about, {"fused": pack(clusters)}, numbered(4000),
                        tuning.measure, ["ivf"])  # fmt: skip
    assert made.modes == ("exact", "prefix", "ivf")
    file = tmp_path / "i" / "index.json"
    whole = json.loads(file.read_text())
    measured = whole["recall"]["fused"]
    for recall, modes in (
        ({}, ("exact",)),
        ({"fused": {"ivf": measured["ivf"]}}, ("exact", "ivf")),
    ):
        file.write_text(json.dumps(whole | {"recall": recall}))
        assert store.Store(tmp_path / "i").modes == modes
    for recall in (
        {"fused": {"ivf": {"setting": "all"}}},
        {"fused": {"ivf": {}}},
        [],
        {"fused": 3},
    ):
        file.write_text(json.dumps(whole | {"recall": recall}))
        with pytest.raises(VhablError, match=r"index\.json: the description is damaged"):
            store.Store(tmp_path / "i")


def test_the_centres_of_an_index_are_verified(folder: Path) -> None:
    trained(folder, "hq", "out=run", "model.centres=16")
    Index.build("index", "run", bits=8)
    path = Path("index") / "centres.npy"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "centres.npy: its checksum is not"),
        (whole[:-1], "centres.npy: .* bytes. index.json says"),
        (None, "centres.npy: no such file"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(VhablError, match=message):
            Index.open("index")
        path.touch()


def test_a_changed_graph_is_found_out(clusters: np.ndarray, tmp_path: Path) -> None:
    about = {"views": ["fused"], "bits": 64, "class_names": ["rare"]}
    store.create(tmp_path / "i", about, {"fused": pack(clusters)}, numbered(4000),
                 tuning.measure, ["ivf"])  # fmt: skip
    path = tmp_path / "i" / "segment-0000" / "ivf_fused.faiss"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    opened = store.Store(tmp_path / "i")
    with pytest.raises(VhablError, match=r"ivf_fused\.faiss: its checksum is not"):
        opened.find(engine.Query("fused", pack(clusters[:1]), 64, 9, "ivf"))


def test_the_second_stage_ranks_by_the_centres(folder: Path) -> None:
    """The nearest by distance, in the order of inner products that are worked out one by one."""
    trained(folder, "hq", "out=run", "model.dictionaries=2", "model.centres=16")
    Index.build("index", "run", bits=16)
    index = Index.open("index")
    assert index.engine.modes == ("exact", "prefix", "two-stage")
    assert index.engine.meta["recall"]["image"]["two-stage"]["recall"] > 0.5
    pairs = read_pairs_of(index)
    features = index.model.features(images=pairs.files, bits=16)["image"]
    codes = np.where(features >= 0, 1, -1)
    asked = index.model.features(texts=["a red picture"], bits=16)["text"]
    centres = index.model.method.codebook(16)
    assert centres is not None
    choices = quantisation.assign(torch.from_numpy(features), centres)
    scores = (quantisation.rebuild(choices, centres).numpy() @ asked[0]).tolist()
    distance = (codes != np.where(asked >= 0, 1, -1)).sum(axis=1).tolist()
    hits = index.search(text="a red picture", top=60, mode="two-stage")
    place = {identity: n for n, identity in enumerate(pairs.ids)}
    assert [h.score for h in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    for hit in hits:
        assert hit.score == pytest.approx(scores[place[hit.id]], abs=1e-5)
        assert hit.distance == distance[place[hit.id]]
    assert [h.distance for h in hits] != sorted(h.distance for h in hits)
    some = index.search(text="a red picture", mode="two-stage", where="label = 'red'")
    assert {h.labels for h in some} == {("red",)} and len(some) == 10
    index.add(images=[pairs.files[4]], texts=["new"], ids=["new"])
    more = index.search(text="a red picture", top=61, mode="two-stage")
    scored = {h.id: h.score for h in more}
    assert scored["new"] == pytest.approx(scored[pairs.ids[4]], abs=1e-5)
    with pytest.raises(VhablError, match="mode two-stage: a code has no features"):
        index.search(like=pairs.ids[4], mode="two-stage")


def test_a_second_stage_ranks_a_shortlist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(folder, "hq", "out=run", "model.centres=16")
    index = Index.build("index", "run")
    monkeypatch.setattr("vhabl.search.store.SHORTLIST", 20)
    for colour in COLOURS:
        text = f"a {colour} picture"
        exact = index.search(text=text, top=20)
        hits = index.search(text=text, top=3, mode="two-stage")
        assert {h.id for h in hits} <= {h.id for h in exact} and len(hits) == 3
        scores = [h.score for h in index.search(text=text, top=20, mode="two-stage")]
        assert [h.score for h in hits] == scores[:3] == sorted(scores, reverse=True)[:3]


def staged(folder: Path, codes: np.ndarray) -> tuple[store.Store, np.ndarray]:
    """An index with centres, and its items' features in its own order: each item chooses the
    centre of its cluster, and the centre 0 that none chooses is far out.
    """
    rng = np.random.default_rng(1)
    features = codes * rng.uniform(0.5, 2, codes.shape).astype(np.float32)
    centres = np.concatenate([np.full((1, 64), 50, np.float32), features[:200]])[None]
    nearest_one = (features @ centres[0, 1:].T).argmax(axis=1)[:, None] + 1
    items = numbered(len(codes))
    items = engine.Items(items.ids, items.captions, items.images, items.labels,
                         {"fused": nearest_one.astype(np.uint8)})  # fmt: skip
    order, _ = scan.buckets(pack(codes))
    about = {"views": ["fused"], "bits": 64, "class_names": ["rare"]}
    made = store.create(
        folder, about, {"fused": pack(codes)}, items,
        partial(tuning.measure, features={"fused": features[order]}), centres=centres,
    )  # fmt: skip
    return made, features


def test_a_second_stage_compares_what_it_must(tmp_path: Path) -> None:
    """The smallest share that loses no more than a hundredth, and no smaller one."""
    codes = signs(4000, 64, 3)
    made, features = staged(tmp_path / "i", codes)
    said = made.meta["recall"]["fused"]["two-stage"]
    order, _ = scan.buckets(pack(codes))
    rows = np.random.default_rng(0).choice(4000, 200, False)  # the sample of an index
    asked, own = pack(codes[order][rows]), features[order]
    scores = own[rows] @ own.T
    last = np.sort(scores, axis=1)[:, -10, None]

    def recall(setting: float) -> float:
        (_, _, hits), _ = made.two_stage("fused", asked, own[rows], 10, setting)
        return float((np.take_along_axis(scores, hits, axis=1) >= last).mean())

    assert said["recall"] == recall(said["setting"]) >= recall(1.0) - 0.01
    smaller = tuning.SHARES[: tuning.SHARES.index(said["setting"])]
    assert smaller and all(recall(setting) < recall(1.0) - 0.01 for setting in smaller)
    assert recall(smaller[0]) < said["recall"] < 1


def test_what_a_filter_leaves_out_takes_no_part_in_a_second_stage(
    clusters: np.ndarray, tmp_path: Path
) -> None:
    made, _ = staged(tmp_path / "i", clusters[:100])
    wanted = parse("label = 'rare'", ["rare"])
    asked = engine.Query("fused", pack(clusters[:1]), 64, 2, "two-stage", wanted,
                         np.ones((1, 64), np.float32))  # fmt: skip
    (hits,) = made.find(asked)
    assert {h.id for h in hits} == {"0", "50"} and all(h.score < 64 * 50 for h in hits)


def test_a_query_may_be_an_item(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(folder, "hq", "out=run")
    index = Index.build("index", "run")
    pairs = read_pairs_of(index)
    codes = index.model.encode(images=pairs.files, texts=pairs.captions)
    for view in ("image", "text"):
        expected = sorted((codes[view] != codes[view][4]).sum(axis=1).tolist())
        hits = index.search(like=pairs.ids[4], top=60, against=view)
        assert [h.distance for h in hits] == expected
    assert index.search(like=pairs.ids[4], top=60) == index.search(
        like=pairs.ids[4], top=60, against="image"
    )
    assert __main__.main(["query", "index", "--like", pairs.ids[4], "--top", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(VhablError, match="id nothing: no item"):
        index.search(like="nothing")
    with pytest.raises(VhablError, match="query: an item beside a text or an image"):
        index.search(like="4.png", text="a")


def test_a_graph_compares_whole_codes(index: Index) -> None:
    made = Index.build("graphs", "run", graphs=["ivf"])
    assert len(made.search(text="a", mode="ivf")) == 10
    with pytest.raises(VhablError, match="bits is 8, but must be 16: mode ivf of this index"):
        made.search(text="a", mode="ivf", bits=8)


# -- Milvus ----------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path: Path) -> milvus.Collection:
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    return milvus.create(tmp_path / "m", "", ABOUT, packed(two_views(60, 1)), items(60))


def test_milvus_gives_the_distances_of_faiss(collection: milvus.Collection) -> None:
    import faiss

    codes, query = two_views(60, 1), pack(signs(5, 24, 50))
    for view in ("image", "text"):
        flat = faiss.IndexBinaryFlat(24)
        flat.add(pack(codes[view]))
        distance, _ = flat.search(query, 20)
        found = collection.find(engine.Query(view, query, 24, 20))
        assert [[h.distance for h in hits] for hits in found] == distance.tolist()
        for q, hits in enumerate(found):
            for hit in hits:
                n = items(60).ids.index(hit.id)
                assert hit.distance == np.bitwise_count(pack(codes[view])[n] ^ query[q]).sum()
                assert hit.caption == items(60).captions[n] and hit.image == f"{n}.png"
                own = [c for c, has in zip("abc", items(60).labels[n], strict=True) if has]
                assert hit.labels == tuple(own)


@pytest.mark.parametrize(
    "text",
    [
        "label = 'a'",
        "label != 'b'",
        "label in ('a', 'c') and not label = 'b'",
        "not (label = 'a' or label = 'b' and label != 'c')",
    ],
)
def test_milvus_filters_as_the_folder_does(
    collection: milvus.Collection, small: store.Store, text: str
) -> None:
    asked = engine.Query("text", pack(signs(2, 24, 9)), 24, 60, wanted=parse(text, "abc"))
    theirs, ours = collection.find(asked), small.find(asked)
    for mine, other in zip(ours, theirs, strict=True):
        assert 0 < len(mine) < 60 and {h.id: h for h in mine} == {h.id: h for h in other}


def test_milvus_adds_and_deletes(collection: milvus.Collection) -> None:
    codes = two_views(40, 7)
    changed = collection.add(packed(codes), items(40, 60)).delete(["id 3 \u00e9", "id 70 \u00e9"])
    assert len(changed) == 98
    assert len({hit.id for hit in changed.some(9)}) == 9
    hit, own = changed.item("id 60 \u00e9")
    assert hit.image == "60.png" and hit.labels == ("a", "b", "c")
    assert all(np.array_equal(own[v], pack(codes[v][:1])[0]) for v in codes)
    for change, message in (
        (lambda: changed.add(packed(two_views(2, 3)), items(2, 99)), "id 99 \u00e9: an item"),
        (lambda: changed.delete(["id 5 \u00e9", "id 3 \u00e9"]), "id 3 \u00e9: no item"),
        (lambda: changed.item("id 3 \u00e9"), "id 3 \u00e9: no item"),
        (lambda: changed.add(packed(two_views(1, 3)), engine.Items(
            ["n"], ["x" * 70000], [""], np.zeros((1, 3), np.uint8))), "n: caption: 70,000"),
    ):  # fmt: skip
        with pytest.raises(VhablError, match=message):
            change()
        assert len(changed) == 98


def test_milvus_gives_more_than_a_page(
    collection: milvus.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = two_views(3000, 5)
    changed = collection.add(packed(codes), items(3000, 60))
    monkeypatch.setattr(milvus, "LIMIT", 100)
    query = signs(1, 24, 3)
    whole = np.concatenate([two_views(60, 1)["text"], codes["text"]])
    (hits,) = changed.find(engine.Query("text", pack(query), 24, 2500))
    expected = np.sort((whole != query[0]).sum(axis=1))[:2500]
    assert [h.distance for h in hits] == expected.tolist() and len({h.id for h in hits}) == 2500
    asked = engine.Query("text", pack(query), 24, 5000, wanted=parse("label != 'b'", "abc"))
    (some,) = changed.find(asked)
    assert {h.id for h in some} == {name for n, name in enumerate(items(3060).ids) if n % 3}


def test_a_failed_insert_leaves_nothing(
    collection: milvus.Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "BATCH", 10)
    insert, calls = type(collection.client).insert, []

    def failing(self: object, *args: object) -> object:
        calls.append(args)
        if len(calls) % 3 == 0:
            raise ValueError("disk")
        return insert(self, *args)

    monkeypatch.setattr(type(collection.client), "insert", failing)
    with pytest.raises(VhablError, match=r"Milvus at .*milvus\.db: disk\. Start"):
        collection.add(packed(two_views(40, 7)), items(40, 60))
    assert len(collection) == 60 and len(calls) == 3
    shared = str(tmp_path / "shared.db")
    with pytest.raises(VhablError, match=": disk"):
        milvus.create(tmp_path / "n", shared, ABOUT, packed(two_views(60, 1)), items(60))
    assert milvus.connect(shared).list_collections() == [] and not (tmp_path / "n").exists()


def test_a_milvus_that_is_not_there(
    collection: milvus.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "TIMEOUT", 1)
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(VhablError, match=r"Milvus at http://127.*: no answer \(.* 1 sec"):
            milvus.connect(uri)
        assert time.monotonic() - started < 10
    collection.client.drop_collection(collection.name)
    with pytest.raises(VhablError, match=f"no collection {collection.name}"):
        milvus.Collection(collection.folder)
    (collection.folder / "milvus.db").unlink()
    with pytest.raises(VhablError, match=r"milvus\.db: no such file"):
        milvus.Collection(collection.folder)


def test_milvus_from_the_commands(
    index: Index, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")

    def run(*arguments: object) -> str:
        assert __main__.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    said = run("build", "--checkpoint", "run", "--out", "m", "--engine", "milvus", "--quiet")
    assert said.startswith("m: 60 items of emoji, collection vhabl_") and ", 16 bits" in said
    theirs, ours = (run("query", i, "--text", "a red picture", "--top", 9) for i in ("m", "index"))
    numbers = [[line.split()[1] for line in lines.splitlines()] for lines in (theirs, ours)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 9
    (folder / "more.csv").write_text("image,caption\n1.png,new one\n", encoding="utf-8")
    assert run("add", "m", "--table", folder / "more.csv").startswith("m: 61 items")
    assert run("delete", "m", "--id", "1.png").startswith("m: 60 items")
    assert run("info", "m").startswith("m: 60 items")
    for options, message in (
        ({"bits": 8}, "bits is 8, but must be 16: mode exact of this index compares whole"),
        ({"mode": "prefix"}, "mode is 'prefix', but must be exact, as"),
    ):
        with pytest.raises(VhablError, match=message):
            Index.open("m").search(text="a", **options)
    for given, message in (
        ({"engine": "milvus", "graphs": ["ivf"]}, "graphs ivf: Milvus has indexes"),
        ({"graphs": ["tree"]}, "graphs is 'tree', but must be ivf or hnsw"),
        ({"uri": "x.db"}, "uri 'x.db': the engine milvus alone"),
        ({"engine": "other"}, "engine is 'other', but must be folder or milvus"),
    ):
        with pytest.raises(VhablError, match=message):
            Index.build("n", "run", **given)


def test_an_index_is_built_of_codes_that_were_written(folder: Path) -> None:
    """The same as by encoding; codes of anything else are refused, and nothing is written."""
    trained(folder, "cmcl", "out=run", "data.workers=0")
    recipe = Path("d.yaml")
    rows = (f"{number}.png,{'red' if number % 2 else 'blue'} one,x\n" for number in range(20))
    (folder / "t.csv").write_text("image,caption,labels\n" + "".join(rows))
    recipe.write_text(f"name: mine\nkind: table\npath: {folder / 't.csv'}\n")
    asked = ["--checkpoint", "run", "--data", str(recipe), "--quiet"]
    assert encode.main([*asked, "--bits", "8", "--out", "c.npz"]) == 0
    assert __main__.main(["build", *asked, "--codes", "c.npz", "--out", "index"]) == 0
    assert __main__.main(["build", *asked, "--bits", "8", "--out", "other"]) == 0
    assert content(Path("index")) == content(Path("other"))
    shutil.rmtree("index")
    with np.load("c.npz") as file:
        whole = dict(file)
    ids, views = whole["ids"], {name: whole[name] for name in ("image", "text")}
    for change, message in (
        ({"run": "0" * 32}, "its codes are of run 0{32}. run is [0-9a-f]{32}"),
        ({"run": None}, "its codes are of run nothing"),
        ({"ids": ids[:19]}, "key ids: 19 items. It must be the 20 items of the data"),
        ({"ids": ids[::-1]}, "key ids: 20 items, '19.png' among them. It must be the 20 items"),
        ({"ids": None}, "key ids: 0 items"),
        ({"texts": np.array("0" * 32)}, "key texts: its codes are of other texts"),
        ({"text": None}, "its keys are image. It must have image and text"),
        ({"text": views["text"][:19]}, r"key text: shape \(19, 8\)\. It must be codes of 20"),
        ({"text": np.zeros((20, 8))}, r"key text: shape \(20, 8\)\. It must be codes of 20"),
        ({"text": np.zeros((20, 2), np.uint8)}, "key text: 2 bytes a code. 8 bits take 1"),
    ):
        kept = {name: value for name, value in (whole | change).items() if value is not None}
        np.savez("bad.npz", **kept)
        with pytest.raises(VhablError, match=f"bad.npz: {message}"):
            Index.build("index", "run", recipe, codes="bad.npz")
    with pytest.raises(VhablError, match=r"bits is 16, but must be 8, as c.npz has"):
        Index.build("index", "run", recipe, 16, codes="c.npz")
    for row, number in enumerate(range(19, -1, -1)):  # other pictures and captions of these names
        (folder / "images" / f"{number}.png").rename(folder / "images" / f"new {row}.png")
    for file in (folder / "images").glob("new *"):
        file.rename(file.with_name(file.name.removeprefix("new ")))
    with pytest.raises(VhablError, match=r"c\.npz: \d+% of the bits of 8 items are others"):
        Index.build("index", "run", recipe, codes="c.npz")
    (folder / "t.csv").write_text((folder / "t.csv").read_text().replace("blue", "red"))
    with pytest.raises(VhablError, match=r"c\.npz: key texts: its codes are of other texts"):
        Index.build("index", "run", recipe, codes="c.npz")
    assert not Path("index").exists()
