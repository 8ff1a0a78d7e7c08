"""Each part of a method can be switched off, and the table says what it was worth."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SMALL, small_config

from vhabl.config import CONFIG_DIR
from vhabl.studies import ablation
from vhabl.studies.ablation import Row, differences, table, variants
from vhabl.system.errors import VhablError


def test_every_part_is_switched_off_once(feature_file: Path) -> None:
    found = variants(
        small_config(feature_file, "vh_abl", "model.weights.bce=0", "model.weights.similarity=1")
    )
    assert found["whole"] == []
    assert found["without similarity"] == ["model.weights.similarity=0"]
    assert found["model.net.fusion_norm=false"] == ["model.net.fusion_norm=false"]
    assert "without bce" not in found  # it is off
    assert 'model.net.activation="tanh"' in found  # the recipe has another one
    assert all(len(changes) == 1 for name, changes in found.items() if name != "whole")
    bare = ["optim.averaging=0", "encoder.image_noise=0"]
    plain = variants(small_config(feature_file, "nested_mlp", *bare))
    assert list(plain) == ["whole", 'model.target="sigmoid"']


def test_each_key_is_taken_towards_another_recipe_alone_the_optimiser_and_all_together(
    feature_file: Path,
) -> None:
    scales = ["optim.lr_scale.net=0.5", "optim.eps=1e-6", "seed=3", "codes=elsewhere",
              "save_every=7", "encoder.side=99"]  # fmt: skip
    ours = small_config(feature_file, "nested_mlp", "model.dropout=0.1", "optim.lr_scale.head=2")
    other = small_config(feature_file, "nested_mlp", "model.dropout=0.3", *scales)
    optim = ["optim.lr_scale.head=1.0", "optim.eps=1e-06", "optim.lr_scale.net=0.5"]
    found = differences(ours, other)
    assert list(found)[:2] == ["whole", "model.dropout=0.3"] and list(found)[3:] == ["all of these"]
    assert found["whole"] == [] and found["model.dropout=0.3"] == ["model.dropout=0.3"]
    name, together = list(found.items())[2]
    assert sorted(together) == sorted(optim) and name == " ".join(together)
    assert sorted(found["all of these"]) == sorted([*optim, "model.dropout=0.3"])


def test_the_table_names_parts_without_an_effect() -> None:
    values = {
        "whole": [0.5, 0.6, 0.7],
        "without a": [0.4, 0.49, 0.61],  # -0.10 -0.11 -0.09
        "without b": [0.6, 0.5, 0.7],  # +0.1 -0.1 0
        "without c": [0.6, 0.71, 0.79],
    }
    rows = [Row(n, s, bits, v) for n, vs in values.items() for s, v in enumerate(vs)
            for bits in (8, 16)]  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in table(rows).splitlines()}
    assert lines["whole"].startswith("| whole | 0.6000 | 0.6000 |")
    assert lines["without a"].endswith("| -0.1000 ± 0.0058 | helps |")
    assert lines["without b"].endswith("| +0.0000 ± 0.0577 | none seen |")
    assert lines["without c"].endswith("| +0.1000 ± 0.0058 | harms |")
    alone = table([r for r in rows if r.seed == 0])
    assert "| -0.1000 | one seed |" in alone


@pytest.mark.parametrize("on", [[], ["--validation"]])
def test_the_command_trains_each_variant_once(
    feature_file: Path, on: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ablation, "SWITCHES", {"model.target": "sigmoid"})
    arguments = ["--config", str(CONFIG_DIR / "nested_mlp.yaml"), "data=wiki",
                 f"data.path={feature_file}", "data.class_names=[]", "bits=[8]", "epochs=1",
                 "batch_size=16", "device=cpu", "out=out", *SMALL["nested_mlp"], *on,
                 "--seeds", "0", "1"]  # fmt: skip
    assert ablation.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| whole |" in out and '| model.target="sigmoid" |' in out and "2 seeds" in out
    assert ("validation" in out) == bool(on)
    folder = Path("out", "ablation-validation" if on else "ablation")
    assert folder.joinpath("table.md").read_text() == out
    monkeypatch.setattr(ablation, "measure", None)  # nothing is trained again
    assert ablation.main(arguments) == 0
    assert capsys.readouterr().out == out
    kept = next(folder.glob("*.json"))
    kept.write_text('[{"variant": "whole", "seed": "0"}]', encoding="utf-8")
    with pytest.raises(
        VhablError, match=rf"{kept.name}: this is no list of records .*seed '0' in row 1"
    ):
        ablation.main(arguments)


def test_only_the_parts_asked_for_are_switched_off(
    feature_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(CONFIG_DIR / "vh_abl.yaml"), "data=wiki",
                 f"data.path={feature_file}", "data.class_names=[]", "bits=[8]", "epochs=1",
                 "batch_size=16", "device=cpu", "out=out", *SMALL["vh_abl"],
                 "--seeds", "0"]  # fmt: skip
    assert ablation.main([*arguments, "--only", "without contrast", "target"]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "0." in line]
    assert rows == ["| whole", "| without contrast", '| model.target="sigmoid"']
    with pytest.raises(
        VhablError, match=r"--only rubbish: no component has this in its name. Choose among"
    ):
        ablation.main([*arguments, "--only", "rubbish"])
