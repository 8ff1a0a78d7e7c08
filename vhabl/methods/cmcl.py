"""CMCL: contrastive multi-bit collaborative learning (cross).

One code for each image and one for each text, at every length that the model is trained for. All
lengths are hashed from one feature by encoders that both modalities share, and learn from each
other: each reconstructs the code of a longer, auxiliary length. The likelihood of a batch is taken
against the latest codes of all training items, which are kept in memory.

On ready-made features this is the method's global branch: a linear projection of each modality
stands for the towers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl import losses
from vhabl.codes import binarise
from vhabl.encoders import FeatureScaling
from vhabl.errors import fail
from vhabl.layers import Dropout
from vhabl.methods.base import HashingMethod
from vhabl.settings import key
from vhabl.types import Batch, DataSpec, Inputs


@dataclass(frozen=True)
class Weights:
    inter: float = key("likelihood of the codes of one modality against those of the other", 5.0)
    intra: float = key("likelihood within a modality", 0.005)
    quantisation: float = key("distance of relaxed codes from the signs of both modalities", 1.0)
    reconstruction: float = key("distance of decoded codes from the auxiliary code", 0.001)
    contrast: float = key("InfoNCE of the two features of an item", 5.0)
    auxiliary: float = key("factor of all that has to do with the auxiliary code", 20.0)


@dataclass(frozen=True)
class CMCLSettings:
    dim: int = key("width of the features that are hashed", 512)
    blocks: int = key("residual blocks that both modalities share", 2)
    dropout: float = key("dropout in the residual blocks", 0.5)
    auxiliary: int = key("length of the auxiliary code", 128)
    temperature: float = key("temperature of InfoNCE", 0.07)
    weights: Weights = field(default_factory=Weights)


class ResidualMLP(nn.Module):
    """x + Linear(Dropout(GELU(Linear(LayerNorm(x))))), four times as wide inside: [B, D]."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(4 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class CMCL(HashingMethod):
    title = "CMCL"
    task = "cross"
    any_length = False
    Settings = CMCLSettings

    def __init__(self, spec: DataSpec, bits: list[int], settings: CMCLSettings) -> None:
        super().__init__(spec, bits, settings)
        dim = settings.dim
        self.scaling = FeatureScaling(spec)
        self.project = nn.ModuleDict(
            {"image": nn.Linear(spec.image_dim, dim), "text": nn.Linear(spec.text_dim, dim)}
        )
        self.shared = nn.Sequential(
            *(ResidualMLP(dim, settings.dropout) for _ in range(settings.blocks))
        )
        longest = settings.auxiliary
        self.hash = nn.ModuleDict(
            {str(k): nn.Linear(dim, k) for k in sorted({*self.lengths, longest})}
        )
        self.decode = nn.ModuleDict(
            {
                str(k): nn.Sequential(
                    nn.Linear(k, longest), nn.Tanh(), nn.Linear(longest, longest), nn.Tanh()
                )
                for k in self.lengths
                if k != longest
            }
        )
        # The latest relaxed codes of all training items in each modality, their common signs, and
        # their labels: what a batch is compared with. Only training needs them.
        items = spec.train_items
        for k in map(int, self.hash):
            for name in ("image", "text", "signs"):
                self.register_buffer(f"{name}_{k}", torch.zeros(items, k), persistent=False)
        self.register_buffer("labels", torch.zeros(items, spec.classes), persistent=False)

    @classmethod
    def check_settings(cls, settings: CMCLSettings) -> None:
        for name, least in (("dim", 1), ("blocks", 0), ("auxiliary", 1)):
            if getattr(settings, name) < least:
                fail(f"key model.{name}", str(getattr(settings, name)), f"at least {least}")
        if not 0 <= settings.dropout < 1:
            fail("key model.dropout", str(settings.dropout), "0 up to below 1")
        if settings.temperature <= 0:
            fail("key model.temperature", str(settings.temperature), "more than 0")

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Features [B, dim] of the modalities that there are."""
        scaled = self.scaling(inputs)
        found = {"image": scaled.image, "text": scaled.text}
        return {
            view: self.shared(self.project[view](x)) for view, x in found.items() if x is not None
        }

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        features = self.embed(inputs)
        return {k: self._relax(features, k) for k in lengths}

    def _relax(self, features: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
        return {view: torch.tanh(self.hash[str(bits)](f)) for view, f in features.items()}

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Begin the memory with normal numbers, as the release does, and keep the labels."""
        labels = torch.cat([batch.labels for batch in batches])
        self.labels = labels
        for k in map(int, self.hash):
            for view in ("image", "text"):
                self._buffer(view, k, torch.randn(len(labels), k).to(labels.device))
        self.after_epoch()

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Renew the binary targets: the signs of both modalities' latest codes together."""
        for k in map(int, self.hash):
            both = self.get_buffer(f"image_{k}") + self.get_buffer(f"text_{k}")
            self._buffer("signs", k, binarise(both))

    def _buffer(self, name: str, k: int, value: Tensor) -> None:
        setattr(self, f"{name}_{k}", value)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        weight, index = self.settings.weights, batch.index
        features = self.embed(batch.inputs)
        similar = (self.labels @ batch.labels.T > 0).to(batch.labels.dtype)  # (N, B)
        terms: dict[str, Tensor] = {
            "contrast": weight.contrast
            * losses.info_nce(features["image"], features["text"], self.settings.temperature)
        }
        longest = self.settings.auxiliary
        target = self.get_buffer(f"signs_{longest}")[index]
        for k in map(int, self.hash):
            codes = self._relax(features, k)
            memory = {view: self.get_buffer(f"{view}_{k}") for view in codes}
            for view, h in codes.items():
                memory[view][index] = h.detach()
            signs = self.get_buffer(f"signs_{k}")[index]
            factor = weight.auxiliary if k == longest else 1.0
            for view, h in codes.items():
                other = "text" if view == "image" else "image"
                parts = {
                    "inter": weight.inter * losses.likelihood(memory[other], h, similar),
                    "intra": weight.intra * losses.likelihood(memory[view], h, similar),
                    "quantisation": weight.quantisation * F.mse_loss(h, signs),
                }
                if k != longest:
                    share = weight.auxiliary * weight.reconstruction
                    rebuilt = self.decode[str(k)](h)
                    parts["reconstruction"] = share * F.mse_loss(rebuilt, target)
                for name, value in parts.items():
                    terms[name] = terms.get(name, 0) + factor * value
        return terms
