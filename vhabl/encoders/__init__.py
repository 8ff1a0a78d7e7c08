"""Encoders: what turns an item's raw inputs into embeddings. The first part of every method."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl.encoders import cnn, open_clip
from vhabl.nn.layers import ClipBlock, last_tokens
from vhabl.settings import EncoderConfig
from vhabl.system.distributed import ALONE, GlobalBatchNorm, Ranks
from vhabl.system.errors import bad_value, note, plural
from vhabl.types import DataSpec, Embeddings, Inputs, Split

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


def build(
    config: EncoderConfig, spec: DataSpec, tokens: Tokens, pretrained: bool = True
) -> Encoder:
    """The encoder of a recipe. tokens: the parts of pictures and texts that the method uses.
    pretrained: read the weights of networks; without, they are random and expected to be replaced.
    """
    if config.name == "features":
        return FeatureScaling(spec, image_noise=config.image_noise)
    if config.name == "cnn":
        return CnnEncoder(config, spec, pretrained)
    return ClipEncoder(config, tokens, pretrained)


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


# -- pictures --------------------------------------------------------------------------------------


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

    def _normalised(self, pixels: Tensor) -> Tensor:
        """What the network takes of pixels: (B, 3, R, R) uint8 -> (B, 3, S, S)."""
        return (self._cut(pixels) - self.mean).div_(self.spread)

    def _cut(self, pixels: Tensor) -> Tensor:
        """The centre, in training with `augment` mirrored at random: (B, 3, S, S). Training is
        given pictures that are cut already.
        """
        size, room = self.size, pixels.shape[-1] - self.size
        cut = pixels[..., room // 2 : room // 2 + size, room // 2 : room // 2 + size]
        if not (self.training and self.config.augment):
            return cut
        mirrored = torch.rand(len(cut), 1, 1, 1, device=cut.device) < 0.5
        return torch.where(mirrored, cut.flip(3), cut)


class CnnEncoder(PixelEncoder):
    """Pixels through a network of torchvision's, and texts that are a bag of words.

    `tune` says how much of the network is trained: nothing, the last N of its layers that have
    weights, or all. What comes before is frozen: it is in evaluation mode always, and its outputs
    can be kept (`frozen`). The picture's vector is standardised by running statistics (without
    `standardise` it stays as the last ReLU gives it), the text as features are.
    """

    batch = 32  # the first layers of VGG need 25 MB for each picture

    def __init__(self, config: EncoderConfig, spec: DataSpec, pretrained: bool = True) -> None:
        super().__init__(config, config.side or cnn.SIDE, (cnn.MEAN, cnn.SPREAD))
        weights = config.weights if pretrained else ""
        self.network = cnn.build_network(config.model, weights, "encoder.weights=")
        parts: Any = self.network
        layers = [*parts.features, parts.avgpool, nn.Flatten(), *parts.classifier]
        weighted = [n for n, layer in enumerate(layers) if list(layer.parameters())]
        self.image_dim, self.text_dim = layers[weighted[-1]].out_features, spec.text_dim
        norm = nn.BatchNorm1d(self.image_dim, affine=False)
        self.norm = norm if config.standardise else nn.Identity()
        self.bag = FeatureScaling(spec, ("text",))

        known = {"frozen": 0, "all": len(weighted)}
        self.tuned = min(int(known.get(config.tune, config.tune)), len(weighted))
        begin = weighted[-self.tuned] if self.tuned else len(layers)
        while isinstance(layers[begin - 1], nn.Dropout):
            begin -= 1  # it belongs to the layer that it feeds
        self.fixed, self.live = layers[:begin], layers[begin:]
        self.cacheable = bool(self.fixed) and not config.augment
        for layer in self.fixed:
            layer.requires_grad_(False)
        self.train()

    def fit(self, train: Split, kind: str) -> None:
        self.bag.fit(train, kind)

    def train(self, mode: bool = True) -> CnnEncoder:
        """Training mode for what is trained: a frozen part drops nothing out."""
        super().train(mode)
        for layer in self.fixed:
            layer.eval()
        return self

    def frozen(self, inputs: Inputs) -> Inputs:
        """What the last frozen layer gives, rounded as it is kept, in place of pixels."""
        x = inputs.image
        if x is None or x.is_floating_point() or not self.fixed:
            return inputs
        with torch.no_grad(), self.arithmetic():
            x = self._normalised(x)
            for layer in self.fixed:
                x = layer(x)
        return replace(inputs, image=self._rounded(x))

    def forward(self, inputs: Inputs) -> Embeddings:
        image = self.frozen(inputs).image
        if image is not None:
            with self.arithmetic():
                x = image.float() if image.is_floating_point() else self._normalised(image)
                for layer in self.live:
                    x = layer(x)
            image = self.norm(x.float())
        return self.bag(Inputs(image, inputs.text))

    def fixed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.network.state_dict(prefix="network.", keep_vars=True).items():
            if not tensor.requires_grad:
                yield name, tensor


# -- CLIP ------------------------------------------------------------------------------------------


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
        x = self._normalised(pixels)
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
