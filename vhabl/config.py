"""One YAML and dotted overrides become one typed, frozen configuration.

The order, later wins: the defaults below, the recipe (configs/<method>.yaml), the recipe's
`for_data` entry for the data set in use, the overrides of the command line. `data=NAME` stands for
the file configs/data/NAME.yaml. A key that does not exist, or a value of another type, is an error
that names the nearest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ReadonlyConfigError,
)

from vhabl import methods
from vhabl.errors import VhablError, fail
from vhabl.settings import REQUIRED, DataConfig, OptimConfig, ValidationConfig, key

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Config:
    method: str = key("a file in vhabl/methods: vh_abl, hiamh, nested_mlp ...")
    data: DataConfig = field(default_factory=DataConfig)
    bits: list[int] = key("code lengths to report; the longest is trained", [16, 32, 64, 128])
    epochs: int = key("most epochs; validation chooses how many are used", 140)
    batch_size: int = key("items in a training batch", 1024)
    seed: int = key("seed of initial weights, batches and dropout", 0)
    device: str = key("auto | cpu | cuda | cuda:N", "auto")
    threads: int = key("CPU threads; 0 leaves torch's choice", 0)
    out: str = key("run folder; empty is checkpoint/<data>/<method>/<seed>", "")
    codes: str = key("folder of the code files; empty is flickrhashcode/<data> (seed 0) or its "
                     "subfolder seed<N>; none writes no codes", "")
    resume: bool = key("go on from the last state in the run folder", False)
    save_every: int = key("epochs between two saved states", 1)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    model: Any = None

    @property
    def run_folder(self) -> Path:
        if self.out:
            return Path(self.out)
        return Path("checkpoint", self.data.name, self.method, str(self.seed))

    @property
    def code_folder(self) -> Path | None:
        if self.codes == "none":
            return None
        if self.codes:
            return Path(self.codes)
        folder = Path("flickrhashcode", self.data.name)
        return folder if self.seed == 0 else folder / f"seed{self.seed}"


def load(path: str | Path, overrides: list[str]) -> Config:
    """Read a recipe, apply dotted overrides, and check every key, type and value.

    Raises VhablError naming the file or key, what was found and what was expected.
    """
    path = Path(path)
    recipe = _read_yaml(path)
    given = _parse_overrides(overrides)
    chosen = given.pop("data", None) or recipe.pop("data", None)
    data_overrides = {k: given.pop(k) for k in list(given) if k.startswith("data.")}
    data = _read_data(chosen) if chosen is not None else None
    method = given.get("method", recipe.get("method"))
    if not isinstance(method, str):
        fail(f"{path}: key method", repr(method), "the name of a file in vhabl/methods")
    schema = _schema(method, path)

    for_data = recipe.pop("for_data", None) or {}
    if not isinstance(for_data, dict):
        fail(f"{path}: key for_data", type(for_data).__name__, "data set names with overrides")
    config = _merge(schema, recipe, path)
    if data is not None:
        config = _merge(config, {"data": data}, CONFIG_DIR / "data" / f"{chosen}.yaml")
        special = for_data.get(data.get("name"), {})
        config = _merge(config, special, f"{path}: for_data.{data.get('name')}")
    for name, value in [*data_overrides.items(), *given.items()]:
        config = _merge_dotted(config, name, value)
    return _finish(config, path)


def from_dict(values: dict[str, Any], where: Path) -> Config:
    """The configuration that a run folder stored, checked as if it were typed in."""
    method = values.get("method")
    if not isinstance(method, str):
        fail(f"{where}: key method", repr(method), "the name of a method")
    return _finish(_merge(_schema(method, where), values, where), where)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_saved(path: Path) -> Config:
    """Read a run's config.yaml."""
    return from_dict(_read_yaml(path), path)


# Keys that say where and how a run is carried out, not what it computes.
_CARRIED_OUT = {"out", "codes", "resume", "device", "threads", "save_every"}


def first_difference(stored: str, config: Config) -> tuple[str, Any, Any] | None:
    """The first key in which a stored YAML differs from a configuration: (key, stored, ours)."""
    theirs = dict(_flatten(yaml.safe_load(stored), "stored configuration"))
    ours = dict(_flatten(yaml.safe_load(to_yaml(config)), "configuration"))
    for name in [*ours, *theirs]:
        if name not in _CARRIED_OUT and theirs.get(name) != ours.get(name):
            return name, theirs.get(name), ours.get(name)
    return None


def describe_keys(method: str | None) -> str:
    """Every key with its type, default and meaning, as `--help` prints them."""
    lines: list[str] = []
    _describe(Config, "", lines)
    for name in [method] if method else methods.names():
        lines.append(f"\nkeys of method {name}:")
        _describe(methods.get(name).Settings, "model.", lines)
    return "\n".join(lines)


def _describe(cls: Any, prefix: str, lines: list[str]) -> None:
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.default_factory):
            _describe(f.default_factory, f"{prefix}{f.name}.", lines)
        elif "help" in f.metadata:
            if f.default_factory is not dataclasses.MISSING:
                default: Any = f.default_factory()
            else:
                default = "required" if f.default == REQUIRED else f.default
            lines.append(f"  {prefix + f.name:22s} {f.metadata['help']} [{default}]")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(path, "no such file", "a YAML file")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise VhablError(f"{path}: found text that is not YAML ({reason}); expected keys") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        fail(path, type(values).__name__, "a YAML file of keys and values")
    return values


def _parse_overrides(overrides: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign or not name:
            fail(f"argument {text!r}", "no '='", "key=value, such as epochs=60")
        try:
            given[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            fail(f"key {name}", repr(value), "a YAML value")
    return given


def data_names() -> list[str]:
    return sorted(p.stem for p in (CONFIG_DIR / "data").glob("*.yaml"))


def _read_data(chosen: Any) -> dict[str, Any]:
    if isinstance(chosen, dict):  # a run's stored configuration
        return chosen
    path = CONFIG_DIR / "data" / f"{chosen}.yaml"
    if not isinstance(chosen, str) or not path.is_file():
        fail("key data", repr(chosen), f"one of {', '.join(data_names())}")
    return _read_yaml(path)


def _schema(method: str, where: Path) -> DictConfig:
    if method not in methods.names():
        fail(f"{where}: key method", repr(method), f"one of {', '.join(methods.names())}")
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    for section in ("data", "optim", "validation"):
        OmegaConf.set_readonly(schema[section], False)
    schema.model = OmegaConf.structured(methods.get(method).Settings)
    OmegaConf.set_readonly(schema.model, False)
    return schema


def _known_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            keys += _known_keys(node, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _unknown_key(config: DictConfig, name: str, where: object) -> VhablError:
    known = _known_keys(config)
    last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or [last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return VhablError(f"{where}: found unknown key {name}; expected a key of --help{hint}")


def _merge(config: DictConfig, values: Any, where: object) -> DictConfig:
    """Merge nested values, reporting the first key that does not fit."""
    for name, value in _flatten(values, where):
        config = _merge_dotted(config, name, value, where)
    return config


def _flatten(values: Any, where: object, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        fail(where, type(values).__name__, "keys and values")
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, where, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _merge_dotted(
    config: DictConfig, name: str, value: Any, where: object = "command line"
) -> DictConfig:
    if name not in _known_keys(config):
        raise _unknown_key(config, name, where)
    current = OmegaConf.select(config, name, throw_on_missing=False)
    if isinstance(value, str) and "${" in value:
        fail(f"{where}: key {name}", repr(value), "a plain value")
    try:
        if isinstance(current, bool) and not isinstance(value, bool):
            raise ValueError  # omegaconf would take 0, 1 and 'on' for booleans
        if value is None or (isinstance(value, bool) and not isinstance(current, bool)):
            raise ValueError
        OmegaConf.update(config, name, value)
    except (ValueError, OmegaConfBaseException) as error:
        if isinstance(error, (ConfigKeyError, ReadonlyConfigError)):
            raise _unknown_key(config, name, where) from None
        kind = _type_name(config, name)
        raise VhablError(f"{where}: key {name}: found {value!r}; expected {kind}") from None
    return config


def _type_name(config: DictConfig, name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    node = section._get_node(leaf)
    kind = node._metadata.ref_type
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind in kinds:
        return kinds[kind]
    element = kinds.get(getattr(node._metadata, "element_type", None), "value")
    return f"a list of {element.removeprefix('a ')}s"


def _finish(config: DictConfig, where: object) -> Config:
    try:
        result = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise VhablError(f"{where}: {error.full_key}: found nothing; expected a value "
                         f"(for example data={data_names()[0]})") from None
    assert isinstance(result, Config)
    _check(result)
    return result


def _require(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        fail(f"key {name}", repr(found), expected)


def _check(c: Config) -> None:
    """Values that the types alone do not hold."""
    _require(len(c.bits) > 0, "bits", c.bits, "at least one code length")
    for bits in c.bits:
        _require(1 <= bits <= 4096, "bits", bits, "code lengths from 1 to 4096")
    for name in ("epochs", "batch_size", "save_every"):
        _require(getattr(c, name) >= 1, name, getattr(c, name), "a whole number of at least 1")
    _require(c.batch_size >= 2, "batch_size", c.batch_size, "at least 2 (losses compare items)")
    for name in ("seed", "threads"):
        _require(getattr(c, name) >= 0, name, getattr(c, name), "a whole number of at least 0")
    _require(c.data.kind in ("features", "pairs"), "data.kind", c.data.kind, "features or pairs")
    _require(c.data.scale in ("standard", "global", "none"), "data.scale", c.data.scale,
             "standard, global or none")
    o = c.optim
    _require(o.name in ("adam", "adamw", "sgd"), "optim.name", o.name, "adam, adamw or sgd")
    _require(o.schedule in ("constant", "cosine"), "optim.schedule", o.schedule,
             "constant or cosine")
    _require(o.lr > 0 and math.isfinite(o.lr), "optim.lr", o.lr, "a number above 0")
    for name in ("ema", "warmup", "momentum"):
        _require(0 <= getattr(o, name) < 1, f"optim.{name}", getattr(o, name), "0 up to below 1")
    for name in ("weight_decay", "clip"):
        _require(getattr(o, name) >= 0, f"optim.{name}", getattr(o, name), "0 or more")
    v = c.validation
    _require(0 <= v.fraction <= 0.5, "validation.fraction", v.fraction, "0 to 0.5")
    _require(v.every >= 1, "validation.every", v.every, "at least 1")
    _require(v.patience >= 0, "validation.patience", v.patience, "0 or more")
    methods.get(c.method).check_settings(c.model)
