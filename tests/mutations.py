"""Ways to damage a file: bytes of any format, words of texts, values of JSON, members of archives,
and files made to take too much.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Mutate = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63)
WORDS = (
    "0", "-1", "1e999", "nan", ".nan", ".inf", "1e-3", "9" * 5000, str(2**63), "0x7f", "1_000",
    "true", "null", "~", "''", '""', "[]", "{}", "[[1]]", "{a: 1}", "2001-99-99", "12:30:99",
    "k" * 100_000, "\ud7ff", "日本 \U0001f600\u202e", "\0", "\r", "\n", "\t", ",", ";", ":", "- ",
    "[" * 5000, "{" * 5000, "{a: " * 3000, "((" * 3000, '"', "'", "&a [*a]", "*a", "<<: *a",
    "!!python/object/apply:os.system [touch x]", "!!binary aaa", "!!float x", "!!int x",
    "!!timestamp 1-1-1", "? [a]", "---", "...", "%YAML 9", "../" * 50, "/dev/zero", "\\", "\\u0000",
)  # fmt: skip
LAUGHS = "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
MAPS = "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{{', '.join(f'k{i}: *{chr(97 + n)}' for i in range(9))}}}\n"
    for n in range(12)
)


def place(content: bytes, rng: random.Random) -> int:
    """Somewhere in a file; often at one of its ends, where formats describe themselves."""
    size = max(1, len(content))
    where = rng.random()
    if where < 0.35:
        return rng.randrange(min(size, 700))
    return size - 1 - rng.randrange(min(size, 700)) if where < 0.55 else rng.randrange(size)


def flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if found else 0):
        found[place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(found)


def overwritten(content: bytes, rng: random.Random) -> bytes:
    """Numbers of another size in place of those that were there, often where words begin."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = rng.choice((1, 2, 4, 4, 8))
        at = place(content, rng)
        at -= at % size * (rng.random() < 0.8)
        value = rng.choice((*NUMBERS, rng.randrange(300))) % 256**size
        found[at : at + size] = value.to_bytes(size, rng.choice(("little", "little", "big")))
    return bytes(found)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: place(content, rng)]


def moved(content: bytes, rng: random.Random) -> bytes:
    """A block left out, repeated, or copied to another place."""
    start, size = place(content, rng), rng.choice((1, 4, 8, 64, 512, 5000))
    block, rest = content[start : start + size], content[start + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start] + rest
    if kind == 1:
        return content[:start] + block * rng.choice((2, 3, 20)) + rest
    at = place(content, rng)
    after = at if kind == 2 else at + len(block)
    return content[:at] + block + content[after:]


def noisy(content: bytes, rng: random.Random) -> bytes:
    start, size = place(content, rng), rng.choice((1, 8, 64, 1000))
    return content[:start] + rng.randbytes(size) + content[start + size :]


def any_bytes(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kinds = (flipped, flipped, overwritten, overwritten, overwritten, cut, moved, noisy)
        content = rng.choice(kinds)(content, rng)
    return content


def text(content: bytes, rng: random.Random) -> bytes:
    """Words of a text put in place of others, and some of its lines moved."""
    if rng.random() < 0.15:
        return any_bytes(content, rng)
    found = content.decode("utf-8", "replace")
    if rng.random() < 0.04:
        laughs = "a: &a [x]\n" + LAUGHS if rng.random() < 0.5 else "a: &a {x: 1}\n" + MAPS
        return (laughs + found if rng.random() < 0.5 else found + laughs).encode()
    for _ in range(rng.choice((1, 1, 2, 5))):
        words = [m.span() for m in re.finditer(r"[\w.+/-]+|[^\w\s]", found)]
        if not words:
            break
        start, end = rng.choice(words)
        kind = rng.randrange(5)
        if kind < 3:
            word = rng.choice(WORDS)
        elif kind == 3:
            word = found[slice(*rng.choice(words))]
        else:
            word = ""
        if len(found) + len(word) < 2_000_000:
            found = found[:start] + word + found[end:]
    if rng.random() < 0.2:
        lines = found.split("\n")
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        found = "\n".join(lines)
    return found.encode("utf-8", "replace")


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, 2**31, 2**63, "", "x", "..",
    "../../x", "k" * 1000, "\0", [], {}, [1], [[]], {"a": 1}, [None] * 3, "日本", -(2**63), 10**9,
)  # fmt: skip


def changed_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced, left out, repeated or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        found = dict(value)
        kind = rng.random()
        if kind < 0.75:
            found[key] = changed_value(value[key], rng)
        elif kind < 0.85:
            del found[key]
        else:
            name = rng.choice(["", "x", key * 2, "\0", *map(str, value)])
            found[name] = found.pop(key) if kind < 0.93 else found[key]
        return found
    if isinstance(value, list) and value and rng.random() < 0.9:
        found_list = list(value)
        at, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.8:
            found_list[at] = changed_value(value[at], rng)
        elif kind < 0.9:
            del found_list[at]
        else:
            found_list.insert(at, value[at])
        return found_list
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, *NUMBERS))
    return rng.choice(VALUES)


def json_text(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return text(content, rng)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        value = changed_value(value, rng)
    return json.dumps(value).encode()


def json_lines(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return text(content, rng)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_text(lines[at], rng).replace(b"\n", b" ")
    return b"\n".join(lines)


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """Its header is JSON behind its own size; in it, texts of other formats."""
    if rng.random() < 0.5:
        return any_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    about = header.get("__metadata__", {})
    inner = rng.choice([None, *sorted(about)])
    if inner is not None and rng.random() < 0.7:
        mutate = json_text if about[inner].startswith("{") else text
        about[inner] = mutate(about[inner].encode(), rng).decode("utf-8", "replace")
        found = json.dumps(header).encode()
    else:
        found = json_text(json.dumps(header).encode(), rng)
    said = len(found) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", said) + found + content[8 + size :]


def npy(content: bytes, rng: random.Random) -> bytes:
    """Another shape, type or order in the header of an array."""
    if rng.random() < 0.5:
        return any_bytes(content, rng)
    size = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + size].decode("latin-1")
    kind = rng.randrange(4)
    if kind == 0:
        shape = [
            rng.choice((0, 1, -1, 3, 2**20, 2**31, 2**40, 2**63)) for _ in range(rng.randrange(5))
        ]
        header = re.sub(r"\(.*?\)", repr(tuple(shape)), header)
    elif kind == 1:
        types = (
            "|O",
            "<f8",
            ">i2",
            "|b1",
            "<U9",
            "|S0",
            "<c16",
            "<M8[s]",
            "|V8",
            "<f2",
            "[('a', 'O')]",
        )
        header = re.sub(r"'[<>|]\w+'", repr(rng.choice(types)), header)
    elif kind == 2:
        header = header.replace("False", "True")
    else:
        header = text(header.encode(), rng).decode("utf-8", "replace")[:20_000]
    said = header.encode()
    return content[:8] + struct.pack("<H", len(said)) + said + content[10 + size :]


@cache
def bomb(name: str, megabytes: int = 1200) -> bytes:
    """An archive with one member, which is a thousand times as large: an array of zeros."""
    file, head = io.BytesIO(), io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (megabytes * 2**20, 1)}
    np.lib.format.write_array_header_1_0(head, about)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        new.writestr(name, head.getvalue() + bytes(megabytes * 2**20))
    return file.getvalue()


def archive(content: bytes, rng: random.Random) -> bytes:
    """A member changed, renamed, left out or repeated in an archive that is whole again."""
    if rng.random() < 0.4 or content[:2] != b"PK":  # torch has files of another kind
        return any_bytes(content, rng)
    if rng.random() < 0.005:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            return bomb(rng.choice(old.namelist()))
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = rng.choice(old.namelist())
        kind = rng.random()
        for name in old.namelist():
            inside = old.read(name)
            if name != chosen:
                new.writestr(name, inside)
            elif kind < 0.8:
                mutate = npy if name.endswith(".npy") and len(inside) > 10 else any_bytes
                new.writestr(name, mutate(inside, rng))
            elif kind < 0.9:
                new.writestr(
                    rng.choice(("x", "../x.npy", "/tmp/x", "bits.npy", "é", name * 2)), inside
                )
    return file.getvalue()


def picture(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.003:
        return large_picture(content[:4])
    return any_bytes(content, rng)


@cache
def large_picture(start: bytes) -> bytes:
    """More pixels than memory should have to hold, of about the same format."""
    file = io.BytesIO()
    kind = {b"\x89PNG": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF"}.get(start, "PNG")
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    Image.new("P", (13_000, 13_000)).save(file, kind, **options)
    return file.getvalue()


def mutation(name: str) -> Mutate:
    """What damages a file of this name."""
    ending = name.rpartition(".")[2]
    return {
        "json": json_text, "jsonl": json_lines, "yaml": text, "csv": text, "tsv": text, "txt": text,
        "safetensors": safetensors, "npy": npy, "npz": archive, "pt": archive, "pth": archive,
        "png": picture, "jpg": picture, "gif": picture, "bmp": picture, "webp": picture,
        "tif": picture,
    }.get(ending, any_bytes)  # fmt: skip
