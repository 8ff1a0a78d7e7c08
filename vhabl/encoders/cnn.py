"""torchvision's networks for pictures, up to their second fully connected layer, beside a bag of
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from vhabl.encoders import open_clip
from vhabl.encoders.base import PixelEncoder
from vhabl.encoders.features import FeatureScaling
from vhabl.encoders.weights import read_state
from vhabl.settings import EncoderConfig
from vhabl.system.errors import brief, fail
from vhabl.system.files import locate
from vhabl.types import DataSpec, Embeddings, Inputs, Split

NETWORKS = ("alexnet", "vgg16")
SIDE = 224  # of the pictures that they were trained on
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colour channels


class CnnEncoder(PixelEncoder):
    """Pixels through a network of torchvision's, and texts that are a bag of words.

    `tune` says how much of the network is trained: nothing, the last N of its layers that have
    weights, or all. What comes before is frozen: it is in evaluation mode always, and its outputs
    can be kept (`frozen`). The picture's vector is standardised by running statistics (without
    `standardise` it stays as the last ReLU gives it), the text as features are.
    """

    batch = 32  # the first layers of VGG need 25 MB for each picture

    def __init__(self, config: EncoderConfig, spec: DataSpec, pretrained: bool = True) -> None:
        super().__init__(config, config.side or SIDE, (MEAN, SPREAD))
        weights = config.weights if pretrained else ""
        self.network = build_network(config.model, weights, "encoder.weights=")
        parts: Any = self.network
        layers = [*parts.features, parts.avgpool, nn.Flatten(), *parts.classifier]
        weighted = [n for n, layer in enumerate(layers) if list(layer.parameters())]
        self.image_dim, self.text_dim = layers[weighted[-1]].out_features, spec.text_dim
        norm = nn.BatchNorm1d(self.image_dim, affine=False)
        self.norm = norm if config.standardise else nn.Identity()
        self.bag = FeatureScaling(spec, ("text",))

        known = {"frozen": 0, "all": len(weighted)}
        self.tuned = min(int(known.get(config.tune, config.tune)), len(weighted))
        begin = weighted[-self.tuned] if self.tuned else len(layers)
        while isinstance(layers[begin - 1], nn.Dropout):
            begin -= 1  # it belongs to the layer that it feeds
        self.fixed, self.live = layers[:begin], layers[begin:]
        self.cacheable = bool(self.fixed) and not config.augment
        for layer in self.fixed:
            layer.requires_grad_(False)
        self.train()

    def fit(self, train: Split, kind: str) -> None:
        self.bag.fit(train, kind)

    def train(self, mode: bool = True) -> CnnEncoder:
        """Training mode for what is trained: a frozen part drops nothing out."""
        super().train(mode)
        for layer in self.fixed:
            layer.eval()
        return self

    def frozen(self, inputs: Inputs) -> Inputs:
        """What the last frozen layer gives, rounded as it is kept, in place of pixels."""
        x = inputs.image
        if x is None or x.is_floating_point() or not self.fixed:
            return inputs
        with torch.no_grad(), self.arithmetic():
            x = self.normalised(x)
            for layer in self.fixed:
                x = layer(x)
        return replace(inputs, image=self._rounded(x))

    def forward(self, inputs: Inputs) -> Embeddings:
        image = self.frozen(inputs).image
        if image is not None:
            with self.arithmetic():
                x = image.float() if image.is_floating_point() else self.normalised(image)
                for layer in self.live:
                    x = layer(x)
            image = self.norm(x.float())
        return self.bag(Inputs(image, inputs.text))

    def fixed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.network.state_dict(prefix="network.", keep_vars=True).items():
            if not tensor.requires_grad:
                yield name, tensor


def build_network(name: str, weights: str, option: str) -> nn.Module:
    """A network that ends with its second fully connected layer, after the ReLU.

    weights: a file, the name of weights that torchvision downloads, or empty for random ones;
    option: what precedes them where the user gives them, for messages. Raises VhablError where
    they are missing, damaged or of another network.
    """
    open_clip.mend_torchvision()  # before anything here imports from it
    from torchvision import models

    network: Any = models.get_model(name, weights=None)
    if weights:
        known = models.get_model_weights(name)
        path = locate(weights)
        if path.is_file():
            state, where = read_state(path), str(path)
        elif weights in known.__members__:
            entry = known[weights]
            state, where = download(entry, option), f"weights {entry.name}"
        else:
            fail(
                f"{option}{weights}",
                "no such file",
                f"Give a file such as {known['DEFAULT'].url}, or one of "
                f"{', '.join(known.__members__)}",
            )
        check_state(network, state, where, name)
        network.load_state_dict(state)
    while not isinstance(network.classifier[-1], nn.ReLU):  # that of classes, a dropout
        del network.classifier[-1]
    return network


def download(entry: Any, option: str) -> dict[str, Tensor]:
    """Weights of torchvision's, from its server or from where an earlier download was kept."""
    file = PurePosixPath(entry.url).name
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            model_dir=open_clip.WEIGHTS_FOLDER, check_hash=True, map_location="cpu",
            weights_only=True,
        )  # fmt: skip
    except Exception as error:  # whatever a network raises
        do = f"Connect to a network, or fetch that file elsewhere and give it: {option}{file}"
        fail(f"weights {entry.name}", f"{entry.url} cannot be downloaded ({brief(error)})", do)
    return state


def check_state(network: nn.Module, state: dict[str, Tensor], where: str, name: str) -> None:
    """Raise VhablError, naming a tensor, unless the weights are the network's and finite."""
    expected, wanted = network.state_dict(), f"It must be the weights of {name}"
    for key, tensor in expected.items():
        if key not in state:
            fail(where, f"no tensor {key}", wanted)
        if state[key].shape != tensor.shape:
            shapes = [tuple(t.shape) for t in (state[key], tensor)]
            fail(where, f"{key} has the shape {shapes[0]}", f"{name} needs {shapes[1]}")
        if not torch.isfinite(state[key]).all():
            fail(where, f"{key} has values that are not finite", "Take other weights")
    for key in state:
        if key not in expected:
            fail(where, f"an unknown tensor {key}", wanted)
