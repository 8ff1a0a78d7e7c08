"""Building blocks that several methods share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from vhabl.errors import fail
from vhabl.settings import key
from vhabl.types import DataSpec, Inputs


class Dropout(nn.Module):
    """Dropout whose mask comes from `rand`: on CPU five times faster than the Bernoulli sampler."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * ((torch.rand_like(x) >= self.rate).to(x.dtype) / (1 - self.rate))


ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class FeatureMLP(nn.Sequential):
    """Linear, activation, BatchNorm, Dropout for each pair of widths: [B, w0] -> [B, wn]."""

    def __init__(self, widths: tuple[int, ...], dropout: float, activation: str) -> None:
        blocks: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            blocks += [
                nn.Linear(width_in, width_out),
                ACTIVATIONS[activation](),
                nn.BatchNorm1d(width_out),
                Dropout(dropout),
            ]
        super().__init__(*blocks)


class PrototypeAttention(nn.Module):
    """Refine a modality feature by attention over learned class prototypes: [B, D] -> [B, D].

    The C prototypes are keys and values, the feature is the query, so class semantics enter without
    any label. Residual by concatenation, then Linear(2D -> D), as in VH-ABL.
    """

    def __init__(self, dim: int, classes: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.prototypes = nn.Parameter(torch.randn(classes, dim) / dim**0.5)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.merge = nn.Linear(2 * dim, dim)
        # At first the feature passes unchanged; what the prototypes add is learned from there.
        with torch.no_grad():
            self.merge.weight.copy_(torch.eye(dim, 2 * dim))
            self.merge.bias.zero_()

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The refined feature [B, D], and the log attention to each class, [B, C]: the mean over
        heads, which a loss can hold to the labels.
        """

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, items, D / heads)

        q, k = split(self.query(feature)), split(self.key(self.prototypes))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (heads, B, C)
        context = scores.softmax(dim=-1) @ split(self.value(self.prototypes))
        # Attention is surer on training items than on others: dropout keeps the rest of the
        # network from leaning on it.
        context = self.dropout(context.transpose(0, 1).flatten(1))  # (B, D)
        attention = torch.logsumexp(scores.log_softmax(dim=-1), dim=0) - math.log(self.heads)
        return self.merge(torch.cat([feature, context], dim=1)), attention


@dataclass(frozen=True)
class FusedNetSettings:
    members: int = key("independent networks that share out the bits of a code", 1)
    dim: int = key("width D of the modality features", 256)
    image_hidden: int = key("width of the image branch's hidden layer", 2048)
    text_hidden: int = key("width of the text branch's hidden layer", 1024)
    joint_hidden: int = key("hidden width of a branch that sees both modalities; 0 has none", 0)
    joint_image: float = key("weight of the image's features where both enter that branch", 0.5)
    heads: int = key("heads of the attention over class prototypes", 4)
    dropout: float = key("dropout in the modality branches", 0.01)
    activation: str = key("activation of the branches: tanh (as released) | relu", "tanh")
    prototypes: bool = key("attend over learned class prototypes", True)
    context_dropout: float = key("dropout of what the prototypes add to a feature", 0.5)

    def check(self) -> None:
        """Raise VhablError where a value cannot be used."""
        if self.activation not in ACTIVATIONS:
            fail("key model.net.activation", repr(self.activation), " or ".join(ACTIVATIONS))
        for name in ("dropout", "context_dropout"):
            if not 0 <= getattr(self, name) < 1:
                fail(f"key model.net.{name}", str(getattr(self, name)), "0 up to below 1")
        for name in ("members", "dim", "image_hidden", "text_hidden"):
            if getattr(self, name) < 1:
                fail(f"key model.net.{name}", str(getattr(self, name)), "at least 1")
        if self.joint_hidden < 0:
            fail("key model.net.joint_hidden", str(self.joint_hidden), "a width, or 0")
        if self.heads < 1 or self.dim % self.heads:
            fail("key model.net.heads", str(self.heads), f"a divisor of model.net.dim {self.dim}")


class FusedMember(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1].

    Modality MLPs [d -> d -> hidden -> D], attention over class prototypes, and (ours) a branch
    [d_image + d_text -> joint -> D] in which the modalities meet early; then concat -> D -> D
    (BatchNorm, ReLU, Dropout: ours), Linear(D -> K), BatchNorm, Tanh, Linear(K -> D), ReLU,
    Linear(D -> K), Tanh.
    """

    def __init__(self, spec: DataSpec, bits: int, settings: FusedNetSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.settings = settings

        def branch(width_in: int, width: int) -> FeatureMLP:
            widths = (width_in, width_in, width, dim)
            return FeatureMLP(widths, settings.dropout, settings.activation)

        self.image = branch(spec.image_dim, settings.image_hidden)
        self.text = branch(spec.text_dim, settings.text_hidden)
        self.attention = nn.ModuleList(
            PrototypeAttention(dim, spec.classes, settings.heads, settings.context_dropout)
            for _ in range(2 if settings.prototypes else 0)
        )
        parts = 2
        if settings.joint_hidden:
            widths = (spec.image_dim + spec.text_dim, settings.joint_hidden, dim)
            self.joint = FeatureMLP(widths, settings.dropout, settings.activation)
            parts = 3
        self.fusion = nn.Sequential(
            nn.Linear(parts * dim, dim),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            Dropout(settings.dropout),
            nn.Linear(dim, dim),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            Dropout(settings.dropout),
            nn.Linear(dim, bits),
            nn.BatchNorm1d(bits),
            nn.Tanh(),
            nn.Linear(bits, dim),
            nn.ReLU(),
        )
        self.hash = nn.Linear(dim, bits)

    def forward(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Relaxed codes [B, K], and each modality's log attention to the classes, [B, C]."""
        image, text = inputs.image, inputs.text
        if image is None or text is None:
            fail("inputs", "an item without image or text", "both: this network fuses them")
        features = [self.image(image), self.text(text)]  # (B, D) each
        attentions: list[Tensor] = []
        for view, attend in enumerate(self.attention):
            features[view], attention = attend(features[view])
            attentions.append(attention)
        if self.settings.joint_hidden:
            together = torch.cat([self.settings.joint_image * image, text], dim=1)
            features.append(self.joint(together))
        fused = self.fusion(torch.cat(features, dim=1))
        return torch.tanh(self.hash(fused)), attentions


class FusedHashNet(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1]: the network of VH-ABL and HIAMH.

    Its members are networks of their own that take the bits in turn, bit i going to member
    i mod M. A method takes its losses on each member's bits alone, so the members' errors differ
    and a Hamming distance averages over them, where more bits of one network repeat its errors
    (Lakshminarayanan et al., NeurIPS 2017; for parts of an embedding: Opitz et al., ICCV 2017).
    """

    order: Tensor  # [K] the place of each bit of a code among the members' outputs in a row

    def __init__(self, spec: DataSpec, bits: int, settings: FusedNetSettings) -> None:
        super().__init__()
        count = min(settings.members, bits)
        self.shares = [len(range(first, bits, count)) for first in range(count)]
        self.members = nn.ModuleList(FusedMember(spec, share, settings) for share in self.shares)
        turns = torch.cat([torch.arange(first, bits, count) for first in range(count)])
        self.register_buffer("order", turns.argsort())

    def forward(self, inputs: Inputs) -> tuple[Tensor, list[list[Tensor]]]:
        """Relaxed codes [B, K], and each member's log attention to the classes, [B, C] a view."""
        results = [member(inputs) for member in self.members]
        h = torch.cat([h for h, _ in results], dim=1)
        return h[:, self.order], [attentions for _, attentions in results]

    def member_bits(self) -> list[Tensor]:
        """The bits of a code that each member gives, first to last."""
        ends = [0, *accumulate(self.shares)]
        return [
            ((first <= self.order) & (self.order < end)).nonzero().flatten()
            for first, end in pairwise(ends)
        ]

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Permute the bits: bit i becomes what bit order[i] was."""
        self.order.copy_(self.order[order])
