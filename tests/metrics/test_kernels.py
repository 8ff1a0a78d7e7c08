"""Every kernel equals the slow reference, and the reference is right on a case worked by hand."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vhabl import metrics
from vhabl.metrics import MEASURES, curves, evaluate, kernel_numba, kernel_torch, reference
from vhabl.metrics.counts import Packed, pack_words, unpack_words
from vhabl.metrics.evaluation import pick_kernel
from vhabl.metrics.measures import ALL
from vhabl.system.errors import VhablError
from vhabl.types import Codes

KERNELS = [kernel_numba, kernel_torch]
CUTS = (1, 3, 7, 50, ALL)


def random_codes(
    rng: np.random.Generator, queries: int, items: int, bits: int, classes: int, density: float
) -> Codes:
    """Codes with repeated and nearly equal items, so that there are ties everywhere."""
    distinct = rng.choice(np.array([-1, 1], np.int8), (max(1, items // 3), bits))
    database = distinct[rng.integers(len(distinct), size=items)]
    query = distinct[rng.integers(len(distinct), size=queries)].copy()
    query[rng.random(query.shape) < 0.1] *= -1

    def labels(rows: int) -> np.ndarray:
        return (rng.random((rows, classes)) < density).astype(np.uint8)

    return Codes(query, database, labels(queries), labels(items))


def assert_equal(kernel: ModuleType, packed: Packed) -> None:
    counts = reference.histogram(packed)
    np.testing.assert_array_equal(kernel.histogram(packed), counts)
    expected, found = (module.ordered(packed, counts, CUTS) for module in (reference, kernel))
    assert found.cuts == CUTS
    np.testing.assert_array_equal(found.hits, expected.hits)
    for name in ("precision", "first", "dcg"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.split("_")[-1])
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 5),
    items=st.integers(1, 40),
    bits=st.one_of(st.integers(1, 1100), st.sampled_from([1, 63, 64, 65, 127, 128, 129, 1024])),
    classes=st.sampled_from([1, 3, 21, 64, 65, 130]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    weighted=st.booleans(),
    own=st.booleans(),
    degrees=st.sampled_from(["none", "none", "whole", "real"]),
)
@settings(max_examples=60, deadline=None)
def test_a_kernel_equals_the_reference(
    kernel: ModuleType,
    seed: int,
    queries: int,
    items: int,
    bits: int,
    classes: int,
    density: float,
    weighted: bool,
    own: bool,
    degrees: str,
) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, queries, items, bits, classes, density)
    if degrees != "none":
        codes = replace(
            codes,
            query_labels=codes.query_labels * rng.integers(1, 4, codes.query_labels.shape),
            database_labels=codes.database_labels
            * (rng.integers(1, 4, codes.database_labels.shape) * (0.5 if degrees == "real" else 1)),
        )
    weights = rng.integers(0, 6, bits) if weighted else None
    positions = rng.integers(-1, items, queries) if own else None
    assert_equal(kernel, Packed.of(codes, weights, positions))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.split("_")[-1])
@pytest.mark.parametrize("items", [8191, 8192, 8193, 16385, 40000])
def test_chunks_of_the_database_join_without_a_seam(kernel: ModuleType, items: int) -> None:
    codes = random_codes(np.random.default_rng(items), 2, items, 10, 3, 0.3)
    assert_equal(kernel, Packed.of(codes))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.split("_")[-1])
def test_blocks_of_queries_join_without_a_seam(kernel: ModuleType) -> None:
    codes = random_codes(np.random.default_rng(0), 1100, 17, 10, 3, 0.3)
    assert_equal(kernel, Packed.of(codes))


def test_torch_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed.of(random_codes(np.random.default_rng(1), 9, 50, 20, 3, 0.3))
    monkeypatch.setattr(kernel_torch, "PAIRS", 700)
    monkeypatch.setattr(kernel_torch, "ITEMS", 13)
    assert_equal(kernel_torch, packed)


def test_the_reference_by_hand() -> None:
    """One query of three bits; items at distances 1, 0, 1, 3 sharing 1, 0, 2, 1 labels.

    In order: 0 | 1 2 | 1: hits at ranks 2, 3, 4 with precisions 1/2, 2/3, 3/4.
    """
    codes = Codes(
        np.array([[1, 1, 1]], np.int8),
        np.array([[1, 1, -1], [1, 1, 1], [-1, 1, 1], [-1, -1, -1]], np.int8),
        np.array([[1, 1, 0]], np.uint8),
        np.array([[1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]], np.uint8),
    )
    packed = Packed.of(codes)
    counts = reference.histogram(packed)
    assert counts.tolist() == [[[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]]
    found = reference.ordered(packed, counts, (2, ALL))
    assert found.hits.tolist() == [[1, 3]]
    assert found.precision.tolist() == [[1 / 2, pytest.approx(1 / 2 + 2 / 3 + 3 / 4)]]
    assert found.first.tolist() == [[pytest.approx(1 / 2 + 2 / 3), pytest.approx(23 / 12)]]
    gained = [1 / np.log2(3), 1 / np.log2(3) + 3 / 2 + 1 / np.log2(5)]
    assert found.dcg[0].tolist() == pytest.approx(gained)


def test_weights_count_for_each_differing_bit() -> None:
    codes = Codes(
        np.array([[1, 1, 1]], np.int8),
        np.array([[1, 1, -1], [-1, 1, -1], [1, 1, 1]], np.int8),
        *(np.ones((n, 1), np.uint8) for n in (1, 3)),
    )
    packed = Packed.of(codes, np.array([5, 0, 2]))
    assert packed.distances == 8
    for kernel in (reference, *KERNELS):
        assert kernel.histogram(packed)[0, :, 1].tolist() == [1, 0, 1, 0, 0, 0, 0, 1]


def test_the_query_itself_is_left_out() -> None:
    """Three equal items: the first query is item 1, the second is not in the database."""
    codes = Codes(*(np.ones((n, 2), np.int8) for n in (2, 3)), np.array([[1, 0], [1, 0]], np.uint8),
                  np.array([[0, 1], [1, 0], [1, 0]], np.uint8))  # fmt: skip
    packed = Packed.of(codes, own=np.array([1, -1]))
    for kernel in (reference, *KERNELS):
        counts = kernel.histogram(packed)
        assert counts[:, 0].tolist() == [[1, 1], [1, 2]]
        found = kernel.ordered(packed, counts, (2,))
        assert found.hits.tolist() == [[1], [1]]
        assert found.precision.tolist() == [[1 / 2], [1 / 2]]


def test_words_hold_bits_in_order_and_zeros_beyond() -> None:
    bits = np.zeros((2, 130), np.uint8)
    bits[0, [0, 63, 64, 129]] = 1
    assert pack_words(bits).tolist() == [[1 + (1 << 63), 1, 2], [0, 0, 0]]
    assert np.array_equal(unpack_words(pack_words(bits), 130), bits)


def test_a_memory_map_is_read_as_it_is(tmp_path: object) -> None:
    packed = Packed.of(random_codes(np.random.default_rng(2), 3, 20000, 70, 5, 0.3))
    mapped = np.memmap(f"{tmp_path}/words", np.uint64, "w+", shape=packed.database.shape)
    mapped[:] = packed.database
    np.testing.assert_array_equal(
        kernel_numba.histogram(replace(packed, database=mapped)), kernel_numba.histogram(packed)
    )


def test_all_kernels_give_the_same_values() -> None:
    codes = random_codes(np.random.default_rng(3), 20, 300, 24, 6, 0.2)
    measures = (*MEASURES, *curves(24))
    values = [
        np.array([(v.value, v.value_matched_only) for v in evaluate(codes, measures, kernel=name)])
        for name in ("reference", "torch", "numba")
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-12)


CODE = """
import torch, numpy as np
from vhabl.metrics import evaluate
from vhabl.types import Codes
torch.set_num_threads(1)
code, label = np.ones((9, 8), np.int8), np.ones((9, 1), np.uint8)
evaluate(Codes(code, code, label, label), kernel="numba")
print(torch.get_num_threads(), torch.__config__.parallel_info().count("omp_get_max_threads() : 1"))
"""


def test_an_evaluation_leaves_the_threads_of_training_alone() -> None:
    """An evaluation may come in the middle of a training, which has to stay repeatable."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_evaluations_in_several_threads_do_not_meet() -> None:
    packed = Packed.of(random_codes(np.random.default_rng(5), 9, 5000, 20, 3, 0.3))
    expected = kernel_numba.histogram(packed)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(kernel_numba.histogram, [packed] * 12):
            np.testing.assert_array_equal(found, expected)


def test_a_kernel_is_chosen_by_device_and_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_kernel("auto") is kernel_numba
    monkeypatch.setattr("vhabl.metrics.evaluation.find_spec", lambda name: None)
    assert pick_kernel("auto") is kernel_torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_kernel("auto") is kernel_torch
    monkeypatch.setattr("vhabl.metrics.evaluation.find_spec", lambda name: name == "triton")
    monkeypatch.setitem(sys.modules, "vhabl.metrics.kernel_triton", kernel_triton := object())
    monkeypatch.setattr(metrics, "kernel_triton", kernel_triton, raising=False)
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert pick_kernel("auto") is kernel_triton
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")  # no compiler, without which Triton starts nothing
    assert pick_kernel("auto") is kernel_torch
    monkeypatch.setenv("CC", "/usr/bin/cc")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")  # nor Python's headers
    assert pick_kernel("auto") is kernel_torch
    monkeypatch.setattr("vhabl.metrics.evaluation.find_spec", lambda name: None)
    with pytest.raises(VhablError, match=r"kernel.*triton"):
        pick_kernel("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("items", [1, 1000, 50_000])
@pytest.mark.parametrize(("bits", "classes"), [(16, 1), (128, 21), (130, 80)])
def test_the_gpu_kernels_equal_the_cpu_kernel(items: int, bits: int, classes: int) -> None:
    if not find_spec("triton"):
        pytest.skip("triton is not installed")
    packed = Packed.of(random_codes(np.random.default_rng(4), 33, items, bits, classes, 0.1))
    counts = kernel_numba.histogram(packed)
    from vhabl.metrics import kernel_triton

    np.testing.assert_array_equal(kernel_triton.histogram(packed), counts)
    np.testing.assert_array_equal(kernel_torch.histogram(packed), counts)
    found, expected = (k.ordered(packed, counts, CUTS) for k in (kernel_torch, kernel_numba))
    np.testing.assert_array_equal(found.hits, expected.hits)
    np.testing.assert_allclose(found.dcg, expected.dcg, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.split("_")[-1])
def test_the_query_itself_is_left_out_in_every_chunk_and_block(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_torch, "PAIRS", 1 << 18)  # a few queries a block
    rng = np.random.default_rng(5)
    codes = random_codes(rng, 6, 20000, 10, 3, 0.3)
    own = np.array([8191, 8192, 16384, -1, 3, 19999])
    assert_equal(kernel, Packed.of(codes, own=own))
    weights = np.arange(1, 11)
    assert_equal(kernel, Packed.of(codes, weights, own))


def test_the_reference_leaves_the_query_itself_out() -> None:
    codes = Codes(*(np.ones((n, 2), np.int8) for n in (2, 3)), np.array([[1, 0], [1, 0]], np.uint8),
                  np.array([[1, 0], [0, 1], [1, 0]], np.uint8))  # fmt: skip
    found = reference.ordered(Packed.of(codes, own=np.array([0, -1])), np.empty(0), (2,))
    assert found.hits.tolist() == [[1], [1]]
    assert found.precision.tolist() == [[1 / 2], [1]]


def good() -> Codes:
    return random_codes(np.random.default_rng(0), 3, 5, 16, 4, 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": np.ones((3, 20), np.int8)}, r"query and database.*20 and 16 bits"),
        ({"query_labels": np.ones((3, 5))}, r"query and database.*5 and 4 classes"),
        ({"query_labels": np.ones((2, 4))}, r"query labels.*2 rows.*3"),
        ({"database_labels": np.ones((9, 4))}, r"database labels.*9 rows.*5"),
        (
            {"database": np.ones((0, 16)), "database_labels": np.ones((0, 4))},
            r"database codes.*0",
        ),
        (
            {"query": np.ones((0, 16)), "query_labels": np.ones((0, 4))},
            r"query codes.*0 items",
        ),
        ({"query": np.zeros((3, 16))}, r"query codes.*the value 0.*-1 and"),
        ({"database": np.full((5, 16), 0.5)}, r"database codes.*the value 0\.5"),
        ({"database": np.full((5, 16), np.nan)}, r"database codes.*the value nan"),
        ({"query": np.ones(16)}, r"query codes.*shape \(16"),
        ({"query": [[1] * 16] * 3}, r"query codes.*shape list"),
        ({"query": np.full((3, 16), "a")}, r"query codes.*16 columns of type <U1"),
        ({"query_labels": np.ones((3, 0))}, r"query labels.*0 columns"),
        ({"query": np.ones((3, 0)), "database": np.ones((5, 0))}, r"query codes.*0 columns"),
    ],
)
def test_codes_that_are_none_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(VhablError, match=said):
        evaluate(replace(good(), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [np.ones(15, int), np.ones(16), np.arange(16) - 1])
def test_weights_that_are_none_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(VhablError, match=r"weights.*16 integers, not negative"):
        evaluate(good(), weights=weights)


@pytest.mark.parametrize("own", [np.zeros(2, int), np.array([0, 5, 0])])
def test_positions_that_are_none_are_refused(own: np.ndarray) -> None:
    with pytest.raises(VhablError, match=r"own.*a position below 5"):
        evaluate(good(), own=own)


def test_packed_words_of_another_width_are_refused() -> None:
    packed = Packed.of(good())
    with pytest.raises(VhablError, match=r"database codes.*shape.*2 words"):
        replace(packed, bits=65, query=np.zeros((3, 2), np.uint64))
    with pytest.raises(VhablError, match=r"labels: .*words a row"):
        replace(packed, query_labels=np.zeros((3, 2), np.uint64))


def test_a_cut_off_beyond_the_database_takes_all_of_it() -> None:
    """As documented: precision@N of a smaller database is taken over the whole of it."""
    found = {(v.measure, v.ties): v.value for v in evaluate(good(), MEASURES)}
    relevant = (good().query_labels.astype(int) @ good().database_labels.T > 0).mean(axis=1)
    assert found["precision@100", "expected"] == pytest.approx(relevant.mean())
    assert found["mAP@5000/min", "expected"] == pytest.approx(found["mAP@all", "expected"])
