"""HQ: deep binary hashing and quantisation (cross).

One real feature of each image and each text, in a space that both share. Its signs are the binary
code; a sum of centres from a few dictionaries, which both modalities share as well, stands for the
feature itself at a few bytes. A search finds its candidates by Hamming distance, and ranks them by
the inner product of the query's real feature with the centres of an item (`vhabl.nn.quantisation`).

Each length has a feature and dictionaries of its own, on a network that all of them share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl.encoders import Encoder
from vhabl.methods.base import HashingMethod
from vhabl.nn import quantisation
from vhabl.nn.layers import ResidualMLP
from vhabl.nn.quantisation import binarise
from vhabl.settings import key
from vhabl.system.errors import bad_value, fail
from vhabl.types import Batch, DataSpec, Inputs

VIEWS = ("image", "text")
ROUNDS = 3  # of codes and centres when training has ended


@dataclass(frozen=True)
class Weights:
    similarity: float = key("likelihood of similarity of images and texts", 30.0)
    hash: float = key("mean square distance of features from their signs, images + texts", 0.3)
    balance: float = key("square of each bit's mean, a sum over features and bits", 3e-6)
    quantisation: float = key(
        "square distance of features from their centres, a sum over features and bits", 3e-6
    )


@dataclass(frozen=True)
class HQSettings:
    branches: str = key(
        "before the features: residual (Linear and a residual MLP) | plain (nothing for images; "
        "Linear, dropout and ReLU for texts: as published)",
        "residual",
    )
    dim: int = key("width of what a branch gives", 512)
    dropout: float = key("dropout in the branches", 0.2)
    pairs: str = key(
        "whose similarity is learned: all (each image with each text of a batch) | rows (image i "
        "with text i, where texts are in another order than images: as published)",
        "all",
    )
    dictionaries: int = key("dictionaries M of a length; an item takes M log2(centres) bits", 4)
    centres: int = key("centres of a dictionary", 256)
    begin: int = key("epochs after which there are dictionaries", 1)
    weights: Weights = field(default_factory=Weights)


class HQ(HashingMethod):
    title = "HQ"
    task = "cross"
    any_length = False
    pairs = False
    Settings = HQSettings

    begun: Tensor  # 1 where there are dictionaries, else 0
    epochs: Tensor  # that training has finished

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: HQSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        if settings.pairs == "rows" and spec.paired:
            what = "image i and text i are one item, so that all training pairs are similar"
            do = "Set model.pairs=all, or another order of the texts: data.text_order=SEED"
            fail("model.pairs 'rows'", what, do)
        dim, widths = settings.dim, {"image": encoder.image_dim, "text": encoder.text_dim}
        branches: dict[str, nn.Module]
        if settings.branches == "plain":
            hidden = nn.Linear(widths["text"], dim), nn.Dropout(settings.dropout), nn.ReLU()
            branches = {"image": nn.Identity(), "text": nn.Sequential(*hidden)}
            widths["text"] = dim
        else:
            branches = {
                view: nn.Sequential(nn.Linear(width, dim), ResidualMLP(dim, settings.dropout))
                for view, width in widths.items()
            }
            widths = dict.fromkeys(VIEWS, dim)
        self.branches = nn.ModuleDict(branches)
        self.features = nn.ModuleDict(
            {
                view: nn.ModuleDict({str(k): nn.Linear(widths[view], k) for k in self.lengths})
                for view in VIEWS
            }
        )
        self.register_buffer("begun", torch.zeros(()))
        self.register_buffer("epochs", torch.zeros(()), persistent=False)
        for k in self.lengths:
            centres = torch.zeros(settings.dictionaries, settings.centres, k)
            self.register_buffer(f"centres_{k}", centres)
            # What the training items had last, images first: features and codes. See `prepare`.
            self.register_buffer(f"seen_{k}", torch.zeros(0), persistent=False)
            self.register_buffer(f"codes_{k}", torch.zeros(0), persistent=False)

    @classmethod
    def check_settings(cls, settings: HQSettings) -> None:
        for name, known in (("branches", ("residual", "plain")), ("pairs", ("all", "rows"))):
            if getattr(settings, name) not in known:
                bad_value(f"model.{name}", repr(getattr(settings, name)), " or ".join(known))
        for name in ("dim", "dictionaries", "begin"):
            if getattr(settings, name) < 1:
                bad_value(f"model.{name}", getattr(settings, name), "at least 1")
        if not 2 <= settings.centres <= 65536:
            bad_value("model.centres", settings.centres, "from 2 to 65536")
        if not 0 <= settings.dropout < 1:
            bad_value("model.dropout", settings.dropout, "at least 0 and below 1")

    def hidden(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the branches give, [B, D], of the modalities that there are."""
        found = self.embeddings(inputs)
        pooled = {"image": found.image, "text": found.text}
        return {view: self.branches[view](x) for view, x in pooled.items() if x is not None}

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """The features of each length, which no function bounds: their signs are the code."""
        hidden = self.hidden(inputs)
        features: Any = self.features
        return {k: {view: features[view][str(k)](x) for view, x in hidden.items()} for k in lengths}

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
        """Of images f and texts g [B, k] of each length, h [2B, k] both, b their signs:

        - similarity: mean of log(1 + e^s) - S s, s = f_i . g_j, S = 1 where image i and text j
          share a label; over all i and j, or those with i = j (`pairs`);
        - hash: MSE(b_f, f) + MSE(b_g, g), means over items and bits;
        - balance: 2B sum_k m_k^2, m_k the mean of bit k over h: what each of 2B features adds is
          the square of m, as below it is its square distance;
        - quantisation: |h - what its centres add up to|^2, a sum over 2B features and k bits; 0
          while there are no dictionaries.
        """
        weight = self.settings.weights
        of_images, of_texts = batch.labels, batch.labels_of_texts
        rowwise = self.settings.pairs == "rows"
        shared = (of_images * of_texts).sum(dim=1) if rowwise else of_images @ of_texts.T
        similar = (shared > 0).to(shared.dtype)  # (B,) or (B, B)
        items = len(self.get_buffer(f"seen_{self.bits}")) // 2
        terms: dict[str, Tensor] = {}
        for k, views in self.relax_lengths(batch.inputs, self.lengths).items():
            f, g = views["image"], views["text"]
            products = (f * g).sum(dim=1) if rowwise else f @ g.T
            similarity = (F.softplus(products) - similar * products).mean()
            h = torch.cat([f, g])
            rows = torch.cat([batch.index, batch.index + items])
            self.get_buffer(f"seen_{k}")[rows] = h.detach()
            centres = quantisation.rebuild(self.get_buffer(f"codes_{k}")[rows], self.codebook(k))
            parts = {
                "similarity": weight.similarity * similarity,
                # Twice the mean over both: a sum of two means.
                "hash": weight.hash * 2 * F.mse_loss(h, binarise(h.detach())),
                "balance": weight.balance * len(h) * h.mean(dim=0).square().sum(),
                "quantisation": self.begun * weight.quantisation * (h - centres).square().sum(),
            }
            for name, value in parts.items():
                terms[name] = terms.get(name, 0) + value
        return terms

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Dictionaries and codes of what the epoch saw, once it is time for them."""
        self.epochs += 1
        if self.epochs < self.settings.begin:
            return
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
            centres = quantisation.begin(x, self.settings.dictionaries, count)
        codes = quantisation.assign(x, centres)
        for _ in range(rounds):
            centres = quantisation.solve(x, codes, count)
            codes = quantisation.assign(x, centres, codes)
        setattr(self, f"centres_{bits}", centres)
        return codes
