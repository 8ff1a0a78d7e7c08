"""Towers and networks: equal to their libraries', weights from files, frozen parts, their cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from helpers import (
    CNN,
    COLOURS,
    TINY_TOWERS,
    TinyAlexNet,
    array_config,
    cells,
    pair_config,
    picture_arrays,
    small_config,
    write_arrays,
    write_pair_folder,
)
from PIL import ExifTags, Image
from safetensors.torch import save_file

from vhabl import train
from vhabl.config import Config, build_method, override
from vhabl.data import load as load_data
from vhabl.data.images import (
    ImageFiles,
    open_image,
    read,
    read_pixels,
    read_whole,
    to_pixels,
)
from vhabl.data.pairs import pictures
from vhabl.encoders import ClipEncoder, CnnEncoder, FeatureScaling, PixelEncoder, cnn, open_clip
from vhabl.evaluation.records import code_tasks
from vhabl.report import page
from vhabl.settings import DataConfig, EncoderConfig
from vhabl.system.distributed import Ranks
from vhabl.system.errors import VhablError
from vhabl.training import run_folder
from vhabl.training.feature_cache import frozen_outputs
from vhabl.training.trainer import Trainer
from vhabl.types import Batch, Dataset, DataSpec, Inputs, Rows, Split

RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": TINY_TOWERS["text_cfg"],
}
CAPTIONS = ["a red dog", "", "Two words, and more: " + "again and " * 30]


def architecture(folder: Path, described: object = TINY_TOWERS) -> str:
    file = folder / "towers.json"
    file.write_text(json.dumps(described), encoding="utf-8")
    return str(file)


def encoder(folder: Path, described: object = TINY_TOWERS, **settings: object) -> ClipEncoder:
    torch.manual_seed(0)
    model = architecture(folder, described)
    config = EncoderConfig(
        "clip", model, "", words=12, cache_precision="float32", **{"tune": "frozen", **settings}
    )
    return ClipEncoder(config, tokens="joint").eval()


def raw_inputs(towers: ClipEncoder, room: int = 0) -> Inputs:
    torch.manual_seed(1)
    side = towers.size + room
    pixels = torch.randint(256, (len(CAPTIONS), 3, side, side), dtype=torch.uint8)
    tokens, _ = open_clip.tokenise(CAPTIONS, 12)
    return Inputs(pixels, torch.from_numpy(tokens))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in open_clip.normalisation("", ""))
    return (pixels / 255 - mean) / spread


# -- equal to open_clip ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tune", ["frozen", "1", "2", "9", "all"])
@pytest.mark.parametrize("described", [TINY_TOWERS, RESNET], ids=["vit", "resnet"])
def test_towers_equal_open_clip(described: object, tune: str, tmp_path: Path) -> None:
    """Pooled vectors and tokens of the same weights; texts there have the whole context."""
    towers = encoder(tmp_path, described, tune=tune)
    inputs = raw_inputs(towers)
    found = towers(inputs)
    clip = towers.clip
    whole = torch.zeros(len(CAPTIONS), 16, dtype=torch.long)
    whole[:, :12] = inputs.text
    assert torch.allclose(found.image, clip.encode_image(normalised(inputs.image)), atol=1e-5)
    assert torch.allclose(found.text, clip.encode_text(whole), atol=1e-5)
    # Tokens: open_clip's last hidden states, after the same norm and projection.
    hidden = clip.forward_intermediates(
        image=normalised(inputs.image), text=whole, image_indices=1, text_indices=1,
        image_output_fmt="NCHW", normalize=False,
    )  # fmt: skip
    words = clip.ln_final(hidden["text_intermediates"][-1]) @ clip.text_projection
    lengths = [len(open_clip.module().SimpleTokenizer().encode(c)) for c in CAPTIONS]
    for row, length in enumerate(lengths):
        there = min(length, 10) + 1  # the start-of-text token is a word, the end-of-text one not
        assert found.word_mask[row].tolist() == [True] * there + [False] * (12 - there)
        assert torch.allclose(found.words[row, :there], words[row, :there], atol=1e-5)
        assert (found.words[row, there:] == 0).all()
    if described is TINY_TOWERS:
        patches = hidden["image_intermediates"][-1].flatten(2).mT  # (B, P, w)
        expected = clip.visual.ln_post(patches) @ clip.visual.proj
        assert torch.allclose(found.patches, expected, atol=1e-5)
    else:
        assert found.patches.shape == (3, 4, 32)


def test_the_quick_gelu_of_open_clip_is_computed_quicker(tmp_path: Path) -> None:
    described = TINY_TOWERS | {"quick_gelu": True}
    ours = encoder(tmp_path, described, tune="all").clip
    theirs = open_clip.module().CLIP(**described)
    theirs.load_state_dict(ours.state_dict())
    assert sum(isinstance(m, open_clip.QuickMLP) for m in ours.modules()) == 6
    inputs = raw_inputs(encoder(tmp_path, described))
    texts = torch.nn.functional.pad(inputs.text, (0, 4))
    for clip in (ours, theirs):
        (clip.encode_image(normalised(inputs.image)) * clip.encode_text(texts)).sum().backward()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    gradients = {name: (p.grad, q.grad) for (name, p), q in pairs if q.grad is not None}
    assert len(gradients) > 80
    for name, (found, expected) in gradients.items():
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), name
    with torch.no_grad():
        found, expected = (c.encode_image(normalised(inputs.image)) for c in (ours, theirs))
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, encoder(tmp_path)(inputs).image, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("tune", ["frozen", "1", "2"])
@pytest.mark.parametrize("described", [TINY_TOWERS, RESNET], ids=["vit", "resnet"])
def test_what_the_frozen_part_gives_stands_for_raw_inputs(
    described: object, tune: str, tmp_path: Path
) -> None:
    towers = encoder(tmp_path, described, tune=tune)
    inputs = raw_inputs(towers)
    kept = towers.frozen(inputs)
    assert kept.image.is_floating_point() and kept.text.is_floating_point()
    assert towers.frozen(kept) is not inputs
    raw, again = towers(inputs), towers(kept)
    for part in ("image", "text", "patches", "words", "word_mask"):
        assert torch.equal(getattr(raw, part), getattr(again, part)), part
    one = towers(inputs.only("text"))
    assert one.image is None and one.patches is None and torch.equal(one.text, raw.text)


@torch.no_grad()
def test_pooled_vectors_alone_are_the_same_and_standardised(tmp_path: Path) -> None:
    towers = encoder(tmp_path)
    alone = ClipEncoder(towers.config, tokens="").eval()
    alone.clip.load_state_dict(towers.clip.state_dict())
    inputs = raw_inputs(towers)
    both, pooled = towers(inputs), alone(inputs)
    assert pooled.words is None and pooled.patches is None
    assert torch.allclose(both.image, pooled.image, atol=1e-4)  # its statistics are still 0 and 1
    assert torch.allclose(both.text, pooled.text, atol=1e-4)
    assert alone.frozen(inputs).image.shape == (3, 1, 32)
    for view in ("image", "text"):
        alone.norms[view].momentum = 1.0
    shown = alone.train()(inputs)
    assert torch.allclose(shown.image.mean(dim=0), torch.zeros(32), atol=1e-4)
    assert torch.allclose(shown.text.std(dim=0, correction=0), torch.ones(32), atol=1e-2)


@pytest.mark.parametrize("tune", ["frozen", "1", "all"])
@pytest.mark.parametrize("described", [TINY_TOWERS, RESNET], ids=["vit", "resnet"])
def test_what_is_tuned_is_what_the_recipe_says(
    described: object, tune: str, tmp_path: Path
) -> None:
    towers = encoder(tmp_path, described, tune=tune, lr=1e-6).train()
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    everything = {name for name, _ in towers.named_parameters()} - {"clip.logit_scale"}
    last = (
        {n for n in everything if "resblocks.2." in n}
        | {n for n in everything if "layer4." in n or "attnpool" in n}
        | {n for n in everything if any(e in n for e in ("ln_post", "proj", "ln_final"))
           and "resblocks" not in n and "layer" not in n}
    )  # fmt: skip
    assert trained == {"frozen": set(), "1": last, "all": everything}[tune]
    groups = towers.param_groups()
    assert [g["lr"] for g in groups] == [1e-6] * (tune != "frozen")
    assert sum(len(g["params"]) for g in groups) == len(trained)
    live = [*towers.live["image"], *towers.live["text"]]
    assert all(block.training for block in live) and bool(live) == (tune != "frozen")
    fixed = {name for name, _ in towers.fixed_tensors()}
    assert fixed.isdisjoint(trained) and bool(fixed) == (tune != "all")
    if tune == "all":
        return
    before = {name: t.clone() for name, t in towers.fixed_tensors()}
    towers(raw_inputs(towers))  # statistics of a frozen part stay
    assert all(torch.equal(before[name], t) for name, t in towers.fixed_tensors())


def test_a_rate_of_zero_is_the_recipes(tmp_path: Path) -> None:
    config = pair_config(write_pair_folder(tmp_path / "p"), "cmcl", "encoder.lr=0", "optim.lr=0.5")
    method = build_method(config, load_data(config.data, config.encoder).spec)
    assert "lr" not in method.param_groups()[1]
    names = {id(p) for g in method.param_groups() for p in g["params"]}
    assert names == {id(p) for p in method.parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in method.param_groups()) == len(names)


@torch.no_grad()
def test_pictures_are_mirrored_at_random_in_training_alone(tmp_path: Path) -> None:
    towers = encoder(tmp_path, tune="all", augment=True, resize=40)
    inputs = raw_inputs(towers, room=8)
    middle = inputs.image[..., 4:36, 4:36]
    assert torch.equal(towers.cut(inputs.image), middle)
    towers.train()
    cuts = torch.stack([towers.cut(middle) for _ in range(60)])
    flipped = (cuts == middle.flip(3)).flatten(2).all(dim=2)
    assert torch.equal(flipped, ~(cuts == middle).flatten(2).all(dim=2))
    assert ((flipped.sum(dim=0) > 15) & (flipped.sum(dim=0) < 45)).all()
    assert len(flipped.unique(dim=0)) == 8  # each of the three by itself
    assert not towers.cacheable
    with pytest.raises(VhablError, match=r"encoder.resize is 31, but must be 0, or at least 32"):
        encoder(tmp_path, resize=31)


@pytest.mark.parametrize("words", [2, 17])
def test_texts_fit_the_context(words: int, tmp_path: Path) -> None:
    config = EncoderConfig("clip", architecture(tmp_path), "", words=words)
    with pytest.raises(VhablError, match=r"encoder.words is .* must be from 3 to 16"):
        ClipEncoder(config, tokens="joint")


def test_tokens_are_those_of_open_clip() -> None:
    tokens, too_long = open_clip.tokenise(CAPTIONS, 12)
    expected = open_clip.module().SimpleTokenizer(context_length=12)(CAPTIONS)
    assert np.array_equal(tokens, expected.numpy()) and tokens.dtype == np.int64
    assert too_long == 1
    assert open_clip.tokenise(["a b c"], 5)[1] == 0 and open_clip.tokenise(["a b c"], 4)[1] == 1


# -- weights ---------------------------------------------------------------------------------------


class Traced(torch.nn.Module):
    """What OpenAI's archive is: a script whose state holds the tensors."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 9)):
            self.register_buffer(name, torch.tensor(value))
        for name, child in clip.named_children():
            setattr(self, name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            setattr(self, name, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


KINDS = ["archive", "archive of bfloat16", "state dict", "wrapped", "Lightning's", "model",
         "safetensors", "SAFETENSORS", "scale of one axis", "run"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_in_any_file(kind: str, tmp_path: Path) -> None:
    model = architecture(tmp_path, {**TINY_TOWERS, "quick_gelu": True})
    torch.manual_seed(3)
    clip = open_clip.build_towers(model, "")
    state = clip.state_dict()
    endings = {"safetensors": "safetensors", "SAFETENSORS": "SAFETENSORS", "run": "safetensors"}
    file = tmp_path / f"w.{endings.get(kind, 'pt')}"
    if kind.startswith("archive"):
        if kind == "archive of bfloat16":
            clip = clip.bfloat16()
            state = {name: t.float() for name, t in clip.state_dict().items()}
        torch.jit.trace(Traced(clip), torch.zeros(1)).save(str(file))
    elif kind == "Lightning's":
        named = {f"model.module.{n}": t for n, t in state.items()}
        torch.save({"epoch": 3, "state_dict": named, "global_step": 9}, file)
    elif kind == "model":
        torch.save({"model": state, "optimizer": {}}, file)
    elif kind == "scale of one axis":
        torch.save({**state, "logit_scale": state["logit_scale"].reshape(1)}, file)
    elif kind == "state dict":
        torch.save({name: t.half() for name, t in state.items()}, file)
        state = {name: t.half().float() for name, t in state.items()}
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, file)
    elif kind in ("safetensors", "SAFETENSORS"):
        save_file(state, file)
    else:
        others = {"memory": torch.zeros(3)}
        save_file({f"encoder.clip.{n}": t for n, t in state.items()} | others, file)
    torch.manual_seed(4)
    found = open_clip.build_towers(model, str(file)).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_an_archive_of_openais_needs_quick_gelu(tmp_path: Path) -> None:
    clip = open_clip.build_towers(architecture(tmp_path), "")
    torch.jit.trace(Traced(clip), torch.zeros(1)).save(str(tmp_path / "w.pt"))
    message = r"w\.pt: OpenAI's weights are for QuickGELU\. Set .quick_gelu.: true"
    with pytest.raises(VhablError, match=message):
        open_clip.build_towers(str(tmp_path / "towers.json"), str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("model", "weights", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("RN50", "openai", True),
        ("ViT-B-16", "metaclip_fullcc", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "", False),
        ("ViT-B-32-quickgelu", "openai", True),
    ],
)
def test_weights_by_name_have_the_activation_that_they_were_trained_with(
    model: str, weights: str, quick: bool
) -> None:
    with torch.device("meta"):
        towers = open_clip.build_towers(model, weights, read=False)
    assert any(isinstance(m, open_clip.QuickMLP) for m in towers.modules()) == quick


def test_weights_by_name_have_the_pictures_that_they_were_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    half = (0.5, 0.5, 0.5)
    assert tuple(map(tuple, open_clip.normalisation("ViT-L-14", "laion2b_s32b_b82k"))) == (
        half,
        half,
    )
    for weights in ("openai", "", "cache/ViT-L-14.pt"):
        mean, spread = open_clip.normalisation("ViT-L-14", weights)
        assert mean == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
        assert spread == pytest.approx([0.2686, 0.2613, 0.2758], abs=1e-4)
    assert open_clip.squeezed("ViT-H-14", "dfn5b", False)
    assert not open_clip.squeezed("ViT-B-32", "openai", False)
    assert capsys.readouterr().err == ""
    assert open_clip.squeezed("ViT-B-32", "openai", True)
    assert "openai was trained on pictures cut in the centre" in capsys.readouterr().err
    config = EncoderConfig("clip", "ViT-H-14", "dfn5b")
    assert pictures([], DataConfig("a", "pairs", "a"), config).squeeze


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model, file = architecture(tmp_path), tmp_path / "w.pt"
    other = json.loads(json.dumps(TINY_TOWERS))
    other["vision_cfg"]["width"], other["text_cfg"]["layers"] = 48, 2
    torch.save(open_clip.build_towers(architecture(tmp_path / "..", other), "").state_dict(), file)
    architecture(tmp_path)
    with pytest.raises(VhablError) as error:
        open_clip.build_towers(model, str(file))
    text = str(error.value)
    assert text.startswith(f"{file}: weights of another architecture (no transformer.")
    assert "more). encoder.model is" in text
    state = open_clip.build_towers(model, "").state_dict()
    for name, change, message in (
        ("visual.proj", lambda t: t[:-1], r"\(visual.proj of shape \(31, 32\) for \(32, 32\)\)"),
        ("visual.proj", lambda t: t * np.nan, r"visual.proj has values that are not finite"),
        ("visual.proj", lambda t: t.to(torch.int8), r"visual.proj is of type torch.int8"),
        ("ghost", lambda t: torch.zeros(1), r"\(an unknown ghost\)"),
    ):
        torch.save(state | {name: change(state.get(name))}, file)
        with pytest.raises(VhablError, match=message):
            open_clip.build_towers(model, str(file))
    for content, message in (
        (b"no weights at all", "the file is damaged or of another kind"),
        (None, "something else than tensors by name"),
    ):
        if content is None:
            torch.save({"a": 3}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(VhablError, match=message):
            open_clip.build_towers(model, str(file))


def test_weights_that_are_nowhere_are_said(tmp_path: Path) -> None:
    with pytest.raises(VhablError, match=r"encoder.weights nowhere.pt: no such file"):
        open_clip.build_towers(architecture(tmp_path), "nowhere.pt")
    with pytest.raises(VhablError, match=r"by name: openai, .*metaclip_400m"):
        open_clip.load_weights(torch.nn.Module(), "ViT-B-32-quickgelu", "openaj")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("no file", "no such file. encoder.model must be a JSON file"),
        ("{", "is not JSON"),
        ({"embed_dim": 3}, "other keys. It must have embed_dim, vision_cfg, text_cfg"),
        (
            TINY_TOWERS | {"vision_cfg": {"image_size": 32, "wide": 3}},
            "the architecture cannot be built",
        ),
        (TINY_TOWERS | {"custom_text": True}, "its towers are of another kind"),
        (TINY_TOWERS | {"text_cfg": {"hf_model_name": "x"}}, "its towers are of another kind"),
        (
            TINY_TOWERS | {"text_cfg": {**TINY_TOWERS["text_cfg"], "no_causal_mask": True}},
            "its towers are of another kind",
        ),
    ],
)
def test_architectures_that_are_not_served(described: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "towers.json"
    if described != "no file":
        text = described if isinstance(described, str) else json.dumps(described)
        file.write_text(text, encoding="utf-8")
    with pytest.raises(VhablError, match=message):
        open_clip.build_towers(str(file), "")
    with pytest.raises(VhablError, match=r"encoder.model is 'ViT-B-33'"):
        open_clip.picture_size("ViT-B-33")


def test_torchvision_is_mended_where_its_library_does_not_load(tmp_path: Path) -> None:
    """As beside a CPU build of torch, where the import ends at an operator that is not there."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def fake(dets, scores, iou_threshold):\n"
        "    return dets\n"
    )
    check = (
        "import vhabl.encoders.open_clip as o, sys\n"
        "o.mend_torchvision(); o.mend_torchvision()\n"
        "assert 'torchvision' in sys.modules and len(o._schemas) == 1\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + check
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (package / "__init__.py").write_text("raise RuntimeError('something else')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "something else" in done.stderr


# -- pictures and captions -------------------------------------------------------------------------


def test_pictures_are_cut_or_squeezed(tmp_path: Path) -> None:
    """A wide picture: red in the middle, blue at its ends."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20, 2] = pixels[:, 40:, 2] = pixels[:, 20:40, 0] = 255
    cut = to_pixels(Image.fromarray(pixels), 10, squeeze=False)
    squeezed = to_pixels(Image.fromarray(pixels), 10, squeeze=True)
    assert cut.shape == squeezed.shape == (3, 10, 10) and cut.dtype == np.uint8
    assert (cut[0, :, 1:9] > 200).all() and (squeezed[2, :, 0] > 200).all()
    assert (squeezed[0, :, 4:6] > 200).all() and cut[2, :, 2:8].max() < 60
    narrow = Image.fromarray(pixels.transpose(1, 0, 2))
    assert np.array_equal(to_pixels(narrow, 10, squeeze=False), cut.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((40, 40), (32, 32), (0, 0)), ((61, 40), (48, 32), (8, 0)), ((40, 97), (32, 77), (0, 22)),
     ((375, 500), (32, 42), (0, 5)), ((20, 33), (32, 52), (0, 10))],
)  # fmt: skip
def test_the_centre_is_that_of_the_whole_resized_picture(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    """As torchvision's Resize and CenterCrop cut it: the long side is rounded down, the corner to
    the nearest even half. But for rounding of pixels: where a filter overshoots, what is clipped
    depends on Pillow's order.
    """
    noise = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), dtype=np.uint8)
    picture, (left, top) = Image.fromarray(noise), corner
    whole = np.asarray(picture.resize(resized, Image.Resampling.BICUBIC), np.int16)
    centre = whole[top : top + 32, left : left + 32].transpose(2, 0, 1)
    assert np.abs(to_pixels(picture, 32, squeeze=False) - centre).max() <= 1


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    # One column and one row more than a multiple of 8: at an eighth 7 parts of them are padding.
    large = Image.fromarray(noise).resize((641, 481), Image.Resampling.BICUBIC)
    for name in ("x.jpg", "x.png"):
        large.save(tmp_path / name)
    decoded = []

    def seen(image: Image.Image, *arguments: Any) -> np.ndarray:
        decoded.append(image.size)
        return to_pixels(image, *arguments)

    monkeypatch.setattr("vhabl.data.images.to_pixels", seen)
    for squeeze in (False, True):
        for side in (224, 80, 53, 40, 20):
            whole = to_pixels(open_image(tmp_path / "x.jpg"), side, squeeze).astype(int)
            changes = np.abs(whole - read_pixels(tmp_path / "x.jpg", side, squeeze))
            assert changes.max() <= 5 and changes.mean() < 0.5, (side, squeeze)
            assert side != 224 or not changes.any()
    assert decoded == [(641, 481), (321, 241), (321, 241), (161, 121), (81, 61)] * 2
    read_pixels(tmp_path / "x.png", 8, squeeze=False)
    assert decoded[-1] == (641, 481) == open_image(tmp_path / "x.jpg").size
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:4000])
    with pytest.raises(VhablError, match=r"x.jpg: the image cannot be read"):
        read_pixels(tmp_path / "x.jpg", 32, squeeze=False)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_kind_are_read(mode: str, tmp_path: Path) -> None:
    values = np.full((8, 8), 200, np.uint16 if mode == "I;16" else np.uint8)
    picture = Image.fromarray(values)
    picture = picture if mode in ("L", "I;16") else picture.convert(mode)
    file = tmp_path / ("x.tiff" if mode in ("CMYK", "I;16") else "x.png")
    picture.save(file)
    assert open_image(file).mode == "RGB"


@pytest.mark.parametrize(("kind", "top"), [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1)])
def test_deep_pictures_keep_their_greys(kind: type, top: int, tmp_path: Path) -> None:
    values = (np.arange(256).reshape(16, 16) / 255 * top).astype(kind)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    found = np.asarray(open_image(tmp_path / "x.tiff"))[..., 0].ravel().astype(int)
    assert np.abs(found - np.arange(256)).max() <= 1


# Where the first row and the first column of the stored picture are shown (EXIF 2.32, tag 274).
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("ending", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_upright(ending: str, orientation: int, tmp_path: Path) -> None:
    stored = np.zeros((481, 641, 3), np.uint8)
    stored[:200, :300, 0] = stored[200:, 300:, 2] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / f"x.{ending}"
    Image.fromarray(stored).save(
        file, exif=exif, **({"lossless": True} if ending == "webp" else {})
    )
    shown = TURNED[orientation](stored).astype(int)
    upright = Image.fromarray(shown.astype(np.uint8))
    for picture in (open_image(file), open_image(Image.open(file))):
        assert picture.size == upright.size
        assert np.abs(np.asarray(picture) - shown).mean() < 2  # a JPEG is not exact
    for squeeze in (False, True):  # a JPEG is decoded at a part of its size
        expected = to_pixels(upright, 40, squeeze).astype(int)
        assert np.abs(read_pixels(file, 40, squeeze) - expected).mean() < 2
    whole = read_whole(file, 40, squeeze=False)
    assert whole.shape == ((3, 40, 53) if orientation < 5 else (3, 53, 40))


def test_a_turned_jpeg_ends_where_its_picture_does(tmp_path: Path) -> None:
    """At an eighth of its size 7 parts of 8 of the first column and row are padding."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((641, 481), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    for orientation in TURNED:
        exif[ExifTags.Base.Orientation] = orientation
        large.save(tmp_path / "x.jpg", exif=exif)
        for squeeze in (False, True):
            whole = to_pixels(open_image(tmp_path / "x.jpg"), 20, squeeze).astype(int)
            changes = np.abs(whole - read_pixels(tmp_path / "x.jpg", 20, squeeze))
            assert changes.max() <= 5 and changes.mean() < 0.5, (orientation, squeeze)


def test_damaged_exif_data_do_not_hide_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0" + b"nonsense" * 4)
    assert open_image(tmp_path / "x.jpg").getpixel((0, 0)) == (254, 0, 0)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "webp", "key", "grey key", "16 bits"])
def test_transparent_pictures_are_seen_on_white(kind: str, tmp_path: Path) -> None:
    """The left half is grey; what is stored under the transparent right half does not matter."""
    found = []
    for hidden in (0, 90, 255):
        pixels = np.full((8, 8, 4), 120, np.uint8)
        pixels[:, :4, 3], pixels[:, 4:, 3], pixels[:, 4:, :3] = 255, 0, hidden
        picture, file, more = Image.fromarray(pixels), tmp_path / "x.png", {}
        if kind == "LA":
            picture = picture.convert("LA")
        elif kind == "P":
            picture = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8), "P")
            picture.putpalette([120] * 3 + [hidden] * 3)
            more = {"transparency": 1}
        elif kind == "webp":
            file, more = tmp_path / "x.webp", {"lossless": True, "exact": True}
        elif kind == "key":
            picture, more = picture.convert("RGB"), {"transparency": (hidden,) * 3}
        elif kind == "grey key":
            picture, more = picture.convert("RGB").convert("L"), {"transparency": hidden}
        elif kind == "16 bits":
            picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            more = {"transparency": hidden * 257}
        picture.save(file, **more)
        found.append(np.asarray(open_image(file)))
        assert (found[-1][:, :4] == 120).all() and (found[-1][:, 4:] == 255).all()
        assert (np.asarray(open_image(Image.open(file))) == found[-1]).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    picture = Image.new("RGBA", (2, 2), (0, 100, 200, 51))  # a fifth of it, four fifths of 255
    assert open_image(picture).getpixel((0, 0)) == (204, 224, 244)


@pytest.mark.parametrize("tag", [281, 341])
def test_greys_are_scaled_by_what_a_file_declares(tag: int, tmp_path: Path) -> None:
    values = (np.arange(256).reshape(16, 16) * 4095 // 255).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tiff", tiffinfo={tag: 4095})
    found = np.asarray(open_image(tmp_path / "x.tiff"))[..., 0].ravel().astype(int)
    assert np.abs(found - np.arange(256)).max() <= 1


def test_a_grey_that_counts_from_white_is_no_negative(tmp_path: Path) -> None:
    values = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    for name, tag, content in (("a", 1, values), ("b", 0, 65535 - values)):
        Image.fromarray(content).save(tmp_path / f"{name}.tiff", tiffinfo={262: tag})
    with Image.open(tmp_path / "b.tiff") as picture:
        assert picture.tag_v2[262] == 0 and picture.mode == "I;16"
    for name in "ab":
        found = np.asarray(open_image(tmp_path / f"{name}.tiff"))[..., 0].ravel().astype(int)
        assert np.abs(found - np.arange(256)).max() <= 1


@pytest.mark.parametrize("top", [4095, 255])
def test_undeclared_greys_of_few_bits_are_said_once(
    top: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.png", "y.tiff"):
        Image.fromarray(np.full((4, 4), top, np.uint16)).save(tmp_path / name)
        assert open_image(tmp_path / name).getpixel((0, 0)) == (top // 257,) * 3
    assert capsys.readouterr().err.count("dark") == 1


def test_other_formats_and_odd_bytes_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.png", b"DDS " + bytes(200)), ("b.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VhablError, match=rf"{name}: the image cannot be read"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_greys_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    values = np.ones((4, 4), np.float32)
    values[1, 2] = value
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(VhablError, match=r"x\.tiff: the image cannot be read .*no finite number"):
        open_image(tmp_path / "x.tiff")


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(file)
    assert file.stat().st_size < 100_000
    with pytest.raises(VhablError, match=r"bomb.png: the image cannot be read"):
        open_image(file)


@pytest.mark.parametrize("size", [(513, 2), (2, 513)])
def test_an_absurdly_long_picture_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    """Its short side is enlarged to the side of the towers, and its long one with it."""
    file = tmp_path / "line.png"
    Image.new("RGB", (512, 2)).save(file)
    assert open_image(file).size == (512, 2)
    Image.new("RGB", size).save(file)
    found = rf"line.png: the image cannot be read \({size[0]} x {size[1]} pixels\)"
    with pytest.raises(VhablError, match=found):
        open_image(file)


def split_of(files: list[Path], workers: int) -> Split:
    store = ImageFiles(files, 16, squeeze=False, workers=workers)
    count = len(files)
    return Split(
        np.arange(count), Rows(store, np.arange(count)), np.zeros((count, 2), np.int64),
        np.zeros((count, 1), np.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_read_in_order_by_workers(workers: int, tmp_path: Path) -> None:
    folder = write_pair_folder(tmp_path / "p", items=12)
    files = [folder / "images" / f"{n}.png" for n in range(12)]
    split, random = split_of(files, workers), np.random.default_rng(0)
    batches = [random.permutation(12)[:5] for _ in range(4)]
    state = torch.get_rng_state()
    found = list(read(split, batches))
    assert torch.equal(torch.get_rng_state(), state)
    for rows, inputs in zip(batches, found, strict=True):
        assert np.array_equal(inputs.image.numpy(), split.image.store[rows])
    files[3].write_bytes(b"damaged")
    with pytest.raises(VhablError, match=r"3\.png: the image cannot be read"):
        list(read(split, [np.arange(12)]))


def test_few_pictures_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pair_folder(tmp_path / "p", items=6)
    store = ImageFiles([folder / "images" / f"{n}.png" for n in range(6)], 16, False, 0)
    kept = store.in_memory()
    assert isinstance(kept, np.ndarray) and np.array_equal(kept, store[:])
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", kept.nbytes - 1)
    assert store.in_memory() is store


# -- random crops ----------------------------------------------------------------------------------

JUST_BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.fixture(params=["files", "memory"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether few pictures are kept in memory, or read from their files."""
    in_memory: bool = request.param == "memory"
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2**28 if in_memory else 0)
    return in_memory


def gradient(file: Path) -> Path:
    """A picture 300 wide and 100 high: each pixel holds its column (two bytes) and its row."""
    row, column = np.mgrid[:100, :300]
    Image.fromarray(np.stack([column // 256, column % 256, row], axis=2).astype(np.uint8)).save(
        file
    )
    return file


def places(crops: np.ndarray) -> list[tuple[int, int]]:
    """Where crops of `gradient` begin, down and across: they hold what is there."""
    high, low, row = crops.astype(int).transpose(1, 0, 2, 3)
    column = 256 * high + low
    side = np.arange(crops.shape[-1])
    assert (column == column[:, :1, :1] + side).all() and (
        row == row[:, :1, :1] + side[:, None]
    ).all()
    return list(zip(row[:, 0, 0].tolist(), column[:, 0, 0].tolist(), strict=True))


def test_crops_are_from_anywhere_in_the_picture(held: bool, tmp_path: Path) -> None:
    """Of side 60: 41 places down (100 - 60 + 1) and 241 across, numbered from 0."""
    file = gradient(tmp_path / "x.png")
    store = ImageFiles([file], 100, False, 0, crop=60).in_memory()
    assert isinstance(store, ImageFiles) != held
    corners = [(0, 0), (JUST_BELOW_1, JUST_BELOW_1), (0, JUST_BELOW_1), (0.5, 0.02)]
    rows = Rows(store, np.zeros(4, int))
    found = rows.crops(np.arange(4), np.array(corners, np.float32))
    assert found.shape == (4, 3, 60, 60) and found.dtype == np.uint8
    assert places(found) == [(0, 0), (40, 240), (0, 240), (20, 4)]
    draws = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).numpy()
    many = places(Rows(store, np.zeros(400, int)).crops(np.arange(400), draws))
    down, across = map(list, zip(*many, strict=True))
    assert set(down) == set(range(41))
    assert np.histogram(across, 6, (0, 241))[0].min() > 400 / 6 / 2  # all alike
    assert set().union(*(range(n, n + 60) for n in across)) == set(range(300))
    assert store[:1].shape == (1, 3, 100, 100) and places(store[:1]) == [(0, 100)]  # the centre
    assert rows.crops(np.zeros(0, int), np.zeros((0, 2))).shape == (0, 3, 60, 60)
    squeezed = ImageFiles([file], 100, True, 0, crop=60).in_memory()
    whole = to_pixels(open_image(file), 100, squeeze=True)
    (found,) = squeezed.crops(np.zeros(1, int), np.array([[0.5, JUST_BELOW_1]]))
    assert np.array_equal(found, whole[:, 20:80, 40:])


@pytest.mark.parametrize("size", [(641, 481), (481, 641), (90, 60)])
def test_crops_are_parts_of_the_resized_picture(
    held: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    """Also of a JPEG that is decoded at a part of its size, with what its edges pad."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = tmp_path / "x.jpg"
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file)
    store = ImageFiles([file], 80, False, 0, crop=64).in_memory()
    resized = (size[0] * 80 // min(size), size[1] * 80 // min(size))
    whole = np.asarray(open_image(file).resize(resized, Image.Resampling.BICUBIC), int)
    corner = np.array([[JUST_BELOW_1, 0.5]])
    (found,) = store.crops(np.zeros(1, int), corner)
    left = (resized[0] - 63) // 2
    changes = np.abs(found - whole[-64:, left : left + 64].transpose(2, 0, 1))
    assert changes.max() <= 5 and changes.mean() < 0.5
    assert changes.any() == (size != (90, 60))  # a small one is decoded whole


def test_many_whole_pictures_are_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 x 300 pixels and 3 colours; the centre alone would fit."""
    store = ImageFiles([gradient(tmp_path / "x.png")] * 2, 100, False, 0, crop=60)
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2 * 90_000)
    assert store.in_memory() is not store
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2 * 90_000 - 1)
    assert store.in_memory() is store


AUGMENTED = [
    "encoder.augment=true",
    "encoder.resize=40",
    "encoder.tune=all",
    "validation.fraction=0",
]


def augmented(folder: Path, *overrides: str) -> Trainer:
    """Crops of 32 x 32 of pictures 40 high and 40, 48 or 56 wide."""
    config = pair_config(folder, "cmcl", *AUGMENTED, *overrides)
    return Trainer(config, load_data(config.data, config.encoder), False)


def test_training_draws_crops_by_its_own_generator(held: bool, folder: Path) -> None:
    trainer = augmented(folder, "data.workers=0")
    train, batches = trainer.data.train, [torch.arange(32).flip(0), torch.arange(7)]
    train.text.count = None  # one caption an item: nothing else is drawn
    trainer.begin()
    assert trainer.resident is None and isinstance(train.image.store, ImageFiles) != held

    def crops() -> list[torch.Tensor]:
        return [inputs.image for _, inputs in trainer.inputs(batches)]

    drawn = [crops() for _ in range(30)]
    down, across = set(), set()
    for row, name in zip(batches[0].argsort().tolist(), train.ids, strict=True):
        if int(Path(name).stem) % 3 == 2:  # 56 wide
            picture = np.asarray(open_image(folder / "images" / Path(name).name))
            parts = torch.from_numpy(picture.copy()).unfold(0, 32, 1).unfold(1, 32, 1)
            for first, _ in drawn:
                ((i, j),) = (parts == first[row]).flatten(2).all(dim=2).nonzero().tolist()
                down.add(i)
                across.add(j)
    assert down == set(range(9)) and across == set(range(25))  # of the centre square 4 to 12
    trainer.begin()
    torch.manual_seed(5)  # of no matter
    assert all(map(torch.equal, crops(), drawn[0]))
    shares = []
    for rank in range(2):  # each has its share of the same crops
        trainer.begin()
        trainer.method.encoder.ranks = Ranks(rank, 2)
        shares.append(crops())
    for whole, *parts in zip(drawn[0], *shares, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_workers_give_the_same_crops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for memory, workers in ((2**28, 0), (0, 0), (0, 2)):
        monkeypatch.setattr("vhabl.data.images.IN_MEMORY", memory)
        trainer = augmented(folder, f"data.workers={workers}")
        trainer.begin()
        batches = list(torch.arange(32).split(10))
        found.append(torch.cat([inputs.image for _, inputs in trainer.inputs(batches)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_crops_are_for_training_alone(held: bool, folder: Path) -> None:
    """The data and their digest are those of a recipe without `augment`, and so are the codes."""
    data, other = (augmented(folder, f"encoder.augment={a}").data for a in ("true", "false"))
    assert data.fingerprint == other.fingerprint and data.spec == other.spec
    for split in ("train", "database", "query"):
        image, expected = (getattr(d, split).inputs().image for d in (data, other))
        assert torch.equal(image, expected)
    trainer = augmented(folder)
    trainer.begin()
    method = trainer.method.eval()
    one, two = (code_tasks(method, d, [8])[8]["i2t"] for d in (data, other))
    assert np.array_equal(one.query, two.query) and np.array_equal(one.database, two.database)
    # Data that were read for crops serve a recipe without them, as in an ablation.
    without = Trainer(override(trainer.config, ["encoder.augment=false"]), data, False)
    without.begin()
    assert not without.has_crops()
    inputs = next(without.inputs([torch.arange(32)]))[1]
    assert torch.equal(inputs.image, data.train.inputs().image)


def test_a_run_with_crops_goes_on_as_if_never_stopped(folder: Path) -> None:
    whole = augmented(folder, "epochs=3").run().state_dict()
    half = augmented(folder, "epochs=3", "out=run")
    half.begin()
    half.epochs = 1
    half.train_phase()
    again = augmented(folder, "epochs=3", "out=run", "resume=true").run().state_dict()
    assert all(torch.equal(whole[n], t) for n, t in again.items())
    other = augmented(folder, "epochs=3", "seed=1").run().state_dict()
    assert not all(torch.equal(whole[n], t) for n, t in other.items())


# -- captions --------------------------------------------------------------------------------------


def test_captions_stay_with_their_items(folder: Path) -> None:
    """Of items that have one caption or two, the first without a draw, either with one."""
    config = pair_config(folder)
    data = load_data(config.data, config.encoder)
    names = scipy.io.loadmat(folder / "index.mat", squeeze_me=True)["index"]
    captions = scipy.io.loadmat(folder / "caption.mat", squeeze_me=True)["caption"]
    listed = [[str(c) for c in np.atleast_1d(own)] for own in captions]
    of_item = dict(zip(map(str, names), listed, strict=True))
    for split in (data.train, data.query):
        assert isinstance(split.text, Rows)
        own = [of_item[name] for name in split.ids.tolist()]
        first, _ = open_clip.tokenise([texts[0] for texts in own], config.encoder.words)
        last, _ = open_clip.tokenise([texts[-1] for texts in own], config.encoder.words)
        rows = np.arange(len(split))
        assert np.array_equal(split.text[rows], first) and not np.array_equal(first, last)
        assert np.array_equal(split.text.drawn(rows, np.full(len(rows), 0.99)), last)


def test_the_digest_of_a_data_set_sees_every_picture_and_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory by their content; in files also by the size of each, which a sample would miss."""
    folder = write_pair_folder(tmp_path / "p")
    config = pair_config(folder)

    def digest() -> str:
        return load_data(config.data, config.encoder).fingerprint

    found = [digest()]
    for image in ("3", "59"):
        Image.new("RGB", (40, 40), "white").save(folder / "images" / f"{image}.png")
        found.append(digest())
    captions = list(scipy.io.loadmat(folder / "caption.mat", squeeze_me=True)["caption"])
    captions[6][1] = "another second caption"
    scipy.io.savemat(folder / "caption.mat", {"caption": cells(captions)})
    found.append(digest())
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 0)
    found.append(digest())
    with (folder / "images" / "5.png").open("ab") as file:
        file.write(b"\0")  # the same pixels
    found.append(digest())
    Image.new("RGB", (40, 40), "black").save(folder / "images" / "59.png")
    found.append(digest())
    assert len(set(found)) == len(found) and found[-1] == digest()


def test_one_of_several_captions_is_drawn_in_training_and_the_first_elsewhere() -> None:
    store = np.arange(10)[:, None]
    rows = Rows(store, np.array([0, 3, 4]), np.array([3, 1, 6]))
    assert rows[np.array([2, 0])].ravel().tolist() == [4, 0]
    some, draws = np.array([2, 1, 0, 2]), np.array([0.99, 0.5, 0.34, 0.0])
    assert rows.drawn(some, draws).ravel().tolist() == [9, 3, 1, 4]
    part = rows.take(np.array([2]))
    assert part.drawn(np.array([0]), np.array([0.2])).ravel().tolist() == [5]
    assert Rows(store, np.arange(10), np.ones(10, int)).count is None


def test_training_draws_captions_by_its_own_generator(tmp_path: Path) -> None:
    config = pair_config(write_pair_folder(tmp_path / "p"), "cmcl", "validation.fraction=0")
    data = load_data(config.data, config.encoder)
    trainer = Trainer(config, data, False)
    trainer.begin()
    assert trainer.resident is None  # captions are drawn
    rows = [torch.arange(32)]
    texts = [next(trainer.inputs(rows))[1].text for _ in range(8)]
    first = torch.from_numpy(data.train.text[:])
    several = torch.from_numpy(data.train.text.count > 1)
    others = torch.stack([(t != first).any(dim=1) for t in texts])
    assert not others[:, ~several].any()
    assert 0.3 < others[:, several].float().mean() < 0.7
    trainer.begin()
    assert torch.equal(next(trainer.inputs(rows))[1].text, texts[0])
    assert torch.equal(data.train.inputs().text, first)


def test_notes_say_what_captions_are(tmp_path: Path) -> None:
    config = pair_config(write_pair_folder(tmp_path / "p"), "cmcl", "encoder.words=6")
    data = load_data(config.data, config.encoder)
    assert "1 empty caption: kept, without a word" in data.notes
    assert "59 captions longer than 6 tokens: cut" in data.notes


# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pair_folder(tmp_path / "p")


def built(config: Config) -> tuple[ClipEncoder, Dataset]:
    data = load_data(config.data, config.encoder)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    assert isinstance(method.encoder, ClipEncoder)
    return method.encoder, data


@pytest.mark.parametrize("tune", ["frozen", "1"])
def test_the_cache_holds_what_the_frozen_part_gives(tune: str, folder: Path) -> None:
    config = pair_config(folder, "cmcl", f"encoder.tune={tune}")
    towers, data = built(config)
    kept = frozen_outputs(towers, data, config.encoder)
    assert kept.fingerprint == data.fingerprint and kept.train.text.count is not None
    towers.eval()
    rows, draws = np.array([5, 0, 17]), np.array([0.9, 0.9, 0.9])
    for split in ("train", "database", "query"):
        for d in (None, draws):
            rows = rows % len(getattr(data, split))
            expected = towers.frozen(getattr(data, split).inputs(rows, d))
            found = getattr(kept, split).inputs(rows, d)
            assert torch.allclose(found.image.float(), expected.image.float(), atol=2e-3)
            assert torch.allclose(found.text.float(), expected.text.float(), atol=2e-3)
            assert found.image.dtype == torch.float16
    assert frozen_outputs(towers, kept, config.encoder) is kept


def file_of(folder: Path) -> Path:
    (file,) = Path("cache").iterdir()
    return file


@pytest.mark.parametrize("change", ["weights", "caption", "image", "layout", "resize", "rounding"])
def test_a_stale_cache_is_made_anew_and_said(
    change: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 0 if change == "image" else 2**28)
    config = pair_config(folder, "cmcl", "encoder.tune=frozen")
    towers, data = built(config)
    frozen_outputs(towers, data, config.encoder)
    before = file_of(folder).stat().st_mtime_ns
    frozen_outputs(towers, data, config.encoder)
    assert file_of(folder).stat().st_mtime_ns == before and capsys.readouterr().err == ""
    named = {"caption": "captions", "image": "images", "resize": "images, transform"}
    if change == "weights":
        towers.clip.visual.proj.data[0, 0] += 1
    elif change == "caption":
        data.train.text.store[0, 3] += 1
    elif change == "image":
        Image.new("RGB", (40, 40)).save(folder / "images" / "3.png")
    elif change == "layout":
        monkeypatch.setattr("vhabl.training.feature_cache.VERSION", 0)
    else:
        given = {"resize": "encoder.resize=36", "rounding": "encoder.cache_precision=float32"}
        config = pair_config(folder, "cmcl", "encoder.tune=frozen", given[change])
        towers, data = built(config)
    kept = frozen_outputs(towers, data, config.encoder)
    said = f"made with other {named.get(change, change)}: made anew"
    assert said in capsys.readouterr().err
    assert file_of(folder).stat().st_mtime_ns != before
    towers.eval()
    expected = towers.frozen(data.train.inputs(np.arange(4)))
    found = kept.train.inputs(np.arange(4))
    assert torch.allclose(found.image.float(), expected.image.float(), atol=2e-3)
    assert torch.allclose(found.text.float(), expected.text.float(), atol=2e-3)


@pytest.mark.parametrize("damage", ["cut", "a flipped byte", "another file", "no checksums"])
def test_a_damaged_cache_is_made_anew_and_said(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pair_config(folder, "cmcl", "encoder.tune=frozen")
    towers, data = built(config)
    kept = frozen_outputs(towers, data, config.encoder)
    whole = np.array(kept.train.image.store)
    file = file_of(folder)
    del kept
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "a flipped byte":
        with h5py.File(file) as h5:
            content[h5["text"].id.get_offset() + 77] ^= 1
        file.write_bytes(content)
    elif damage == "another file":
        file.write_bytes(b"nothing of the kind")
    else:
        with h5py.File(file, "r+") as h5:
            del h5.attrs["checksums"]
    kept = frozen_outputs(towers, data, config.encoder)
    assert "damaged (" in capsys.readouterr().err
    assert np.array_equal(kept.train.image.store, whole)


def test_no_cache_where_it_would_be_wrong(folder: Path) -> None:
    for given in (["encoder.tune=all"], ["encoder.cache=none"], ["encoder.augment=true"]):
        config = pair_config(folder, "cmcl", "encoder.tune=frozen", *given)
        towers, data = built(config)
        assert frozen_outputs(towers, data, config.encoder) is data
    assert not Path("cache").exists()


@pytest.mark.parametrize("tune", ["frozen", "1"])
def test_a_run_is_the_same_with_and_without_the_cache(tune: str, folder: Path) -> None:
    """In training and in evaluation, from the kept outputs or from raw files."""
    weights = []
    for cache in ("cache", "none", "cache"):
        config = pair_config(
            folder, "cmcl", f"encoder.tune={tune}", f"encoder.cache={cache}", "out=run",
            "validation.fraction=0", "encoder.lr=0.001", "encoder.cache_precision=float32",
        )  # fmt: skip
        data = load_data(config.data, config.encoder)
        method = Trainer(config, data, False).run()
        weights.append(method.state_dict())
    first, without, again = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, tensor in first.items():
        assert torch.allclose(tensor.float(), without[name].float(), atol=1e-3), name


def test_a_saved_run_needs_no_weights_file_and_repeats_its_codes(folder: Path) -> None:
    model = folder / "towers.json"
    config = pair_config(folder, "cmcl")
    torch.manual_seed(9)
    save_file(open_clip.build_towers(str(model), "").state_dict(), folder / "w.safetensors")
    config = pair_config(
        folder, "cmcl", f"encoder.weights={folder / 'w.safetensors'}", "encoder.tune=frozen",
        "out=run", "validation.fraction=0",
    )  # fmt: skip
    data = load_data(config.data, config.encoder)
    train.train(config, data, progress_bar=False)
    (folder / "w.safetensors").unlink()
    run = run_folder.load(Path("run"))
    ((_, _, found),) = run_folder.encoded([run], None, [])
    raw = code_tasks(run.method, data, config.bits)
    for bits, tasks in found.items():
        for task, codes in tasks.items():
            assert (codes.database != raw[bits][task].database).mean() < 0.01


def test_a_saved_state_leaves_out_frozen_towers_and_goes_on_with_the_same(folder: Path) -> None:
    given = ["encoder.tune=1", "out=run", "validation.fraction=0", "encoder.lr=0.01", "epochs=4"]
    config = pair_config(folder, "vh_abl_clip", *given, "optim.averaging=2")
    data = load_data(config.data, config.encoder)
    whole = Trainer(config, data, False).run().state_dict()
    halfway = Trainer(config, data, False)
    halfway.epochs = 4
    halfway.begin()
    halfway.epochs = 2
    halfway.train_phase()
    state = torch.load("run/state.pt", weights_only=True)
    assert not [n for n in state["method"] if "token_embedding" in n or "resblocks.0." in n]
    assert [n for n in state["method"] if "resblocks.2." in n]
    again = Trainer(replace(config, resume=True), data, False)
    assert all(torch.equal(whole[n], t) for n, t in again.run().state_dict().items())


@pytest.mark.parametrize("tune", ["1", "all"])
def test_a_run_does_not_go_on_with_other_weights(tune: str, folder: Path) -> None:
    pair_config(folder)
    torch.manual_seed(0)
    state = open_clip.build_towers(str(folder / "towers.json"), "").state_dict()
    save_file(state, folder / "w.safetensors")
    config = pair_config(
        folder, "cmcl", f"encoder.weights={folder / 'w.safetensors'}", f"encoder.tune={tune}",
        "out=run", "validation.fraction=0", "epochs=3",
    )  # fmt: skip
    data = load_data(config.data, config.encoder)
    half = Trainer(config, data, False)
    half.begin()
    half.epochs = 1
    half.train_phase()
    saved = torch.load("run/state.pt", weights_only=True)
    for change, message in (
        ({"method": {n: t for n, t in saved["method"].items() if "heads" not in n}}, "no or an un"),
        ({"method": saved["method"] | {"ghost": torch.zeros(1)}}, "no or an unknown ghost"),
    ):
        torch.save(saved | change, "run/state.pt")
        with pytest.raises(VhablError, match=message):
            Trainer(replace(config, resume=True), data, False).run()
    torch.save({n: v for n, v in saved.items() if n != "optimizer"}, "run/state.pt")
    with pytest.raises(VhablError, match=r"the state is damaged \(no optimizer\)"):
        Trainer(replace(config, resume=True), data, False).run()
    torch.save(saved, "run/state.pt")
    save_file({n: t + 1 for n, t in state.items()}, folder / "w.safetensors")
    with pytest.raises(VhablError, match=r"state.pt: the training began with other wei"):
        Trainer(replace(config, resume=True), data, False).run()


@pytest.mark.parametrize("tune", ["frozen", "1", "all"])
@pytest.mark.parametrize(
    ("name", "head"),
    [("cmcl", {"attend"}), ("pghmh", {"reader"}), ("vh_abl", set()), ("hq", set())],
)
def test_the_arithmetic_of_a_gpu_changes_little(
    name: str,
    head: set[str],
    tune: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_alexnet: None,
) -> None:
    """bfloat16 in the network and in what attends to parts; the rest of a head has float32."""
    found, rounded = {}, set()

    def watch(part: str, layer: torch.nn.Module) -> None:
        def look(_: torch.nn.Module, given: object, out: torch.Tensor) -> None:
            rounded.update([part.split(".")[0]] * (out.dtype == torch.bfloat16))

        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(look)

    for mixed in (False, True):
        monkeypatch.setattr(PixelEncoder, "mixed", mixed)  # on the CPU, where it can be had too
        config = pair_config(
            folder, name, *(CNN if name == "hq" else []), f"encoder.tune={tune}", "epochs=1",
            "validation.fraction=0", "encoder.cache=none", "out=run",
        )  # fmt: skip
        loop = Trainer(config, load_data(config.data, config.encoder), progress_bar=False)
        loop.begin()
        for part, layer in loop.method.named_modules():
            watch(part, layer)
        found[mixed] = loop.train_epoch()
        labels, rows = torch.from_numpy(loop.train.labels).float(), torch.arange(len(loop.train))
        terms = loop.method.loss(Batch(loop.train.inputs(), labels, rows))
        given = vars(loop.method.embeddings(loop.train.inputs()))
        tensors = [*terms.values(), *(x for name, x in given.items() if "mask" not in name)]
        assert {x.dtype for x in tensors if x is not None} == {torch.float32}
    assert rounded == {"encoder"} | head
    exact, near = (np.array(list(found[mixed].values())) for mixed in (False, True))
    assert (exact != near).any()
    np.testing.assert_allclose(near, exact, rtol=0.05, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("tune", ["frozen", "1", "all"])
def test_towers_on_a_gpu(tune: str, folder: Path) -> None:
    """Codes of a run trained there, encoded there and on the CPU; the cache says its arithmetic."""
    config = pair_config(folder, "cmcl", f"encoder.tune={tune}", "out=run", "device=cuda",
                         "validation.fraction=0", "epochs=4")  # fmt: skip
    data = load_data(config.data, config.encoder)
    rows = train.train(config, data, progress_bar=False)
    assert all(0 <= r.value <= 1 for r in rows if "mAP" in r.measure)
    run = run_folder.load(Path("run"))
    ((_, _, there),) = run_folder.encoded([run], [16], ["device=cuda"])
    here = code_tasks(run_folder.load(Path("run")).method, data, [16])
    for task, codes in there[16].items():
        assert (codes.database != here[16][task].database).mean() < 0.05
    if tune != "all":
        with h5py.File(file_of(folder)) as h5:
            assert json.loads(h5.attrs["made_with"])["precision"] == "bfloat16"


def test_a_run_holds_the_description_of_its_towers(folder: Path) -> None:
    """The JSON file may change or go: the run and the cache are of what was trained."""
    config = pair_config(folder, "cmcl", "encoder.tune=frozen", "out=run", "validation.fraction=0")
    data = load_data(config.data, config.encoder)
    train.train(config, data, progress_bar=False)
    before = code_tasks(run_folder.load(Path("run")).method, data, [8])[8]["i2t"].database
    changed = json.loads((folder / "towers.json").read_text())
    changed["quick_gelu"] = True
    (folder / "towers.json").write_text(json.dumps(changed))
    again = code_tasks(run_folder.load(Path("run")).method, data, [8])[8]["i2t"].database
    assert np.array_equal(before, again)
    (folder / "towers.json").unlink()
    ((_, _, found),) = run_folder.encoded([run_folder.load(Path("run"))], [8], [])
    assert (found[8]["i2t"].database != before).mean() < 0.01


def test_a_cache_of_other_towers_with_the_same_weights_is_stale(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair_config(folder)
    torch.manual_seed(0)
    save_file(
        open_clip.build_towers(str(folder / "towers.json"), "").state_dict(),
        folder / "w.safetensors",
    )
    given = ["encoder.tune=frozen", f"encoder.weights={folder / 'w.safetensors'}"]
    config = pair_config(folder, "cmcl", *given)
    towers, data = built(config)
    frozen_outputs(towers, data, config.encoder)
    text = TINY_TOWERS | {"quick_gelu": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.TINY_TOWERS", text)
        config = pair_config(folder, "cmcl", *given)
    towers, data = built(config)
    frozen_outputs(towers, data, config.encoder)
    assert "made with other architecture: made anew" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["encoder.name=clip"], CNN])
def test_towers_and_networks_need_pictures(given: list[str], feature_file: Path) -> None:
    config = small_config(feature_file, "cmcl", *given)
    name = config.encoder.name
    with pytest.raises(VhablError, match=rf"encoder.name '{name}': .* holds features"):
        load_data(config.data, config.encoder)


def test_prompts_need_class_names(folder: Path) -> None:
    names = f"data.class_names=[{','.join(COLOURS)}]"
    config = pair_config(folder, "pghmh", names)
    assert load_data(config.data, config.encoder).class_names == tuple(COLOURS)
    config = pair_config(folder, "pghmh", "data.class_names=[]")
    spec = load_data(config.data, config.encoder).spec
    with pytest.raises(VhablError, match=r"data.class_names: 0 names for 4 classes"):
        build_method(config, spec)
    config = pair_config(folder, "pghmh", "data.class_names=[red,blue]")
    with pytest.raises(VhablError, match=r"data.class_names: 2 names for 4 columns"):
        load_data(config.data, config.encoder)


# -- networks --------------------------------------------------------------------------------------


def cnn_data(folder: Path, *overrides: str) -> tuple[Config, Dataset]:
    config = pair_config(folder, "hq", *CNN, *overrides)
    return config, load_data(config.data, config.encoder)


def network(folder: Path, *overrides: str) -> tuple[CnnEncoder, Dataset]:
    """An encoder on a tiny network, fitted on the training items of a folder of pairs."""
    config, data = cnn_data(folder, "encoder.cache_precision=float32", *overrides)
    torch.manual_seed(0)
    found = build_method(config, data.spec).encoder
    assert isinstance(found, CnnEncoder)
    found.fit(data.train, "standard")
    return found, data


@torch.no_grad()
@pytest.mark.parametrize("tune", ["frozen", "1", "2", "3", "9", "all"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_network_gives_its_second_connected_layer(
    tune: str, suffix: str, folder: Path, tiny_alexnet: None
) -> None:
    """Of pictures as torchvision scales them, and standardised; words are scaled as features."""
    torch.manual_seed(4)
    whole, file = TinyAlexNet().eval(), folder / f"w.{suffix}"
    write = save_file if suffix == "safetensors" else torch.save
    write(whole.state_dict(), file)
    encoder, data = network(folder, f"encoder.tune={tune}", f"encoder.weights={file}")
    inputs = data.query.inputs()
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (cnn.MEAN, cnn.SPREAD))
    pixels = (inputs.image / 255 - mean) / spread
    second = whole.classifier[:6](whole.avgpool(whole.features(pixels)).flatten(1))
    encoder.norm.running_mean.fill_(0.25)
    encoder.norm.running_var.fill_(4.0)
    found = encoder.eval()(inputs)
    assert inputs.image.shape[1:] == (3, 224, 224) and encoder.image_dim == 6
    assert torch.allclose(found.image, (second - 0.25) / 2, atol=1e-5) and second.std() > 0.01
    words = torch.from_numpy(data.train.text)
    spread = words.std(dim=0, correction=0)
    there = spread > 0
    scaled = (inputs.text - words.mean(dim=0)) / spread
    assert torch.allclose(found.text[:, there], scaled[:, there], atol=1e-5)
    assert found.words is None and found.patches is None
    assert encoder(inputs.only("text")).image is None and encoder(inputs.only("image")).text is None
    kept = encoder.frozen(inputs)
    assert kept.image.is_floating_point() == (tune in ("frozen", "1", "2"))
    assert torch.equal(kept.text, inputs.text)
    assert torch.equal(encoder(kept).image, found.image)


@torch.no_grad()
def test_a_network_as_published_by_hq(folder: Path, tiny_alexnet: None) -> None:
    """Pictures of 227, what the last ReLU gives as it is, and words of 0 and 1."""
    given = ["encoder.side=227", "encoder.standardise=false", "encoder.tune=all", "data.scale=none"]
    config, data = cnn_data(folder, *given)
    torch.manual_seed(0)
    encoder = build_method(config, data.spec).encoder
    assert isinstance(encoder, CnnEncoder)
    encoder.fit(data.train, config.data.scale)
    inputs = data.query.inputs()
    assert inputs.image.shape[1:] == (3, 227, 227)
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (cnn.MEAN, cnn.SPREAD))
    pixels = (inputs.image / 255 - mean) / spread
    torch.manual_seed(0)
    whole: Any = TinyAlexNet().eval()
    whole.load_state_dict(encoder.network.state_dict(), strict=False)
    second = whole.classifier[:6](whole.avgpool(whole.features(pixels)).flatten(1))
    for mode in (True, False):  # no batch enters an item's vector, in training neither
        for part in encoder.train(mode).modules():
            if isinstance(part, torch.nn.Dropout):
                part.eval()
        found = encoder(inputs)
        assert torch.allclose(found.image, second.clamp(min=0), atol=1e-5)
        assert torch.equal(found.text, inputs.text) and set(found.text.unique().tolist()) == {0, 1}
    assert second.std() > 0.01
    resized = cnn_data(folder, *given, "encoder.resize=256")[1].query.inputs().image
    assert resized.shape[2:] == (256, 256) and encoder.cut(resized).shape[2:] == (227, 227)
    with pytest.raises(VhablError, match=r"encoder.resize is 226, but must be 0, or at least"):
        config, data = cnn_data(folder, *given, "encoder.resize=226")
        build_method(config, data.spec)
    with pytest.raises(VhablError, match=r"encoder.side is 63, but must be 0 or a side"):
        cnn_data(folder, "encoder.side=63")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "second"), [("alexnet", 5), ("vgg16", 4)])
def test_the_networks_of_torchvision_are_built_alike(name: str, second: int) -> None:
    open_clip.mend_torchvision()
    from torchvision import models

    spec = DataSpec("pairs", 224, 7, 3, 10)
    config = EncoderConfig("cnn", name, "", tune="2", cache_precision="float32")
    torch.manual_seed(0)
    encoder = CnnEncoder(config, spec).eval()
    torch.manual_seed(0)
    whole = models.get_model(name, weights=None).eval()
    found: list[torch.Tensor] = []
    whole.classifier[second].register_forward_hook(lambda *given: found.append(given[2]))
    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    whole(encoder.normalised(pixels))
    assert found[0].shape == (2, 4096) and encoder.image_dim == 4096 and encoder.batch == 32
    inputs = Inputs(pixels, None)
    expected = found[0] / (1 + encoder.norm.eps) ** 0.5
    assert torch.allclose(encoder(inputs).image, expected, atol=1e-6) and expected.std() > 1e-3
    flat = {"alexnet": 256 * 36, "vgg16": 512 * 49}[name]
    assert encoder.frozen(inputs).image.shape == (2, flat)
    assert isinstance(encoder.live[-1], torch.nn.ReLU)  # no dropout of the layer that is left out
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {
        f"network.classifier.{n}.{kind}"
        for n in ((1, 4) if name == "alexnet" else (0, 3))
        for kind in ("weight", "bias")
    }


LAYERS = ["features.0", "classifier.1", "classifier.4"]  # with weights, first to last


@pytest.mark.parametrize(
    ("tune", "live"), [("frozen", 0), ("1", 1), ("2", 2), ("3", 3), ("9", 3), ("all", 3)]
)
def test_the_last_layers_of_a_network_are_tuned(
    tune: str, live: int, folder: Path, tiny_alexnet: None
) -> None:
    encoder, data = network(folder, f"encoder.tune={tune}", "encoder.lr=0.25")
    encoder.train()
    everything = {f"network.{n}.{kind}" for n in LAYERS for kind in ("weight", "bias")}
    tuned = {name for name in everything if any(n in name for n in LAYERS[3 - live :])}
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == tuned
    assert {n for n, _ in encoder.fixed_tensors()} == everything - tuned
    assert [(g["lr"], len(g["params"])) for g in encoder.param_groups()] == [
        (0.25, 2 * live)
    ] * bool(live)
    # A dropout goes with the layer that it feeds.
    assert [encoder.network.classifier[n].training for n in (0, 3)] == [live >= 2, live >= 1]
    assert encoder.cacheable == (live < 3)
    inputs = data.train.inputs()
    kept = encoder.frozen(inputs)
    shape = {0: (6,), 1: (8,), 2: (36,), 3: (3, 224, 224)}[live]
    assert kept.image.shape == (len(data.train), *shape)
    assert torch.equal(encoder.frozen(inputs).image, kept.image)
    again = [encoder(inputs).image for _ in range(2)]
    assert torch.equal(*again) == (live == 0)
    assert not [layer for layer in encoder.eval().modules() if layer.training]


def test_words_are_scaled_without_a_look_at_pictures(
    folder: Path, tiny_alexnet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 0)
    encoder, data = network(folder)
    shutil.rmtree(folder / "images")
    for kind in ("standard", "global", "none"):
        alone = FeatureScaling(data.spec, ["text"])
        ready = replace(data.train, image=np.zeros((len(data.train), 2), np.float32))
        both = FeatureScaling(replace(data.spec, image_dim=2))
        for scaling in (alone, both):
            scaling.fit(data.train if scaling is alone else ready, kind)
        encoder.bag = FeatureScaling(data.spec, ["text"])
        encoder.fit(data.train, kind)
        for name in ("text_mean", "text_spread"):
            assert torch.equal(encoder.bag.get_buffer(name), both.get_buffer(name))
            assert torch.equal(alone.get_buffer(name), both.get_buffer(name))


@pytest.mark.parametrize("tune", ["frozen", "1"])
def test_the_cache_of_a_network_holds_pictures_alone(
    tune: str, folder: Path, tiny_alexnet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = cnn_data(folder, f"encoder.tune={tune}")
    encoder, data = network(folder, f"encoder.tune={tune}", "encoder.cache_precision=float16")
    kept = frozen_outputs(encoder, data, config.encoder)
    file = file_of(folder)
    with h5py.File(file) as h5:
        assert list(h5) == ["image"] and "captions" not in json.loads(h5.attrs["made_with"])
    depth = "frozen" if tune == "frozen" else "last1"
    assert file.name == f"emoji-alexnet-{depth}-pooled.h5"
    for split in ("train", "database", "query"):
        raw, found = getattr(data, split).inputs(), getattr(kept, split).inputs()
        assert torch.equal(found.image, encoder.frozen(raw).image)
        assert found.image.dtype == torch.float16 and torch.equal(found.text, raw.text)
    assert frozen_outputs(encoder, kept, config.encoder) is kept
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    frozen_outputs(encoder, data, config.encoder)
    assert file.stat().st_mtime_ns == before and capsys.readouterr().err == ""
    encoder.network.features[0].bias.data += 1
    frozen_outputs(encoder, data, config.encoder)
    assert "made with other weights: made anew" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["tune=all", "tune=3", "augment=true", "cache=none"])
def test_no_cache_of_a_network_where_it_would_be_wrong(
    given: str, folder: Path, tiny_alexnet: None
) -> None:
    config, _ = cnn_data(folder, f"encoder.{given}")
    encoder, data = network(folder, f"encoder.{given}")
    assert frozen_outputs(encoder, data, config.encoder) is data and not Path("cache").exists()


@pytest.mark.parametrize("tune", ["frozen", "1", "all"])
def test_a_run_on_a_network_is_the_same_with_and_without_the_cache(
    tune: str, folder: Path, tiny_alexnet: None
) -> None:
    """And repeats its codes from what was saved, which needs no file of weights."""
    torch.save(TinyAlexNet().state_dict(), folder / "w.pth")
    found = []
    for cache in ("cache", "none"):
        config, data = cnn_data(
            folder, f"encoder.tune={tune}", f"encoder.cache={cache}", "out=run",
            f"encoder.weights={folder / 'w.pth'}", "validation.fraction=0",
            "encoder.cache_precision=float32",
        )  # fmt: skip
        train.train(config, data, progress_bar=False)
        found.append(run_folder.load(Path("run")).method.state_dict())
    assert Path("cache").exists() == (tune != "all")
    for name, tensor in found[0].items():
        assert torch.allclose(tensor.float(), found[1][name].float(), atol=1e-4), name
    (folder / "w.pth").unlink()
    run = run_folder.load(Path("run"))
    assert tuple(run.method.spec.vocabulary) == data.vocabulary and "red" in data.vocabulary
    before = code_tasks(run.method, data, [8])[8]["i2t"]
    ((_, _, again),) = run_folder.encoded([run], [8], [])
    assert np.array_equal(again[8]["i2t"].query, before.query)
    assert np.array_equal(again[8]["i2t"].database, before.database)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.model=alexnot", r"encoder.model is 'alexnot', but must be alexnet or vgg16"),
        ("encoder.model=ViT-B-32", "encoder.model is 'ViT-B-32', but must be alexnet"),
        ("encoder.resize=223", "encoder.resize is 223, but must be 0, or at least 224"),
        (
            "encoder.weights=absent.pth",
            r"encoder.weights=absent.pth: no such file. Give a file such as https://"
            r"\S+/alexnet-owt-7be5be79.pth, or one of IMAGENET1K_V1",
        ),
        ("encoder.tune=last", r"encoder.tune is 'last', but must be frozen, all or a numb"),
    ],
)
def test_a_network_that_cannot_be_had_is_said(
    override: str, message: str, folder: Path, tiny_alexnet: None
) -> None:
    with pytest.raises(VhablError, match=message):
        network(folder, override)


def test_bad_weights_of_a_network_are_named(folder: Path, tiny_alexnet: None) -> None:
    state, file = TinyAlexNet().state_dict(), folder / "w.pth"
    for content, message in (
        (
            state | {"ghost": torch.zeros(1)},
            "an unknown tensor ghost. It must be the weights of alexnet",
        ),
        ({n: t / 0 for n, t in state.items()}, "features.0.weight has values that are not finite"),
        ([1], "it holds something else than tensors by name"),
        (None, "the file is damaged or of another kind"),
    ):
        file.write_bytes(b"text") if content is None else torch.save(content, file)
        with pytest.raises(VhablError, match=rf"w\.pth: {message}"):
            network(folder, f"encoder.weights={file}")


def test_weights_of_a_network_are_downloaded_by_name(
    folder: Path, tiny_alexnet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    Path("cache").mkdir()
    file = Path("cache/alexnet-owt-7be5be79.pth")
    with pytest.raises(VhablError, match=rf"no route .* give it: encoder.weights={file.name}"):
        network(folder, "encoder.weights=DEFAULT")
    torch.manual_seed(8)
    state = TinyAlexNet().state_dict()
    torch.save(state, file)  # where an earlier download was kept
    found, _ = network(folder, "encoder.weights=DEFAULT")
    assert torch.equal(found.network.classifier[4].weight, state["classifier.4.weight"])


@torch.no_grad()
def test_pictures_for_a_network_are_cut(folder: Path, tiny_alexnet: None) -> None:
    encoder, data = network(folder, "encoder.resize=256", "encoder.augment=true")
    inputs = data.query.inputs()
    assert inputs.image.shape[-1] == 256
    middle = replace(inputs, image=inputs.image[..., 16:240, 16:240])
    files = [folder / "images" / Path(str(name)).name for name in data.query.ids]
    for squeeze in (False, True):
        _, found = cnn_data(folder, "encoder.resize=256", f"encoder.squeeze={squeeze}")
        expected = np.stack([to_pixels(open_image(file), 256, squeeze) for file in files])
        assert np.array_equal(found.query.image[:], expected)
    encoder.eval()
    assert torch.equal(encoder(inputs).image, encoder(middle).image)
    encoder.train()
    assert not torch.equal(encoder.frozen(inputs).image, encoder.frozen(inputs).image)


def test_a_network_sees_the_words_that_descriptors_go_with(
    folder: Path, tiny_alexnet: None
) -> None:
    """The same items, words and labels as features have; pages say what a run saw."""
    config, data = cnn_data(folder, "out=run", "validation.fraction=0", "epochs=1")
    features = load_data(config.data)
    assert data.vocabulary == features.vocabulary and data.spec.text_dim == len(data.vocabulary)
    for split in ("train", "database", "query"):
        own, other = getattr(data, split), getattr(features, split)
        assert np.array_equal(own.text, other.text) and np.array_equal(own.labels, other.labels)
        assert np.array_equal(own.ids, other.ids)
    train.train(config, data, progress_bar=False)
    said = page.describe_inputs(run_folder.load(Path("run")))
    assert said == f"pictures of side 224 and {len(data.vocabulary):,} words"


@pytest.mark.parametrize("held", [True, False])
def test_the_cache_follows_pictures_in_arrays(
    held: bool,
    tmp_path: Path,
    tiny_alexnet: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vhabl.data.images.IN_MEMORY", 2**28 if held else 0)
    arrays = picture_arrays()
    config = array_config(write_arrays(tmp_path / "arrays", arrays), "encoder.tune=frozen")
    torch.manual_seed(0)
    encoder = build_method(config, load_data(config.data, config.encoder).spec).encoder.eval()
    said = []
    for change in ("", "train_text", "vali_image"):
        if change:
            arrays[change].reshape(len(arrays[change]), -1)[1, :5] += 1
            write_arrays(tmp_path / "arrays", arrays)
        data = load_data(config.data, config.encoder)
        kept = frozen_outputs(encoder, data, config.encoder)
        assert torch.equal(kept.query.inputs().image, encoder.frozen(data.query.inputs()).image)
        said.append(capsys.readouterr().err)
    assert said[:2] == ["", ""] and "made with other images: made anew" in said[2]
