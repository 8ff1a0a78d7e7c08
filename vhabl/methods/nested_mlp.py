"""A plain two-branch MLP with nested similarity terms: the baseline that importance must beat.

No importance, no attention, no class prediction: prefixes of 8, 16, 32 ... bits are trained to
have the similarity of the labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vhabl.encoders import Encoder
from vhabl.methods.base import HashingMethod, check_nesting, stand_in
from vhabl.nn import losses
from vhabl.nn.layers import PlainNet
from vhabl.settings import key
from vhabl.system.errors import bad_value
from vhabl.types import Batch, DataSpec, Inputs


@dataclass(frozen=True)
class NestedMLPSettings:
    dim: int = key("width of both branches and of the joint layer", 512)
    dropout: float = key("dropout after every hidden layer", 0.4)
    target: str = key("similarity of label sets: sigmoid | cosine", "cosine")
    shortest: int = key("shortest prefix with a loss of its own; the next ones double", 8)
    modality_dropout: float = key("share of the items that lose image or text in training", 0.0)


class NestedMLP(HashingMethod):
    title = "Nested MLP"
    task = "fused"
    Settings = NestedMLPSettings

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: NestedMLPSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        self.stand_in = stand_in(encoder, settings.modality_dropout)
        self.net = PlainNet(
            encoder.image_dim, encoder.text_dim, settings.dim, self.bits, settings.dropout
        )
        self.prefixes = losses.doubling_lengths(settings.shortest, self.bits)

    @classmethod
    def check_settings(cls, settings: NestedMLPSettings) -> None:
        check_nesting(settings.target, settings.shortest)
        if settings.dim < 1:
            bad_value("model.dim", settings.dim, "at least 1")
        for name in ("dropout", "modality_dropout"):
            if not 0 <= getattr(settings, name) < 1:
                bad_value(f"model.{name}", getattr(settings, name), "at least 0 and below 1")

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        return {"fused": self.net(self.embeddings(inputs))[0]}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        target = losses.TARGETS[self.settings.target](batch.labels)
        h = self.embed(batch.inputs)["fused"]
        return {"nested": losses.nested_similarity(h, target, self.prefixes)}
