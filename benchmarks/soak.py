"""Work that goes on for long: does its memory grow, or anything that it holds or writes?

python benchmarks/soak.py page [--minutes 10] [--clients 16]   the search page, many clients at once
python benchmarks/soak.py train [--epochs 2000]                a training run with validation

Both work on the shipped data set in a temporary folder. Exit code 1 where memory, open files or
threads grow beyond what is stated here, or the page gives an answer that it should not.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vhabl.config import CONFIG_DIR
from vhabl.system.files import PROJECT

WARM = 120.0  # seconds until which memory may grow: each of the server's threads keeps some
GROWTH = 32.0  # MiB from then on: pictures come and go
LOG = 1000  # bytes of the page's log, however many requests there are
MORE = 8  # open files or threads beyond those after the warm-up
TOO_LONG = 10 * 2**20 + 1  # bytes of a body
BUSY = 503  # what the page says beyond its limit of requests at once


# -- what a process holds --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a process held at a time."""

    seconds: float
    mib: float  # resident memory
    files: int
    threads: int


@dataclass
class Watch:
    """Samples of a process since the watch was made; `step` takes one more."""

    process: int
    began: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def step(self) -> None:
        found = Path("/proc", str(self.process))
        try:
            status = dict(
                line.split(":", 1) for line in (found / "status").read_text().splitlines()
            )
            held = len(list((found / "fd").iterdir()))
            mib, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
        except (OSError, KeyError):  # it has ended
            return
        self.samples.append(Sample(time.monotonic() - self.began, mib, held, threads))

    def report(self) -> list[str]:
        """Print what was held after the warm-up, and return what grew beyond its bound."""
        warm = [sample for sample in self.samples if sample.seconds >= WARM]
        if len(warm) < 30:
            print(
                f"too short to say what grows: at most {max(s.mib for s in self.samples):.1f} MiB"
            )
            return []
        tenth = max(1, len(warm) // 10)
        middle = (len(warm) - tenth) // 2
        parts = (warm[:tenth], warm[middle : middle + tenth], warm[-tenth:])
        begin, half, end = (float(np.median([s.mib for s in part])) for part in parts)
        slope = np.polyfit([s.seconds for s in warm], [s.mib for s in warm], 1)[0] * 3600
        print(f"resident memory     {begin:.1f} MiB after the warm-up, {half:.1f} in the middle, "
              f"{end:.1f} at the end; most {max(s.mib for s in self.samples):.1f}; "
              f"slope {slope:+.1f} MiB/hour")  # fmt: skip
        wrong = []
        if end - begin > GROWTH:
            wrong.append(f"memory grew by {end - begin:.1f} MiB; at most {GROWTH:g}")
        for name in ("files", "threads"):
            before, after = (max(getattr(s, name) for s in part) for part in (parts[0], parts[2]))
            print(f"{'open ' + name:19s} {before} after the warm-up, {after} at the end")
            if after - before > MORE:
                wrong.append(f"open {name} grew from {before} to {after}; at most {MORE} more")
        return wrong


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def training(method: str, out: Path, *overrides: str) -> list[str]:
    return command(
        "vhabl.train", "--quiet", "--no-table", "--config", str(CONFIG_DIR / f"{method}.yaml"),
        "data=emoji", "codes=none", "device=cpu", f"out={out}", *overrides,
    )  # fmt: skip


# -- the search page -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request and the statuses that are right for it; none: the connection is left in between."""

    kind: str
    right: tuple[int, ...]
    path: str = "/api/search"
    method: str = "GET"
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()


def form(
    fields: dict[str, str], content: bytes | None
) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """A body as a page sends it, and its header."""
    parts = [
        f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if content is not None:
        head = '--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    body = b"".join([*parts, b"--x--\r\n"])
    return body, (("content-type", "multipart/form-data; boundary=x"),)


def picture(draw: random.Random) -> bytes:
    """An upload: one colour and some noise, at most 1,600 pixels on a side."""
    width, height = draw.randrange(64, 1600), draw.randrange(64, 1600)
    colour = tuple(draw.randrange(256) for _ in range(3))
    image = Image.new("RGB", (width, height), colour)
    image.paste(Image.effect_noise((min(width, 64), min(height, 64)), 90).convert("RGB"))
    buffer = io.BytesIO()
    image.save(buffer, draw.choice(["PNG", "JPEG", "WEBP"]))
    return buffer.getvalue()


class Requests:
    """Draws what the page asks, and what it should refuse."""

    def __init__(self, info: dict, ids: Sequence[str]) -> None:
        self.info, self.ids = info, ids
        self.words = ["red fruit", "a happy face", "flag", "dog", "車 house 🏠", "rain " * 40]

    def draw(self, draw: random.Random) -> Asked:
        kinds: list[tuple[Callable[[random.Random], Asked], int]] = [
            (self.text, 30), (self.like, 20), (self.code, 5), (self.shown, 30), (self.upload, 8),
            (self.whole_page, 7), (self.wrong, 20), (self.long_body, 1), (self.left, 6),
        ]  # fmt: skip
        (kind,) = draw.choices([k for k, _ in kinds], [weight for _, weight in kinds])
        return kind(draw)

    def options(self, draw: random.Random) -> dict[str, str]:
        """Code length, mode, filter and so on, as the page's controls have them."""
        mode = draw.choice(self.info["modes"])
        name = draw.choice(self.info["class_names"])
        where = draw.choice(["", f"label = '{name}'", f"not (label in ('{name}', 'Flags'))"])
        lengths = [str(n) for n in self.info["lengths"]] if mode in ("exact", "prefix") else []
        chosen = {"mode": mode, "top": str(draw.choice([1, 20, 200])), "where": where}
        chosen |= {"bits": draw.choice(lengths)} if lengths else {}
        return chosen | ({"expect": name} if draw.random() < 0.3 else {})

    def get(self, kind: str, right: int, path: str = "/api/search", **query: str) -> Asked:
        return Asked(kind, (right,), f"{path}?{urllib.parse.urlencode(query)}")

    def text(self, draw: random.Random) -> Asked:
        return self.get("text", 200, text=draw.choice(self.words), **self.options(draw))

    def like(self, draw: random.Random) -> Asked:
        return self.get("like", 200, like=draw.choice(self.ids), **self.options(draw))

    def code(self, draw: random.Random) -> Asked:
        digits = draw.randbytes(-(-max(self.info["lengths"]) // 8)).hex()
        return self.get("code", 200, code=digits, own="fused", **self.options(draw))

    def shown(self, draw: random.Random) -> Asked:
        return self.get("picture", 200, "/image", id=draw.choice(self.ids))

    def whole_page(self, draw: random.Random) -> Asked:
        paths = ("/", "/page.css", "/page.js", "/api/info", "/api/items")
        return Asked("page", (200,), draw.choice(paths))

    def upload(self, draw: random.Random) -> Asked:
        fields = self.options(draw) | ({"text": "red"} if draw.random() < 0.3 else {})
        return Asked("upload", (200,), "/api/search", "POST", *form(fields, picture(draw)))

    def wrong(self, draw: random.Random) -> Asked:
        get, many = self.get, "x" * 5000
        broken, header = form({"top": "5"}, picture(draw)[: draw.randrange(200)])
        no_file, _ = form({"top": "5"}, None)
        return draw.choice([
            get("wrong", 422),
            get("wrong", 422, text="red", mode="psychic"),
            get("wrong", 422, text="red", bits="many"),
            get("wrong", 422, text="red", bits="100000"),
            get("wrong", 422, text="red", top="0"),
            get("wrong", 422, text="red", where="label = 'nothing of the kind'"),
            get("wrong", 422, text=many),
            get("wrong", 422, like="no such item"),
            get("wrong", 422, code="zz"),
            get("wrong", 422, text="red", like=self.ids[0]),
            get("wrong", 422, "/image", id="../../etc/passwd"),
            get("wrong", 422, "/image"),
            get("wrong", 404, "/nothing"),
            Asked("wrong", (405,), "/api/info", "DELETE"),
            Asked("wrong", (400,), "/api/info", headers=(("host", "elsewhere.example"),)),
            Asked("wrong", (422,), "/api/search", "POST", broken, header),
            Asked("wrong", (422,), "/api/search", "POST", no_file, header),
            Asked("wrong", (400, 422), "/api/search", "POST", draw.randbytes(300), header),
            Asked("wrong", (422,), "/api/search", "POST", b'{"text": "red"}'),
        ])  # fmt: skip

    def long_body(self, draw: random.Random) -> Asked:
        return Asked("too long", (413,), "/api/search", "POST", b"x" * TOO_LONG)

    def left(self, draw: random.Random) -> Asked:
        body, header = form({}, picture(draw))
        some = body[: draw.randrange(len(body))]
        length = (*header, ("content-length", str(len(body))))
        return draw.choice([
            Asked("left", (), "/api/search", "POST", some, length),
            Asked("left", (), f"/image?id={urllib.parse.quote(draw.choice(self.ids))}"),
            Asked("left", (), "/api/search?text=red&top=200"),
            Asked("left", (), "no path\x00 and no HTTP"),
        ])  # fmt: skip


class Client(threading.Thread):
    """One after another, requests over a connection that is kept, until the end."""

    def __init__(self, port: int, requests: Requests, seed: int, end: float) -> None:
        super().__init__()
        self.port, self.requests, self.end = port, requests, end
        self.random = random.Random(seed)
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.unexpected: Counter[str] = Counter()

    def run(self) -> None:
        connection = self.connect()
        while time.monotonic() < self.end:
            asked = self.requests.draw(self.random)
            if not asked.right:
                self.leave(asked)
                continue
            try:
                connection.request(asked.method, asked.path, asked.body, dict(asked.headers))
                answer = connection.getresponse()
                content, status = answer.read(), answer.status
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                connection = self.connect()
                # It does not read a body that is too long to its end, and may have hung up.
                status, content = 0, repr(error).encode()
                if asked.kind == "too long" and isinstance(error, ConnectionError):
                    status = 413
            self.statuses[asked.kind, status] += 1
            if status not in (*asked.right, BUSY):
                said = content[:150].decode("utf-8", "replace")
                self.unexpected[f"{status} to {asked.method} {asked.path[:80]}: {said}"] += 1
        connection.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def leave(self, asked: Asked) -> None:
        """Hang up in the midst of a request or before its answer."""
        headers = {"host": "127.0.0.1", **dict(asked.headers)}
        lines = [f"{asked.method} {asked.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        sent = "\r\n".join([*lines, "", ""]).encode() + (asked.body or b"")
        try:
            with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
                connection.sendall(sent)
        except OSError as error:
            self.unexpected[f"no connection: {error!r}"] += 1
        self.statuses[asked.kind, 0] += 1


def soak_page(folder: Path, minutes: float, clients: int) -> list[str]:
    """Serve an index as a user does, ask it for so long, and return what went wrong."""
    run, index, log = folder / "run", folder / "index", folder / "stderr"
    serving = "model.net.modality_dropout=0.1"  # a text or a picture alone
    subprocess.run(training("hiamh", run, "epochs=3", serving), check=True, cwd=PROJECT)
    subprocess.run(
        command("vhabl.search", "build", "--checkpoint", str(run), "--out", str(index),
                "--graph", "hnsw", "--quiet"),
        check=True, cwd=PROJECT,
    )  # fmt: skip
    with log.open("wb") as errors:
        server = subprocess.Popen(
            command("vhabl.search", "serve", str(index), "--port", "0"),
            stdout=subprocess.PIPE, stderr=errors, text=True, cwd=PROJECT,
        )  # fmt: skip
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("/")[2].split(":")[1])
        base = f"http://127.0.0.1:{port}/api"
        with urllib.request.urlopen(f"{base}/info", timeout=60) as answer:
            info = json.load(answer)
        with urllib.request.urlopen(f"{base}/items", timeout=60) as answer:
            ids = [item["id"] for item in json.load(answer)]
        watch = Watch(server.pid)
        end = time.monotonic() + 60 * minutes
        requests = Requests(info, ids)
        asking = [Client(port, requests, number, end) for number in range(clients)]
        for client in asking:
            client.start()
        while time.monotonic() < end:
            watch.step()
            time.sleep(min(2.0, 0.6 * minutes))
        for client in asking:
            client.join()
        watch.step()
        seconds = time.monotonic() - watch.began
    finally:
        server.terminate()
        said = (server.communicate(timeout=60)[0] or "").encode() + log.read_bytes()
    statuses = sum((client.statuses for client in asking), Counter[tuple[str, int]]())
    unexpected = sum((client.unexpected for client in asking), Counter[str]())
    count = statuses.total()
    print(f"requests            {count:,} of {clients} clients in {seconds:.0f} s, "
          f"{count / seconds:.1f}/s")  # fmt: skip
    for (kind, status), number in sorted(statuses.items()):
        print(f"  {kind:10s} {status or 'left':>5} {number:9,}")
    print(f"written to the log  {len(said):,} bytes")
    wrong = watch.report()
    if len(said) > LOG:
        wrong.append(f"a log of {len(said):,} bytes, such as {said[-300:]!r}; at most {LOG:,}")
    return wrong + [f"{number} x {text}" for text, number in unexpected.most_common(20)]


# -- training --------------------------------------------------------------------------------------


def soak_train(folder: Path, epochs: int) -> list[str]:
    """Train for so many epochs of each phase, and return what grew."""
    run, sizes = folder / "run", []
    process = subprocess.Popen(
        training("nested_mlp", run, f"epochs={epochs}", "validation.fraction=0.1",
                 "validation.every=10", "validation.patience=0", "batch_size=256", "model.dim=32"),
        cwd=PROJECT,
    )  # fmt: skip
    watch = Watch(process.pid)
    while process.poll() is None:
        watch.step()
        state = run / "state.pt"
        if state.exists():
            sizes.append(state.stat().st_size)
        time.sleep(0.5)
    if process.returncode:
        return [f"training ended with {process.returncode}"]
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    rows = len(history)
    selected = sum(row["phase"] == "select" for row in history)
    events = [p.stat().st_size for p in (run / "tensorboard").rglob("events*")]
    print(f"epochs              {selected:,} to select, {rows - selected:,} final, "
          f"{watch.samples[-1].seconds:.0f} s")  # fmt: skip
    written = {"history.json": (run / "history.json").stat().st_size, "tensorboard": sum(events)}
    written["state.pt"] = max(sizes)
    for name, size in written.items():
        first = min(sizes) if name == "state.pt" else 0
        print(f"{name:19s} {size / 1024:,.0f} KiB, {(size - first) / rows:.0f} bytes an epoch"
              + f" beyond the first {first / 1024:,.0f} KiB" * bool(first))  # fmt: skip
    return watch.report()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    page = commands.add_parser("page", help="the search page")
    page.add_argument("--minutes", type=float, default=10, metavar="N", help="[10]")
    page.add_argument("--clients", type=int, default=16, metavar="N", help="[16]")
    train = commands.add_parser("train", help="a training run")
    train.add_argument("--epochs", type=int, default=2000, metavar="N", help="[2000]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "page":
            wrong = soak_page(folder, given.minutes, given.clients)
        else:
            wrong = soak_train(folder, given.epochs)
    for text in wrong:
        print(f"wrong: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
