"""Losses as pure functions of tensors, one per formula.

Symbols: B batch, K bits, C classes; h [B, K] relaxed codes in [-1, 1]; y [B, C] labels in {0, 1};
centres [C, K]. Every loss is a matrix expression and returns a scalar tensor; on a batch where
nothing is defined (no positive pair, no label) it returns 0 with a zero gradient, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_target(y: Tensor) -> Tensor:
    """Similarity of two items from their labels, `2 sigmoid(y_i . y_j) - 1`: [B, C] -> [B, B].

    0 without a shared class, 0.46 with one, then rising towards 1 (the target of the VH-ABL
    and HIAMH releases).
    """
    return 2 * torch.sigmoid(y @ y.T) - 1


def cosine_target(y: Tensor) -> Tensor:
    """Similarity of two items from their labels, `2 cos(y_i, y_j) - 1`: [B, C] -> [B, B].

    -1 without a shared class, +1 for equal label sets: the whole range of a cosine of codes.
    """
    y = F.normalize(y, dim=1)
    return 2 * (y @ y.T) - 1


TARGETS = {"sigmoid": sigmoid_target, "cosine": cosine_target}


def similarity(h: Tensor, target: Tensor) -> Tensor:
    """`MSE(cos(h_i, h_j), target_ij)` over all pairs of the batch."""
    h = F.normalize(h, dim=1)
    return F.mse_loss(h @ h.T, target)


def weighted_similarity(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """`MSE(s_ij, target_ij)` with `s_ij = sum_k (w_ik + w_jk)/2 h_ik h_jk / K`.

    w: [B, K] bit weights of each item with mean 1 over bits, or [K] for all items. A bit that
    carries the neighbourhood earns weight, one that does not loses it (METHODS.md, 1).
    """
    bits = h.shape[1]
    products = (w * h) @ h.T  # (B, B): sum_k w_ik h_ik h_jk
    return F.mse_loss((products + products.T) / (2 * bits), target)


def nested_similarity(h: Tensor, target: Tensor, lengths: Sequence[int]) -> Tensor:
    """`similarity` of each leading part of the code, averaged over the lengths: early bits have
    to be good alone (Kusupati et al., Matryoshka representation learning, NeurIPS 2022).
    """
    return torch.stack([similarity(h[:, :m], target) for m in lengths]).mean()


def nested_classification(
    h: Tensor, weight: Tensor, bias: Tensor, y: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Class prediction from each leading part of the code, averaged over the lengths.

    One linear classifier (weight [C, K], bias [C]) serves all lengths m by its first m columns,
    scaled by sqrt(K / m), and `class_shares` is taken of its logits.
    """
    bits = h.shape[1]
    return torch.stack(
        [class_shares(h[:, :m] @ weight[:, :m].T * (bits / m) ** 0.5 + bias, y) for m in lengths]
    ).mean()


def class_shares(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits [B, C] against the label set as a distribution, the mean over items;
    an item without a label adds nothing.
    """
    return F.cross_entropy(logits, y / y.sum(dim=1, keepdim=True).clamp(min=1))


def doubling_lengths(shortest: int, bits: int) -> list[int]:
    """shortest, 2 shortest, 4 shortest ... below `bits`, then `bits`.

    >>> doubling_lengths(8, 100)
    [8, 16, 32, 64, 100]
    """
    lengths = []
    while shortest < bits:
        lengths.append(shortest)
        shortest *= 2
    return [*lengths, bits]


_ANCHORS = 256  # rows of the similarity matrix at a time: they stay in a CPU's cache
_FAR = 1e4  # beyond every cosine and margin


def multi_similarity(
    h: Tensor,
    y: Tensor,
    threshold: float = 0.5,
    margin: float = 0.1,
    scale_positive: float = 2.0,
    scale_negative: float = 40.0,
) -> Tensor:
    """Multi-similarity loss with pair mining (Wang et al., CVPR 2019) on cosine similarities.

    Positives share a label and have s < 1 - 1e-5. Negatives are kept where s + margin exceeds the
    smallest positive, then positives where s - margin is below the largest kept negative. With P
    and N the kept pairs of an anchor,

        log(1 + sum_P e^{-a (s - t)}) / a + log(1 + sum_N e^{b (s - t)}) / b

    summed over the anchors that have both, divided by B.
    """
    h = F.normalize(h, dim=1)
    total = h.new_zeros(())
    for anchors, own in zip(h.split(_ANCHORS), y.split(_ANCHORS), strict=True):
        s = anchors @ h.T  # (anchors, B)
        # Masks are 0 and 1 in floating point, and _FAR takes an entry out of a minimum: arithmetic
        # is several times faster than masked_fill and any on a CPU.
        fixed = s.detach()  # mining only selects: it has no gradient
        shared = (own @ y.T).clamp(max=1)
        positive = shared * (fixed < 1 - 1e-5)
        hardest_positive = (fixed + _FAR * (1 - positive)).amin(dim=1, keepdim=True)
        negative = (1 - shared) * (fixed + margin > hardest_positive)
        hardest_negative = (fixed - _FAR * (1 - negative)).amax(dim=1, keepdim=True)
        positive = positive * (fixed - margin < hardest_negative)

        # Cosines are at most 1, so that no exponent comes near either end of float32.
        pull = (torch.exp(-scale_positive * (s - threshold)) * positive).sum(dim=1)
        push = (torch.exp(scale_negative * (s - threshold)) * negative).sum(dim=1)
        # Mining leaves an anchor both kinds of pairs or none, which adds 0.
        terms = torch.log1p(pull) / scale_positive + torch.log1p(push) / scale_negative
        total = total + terms.sum()
    return total / len(h)


def classification(logits: Tensor, y: Tensor) -> Tensor:
    """`MSE(sigmoid(logits), y)`: logits and y [B, C]."""
    return F.mse_loss(torch.sigmoid(logits), y)


def centre_contrast(h: Tensor, centres: Tensor, y: Tensor) -> Tensor:
    """Code-to-centre contrast, averaged over an item's own classes and over the labelled items.

    For own class c: `-log(e^{h.c/K} / (e^{h.c/K} + sum over the classes the item does not have))`.
    """
    logits = h @ centres.T / h.shape[1]  # (B, C)
    void = torch.finfo(logits.dtype).min / 2
    others = torch.logsumexp(logits.masked_fill(y > 0, void), dim=1, keepdim=True)  # (B, 1)
    per_class = F.softplus(others - logits)  # -log(e^a / (e^a + e^b)) = softplus(b - a)
    own = y.sum(dim=1)
    per_item = (per_class * y).sum(dim=1) / own.clamp(min=1)
    return per_item.sum() / (own > 0).sum().clamp(min=1)


def centre_bce(h: Tensor, centres: Tensor, y: Tensor) -> Tensor:
    """`BCE(h . c, y)` over items and classes, from logits."""
    return F.binary_cross_entropy_with_logits(h @ centres.T, y)


def centre_separation(centres: Tensor) -> Tensor:
    """Minus (mean + smallest distance of two class centres) / K: minimising it separates them.

    The release adds the distances with a plus sign, which pulls the centres together.
    """
    classes, bits = centres.shape
    if classes < 2:
        return centres.sum() * 0
    distances = F.pdist(centres)  # (C (C - 1) / 2,)
    return -(distances.mean() + distances.min()) / bits


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """`sum_k (x_ik - y_ik)^2`, averaged over the items i: [B, K] each."""
    return (x - y).square().sum(dim=1).mean()


def decorrelation(h: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of `h^T h / B`, plus the mean squared mean of a bit.

    0 for balanced bits that are uncorrelated in the batch.
    """
    batch, bits = h.shape
    correlation = h.T @ h / batch  # (K, K)
    off_diagonal = correlation.pow(2).sum() - correlation.diagonal().pow(2).sum()
    balance = h.mean(dim=0).pow(2).mean()
    return off_diagonal / max(1, bits * (bits - 1)) + balance


def likelihood(memory: Tensor, h: Tensor, similar: Tensor) -> Tensor:
    """Negative log-likelihood of similarity, averaged over all pairs (Jiang & Li, CVPR 2017).

    memory [N, K]: codes of all training items; h [B, K]; similar [N, B] of 0 and 1. With
    s = clamp(a . h, -64, 64) / 2 the mean of `log(1 + e^s) - S s`; softplus keeps it finite. No
    gradient reaches the memory.
    """
    loss: Tensor = _Likelihood.apply(memory, h, similar)
    return loss


class _Likelihood(torch.autograd.Function):
    """`likelihood` and its gradient by h in one pass over blocks of the memory, so that nothing of
    size N x B is kept for the backward pass.
    """

    PAIRS: ClassVar = {"cpu": 2**18, "cuda": 2**24}  # in a block: a cache holds the former

    @staticmethod
    def forward(ctx: Any, memory: Tensor, h: Tensor, similar: Tensor) -> Tensor:
        half = h / 2
        total, gradient = h.new_zeros(()), torch.zeros_like(h)
        block = max(1, _Likelihood.PAIRS.get(h.device.type, 2**18) // len(h))
        for a, own in zip(memory.split(block), similar.split(block), strict=True):
            products = a @ half.T  # (block, B)
            s = products.clamp(-32, 32)
            total += F.softplus(s).sum() - (own * s).sum()
            slope = s.sigmoid().sub_(own).mul_(products == s)
            gradient = torch.addmm(gradient, slope.T, a)
        pairs = len(memory) * len(h)
        ctx.save_for_backward(gradient / (2 * pairs))
        return total / pairs

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, outer[0] * gradient, None


def info_nce(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of paired rows [B, d] on cosines (van den Oord et al. 2018; as in CLIP the
    mean of both directions): the row of the same number is a row's partner, the others are not.

    Of [M, B, d] the mean over M such sets of rows, each compared within itself.
    """
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT / temperature  # (..., B, B)
    count = logits.shape[-1]
    own = torch.arange(count, device=x.device).repeat(logits.numel() // count**2)
    there = F.cross_entropy(logits.reshape(-1, count), own)
    back = F.cross_entropy(logits.mT.reshape(-1, count), own)
    return (there + back) / 2
