"""Recipes and overrides: typed, whole, and wrong keys named with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhabl import methods
from vhabl.config import (
    CONFIG_DIR,
    Config,
    data_names,
    describe_keys,
    first_difference,
    flat,
    from_yaml,
    key_types,
    load,
    load_baselines,
    recipes,
    to_yaml,
)
from vhabl.system.errors import VhablError

RECIPE = CONFIG_DIR / "vh_abl.yaml"


@pytest.mark.parametrize("recipe", recipes(), ids=lambda p: p.stem)
@pytest.mark.parametrize("data", data_names())
def test_every_recipe_fits_every_data_set(recipe: Path, data: str) -> None:
    config = load(recipe, [f"data={data}"])
    assert config.run_folder.parts[1:3] == (data, recipe.stem) and config.data.name == data
    assert from_yaml(to_yaml(config), recipe) == config


def test_the_command_line_wins_over_the_data_entry_and_that_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "method: vh_abl\nepochs: 7\nbatch_size: 70\nseed: 3\n"
        "for_data: {wiki: {batch_size: 80, seed: 4, optim: {lr: 1e-2}, model.net.dim: 32}}\n"
    )
    config = load(recipe, ["data=wiki", "seed=5", "model.weights.nested=2"])
    assert (config.epochs, config.batch_size, config.seed) == (7, 80, 5)
    assert (config.optim.lr, config.model.net.dim, config.model.weights.nested) == (0.01, 32, 2.0)
    other = load(recipe, ["data=emoji"])
    assert (other.batch_size, other.seed, other.model.net.dim) == (70, 3, 256)


def test_what_a_run_stored_is_a_recipe(tmp_path: Path) -> None:
    """With its data, which an override changes in part or, by another name, as a whole."""
    first = load(RECIPE, ["data=wiki", "data.path=x.mat", "epochs=3", "protocol=own"])
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(first))
    assert load(stored, []) == first
    changed = load(stored, ["data.path=y.mat", "epochs=4"])
    assert (changed.data.path, changed.epochs, changed.data.name) == ("y.mat", 4, "wiki")
    other = load(stored, ["data=emoji"])
    assert other.data == load(RECIPE, ["data=emoji"]).data and other.model == first.model
    stored.write_text("method: vh_abl\ndata: {name: mine, knd: mat}\n")
    with pytest.raises(VhablError, match=r"unknown key 'data\.knd'\. Did you mean 'data\.kind'"):
        load(stored, [])


def test_data_overrides_apply_to_the_chosen_data_set() -> None:
    config = load(RECIPE, ["data=wiki", "data.path=/elsewhere/x.mat"])
    assert config.data.name == "wiki" and config.data.path == "/elsewhere/x.mat"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochz=3", r"unknown key 'epochz'\. Did you mean 'epochs'\?"),
        ("lr=1", r"unknown key 'lr'\. Did you mean 'optim\.lr'\?"),
        ("model.weights.nestd=1", r"Did you mean 'model\.weights\.nested'\?"),
        ("optim=3", r"unknown key 'optim'"),
        ("epochs=many", "epochs is 'many'.*a whole number"),
        ("epochs=1.5", r"epochs is '1\.5\'.*a whole number"),
        ("epochs=true", "epochs is True.*a whole number"),
        ("epochs=", "epochs is ''.*a whole number"),
        ("epochs=null", "epochs is None.*a whole number"),
        ("epochs=0", "epochs is 0"),
        ("resume=1", "resume is 1.*true or false"),
        ("optim.lr=fast", r"optim\.lr is 'fast'.*a number"),
        ("optim.lr=-1", r"optim\.lr is -1"),
        ("optim.lr=nan", r"optim\.lr is nan"),
        ("optim.name=adm", r"optim\.name is 'adm'.*adam, adamw.*sgd"),
        ("bits=0", "bits is 0.*code lengths from 1 to 4096"),
        ("data.class_names=[a,a]", r"data\.class_names is .*names that differ"),
        ("bits=[]", r"bits is \[\].*at least one"),
        ("bits=16,x", "bits is '16,x'.*a list of whole numbers"),
        ("model.net={head: 7}", r"unknown key 'model\.net\.head'"),
        ("bits=[16,x]", r"bits is \[16, 'x'\].*a list of whole numbers"),
        ("batch_size=1", "batch_size is 1"),
        ("seed=-1", r"seed is -1.*a whole number from 0 to 2\^32 - 1"),
        ("seed=4294967296", "seed is 4294967296"),
        ("data.split_seed=-1", r"data\.split_seed is -1"),
        ("validation.seed=-1", r"validation\.seed is -1"),
        ("threads=-1", "threads is -1"),
        ("threads=100000", "threads is 100000.*a whole number from 0 to 1024"),
        ("data=flickr26k", "data is 'flickr26k'.*one of.*wiki"),
        ("out=run #1", r"'out=run #1': YAML takes '#' for a comment"),
        ("bits=8,8,16", r"bits is \[8, 8, 16\].*that differ"),
        (r"data.separator=\t", r"data\.separator is .* is a tab"),
        ("data.name=../up", r"data\.name"),
        ("data.kind=csv", r"data\.kind is 'csv'"),
        ("data.scale=max", r"data\.scale is 'max'"),
        ("validation.fraction=2", r"validation\.fraction is 2"),
        ("method=vhabl", "method is 'vhabl'.*one of.*vh_abl"),
        ("model.target=hard", r"model\.target is 'hard'"),
        ("model.net.heads=7", r"model\.net\.heads is 7"),
        ("model.net.activation=sine", r"model\.net\.activation is 'sine'"),
        ("model.net.dropout=1.5", r"model\.net\.dropout is 1\.5"),
        ("model.net.members=0", r"model\.net\.members is 0"),
        ("model.net.dim=0", r"model\.net\.dim is 0"),
        ("model.momentum=1", r"model\.momentum is 1"),
        ("model.shortest=0", r"model\.shortest is 0"),
        ("bits", "argument 'bits.*no key=value"),
        ("seed=[", r"seed is '\['.*a YAML value"),
    ],
)
def test_a_wrong_override_names_key_value_and_expectation(override: str, message: str) -> None:
    with pytest.raises(VhablError, match=message):
        load(RECIPE, ["data=wiki", override])


def test_numbers_are_decimal_and_texts_stay_as_they_are() -> None:
    """YAML 1.1 takes 16:32 for 992 minutes, 010 for 8, and 1.10 for 1.1."""
    for given in ("bits=16:32", "bits=010", "seed=1:30", "bits=0x10", "epochs=1_0"):
        with pytest.raises(VhablError, match=given.split("=")[0]):
            load(RECIPE, ["data=wiki", given])
    given = ["out=1.10", "variant=007", "optim.lr=1e-2", "optim.betas=0.5,.9", "seed=7"]
    config = load(RECIPE, ["data=wiki", *given])
    assert (config.out, config.variant, config.seed) == ("1.10", "007", 7)
    assert (config.optim.lr, config.optim.betas) == (0.01, [0.5, 0.9])
    assert from_yaml(to_yaml(config), "stored") == config


def test_overrides_need_no_quotes_and_take_a_section() -> None:
    overrides = ["bits=16,32", "optim.betas=0.8,0.99", "model.net={dim: 24, dropout: 0.1}"]
    config = load(RECIPE, ["data=wiki", *overrides])
    assert config.bits == [16, 32] and config.optim.betas == [0.8, 0.99]
    assert config.model.net.dim == 24 and config.model.net.dropout == 0.1
    assert load(RECIPE, ["data=wiki", "bits=16"]).bits == [16]
    assert load(RECIPE, ["data=wiki", "data.class_names=a"]).data.class_names == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "is not YAML"),
        ("- a\n- b\n", "a list"),
        ("", "a NoneType"),
        ("epochs: 3\n", "method is None"),
        (
            "method: vh_abl\nepochs: {a: 1}\n",
            "unknown key 'epochs.a'. Did you mean 'epochs'",
        ),
        ("method: vh_abl\nfor_data: 3\n", "for_data.*int"),
        ("method: vh_abl\nepochs: 3\nepochs: 4\n", r"not YAML \(epochs comes twice\)"),
        ("method: vh_abl\noptim: {lr: 1, lr: 2}\n", r"not YAML \(lr comes twice\)"),
        ("method: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(VhablError, match=message) as caught:
        load(recipe, ["data=wiki"])
    assert str(recipe) in str(caught.value)


def test_missing_and_binary_recipes(tmp_path: Path) -> None:
    with pytest.raises(VhablError, match="no such file"):
        load(tmp_path / "none.yaml", [])
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(VhablError, match="not text"):
        load(binary, [])


def test_a_recipe_without_data_says_what_to_give() -> None:
    with pytest.raises(VhablError, match=r"data\.name.*data=NAME"):
        load(RECIPE, [])


def test_help_lists_every_key_with_meaning() -> None:
    text = describe_keys(None)
    assert "  model." not in text and "--config RECIPE" in text
    for key in key_types(Config):
        assert f"  {key} " in text, key
    for name in methods.names():
        text = describe_keys(CONFIG_DIR / f"{name}.yaml")
        for key in key_types(Config) | key_types(methods.get(name).Settings, "model."):
            assert f"  {key} " in text, key


def test_baselines_take_the_same_overrides() -> None:
    config = load_baselines(["data=wiki", "bits=[8]", "seed=2"])
    assert config.data.name == "wiki" and config.bits == [8] and config.seed == 2
    with pytest.raises(VhablError, match="Did you mean 'seed'"):
        load_baselines(["data=wiki", "sed=2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.warmup=1", r"optim\.warmup is 1\.0.*0.*below 1"),
        ("optim.momentum=1", r"optim\.momentum is 1\.0.*0.*below 1"),
        ("optim.weight_decay=-1", r"optim\.weight_decay is -1\.0.*0"),
        ("optim.clip=-1", r"optim\.clip is -1\.0.*0"),
        ("optim.averaging=inf", r"optim\.averaging is inf.*0"),
        ("validation.patience=-1", r"validation\.patience is -1.*0"),
        ("encoder.name=clap", r"encoder\.name is 'clap'.*features.*clip"),
        ("encoder.tune=0", r"encoder\.tune is '0'.*frozen, all.*a number"),
        ("encoder.lr=-1", r"encoder\.lr is -1\.0.*0"),
        ("encoder.image_noise=-1", r"encoder\.image_noise is -1\.0.*0"),
        ("encoder.words=2", r"encoder\.words is 2.*at least 3 tokens"),
        (
            "encoder.resize=5000",
            r"encoder\.resize is 5000.*0 or a side up to 4096",
        ),
        ("encoder.precision=half", r"encoder\.precision is 'half'.*auto"),
        ("encoder.cache_precision=x", r"encoder\.cache_precision is 'x'.*float16"),
        ("data.workers=-1", r"data\.workers is -1.*0"),
        ("variant=a/b", "variant is 'a/b'.*a name"),
    ],
)
def test_a_value_outside_its_range_is_named(override: str, message: str) -> None:
    with pytest.raises(VhablError, match=message):
        load(RECIPE, ["data=wiki", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [("bits=[8,0]", "bits is 0"), ("data.scale=max", r"data\.scale is 'max'")],
)
def test_baselines_check_values_too(override: str, message: str) -> None:
    with pytest.raises(VhablError, match=message):
        load_baselines(["data=wiki", override])


@pytest.mark.parametrize("change", ["seed=1", "epochs=3", "bits=[8]", "model.weights.nested=2"])
def test_a_key_that_changes_the_result_is_a_difference(change: str) -> None:
    config = load(RECIPE, ["data=wiki"])
    found = first_difference(flat(config), flat(load(RECIPE, ["data=wiki", change])))
    assert found is not None and found[0] == change.partition("=")[0]
    assert first_difference(flat(config), flat(config)) is None


@pytest.mark.parametrize(
    "change", ["out=x", "codes=none", "resume=true", "device=cpu", "threads=3", "save_every=9"]
)
def test_a_key_of_how_a_run_is_carried_out_is_no_difference(change: str) -> None:
    config = load(RECIPE, ["data=wiki"])
    assert first_difference(flat(config), flat(load(RECIPE, ["data=wiki", change]))) is None
