"""Look at a data set before training: python -m vhabl.data check configs/data/emoji.yaml."""

from __future__ import annotations

import argparse
import sys

from vhabl.config import load_data_config
from vhabl.data import items, load
from vhabl.data.labels import describe, numbers
from vhabl.data.pairs import bad_images, describe_pairs, split
from vhabl.system import errors
from vhabl.system.errors import EXIT_USER_ERROR


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.data",
        description="Say what a data set holds, and name every image that is missing or cannot be "
        "read (exit code 2).",
    )
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("config", metavar="FILE", help="such as configs/data/emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=PATH")
    given = parser.parse_intermixed_args(arguments)
    config = load_data_config(given.config, given.overrides)
    if not config.has_files:
        data = load(config)
        sizes = [len(split) for split in (data.train, data.database, data.query)]
        for text in data.notes:
            errors.note(text)
        labels = data.database.labels
        for fact in describe(labels, data.class_names or numbers(labels)):
            print(fact)
    else:
        pairs = items(config)
        sizes = [len(rows) for rows in split(pairs, config)]
        for fact in describe_pairs(pairs):
            print(fact)
        problems = bad_images(pairs)
        if problems:
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
            return EXIT_USER_ERROR
    for role, size in zip(("train", "database", "query"), sizes, strict=True):
        print(f"{role}: {errors.plural(size, 'item')}")
    print("no problem found")
    return 0


if __name__ == "__main__":
    errors.run(main)
