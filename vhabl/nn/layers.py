"""Building blocks that several methods share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vhabl.nn.quantisation import binarise
from vhabl.settings import key
from vhabl.system.errors import bad_value
from vhabl.types import Embeddings


class Dropout(nn.Module):
    """Dropout whose mask comes from `rand`: on CPU five times faster than the Bernoulli sampler."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * torch.rand_like(x).ge_(self.rate).div_(1 - self.rate)


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


class QuickGELU(nn.Module):
    """`x sigmoid(1.702 x)`, CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """A block of CLIP's towers: x + attention(LN x), then x + MLP(LN x), four times as wide inside,
    with QuickGELU: [B, T, D].
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Linear(4 * dim, dim))

    @classmethod
    def copy_of(cls, block: Any) -> ClipBlock:
        """A copy of a block of a tower, with its weights and its activation."""
        copied = cls(block.attn.embed_dim, block.attn.num_heads)
        for name, _ in copied.named_children():
            setattr(copied, name, copy.deepcopy(getattr(block, name)))
        return copied.requires_grad_(True)

    def forward(self, x: Tensor, absent: Tensor | None = None) -> Tensor:
        """absent [B, T]: True at tokens that nothing attends to."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, absent, need_weights=False)[0]
        mixed: Tensor = x + self.mlp(self.ln_2(x))
        return mixed


def last_tokens(x: Tensor, present: Tensor) -> Tensor:
    """The last token of each row that is present, [B, D]: x [B, T, D], present [B, T], True at the
    first of a row.
    """
    return x[torch.arange(len(x), device=x.device), present.sum(dim=1) - 1]


class PrototypeAttention(nn.Module):
    """Attention of a modality feature to learned class prototypes: [B, D] -> [B, D].

    The C prototypes are keys and values, the feature is the query, so class semantics enter without
    any label. A dense layer, BatchNorm and ReLU follow, as in the release of VH-ABL.
    """

    def __init__(self, dim: int, classes: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.prototypes = nn.Parameter(torch.randn(classes, dim))
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.dense = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU())

    def forward(self, feature: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, items, D / heads)

        q, k = split(self.query(feature)), split(self.key(self.prototypes))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # (heads, B, C)
        context = weights @ split(self.value(self.prototypes))  # (heads, B, D / heads)
        refined: Tensor = self.dense(context.transpose(0, 1).flatten(1))
        return refined


class StandIn(nn.Module):
    """A learned embedding in place of a modality that an item does not have.

    In training each item loses one modality with probability `rate`, either one as likely, so that
    the stand-ins are learned and the network knows them.
    """

    def __init__(self, image_dim: int, text_dim: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.image = nn.Parameter(torch.zeros(image_dim))
        self.text = nn.Parameter(torch.zeros(text_dim))

    def forward(self, found: Embeddings) -> Embeddings:
        image, text, mask = found.image, found.text, found.word_mask
        if image is None:
            assert text is not None
            image = self.image.expand(len(text), -1)
        elif text is None:
            text = self.text.expand(len(image), -1)
        elif self.training and self.rate:
            chance = torch.rand(len(image), 1, device=image.device)
            no_image, no_text = chance < self.rate / 2, chance > 1 - self.rate / 2
            image = torch.where(no_image, self.image, image)
            text = torch.where(no_text, self.text, text)
            mask = None if mask is None else mask & ~no_text
        return replace(found, image=image, text=text, word_mask=mask)


class LengthHeads(nn.Module):
    """Relaxed codes of several lengths from one feature [B, d]: Linear(d -> k) and tanh for each.

    The longest, auxiliary length K is the one that decoders k -> K -> K (ReLU between, tanh at the
    end) reconstruct from each of the others, so that the lengths learn from each other (CMCL).
    """

    def __init__(self, dim: int, lengths: Sequence[int], auxiliary: int) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.lengths = sorted({*lengths, auxiliary})
        self.hash = nn.ModuleDict({str(k): nn.Linear(dim, k) for k in self.lengths})
        self.decode = nn.ModuleDict(
            {
                str(k): nn.Sequential(
                    nn.Linear(k, auxiliary), nn.ReLU(), nn.Linear(auxiliary, auxiliary), nn.Tanh()
                )
                for k in self.lengths
                if k != auxiliary
            }
        )

    def forward(self, feature: Tensor, bits: int) -> Tensor:
        return torch.tanh(self.hash[str(bits)](feature))

    def rebuild(self, h: Tensor) -> Tensor:
        """The auxiliary code from one of another length: [B, k] -> [B, K]."""
        rebuilt: Tensor = self.decode[str(h.shape[1])](h)
        return rebuilt


class CodeMemory(nn.Module):
    """The latest relaxed codes of all training items for each view and length, their common signs,
    and their labels: what a batch is compared with. Only training needs it.
    """

    labels: Tensor  # [N, C]

    def __init__(
        self, views: Sequence[str], lengths: Sequence[int], items: int, classes: int
    ) -> None:
        super().__init__()
        self.views, self.lengths = tuple(views), tuple(lengths)
        self.register_buffer("labels", torch.zeros(items, classes), persistent=False)
        for k in self.lengths:
            for name in (*self.views, "signs"):
                self.register_buffer(f"{name}_{k}", torch.zeros(items, k), persistent=False)

    def codes(self, view: str, bits: int) -> Tensor:
        """[N, bits] of a view."""
        return self.get_buffer(f"{view}_{bits}")

    def signs(self, bits: int) -> Tensor:
        """+-1, [N, bits]: the signs of all views' codes together at the last `renew`."""
        return self.get_buffer(f"signs_{bits}")

    @torch.no_grad()
    def begin(self, labels: Tensor) -> None:
        """Begin with normal numbers, as the release of CMCL does, and keep the labels."""
        self.labels = labels
        for k in self.lengths:
            for view in self.views:
                setattr(self, f"{view}_{k}", torch.randn(len(labels), k).to(labels.device))
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Take the signs anew."""
        for k in self.lengths:
            total = torch.stack([self.codes(view, k) for view in self.views]).sum(dim=0)
            setattr(self, f"signs_{k}", binarise(total))

    @torch.no_grad()
    def keep(self, view: str, index: Tensor, h: Tensor) -> None:
        """Keep the codes h [B, k] of the items with these rows."""
        self.codes(view, h.shape[1])[index] = h.detach()

    def similar(self, labels: Tensor) -> Tensor:
        """Which items share a label with those of a batch [B, C]: [N, B] of 0 and 1."""
        return (self.labels @ labels.T > 0).to(labels.dtype)


class PlainNet(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1]: a layer of width D for each modality, a
    joint one, Linear(D -> K), tanh. A layer is Linear, BatchNorm, ReLU, Dropout.
    """

    def __init__(self, image_dim: int, text_dim: int, dim: int, bits: int, dropout: float) -> None:
        super().__init__()

        def layer(width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU(), Dropout(dropout)
            )

        self.image, self.text = layer(image_dim), layer(text_dim)
        self.head = nn.Sequential(layer(2 * dim), nn.Linear(dim, bits), nn.Tanh())

    def forward(self, inputs: Embeddings) -> tuple[Tensor, list[Tensor]]:
        """Relaxed codes, and each modality's features [B, D]."""
        features = [self.image(inputs.image), self.text(inputs.text)]
        return self.head(torch.cat(features, dim=1)), features


@dataclass(frozen=True)
class FusedNetSettings:
    network: str = key(
        "of a member: deep (branches, attention, fusion as the other keys say) | plain (one layer "
        "of width dim for each modality and a joint one)",
        "deep",
    )
    members: int = key("independent networks that share out the bits of a code", 1)
    dim: int = key("width D of the modality features", 256)
    image_hidden: int = key("width of the image branch's hidden layer", 2048)
    text_hidden: int = key("width of the text branch's hidden layer", 1024)
    joint_hidden: int = key("hidden width of a branch that sees both modalities; 0 has none", 0)
    joint_image: float = key("weight of the image's features where both enter that branch", 0.5)
    heads: int = key("heads of the attention to class prototypes", 4)
    dropout: float = key("dropout in the modality branches", 0.01)
    activation: str = key("activation of the branches: tanh (as released) | relu", "tanh")
    prototypes: bool = key("modalities attend to learned class prototypes (as published)", False)
    fusion_norm: bool = key("BatchNorm and dropout after the fusion's hidden layers (ours)", True)
    modality_dropout: float = key(
        "share of the items that lose image or text in training, so that codes of one modality "
        "alone are learned; 0 refuses such items",
        0.1,
    )

    def check(self) -> None:
        """Raise VhablError where a value cannot be used."""
        if self.network not in ("deep", "plain"):
            bad_value("model.net.network", repr(self.network), "deep or plain")
        if self.activation not in ACTIVATIONS:
            bad_value("model.net.activation", repr(self.activation), " or ".join(ACTIVATIONS))
        for name in ("dropout", "modality_dropout"):
            if not 0 <= getattr(self, name) < 1:
                bad_value(f"model.net.{name}", getattr(self, name), "at least 0 and below 1")
        for name in ("members", "dim", "image_hidden", "text_hidden"):
            if getattr(self, name) < 1:
                bad_value(f"model.net.{name}", getattr(self, name), "at least 1")
        if self.joint_hidden < 0:
            bad_value("model.net.joint_hidden", self.joint_hidden, "a width, or 0")
        if self.heads < 1 or self.dim % self.heads:
            bad_value("model.net.heads", self.heads, f"a divisor of model.net.dim {self.dim}")


class FusedMember(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1].

    Modality MLPs [d -> d -> hidden -> D]; as published each modality attends to class prototypes
    and a Linear(2D -> D) that both share merges feature and result; (ours) a branch [d_image +
    d_text -> joint -> D] in which the modalities meet early. Then concat -> D -> D, with ReLU after
    each (and BatchNorm and Dropout: ours), Linear(D -> K), BatchNorm, Tanh, Linear(K -> D), ReLU,
    Linear(D -> K), Tanh.
    """

    def __init__(
        self, image_dim: int, text_dim: int, classes: int, bits: int, settings: FusedNetSettings
    ) -> None:
        super().__init__()
        dim = settings.dim
        self.settings = settings

        def branch(width_in: int, width: int) -> FeatureMLP:
            widths = (width_in, width_in, width, dim)
            return FeatureMLP(widths, settings.dropout, settings.activation)

        self.image = branch(image_dim, settings.image_hidden)
        self.text = branch(text_dim, settings.text_hidden)
        if settings.prototypes:
            self.attention = nn.ModuleList(
                PrototypeAttention(dim, classes, settings.heads) for _ in range(2)
            )
            self.merge = nn.Linear(2 * dim, dim)
        parts = 2
        if settings.joint_hidden:
            widths = (image_dim + text_dim, settings.joint_hidden, dim)
            self.joint = FeatureMLP(widths, settings.dropout, settings.activation)
            parts = 3

        def hidden(width: int) -> list[nn.Module]:
            layer = nn.Linear(width, dim)
            if not settings.fusion_norm:
                return [layer, nn.ReLU()]
            return [layer, nn.BatchNorm1d(dim), nn.ReLU(), Dropout(settings.dropout)]

        self.fusion = nn.Sequential(
            *hidden(parts * dim), *hidden(dim),
            nn.Linear(dim, bits), nn.BatchNorm1d(bits), nn.Tanh(),
            nn.Linear(bits, dim), nn.ReLU(),
        )  # fmt: skip
        self.hash = nn.Linear(dim, bits)

    def forward(self, inputs: Embeddings) -> tuple[Tensor, list[Tensor]]:
        """Relaxed codes, and each modality's features [B, D]."""
        image, text = inputs.image, inputs.text
        assert image is not None and text is not None
        features = [self.image(image), self.text(text)]
        if self.settings.prototypes:
            features = [
                self.merge(torch.cat([x, attend(x)], dim=1))
                for x, attend in zip(features, self.attention, strict=True)
            ]
        parts = list(features)
        if self.settings.joint_hidden:
            together = torch.cat([self.settings.joint_image * image, text], dim=1)
            parts.append(self.joint(together))
        return torch.tanh(self.hash(self.fusion(torch.cat(parts, dim=1)))), features


class FusedHashNet(nn.Module):
    """Image and text to relaxed codes [B, K] in [-1, 1]: the network of VH-ABL and HIAMH.

    Its members are networks of their own that take the bits in turn, bit i going to member
    i mod M. A method takes its losses on each member's bits alone, so the members' errors differ
    and a Hamming distance averages over them, where more bits of one network repeat its errors
    (Lakshminarayanan et al., NeurIPS 2017; for parts of an embedding: Opitz et al., ICCV 2017).
    """

    order: Tensor  # [K] the place of each bit of a code among the members' outputs in a row

    def __init__(
        self, image_dim: int, text_dim: int, classes: int, bits: int, settings: FusedNetSettings
    ) -> None:
        super().__init__()
        count = min(settings.members, bits)
        self.shares = [len(range(first, bits, count)) for first in range(count)]
        self.members = nn.ModuleList(
            PlainNet(image_dim, text_dim, settings.dim, share, settings.dropout)
            if settings.network == "plain"
            else FusedMember(image_dim, text_dim, classes, share, settings)
            for share in self.shares
        )
        turns = torch.cat([torch.arange(first, bits, count) for first in range(count)])
        self.register_buffer("order", turns.argsort())

    def forward(self, inputs: Embeddings) -> tuple[Tensor, list[list[Tensor]]]:
        """Relaxed codes [B, K], and of each member each modality's features, [B, D]."""
        results = [member(inputs) for member in self.members]
        h = torch.cat([h for h, _ in results], dim=1)
        return h[:, self.order], [features for _, features in results]

    def member_bits(self) -> list[Tensor]:
        """The bits of a code that each member gives, first to last."""
        # A sort, where a mask for each member would let the host wait for a GPU.
        member = torch.stack([self.order >= end for end in accumulate(self.shares)]).sum(dim=0)
        return list(member.argsort(stable=True).split(self.shares))

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Permute the bits: bit i becomes what bit order[i] was."""
        self.order.copy_(self.order[order])
