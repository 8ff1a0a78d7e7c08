"""Both towers of a CLIP."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl.encoders import open_clip
from vhabl.encoders.base import PixelEncoder, Tokens
from vhabl.nn.layers import ClipBlock, last_tokens
from vhabl.settings import EncoderConfig
from vhabl.system.errors import bad_value
from vhabl.types import Embeddings, Inputs


class ClipEncoder(PixelEncoder):
    """Both towers of a CLIP: pixels and token ids to vectors of one joint space.

    A tower is a start (patches or a stem; token embeddings), blocks, and an end (norm, pooling,
    projection). `tune` says how much of it is trained: nothing, the last N blocks (with `tune_ends`
    the end too), or all. What comes before is frozen: it is in evaluation mode always, and it runs
    without gradients, so that its outputs can be kept (`frozen`). Patches and words are projected
    as the pooled vectors are.

    A method without use for tokens gets the pooled vectors standardised by running statistics, as
    features are: CLIP's vectors lie in a narrow cone.
    """

    batch = 256

    def __init__(self, config: EncoderConfig, tokens: Tokens, pretrained: bool = True) -> None:
        super().__init__(
            config,
            open_clip.picture_size(config.model),
            open_clip.normalisation(config.model, config.weights),
        )
        self.tokens = tokens
        self.clip = open_clip.build_towers(config.model, config.weights, pretrained)
        longest = len(self.clip.positional_embedding)
        if not 3 <= config.words <= longest:
            bad_value("encoder.words", config.words, f"from 3 to {longest}")
        self.image_dim = self.text_dim = int(self.clip.text_projection.shape[-1])
        if not tokens:
            self.norms = nn.ModuleDict(
                {view: nn.BatchNorm1d(self.image_dim, affine=False) for view in ("image", "text")}
            )

        visual = self.clip.visual
        resnet = [getattr(visual, f"layer{n}") for n in range(1, 5)] if _is_resnet(visual) else None
        blocks = {
            "image": list(resnet or visual.transformer.resblocks),
            "text": list(self.clip.transformer.resblocks),
        }
        everything = config.tune == "all"
        deepest = max(map(len, blocks.values()))
        self.tuned = deepest if everything else 0 if config.tune == "frozen" else int(config.tune)
        depth = {view: max(0, len(b) - self.tuned) for view, b in blocks.items()}
        self.fixed = {view: b[: depth[view]] for view, b in blocks.items()}
        self.live = {view: b[depth[view] :] for view, b in blocks.items()}
        self.cacheable = not everything and not config.augment

        ends = [visual.attnpool] if _is_resnet(visual) else [visual.ln_post, visual.proj]
        ends += [self.clip.ln_final, self.clip.text_projection]
        self.clip.requires_grad_(everything)
        if not (self.tuned and config.tune_ends):
            ends = []
        for part in [*self.live["image"], *self.live["text"], *ends]:
            part.requires_grad_(True)
        self.clip.logit_scale.requires_grad_(False)  # no loss here has it
        self.train()

    def train(self, mode: bool = True) -> ClipEncoder:
        """Training mode for what is trained; a frozen part keeps its statistics."""
        super().train(mode)
        if self.config.tune != "all":
            self.clip.eval()
            for block in [*self.live["image"], *self.live["text"]]:
                block.train(mode)
        return self

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        ids = torch.from_numpy(open_clip.tokenise(texts, self.config.words)[0])
        mode = self.training
        self.eval()
        parts = ids.to(self.mean.device).split(self.batch)
        found = [self(Inputs(None, some)) for some in parts]
        vectors = torch.cat([last_tokens(one.words, one.word_mask) for one in found])
        self.train(mode)
        return vectors

    def copy_text_end(self, layers: int) -> tuple[list[ClipBlock], nn.LayerNorm, nn.Linear]:
        blocks = list(self.clip.transformer.resblocks)[-layers:]
        project = self.clip.text_projection
        weight = project.weight if isinstance(project, nn.Linear) else project.T
        copied = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        with torch.no_grad():
            copied.weight.copy_(weight)
        norm: nn.LayerNorm = copy.deepcopy(self.clip.ln_final)
        return [ClipBlock.copy_of(block) for block in blocks], norm.requires_grad_(True), copied

    # -- stages ------------------------------------------------------------------------------------

    def frozen(self, inputs: Inputs) -> Inputs:
        """The outputs of the frozen part for raw inputs, rounded as they are kept.

        Of frozen towers: [B, 1 + P, d] and [B, 1 + L, d], first the pooled vector, then projected
        patches and words (zeros from the end-of-text token on); the pooled vector alone where the
        method uses no such tokens. Of partly frozen ones, and for hidden states: what the last
        frozen block gives, zeros after the end of a text.
        """
        if self.config.tune == "all":
            return inputs
        image, text = inputs.image, inputs.text
        with torch.no_grad(), self.arithmetic():
            if image is not None and not image.is_floating_point():
                x = self._image_start(image)
                image = self._rounded(x if self.tuned else self._stacked(*self._image_end(x)))
            if text is not None and not text.is_floating_point():
                ends = text.argmax(dim=1)  # the end-of-text token has the highest id
                x = self._text_start(text)
                if self.tuned or self.tokens == "hidden":
                    # The towers are causal: nothing after the end enters a text.
                    x = x * _before(ends + 1, x)
                else:
                    x = self._stacked(*self._text_end(x, ends))
                text = self._rounded(x)
        return Inputs(image, text)

    def forward(self, inputs: Inputs) -> Embeddings:
        inputs = self.frozen(inputs)
        with self.arithmetic():
            image, patches = (None, None) if inputs.image is None else self._image(inputs.image)
            text, words = (None, None) if inputs.text is None else self._text(inputs.text)
        if not self.tokens:
            image = None if image is None else self.norms["image"](image)
            text = None if text is None else self.norms["text"](text)
            return Embeddings(image, text)
        mask = None if words is None else (words != 0).any(dim=2)
        return Embeddings(image, text, patches if self.tokens == "joint" else None, words, mask)

    def _image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The live part, for what `frozen` gave: pooled [B, d] and patches [B, P, d]."""
        if self.tuned:
            x = x.float() if x.is_floating_point() else self._image_start(x)
            for block in self.live["image"]:
                x = block(x)
            pooled, patches = self._image_end(x)
            return pooled.float(), patches.float()
        return x[:, 0].float(), x[:, 1:].float()

    def _text(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The live part, for what `frozen` gave: pooled [B, d] and words [B, L, d], zeros from the
        end-of-text token on; or hidden states [B, L, w], zeros after it.
        """
        hidden = self.tokens == "hidden"
        if self.tuned or hidden:
            if x.is_floating_point():
                ends = (x != 0).any(dim=2).sum(dim=1) - 1
                x = x.float()
            else:
                ends = x.argmax(dim=1)
                x = self._text_start(x)
            x = self._text_blocks(x, self.live["text"])
            pooled, words = self._text_end(x, ends)
            words = x * _before(ends + 1, x) if hidden else words
            return pooled.float(), words.float()
        return x[:, 0].float(), x[:, 1:].float()

    def _stacked(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        rows = pooled.unsqueeze(1)
        return torch.cat([rows, tokens], dim=1) if self.tokens == "joint" else rows

    def fixed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        live = {id(p) for p in self.clip.parameters() if p.requires_grad}
        for block in [*self.live["image"], *self.live["text"]]:
            live |= {id(b) for b in block.buffers()}
        if self.config.tune != "all":
            for name, tensor in self.clip.state_dict(prefix="clip.", keep_vars=True).items():
                if id(tensor) not in live:
                    yield name, tensor

    # -- the towers, as open_clip computes them ----------------------------------------------------

    def _image_start(self, pixels: Tensor) -> Tensor:
        """Pixels to what the last fixed block gives: (B, 3, R, R) uint8 -> (B, 1 + P, w), or
        (B, w, h, h) of a ResNet.
        """
        visual = self.clip.visual
        x = self.normalised(pixels)
        x = visual.stem(x) if _is_resnet(visual) else visual._embeds(x)
        for block in self.fixed["image"]:
            x = block(x)
        return x

    def _image_end(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, d] and patches [B, P, d] in the joint space."""
        visual = self.clip.visual
        if _is_resnet(visual):
            x = _attention_pool(visual.attnpool, x)  # (B, 1 + P, d)
            return x[:, 0], x[:, 1:]
        if self.tokens != "joint" and visual.pool_type == "tok":
            x = x[:, :1]
        pooled, tokens = visual._pool(x)
        return pooled @ visual.proj, tokens @ visual.proj

    def _text_start(self, tokens: Tensor) -> Tensor:
        """Token ids to what the last fixed block gives: (B, L) -> (B, L, w)."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
        return self._text_blocks(x, self.fixed["text"])

    def _text_blocks(self, x: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
        length = x.shape[1]
        for block in blocks:
            x = block(x, attn_mask=self.clip.attn_mask[:length, :length])
        return x

    def _text_end(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, d], and words [B, L, d] that are zeros from the end-of-text token on."""
        clip = self.clip
        project = clip.text_projection
        everything = torch.arange(len(x), device=x.device)
        if self.tokens != "joint":
            x, ends = x[everything, ends].unsqueeze(1), torch.zeros_like(ends)
        x = clip.ln_final(x)
        x = project(x) if isinstance(project, nn.Linear) else x @ project
        return x[everything, ends], x * _before(ends, x)


def _is_resnet(visual: Any) -> bool:
    return hasattr(visual, "attnpool")


def _before(ends: Tensor, x: Tensor) -> Tensor:
    """Which places of x [B, L, d] come before the given ones, [B]: (B, L, 1)."""
    places = torch.arange(x.shape[1], device=x.device)
    return (places < ends.unsqueeze(1)).unsqueeze(2)


def _attention_pool(pool: Any, x: Tensor) -> Tensor:
    """The attention pooling of CLIP's ResNets with every place as a query: (B, w, h, h) ->
    (B, 1 + P, d), the first the pooled vector, the others what each place attends to.
    """
    x = x.flatten(2).transpose(1, 2)  # (B, P, w)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding

    def split(y: Tensor) -> Tensor:
        return y.unflatten(2, (pool.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 + P, w / heads)

    q, k, v = (split(f(x)) for f in (pool.q_proj, pool.k_proj, pool.v_proj))
    y = F.scaled_dot_product_attention(q, k, v)
    return cast(Tensor, pool.c_proj(y.transpose(1, 2).flatten(2)))
