"""open_clip's towers, weights and tokens: imported here and nowhere else, when they are used."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vhabl.encoders.weights import read_state
from vhabl.system.errors import VhablError, bad_value, brief, fail, note
from vhabl.system.files import locate

WEIGHTS_FOLDER = "cache"  # where open_clip's downloads go
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives
VOCABULARY = 49408  # CLIP's tokens
QUICK = 1.702  # of OpenAI's GELU
LARGEST = 2**28  # parameters: a GiB of them
DEEPEST, LONGEST = 256, 4096  # layers; pixels of a side, tokens of a text
_OF_A_RUN = "encoder.clip."  # how the weights of a run name the towers


def module() -> ModuleType:
    """open_clip. Raises VhablError where it is not installed."""
    mend_torchvision()
    try:
        import open_clip
    except ImportError as error:
        raise VhablError(
            f"encoder.name=clip needs open_clip ({error}): pip install open_clip_torch"
        ) from None
    return open_clip


_schemas: list[torch.library.Library] = []  # alive as long as the schemas are needed


def mend_torchvision() -> None:
    """Let torchvision be imported where its native library does not fit this torch.

    Its packaged build is one for CUDA; beside a CPU build of torch that library does not load, and
    the import ends at an operator that it would have defined. The transforms and networks need
    none of it, so the two schemas are defined here, and calling them is an error as before.
    """
    if _schemas:
        return
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        importlib.import_module("torchvision")


# -- towers ----------------------------------------------------------------------------------------


def pretrained(model: str, weights: str) -> dict[str, Any]:
    """What open_clip says of weights that it downloads by name: `quick_gelu`, `mean` and `std` of
    the colour channels, `resize_mode` (shortest or squash). Empty for a file or no weights.
    """
    if not weights or locate(weights).exists():
        return {}
    return dict(module().get_pretrained_cfg(model, weights) or {})


def squeezed(model: str, weights: str, squeeze: bool) -> bool:
    """Whether pictures are squeezed to a square: as asked for, or as the weights were trained."""
    mode = pretrained(model, weights).get("resize_mode")
    if squeeze and mode == "shortest":
        note(f"encoder.squeeze=true: {weights} was trained on pictures cut in the centre")
    return squeeze or mode == "squash"


def build_towers(model: str, weights: str, read: bool = True) -> Any:
    """An `open_clip.CLIP` with these weights, or random ones where `weights` is empty.

    model: a name of open_clip's or a JSON file with embed_dim, vision_cfg and text_cfg, of which at
    most LARGEST parameters are made without a file of weights; read: False where the caller has
    the weights. Raises VhablError for an architecture that is not known or not served, and for
    weights that are missing, damaged or of another architecture.
    """
    open_clip = module()
    config = _architecture(open_clip, model)
    if pretrained(model, weights).get("quick_gelu"):  # some names are of both kinds of weights
        config["quick_gelu"] = True
    described = model.endswith(".json") or model[:1] == "{"
    try:
        if described and read:
            with torch.device("meta"):  # shapes alone
                count = sum(p.numel() for p in open_clip.CLIP(**config).parameters())
            path = locate(weights)
            if count > max(LARGEST, path.stat().st_size if path.is_file() else 0):
                raise ValueError(f"{count:,} parameters")
        towers = open_clip.CLIP(**config)
        for block in list(towers.modules()):
            mlp: Any = getattr(block, "mlp", None)
            if isinstance(getattr(mlp, "gelu", None), open_clip.transformer.QuickGELU):
                block.mlp = QuickMLP(OrderedDict(mlp.named_children()))
    except Exception as error:  # a description that makes no sense raises many types
        what = f"the architecture cannot be built ({brief(error)})"
        do = "It needs embed_dim, vision_cfg and text_cfg as open_clip has them"
        fail(f"encoder.model {name_of(model)}", what, do)
    if getattr(towers, "text_pool_type", "argmax") != "argmax" or towers.attn_mask is None:
        _not_served(model)
    if weights and read:
        load_weights(towers, model, weights)
    return towers


class QuickMLP(nn.Sequential):
    """Both layers of a block with `x * sigmoid(1.702 x)` between them: [..., d] -> [..., d].

    That is `silu(1.702 x) / 1.702`. With the factors in the weights, which are small, what is four
    times as wide as a token is passed over once in place of three times, and kept twice in place
    of three times for the gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = cast(nn.Linear, self[0]), cast(nn.Linear, self[2])
        wide = F.silu(F.linear(x, QUICK * first.weight, QUICK * first.bias))
        return F.linear(wide, last.weight / QUICK, last.bias)


def picture_size(model: str) -> int:
    """Side of the pictures that the image tower of an architecture takes."""
    return int(_architecture(module(), model)["vision_cfg"]["image_size"])


def normalisation(model: str, weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread of each colour channel, on a scale of 0 to 1, of the pictures that the
    weights were trained on: of CLIP's, where they say nothing else.
    """
    open_clip, own = module(), pretrained(model, weights)
    theirs = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return own.get("mean", theirs[0]), own.get("std", theirs[1])


def _not_served(model: str) -> None:
    do = "They must be a vision transformer or ResNet and a causal text tower, as in CLIP"
    fail(f"encoder.model {name_of(model)}", "its towers are of another kind", do)


def with_content(model: str) -> str:
    """A JSON file's content in place of its path, with the file's name, so that a configuration
    holds the towers that it was trained with; names of open_clip's as they are.
    """
    path = locate(model)
    if not model.endswith(".json") or not path.is_file():
        return model
    config = _parse(path.read_text(encoding="utf-8", errors="replace"), path)
    return json.dumps({"name": path.stem, **config} if isinstance(config, dict) else config)


def name_of(model: str) -> str:
    """A short name of an architecture, for the names of files."""
    return str(_parse(model, model).get("name", "towers")) if model[:1] == "{" else model


def _parse(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(where, f"this is not JSON ({error})", "It must be a JSON file that describes towers")


def _architecture(open_clip: ModuleType, model: str) -> dict[str, Any]:
    model = with_content(model)
    if model.endswith(".json"):
        fail(model, "no such file", "encoder.model must be a JSON file that describes towers")
    if model[:1] in "{[":
        config = _parse(model, "key encoder.model")
    else:
        config = open_clip.get_model_config(model)
        if config is None:
            bad_value(
                "encoder.model", repr(model), "a name of open_clip.list_models(), or a .json file"
            )
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or not all(part in config for part in parts):
        do = f"It must have {', '.join(parts)}"
        fail(f"encoder.model {name_of(model)}", "it has other keys", do)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        do = "It must be two dictionaries of keys"
        fail(f"encoder.model {name_of(model)}", "it has other content", do)
    foreign = {"timm_model_name", "hf_model_name", "attentional_pool"}
    if config.get("custom_text") or foreign & {*vision, *text} or text.get("embed_cls"):
        _not_served(model)
    side: Any = vision.get("image_size")
    length, words = text.get("context_length", 77), text.get("vocab_size", VOCABULARY)
    integers = all(type(number) is int for number in (side, length, words))
    if not integers or not (max(side, length) <= LONGEST and side > 0 and words >= VOCABULARY):
        fail(
            f"encoder.model {name_of(model)}",
            "its pictures or words are of another kind",
            f"It needs image_size of one side in pixels and context_length, at most "
            f"{LONGEST}, and vocab_size of at least {VOCABULARY}",
        )
    for part in (vision, text):
        depths = part.get("layers")
        for depth in depths if isinstance(depths, list) else [depths]:
            if isinstance(depth, int | float) and depth > DEEPEST:
                do = f"It can have at most {DEEPEST}"
                fail(f"encoder.model {name_of(model)}", f"{depth} layers", do)
    known = (*parts, "quick_gelu")
    return {name: config[name] for name in known if name in config}


def load_weights(towers: nn.Module, model: str, weights: str) -> None:
    """Read weights into towers. Raises VhablError as `build_towers` does."""
    path = locate(weights)
    if not path.is_file():
        path = _download(model, weights)
    found, expected = read_state(path), towers.state_dict()
    if _NOT_WEIGHTS[0] in found and not any(isinstance(m, QuickMLP) for m in towers.modules()):
        described = model.endswith(".json") or model[:1] == "{"
        name = f"encoder.model={model}-quickgelu"
        quick = '"quick_gelu": true in its JSON' if described else name
        fail(path, "OpenAI's weights are for QuickGELU", f"Set {quick}")
    state = _of_towers(found)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            fail(
                path, f"{name} is of type {tensor.dtype}", "Weights must be floating-point numbers"
            )
    scale = expected["logit_scale"]  # no code depends on it, and some files hold it as [1]
    state["logit_scale"] = state.get("logit_scale", scale).reshape(scale.shape)
    wrong = [f"no {name}" for name in expected.keys() - state.keys()]
    wrong += [f"an unknown {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} of shape {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        do = f"encoder.model is {name_of(model)}"
        fail(path, f"weights of another architecture ({', '.join(sorted(wrong)[:3])}{more})", do)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            fail(path, f"{name} has values that are not finite", "Take other weights")
    towers.load_state_dict(state)


def _of_towers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights that are of towers, by open_clip's names."""
    if any(name.startswith(_OF_A_RUN) for name in state):
        state = {
            name.removeprefix(_OF_A_RUN): tensor
            for name, tensor in state.items()
            if name.startswith(_OF_A_RUN)
        }
    return {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}


def _download(model: str, weights: str) -> Path:
    open_clip = module()
    known = open_clip.list_pretrained_tags_by_model(model)
    if weights not in known:
        where = "to be downloaded by name: " + ", ".join(known) if known else "or empty"
        do = f"Give the weights of {name_of(model)} ({where}; docs/encoders.md says where from)"
        fail(f"encoder.weights {weights}", "no such file", do)
    note(f"downloading the weights {weights!r} of {model} to {WEIGHTS_FOLDER}/")
    try:
        config = open_clip.get_pretrained_cfg(model, weights)
        return Path(open_clip.download_pretrained(config, cache_dir=WEIGHTS_FOLDER))
    except Exception as error:  # whatever a network raises
        do = "Connect to a network, or give a file: encoder.weights=PATH"
        fail(f"encoder.weights {weights}", f"no answer ({brief(error)})", do)


# -- tokens ----------------------------------------------------------------------------------------


def tokenise(captions: Sequence[str], words: int) -> tuple[np.ndarray, int]:
    """Token ids [N, words] int64 of CLIP's vocabulary, zeros after the end-of-text token, and how
    many captions are longer: they are cut, the end-of-text token kept.
    """
    tokenizer = module().SimpleTokenizer(context_length=words)
    ids = np.zeros((len(captions), words), np.int64)
    too_long = 0
    for row, caption in enumerate(captions):
        tokens = tokenizer.encode(caption)
        too_long += len(tokens) > words - 2
        tokens = [tokenizer.sot_token_id, *tokens[: words - 2], tokenizer.eot_token_id]
        ids[row, : len(tokens)] = tokens
    return ids, too_long
