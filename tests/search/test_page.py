"""The search page: its endpoints over a real connection, and itself in a browser."""

from __future__ import annotations

import http.client
import io
import json
import logging
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import COLOURS, pair_config, write_pair_folder
from PIL import Image
from starlette.exceptions import HTTPException

from vhabl import train
from vhabl.codes import pack
from vhabl.data import load as load_data
from vhabl.search import Index, __main__, page
from vhabl.system import errors
from vhabl.system.errors import VhablError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def served(index: Index) -> Iterator[str]:
    listening = page.listen("127.0.0.1", 0)
    server = page.server(index)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("page") / "pairs").parent


def trained(root: Path, method: str, *more: str) -> str:
    out = str(root / f"run_{method}")
    config = pair_config(
        root / "pairs", method, "encoder.name=features", "data.min_count=1",
        "validation.fraction=0", "epochs=40", f"out={out}", *more,
    )  # fmt: skip
    train.train(config, load_data(config.data, config.encoder), progress_bar=False)
    return out


@pytest.fixture(scope="module")
def index(root: Path) -> Index:
    run = trained(root, "nested_mlp", "model.modality_dropout=0.2")
    return Index.build(root / "index", run, graphs=["hnsw"])


@pytest.fixture(scope="module")
def base(index: Index) -> Iterator[str]:
    yield from served(Index.open(index.engine.folder))


@pytest.fixture(scope="module")
def cross(root: Path) -> Index:
    return Index.build(root / "cross", trained(root, "hq", "model.centres=16"), bits=16)


@pytest.fixture(scope="module")
def cross_base(cross: Index) -> Iterator[str]:
    yield from served(cross)


def get(base: str, path: str, **query: Any) -> Any:
    """The answer of a GET as JSON."""
    asked = urllib.parse.urlencode(query)
    with urllib.request.urlopen(f"{base}{path}?{asked}") as answer:
        return json.load(answer)


def refused(base: str, path: str, **query: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(base, path, **query)
    return raised.value.code, json.load(raised.value)["error"]


def post(base: str, content: bytes, name: str = "a.png", **fields: Any) -> tuple[int, Any]:
    """An upload: status and JSON."""
    parts = [
        f'--x\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
    ]
    head = f'--x\r\ncontent-disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    body = b"".join([*parts, head.encode(), content, b"\r\n--x--\r\n"])
    asked = urllib.request.Request(
        f"{base}/api/search", body, {"content-type": "multipart/form-data; boundary=x"}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def shown(hits: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(hit["id"], hit["distance"]) for hit in hits]


def test_what_a_client_does_wrong_is_not_written(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Else anyone could fill the disk with a log."""
    header = {"content-type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(f"{base}/api/search", b"no form", header))
    assert raised.value.code == 400 and not caplog.records
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.WARNING)


# -- endpoints -------------------------------------------------------------------------------------


def test_it_says_what_is_shown(base: str, index: Index) -> None:
    info = get(base, "/api/info")
    assert info["items"] == 60 and info["method"] == "Nested MLP" and info["data"] == "emoji"
    assert info["run"] == index.engine.meta["run"] and info["class_names"] == list(COLOURS)
    assert info["lengths"] == [8, 16] and info["modes"] == ["exact", "prefix", "hnsw"]
    assert info["recall"]["fused"]["hnsw"]["recall"] >= 0.99 and info["raw"] and info["alone"]
    begin = get(base, "/api/items")
    assert len({item["id"] for item in begin}) == page.BEGIN and begin[0]["match"] is None


def test_answers_are_those_of_the_index(base: str, index: Index) -> None:
    for given in (
        {"text": "a red picture"},
        {"text": "a red picture", "bits": 8, "top": 7, "mode": "prefix"},
        {"text": "a red picture", "mode": "hnsw"},
        {"text": "a red picture", "where": "label != 'red'"},
        {"like": index.engine.some(3)[1].id},
    ):
        found = get(base, "/api/search", **given)
        hits = index.search(**({"top": 20} | given))
        assert shown(found["hits"]) == [(h.id, h.distance) for h in hits]
        assert found["bits"] == given.get("bits", 16) and found["mode"] == given.get(
            "mode", "exact"
        )
        assert [(h["caption"], tuple(h["labels"])) for h in found["hits"]] == [
            (h.caption, h.labels) for h in hits
        ]
        assert all(h["picture"] and "image" not in h and str(h["id"]) for h in found["hits"])
        assert found["unknown"] == []
    assert get(base, "/api/search", text="a red zyzzyva")["unknown"] == ["zyzzyva"]


def test_matches_are_marked_where_labels_are_known(base: str, index: Index) -> None:
    free = get(base, "/api/search", text="a red picture")["hits"]
    assert {hit["match"] for hit in free} == {None}
    marked = get(base, "/api/search", text="a red picture", expect="blue", top=60)["hits"]
    assert [hit["match"] for hit in marked] == [hit["labels"] == ["blue"] for hit in marked]
    assert 0 < sum(hit["match"] for hit in marked) < 60
    item = index.engine.some(3)[1]
    like = get(base, "/api/search", like=item.id, top=60)["hits"]
    assert [hit["match"] for hit in like] == [hit["labels"] == list(item.labels) for hit in like]


def test_an_upload_and_the_code_that_repeats_it(base: str, index: Index, root: Path) -> None:
    file = root / "pairs" / "images" / "4.png"
    for fields in ({}, {"text": "a red picture"}, {"top": 5, "bits": 8, "where": "label = 'red'"}):
        status, found = post(base, file.read_bytes(), **fields)
        hits = index.search(image=file, **({"top": 20} | fields))
        assert status == 200 and shown(found["hits"]) == [(h.id, h.distance) for h in hits]
        code = index.model.encode([file], [fields["text"]] if "text" in fields else None)["fused"]
        assert found["query"] == {"code": pack(code)[0].tobytes().hex(), "own": "fused"}
        rest = {k: v for k, v in fields.items() if k != "text"}
        again = get(base, "/api/search", **found["query"], **rest)
        assert shown(again["hits"]) == shown(found["hits"])


def test_a_cross_modal_page(cross_base: str, cross: Index, root: Path) -> None:
    info = get(cross_base, "/api/info")
    assert info["modes"] == ["exact", "prefix", "two-stage"] and not info["together"]
    found = get(cross_base, "/api/search", text="a red picture", mode="two-stage")
    hits = cross.search(text="a red picture", mode="two-stage", top=20)
    assert [h["score"] for h in found["hits"]] == pytest.approx([h.score for h in hits])
    assert found["against"] == "image"
    file = root / "pairs" / "images" / "4.png"
    status, found = post(cross_base, file.read_bytes(), mode="two-stage")
    assert status == 200 and found["against"] == "text" and found["query"]["own"] == "image"
    again = get(cross_base, "/api/search", **found["query"])
    assert again["against"] == "text"
    assert post(cross_base, file.read_bytes(), text="a")[0] == 422
    said = refused(cross_base, "/api/search", **found["query"], mode="two-stage")
    assert said == (422, "mode two-stage: a code has no features. Give a text or an image")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "query: neither a text nor an image"),
        ({"text": ""}, "query: neither a text nor an image"),
        ({"text": "a", "bits": "x"}, "bits is 'x'"),
        ({"text": "a", "bits": 17}, "bits is 17, but must be a length from 1 to 16"),
        ({"text": "a", "top": 0}, "top is 0, but must be at least 1"),
        ({"text": "a", "top": 10**6}, "top is 1000000, but must be at most 200"),
        ({"text": "a", "mode": "magic"}, "mode is 'magic'"),
        ({"text": "a", "where": "label ="}, "filter 'label =': it cannot be read at its end"),
        ({"text": "a", "expect": "pink"}, "expect is 'pink'"),
        ({"text": "a", "like": "x"}, "query: several"),
        ({"text": "x" * 5000}, "text is "),
        ({"like": "../../etc/passwd"}, "id ../../etc/passwd: no item"),
        ({"code": "zz"}, "code is 'zz', but must be 16 bits"),
        ({"code": "aabbcc"}, "code is 'aabbcc'"),
    ],
)
def test_a_wrong_request_is_one_message(base: str, query: dict[str, Any], message: str) -> None:
    status, said = refused(base, "/api/search", **query)
    assert status == 422 and message in said and "\n" not in said


def test_an_upload_that_is_no_picture(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(width: int, height: int) -> bytes:
        file = io.BytesIO()
        Image.new("1", (width, height)).save(file, "PNG")
        return file.getvalue()

    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    for content, message in (
        (b"", "upload: this is no picture. Send one of JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "upload: this is no picture"),
        (noise.getvalue()[:-900], "upload: the image cannot be read"),
        (png(8000, 8000), "upload: 8,000 x 8,000 pixels. Send at most 40,000,000"),
        (png(10, 5000), "upload: the image cannot be read (10 x 5000 pixels)"),
    ):  # fmt: skip
        status, said = post(base, content, "../../etc/passwd")
        assert (status, said["error"][: len(message)]) == (422, message)
    connection = http.client.HTTPConnection(urllib.parse.urlparse(base).netloc)
    for length in (page.BODY + 1, "many"):
        connection.putrequest("POST", "/api/search")
        connection.putheader("content-length", str(length))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status in (400, 413)
        if length != "many":
            assert json.load(answer)["error"].startswith("request: its body has 10485761 bytes")
        connection.close()


def test_a_body_that_does_not_say_how_long_it_is(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "BODY", 100_000)
    host = urllib.parse.urlparse(base).netloc
    connection = http.client.HTTPConnection(host)
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
    parts = iter([head, *[b"x" * 10_000] * 30])
    connection.request(
        "POST", "/api/search", parts, {"content-type": "multipart/form-data; boundary=x"},
        encode_chunked=True,
    )  # fmt: skip
    answer = connection.getresponse()
    assert answer.status == 413 and "too long" in json.load(answer)["error"]


def connected(base: str, content: bytes) -> socket.socket:
    """A connection on which something was sent, that waits at most 20 seconds for an answer."""
    host, port = urllib.parse.urlparse(base).netloc.split(":")
    found = socket.create_connection((host, int(port)), timeout=20)
    found.sendall(content)
    return found


@pytest.mark.parametrize(
    "content",
    [b"", b"GET /api/info HT", b"GET /api/info HTTP/1.1\r\nhost: localhost\r\n\r\nGET /api/in"],
    ids=["nothing", "the begin of a request", "a request and the begin of another"],
)
def test_a_connection_without_a_request_is_closed(
    base: str, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(page, "PATIENCE", 0.2)
    with connected(base, content) as connection:
        found = b""
        while block := connection.recv(65536):
            found += block
    assert found.count(b"200 OK") == content.count(b"HTTP/1.1")


def test_a_slow_body_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PATIENCE", 0.2)
    head = (
        b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n"
        b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    with connected(base, head) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408 and "not whole" in json.load(answer)["error"]
    assert get(base, "/api/search", text="a")["hits"]


def test_a_request_does_not_wait_for_ever(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = page.Page(index)
    monkeypatch.setattr(page, "PATIENCE", 0.1)
    with asked._turn(), pytest.raises(HTTPException, match=r"others were at work") as refused:
        asked.items()
    assert refused.value.status_code == 503
    assert asked.items()


def test_pictures_come_from_the_index_alone(base: str, index: Index, root: Path) -> None:
    item = index.engine.some(3)[1]
    with urllib.request.urlopen(
        f"{base}/image?{urllib.parse.urlencode({'id': item.id})}"
    ) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        found = Image.open(io.BytesIO(answer.read()))
    with Image.open(item.image) as own:
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(own.convert("RGB")))
    for other in (item.image, f"file://{item.image}", "/etc/passwd", "..%2f", ""):
        assert refused(base, "/image", id=other)[0] == 422
    for path in ("/page/../page.py", "/..%2fpage.py", "/web/page.html", "/index.json", "/nothing"):
        assert refused(base, path)[0] == 404


def test_a_large_photo_is_made_small_and_a_lost_one_is_said(root: Path, index: Index) -> None:
    folder = root / "changed"
    shutil.copytree(index.engine.folder, folder)
    large = root / "large.jpg"
    Image.new("RGB", (1600, 800), "red").save(large)
    clear = root / "clear.png"
    Image.new("RGBA", (300, 200), (255, 0, 0, 0)).save(clear)
    other = Index.open(folder).add([large, clear], ["one", "two"], ["large", "clear"])
    asked = page.Page(other)
    content, kind = asked.picture("large")
    assert kind == "image/jpeg" and Image.open(io.BytesIO(content)).size == (512, 256)
    content, kind = asked.picture("clear")
    assert kind == "image/png" and Image.open(io.BytesIO(content)).getpixel((0, 0))[3] == 0
    large.unlink()
    with pytest.raises(VhablError, match="picture of large: the file is gone or damaged"):
        asked.picture("large")


def test_other_hosts_are_refused(base: str, index: Index) -> None:
    host = urllib.parse.urlparse(base).netloc
    for name, status in ((host, 200), ("localhost", 200), ("evil.example", 400), ("", 400)):
        connection = http.client.HTTPConnection(host)
        connection.putrequest("GET", "/api/info", skip_host=True)
        connection.putheader("host", name)
        connection.endheaders()
        assert connection.getresponse().status == status
    with urllib.request.urlopen(base) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        text = answer.read().decode()
    assert "http://" not in text and "https://" not in text  # it works without a network


def test_a_port_in_use(
    index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["x", "serve", str(index.engine.folder), "--port", port])
        with pytest.raises(SystemExit) as left:
            errors.run(__main__.main)
    assert left.value.code == 2
    said = f"error: port {port} of 127.0.0.1: address already in use. Choose a"
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(VhablError, match="port 70000 of 127"):
        page.listen("127.0.0.1", 70000)


def test_a_page_needs_the_run_of_its_index(index: Index, root: Path) -> None:
    gone = root / "gone"
    shutil.copytree(index.engine.folder, gone)
    file = gone / "index.json"
    file.write_text(file.read_text().replace("run_nested_mlp", "run_gone"))
    with pytest.raises(VhablError, match="run_gone: no such folder"):
        page.make_app(Index.open(gone))


def test_many_at_once_are_answered_or_told_to_come_back(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "AT_ONCE", 2)
    statuses: list[int] = []

    def ask() -> None:
        try:
            get(base, "/api/search", text="a red picture")
            statuses.append(200)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 12 and set(statuses) == {200, 503}
    assert get(base, "/api/search", text="a")["hits"]  # and all is well again


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: {', '.join(BROWSERS)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab; whatever its console says of an error fails the test."""
    found = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    yield found
    found.close()
    # A refused request is told on the console as well; the page says it itself.
    assert [text for text in said if "status of 422" not in text] == []


def captions(tab: Any) -> list[str]:
    return tab.locator(".card .caption").all_inner_texts()


def until(tab: Any, truth: str) -> None:
    """Wait for an expression to be true. (The page's policy forbids the tool's own way.)"""
    end = time.monotonic() + 20
    while not tab.evaluate(truth):
        assert time.monotonic() < end, truth
        time.sleep(0.02)


def answered(tab: Any) -> None:
    until(tab, "document.getElementById('status').textContent.includes(' ms')")
    until(tab, "!document.getElementById('cards').classList.contains('old')")


@pytest.mark.e2e
def test_a_search_by_text_and_its_link(tab: Any, base: str, index: Index) -> None:
    tab.goto(base)
    tab.wait_for_selector(".card")
    assert tab.locator(".card").count() == page.BEGIN
    assert tab.inner_text("h1") == "emoji" and "60 items, codes of" in tab.inner_text("#about")
    assert "True labels were used to train" in tab.inner_text("#footer")
    assert index.engine.meta["run"] in tab.inner_text("#footer")
    tab.fill("#text", "a red picture")
    tab.select_option("#bits", "8")
    tab.press("#text", "Enter")
    answered(tab)
    tab.wait_for_url("**bits=8**")
    hits = index.search(text="a red picture", bits=8, top=20)
    wanted = hits[0].labels[0]
    tab.select_option("#expect", wanted)
    tab.wait_for_url(f"**expect={wanted}**")
    answered(tab)
    assert captions(tab) == [h.caption or h.id for h in hits]
    right = sum(wanted in h.labels for h in hits)
    assert tab.locator(".card.right").count() == right > 0
    assert f"{right} of them match" in tab.inner_text("#status")
    distances = tab.locator(".card .distance").all_inner_texts()
    assert distances == [f"{h.distance} of 8 bits differ" for h in hits]
    shown = tab.locator(".card img").evaluate_all("all => all.map(i => i.naturalWidth)")
    until(tab, "[...document.querySelectorAll('.card img')].slice(0, 6)"
                          ".every(i => i.complete && i.naturalWidth > 0)")  # fmt: skip
    assert len(shown) == 20
    link = tab.get_attribute("#link", "href")
    tab.goto("about:blank")
    tab.goto(link)
    answered(tab)
    assert captions(tab) == [h.caption or h.id for h in hits]
    assert tab.input_value("#text") == "a red picture" and tab.input_value("#bits") == "8"
    tab.select_option("#only", "blue")
    tab.wait_for_url("**where=**")
    answered(tab)
    until(tab, "document.querySelectorAll('.card').length !== 20")
    assert "does not know" not in tab.inner_text("#status")
    tab.go_back()
    until(tab, "document.querySelectorAll('.card').length === 20")


@pytest.mark.e2e
def test_words_that_the_model_does_not_know_are_said(tab: Any, base: str) -> None:
    tab.goto(base)
    tab.fill("#text", "a red zyzzyva")
    tab.press("#text", "Enter")
    until(tab, "document.getElementById('status').textContent"
                          ".includes('The model does not know: zyzzyva.')")  # fmt: skip


@pytest.mark.e2e
def test_an_upload_in_the_browser(tab: Any, base: str, index: Index, root: Path) -> None:
    file = root / "pairs" / "images" / "4.png"
    tab.goto(base)
    tab.wait_for_selector(".card")
    tab.set_input_files("#image", str(file))
    answered(tab)
    hits = index.search(image=file, top=20)
    assert captions(tab) == [h.caption or h.id for h in hits]
    assert tab.inner_text("#chosen-name") == "4.png"
    tab.wait_for_url("**code=**")
    tab.goto(base)
    tab.wait_for_selector(".card")
    dropped = tab.evaluate_handle(
        """bytes => { const data = new DataTransfer();
                      data.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
                      return data; }""",
        list(file.read_bytes()),
    )
    tab.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    answered(tab)
    assert tab.inner_text("#chosen-name") == "dropped.png"
    assert captions(tab) == [h.caption or h.id for h in hits]
    tab.wait_for_url("**code=**")
    tab.goto(tab.url)
    answered(tab)
    assert captions(tab) == [h.caption or h.id for h in hits]
    broken = root / "broken.png"
    broken.write_bytes(b"no picture")
    tab.set_input_files("#image", str(broken))
    tab.wait_for_selector("#error:not([hidden])")
    assert "upload: this is no picture" in tab.inner_text("#error")
    assert tab.locator(".card").count() == 0
    tab.click("#clear")
    tab.fill("#text", "a red picture")
    tab.click("#go")
    answered(tab)
    assert tab.locator("#error").is_hidden()
    tab.locator(".card .like").first.click()
    tab.wait_for_url("**like=**")
    answered(tab)
    assert tab.locator(".card .distance").first.inner_text().startswith("0 of")


@pytest.mark.e2e
def test_an_empty_query_and_a_wrong_filter_are_said(tab: Any, base: str) -> None:
    tab.goto(base)
    tab.wait_for_selector(".card")
    tab.click("#go")
    assert tab.inner_text("#error") == "Type a text or choose a picture to search with."
    tab.fill("#text", "a red picture")
    tab.click("summary")
    tab.fill("#where", "label = 'pink'")
    tab.press("#where", "Enter")
    until(tab, "document.getElementById('error').textContent.includes('pink')")
    tab.fill("#where", "label = 'red' and label = 'blue'")
    tab.press("#where", "Enter")
    until(tab, "document.getElementById('status').textContent.includes('No item')")


@pytest.mark.e2e
def test_of_twenty_rapid_queries_the_last_one_stays(tab: Any, base: str, index: Index) -> None:
    tab.goto(base)
    tab.wait_for_selector(".card")
    for number in range(20):
        tab.evaluate(
            """text => { document.getElementById('text').value = text;
                         document.getElementById('form').requestSubmit(); }""",
            f"a {list(COLOURS)[number % len(COLOURS)]} picture",
        )
    last = f"a {list(COLOURS)[19 % len(COLOURS)]} picture"
    tab.wait_for_url(f"**{urllib.parse.quote_plus(last)}**")
    answered(tab)
    time.sleep(0.5)  # an older answer would come now
    assert captions(tab) == [h.caption or h.id for h in index.search(text=last, top=20)]
    assert tab.locator("#error").is_hidden()


@pytest.mark.e2e
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_nothing_overlaps_or_runs_out(browser: Any, base: str, width: int) -> None:
    found = browser.new_page(viewport={"width": width, "height": 800})
    found.goto(f"{base}/?text=a+red+picture&expect=red")
    answered(found)
    assert found.evaluate("document.documentElement.scrollWidth") <= width
    boxes = found.evaluate(
        """() => [...document.querySelectorAll('#text, #choose, #go, .options label, .card, h1')]
            .filter(e => e.offsetParent)
            .map(e => { const b = e.getBoundingClientRect();
                        return [b.left, b.top, b.right, b.bottom]; })"""
    )
    assert len(boxes) > 25
    for n, one in enumerate(boxes):
        assert one[0] >= 0 and one[2] <= width + 0.5
        for other in boxes[:n]:
            apart = (
                one[0] >= other[2] - 0.5 or other[0] >= one[2] - 0.5
                or one[1] >= other[3] - 0.5 or other[1] >= one[3] - 0.5
            )  # fmt: skip
            assert apart, (one, other)
    found.close()


@pytest.mark.e2e
def test_a_cross_modal_page_in_the_browser(
    tab: Any, cross_base: str, cross: Index, root: Path
) -> None:
    tab.goto(cross_base)
    tab.wait_for_selector(".card")
    tab.fill("#text", "a red picture")
    tab.select_option("#mode", "two-stage")
    answered(tab)
    hits = cross.search(text="a red picture", top=20, mode="two-stage")
    assert captions(tab) == [h.caption or h.id for h in hits]
    assert ", score " in tab.locator(".card .distance").first.inner_text()
    assert "of what real features rank" in tab.inner_text("#mode-note")
    tab.set_input_files("#image", str(root / "pairs" / "images" / "4.png"))
    answered(tab)
    assert tab.input_value("#text") == ""  # a picture takes the text's place
    tab.wait_for_url("**code=**")
