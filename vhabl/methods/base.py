"""The contract of a method. `vhabl/methods/vh_abl.py` is the example to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vhabl.codes import binarise
from vhabl.encoders import FeatureScaling
from vhabl.errors import fail
from vhabl.losses import TARGETS, doubling_lengths
from vhabl.types import Batch, DataSpec, Inputs


class HashingMethod(nn.Module, ABC):
    """A model that turns image-text pairs into codes.

    All that a method learns or measures lives in parameters and buffers, so a checkpoint alone
    reproduces an evaluation. Neither `embed` nor `encode` has a label parameter.
    """

    title: ClassVar[str]  # as tables and code files write it
    task: ClassVar[Literal["fused", "cross"]]
    any_length: ClassVar[bool] = True  # up to K by a prefix, or only the lengths of training
    Settings: ClassVar[type]  # frozen dataclass of the method's own keys, `model.*`

    def __init__(self, spec: DataSpec, bits: list[int], settings: Any) -> None:
        """spec: widths and counts of the data; bits: the lengths asked for, the longest is K."""
        super().__init__()
        self.spec = spec
        self.lengths = sorted(set(bits))
        self.bits = self.lengths[-1]
        self.settings = settings

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        """Raise VhablError where a setting's value cannot be used. The default accepts all."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms by name; the trainer sums and logs them."""

    #: every method scales or encodes its raw inputs by this, fitted on the training items
    scaling: FeatureScaling

    @abstractmethod
    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Real-valued embeddings [B, d] of each view: `fused`, or `image` and `text`. Where the
        method serves any length they are its relaxed codes, [B, K].
        """

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Relaxed codes of several lengths: {bits: {view: [B, bits]}}.

        The default serves prefixes of one relaxed code.
        """
        full = self.embed(inputs)
        return {bits: {view: h[:, :bits] for view, h in full.items()} for bits in lengths}

    def encode(self, inputs: Inputs, bits: int) -> dict[str, Tensor]:
        """+-1 codes [B, bits] of each view. Raises VhablError for a length that is not served."""
        return self.encode_lengths(inputs, [bits])[bits]

    def encode_lengths(
        self, inputs: Inputs, lengths: Sequence[int]
    ) -> dict[int, dict[str, Tensor]]:
        """+-1 codes of several lengths at once: {bits: {view: [B, bits]}}."""
        for bits in lengths:
            self.check_length(bits)
        return {
            bits: {view: binarise(h) for view, h in views.items()}
            for bits, views in self.relax_lengths(inputs, lengths).items()
        }

    def check_length(self, bits: int) -> None:
        """Raise VhablError where the model cannot serve this code length."""
        if self.any_length and not 1 <= bits <= self.bits:
            fail("key bits", str(bits), f"a code length from 1 to {self.bits}, which the model has")
        if not self.any_length and bits not in self.lengths:
            known = ", ".join(map(str, self.lengths))
            fail("key bits", str(bits), f"a code length that the model was trained for: {known}")

    def bit_importance(self) -> Tensor | None:
        """What each bit of a code weighs, [K], where the method ranks bits. Default: nothing."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; `lr_scale` multiplies the recipe's rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called once before training with the training items in order. Default: nothing."""

    def after_epoch(self) -> None:
        """Called after every training epoch. The default does nothing."""

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Called once after training with the training items in order. Default: nothing."""


def check_nesting(target: str, shortest: int) -> None:
    """Check the two settings that every method with nested similarity terms has."""
    if target not in TARGETS:
        fail("key model.target", repr(target), " or ".join(TARGETS))
    if shortest < 1:
        fail("key model.shortest", str(shortest), "a code length of at least 1")


def member_prefixes(shortest: int, bits: int, share: int) -> list[int]:
    """Prefix lengths of a member that gives `share` of a code's `bits`: its part of each prefix.

    >>> member_prefixes(8, 128, 32)
    [2, 4, 8, 16, 32]
    """
    return doubling_lengths(max(1, shortest * share // bits), share)


def mean_terms(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Loss terms by name, the mean over the members of a network."""
    return {name: torch.stack([m[name] for m in members]).mean() for name in members[0]}
