"""The contract of a method. `vhabl/methods/vh_abl.py` is the example to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vhabl.encoders import Encoder, Tokens
from vhabl.nn.layers import FusedHashNet, StandIn
from vhabl.nn.losses import TARGETS, class_shares, doubling_lengths
from vhabl.nn.quantisation import binarise
from vhabl.system.errors import bad_value, fail
from vhabl.types import Batch, DataSpec, Embeddings, Inputs


class HashingMethod(nn.Module, ABC):
    """A model that turns image-text pairs into codes.

    All that a method learns or measures lives in parameters and buffers, so a checkpoint alone
    reproduces an evaluation. Neither `embed` nor `encode` has a label parameter.
    """

    title: ClassVar[str]  # as tables and code files write it
    task: ClassVar[Literal["fused", "cross"]]
    any_length: ClassVar[bool] = True  # up to K by a prefix, or only the lengths of training
    pairs: ClassVar[bool] = True  # image i and text i of a training batch must be one item
    tokens: ClassVar[Tokens] = ""  # parts of pictures and texts that it uses, where there are any
    Settings: ClassVar[type]  # frozen dataclass of the method's own keys, `model.*`

    #: codes are made with true labels, by `encode_oracle` and `relax_oracle`: methods/pghmh.py
    oracle_labels = False
    encode_oracle: Any
    relax_oracle: Any

    def __init__(self, spec: DataSpec, bits: list[int], settings: Any, encoder: Encoder) -> None:
        """spec: the data; bits: the lengths asked for, the longest is K; encoder: the first part,
        which makes embeddings of raw inputs.
        """
        super().__init__()
        self.encoder = encoder
        self.spec = spec
        self.lengths = sorted(set(bits))
        self.bits = self.lengths[-1]
        self.settings = settings
        #: what takes the place of a missing modality, in fused methods that serve one alone
        self.stand_in: StandIn | None = None

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        """Raise VhablError where a setting's value cannot be used. The default accepts all."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms by name; the trainer sums and logs them."""

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Relaxed codes [B, K] of the longest length, of each view: `fused`, or `image` and `text`.

        A method implements this, where shorter codes are prefixes of it, or `relax_lengths`.
        """
        return self.relax_lengths(inputs, [self.bits])[self.bits]

    def embeddings(self, inputs: Inputs) -> Embeddings:
        """What the encoder makes of the inputs, a stand-in for a modality that is missing.

        Raises VhablError where the method needs both and one is missing.
        """
        found = self.encoder.of_batch(inputs)
        if self.stand_in is not None:
            return self.stand_in(found)
        if self.task == "fused" and (found.image is None or found.text is None):
            do = "Give both: the model was trained with no modality missing (modality_dropout)"
            fail("inputs", "items without an image or without a text", do)
        return found

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

    def check_length(self, bits: int) -> int:
        """The code length as a plain int. Raises VhablError where the model cannot serve it."""
        if not isinstance(bits, Integral):
            bad_value("bits", repr(bits), "a whole number")
        if self.any_length and not 1 <= bits <= self.bits:
            bad_value("bits", bits, f"a code length from 1 to {self.bits}, which the model has")
        if not self.any_length and bits not in self.lengths:
            known = ", ".join(map(str, self.lengths))
            bad_value("bits", bits, f"a code length that the model was trained for: {known}")
        return int(bits)

    def bit_importance(self) -> Tensor | None:
        """What each bit of a code weighs, [K], where the method ranks bits. Default: nothing."""
        return None

    def codebook(self, bits: int) -> Tensor | None:
        """Dictionaries of centres whose sums stand for the relaxed codes of a length, [M, J, bits]
        (`vhabl.nn.quantisation`), where a method has them. Default: none.
        """
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; `lr` is a group's own rate."""
        groups = self.encoder.param_groups()
        apart = {id(p) for group in groups for p in group["params"]}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        return [{"params": own}, *groups]

    def prepare(self, labels: Tensor) -> None:
        """Called once before training with the training items' labels [N, C]. Default: nothing."""

    def after_epoch(self) -> None:
        """Called after every training epoch. The default does nothing."""

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Called once after training with the training items in order. Default: nothing."""


def stand_in(encoder: Encoder, rate: float) -> StandIn | None:
    """Stand-ins for the embeddings of an encoder, where training drops modalities at this rate."""
    return StandIn(encoder.image_dim, encoder.text_dim, rate) if rate else None


def check_nesting(target: str, shortest: int) -> None:
    """Check the two settings that every method with nested similarity terms has."""
    if target not in TARGETS:
        bad_value("model.target", repr(target), " or ".join(TARGETS))
    if shortest < 1:
        bad_value("model.shortest", shortest, "at least 1")


def check_centres(centres: str) -> None:
    """Check the setting of the methods that have class centres."""
    if centres not in ("raw", "tanh"):
        bad_value("model.centres", repr(centres), "raw or tanh")


def class_centres(classes: int, bits: int, kind: str) -> nn.Parameter:
    """First class centres [C, K]: from N(0, 1), or from N(0, 1/K) where tanh bounds them."""
    return nn.Parameter(torch.randn(classes, bits) / (bits**0.5 if kind == "tanh" else 1))


def modality_heads(net: FusedHashNet, dim: int, classes: int) -> nn.ModuleList:
    """Class predictors for the features [B, dim] of each modality of each member of a network."""
    return nn.ModuleList(nn.Linear(dim, classes) for _ in range(2 * len(net.members)))


def modality_classes(
    heads: Iterable[nn.Module], features: Sequence[Sequence[Tensor]], y: Tensor
) -> Tensor:
    """Cross-entropy of the classes that each modality alone predicts: the sum over modalities, the
    mean over members.
    """
    logits = [head(x) for head, x in zip(heads, chain(*features), strict=True)]
    return torch.stack([class_shares(x, y) for x in logits]).sum() / len(features)


def member_prefixes(shortest: int, bits: int, share: int) -> list[int]:
    """Prefix lengths of a member that gives `share` of a code's `bits`: its part of each prefix.

    >>> member_prefixes(8, 128, 32)
    [2, 4, 8, 16, 32]
    """
    return doubling_lengths(max(1, shortest * share // bits), share)


def weighted(weights: Any, terms: dict[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Each term times the weight of its name; a term without weight is not computed."""
    return {
        name: weight * term() for name, term in terms.items() if (weight := getattr(weights, name))
    }


def mean_terms(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Loss terms by name, the mean over the members of a network."""
    return {name: torch.stack([m[name] for m in members]).mean() for name in members[0]}
