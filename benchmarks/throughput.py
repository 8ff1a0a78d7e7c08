"""How fast training and encoding are, beside the matrix products that they cannot do without.

A GPU is measured at the published sizes and in bfloat16 where the encoder computes in it; without
one the sizes are smaller and in float32, and every record says which.
"""

from __future__ import annotations

import gc
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Watch, fastest, peak_mib, replay, saved_for_backward, seconds
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vhabl.config import CONFIG_DIR, Config, build_method
from vhabl.config import load as load_config
from vhabl.data.images import ImageFiles, read_pixels
from vhabl.evaluation.records import batches_in_order, code_tasks
from vhabl.methods.base import HashingMethod
from vhabl.metrics import HEADLINE, evaluate
from vhabl.nn import losses
from vhabl.training.trainer import Trainer, pick_device
from vhabl.types import Batch, Dataset, Inputs, Rows, Split

Record = dict[str, object]

DEVICE = pick_device("auto")
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 7 if ON_GPU else 3
FEATURES = (4096, 1386, 24)  # widths of MIRFlickr's images and texts, and its classes
ITEMS = {"train": 5000, "database": 17_772, "query": 2243}  # as VH-ABL and HIAMH split it
STEPS = 4 if ON_GPU else 1  # that are timed together
MEMORY_ITEMS = 10_000  # training items that CMCL and PGHMH compare a batch with
TOWER_BATCHES = (128, 512) if ON_GPU else (16,)  # 128 is the published one
GIGABYTE = 2**30


def bench_train() -> Iterator[Record]:
    """Steps against their matrix products, waits for data and for a GPU, and memory."""
    features = []
    for name in ("vh_abl", "hiamh"):
        features.append(of_features(name))
        yield features[-1]
    yield whole_table(features)
    for name in ("cmcl", "pghmh"):
        for batch in TOWER_BATCHES:
            yield of_towers(name, batch)
    yield from_files()
    yield from memory()


# -- data ------------------------------------------------------------------------------------------


def random_labels(count: int) -> np.ndarray:
    rng, classes = np.random.default_rng(0), FEATURES[2]
    y = (rng.random((count, classes)) < 0.12).astype(np.uint8)
    y[np.arange(count), rng.integers(0, classes, count)] = 1
    return y


def random_features(count: int) -> Split:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((count, FEATURES[0]), dtype=np.float32)
    text = (rng.random((count, FEATURES[1])) < 0.01).astype(np.float32)
    return Split(np.arange(count), image, text, random_labels(count))


def random_texts(count: int, words: int) -> np.ndarray:
    """Token ids [N, words] of sentences of half that length."""
    ids = np.random.default_rng(0).integers(1, 49_000, (count, words))
    ids[:, words // 2 :] = 0
    ids[:, 0], ids[:, words // 2] = 49_406, 49_407
    return ids


def random_pairs(config: Config, count: int) -> Split:
    """Decoded pictures and tokens in memory."""
    side = config.encoder.resize or 224
    image = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
    text = random_texts(count, config.encoder.words)
    return Split(np.arange(count), image, text, random_labels(count))


def as_dataset(name: str, train: Split, database: Split | None = None, query: Split | None = None
               ) -> Dataset:  # fmt: skip
    names = tuple(f"class {c}" for c in range(FEATURES[2]))
    rest = (database or train, query or train)
    return Dataset(name, train, *rest, fingerprint="random", class_names=names)


def recipe(name: str, data: str, *overrides: str) -> Config:
    """A published recipe that trains in one phase, with random weights."""
    own = ["encoder.weights=", "encoder.cache=none"] if "cnn" not in data else []
    common = [f"data={data}", "validation.fraction=0", "codes=none", *own]
    return load_config(CONFIG_DIR / f"{name}.yaml", [*common, *overrides])


# -- the trainer's loop ----------------------------------------------------------------------------


class Loop:
    """Epochs of a trainer, of the first `steps` batches, and what these wait for."""

    def __init__(self, config: Config, data: Dataset, steps: int) -> None:
        self.trainer = Trainer(config, data, progress_bar=False)
        self.trainer.begin()
        self.inputs = self.trainer.inputs
        self.trainer.inputs = self._watched  # type: ignore[method-assign]
        self.steps, self.data_seconds, self.host_waits = steps, 0.0, 0
        self.count: Callable[[], int] = lambda: 0  # host waits until now

    def epoch(self) -> None:
        torch.set_flush_denormal(True)  # as Trainer.run does
        self.trainer.train_epoch()

    def _watched(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Inputs]]:
        self.data_seconds, before = 0.0, 0
        found = self.inputs(batches[: self.steps])
        for number in range(self.steps):
            start = time.perf_counter()
            batch = next(found)
            self.data_seconds += time.perf_counter() - start
            before = before if number else self.count()
            yield batch
        self.host_waits += self.count() - before

    def watch(self) -> Watch:
        """What an epoch is made of; `host_waits` of its steps."""
        with Watch() as watch:
            self.count = watch.waits.total
            self.epoch()
        if ON_GPU:  # there torch itself says when it waits
            self.host_waits = 0
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.count = lambda: sum("synchronizing" in str(w.message) for w in said)
                torch.cuda.set_sync_debug_mode("warn")
                self.epoch()
                torch.cuda.set_sync_debug_mode("default")
        self.count = lambda: 0
        return watch


def of_features(name: str) -> Record:
    """An epoch of a method on features against the matrix products in it."""
    config = recipe(name, "mirflickr_cnn")
    data = as_dataset("mirflickr_cnn", random_features(ITEMS["train"]))
    loop = Loop(config, data, STEPS)
    watch = loop.watch()
    products = replay(watch.products, DEVICE)
    epoch, own = fastest(ROUNDS, loop.epoch, products)
    return {
        "case": f"{name}: {ITEMS['train']:,} x {FEATURES[:2]}, batch {config.batch_size}",
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
        "step_seconds": epoch / loop.steps,
        "products_seconds": own / loop.steps,
        "step_to_products": epoch / own,
        "operations_a_step": watch.operations / loop.steps,
        "host_waits_a_step": loop.host_waits / loop.steps,
        "data_on_device": loop.trainer.resident is not None,
    }


def whole_table(features: list[Record]) -> Record:
    """Training, codes and mAP of both methods at all lengths; without a GPU only what training
    would take.
    """
    case = "whole table: VH-ABL and HIAMH, all lengths from one model each"
    if not ON_GPU:
        steps = 140 * -(-ITEMS["train"] // 1024)  # of the published recipes
        total = sum(steps * float(str(record["step_seconds"])) for record in features)
        return {"case": case, "training_seconds_extrapolated": total, "device": DEVICE.type}
    parts = {role: random_features(count) for role, count in ITEMS.items()}

    def run(folder: str) -> None:
        for name in ("vh_abl", "hiamh"):
            config = recipe(name, "mirflickr_cnn", f"out={folder}")
            data = as_dataset("mirflickr_cnn", **parts)
            method = Trainer(config, data, progress_bar=False).run()
            for tasks in code_tasks(method, data, config.bits).values():
                evaluate(tasks["fused"], HEADLINE)

    with tempfile.TemporaryDirectory() as folder:
        return {"case": case, "seconds": seconds(lambda: run(folder)), "device": DEVICE.type}


def square_products(flop: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """A call that does as much in products of large square matrices, and its exact FLOP."""
    side = 8192 if ON_GPU else 2048
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    out, times = torch.empty_like(a), max(1, round(flop / (2 * side**3)))

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return run, times * 2 * side**3


def share_of_rate(
    run: Callable[[], object], flop: int, dtype: torch.dtype
) -> tuple[dict[str, object], float]:
    """How much of the measured matrix rate a call reaches, and its median seconds."""
    products, products_flop = square_products(flop, dtype)
    products()
    took, own = fastest(ROUNDS, run, products)
    rate = products_flop / own
    reached = {
        "TFLOP": flop / 1e12,
        "matrix_TFLOP_a_second": rate / 1e12,
        "share_of_matrix_rate": flop / took / rate,
        "precision": str(dtype).removeprefix("torch."),
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
    }
    return reached, took


def precision_of(method: HashingMethod) -> torch.dtype:
    return torch.bfloat16 if getattr(method.encoder, "mixed", False) else torch.float32


def of_towers(name: str, batch: int) -> Record:
    """Steps of a method on towers from decoded pictures: its FLOP against the matrix rate, and
    what the likelihood against the codes of all training items takes of them.
    """
    config = recipe(name, "mirflickr", f"batch_size={batch}")
    loop = Loop(config, as_dataset("mirflickr", random_pairs(config, STEPS * batch)), STEPS)
    method = loop.trainer.method
    method.prepare(torch.from_numpy(random_labels(MEMORY_ITEMS)).float().to(DEVICE))
    calls: list[tuple[Tensor, ...]] = []

    def kept(*given: Tensor) -> Tensor:
        calls.append(tuple(x.detach() for x in given))
        return likelihood(*given)

    likelihood, losses.likelihood = losses.likelihood, kept
    with FlopCounterMode(display=False) as counted:
        watch = loop.watch()
    losses.likelihood = likelihood
    epochs = 1 + ON_GPU  # that were watched
    calls = calls[: len(calls) // (loop.steps * epochs)]

    def likelihoods() -> None:
        method.memory.similar(loop.trainer.labels[:batch])
        for memory, h, similar in calls:
            likelihood(memory, h.requires_grad_(), similar).backward()

    flop = counted.get_total_flops() // epochs
    reached, took = share_of_rate(loop.epoch, flop, precision_of(method))
    step = took / loop.steps
    (own,) = fastest(ROUNDS, likelihoods)
    return {
        "case": f"{name}: {config.encoder.model}, a step at batch {batch} from decoded pictures",
        **reached,
        "step_seconds": step,
        "items_a_second": batch / step,
        "likelihood_seconds": own,
        "likelihood_share": own / step,
        "operations_a_step": watch.operations / loop.steps,
        "host_waits_a_step": loop.host_waits / loop.steps,
    }


# -- pictures in files -----------------------------------------------------------------------------

SIZES = {"MIRFlickr": (500, 375), "COCO": (640, 480), "a camera": (4000, 3000)}
FILES = 64


def write_pictures(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """JPEG files of smooth pictures with some noise, as large as photographs of that size are."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.normal(0, 6, smooth.shape).astype(np.int16)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def in_files(config: Config, folder: Path, count: int) -> Split:
    """The pairs of `random_pairs` with their pictures in JPEG files, some of them several times."""
    files = write_pictures(folder, SIZES["MIRFlickr"], FILES)
    store = ImageFiles(files, config.encoder.resize or 224, False, config.data.workers)
    image = Rows(store, np.arange(count) % FILES)
    return Split(np.arange(count), image, random_texts(count, config.encoder.words),
                 random_labels(count))  # fmt: skip


def from_files() -> Record:
    """How long steps wait for pictures that are decoded as they are needed."""
    batch, steps = TOWER_BATCHES[0], 8 if ON_GPU else 2
    config = recipe("cmcl", "mirflickr", f"batch_size={batch}")
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            config, as_dataset("mirflickr", in_files(config, Path(folder), batch * steps)), steps
        )
        loop.trainer.resident = None  # as where they are too many to keep
        loop.epoch()
        took = seconds(loop.epoch)
    return {
        "case": f"cmcl: an epoch of {steps} steps at batch {batch} from JPEG files of MIRFlickr's "
        f"size, {config.data.workers} workers",
        "device": DEVICE.type,
        "epoch_seconds": took,
        "waits_for_data_seconds": loop.data_seconds,
        "waits_share": loop.data_seconds / took,
    }


# -- memory ----------------------------------------------------------------------------------------

RECIPES = {
    "vh_abl": "mirflickr_cnn", "hiamh": "mirflickr_cnn", "vh_abl_clip": "mirflickr",
    "hiamh_clip": "mirflickr", "cmcl": "mirflickr", "pghmh": "mirflickr",
}  # fmt: skip


def memory() -> Iterator[Record]:
    """What a step of each published recipe keeps: measured on a GPU, else computed from weights,
    gradients, both moments of Adam, buffers and what a float32 step saves for its backward pass.
    """
    for name, data in RECIPES.items():
        config = recipe(name, data)
        count = config.batch_size
        items = random_pairs(config, count) if data == "mirflickr" else random_features(count)
        record: Record = {"case": f"memory of a step of {name} at batch {count}"}
        if ON_GPU:
            yield record | {"peak_GB": measured_memory(config, as_dataset(data, items))}
        else:
            yield record | {"computed_GB": computed_memory(config, as_dataset(data, items))}


def measured_memory(config: Config, data: Dataset) -> float:
    """Gigabytes that a GPU holds at most in a step over all training items at once."""
    gc.collect()  # loops before this one refer to themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loop = Loop(config, data, 1)
    loop.trainer.method.prepare(torch.zeros(MEMORY_ITEMS, FEATURES[2], device=DEVICE))
    loop.epoch()
    return (torch.cuda.max_memory_allocated() - before) / GIGABYTE


def computed_memory(config: Config, data: Dataset) -> float:
    """Gigabytes of a step over all training items at once. No number is computed, and attention is
    taken apart, so that it keeps more than a fused one does.
    """
    nowhere = torch.device("meta")
    count = len(data.train)
    method = build_method(config, replace(data.spec, train_items=MEMORY_ITEMS)).to(nowhere)
    method.prepare(torch.zeros(MEMORY_ITEMS, FEATURES[2], device=nowhere))
    labels = torch.zeros(count, FEATURES[2], device=nowhere)
    index = torch.arange(count, device=nowhere)
    batch = Batch(data.train.inputs().to(nowhere), labels, index)

    def loss() -> Tensor:
        return torch.stack(list(method.loss(batch).values())).sum()

    saved, _ = saved_for_backward(method, loss)
    weights = sum(p.nbytes for p in method.parameters())
    tuned = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in method.buffers())
    return (weights + 3 * tuned + buffers + saved) / GIGABYTE


# -- encoding --------------------------------------------------------------------------------------


def bench_encode() -> Iterator[Record]:
    """The image tower, decoding, and both one after the other."""
    yield tower()
    yield from decoding()
    yield end_to_end()


def tower_method(config: Config, items: Split) -> HashingMethod:
    torch.manual_seed(0)
    return build_method(config, as_dataset("mirflickr", items).spec).to(DEVICE).eval()


def tower() -> Record:
    """ViT-B/32 at 224 on decoded pictures that are on the device."""
    batch = 512 if ON_GPU else 16
    config = recipe("vh_abl_clip", "mirflickr")
    items = random_pairs(config, batch)
    method = tower_method(config, items)
    inputs = items.inputs().only("image").to(DEVICE)

    @torch.no_grad()
    def run() -> Any:
        return method.encoder(inputs)

    torch.backends.mha.set_fastpath_enabled(False)  # which the counter does not know
    with FlopCounterMode(display=False) as counted:
        run()
    torch.backends.mha.set_fastpath_enabled(True)
    reached, took = share_of_rate(run, counted.get_total_flops(), precision_of(method))
    return {
        "case": f"image tower {config.encoder.model}, batch {batch}, from decoded pictures",
        **reached,
        "seconds": took,
        "images_a_second": batch / took,
    }


def decoding() -> Iterator[Record]:
    """JPEG files to pixels at 224, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            (file,) = write_pictures(Path(folder), size, 1)
            content = file.read_bytes()

            def run(content: bytes = content) -> None:
                read_pixels(io.BytesIO(content), 224, False)

            yield {
                "case": f"JPEG of {name}'s size {size} to pixels, {len(content) >> 10} KiB",
                "images_a_second_and_core": 1 / fastest(25, run)[0],
            }


def end_to_end() -> Record:
    """Codes of pictures in JPEG files and of texts, as `python -m vhabl.encode` makes them."""
    count = 4096 if ON_GPU else 96
    config = recipe("vh_abl_clip", "mirflickr")
    with tempfile.TemporaryDirectory() as folder:
        items = in_files(config, Path(folder), count)
        method = tower_method(config, items)
        method.encoder.batch = min(method.encoder.batch, count // 3)
        waited = 0.0

        @torch.no_grad()
        def run() -> None:
            nonlocal waited
            batches, waited = batches_in_order(method, items), 0.0
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - start
                if batch is None:
                    break
                method.encode_lengths(batch.inputs, config.bits)

        peak = peak_mib(run)
        took = seconds(run)
    return {
        "case": f"{count:,} pairs with pictures in JPEG files of MIRFlickr's size to codes, "
        f"batch {method.encoder.batch}, {config.data.workers} workers",
        "device": DEVICE.type,
        "items_a_second": count / took,
        "waits_for_data_share": waited / took,
        "peak_mib_above_weights": peak,
    }
