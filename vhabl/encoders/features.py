"""Ready-made features, scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vhabl.encoders.base import Encoder
from vhabl.system.errors import note, plural
from vhabl.types import DataSpec, Embeddings, Inputs, Split


class FeatureScaling(Encoder):
    """Scale ready-made features by what the training items show: `(x - mean) / spread`.

    `standard` has a spread for each dimension; `global` has one for the whole modality, so that
    features ordered by variance (PCA, learned projections) keep that order; `none` leaves the
    features as they are. Mean and spread are buffers: a checkpoint holds them.

    views: those that are features; another one passes as it is. image_noise: Gaussian noise that
    image features get in training, in their standard deviations over the batch, against steep
    functions (Bishop, Neural Computation 1995).
    """

    def __init__(
        self,
        spec: DataSpec,
        views: Sequence[str] = ("image", "text"),
        image_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_noise = image_noise
        self.image_dim, self.text_dim = spec.image_dim, spec.text_dim
        self.views = views
        for view in views:
            dim = getattr(spec, f"{view}_dim")
            self.register_buffer(f"{view}_mean", torch.zeros(dim))
            self.register_buffer(f"{view}_spread", torch.ones(dim))

    @torch.no_grad()
    def fit(self, train: Split, kind: str) -> None:
        """Measure mean and spread on training items only, in float64. A note says how many features
        are constant there: they carry nothing and become 0 (not those of `global`).
        """
        if kind == "none":
            return
        for view in self.views:
            x = torch.from_numpy(getattr(train, view)[:])
            mean = x.mean(dim=0, dtype=torch.float64)
            centred = x - mean
            spread = centred.square_().mean(dim=0).sqrt()
            constant = spread <= 1e-7 * mean.abs()  # less than float32 holds beside the mean
            if constant.any():
                count = f"{int(constant.sum()):,} of {plural(len(constant), f'{view} feature')}"
                note(f"{count} are constant on the training items")
            if kind == "global" and not constant.all():
                spread = spread.square().mean().sqrt().expand_as(spread)
            else:
                spread = torch.where(constant, 0, spread)
            self.get_buffer(f"{view}_mean").copy_(mean)
            self.get_buffer(f"{view}_spread").copy_(spread)

    def forward(self, inputs: Inputs) -> Embeddings:
        image, text = self._scaled("image", inputs.image), self._scaled("text", inputs.text)
        if self.training and self.image_noise and image is not None:
            deviation = image.std(dim=0, correction=0)
            image = image + self.image_noise * deviation * torch.randn_like(image)
        return Embeddings(image, text)

    def _scaled(self, view: str, x: Tensor | None) -> Tensor | None:
        if x is None or view not in self.views:
            return x
        mean, spread = self.get_buffer(f"{view}_mean"), self.get_buffer(f"{view}_spread")
        return torch.where(spread > 0, (x - mean) / spread, 0)  # 0: constant in training
