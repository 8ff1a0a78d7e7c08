"""Train a method from a recipe: python -m vhabl.train --config configs/vh_abl.yaml data=wiki ..."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from vhabl import codes
from vhabl.config import Config, describe_keys, load, recipes, to_yaml
from vhabl.data import describe
from vhabl.data import load as load_data
from vhabl.evaluation.records import (
    Record,
    code_tasks,
    real_valued_records,
    records,
    with_one_modality,
)
from vhabl.report import print_table
from vhabl.system import errors
from vhabl.system.distributed import ALONE, Ranks, joined
from vhabl.system.files import alone
from vhabl.training import run_folder
from vhabl.training.trainer import STATE_FILE, Trainer
from vhabl.types import Dataset


def main(arguments: list[str]) -> int:
    with joined() as here:
        asked = here.everywhere(lambda: _prepare(arguments))
        if asked is None:
            return 0
        given, config, data = asked
        rows = train(config, data, not given.quiet, here)
    if rows and not given.no_table:
        print_table(rows)
    if here.rank == 0:
        print(f"run folder: {config.run_folder}")
        if config.code_folder is not None:
            print(f"code files: {config.code_folder}")
    return 0


def _prepare(arguments: list[str]) -> tuple[argparse.Namespace, Config, Dataset] | None:
    """What is asked for, the recipe and its data; None where it was to print something."""
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.train",
        add_help=False,
        description="Train a method from a YAML recipe.",
    )
    parser.add_argument(
        "--config", metavar="RECIPE", help="a file, or the name of one in configs/, such as vh_abl"
    )
    parser.add_argument("--print-config", action="store_true", help="print the result and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--no-table", action="store_true", help="no table at the end")
    parser.add_argument("-h", "--help", action="store_true", help="this help, with all keys")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides, such as data=wiki data.path=FILE epochs=60",
    )
    given = parser.parse_intermixed_args(arguments)
    if given.help:
        print(parser.format_help())
        print("keys, with [default]; data=NAME is configs/data/NAME.yaml, data=FILE.yaml your own:")
        print(describe_keys(given.config))
        return None
    if not given.config:
        known = ", ".join(recipe.stem for recipe in recipes())
        errors.fail("--config", "it is missing", f"Add --config NAME, of {known}")
    config = load(given.config, given.overrides)
    if given.print_config:
        print(to_yaml(config), end="")
        return None
    data = load_data(config.data, config.encoder)
    for text in (describe(data), *data.notes):
        errors.note(text)
    return given, config, data


def train(
    config: Config, data: Dataset, progress_bar: bool = True, here: Ranks = ALONE
) -> list[Record]:
    """Train, encode queries and database at every length, write codes and the run folder. Of
    several ranks only rank 0 writes and has records.
    """
    folder = config.run_folder
    trainer = Trainer(config, data, progress_bar, here)

    def hold() -> None:
        for needed in (folder, config.code_folder):
            if needed is not None:
                needed.mkdir(parents=True, exist_ok=True)
        if here.rank == 0:
            held.enter_context(alone(folder))
            run_folder.require_own(folder, config)

    with ExitStack() as held:
        here.everywhere(hold)
        return _train(trainer)


def _train(trainer: Trainer) -> list[Record]:
    config, data, folder = trainer.config, trainer.data, trainer.config.run_folder
    method = trainer.run()
    seen = trainer.data  # with what a frozen encoder made of it
    found = code_tasks(method, seen, config.bits)
    everything = with_one_modality(method, seen, found)
    if trainer.here.rank > 0:
        return []
    method.encoder.share_out(ALONE)
    rows = records(config.title, seen, everything, config.seed, "curves")
    rows += real_valued_records(method, seen, config.bits, config.seed, title=config.title)
    if config.code_folder is not None:
        for tasks in found.values():
            codes.save(config.code_folder, config.title, data.name, tasks)
    run_folder.save(folder, config, method, data, rows, trainer.progress.history)
    (folder / STATE_FILE).unlink(missing_ok=True)
    return rows


if __name__ == "__main__":
    errors.run(main)
