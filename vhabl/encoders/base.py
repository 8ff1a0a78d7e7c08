"""What every encoder offers, and every encoder of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vhabl.nn.layers import ClipBlock
from vhabl.settings import EncoderConfig
from vhabl.system.distributed import ALONE, GlobalBatchNorm, Ranks
from vhabl.system.errors import bad_value
from vhabl.types import Embeddings, Inputs, Split

#: What a method uses beside pooled vectors: nothing; patches and words in the joint space; or the
#: text tower's last hidden states
Tokens = Literal["", "joint", "hidden"]


class Encoder(nn.Module):
    """Raw inputs to embeddings. A subclass sets the widths of what it gives."""

    image_dim: int
    text_dim: int
    batch = 2048  # items encoded at once; part of the protocol, so that results repeat
    tokens: Tokens = ""  # which it gives beside the pooled vectors
    cacheable = False  # whether a part of it never changes, so that its outputs can be kept
    ranks = ALONE  # that have a share of each batch

    def forward(self, inputs: Inputs) -> Embeddings:
        raise NotImplementedError

    def share_out(self, ranks: Ranks) -> None:
        """Divide the work on each batch among ranks. The default leaves all of it to each of them:
        scaling ready-made features takes less time than sending them.
        """

    def of_batch(self, inputs: Inputs) -> Embeddings:
        """Embeddings of a whole batch, of which `inputs` are this rank's share (`Ranks.part`)."""
        here = self.ranks
        if here.size == 1:
            return cast(Embeddings, self(inputs))
        with here.own_stream(next(self.buffers()).device) if self.training else nullcontext():
            share: Embeddings = self(inputs)
        counts = here.counts(len(inputs))
        parts = {name: part for name, part in vars(share).items() if part is not None}
        return replace(share, **{name: here.whole(part, counts) for name, part in parts.items()})

    def fit(self, train: Split, kind: str) -> None:
        """Measure on the training items what the encoder needs to know. Default: nothing."""

    def read(self, texts: Sequence[str]) -> Tensor:
        """The text tower's last hidden state [N, w] of the end of each text, for towers."""
        raise NotImplementedError

    def copy_text_end(self, layers: int) -> tuple[list[ClipBlock], nn.LayerNorm, nn.Linear]:
        """Copies of the text tower's last blocks, its norm and its projection, for towers."""
        raise NotImplementedError

    def frozen(self, inputs: Inputs) -> Inputs:
        """What the part that never changes gives; `forward` takes it in place of raw inputs."""
        return inputs

    def arithmetic(self) -> AbstractContextManager[object]:
        """What a network computes in, and a head that does as much for each part of a picture or
        text: bfloat16 on a GPU that has it. Default: float32.
        """
        return nullcontext()

    def param_groups(self) -> list[dict[str, Any]]:
        """Trained parameters with rates of their own. Default: none."""
        return []

    def fixed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and statistics by name that training leaves as they are. Default: none."""
        return iter(())

    def fixed_digest(self) -> str:
        """A short digest of the fixed tensors."""
        return digest_of(self.fixed_tensors())


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of tensors and their names."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PixelEncoder(Encoder):
    """An encoder that sees pictures as pixels, and may keep a first part of itself frozen."""

    mean: Tensor  # [3, 1, 1] of pixels
    spread: Tensor
    tuned: int  # how many parts at the end are trained: blocks of towers, layers of a network

    def __init__(
        self, config: EncoderConfig, size: int, channels: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        """size: side of the pictures that the network takes; channels: mean and spread of each
        colour channel on a scale of 0 to 1. Raises VhablError where pictures would be too small.
        """
        super().__init__()
        self.config, self.size = config, size
        if config.resize and config.resize < size:
            bad_value("encoder.resize", config.resize, f"0, or at least {size}")
        for name, values in zip(("mean", "spread"), channels, strict=True):
            scaled = 255 * torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, scaled, persistent=False)

    def share_out(self, ranks: Ranks) -> None:
        self.ranks = ranks
        if ranks.size > 1:
            GlobalBatchNorm.convert(self, ranks)

    def param_groups(self) -> list[dict[str, Any]]:
        """The tuned part, with the rate `encoder.lr`."""
        tuned = [p for p in self.parameters() if p.requires_grad]
        rate = {"lr": self.config.lr} if self.config.lr else {}
        return [{"params": tuned, **rate}] if tuned else []

    @property
    def mixed(self) -> bool:
        """Whether the network computes in bfloat16: on a GPU that has it."""
        auto = self.config.precision == "auto" and self.mean.device.type == "cuda"
        return auto and torch.cuda.is_bf16_supported(including_emulation=False)

    def arithmetic(self) -> AbstractContextManager[object]:
        device = self.mean.device.type
        return torch.autocast(device, torch.bfloat16) if self.mixed else nullcontext()

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(getattr(torch, self.config.cache_precision))

    def normalised(self, pixels: Tensor) -> Tensor:
        """What the network takes of pixels: (B, 3, R, R) uint8 -> (B, 3, S, S)."""
        return (self.cut(pixels) - self.mean).div_(self.spread)

    def cut(self, pixels: Tensor) -> Tensor:
        """The centre, in training with `augment` mirrored at random: (B, 3, S, S). Training is
        given pictures that are cut already.
        """
        size, room = self.size, pixels.shape[-1] - self.size
        cut = pixels[..., room // 2 : room // 2 + size, room // 2 : room // 2 + size]
        if not (self.training and self.config.augment):
            return cut
        mirrored = torch.rand(len(cut), 1, 1, 1, device=cut.device) < 0.5
        return torch.where(mirrored, cut.flip(3), cut)
