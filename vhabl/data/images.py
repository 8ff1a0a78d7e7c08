"""Images from files: opened whole, resized, and read many at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from vhabl.system.errors import VhablError, fail, note
from vhabl.types import Embedded, Inputs, Rows, Split, Store, Stored

IN_MEMORY = 2**28  # bytes of pixels up to which a set's images are read once and kept
# Pixels that are decoded at most: a decoder may hold four copies of 4 bytes each. A JPEG may have
# twice as many where fewer of them are needed.
PIXELS = 62_000_000
REDUCED = 3  # times the pixels needed along a side that a JPEG decoded at a part of its size has
LONGEST = 256  # sides of a picture, long to short
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
# What turns a picture upright, by the orientation that its EXIF data give.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Picture = Stored | Image.Image
Box = tuple[float, float, float, float]  # left, top, right, bottom


def open_image(path: Picture | BinaryIO, name: str = "") -> Image.Image:
    """A whole image as RGB: upright as its EXIF data say, on white where it is transparent. name:
    what a message calls it, by default its path. Raises VhablError where it is missing, damaged,
    absurdly large or absurdly long.
    """
    return _decoded(path, name)[0]


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture of a format that is read, whatever its name."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # damaged bytes raise many types
        return False


def read_pixels(path: Picture | BinaryIO, side: int, squeeze: bool) -> np.ndarray:
    """`to_pixels` of an image, [3, side, side] uint8. A JPEG much larger than needed is decoded at
    a half, a quarter or an eighth of its size, at least three times as large as `side`: on the
    average a pixel changes by less than half a level of 255. Raises VhablError as `open_image`.
    """
    image, box = _decoded(path, "", REDUCED * side)
    return to_pixels(image, side, squeeze, box)


def read_whole(path: Picture | BinaryIO, side: int, squeeze: bool) -> np.ndarray:
    """The whole of an image, its short side resized to `side`, or squeezed to a square: [3, h, w]
    uint8. Decoded as by `read_pixels`. Raises VhablError as `open_image`.
    """
    image, box = _decoded(path, "", REDUCED * side)
    size = (side, side) if squeeze else _resized(box[2] - box[0], box[3] - box[1], side)
    return _array(image.resize(size, Image.Resampling.BICUBIC, box))


def _decoded(path: Picture | BinaryIO, name: str, least: int = 0) -> tuple[Image.Image, Box]:
    """An image as RGB, with the box that the picture takes of it, in pixels: where it is decoded at
    a part of its size, of its outermost column and row a part may lie beyond the picture.
    least: the sides that a JPEG keeps at least; 0 decodes it whole.
    """
    try:
        if isinstance(path, Image.Image):
            _require_sides(path)
            path.load()  # a TIFF is upright from here on
            return _seen(path, path.size)
        source = io.BytesIO(path.content) if isinstance(path, Embedded) else path
        with Image.open(source, formats=FORMATS) as image:
            _require_sides(image)
            width, height = image.size
            reduced = image.draft(None, (least, least)) if least else None
            if width * height > 2 * PIXELS or image.width * image.height > PIXELS:
                raise ValueError(f"{width} x {height} pixels")
            image.load()
            return _seen(image, reduced[1][2:] if reduced else image.size)
    except FileNotFoundError:
        fail(path, "no such file", "Put the image of the item there")
    except Exception as error:  # damaged bytes raise many types
        raise VhablError(
            f"{name or path}: the image cannot be read ({error}). It must be a whole "
            f"picture ({', '.join(FORMATS)})"
        ) from None


def _require_sides(image: Image.Image) -> None:
    if max(image.size) > LONGEST * min(image.size):  # its short side would be enlarged
        raise ValueError(f"{image.width} x {image.height} pixels")


def _seen(image: Image.Image, extent: tuple[float, float]) -> tuple[Image.Image, Box]:
    """A picture as a viewer shows it, as RGB: upright, and on white where it is transparent.

    extent: the width and height that the picture takes of the image as it is stored. Also gives
    the box that it takes of the upright one.
    """
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data: the pixels are whole
        turn = 1
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    if deep:
        image = _to_grey(image)
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    image = image.convert("RGB")
    if turn in UPRIGHT:
        image = image.transpose(UPRIGHT[turn])
    width, height = extent[::-1] if turn in (5, 6, 7, 8) else extent
    left = image.width - width if turn in (2, 3, 6, 7) else 0  # the first column was the last one
    top = image.height - height if turn in (3, 4, 7, 8) else 0
    return image, (left, top, left + width, top + height)


def _to_grey(image: Image.Image) -> Image.Image:
    """A picture of more than 8 bits a pixel as one of 8: the range that its file declares becomes 0
    to 255, else that of 16 bits or, of real numbers and bytes, its own.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("a value that is no finite number")
    if image.mode.startswith("I;16") or (image.mode == "I" and high > 255):
        top = _declared(image)
        if top is None and 0 < high < 4096:
            note(
                "pictures of 16 bits with no value above 4095 are read as dark ones; if they have "
                "12 bits, multiply them by 16"
            )
        low, high = 0.0, 65535.0 if top is None else top
    grey = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 256):  # the numbers between take 8 bytes each
        some = values[rows : rows + 256].astype(np.float64)
        scaled = (some - low) / max(high - low, 1e-12) * 255
        grey[rows : rows + 256] = np.clip(scaled, 0, 255)
        if "transparency" in image.info:  # the grey that a PNG shows as nothing
            grey[rows : rows + 256][some == image.info["transparency"]] = 255
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0 and image.mode.startswith("I;16")
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _declared(image: Image.Image) -> float | None:
    """The value that a TIFF declares as its largest, by a tag or by fewer bits than 16."""
    tags = getattr(image, "tag_v2", {})
    top = tags.get(281) or tags.get(341)  # MaxSampleValue, SMaxSampleValue
    top = top[0] if isinstance(top, tuple) else top
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    return float(top) if top else 2.0**bits - 1 if bits < 16 else None


def to_pixels(image: Image.Image, side: int, squeeze: bool, box: Box | None = None) -> np.ndarray:
    """The image with its short side resized to `side` and the centre cut out, or squeezed to a
    square: [3, side, side] uint8. box: what the picture takes of the image, by default all.
    """
    bicubic = Image.Resampling.BICUBIC
    start_x, start_y, end_x, end_y = box or (0, 0, *image.size)
    width, height = end_x - start_x, end_y - start_y
    if squeeze:
        image = image.resize((side, side), bicubic, (start_x, start_y, end_x, end_y))
    else:
        size = _resized(width, height, side)
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        # Of the resized image only the centre is computed, from this box.
        x, y = width / size[0], height / size[1]
        first = (start_x + left * x, start_y + top * y)
        last = (start_x + (left + side) * x, start_y + (top + side) * y)
        centre = (*first, min(end_x, last[0]), min(end_y, last[1]))
        image = image.resize((side, side), bicubic, centre)
    return _array(image)


def _resized(width: float, height: float, side: int) -> tuple[int, int]:
    """Width and height of a picture whose short side becomes `side`, rounded as by torchvision."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _array(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _stacked(pictures: Iterable[np.ndarray], count: int, side: int) -> np.ndarray:
    result = np.empty((count, 3, side, side), np.uint8)
    for number, picture in enumerate(pictures):
        result[number] = picture
    return result


def _crop(picture: np.ndarray, side: int, corner: np.ndarray) -> np.ndarray:
    """A part [3, side, side] of a picture; its corner as in `Rows.crops`."""
    _, height, width = picture.shape
    top, left = (int(u * (n - side + 1)) for u, n in zip(corner, (height, width), strict=True))
    return picture[:, top : top + side, left : left + side].copy()  # frees the picture


class ImageFiles:
    """A store of pixels [N, 3, side, side] uint8 that are read from their files when indexed.

    Raises VhablError where a file that is read is missing or damaged.
    """

    def __init__(
        self,
        files: Sequence[Picture],
        side: int,
        squeeze: bool,
        workers: int,
        crop: int = 0,
    ) -> None:
        self.files = files
        self.side = side
        self.squeeze = squeeze
        self.workers = workers  # processes that `read` uses
        self.crop = crop  # side of the parts that `crops` reads; 0: none are read

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.files), 3, self.side, self.side)

    dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: Any) -> np.ndarray:
        def pixels(row: int) -> np.ndarray:
            return read_pixels(self.files[row], self.side, self.squeeze)

        numbers = np.arange(len(self.files))[rows]
        return _stacked(_in_threads(pixels, numbers), len(numbers), self.side)

    def crops(self, rows: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """Parts [B, 3, crop, crop] of the whole pictures, as `Rows.crops`."""

        def part(row: int, corner: np.ndarray) -> np.ndarray:
            return _crop(self._whole(row), self.crop, corner)

        return _stacked(_in_threads(part, rows, corners), len(rows), self.crop)

    def _whole(self, row: int) -> np.ndarray:
        return read_whole(self.files[row], self.side, self.squeeze)

    def marks(self, rows: np.ndarray) -> np.ndarray:
        """What tells the given pictures from others without decoding them, [N]: the bytes of the
        files, -1 where there is none (it is said when it is read).
        """

        def size(file: Picture) -> int:
            if isinstance(file, Embedded):
                return len(file.content)
            path = Path(str(file))
            return path.stat().st_size if path.is_file() else -1

        return np.array([size(self.files[row]) for row in rows.tolist()], np.int64)

    def state(self) -> bytes:
        """What changes when any picture does: names, sizes and times of all files, and what is in
        those that a table holds.
        """
        lines = []
        for name in self.files:
            if isinstance(name, Embedded):
                lines.append(f"{name}\0{blake2b(name.content, digest_size=16).hexdigest()}\n")
                continue
            file = Path(str(name))
            status = file.stat() if file.exists() else None  # a missing one is said when read
            lines.append(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\n")
        return "".join(lines).encode()

    def in_memory(self) -> Store:
        """All pixels where they are few, else this. They include the whole pictures where parts of
        them are read.
        """
        if np.prod(self.shape, dtype=np.int64) > IN_MEMORY:
            return self
        if not self.crop:
            return self[:]
        whole: list[np.ndarray] = []
        for rows in rows_in_order(len(self.files), 32):
            whole += _in_threads(self._whole, rows)
            if sum(picture.nbytes for picture in whole) > IN_MEMORY:
                return self
        return KeptPictures(self[:], whole, self.crop)


class KeptPictures:
    """A store of pixels in memory that has the whole pictures too, of which parts are read."""

    def __init__(self, centres: np.ndarray, whole: Sequence[np.ndarray], crop: int) -> None:
        self.centres, self.whole, self.crop = centres, whole, crop
        self.shape, self.dtype = centres.shape, centres.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.centres[rows]

    def crops(self, rows: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """Parts [B, 3, crop, crop] of the whole pictures, as `Rows.crops`."""
        parts = (_crop(self.whole[n], self.crop, u) for n, u in zip(rows, corners, strict=True))
        return _stacked(parts, len(rows), self.crop)


def _in_threads(function: Callable[..., np.ndarray], *each: Iterable[Any]) -> list[np.ndarray]:
    with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter's lock
        return list(pool.map(function, *each))


class _Reader(torch.utils.data.Dataset[Inputs | str]):
    def __init__(
        self,
        split: Split,
        batches: Sequence[np.ndarray],
        draws: Sequence[np.ndarray] | None,
        corners: Sequence[np.ndarray] | None,
    ) -> None:
        self.split, self.batches, self.draws, self.corners = split, batches, draws, corners

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Inputs | str:
        draws = None if self.draws is None else self.draws[number]
        corners = None if self.corners is None else self.corners[number]
        try:
            return self.split.inputs(self.batches[number], draws, corners)
        except VhablError as error:  # a worker's exception would come with its traceback
            return str(error)


def rows_in_order(count: int, size: int) -> list[np.ndarray]:
    """Row numbers of `count` items in batches of `size`, the last one what is left."""
    return [np.arange(i, min(i + size, count)) for i in range(0, count, size)]


def read(
    split: Split,
    batches: Sequence[np.ndarray],
    draws: Sequence[np.ndarray] | None = None,
    device: torch.device | None = None,
    corners: Sequence[np.ndarray] | None = None,
) -> Iterator[Inputs]:
    """The inputs of each batch of rows, in order; images are decoded ahead in worker processes.

    draws, corners: for each batch, what `Split.inputs` takes. device: where the inputs go next; for
    a GPU they are in pinned memory. Raises VhablError where an image cannot be read.
    """
    store = split.image.store if isinstance(split.image, Rows) else None
    workers = store.workers if isinstance(store, ImageFiles) else 0
    reader = _Reader(split, batches, draws, corners)
    loader: Any = DataLoader(
        reader,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        prefetch_factor=2 if workers else None,
        pin_memory=device is not None and device.type == "cuda",
    )
    # The loader draws a seed from torch's generator: training must not depend on that.
    state = torch.get_rng_state()
    iterator = iter(loader)
    torch.set_rng_state(state)
    for found in iterator:
        if isinstance(found, str):
            raise VhablError(found)
        yield found
