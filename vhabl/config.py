"""One YAML and dotted overrides become one typed, frozen configuration.

The order, later wins: the defaults below, configs/data/NAME.yaml for `data=NAME`, the recipe
(configs/<method>.yaml), the recipe's `for_data` entry for the data set in use, the overrides of the
command line. A key that does not exist, or a value of another type, is an error that names the
nearest key.

Inside this file a configuration is a flat dictionary of dotted keys (`optim.lr`), checked against
the fields of the frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vhabl import encoders, methods
from vhabl.encoders import cnn, open_clip
from vhabl.methods.base import HashingMethod
from vhabl.settings import (
    REQUIRED,
    DataConfig,
    EncoderConfig,
    OptimConfig,
    ValidationConfig,
    key,
)
from vhabl.system.errors import VhablError, bad_value, brief, fail
from vhabl.system.files import PROJECT
from vhabl.types import DataSpec

CONFIG_DIR = PROJECT / "configs"
COMMAND_LINE = "command line"
LONGEST = 2**18  # characters of a YAML text: a parser in Python takes seconds for more

# Keys that say where and how a run is carried out, not what it computes.
_CARRIED_OUT = {"out", "codes", "resume", "device", "threads", "save_every"}
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[int]: "a list of whole numbers",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
    dict[str, float]: "numbers by name",
}


@dataclass(frozen=True)
class Config:
    method: str = key("a file in vhabl/methods: vh_abl, hiamh, nested_mlp ...")
    variant: str = key(
        "what sets this recipe apart from others of the method, in paths and tables", ""
    )
    data: DataConfig = field(default_factory=DataConfig)
    protocol: str = key(
        "common: the data set as it is named | own: the one of the method's publication, which the "
        "recipe names under own_data",
        "common",
    )
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    bits: list[int] = key("code lengths to report; the longest is trained", [16, 32, 64, 128])
    epochs: int = key("most epochs; validation chooses how many are used", 140)
    batch_size: int = key("items in a training batch", 1024)
    seed: int = key("seed of initial weights, batches and dropout", 0)
    device: str = key("auto | cpu | cuda | cuda:N", "auto")
    threads: int = key("CPU threads; 0 leaves torch's choice", 0)
    oracle_labels: bool = key(
        "pghmh: encode with the true labels, as was published; for comparison only, and marked",
        False,
    )
    out: str = key("run folder; empty is checkpoint/<data>/<method>[_<variant>]/<seed>", "")
    codes: str = key(
        "folder of the code files; empty is flickrhashcode/<data> for seed 0 and its subfolder "
        "seed<N> for others; none writes no codes",
        "",
    )
    resume: bool = key("go on from the last state in the run folder", False)
    save_every: int = key("epochs between two saved states", 1)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    model: Any = None  # the method's own Settings

    @property
    def run_folder(self) -> Path:
        if self.out:
            return Path(self.out)
        name = "_".join([self.method, *self._marks]).replace(" ", "_")
        return Path("checkpoint", self.data.name, name, str(self.seed))

    @property
    def title(self) -> str:
        """The method as tables, plots and code files name it."""
        title = methods.get(self.method).title
        return f"{title} ({', '.join(self._marks)})" if self._marks else title

    @property
    def _marks(self) -> list[str]:
        return [mark for mark in (self.variant, "oracle labels" * self.oracle_labels) if mark]

    @property
    def code_folder(self) -> Path | None:
        if self.codes == "none":
            return None
        if self.codes:
            return Path(self.codes)
        folder = Path("flickrhashcode", self.data.name)
        return folder if self.seed == 0 else folder / f"seed{self.seed}"


@dataclass(frozen=True)
class BaselineConfig:
    data: DataConfig = field(default_factory=DataConfig)
    bits: list[int] = key("code lengths to report", [16, 32, 64, 128])
    seed: int = key("seed of the random projections", 0)
    out: str = key("folder of metrics.json; empty is checkpoint/<data>/baselines/<seed>", "")


def load(path: str | Path, overrides: list[str]) -> Config:
    """Read a recipe (a file, or the name of one in configs/), apply dotted overrides, and check
    every key, type and value.

    Raises VhablError naming the file or key, what was found and what was expected.
    """
    path = _recipe(path)
    recipe = _read_yaml(path)
    given = _parse_overrides(overrides)
    types = _config_types(given.get("method", recipe.get("method")), path)
    config = _build_config(types, _layers(recipe, given, path), path)
    data = Path(config.data.path)
    # Absolute, so that it is found from any folder; a path below the project is found anyway.
    if data.exists() and data.resolve() != (PROJECT / data).resolve():
        absolute = dataclasses.replace(config.data, path=str(data.resolve()))
        config = dataclasses.replace(config, data=absolute)
    return config


def load_baselines(overrides: list[str]) -> BaselineConfig:
    """The configuration of the reference rows, from dotted overrides alone."""
    types = key_types(BaselineConfig)
    values = _merge(types, _layers({}, _parse_overrides(overrides), COMMAND_LINE))
    config = _build(BaselineConfig, values, COMMAND_LINE)
    _check_bits(config.bits)
    _check_data(config.data)
    return config


def load_data_config(path: str | Path, overrides: Sequence[str]) -> DataConfig:
    """A data set's own file, configs/data/NAME.yaml, with `data.*` overrides."""
    path = Path(path)
    own = _flatten({"data": _read_data_yaml(path)})
    layers: list[Layer] = [(path, own), (COMMAND_LINE, _parse_overrides(overrides))]
    values = _merge(key_types(DataConfig, "data."), layers)
    config: DataConfig = _build(DataConfig, values, path, "data.")
    _check_data(config)
    return config


def from_yaml(text: str, where: Path) -> Config:
    """The configuration that a run stored, checked as if it were typed in."""
    values = _parse_yaml(text, where)
    types = _config_types(values.get("method"), where)
    return _build_config(types, [(where, _flatten(values))], where)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with a few keys changed, checked as if it were typed in."""
    types = _config_types(config.method, COMMAND_LINE)
    layers: list[Layer] = [
        (COMMAND_LINE, flat(config)),
        (COMMAND_LINE, _parse_overrides(overrides)),
    ]
    return _build_config(types, layers, COMMAND_LINE)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """All keys by dotted name, with their values."""
    return _flatten(dataclasses.asdict(config))


def stored(path: Path) -> dict[str, Any]:
    """All keys of a run's `config.yaml` by dotted name, unchecked."""
    return _flatten(_read_yaml(path))


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, of all by dotted name, that changes what a run computes, with its value in
    both; None where there is none.
    """
    for name in dict.fromkeys([*b, *a]):
        if name not in _CARRIED_OUT and a.get(name) != b.get(name):
            return name, a.get(name), b.get(name)
    return None


def describe_keys(recipe: str | Path | None) -> str:
    """The common keys, with meaning and default, and those of a recipe's method."""
    lines = _describe(Config, "")
    if recipe is None:
        return "\n".join([*lines, "\n--config RECIPE --help also lists the keys of its method"])
    method = _known_method(_read_yaml(_recipe(recipe)).get("method"), recipe)
    own = _describe(methods.get(method).Settings, "model.")
    return "\n".join([*lines, f"\nkeys of method {method}:", *own])


def build_method(config: Config, spec: DataSpec, pretrained: bool = True) -> HashingMethod:
    """The method of a configuration, untrained; `pretrained` as in `encoders.build`. Raises
    VhablError where it needs pairs that the data set has not.
    """
    kind = methods.get(config.method)
    if kind.pairs and not spec.paired:
        do = f"{kind.title} needs pairs"
        fail(f"data set {spec.name}", "image i and text i are not one item", do)
    encoder = encoders.build(config.encoder, spec, kind.tokens, pretrained)
    method = kind(spec, config.bits, config.model, encoder)
    method.oracle_labels = config.oracle_labels
    return method


def data_names() -> list[str]:
    return sorted(p.stem for p in (CONFIG_DIR / "data").glob("*.yaml"))


def _recipe(name: str | Path) -> Path:
    """A recipe's file, of its path or of its name in configs/."""
    named = CONFIG_DIR / f"{name}.yaml"
    return named if named.is_file() and not Path(name).is_file() else Path(name)


def recipes() -> list[Path]:
    """All recipes, configs/*.yaml, by name."""
    return sorted(p for p in CONFIG_DIR.glob("*.yaml") if p.stem != "published")


# -- keys and types --------------------------------------------------------------------------------


def key_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Types of all keys of a dataclass of settings and its sections: {"optim.lr": float, ...}."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            types |= key_types(kind, f"{prefix}{name}.")
        elif kind is not Any:
            types[prefix + name] = kind
    return types


def _known_method(method: Any, where: object) -> str:
    if method not in methods.names():
        bad_value(f"{where}: method", repr(method), f"one of {', '.join(methods.names())}")
    return str(method)


def _config_types(method: Any, where: object) -> dict[str, Any]:
    settings = key_types(methods.get(_known_method(method, where)).Settings, "model.")
    return key_types(Config) | settings


def _describe(cls: Any, prefix: str) -> list[str]:
    hints, lines = typing.get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            lines += _describe(hints[f.name], f"{prefix}{f.name}.")
        elif "help" in f.metadata:
            factory = f.default_factory
            default = f.default if factory is dataclasses.MISSING else factory()
            shown = "required" if default == REQUIRED else default
            lines.append(f"  {prefix + f.name:24s} {f.metadata['help']} [{shown}]")
    return lines


def _convert(kind: Any, value: Any) -> Any:
    """A YAML value as a key's type. Raises ValueError where it is of another type."""
    if kind in (list[int], list[str], list[float]):
        element = typing.get_args(kind)[0]
        if isinstance(value, str) and element is not str:  # 16,32 needs no quotes in any shell
            value = [_value(part) for part in value.split(",")]
        return [_convert(element, v) for v in (value if isinstance(value, list) else [value])]
    if isinstance(value, bool) != (kind is bool) or isinstance(value, list | dict | None):
        raise ValueError
    if kind is float:
        return float(value)
    if kind is str and isinstance(value, int):  # out=0
        return str(value)
    if not isinstance(value, kind):
        raise ValueError
    return value


# -- layers ----------------------------------------------------------------------------------------

Layer = tuple[object, dict[str, Any]]  # where the values come from, and the values by dotted key


def _layers(recipe: dict[str, Any], given: dict[str, Any], where: object) -> list[Layer]:
    """Data file, recipe, the recipe's entry for the data set, command line: later wins. A recipe
    that holds the keys of its data, as the `config.yaml` of a run does, needs no data file.
    """
    recipe, given = dict(recipe), dict(given)
    for_data, own_data = (recipe.pop(part, None) or {} for part in ("for_data", "own_data"))
    stored = recipe.pop("data", None)
    chosen = given.pop("data", stored)
    if chosen is None or isinstance(chosen, dict):
        return [(where, _flatten({**recipe, "data": chosen or {}})), (COMMAND_LINE, given)]
    if not isinstance(own_data, dict):
        bad_value(
            f"{where}: own_data", f"a {type(own_data).__name__}", "names of data sets by name"
        )
    if given.get("protocol", recipe.get("protocol")) == "own":
        chosen = own_data.get(chosen, chosen)
    if str(chosen).endswith(".yaml"):
        path = Path(str(chosen))
        chosen = path.stem
    elif chosen in data_names():
        path = CONFIG_DIR / "data" / f"{chosen}.yaml"
    else:
        bad_value("data", repr(chosen), f"a .yaml file, or one of {', '.join(data_names())}")
    if not isinstance(for_data, dict):
        bad_value(
            f"{where}: for_data", f"a {type(for_data).__name__}", "overrides by names of data sets"
        )
    special = for_data.get(chosen) or {}
    if not isinstance(special, dict):
        bad_value(f"{where}: for_data.{chosen}", f"a {type(special).__name__}", "keys with values")
    return [
        (path, _flatten({"data": _read_data_yaml(path)})),
        (where, _flatten(recipe)),
        (f"{where}: for_data.{chosen}", _flatten(special)),
        (COMMAND_LINE, given),
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _merge(types: dict[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    tables = [name for name, kind in types.items() if kind == dict[str, float]]
    for where, values in layers:
        for name, value in values.items():
            table = next((t for t in tables if name.startswith(f"{t}.")), None)
            if table is None and name not in types:
                raise _unknown_key(types, name, where)
            kind = float if table else types[name]
            try:
                converted = _convert(kind, value)
            except (TypeError, ValueError):
                bad_value(f"{where}: {name}", repr(value), _KINDS[kind])
            if table:  # its keys are names of their own: optim.lr_scale.fusion
                merged[table] = {**merged.get(table, {}), name.removeprefix(f"{table}."): converted}
            else:
                merged[name] = converted
    return merged


def _unknown_key(types: dict[str, Any], name: str, where: object) -> VhablError:
    near = difflib.get_close_matches(name, types, n=1, cutoff=0.6)
    if not near:  # a right name in the wrong section: lr for optim.lr
        by_leaf = {known.rpartition(".")[2]: known for known in types}
        leaves = difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1)
        near = [by_leaf[leaf] for leaf in leaves]
    hint = f"Did you mean '{near[0]}'?" if near else "python -m vhabl.train --help lists all keys."
    return VhablError(f"{where}: unknown key '{name}'. {hint}")


def _build(cls: Any, values: dict[str, Any], where: object, prefix: str = "") -> Any:
    """An instance of a dataclass of settings from flat values; the others keep their default."""
    hints, arguments = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _build(hints[f.name], values, where, f"{name}.")
        elif name in values:
            arguments[f.name] = values[name]
        elif f.default == REQUIRED:
            hint = f" (data=NAME, of {', '.join(data_names())})" if prefix == "data." else ""
            fail(where, f"{name} has no value", f"Set it: {name}=VALUE{hint}")
    return cls(**arguments)


def _build_config(types: dict[str, Any], layers: list[Layer], where: object) -> Config:
    values = _merge(types, layers)
    config: Config = _build(Config, values, where)
    settings = _build(methods.get(config.method).Settings, values, where, "model.")
    # A JSON file of towers is taken in: what is stored with a run is what it was trained with.
    encoder = dataclasses.replace(
        config.encoder, model=open_clip.with_content(config.encoder.model)
    )
    config = dataclasses.replace(config, model=settings, encoder=encoder)
    _check(config)
    return config


# -- reading ---------------------------------------------------------------------------------------


def _read_data_yaml(path: Path) -> dict[str, Any]:
    """A data set's file. The `path` in a user's own is relative to its folder."""
    described = _read_yaml(path)
    if "path" in described and path.resolve().parent != CONFIG_DIR / "data":
        described["path"] = str(path.parent / str(described["path"]))
    return described


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        fail(path, "no such file", "Give a YAML file")
    except UnicodeDecodeError:
        fail(path, "its bytes are not text", "It must be a YAML file")
    return _parse_yaml(text, path)


class _Loader(yaml.SafeLoader):
    """Plain values alone: a few lines of aliases can stand for more than memory holds. Whole
    numbers are decimal, as YAML 1.1 takes 16:32 for 992; others stay texts until their key is
    known, so that out=1.10 keeps its name.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            raise yaml.YAMLError(f"{max(names, key=names.count)} comes twice")
        return found

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias, *{self.peek_event().anchor}")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if not tag.endswith((":int", ":float"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"-?(?:0|[1-9][0-9]*)$"), list("-0123456789")
)


def _value(text: str) -> Any:
    """What a YAML text holds. Raises ValueError where it is none."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text):,} characters, more than {LONGEST:,}")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # its constructors of values raise many types
        raise ValueError(brief(error)) from None


def _parse_yaml(text: str, where: object) -> dict[str, Any]:
    try:
        values = _value(text)
    except ValueError as error:
        fail(where, f"this is not YAML ({error})", "Write keys and values")
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        fail(where, f"it holds a {type(values).__name__}", "It must be YAML of keys and values")
    return values


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign or not name:
            fail(f"argument {text!r}", "it has no key=value", "Write it as in epochs=60")
        if re.search(r"\s#", value) and value[0] not in "'\"":
            fail(f"argument {text!r}", "YAML takes '#' for a comment", "Put the value in quotes")
        try:
            given |= _flatten({name: _value(value) if value else ""})
        except ValueError:
            bad_value(f"{COMMAND_LINE}: {name}", repr(value), "a YAML value")
    return given


# -- values that the types alone do not hold -------------------------------------------------------


def _require(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        bad_value(name, repr(found), expected)


def _check_bits(lengths: list[int]) -> None:
    _require(len(lengths) > 0, "bits", lengths, "at least one code length")
    _require(len(set(lengths)) == len(lengths), "bits", lengths, "code lengths that differ")
    for bits in lengths:
        _require(1 <= bits <= 4096, "bits", bits, "code lengths from 1 to 4096")


def _check_data(data: DataConfig) -> None:
    kinds = ("features", "pairs", "table", "npy")
    _require(data.kind in kinds, "data.kind", data.kind, " or ".join(kinds))
    differ = len(set(data.class_names)) == len(data.class_names) and all(data.class_names)
    _require(differ, "data.class_names", data.class_names, "names that differ")
    plain = data.separator != "" and "\\" not in data.separator
    _require(plain, "data.separator", data.separator, "a text; 'data.separator=\"\\t\"' is a tab")
    scales = ("standard", "global", "none")
    _require(data.scale in scales, "data.scale", data.scale, " or ".join(scales))
    _require(data.workers >= 0, "data.workers", data.workers, "at least 0")
    order = data.text_order
    _require(-1 <= order < 2**32, "data.text_order", order, "-1, or a seed from 0 to 2^32 - 1")
    plain = data.name not in ("", ".", "..") and not set("/\\\0") & set(data.name)
    _require(plain, "data.name", data.name, "a name that can be part of a path")


def _check_encoder(e: EncoderConfig) -> None:
    names = ("features", "clip", "cnn")
    _require(e.name in names, "encoder.name", e.name, " or ".join(names))
    known = e.name != "cnn" or e.model in cnn.NETWORKS
    _require(known, "encoder.model", e.model, " or ".join(cnn.NETWORKS))
    tune = e.tune in ("frozen", "all") or (e.tune.isdecimal() and int(e.tune) > 0)
    _require(tune, "encoder.tune", e.tune, "frozen, all or a number of blocks or layers")
    _require(0 <= e.lr < math.inf, "encoder.lr", e.lr, "at least 0")
    side = e.side == 0 or 64 <= e.side <= 4096
    _require(side, "encoder.side", e.side, "0 or a side from 64 to 4096 pixels")
    _require(0 <= e.resize <= 4096, "encoder.resize", e.resize, "0 or a side up to 4096 pixels")
    _require(e.words >= 3, "encoder.words", e.words, "at least 3 tokens")
    _require(0 <= e.image_noise < math.inf, "encoder.image_noise", e.image_noise, "at least 0")
    _require(
        e.precision in ("auto", "float32"), "encoder.precision", e.precision, "auto or float32"
    )
    kinds = ("float16", "float32")
    kept = e.cache_precision
    _require(kept in kinds, "encoder.cache_precision", kept, " or ".join(kinds))


def _check(c: Config) -> None:
    _check_bits(c.bits)
    _check_data(c.data)
    for name in ("epochs", "save_every"):
        _require(getattr(c, name) >= 1, name, getattr(c, name), "a whole number of at least 1")
    _require(c.batch_size >= 2, "batch_size", c.batch_size, "at least 2, as losses compare items")
    seeds = {"seed": c.seed, "data.split_seed": c.data.split_seed}
    for name, seed in {**seeds, "validation.seed": c.validation.seed}.items():
        _require(0 <= seed < 2**32, name, seed, "a whole number from 0 to 2^32 - 1")
    _require(0 <= c.threads <= 1024, "threads", c.threads, "a whole number from 0 to 1024")
    protocols = ("common", "own")
    _require(c.protocol in protocols, "protocol", c.protocol, " or ".join(protocols))
    plain = not set("/\\\0") & set(c.variant)
    _require(plain, "variant", c.variant, "a name that can be part of a path")
    _check_encoder(c.encoder)
    can = hasattr(methods.get(c.method), "encode_oracle")
    _require(
        can or not c.oracle_labels, "oracle_labels", True, f"false, as {c.method} has no such mode"
    )
    o, v = c.optim, c.validation
    _require(o.name in ("adam", "adamw", "sgd"), "optim.name", o.name, "adam, adamw or sgd")
    schedules = ("constant", "cosine")
    _require(o.schedule in schedules, "optim.schedule", o.schedule, " or ".join(schedules))
    _require(0 < o.lr < math.inf, "optim.lr", o.lr, "more than 0")
    for name in ("warmup", "momentum"):
        _require(
            0 <= getattr(o, name) < 1, f"optim.{name}", getattr(o, name), "at least 0 and below 1"
        )
    ok = len(o.betas) == 2 and all(0 <= beta < 1 for beta in o.betas)
    _require(ok, "optim.betas", o.betas, "two numbers of at least 0 and below 1")
    _require(0 < o.eps < math.inf, "optim.eps", o.eps, "more than 0")
    for part, factor in o.lr_scale.items():
        _require(0 <= factor < math.inf, f"optim.lr_scale.{part}", factor, "at least 0")
    for name in ("weight_decay", "clip", "averaging"):
        _require(0 <= getattr(o, name) < math.inf, f"optim.{name}", getattr(o, name), "at least 0")
    _require(0 <= v.fraction <= 0.5, "validation.fraction", v.fraction, "from 0 to 0.5")
    _require(v.every >= 1, "validation.every", v.every, "at least 1")
    _require(v.patience >= 0, "validation.patience", v.patience, "at least 0")
    methods.get(c.method).check_settings(c.model)
