"""VH-ABL: variable-length hashing by adaptive bit importance (fused).

One model serves every code length: a network learns how important each bit is, training makes the
leading bits of that ranking good on their own, and the stored codes are in that order, so that a
shorter code is the prefix of a longer one.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from vhabl.system.errors import bad_value
from vhabl.types import Batch, DataSpec, Inputs


@dataclass(frozen=True)
class Weights:
    similarity: float = key("MSE between the cosine of codes and the labels' similarity", 1.0)
    classification: float = key("class prediction from all bits", 1.0)
    importance: float = key("the similarity with every bit weighted by its importance", 1.0)
    nested: float = key("similarity on ranked prefixes", 1.0)
    nested_classes: float = key("class prediction from ranked prefixes", 1.0)
    modalities: float = key("class prediction from the features of each modality", 0.0)
    multi_similarity: float = key("multi-similarity loss on mined pairs", 0.01)
    contrast: float = key("contrast of a code against the class centres", 0.01)
    centre: float = key("separation of the class centres", 0.01)
    bce: float = key("class prediction from the class centres", 1e-4)
    decorrelation: float = key("decorrelated and balanced bits", 0.1)


@dataclass(frozen=True)
class VHABLSettings:
    net: FusedNetSettings = FusedNetSettings()
    target: str = key("similarity of label sets: sigmoid (as released) | cosine", "cosine")
    centres: str = key("class centres: raw (as published) | tanh (bounded as codes are)", "tanh")
    shortest: int = key("shortest ranked prefix with a loss of its own; the next ones double", 8)
    momentum: float = key("momentum of the running importance that ranks bits in training", 0.9)
    weights: Weights = Weights()


class VHABL(HashingMethod):
    title = "VH-ABL"
    task = "fused"
    Settings = VHABLSettings

    importance: Tensor  # [K] mean weight of each bit

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: VHABLSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        k = self.bits
        self.net = FusedHashNet(encoder.image_dim, encoder.text_dim, spec.classes, k, settings.net)
        self.stand_in = stand_in(encoder, settings.net.modality_dropout)
        if settings.weights.classification:
            self.classifier = nn.Linear(k, spec.classes)
        self.centres = class_centres(spec.classes, k, settings.centres)
        if settings.weights.nested_classes:
            self.bias = nn.Parameter(torch.zeros(spec.classes))
        if settings.weights.modalities:
            self.predict = modality_heads(self.net, settings.net.dim, spec.classes)
        self.importance_in = nn.Linear(k, max(1, k // 2))
        self.importance_out = nn.Linear(max(1, k // 2), k)
        self.register_buffer("importance", torch.ones(k))

    @classmethod
    def check_settings(cls, settings: VHABLSettings) -> None:
        check_nesting(settings.target, settings.shortest)
        check_centres(settings.centres)
        if not 0 <= settings.momentum < 1:
            bad_value("model.momentum", settings.momentum, "at least 0 and below 1")
        settings.net.check()

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        return {"fused": self.net(self.embeddings(inputs))[0]}

    def bit_weights(self, h: Tensor) -> Tensor:
        """Importance of each bit for each item: positive, mean 1 over bits, [B, K]."""
        w = F.softplus(self.importance_out(F.relu(self.importance_in(h))))
        return w / w.mean(dim=1, keepdim=True)

    def bit_importance(self) -> Tensor:
        return self.importance

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        y = batch.labels
        target = losses.TARGETS[self.settings.target](y)
        h, features = self.net(self.embeddings(batch.inputs))
        # The importance network learns which bits carry the neighbourhood; it does not bend them.
        fixed = h.detach()
        w = self.bit_weights(fixed)
        with torch.no_grad():
            self.importance.lerp_(w.mean(dim=0), 1 - self.settings.momentum)
        members = []
        for bits in self.net.member_bits():
            ranked = bits[self.importance[bits].argsort(descending=True)]
            members.append(self.member_loss(h, ranked, y, target))
        return mean_terms(members) | weighted(
            self.settings.weights,
            {
                "importance": lambda: losses.weighted_similarity(fixed, w, target),
                "modalities": lambda: modality_classes(self.predict, features, y),
            },
        )

    def member_loss(
        self, h: Tensor, ranked: Tensor, y: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """The terms of one member of the network, whose bits are `ranked` by importance."""
        h, centres = h[:, ranked], self.centres[:, ranked]
        if self.settings.centres == "tanh":
            centres = torch.tanh(centres)
        prefixes = member_prefixes(self.settings.shortest, self.bits, len(ranked))
        return weighted(
            self.settings.weights,
            {
                "similarity": lambda: losses.similarity(h, target),
                "classification": lambda: losses.classification(
                    F.linear(h, self.classifier.weight[:, ranked], self.classifier.bias), y
                ),
                "nested": lambda: losses.nested_similarity(h, target, prefixes),
                "nested_classes": lambda: losses.nested_classification(
                    h, centres, self.bias, y, prefixes
                ),
                "multi_similarity": lambda: losses.multi_similarity(h, y),
                "contrast": lambda: losses.centre_contrast(h, centres, y),
                "centre": lambda: losses.centre_separation(centres),
                "bce": lambda: losses.centre_bce(h, centres, y),
                "decorrelation": lambda: losses.decorrelation(h),
            },
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Rank the bits by their mean importance on the training items and permute the model: first
        the most important bit of each member of the network, then the second of each, and so on,
        as members are trained on their own prefixes and err apart.
        """
        total, items = torch.zeros_like(self.importance), 0
        for batch in batches:
            total += self.bit_weights(self.embed(batch.inputs)["fused"]).sum(dim=0)
            items += len(batch.labels)
        self.importance.copy_(total / items)
        place = torch.empty_like(self.importance)  # of each bit within its member
        for bits in self.net.member_bits():
            ranked = bits[self.importance[bits].argsort(descending=True, stable=True)]
            place[ranked] = torch.arange(len(bits)).to(place)
        by_importance = self.importance.argsort(descending=True, stable=True)
        self.reorder(by_importance[place[by_importance].argsort(stable=True)])

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Permute the bits of the whole model: bit i becomes what bit order[i] was."""
        self.net.reorder(order)
        self.importance.copy_(self.importance[order])
        self.centres.copy_(self.centres[:, order])
        if self.settings.weights.classification:
            self.classifier.weight.copy_(self.classifier.weight[:, order])
        first, last = self.importance_in, self.importance_out
        first.weight.copy_(first.weight[:, order])
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
