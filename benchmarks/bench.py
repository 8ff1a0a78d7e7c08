"""Benchmarks: ratios of two ways to do the same thing, measured in one run.

python benchmarks/bench.py losses [--json]
python benchmarks/bench.py eval [--json]
python benchmarks/bench.py cache [--json]
python benchmarks/bench.py search [--json]
python benchmarks/bench.py stages [--json]
python benchmarks/bench.py milvus [--json]
python benchmarks/bench.py train [--json]
python benchmarks/bench.py encode [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from measuring import median_seconds, peak_mib
from throughput import bench_encode, bench_train
from torch import Tensor

from vhabl.codes import pack
from vhabl.config import CONFIG_DIR
from vhabl.config import load as load_config
from vhabl.data import load as load_data
from vhabl.methods.base import HashingMethod
from vhabl.metrics import HEADLINE, MEASURES, Kernel, evaluate
from vhabl.metrics.counts import Packed
from vhabl.metrics.evaluation import pick_kernel
from vhabl.nn import losses, quantisation
from vhabl.search import scan, store
from vhabl.search.engine import Engine, Items, Query
from vhabl.search.faiss_index import RECALL, SHARES, measure
from vhabl.search.where import Filter, parse
from vhabl.system.files import PROJECT
from vhabl.training.trainer import Trainer
from vhabl.types import Codes, Dataset, Inputs, Split


def multi_similarity_loop(h: Tensor, y: Tensor) -> Tensor:
    """The multi-similarity loss as the releases compute it: one anchor after another.

    Anchors without a negative or a positive, where the releases fail, are left out.
    """
    h = F.normalize(h, dim=1)
    s = h @ h.T
    shared = (y @ y.T) > 0
    total = h.new_zeros(())
    for i in range(len(h)):
        positive = s[i][shared[i]]
        positive = positive[positive < 1 - 1e-5]
        negative = s[i][~shared[i]]
        if len(positive) == 0 or len(negative) == 0:
            continue
        negative = negative[negative + 0.1 > positive.min()]
        if len(negative) == 0:
            continue
        positive = positive[positive - 0.1 < negative.max()]
        if len(positive) == 0:
            continue
        pull = torch.log(1 + torch.sum(torch.exp(-2.0 * (positive - 0.5)))) / 2.0
        push = torch.log(1 + torch.sum(torch.exp(40.0 * (negative - 0.5)))) / 40.0
        total = total + pull + push
    return total / len(h)


def bench_losses() -> list[dict[str, object]]:
    """The multi-similarity loss, forward and backward, at batch 1024 and K = 128."""
    torch.manual_seed(0)
    y = F.one_hot(torch.randint(0, 24, (1024,)), 24).float()
    y = torch.clamp(y + (torch.rand(1024, 24) < 0.1), max=1)
    h = torch.tanh(torch.randn(1024, 128)).requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        h.grad = None
        value = loss(h, y)
        value.backward()
        return value.detach()

    difference = float((step(losses.multi_similarity) - step(multi_similarity_loop)).abs())
    matrix = median_seconds(lambda: step(losses.multi_similarity), 10)
    loop = median_seconds(lambda: step(multi_similarity_loop), 3)
    return [
        {
            "case": "multi-similarity loss, forward and backward, B = 1024, K = 128",
            "loop_seconds": loop,
            "matrix_seconds": matrix,
            "ratio": loop / matrix,
            "difference": difference,
            "threads": torch.get_num_threads(),
        }
    ]


LOOP_QUERIES = 40  # the loop's time is proportional to the queries: a share of them is enough
EVAL_CASES = {  # queries, items, bits, classes: the sizes of VH-ABL's NUS-WIDE and PGHMH's COCO
    "NUS-WIDE": (2085, 193_749, 128, 21),
    "COCO": (5000, 117_218, 64, 80),
}
LINEAR_ITEMS = (1_000_000, 3_000_000, 10_000_000)


def torch_loop(codes: Codes, queries: int) -> float:
    """mAP@all as most releases compute it, in torch (PGHMH, CMCL, DCHMT, MITH): for each query a
    matrix product, a sort, a gather.
    """
    database = torch.from_numpy(codes.database).float()
    labels = torch.from_numpy(codes.database_labels).float()
    total = 0.0
    for q in range(queries):
        own = torch.from_numpy(codes.query_labels[q : q + 1]).float()
        match = (own @ labels.T > 0).float().squeeze()
        found = int(match.sum())
        if found == 0:
            continue
        vector = torch.from_numpy(codes.query[q : q + 1]).float()
        distance = 0.5 * (codes.bits - vector @ database.T).squeeze()
        match = match[torch.sort(distance).indices]
        ranks = torch.nonzero(match).squeeze().float() + 1.0
        total += float((torch.arange(1, found + 1).float() / ranks).mean())
    return total / queries


def numpy_loop(codes: Codes, queries: int) -> float:
    """The same in NumPy (VH-ABL, HIAMH); in float32, where the releases' int8 products are slower
    and overflow at 128 bits.
    """
    database, labels = codes.database.astype(np.float32), codes.database_labels.astype(np.float32)
    total = 0.0
    for q in range(queries):
        match = (codes.query_labels[q].astype(np.float32) @ labels.T > 0).astype(np.float32)
        found = int(match.sum())
        if found == 0:
            continue
        distance = 0.5 * (codes.bits - codes.query[q].astype(np.float32) @ database.T)
        match = match[np.argsort(distance)]
        ranks = np.flatnonzero(match == 1) + 1.0
        total += float(np.mean(np.linspace(1, found, found) / ranks))
    return total / queries


def random_codes(queries: int, items: int, bits: int, classes: int) -> Codes:
    """Codes and labels of these sizes; every item has two labels or so."""
    rng = np.random.default_rng(0)

    def signs(rows: int) -> np.ndarray:
        return rng.integers(0, 2, (rows, bits), np.int8) * 2 - 1

    def labels(rows: int) -> np.ndarray:
        y = (rng.random((rows, classes)) < 1 / classes).astype(np.uint8)
        y[np.arange(rows), rng.integers(0, classes, rows)] = 1
        return y

    return Codes(signs(queries), signs(items), labels(queries), labels(items))


def bench_eval() -> list[dict[str, object]]:
    """The evaluator against the per-query loop, and its time over growing databases."""
    kernels: list[Kernel] = ["numba"]
    if torch.cuda.is_available():
        kernels += ["torch", "triton"]
    rows: list[dict[str, object]] = []
    for name in EVAL_CASES:
        for kernel in kernels:  # each in a fresh process, whose peak memory is its own
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(eval_case, name, kernel).result())
    return rows + bench_linear()


def eval_case(name: str, kernel: Kernel) -> dict[str, object]:
    """One kernel and the per-query loop on codes of one size."""
    size = EVAL_CASES[name]
    codes = random_codes(*size)
    seconds, values = [], []
    for loop in (torch_loop, numpy_loop):
        start = time.perf_counter()
        values.append(loop(codes, LOOP_QUERIES))
        seconds.append((time.perf_counter() - start) * len(codes.query) / LOOP_QUERIES)
    case = f"mAP@all, {name} size: queries x items x bits x classes {size}"
    return {"case": case} | evaluator_against(codes, kernel, seconds, values)


def evaluator_against(
    codes: Codes, kernel: Kernel, loops: list[float], loop_values: list[float]
) -> dict[str, object]:
    """One kernel beside the two loops' seconds and their values on the first queries."""

    def measure() -> None:
        evaluate(codes, HEADLINE, kernel=kernel)

    labels = codes.query_labels[:LOOP_QUERIES]
    part = Codes(codes.query[:LOOP_QUERIES], codes.database, labels, codes.database_labels)
    evaluate(random_codes(9, 99, codes.bits, 3), HEADLINE, kernel=kernel)  # compiles
    peak = peak_mib(measure)  # the first large run: later ones use memory that was freed
    (found,) = evaluate(part, HEADLINE, kernel=kernel)
    packed = Packed.of(codes)
    seconds = median_seconds(measure, 3)
    return {
        "kernel": kernel,
        "loop_seconds": loops[0],
        "numpy_loop_seconds": loops[1],
        "loop_queries_timed": LOOP_QUERIES,
        "seconds": seconds,
        "histogram_seconds": median_seconds(lambda: pick_kernel(kernel).histogram(packed), 3),
        "all_measures_seconds": median_seconds(lambda: evaluate(codes, MEASURES, kernel=kernel), 1),
        "ratio": loops[0] / seconds,
        "ratio_to_numpy_loop": loops[1] / seconds,
        "peak_mib_above_inputs": peak,
        "difference": max(abs(found.value - value) for value in loop_values),
        "cores": os.cpu_count(),
    }


def bench_linear() -> list[dict[str, object]]:
    """100 queries of 128 bits against growing databases in a memory map."""
    rows: list[dict[str, object]] = []
    rng = np.random.default_rng(0)
    query = rng.integers(0, 1 << 63, (100, 2)).astype(np.uint64)
    mask = np.uint64(1) << rng.integers(0, 21, (100, 1)).astype(np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        for items in LINEAR_ITEMS:
            database = np.memmap(f"{folder}/codes{items}", np.uint64, "w+", shape=(items, 2))
            labels = np.memmap(f"{folder}/labels{items}", np.uint64, "w+", shape=(items, 1))
            for start in range(0, items, 1_000_000):
                rows_here = min(1_000_000, items - start)
                words = rng.integers(0, 1 << 63, (rows_here, 2)).astype(np.uint64)
                database[start : start + rows_here] = words
                labels[start : start + rows_here] = np.uint64(1) << (words[:, :1] % np.uint64(21))
            packed = Packed(128, query, database, mask, labels)
            seconds = median_seconds(lambda p=packed: pick_kernel("auto").histogram(p), 3)
            rows.append(
                {
                    "case": f"histogram of 100 queries x {items:,} items in a memory map, 128 bits",
                    "seconds": seconds,
                    "nanoseconds_per_pair": seconds / items / 100 * 1e9,
                    "ratio": None,
                    "cores": os.cpu_count(),
                }
            )
    return rows


CACHE_PAIRS = 256  # of the shipped data set


def bench_cache() -> list[dict[str, object]]:
    """The first epoch with a frozen ViT-B/32 (random weights), which fills the cache, against the
    second, which reads it.
    """
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = some_pairs(Path(folder) / "pairs", CACHE_PAIRS)
        for recipe in ("vh_abl_clip", "cmcl"):
            config = load_config(
                CONFIG_DIR / f"{recipe}.yaml",
                ["data=emoji", f"data.path={pairs}", "data.query=16", "data.train=240",
                 "encoder.model=ViT-B-32-quickgelu", "encoder.weights=", "encoder.tune=frozen",
                 "encoder.augment=false", "encoder.resize=0", f"encoder.cache={folder}/cache",
                 f"out={folder}/{recipe}", "epochs=2", "device=auto", "validation.fraction=0"],
            )  # fmt: skip
            trainer = Trainer(config, load_data(config.data, config.encoder), False)
            start = time.perf_counter()
            trainer.begin()
            trainer.train_epoch()
            first = time.perf_counter() - start
            start = time.perf_counter()
            trainer.train_epoch()
            second = time.perf_counter() - start
            rows.append(
                {
                    "case": f"epoch of {recipe}, 240 items, frozen ViT-B/32",
                    "first_seconds": first,
                    "second_seconds": second,
                    "ratio": first / second,
                    "cores": os.cpu_count(),
                }
            )
    return rows


def some_pairs(folder: Path, count: int) -> Path:
    """A folder with the first pairs of the shipped data set."""
    source = PROJECT / "dataset" / "emoji"
    folder.mkdir()
    (folder / "images").symlink_to(source / "images")
    for name in ("caption", "index", "label"):
        values = scipy.io.loadmat(source / f"{name}.mat")[name]
        rows = values[:count] if values.shape[0] > 1 else values[:, :count]
        scipy.io.savemat(folder / f"{name}.mat", {name: rows})
    return folder


SEARCHED, ASKED, NEAREST = 1_000_000, 1000, 100


def bench_search() -> list[dict[str, object]]:
    """Scans of a million codes of a trained model, and of random ones, against FAISS; and what an
    index of ten million takes to open.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trained = codes_under_noise(Path(folder), SEARCHED + ASKED)
        rng = np.random.default_rng(0)
        random = rng.integers(0, 256, (SEARCHED + ASKED, 16), dtype=np.uint8)
        for name, packed in (("trained", trained), ("random", random)):
            rows.append(scans(name, packed[:SEARCHED], packed[SEARCHED:]))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            some = trained[rng.integers(0, len(trained), 10 * SEARCHED)]
            write_index(Path(folder) / "large", some)
            rows.append(pool.submit(opening, Path(folder) / "large").result())
    return rows


def codes_under_noise(folder: Path, count: int) -> np.ndarray:
    """Packed codes of the shipped items' features under noise, by a model trained on them."""
    small = ["model.net.members=1", "model.net.joint_hidden=0", "epochs=10"]
    method, data = trained_on_emoji(folder, "hiamh", *small)
    with torch.no_grad():
        return np.concatenate(
            [
                pack(method.encode(inputs, 128)["fused"].numpy())
                for inputs, _ in under_noise(data.database, count)
            ]
        )


def trained_on_emoji(folder: Path, recipe: str, *overrides: str) -> tuple[HashingMethod, Dataset]:
    config = load_config(
        CONFIG_DIR / f"{recipe}.yaml",
        ["data=emoji", "validation.fraction=0", f"out={folder}/run", "codes=none", "device=cpu",
         *overrides],
    )  # fmt: skip
    data = load_data(config.data, config.encoder)
    return Trainer(config, data, False).run().eval(), data


def under_noise(split: Split, count: int) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Items drawn from a split of features, in batches, and their row numbers: pictures get noise,
    texts lose words.
    """
    random = torch.Generator().manual_seed(0)
    inputs = split.inputs()
    assert inputs.image is not None and inputs.text is not None
    spread = inputs.image.std(dim=0)
    for start in range(0, count, 4096):
        rows = torch.randint(len(split), (min(4096, count - start),), generator=random)
        image, text = inputs.image[rows], inputs.text[rows]
        image = image + 0.5 * spread * torch.randn(image.shape, generator=random)
        text = text * (torch.rand(text.shape, generator=random) < 0.7)
        yield Inputs(image, text), rows.numpy()


def bench_milvus() -> list[dict[str, object]]:
    """An index of 100,000 codes with labels in the embedded Milvus: seconds to write it, and for a
    query, beside the scan of an index on disk.
    """
    from vhabl.search import milvus

    count, rng = SEARCHED // 10, np.random.default_rng(0)
    packed = {"fused": rng.integers(0, 256, (count, 16), dtype=np.uint8)}
    names = [f"class {c}" for c in range(24)]
    labels = (rng.random((count, len(names))) < 0.1).astype(np.uint8)
    numbers, blank = [str(n) for n in range(count)], [""] * count
    items = Items(numbers, ["a dog on the grass"] * count, blank, labels)
    about = {"views": ["fused"], "bits": 128, "class_names": names}
    wanted = parse("label = 'class 3' and not label = 'class 4'", names)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = milvus.create(Path(folder) / "milvus", "", about, packed, items)
        seconds = time.perf_counter() - start
        ours = store.create(Path(folder) / "ours", about, packed, items, lambda _: {})
        asked = rng.integers(0, 256, (20, 1, 16), dtype=np.uint8)

        def ask(engine: Engine, wanted: Filter | None = None) -> list[list[int]]:
            found = [
                engine.find(Query("fused", one, 128, NEAREST, "exact", wanted)) for one in asked
            ]
            return [[hit.distance for hit in hits] for (hits,) in found]

        same = ask(made) == ask(ours) and ask(made, wanted) == ask(ours, wanted)
        times = {
            "query": median_seconds(lambda: ask(made), 3) / len(asked),
            "filtered": median_seconds(lambda: ask(made, wanted), 3) / len(asked),
            "on_disk": median_seconds(lambda: ask(ours), 3) / len(asked),
            "on_disk_filtered": median_seconds(lambda: ask(ours, wanted), 3) / len(asked),
        }
        made.client.close()
    return [
        {
            "case": f"embedded Milvus: {count:,} x 128 bits, {NEAREST} nearest",
            "write_seconds": seconds,
            **{f"{kind}_seconds": value for kind, value in times.items()},
            "query_to_on_disk": times["query"] / times["on_disk"],
            "same_distances": same,
        }
    ]


STAGED, RANKED = 200_000, 50


def bench_stages() -> list[dict[str, object]]:
    """HQ's four searches in an index of 200,000 items, the shipped set under noise: mAP@50/hits of
    the test queries, seconds a query (one at a time, and all together), and bytes an item.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        method, data = trained_on_emoji(Path(folder), "hq", "epochs=20", "bits=[64,128]")
        noisy = list(under_noise(data.database, STAGED))
        labels = data.database.labels[np.concatenate([numbers for _, numbers in noisy])]
        for bits in (64, 128):
            with torch.no_grad():
                asked = method.relax_lengths(data.query.inputs(), [bits])[bits]
                parts = [method.relax_lengths(inputs, [bits])[bits] for inputs, _ in noisy]
            x = {view: torch.cat([part[view] for part in parts]) for view in asked}
            centres = method.codebook(bits)
            assert centres is not None
            codes = {view: pack(rows_of.numpy() >= 0) for view, rows_of in x.items()}
            order, _ = scan.buckets(codes["image"])  # as the store has its items
            kept = {view: rows_of.numpy()[order] for view, rows_of in x.items()}
            choices = {view: quantisation.assign(rows_of, centres) for view, rows_of in x.items()}
            blank = [""] * STAGED
            items = Items(
                [str(n) for n in range(STAGED)], blank, blank, labels,
                {view: numbers.numpy().astype(np.uint8) for view, numbers in choices.items()},
            )  # fmt: skip
            names = [str(c) for c in range(labels.shape[1])]
            about = {"views": list(codes), "bits": bits, "class_names": names}
            made = store.create(
                Path(folder) / str(bits), about, codes, items,
                partial(measure, features=kept), centres=centres.numpy(),
            )  # fmt: skip
            relevant = data.query.labels.astype(np.int64) @ labels[order].T > 0
            for own, view in (("image", "text"), ("text", "image")):
                rows += stages(
                    f"{own} to {view}, {bits} bits", made, view, asked[own],
                    torch.from_numpy(kept[view]), choices[view][order], relevant,
                )  # fmt: skip
    return rows


def stages(
    name: str,
    made: store.Store,
    view: str,
    query: Tensor,
    x: Tensor,
    choices: Tensor,
    relevant: np.ndarray,
) -> list[dict[str, object]]:
    """x, choices and relevant in the order of the store's items."""
    asked, bits = pack(query.numpy() >= 0), made.bits
    centres = torch.from_numpy(made.centres)
    chosen = made.meta["recall"][view]["two-stage"]["setting"]

    def lossless(some: slice) -> np.ndarray:
        return (query[some] @ x.T).topk(RANKED).indices.numpy()

    def hashed(some: slice) -> np.ndarray:
        return made.scan(view, asked[some], bits, RANKED)[2]

    def quantised(some: slice) -> np.ndarray:
        tables = quantisation.tables(query[some], centres)
        return np.stack(
            [quantisation.scores(table, choices).topk(RANKED).indices.numpy() for table in tables]
        )

    def two_stage(some: slice) -> np.ndarray:
        found, _ = made.two_stage(view, asked[some], query[some].numpy(), RANKED, chosen)
        return found[2]

    small = len(centres) * math.log2(centres.shape[1]) / 8
    searches: dict[str, tuple[Callable[[slice], np.ndarray], float]] = {
        "lossless": (lossless, 4.0 * bits),
        "hash only": (hashed, bits / 8),
        "quantised": (quantised, small),
        "two-stage": (two_stage, bits / 8 + small),
    }
    rows: list[dict[str, object]] = []
    first: dict[str, float] = {}
    for kind, (search, size) in searches.items():
        found = search(slice(None))
        hits = np.take_along_axis(relevant, found, axis=1)
        precision = np.cumsum(hits, axis=1) / np.arange(1, RANKED + 1)
        ap = (precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)
        alone = median_seconds(lambda run=search: [run(slice(i, i + 1)) for i in range(16)], 5) / 16
        together = median_seconds(lambda run=search: run(slice(None)), 5) / len(query)
        seconds = {"one_at_a_time": alone, "together": together}
        first = first or seconds
        rows.append(
            {
                "case": f"{kind}, {name}, {len(x):,} items",
                f"mAP@{RANKED}/hits": float(ap.mean()),
                "bytes_an_item": size,
                **({"compares": chosen} if kind == "two-stage" else {}),
                **{f"{way}_seconds": value for way, value in seconds.items()},
                **{f"{way}_to_lossless": value / first[way] for way, value in seconds.items()},
            }
        )
    return rows


def scans(name: str, database: np.ndarray, query: np.ndarray) -> dict[str, object]:
    import faiss

    order, starts = scan.buckets(database)
    database = np.ascontiguousarray(database[order])
    flat = faiss.IndexBinaryFlat(128)
    flat.add(database)
    flat.use_heap = False
    words, asked = scan.to_words(database), scan.to_words(query)
    times = {
        "faiss": median_seconds(lambda: flat.search(query, NEAREST), 3),
        "exact": median_seconds(lambda: scan.exact(asked, words, 128, NEAREST), 3),
    }
    limit, recall = budget_of(asked, words, starts, 128)
    times["prefix"] = median_seconds(
        lambda: scan.by_prefix(asked, words, starts, 128, NEAREST, limit), 3
    )
    return {
        "case": f"{name} codes: {len(query):,} queries, {len(database):,} x 128 bits",
        **{f"{kind}_seconds": value for kind, value in times.items()},
        "exact_to_faiss": times["exact"] / times["faiss"],
        "exact_to_prefix": times["exact"] / times["prefix"],
        "prefix_compares": limit / len(database),
        f"prefix_recall@{NEAREST}": recall,
        "cores": os.cpu_count(),
    }


def budget_of(
    asked: np.ndarray, words: np.ndarray, starts: np.ndarray, bits: int
) -> tuple[int, float]:
    """How many items a scan by prefix compares for the recall that an index wants, and what it
    reaches.
    """
    farthest = scan.exact(asked, words, bits, NEAREST)[0][:, -1:]
    for share in SHARES:
        limit = math.ceil(share * len(words))
        near = scan.by_prefix(asked, words, starts, bits, NEAREST, limit)[0]
        recall = float((near <= farthest).mean())
        if recall >= RECALL:
            break
    return limit, recall


def write_index(folder: Path, packed: np.ndarray) -> None:
    names = [str(number) for number in range(len(packed))]
    blank = [""] * len(packed)
    about = {"views": ["fused"], "bits": 128, "class_names": []}
    every = Items(names, blank, blank, np.zeros((len(packed), 0), np.uint8))
    store.create(folder, about, {"fused": packed}, every, lambda _: {})


def opening(folder: Path) -> dict[str, object]:
    """In a process of its own: seconds to open an index, and memory to open and ask it."""
    query = np.zeros((1, 16), np.uint8)
    start = time.perf_counter()
    opened = store.Store(folder)
    seconds = time.perf_counter() - start
    opened.scan("fused", query, 128, NEAREST)  # what is compiled is no memory of the index
    del opened

    def ask() -> None:
        store.Store(folder).scan("fused", query, 128, NEAREST)

    return {
        "case": "index of 10 million codes of 128 bits",
        "open_seconds": seconds,
        "codes_MiB": 10 * SEARCHED * 16 / 2**20,
        "memory_MiB": peak_mib(ask),
    }


BENCHES: dict[str, Callable[[], Iterable[dict[str, object]]]] = {
    "losses": bench_losses,
    "eval": bench_eval,
    "cache": bench_cache,
    "search": bench_search,
    "stages": bench_stages,
    "milvus": bench_milvus,
    "train": bench_train,
    "encode": bench_encode,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHES, help="what is measured")
    parser.add_argument("--json", action="store_true", help="one record a line")
    given = parser.parse_args()
    for record in BENCHES[given.what]():
        if given.json:
            print(json.dumps(record), flush=True)
        else:
            print(record["case"], flush=True)
            for name, value in record.items():
                if name != "case":
                    shown = f"{value:.6g}" if isinstance(value, float) else value
                    print(f"  {name:22s} {shown}")


if __name__ == "__main__":
    main()
