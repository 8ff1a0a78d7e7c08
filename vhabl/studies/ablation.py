"""Switch off each part of a method, one at a time: what is it worth?

python -m vhabl.studies.ablation --config configs/vh_abl.yaml data=wiki data.path=FILE --seeds 0 1 2

The parts are the loss terms (`model.weights.*`) and the settings in `SWITCHES` that the recipe has.
With --towards OTHER they are the keys that another recipe of the method sets otherwise, such as
configs/vh_abl_published.yaml: each takes the other's value alone (those of `optim` together), and
in the last row all do.
Each variant is trained once a seed; the table has mAP@all on the test queries, or on the validation
queries with --validation, where parts are chosen. A variant that was trained is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vhabl.config import Config, flat, load, override, to_yaml
from vhabl.data import load as load_data
from vhabl.data import validation_split
from vhabl.evaluation.records import code_tasks
from vhabl.metrics import evaluate
from vhabl.system import errors
from vhabl.system.files import read_rows, write_json, write_text
from vhabl.training.trainer import Trainer
from vhabl.types import Dataset

WHOLE = "whole"
# What switches a part off that is a setting; a recipe without the key, or with the value, has not
# the part.
SWITCHES = {
    "model.net.members": 1,
    "model.net.prototypes": False,
    "model.net.fusion_norm": False,
    "model.net.joint_hidden": 0,
    "model.net.dropout": 0.0,
    "model.net.activation": "tanh",
    "model.target": "sigmoid",
    "model.net.modality_dropout": 0.0,
    "model.modality_dropout": 0.0,
    "model.concepts": 0,
    "model.context": 0,
    "model.truth": 0.0,
    "model.blocks": 0,
    "encoder.augment": False,
    "encoder.image_noise": 0.0,
    "optim.averaging": 0.0,
}


# Keys in which two recipes may differ and still be the same method.
NOT_OF_THE_MODEL = (
    "variant", "seed", "out", "codes", "save_every", "validation.", "encoder.weights"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """mAP@all (expected) of one variant, seed and length; the mean over the method's tasks."""

    variant: str
    seed: int
    bits: int
    value: float


def variants(config: Config) -> dict[str, list[str]]:
    """Overrides of every variant by name: the whole method, then each part switched off."""
    found: dict[str, list[str]] = {WHOLE: []}
    weights = getattr(config.model, "weights", None)
    if is_dataclass(weights):
        for term in fields(weights):
            if getattr(weights, term.name) != 0:
                found[f"without {term.name}"] = [f"model.weights.{term.name}=0"]
    for key, off in SWITCHES.items():
        value = _value(config, key)
        if value is not None and value != off:
            found[f"{key}={json.dumps(off)}"] = [f"{key}={json.dumps(off)}"]
    return found


def differences(config: Config, other: Config) -> dict[str, list[str]]:
    """Overrides by name that take a recipe to another one of its method, a key at a time; the keys
    of the optimiser are one difference, as few of them mean anything alone. Keys of networks on
    pixels do not count where there are none.
    """
    theirs, ours = flat(other), flat(config)
    ignored: tuple[str, ...] = NOT_OF_THE_MODEL
    if config.encoder.name == other.encoder.name == "features":
        ignored += tuple(k for k in ours if k.startswith("encoder.") and k != "encoder.image_noise")
    changed = {
        key: f"{key}={json.dumps(theirs.get(key, 1.0))}"  # a factor that is not set is 1
        for key in dict.fromkeys([*ours, *theirs])
        if theirs.get(key) != ours.get(key) and not key.startswith(ignored)
    }
    optim = [change for change in changed.values() if change.startswith("optim.")]
    alone = [[change] for change in changed.values() if change not in optim]
    found = {" ".join(changes): changes for changes in [*alone, optim] if changes}
    return {WHOLE: [], **found, "all of these": list(changed.values())}


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def measure(config: Config, data: Dataset, variant: str, seed: int) -> list[Row]:
    """Train one variant and score its codes on the queries of `data`."""
    method = Trainer(config, data, progress_bar=False).run()
    tasks = code_tasks(method, data, config.bits)
    return [
        Row(variant, seed, bits, float(np.mean([evaluate(c)[0].value for c in found.values()])))
        for bits, found in tasks.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Means over seeds, the mean difference from the whole method with its standard error over the
    seeds (paired, averaged over the lengths), and whether it is more than twice that error.
    """
    names = list(dict.fromkeys(r.variant for r in rows))
    lengths = sorted({r.bits for r in rows})
    lines = [
        "| variant | " + " | ".join(f"{b} bits" for b in lengths) + " | difference | effect |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    whole = _by_seed(rows, WHOLE)
    for name in names:
        cells = [
            f"{np.mean([r.value for r in rows if r.variant == name and r.bits == b]):.4f}"
            for b in lengths
        ]
        own = _by_seed(rows, name)
        differences = [own[s] - whole[s] for s in own if s in whole]
        mean = float(np.mean(differences))
        if name == WHOLE:
            shown, effect = "", ""
        elif len(differences) < 2:
            shown, effect = f"{mean:+.4f}", "one seed"
        else:
            error = float(np.std(differences, ddof=1) / len(differences) ** 0.5)
            shown = f"{mean:+.4f} ± {error:.4f}"
            effect = "none seen" if abs(mean) <= 2 * error else "helps" if mean < 0 else "harms"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {shown} | {effect} |")
    return "\n".join(lines)


def _by_seed(rows: Sequence[Row], variant: str) -> dict[int, float]:
    """Mean over the lengths of each seed."""
    own = [r for r in rows if r.variant == variant]
    return {s: float(np.mean([r.value for r in own if r.seed == s])) for s in {r.seed for r in own}}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vhabl.studies.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]"
    )
    parser.add_argument("--towards", metavar="FILE", help="another recipe of the same method")
    parser.add_argument("--validation", action="store_true", help="score on validation queries")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="variants with one of these texts in their name"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of every variant")
    given = parser.parse_intermixed_args(arguments)
    config = load(given.config, given.overrides)
    possible = variants(config)
    if given.towards:
        possible = differences(config, load(given.towards, given.overrides))
    folder = Path(config.out) if config.out else config.run_folder.parent
    folder = folder / ("ablation-validation" if given.validation else "ablation")
    rows: list[Row] = []
    chosen = {
        name: changes
        for name, changes in possible.items()
        if name == WHOLE or not given.only or any(text in name for text in given.only)
    }
    if given.only and len(chosen) == 1:
        known = ", ".join(possible)
        do = f"Choose among {known}"
        errors.fail(f"--only {' '.join(given.only)}", "no component has this in its name", do)
    jobs = [(n, o, s) for n, o in chosen.items() for s in given.seeds]
    for name, changes, seed in tqdm(jobs, desc="ablation", unit="run", disable=None):
        run = [f"seed={seed}", f"out={folder / 'state'}", "codes=none"]
        own = override(config, [*changes, *run, f"save_every={config.epochs + 1}"])
        data = load_data(own.data, own.encoder)
        digest = blake2b((to_yaml(own) + data.fingerprint).encode(), digest_size=8).hexdigest()
        kept = folder / f"{digest}.json"
        if not kept.is_file():
            part = data
            if given.validation:  # another split for every seed
                part = validation_split(data, config.validation.fraction or 0.2, seed)
                own = override(own, ["validation.fraction=0"])
            write_json(kept, [asdict(row) for row in measure(own, part, name, seed)])
        rows += read_rows(kept, Row, "vhabl.studies.ablation")
    on = "validation" if given.validation else "test"
    title = (
        f"{config.title} on {config.data.name}, mAP@all on {on} queries, {len(given.seeds)} seeds"
    )
    text = f"{title}\n\n{table(rows)}\n"
    print(text, end="")
    write_text(folder / "table.md", text)
    return 0


if __name__ == "__main__":
    errors.run(main)
