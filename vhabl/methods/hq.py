"""HQ: deep binary hashing and quantisation (cross).

One real feature of each image and each text, in a space that both share. Its signs are the binary
code; a sum of centres from a few dictionaries, which both modalities share as well, stands for the
feature itself at a few bytes. A search finds its candidates by Hamming distance, and ranks them by
the inner product of the query's real feature with the centres of an item (`vhabl.codebooks`).

Each length has a feature and dictionaries of its own, on a network that all of them share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl import codebooks
from vhabl.codes import binarise
from vhabl.encoders import Encoder
from vhabl.errors import fail
from vhabl.layers import ResidualMLP
from vhabl.methods.base import HashingMethod
from vhabl.settings import key
from vhabl.types import Batch, DataSpec, Inputs

VIEWS = ("image", "text")
ROUNDS = 3  # of codes and centres when training has ended


@dataclass(frozen=True)
class Weights:
    similarity: float = key("likelihood of similarity of images and texts", 30.0)
    hash: float = key("mean square distance of features from their signs", 0.6)
    balance: float = key("square of each bit's mean", 0.1)
    quantisation: float = key("mean square distance of features from their centres", 0.1)


@dataclass(frozen=True)
class HQSettings:
    dim: int = key("width of what both branches give", 512)
    dropout: float = key("dropout in their residual blocks", 0.2)
    dictionaries: int = key("dictionaries M of a length; an item takes M log2(centres) bits", 4)
    centres: int = key("centres of a dictionary", 256)
    weights: Weights = field(default_factory=Weights)


class HQ(HashingMethod):
    title = "HQ"
    task = "cross"
    any_length = False
    Settings = HQSettings

    begun: Tensor  # 1 where there are dictionaries, else 0

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: HQSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        dim, widths = settings.dim, {"image": encoder.image_dim, "text": encoder.text_dim}
        self.branches = nn.ModuleDict(
            {
                view: nn.Sequential(
                    nn.Linear(widths[view], dim), ResidualMLP(dim, settings.dropout)
                )
                for view in VIEWS
            }
        )
        self.features = nn.ModuleDict(
            {f"{view}_{k}": nn.Linear(dim, k) for view in VIEWS for k in self.lengths}
        )
        self.register_buffer("begun", torch.zeros(()))
        for k in self.lengths:
            centres = torch.zeros(settings.dictionaries, settings.centres, k)
            self.register_buffer(f"centres_{k}", centres)
            # What the training items had last, images first: features and codes. See `prepare`.
            self.register_buffer(f"seen_{k}", torch.zeros(0), persistent=False)
            self.register_buffer(f"codes_{k}", torch.zeros(0), persistent=False)

    @classmethod
    def check_settings(cls, settings: HQSettings) -> None:
        for name in ("dim", "dictionaries"):
            if getattr(settings, name) < 1:
                fail(f"key model.{name}", str(getattr(settings, name)), "at least 1")
        if not 2 <= settings.centres <= 65536:
            fail("key model.centres", str(settings.centres), "2 to 65536")
        if not 0 <= settings.dropout < 1:
            fail("key model.dropout", str(settings.dropout), "0 up to below 1")

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the branches give, [B, D], of the modalities that there are."""
        found = self.embeddings(inputs)
        pooled = {"image": found.image, "text": found.text}
        return {view: self.branches[view](x) for view, x in pooled.items() if x is not None}

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """The features of each length, which no function bounds: their signs are the code."""
        hidden = self.embed(inputs)
        return {
            k: {view: self.features[f"{view}_{k}"](x) for view, x in hidden.items()}
            for k in lengths
        }

    def codebook(self, bits: int) -> Tensor:
        return self.get_buffer(f"centres_{bits}")

    # -- training ----------------------------------------------------------------------------------

    def prepare(self, labels: Tensor) -> None:
        rows, device = 2 * len(labels), labels.device
        codes = torch.zeros(rows, self.settings.dictionaries, dtype=torch.int64, device=device)
        for k in self.lengths:
            setattr(self, f"seen_{k}", torch.zeros(rows, k, device=device))
            setattr(self, f"codes_{k}", codes.clone())

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        weight, y = self.settings.weights, batch.labels
        similar = (y @ y.T > 0).to(y.dtype)  # of every image and every text of the batch
        items = len(self.get_buffer(f"seen_{self.bits}")) // 2
        terms: dict[str, Tensor] = {}
        for k, views in self.relax_lengths(batch.inputs, self.lengths).items():
            products = views["image"] @ views["text"].T  # (B, B)
            similarity = (F.softplus(products) - similar * products).mean()
            h = torch.cat([views["image"], views["text"]])
            rows = torch.cat([batch.index, batch.index + items])
            self.get_buffer(f"seen_{k}")[rows] = h.detach()
            centres = codebooks.rebuild(self.get_buffer(f"codes_{k}")[rows], self.codebook(k))
            parts = {
                "similarity": weight.similarity * similarity,
                "hash": weight.hash * F.mse_loss(h, binarise(h.detach())),
                "balance": weight.balance * h.mean(dim=0).square().mean(),
                "quantisation": self.begun * weight.quantisation * F.mse_loss(h, centres),
            }
            for name, value in parts.items():
                terms[name] = terms.get(name, 0) + value
        return terms

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Dictionaries and codes of what the epoch saw."""
        for k in self.lengths:
            seen = self.get_buffer(f"seen_{k}")
            setattr(self, f"codes_{k}", self._renew(k, seen, 1))
        self.begun.fill_(1)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Dictionaries of the features that the trained network gives the training items."""
        parts = [self.relax_lengths(batch.inputs, self.lengths) for batch in batches]
        for k in self.lengths:
            self._renew(k, torch.cat([part[k][view] for view in VIEWS for part in parts]), ROUNDS)
        self.begun.fill_(1)

    def _renew(self, bits: int, x: Tensor, rounds: int) -> Tensor:
        """Centres that fit x [N, bits], and its codes."""
        centres, count = self.codebook(bits), self.settings.centres
        if not self.begun:
            centres = codebooks.begin(x, self.settings.dictionaries, count)
        codes = codebooks.assign(x, centres)
        for _ in range(rounds):
            centres = codebooks.solve(x, codes, count)
            codes = codebooks.assign(x, centres, codes)
        setattr(self, f"centres_{bits}", centres)
        return codes
