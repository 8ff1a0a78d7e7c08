"""CMCL: contrastive multi-bit collaborative learning (cross).

One code for each image and one for each text, at every length that the model is trained for. All
lengths are hashed from one feature by encoders that both modalities share, and learn from each
other: each reconstructs the code of a longer, auxiliary length. The likelihood of a batch is taken
against the latest codes of all training items, which are kept in memory.

A feature is the sum of a global one, from the pooled vector, and a local one, from learned concepts
that attend to the parts of a picture or the words of a text. On ready-made features, which have no
parts, it is the global one alone, and a linear projection of each modality stands for the towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vhabl.encoders import Encoder
from vhabl.methods.base import HashingMethod
from vhabl.nn import losses
from vhabl.nn.layers import ClipBlock, CodeMemory, LengthHeads, ResidualMLP
from vhabl.settings import key
from vhabl.system.errors import bad_value
from vhabl.types import Batch, DataSpec, Inputs

VIEWS = ("image", "text")
HEAD_WIDTH = 64  # of the attention of concepts


@dataclass(frozen=True)
class Weights:
    inter: float = key("likelihood of the codes of one modality against those of the other", 5.0)
    intra: float = key("likelihood within a modality", 0.005)
    quantisation: float = key("squared distance from the signs of both modalities, per bit", 1.0)
    reconstruction: float = key("squared distance of decoded codes from the auxiliary code", 0.001)
    contrast: float = key("InfoNCE of the two global features of an item", 5.0)
    concepts: float = key("InfoNCE of the concepts of an item's image and text", 1.0)
    auxiliary: float = key("factor of all that has to do with the auxiliary code", 20.0)


@dataclass(frozen=True)
class CMCLSettings:
    dim: int = key("features: width of what is hashed; towers have their own", 512)
    blocks: int = key("residual blocks that both modalities share", 2)
    dropout: float = key("dropout in the residual blocks", 0.5)
    concepts: int = key("towers: learned concepts of the local branch; 0 has none", 64)
    auxiliary: int = key("length of the auxiliary code", 128)
    temperature: float = key("temperature of InfoNCE", 0.07)
    weights: Weights = field(default_factory=Weights)


class ConceptAttention(nn.Module):
    """Normalised concepts [M, D] attend to the parts of an item [B, P, D], then to each other in a
    CLIP block.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        heads = max(1, dim // HEAD_WIDTH)
        self.norm_parts = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.block = ClipBlock(dim, heads)

    def forward(self, concepts: Tensor, parts: Tensor, present: Tensor | None) -> Tensor:
        """[B, M, D]. present [B, P]: which parts there are; without it all."""
        queries = concepts.expand(len(parts), -1, -1)
        parts = self.norm_parts(parts)
        absent = None if present is None else ~present
        found, _ = self.attention(queries, parts, parts, absent, need_weights=False)
        attended: Tensor = self.block(found)
        return attended


class CMCL(HashingMethod):
    title = "CMCL"
    task = "cross"
    any_length = False
    tokens = "joint"
    Settings = CMCLSettings

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: CMCLSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        self.local = encoder.tokens != "" and settings.concepts > 0
        # Towers end in a joint space; features need a way into one.
        dim = encoder.image_dim if encoder.tokens else settings.dim
        widths = {"image": encoder.image_dim, "text": encoder.text_dim}
        self.project = nn.ModuleDict(
            {view: nn.Linear(widths[view], dim) for view in VIEWS if not encoder.tokens}
        )
        self.shared = nn.Sequential(
            *(ResidualMLP(dim, settings.dropout) for _ in range(settings.blocks))
        )
        if self.local:
            self.concepts = nn.Parameter(torch.randn(settings.concepts, dim))
            self.norm_concepts = nn.LayerNorm(dim)
            self.attend = nn.ModuleDict({v: ConceptAttention(dim) for v in VIEWS})
        self.heads = LengthHeads(dim, self.lengths, settings.auxiliary)
        self.memory = CodeMemory(VIEWS, self.heads.lengths, spec.train_items, spec.classes)

    @classmethod
    def check_settings(cls, settings: CMCLSettings) -> None:
        for name, least in (("dim", 1), ("blocks", 0), ("auxiliary", 1), ("concepts", 0)):
            if getattr(settings, name) < least:
                bad_value(f"model.{name}", getattr(settings, name), f"at least {least}")
        if not 0 <= settings.dropout < 1:
            bad_value("model.dropout", settings.dropout, "at least 0 and below 1")
        if settings.temperature <= 0:
            bad_value("model.temperature", settings.temperature, "more than 0")

    def features(self, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Global features [B, D] and concepts [B, M, D] of the modalities that there are."""
        found = self.embeddings(inputs)
        pooled = {"image": found.image, "text": found.text}
        parts = {"image": found.patches, "text": found.words}
        whole, local = {}, {}
        for view, x in pooled.items():
            if x is None:
                continue
            whole[view] = self.shared(self.project[view](x) if view in self.project else x)
            if self.local:
                present = found.word_mask if view == "text" else None
                with self.encoder.arithmetic():
                    concepts = self.norm_concepts(self.concepts)
                    attended = self.attend[view](concepts, parts[view], present)
                local[view] = attended.float()
        return whole, local

    def hashed(self, whole: dict[str, Tensor], local: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is hashed, [B, D]: global feature and mean concept."""
        return {v: x + local[v].mean(dim=1) if v in local else x for v, x in whole.items()}

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        features = self.hashed(*self.features(inputs))
        return {k: {view: self.heads(f, k) for view, f in features.items()} for k in lengths}

    def prepare(self, labels: Tensor) -> None:
        self.memory.begin(labels)

    def after_epoch(self) -> None:
        self.memory.renew()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        weight, index, memory = self.settings.weights, batch.index, self.memory
        whole, local = self.features(batch.inputs)
        features = self.hashed(whole, local)
        similar = memory.similar(batch.labels)
        contrast = losses.info_nce(whole["image"], whole["text"], self.settings.temperature)
        terms = {"contrast": weight.contrast * contrast}
        if local:
            within = losses.info_nce(local["image"], local["text"], self.settings.temperature)
            terms["concepts"] = weight.concepts * within
        longest = self.settings.auxiliary
        target = memory.signs(longest)[index]
        for k in self.heads.lengths:
            codes = {view: self.heads(f, k) for view, f in features.items()}
            for view, h in codes.items():
                memory.keep(view, index, h)
            factor = weight.auxiliary if k == longest else 1.0
            for view, h in codes.items():
                other = "text" if view == "image" else "image"
                inter = losses.likelihood(memory.codes(other, k), h, similar)
                intra = losses.likelihood(memory.codes(view, k), h, similar)
                parts = {
                    "inter": weight.inter * inter,
                    "intra": weight.intra * intra,
                    "quantisation": weight.quantisation
                    * losses.squared_error(h, memory.signs(k)[index])
                    / k,
                }
                if k != longest:
                    error = losses.squared_error(self.heads.rebuild(h), target)
                    parts["reconstruction"] = weight.auxiliary * weight.reconstruction * error
                for name, value in parts.items():
                    terms[name] = terms.get(name, 0) + factor * value
        return terms
