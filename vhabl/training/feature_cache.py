"""What the frozen part of an encoder gives for every picture and caption, kept in a file.

A frozen tower or network runs once: later epochs, seeds, methods and evaluations read its outputs.
The file says what it was made with; one that is stale or damaged is made anew, and that is said.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vhabl.data.images import ImageFiles, read, rows_in_order
from vhabl.encoders import Encoder, PixelEncoder, open_clip
from vhabl.settings import EncoderConfig
from vhabl.system.apart import read_apart
from vhabl.system.errors import brief, fail, note
from vhabl.system.files import atomic_path
from vhabl.types import Dataset, Rows, Split, Store

VERSION = 5  # of the file's layout and of how its content is computed
VIEWS = {"image": "images", "text": "captions"}  # and what a file says of their content


def frozen_outputs(
    encoder: Encoder, data: Dataset, config: EncoderConfig, progress_bar: bool = False
) -> Dataset:
    """The data set with the outputs of the encoder's frozen part in place of pixels and tokens.

    The data set as it is where nothing is frozen, where pictures are changed at random, or where
    `encoder.cache` is none.
    """
    if not (isinstance(encoder, PixelEncoder) and encoder.cacheable) or config.cache == "none":
        return data
    # Pixels and tokens are in stores; a bag of words is not.
    parts = {view: getattr(data.train, view) for view in VIEWS}
    stores = {view: part.store for view, part in parts.items() if isinstance(part, Rows)}
    if "image" not in stores or _is_kept(stores["image"]):
        return data
    made_with = _made_with(encoder, stores)
    depth = "frozen" if not encoder.tuned else f"last{encoder.tuned}"
    content = {"joint": "tokens"}.get(encoder.tokens, encoder.tokens) or "pooled"
    name = f"{data.name}-{open_clip.name_of(config.model)}-{depth}-{content}.h5"
    path = Path(config.cache) / name
    here = encoder.ranks
    kept = _open(path, made_with, stores)
    if here.gather(kept is None)[0]:
        if here.rank == 0:
            _write(path, encoder, stores, made_with, progress_bar)
        else:
            for view, store in stores.items():
                deque(_outputs(encoder, view, store), 0)  # rank 0 takes them
        here.gather(None)  # it is written
        kept = _open(path, made_with, stores)
    if kept is None:
        do = "Set cache to a folder that all of them share"
        fail(path, "one of the machines has no such file", do)

    def swap(split: Split) -> Split:
        own = {view: getattr(split, view) for view in stores}
        changed: dict[str, Any] = {
            view: Rows(kept[view], part.first, part.count) for view, part in own.items()
        }
        return replace(split, **changed)

    return replace(
        data, train=swap(data.train), database=swap(data.database), query=swap(data.query)
    )


def _is_kept(store: Store) -> bool:
    return isinstance(store, np.memmap)


# -- what a file was made with ---------------------------------------------------------------------


def _made_with(encoder: PixelEncoder, stores: dict[str, Store]) -> dict[str, str]:
    """Everything that decides the content, each part as a short text that can be compared."""
    config = encoder.config
    image = stores["image"]
    squeezed = image.squeeze if isinstance(image, ImageFiles) else config.squeeze
    return {
        "architecture": f"{config.model}, {encoder.tuned} blocks tuned",
        "weights": encoder.fixed_digest(),
        **{VIEWS[view]: _digest_of_store(store) for view, store in stores.items()},
        "transform": f"{image.shape[-1]} to {encoder.size}, {'squeezed' if squeezed else 'cut'}",
        "precision": "bfloat16" if encoder.mixed else "float32",
        "rounding": config.cache_precision,
        "layout": str(VERSION),
    }


def _digest_of_store(store: Store) -> str:
    """Of the content in memory; of the state of files."""
    if isinstance(store, ImageFiles):
        content = store.state()
    else:
        content = np.ascontiguousarray(store[:]).tobytes()
    return blake2b(content, digest_size=16).hexdigest()


# -- the file --------------------------------------------------------------------------------------


def _open(
    path: Path, made_with: dict[str, str], views: Iterable[str]
) -> dict[str, np.memmap[Any, Any]] | None:
    """The kept arrays as memory maps, or None where there is no whole file made with this."""
    if not path.exists():
        return None
    try:
        found = read_apart(path, lambda: _described(path, views), "outputs of a frozen part")
        theirs, sums = json.loads(found.pop("made_with")), json.loads(found.pop("checksums"))
        changed = [part for part, value in made_with.items() if theirs.get(part) != value]
        if changed:
            note(f"{path}: made with other {', '.join(changed)}: made anew")
            return None
        arrays = {}
        for view, (offset, shape, dtype) in found.items():
            arrays[view] = np.memmap(path, dtype, "r", offset, shape)
            if _checksum(arrays[view]) != sums[view]:
                raise ValueError(f"another checksum of {view}")
    except Exception as error:  # damaged bytes raise many types
        note(f"{path}: damaged ({brief(error)}): made anew")
        return None
    return arrays


def _described(path: Path, views: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """What a file says of itself, and where its arrays are."""
    with h5py.File(path, "r") as file:
        for name in ("made_with", "checksums"):
            yield name, str(file.attrs[name])
        for view in views:
            node = file[view]
            yield view, (node.id.get_offset(), node.shape, node.dtype)


def _checksum(array: np.ndarray) -> int:
    value, step = 0, max(1, 2**24 // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        value = zlib.crc32(array[start : start + step].tobytes(), value)
    return value


def _write(
    path: Path,
    encoder: PixelEncoder,
    stores: dict[str, Store],
    made_with: dict[str, str],
    progress_bar: bool,
) -> None:
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        sums: dict[str, int] = {}
        for view, store in stores.items():
            done, array = 0, None
            bar = tqdm(
                total=store.shape[0],
                desc=f"frozen part, {view}",
                unit="item",
                disable=None if progress_bar else True,
            )
            with bar:
                for rows in _outputs(encoder, view, store):
                    if array is None:
                        shape = (store.shape[0], *rows.shape[1:])
                        array = file.create_dataset(view, shape, rows.dtype)  # in one piece
                    array[done : done + len(rows)] = rows
                    sums[view] = zlib.crc32(rows.tobytes(), sums.get(view, 0))
                    done += len(rows)
                    bar.update(len(rows))
        file.attrs["made_with"] = json.dumps(made_with)
        file.attrs["checksums"] = json.dumps(sums)


@torch.no_grad()
def _outputs(encoder: PixelEncoder, view: str, store: Store) -> Iterator[np.ndarray]:
    """What the frozen part gives for every row of a store, in batches, of which each rank computes
    its share.
    """
    here = encoder.ranks
    device, count = encoder.mean.device, store.shape[0]
    shares = [here.part(rows) for rows in rows_in_order(count, encoder.batch)]
    nothing = np.zeros((count, 0), np.int64)
    every = Rows(store, np.arange(count))
    image, text = (every, nothing) if view == "image" else (nothing, every)
    whole = Split(np.arange(count), image, text, np.zeros((count, 0), np.uint8))
    for inputs in read(whole, shares, device=device):
        found: Tensor | None = getattr(encoder.frozen(inputs.only(view).to(device)), view)
        assert found is not None
        yield here.whole(found, here.counts(len(found))).cpu().numpy()
