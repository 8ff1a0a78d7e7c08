"""Encoders: what turns an item's raw inputs into embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vhabl.types import DataSpec, Inputs


class FeatureScaling(nn.Module):
    """Scale ready-made features by what the training items show: `(x - mean) / spread`.

    `standard` has a spread for each dimension; `global` has one for the whole modality, so that
    features ordered by variance (PCA, learned projections) keep that order; `none` leaves the
    features as they are. Mean and spread are buffers: a checkpoint holds them.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        for view, dim in (("image", spec.image_dim), ("text", spec.text_dim)):
            self.register_buffer(f"{view}_mean", torch.zeros(dim))
            self.register_buffer(f"{view}_spread", torch.ones(dim))

    @torch.no_grad()
    def fit(self, inputs: Inputs, kind: str) -> None:
        """Measure mean and spread on training items only."""
        for view in ("image", "text"):
            x: Tensor | None = getattr(inputs, view)
            if x is None or kind == "none":
                continue
            variance, mean = torch.var_mean(x, dim=0, correction=0)
            if kind == "global":
                variance = variance.mean().expand_as(variance)
            spread = variance.sqrt()
            # A feature that never changes carries nothing: it becomes 0 and not infinite.
            self.get_buffer(f"{view}_mean").copy_(mean)
            self.get_buffer(f"{view}_spread").copy_(torch.where(spread > 1e-8, spread, 1.0))

    def forward(self, inputs: Inputs) -> Inputs:
        image, text = inputs.image, inputs.text
        if image is not None:
            image = (image - self.get_buffer("image_mean")) / self.get_buffer("image_spread")
        if text is not None:
            text = (text - self.get_buffer("text_mean")) / self.get_buffer("text_spread")
        return Inputs(image, text)
