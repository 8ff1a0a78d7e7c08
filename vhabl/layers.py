"""Building blocks that several methods share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

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


class FeatureMLP(nn.Sequential):
    """Linear, Tanh, BatchNorm, Dropout for each pair of neighbouring widths: [B, w0] -> [B, wn]."""

    def __init__(self, widths: tuple[int, ...], dropout: float) -> None:
        blocks: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            blocks += [
                nn.Linear(width_in, width_out),
                nn.Tanh(),
                nn.BatchNorm1d(width_out),
                Dropout(dropout),
            ]
        super().__init__(*blocks)


class PrototypeAttention(nn.Module):
    """Refine a modality feature by attention over learned class prototypes: [B, D] -> [B, D].

    The C prototypes are keys and values, the feature is the query, so class semantics enter without
    any label. Residual by concatenation, then Linear(2D -> D), as in VH-ABL.
    """

    def __init__(self, dim: int, classes: int, heads: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, dim) / dim**0.5)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.merge = nn.Linear(2 * dim, dim)

    def forward(self, feature: Tensor) -> Tensor:
        prototypes = self.prototypes[None]  # (1, C, D)
        # The items form one long query sequence, so that the prototypes are projected only once.
        context, _ = self.attention(feature[None], prototypes, prototypes, need_weights=False)
        return self.merge(torch.cat([feature, context[0]], dim=1))


class FusedHashNet(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1]: the network of VH-ABL and HIAMH.

    Modality MLPs [d -> d -> hidden -> D], attention over class prototypes, then concat(2D) -> D ->
    D (ReLU), Linear(D -> K), BatchNorm, Tanh, Linear(K -> D), ReLU, Linear(D -> K), Tanh.
    """

    def __init__(
        self,
        spec: DataSpec,
        bits: int,
        dim: int,
        hidden: tuple[int, int],
        heads: int,
        dropout: float,
        prototypes: bool,
    ) -> None:
        super().__init__()

        def branch(width_in: int, width: int) -> nn.Sequential:
            parts: list[nn.Module] = [FeatureMLP((width_in, width_in, width, dim), dropout)]
            if prototypes:
                parts.append(PrototypeAttention(dim, spec.classes, heads))
            return nn.Sequential(*parts)

        self.image = branch(spec.image_dim, hidden[0])
        self.text = branch(spec.text_dim, hidden[1])
        self.fusion = nn.Sequential(
            nn.Linear(2 * dim, dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, bits),
            nn.BatchNorm1d(bits),
            nn.Tanh(),
            nn.Linear(bits, dim),
            nn.ReLU(),
        )
        self.hash = nn.Linear(dim, bits)

    def forward(self, inputs: Inputs) -> Tensor:
        image, text = self.image(inputs.image), self.text(inputs.text)  # (B, D) each
        return torch.tanh(self.hash(self.fusion(torch.cat([image, text], dim=1))))  # (B, K)

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Permute the bits: bit i becomes what bit order[i] was."""
        self.hash.weight.copy_(self.hash.weight[order])
        self.hash.bias.copy_(self.hash.bias[order])
