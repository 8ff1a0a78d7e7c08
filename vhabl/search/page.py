"""The search page and the JSON endpoint behind it.

python -m vhabl.search serve INDEX [--port 8000] [--host 127.0.0.1] [--allow-host NAME]

GET  /api/info     what is shown: run, data, code lengths, modes, labels
GET  /api/search   text=, or like= (an item's id), or code= and own= (a code in hexadecimal digits)
POST /api/search   the same as a form, with a file `image`
GET  /api/items    a few items to begin with
GET  /image        id= of an item: its picture, at most 512 pixels wide and high

All take top, bits, mode, where, against, and `expect`, the name of a class that the found items
should have. An answer is JSON; one to a wrong request has status 4xx and `error`. Pictures are read
from where the index says, never from a path of a request; an upload is never written.
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import uvicorn
from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from vhabl.data.images import FORMATS, open_image
from vhabl.search.engine import Hit, Mode
from vhabl.search.index import Index
from vhabl.system.errors import VhablError, bad_value, fail

WEB = Path(__file__).parent / "web"
LOCAL = ("127.0.0.1", "localhost")
BODY = 10 * 2**20  # bytes of a request
PIXELS = 40_000_000  # of an uploaded picture
TOP = 200  # items of an answer
TEXT = 4000  # characters of a query
SHOWN = 512  # pixels of a picture's longer side
BEGIN = 24  # items to begin with
AT_ONCE = 64  # requests; others are told to come back
PATIENCE = 30  # seconds that a connection may be idle, a body take, and a request wait its turn
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Page:
    """What the page asks of an index, one request after another: the model and the scans are not
    made for several threads, and use all cores alone.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.lock = threading.Lock()
        index.model  # noqa: B018 - a run that is gone is said before anything is served

    def info(self) -> dict[str, Any]:
        engine, meta = self.index.engine, self.index.engine.meta
        method = self.index.model.method
        lengths = [engine.bits]
        if meta["any_length"] and engine.prefixes:
            powers = (2**n for n in range(3, int(math.log2(engine.bits)) + 1))
            lengths = sorted({*powers, engine.bits})
        raw = self.index.model.run.config.data.kind != "features"
        return {
            "index": engine.folder.resolve().name,
            "items": len(engine),
            "data": meta["data"],
            "method": meta["method"],
            "run": meta["run"],
            "views": engine.views,
            "lengths": lengths,
            "modes": list(engine.modes),
            "recall": meta.get("recall", {}),
            "class_names": engine.class_names,
            "raw": raw,
            "together": meta["task"] == "fused",
            "alone": meta["task"] == "cross" or method.stand_in is not None,
            "limits": {"bytes": BODY, "pixels": PIXELS, "top": TOP, "formats": list(FORMATS)},
        }

    def search(
        self,
        text: str | None,
        image: Image.Image | None,
        like: str | None,
        code: str | None,
        own: str,
        top: int,
        bits: int | None,
        mode: Mode,
        where: str,
        against: str,
        expect: str,
    ) -> dict[str, Any]:
        """An answer as JSON has it. Raises VhablError for what cannot be asked."""
        started = time.perf_counter()
        names = self.index.engine.class_names
        if top > TOP:
            bad_value("top", top, f"at most {TOP}")
        if expect and expect not in names:
            bad_value("expect", repr(expect), "the name of a class of the index")
        if sum(given is not None for given in (like, code)) + bool(text or image) > 1:
            fail("query", "several of a text or picture, an item and a code", "Give one of them")
        with self._turn():
            bits = self.index.check(top, bits, mode)
            wanted = {expect} if expect else set()
            features, unknown = None, list[str]()
            if like is not None:
                view = self.index.view("", against)
                item, codes = self.index.engine.item(like)
                packed, wanted = codes[view][None], wanted or set(item.labels)
            elif code is not None:
                view, packed = self.index.view(own, against), self._code(code)
            else:
                own, asked = self.index.encode_query(text or None, image)
                if text and image is None:
                    unknown = self.index.model.unknown_words(text)
                view = self.index.view(own, against)
                packed, features = asked.codes[own], asked.features.get(own)
            hits = self.index.find(view, packed, top, bits, mode, where, features)[0]
        if like is not None:
            link = {"like": like}
        elif image is None and text:
            link = {"text": text}
        else:
            link = {"code": packed[0].tobytes().hex(), "own": own}
        return {
            "query": link,
            "against": view,
            "bits": bits,
            "mode": mode,
            "unknown": unknown,
            "seconds": time.perf_counter() - started,
            "hits": [self._shown(hit, wanted) for hit in hits],
        }

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The index for this request alone, once those before it are done."""
        if not self.lock.acquire(timeout=PATIENCE):
            said = f"server: others were at work for {PATIENCE} seconds. Send fewer requests"
            raise HTTPException(503, said)
        try:
            yield
        finally:
            self.lock.release()

    def _code(self, digits: str) -> np.ndarray:
        bits = self.index.engine.bits
        try:
            packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
        except ValueError:
            packed = np.zeros(0, np.uint8)
        if len(packed) != math.ceil(bits / 8):
            bad_value("code", f"{digits[:40]!r}", f"{bits} bits in hexadecimal digits")
        return packed[None]

    def items(self) -> list[dict[str, Any]]:
        with self._turn():
            return [self._shown(hit, set()) for hit in self.index.engine.some(BEGIN)]

    @staticmethod
    def _shown(hit: Hit, wanted: set[str]) -> dict[str, Any]:
        """A hit without its path; `match`: whether it has a wanted class, null where none is."""
        found = hit.as_dict()
        found["picture"] = bool(found.pop("image"))
        found["match"] = bool(wanted & set(hit.labels)) if wanted else None
        return found

    def picture(self, identity: str) -> tuple[bytes, str]:
        """The picture of an item, made small, and its type. Raises VhablError where it has none."""
        with self._turn():
            hit, _ = self.index.engine.item(identity)
        if not hit.image:
            fail(f"id {identity}", "the item has no picture", "Choose another one")
        try:
            with Image.open(hit.image, formats=FORMATS) as opened:
                clear = opened.has_transparency_data
                image = (
                    ImageOps.exif_transpose(opened).convert("RGBA")
                    if clear
                    else open_image(Path(hit.image))
                )
            image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            fail(f"picture of {identity}", "the file is gone or damaged", "Put it back")
        buffer = io.BytesIO()
        kind, options = (
            ("PNG", {}) if clear or max(image.size) <= 128 else ("JPEG", {"quality": 90})
        )
        image.save(buffer, kind, **options)
        return buffer.getvalue(), f"image/{kind.lower()}"


def uploaded(content: bytes) -> Image.Image:
    """The picture of an upload. Raises VhablError where it is none, or has too many pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # damaged bytes raise many types
        fail("upload", "this is no picture", f"Send one of {', '.join(FORMATS)}")
    if width * height > PIXELS:
        fail("upload", f"{width:,} x {height:,} pixels", f"Send at most {PIXELS:,} pixels")
    return open_image(io.BytesIO(content), "upload")


class Limits:
    """Refuses bodies that are too long or too slow, and requests beyond those that are at work."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, over = 0, False
        until: float | None = asyncio.get_running_loop().time() + PATIENCE

        async def end(status: int, message: str) -> NoReturn:
            nonlocal over
            if not over:
                await refuse(status, message)(scope, receive, sent)
            over = True
            raise Refused

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen, until
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                await end(
                    408, f"request: its body was not whole within {PATIENCE} seconds. Send it again"
                )
            seen += len(message.get("body", b""))
            if seen > BODY:
                said = f"request: its body is too long. Send at most {BODY:,} bytes"
                await end(413, said)
            if not message.get("more_body"):  # what comes then is the end of the connection
                until = None
            return message

        async def sent(message: MutableMapping[str, Any]) -> None:
            if over:  # it was answered
                return
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())
                ]  # fmt: skip
            await send(message)

        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > BODY:
            size = said[:20].decode("latin-1")
            message = f"request: its body has {size} bytes. Send at most {BODY:,}"
            await refuse(413, message)(scope, receive, sent)
            return
        if self.at_work >= AT_ONCE:
            await refuse(503, "server: too many requests at once. Send fewer")(scope, receive, sent)
            return
        self.at_work += 1
        try:
            await self.app(scope, counted, sent)
        except Refused:
            pass
        finally:
            self.at_work -= 1


class Refused(Exception):
    """A request that was answered before its body was read."""


class Connection(H11Protocol):
    """A connection that is closed where no request is at work and none begins: uvicorn waits for
    the first one, and for the rest of one that has begun, for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._look, None)

    def _look(self, last: object) -> None:
        """last: the request that was at work, or the last one, when this was looked at before."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is last:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(PATIENCE, self._look, self.cycle)


def refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def make_app(index: Index, hosts: tuple[str, ...] = LOCAL) -> FastAPI:
    """The application of a page. hosts: names that a request may call it by. Raises VhablError
    where the run of the index is gone.
    """
    page = Page(index)
    app = FastAPI(title="vhabl", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Limits)

    @app.exception_handler(VhablError)
    def wrong(_: Request, error: VhablError) -> JSONResponse:
        return refuse(422, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "request"
        return refuse(422, f"{where} is {str(first.get('input'))[:80]!r}. {first['msg']}")

    @app.exception_handler(HTTPException)
    def other(_: Request, error: HTTPException) -> JSONResponse:
        return refuse(error.status_code, str(error.detail))

    @app.get("/")
    def start() -> FileResponse:
        return FileResponse(WEB / "page.html")

    @app.get("/page.css")
    def style() -> FileResponse:
        return FileResponse(WEB / "page.css")

    @app.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(WEB / "page.js", media_type="text/javascript")

    @app.get("/api/info")
    def info() -> dict[str, Any]:
        return page.info()

    @app.get("/api/items")
    def items() -> list[dict[str, Any]]:
        return page.items()

    @app.get("/api/search")
    def search(
        text: Annotated[str | None, Query(max_length=TEXT)] = None,
        like: Annotated[str | None, Query(max_length=TEXT)] = None,
        code: Annotated[str | None, Query(max_length=TEXT)] = None,
        own: str = "",
        top: int = 20,
        bits: int | None = None,
        mode: str = "exact",
        where: Annotated[str, Query(max_length=TEXT)] = "",
        against: str = "",
        expect: str = "",
    ) -> dict[str, Any]:
        return page.search(
            text, None, like, code, own, top, bits, mode, where, against, expect  # type: ignore[arg-type]
        )  # fmt: skip

    @app.post("/api/search")
    def search_by_picture(
        image: Annotated[UploadFile, File()],
        text: Annotated[str | None, Form(max_length=TEXT)] = None,
        top: Annotated[int, Form()] = 20,
        bits: Annotated[int | None, Form()] = None,
        mode: Annotated[str, Form()] = "exact",
        where: Annotated[str, Form(max_length=TEXT)] = "",
        against: Annotated[str, Form()] = "",
        expect: Annotated[str, Form()] = "",
    ) -> dict[str, Any]:
        picture = uploaded(image.file.read())
        return page.search(
            text, picture, None, None, "", top, bits, mode, where, against, expect  # type: ignore[arg-type]
        )  # fmt: skip

    @app.get("/image")
    def image(id: str) -> Response:
        content, kind = page.picture(id)
        return Response(content, media_type=kind, headers={"cache-control": "max-age=3600"})

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises VhablError where the port is in use, or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        refuse_port(host, port, error)
    return found


def refuse_port(host: str, port: int, error: Exception) -> NoReturn:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    fail(f"port {port} of {host}", said.lower(), "Choose a free one with --port")


def server(index: Index, hosts: tuple[str, ...] = LOCAL) -> uvicorn.Server:
    # What a client does wrong is answered, not written: else anyone could fill the disk with it.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(index, hosts), log_level="error", timeout_keep_alive=PATIENCE,
        server_header=False, http=Connection,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(index: Index, host: str, port: int, allowed: list[str]) -> None:
    """Serve a page until it is interrupted. Raises VhablError where the port is in use."""
    with listen(host, port) as listening:
        ready = server(index, tuple(dict.fromkeys([*LOCAL, host, *allowed])))
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        ready.run(sockets=[listening])
