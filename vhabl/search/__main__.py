"""Build an index of one's own data, and ask it.

python -m vhabl.search build --checkpoint RUN --data configs/data/emoji.yaml --out INDEX
python -m vhabl.search build --checkpoint RUN --data FILE --codes codes.npz --out INDEX
python -m vhabl.search query INDEX --text "red fruit" --top 10 --where "label = 'Food & Drink'"
python -m vhabl.search query INDEX --image photo.jpg --bits 64 --mode prefix
python -m vhabl.search add INDEX --table more.csv
python -m vhabl.search delete INDEX --id NAME
python -m vhabl.search info INDEX
python -m vhabl.search serve INDEX
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unicodedata import category

from vhabl.data.table import read_items
from vhabl.search.engine import ENGINES, MODES
from vhabl.search.faiss_index import GRAPHS
from vhabl.search.index import Index
from vhabl.system import errors

LONGEST = 200  # characters of a caption that are printed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="encode a data set and write its index")
    build.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of a run")
    build.add_argument("--data", metavar="FILE", help="in configs/data; default: that of the run")
    build.add_argument("--out", required=True, metavar="INDEX", help="a folder that does not exist")
    build.add_argument("--codes", metavar="FILE", help="what vhabl.encode --data wrote of the set")
    build.add_argument("--bits", type=int, metavar="N", help="code length [the longest]")
    build.add_argument(
        "--graph", choices=GRAPHS, action="append", default=[], metavar="KIND",
        help="a FAISS index beside the codes, for a mode of its name: ivf | hnsw; may be repeated",
    )  # fmt: skip
    build.add_argument("--engine", choices=ENGINES, default="folder", help="what holds the codes")
    build.add_argument("--uri", default="", metavar="URI",
                       help="milvus: its address, or an embedded file [one in INDEX]")  # fmt: skip
    build.add_argument("--device", default="auto", metavar="NAME",
                       help="auto | cpu | cuda [auto]")  # fmt: skip
    build.add_argument("--quiet", action="store_true", help="no progress bar")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=PATH")
    query = commands.add_parser("query", help="the nearest items of a text or an image")
    query.add_argument("index", metavar="INDEX", help="folder of the index")
    query.add_argument("--text", metavar="TEXT", help="a text to search for")
    query.add_argument("--image", metavar="FILE", help="a picture to search for")
    query.add_argument("--top", type=int, default=10, metavar="N", help="items [10]")
    query.add_argument("--bits", type=int, metavar="N", help="a shorter code: its first bits")
    query.add_argument("--mode", choices=MODES, default="exact",
                       help="how codes are compared [exact]")  # fmt: skip
    query.add_argument("--where", default="", metavar="FILTER", help="such as \"label = 'cat'\"")
    query.add_argument("--against", default="", metavar="VIEW", help="image | text")
    query.add_argument("--like", metavar="ID", help="an item of the index, in place of both")
    query.add_argument("--json", action="store_true", help="one item a line")
    add = commands.add_parser("add", help="encode the rows of a table and add them")
    add.add_argument("index", metavar="INDEX", help="folder of the index")
    add.add_argument("--table", type=Path, required=True, metavar="FILE",
                     help="with columns image, caption and, if any, labels")  # fmt: skip
    add.add_argument("--image-root", default="images", metavar="DIR",
                     help="folder of the table's images, beside it [images]")  # fmt: skip
    delete = commands.add_parser("delete", help="delete items by their ids")
    delete.add_argument("index", metavar="INDEX", help="folder of the index")
    delete.add_argument("--id", action="append", required=True, metavar="ID",
                        help="id of an item; may be given several times")  # fmt: skip
    info = commands.add_parser("info", help="say what an index holds, and read it whole")
    info.add_argument("index", metavar="INDEX", help="folder of the index")
    serve = commands.add_parser("serve", help="a page in the browser that searches an index")
    serve.add_argument("index", metavar="INDEX", help="folder of the index")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="[8000]; 0: a free one")
    serve.add_argument("--host", default="127.0.0.1", metavar="NAME",
                       help="address to listen at [127.0.0.1: this machine alone]")  # fmt: skip
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="another name that requests may call it by")  # fmt: skip
    given = parser.parse_args(arguments)
    if given.command == "build":
        built = Index.build(
            given.out, given.checkpoint, given.data, given.bits, given.overrides, given.device,
            progress_bar=not given.quiet, graphs=given.graph, engine=given.engine, uri=given.uri,
            codes=given.codes,
        )  # fmt: skip
        print(describe(built))
        return 0
    index = Index.open(given.index)
    if given.command == "query":
        ask(index, given)
        return 0
    if given.command == "serve":
        from vhabl.search.page import serve as serve_page

        serve_page(index, given.host, given.port, given.allow_host)
        return 0
    if given.command == "add":
        config = index.model.table(given.table, given.image_root, index.engine.class_names)
        ids, images, texts, labels = read_items(given.table, config)
        index.add(images, texts, ids, labels)
    elif given.command == "delete":
        index.delete(given.id)
    else:
        index.engine.verify()
    print(describe(index))
    return 0


def ask(index: Index, given: argparse.Namespace) -> None:
    hits = index.search(
        given.text, given.image, given.top, given.bits, given.mode, given.where, given.against,
        given.like,
    )  # fmt: skip
    unknown = index.model.unknown_words(given.text) if given.text and not given.image else []
    if unknown:
        errors.note(f"the model does not know {', '.join(dict.fromkeys(unknown))}")
    if given.json:
        for hit in hits:
            print(json.dumps(hit.as_dict()))
        return
    for rank, hit in enumerate(hits, 1):
        labels = f"  [{one_line(', '.join(hit.labels))}]" if hit.labels else ""
        caption, image = one_line(hit.caption or hit.id), one_line(hit.image)
        print(f"{rank:3d}. {hit.distance:4d}  {caption}{labels}  {image}".rstrip())
    if not hits:
        errors.note("no item passes the filter")


def one_line(text: str) -> str:
    """A text on one line of at most 200 characters, for a terminal: control characters escaped."""
    line = " ".join(text.split())
    shown = line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
    return "".join(f"\\x{ord(c):02x}" if category(c) == "Cc" else c for c in shown)


def describe(index: Index) -> str:
    """What an index holds, in lines."""
    engine, meta = index.engine, index.engine.meta
    lengths = f"1 to {engine.bits}" if meta["any_length"] and engine.prefixes else str(engine.bits)
    some = ", ".join(engine.class_names[:5]) + ", ..." * (len(engine.class_names) > 5)
    lines = [
        f"{engine.folder}: {errors.plural(len(engine), 'item')} of {meta['data']}, {engine.parts}",
        f"codes of {meta['method']} ({meta['run']}): {', '.join(engine.views)}, {lengths} bits",
        f"{errors.plural(len(engine.class_names), 'label')}: {some or 'none'}",
    ]
    for view, modes in meta.get("recall", {}).items():
        for mode, found in modes.items():
            lines.append(
                f"mode {mode} on {view}: {explain(mode, found['setting'])}, recall@"
                f"{found['at']} {found['recall']:.4f} ({errors.plural(found['queries'], 'query')})"
            )
    return "\n".join(lines)


def explain(mode: str, setting: float) -> str:
    """What a mode's setting means."""
    said = {
        "prefix": f"compares {setting:.1%} of the items",
        "ivf": f"compares {setting:.1%} of the clusters",
        "hnsw": f"holds {setting:g} candidates",
        "two-stage": f"compares {setting:.1%} of the items; of a ranking by features",
    }
    return said[mode]


if __name__ == "__main__":
    errors.run(main)
