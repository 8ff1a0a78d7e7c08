"""HIAMH: hierarchical importance-aware multi-modal hashing (fused).

"Higher bit, mightier clout": one positive weight for each bit, falling from the first bit to the
last, is learned with the codes. Codes are ordered by it from the start, so one model serves every
length by prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl.encoders import Encoder
from vhabl.methods.base import (
    HashingMethod,
    check_centres,
    check_nesting,
    class_centres,
    mean_terms,
    member_prefixes,
    modality_classes,
    modality_heads,
    stand_in,
    weighted,
)
from vhabl.nn import losses
from vhabl.nn.layers import FusedHashNet, FusedNetSettings
from vhabl.settings import key
from vhabl.types import Batch, DataSpec, Inputs


@dataclass(frozen=True)
class Weights:
    similarity: float = key("the labels' similarity by inner products weighted by bit", 1.0)
    nested: float = key("the labels' similarity on prefixes", 1.0)
    contrast: float = key("contrast of prefixes against the class centres", 1.0)
    centre: float = key("separation of the class centres", 0.01)
    modalities: float = key("class prediction from the features of each modality", 0.0)
    multi_similarity: float = key("multi-similarity loss on mined pairs", 0.01)
    decorrelation: float = key("decorrelated and balanced bits", 0.1)


@dataclass(frozen=True)
class HIAMHSettings:
    net: FusedNetSettings = FusedNetSettings()
    target: str = key("similarity of label sets: sigmoid (as released) | cosine", "cosine")
    centres: str = key("class centres: raw (as published) | tanh (bounded as codes are)", "tanh")
    shortest: int = key("shortest prefix with a loss of its own; the next ones double", 8)
    weights: Weights = Weights()


class HIAMH(HashingMethod):
    title = "HIAMH"
    task = "fused"
    Settings = HIAMHSettings

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: HIAMHSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        k = self.bits
        self.net = FusedHashNet(encoder.image_dim, encoder.text_dim, spec.classes, k, settings.net)
        self.stand_in = stand_in(encoder, settings.net.modality_dropout)
        if settings.weights.modalities:
            self.predict = modality_heads(self.net, settings.net.dim, spec.classes)
        self.theta = nn.Parameter(0.25 + torch.randn(k) / k)  # as the release starts its weights
        self.centres = class_centres(spec.classes, k, settings.centres)
        if settings.weights.contrast:
            self.bias = nn.Parameter(torch.zeros(spec.classes))

    @classmethod
    def check_settings(cls, settings: HIAMHSettings) -> None:
        check_nesting(settings.target, settings.shortest)
        check_centres(settings.centres)
        settings.net.check()

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        return {"fused": self.net(self.embeddings(inputs))[0]}

    def bit_weights(self) -> Tensor:
        """Weight of each bit: positive, falling, mean 1: [K].

        The reverse cumulative sum of softplus(theta) is ordered whatever theta is.
        """
        w = F.softplus(self.theta).flip(0).cumsum(0).flip(0)
        return w / w.mean()

    def bit_importance(self) -> Tensor:
        return self.bit_weights().detach()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        y = batch.labels
        target = losses.TARGETS[self.settings.target](y)
        h, features = self.net(self.embeddings(batch.inputs))
        members = self.net.member_bits()
        terms = mean_terms([self.member_loss(h, bits, y, target) for bits in members])
        return terms | weighted(
            self.settings.weights,
            {"modalities": lambda: modality_classes(self.predict, features, y)},
        )

    def member_loss(self, h: Tensor, bits: Tensor, y: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of one member of the network, which gives these bits."""
        h, centres, w = h[:, bits], self.centres[:, bits], self.bit_weights()[bits]
        if self.settings.centres == "tanh":
            centres = torch.tanh(centres)
        prefixes = member_prefixes(self.settings.shortest, self.bits, len(bits))
        return weighted(
            self.settings.weights,
            {
                # w is scaled to sum to K, so this is H diag(w) H^T / sum(w) against the target
                "similarity": lambda: losses.weighted_similarity(h, w / w.mean(), target),
                "nested": lambda: losses.nested_similarity(h, target, prefixes),
                "contrast": lambda: losses.nested_classification(
                    h, centres, self.bias, y, prefixes
                ),
                "centre": lambda: losses.centre_separation(centres),
                "multi_similarity": lambda: losses.multi_similarity(h, y),
                "decorrelation": lambda: losses.decorrelation(h),
            },
        )
