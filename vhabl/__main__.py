"""vhabl COMMAND ...: all commands of vhabl by one name. `vhabl COMMAND --help` describes each."""

from __future__ import annotations

import argparse
import importlib

import vhabl
from vhabl.system import errors

# Each command is a module, which `python -m` runs too, and what it does.
COMMANDS = {
    "train": ("vhabl.train", "train a recipe on a data set"),
    "eval": ("vhabl.eval", "measure runs or code files, or compare two of them"),
    "encode": ("vhabl.encode", "encode pictures and texts"),
    "search": ("vhabl.search.__main__", "build, change, search and serve an index"),
    "report": ("vhabl.report.__main__", "tables, plots and a page of runs"),
    "audit": ("vhabl.audit", "check whether labels reach the codes"),
    "data": ("vhabl.data.__main__", "check a data set before training"),
    "baselines": ("vhabl.studies.baselines", "reference rows of a data set"),
    "ablation": ("vhabl.studies.ablation", "switch off each part of a method"),
    "importance": ("vhabl.studies.importance", "measure the ranking of bits"),
}


def main(arguments: list[str]) -> int:
    lines = [f"  {name:12}{what}" for name, (_, what) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="vhabl",
        description=vhabl.__doc__,
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vhabl {vhabl.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = parser.parse_args(arguments)
    module = importlib.import_module(COMMANDS[given.command][0])
    code: int = module.main(given.arguments) or 0
    return code


def run() -> None:
    """The program `vhabl`."""
    errors.run(main)


if __name__ == "__main__":
    run()
