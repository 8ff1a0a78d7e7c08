"""PGHMH: prompt-guided hierarchical multi-modal hashing (fused).

A prompt in words says what an item shows, guides how its text is read, and is fused with image and
text. Here the prompt is made of what the item itself shows: class names weighted by the classes
that its image and text let expect. The release writes the item's true labels into it, in the test
too; `oracle_labels` does the same for comparison, through `encode_oracle`, and everything made with
it says so.

    names    one vector a class: its name in a few templates, read by the text tower, then learned
    expected class probabilities from image and text
    prompt   learned context and the expected name; with the text's words it goes through copies of
             the text tower's last blocks. What they make of the text's end times what they make of
             the prompt, projected, is the text feature; the prompt alone, projected, the prompt's
    fusion   image, text and prompt attend to each other, and each keeps half of itself;
             f = image + text after it

Codes of every trained length come from f, with decoders to an auxiliary code, as in CMCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl.encoders import Encoder
from vhabl.methods.base import HashingMethod, stand_in
from vhabl.nn import losses
from vhabl.nn.layers import ClipBlock, CodeMemory, LengthHeads, ResidualMLP, last_tokens
from vhabl.nn.quantisation import binarise
from vhabl.settings import key
from vhabl.system.errors import bad_value, fail
from vhabl.types import Batch, DataSpec, Embeddings, Inputs

TEMPLATES = (
    "An image showing {}", "A photo depicting {}", "A picture of {}", "This is an image with {}",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    likelihood: float = key("likelihood of codes against those of all training items", 5.005)
    alignment: float = key("InfoNCE of an item's fused feature and its prompt", 5.0)
    contrast: float = key("InfoNCE of an item's image and text after fusion", 5.0)
    reconstruction: float = key("squared distance of decoded codes from the auxiliary code", 0.005)
    classes: float = key("prediction of the classes that the prompt names", 1.0)
    auxiliary: float = key("factor of all that has to do with the auxiliary code", 20.0)


@dataclass(frozen=True)
class PGHMHSettings:
    dim: int = key("features: width of image, text and prompt; towers have their own", 512)
    context: int = key("learned vectors that stand before the expected name", 4)
    layers: int = key("blocks that words and prompt go through together", 2)
    heads: int = key("heads of the fusion; features: of those blocks too", 8)
    dropout: float = key("dropout in the fusion's Transformer layer", 0.1)
    blocks: int = key("residual blocks between the fused feature and its alignment", 2)
    block_dropout: float = key("dropout in these blocks", 0.5)
    truth: float = key("share of training items whose prompt names their true classes", 0.5)
    modality_dropout: float = key("share of the items that lose image or text in training", 0.1)
    auxiliary: int = key("length of the auxiliary code", 128)
    temperature: float = key("temperature of InfoNCE", 0.07)
    weights: Weights = field(default_factory=Weights)


class ResponseNorm(nn.Module):
    """Global response normalisation over the tokens of an item (Woo et al., ConvNeXt V2, CVPR
    2023): [B, T, D].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        strength = x.norm(dim=1, keepdim=True)
        return x + self.scale * x * strength / (strength.mean(2, keepdim=True) + 1e-6) + self.shift


class Fusion(nn.Module):
    """The tokens of an item attend to each other, with half a residual; then one Transformer
    layer: [B, T, D].
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.response = ResponseNorm(dim)
        self.layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        attended, _ = self.attention(x, x, x, need_weights=False)
        fused: Tensor = self.layer(self.response(attended) + tokens / 2)
        return fused


class PGHMH(HashingMethod):
    title = "PGHMH"
    task = "fused"
    any_length = False
    tokens = "hidden"
    Settings = PGHMHSettings

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: PGHMHSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        dim = encoder.image_dim if encoder.tokens else settings.dim
        if dim % settings.heads:
            bad_value("model.heads", settings.heads, f"a divisor of the width {dim}")
        self.stand_in = stand_in(encoder, settings.modality_dropout)
        widths = {"image": encoder.image_dim, "text": encoder.text_dim}
        # Towers end in a joint space; features need a way into one.
        self.project = nn.ModuleDict(
            {v: nn.Linear(w, dim) for v, w in widths.items() if not encoder.tokens}
        )
        self.classifier = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, spec.classes)
        )
        if encoder.tokens:
            blocks, self.norm, self.text_projection = encoder.copy_text_end(settings.layers)
            self.reader = nn.ModuleList(blocks)
            width = self.text_projection.in_features
            if self.stand_in is not None:
                self.no_text = nn.Parameter(torch.zeros(width))
        else:
            width = dim
            self.reader = nn.ModuleList(
                ClipBlock(dim, settings.heads) for _ in range(settings.layers)
            )
            self.norm, self.text_projection = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.names = nn.Parameter(self._read_names(spec, width))
        # The last one belongs to the expected name.
        self.context = nn.Parameter(torch.randn(settings.context + 1, width) / width**0.5)
        self.fusion = Fusion(dim, settings.heads, settings.dropout)
        self.align = nn.Sequential(
            *(ResidualMLP(dim, settings.block_dropout) for _ in range(settings.blocks))
        )
        self.heads = LengthHeads(dim, self.lengths, settings.auxiliary)
        self.memory = CodeMemory(("fused",), self.heads.lengths, spec.train_items, spec.classes)

    @classmethod
    def check_settings(cls, settings: PGHMHSettings) -> None:
        for name in ("dim", "layers", "heads", "auxiliary"):
            if getattr(settings, name) < 1:
                bad_value(f"model.{name}", getattr(settings, name), "at least 1")
        for name in ("context", "blocks"):
            if getattr(settings, name) < 0:
                bad_value(f"model.{name}", getattr(settings, name), "at least 0")
        for name in ("dropout", "block_dropout", "modality_dropout"):
            if not 0 <= getattr(settings, name) < 1:
                bad_value(f"model.{name}", getattr(settings, name), "at least 0 and below 1")
        if not 0 <= settings.truth <= 1:
            bad_value("model.truth", settings.truth, "from 0 to 1")
        if settings.temperature <= 0:
            bad_value("model.temperature", settings.temperature, "more than 0")

    def _read_names(self, spec: DataSpec, width: int) -> Tensor:
        """A first vector for each class, [C, w] of length 1: its name in the templates as the text
        tower reads it; random ones where features stand for a tower.
        """
        if not self.encoder.tokens:
            return F.normalize(torch.randn(spec.classes, width), dim=1)
        if len(spec.class_names) != spec.classes:
            what = f"{len(spec.class_names)} names for {spec.classes} classes"
            do = f"The prompts of {self.title} are made of them: give one for each"
            fail("data.class_names", what, do)
        names = [name.replace("_", " ").replace("-", " ") for name in spec.class_names]
        texts = [template.format(name) for template in TEMPLATES for name in names]
        read = F.normalize(self.encoder.read(texts), dim=1).unflatten(0, (len(TEMPLATES), -1))
        names_read = read.mean(dim=0)
        # What all of them share says nothing; of an untrained tower that is nearly all.
        return F.normalize(names_read - names_read.mean(dim=0), dim=1)

    # -- features ----------------------------------------------------------------------------------

    def features(
        self, inputs: Inputs, truth: Tensor | None = None, told: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is hashed, f [B, D]; image, text and prompt after fusion [B, D] each, and class
        logits [B, C].

        truth: labels [B, C] that the prompt names in place of what is expected, for the items where
        told [B, 1] is True. Only `loss` and `encode_oracle` have them.
        """
        found = self.embeddings(inputs)
        image, text = found.image, found.text
        assert image is not None and text is not None
        if self.project:
            image, text = self.project["image"](image), self.project["text"](text)
        logits = self.classifier(torch.cat([image, text], dim=1))
        named = F.normalize(logits.sigmoid(), p=1, dim=1)  # (B, C)
        if truth is not None and told is not None:
            named = torch.where(told, F.normalize(truth, p=1, dim=1), named)

        # Words, context and expected name, read together: (B, L + M + 1, w).
        words, present = self._words(found, text)
        prompt = self.context.expand(len(text), -1, -1).clone()
        prompt[:, -1] += named @ self.names
        x = torch.cat([words, prompt], dim=1)
        absent = F.pad(~present, (0, prompt.shape[1]))
        with self.encoder.arithmetic():
            for block in self.reader:
                x = block(x, absent)
        x = self.norm(x.float())
        end, guide = last_tokens(x, present), x[:, -1]
        text, guide = self.text_projection(end * guide), self.text_projection(guide)

        before = torch.stack([image, text, guide], dim=1)  # (B, 3, D)
        image, text, guide = (0.5 * before + 0.5 * self.fusion(before)).unbind(dim=1)
        return {
            "fused": image + text,
            "prompt": guide,
            "image": image,
            "text": text,
            "logits": logits,
        }

    def _words(self, found: Embeddings, text: Tensor) -> tuple[Tensor, Tensor]:
        """The words of the texts [B, L, w], and which there are, [B, L]. Where there is no text it
        is one learned word; a ready-made feature is one too.
        """
        one = torch.ones_like(text[:, :1], dtype=torch.bool)
        if self.project:
            return text[:, None], one
        if found.words is None or found.word_mask is None:
            return self.no_text.expand(len(text), 1, -1), one
        if self.stand_in is None:
            return found.words, found.word_mask
        missing = ~found.word_mask.any(dim=1, keepdim=True)
        first = F.pad(missing, (0, found.word_mask.shape[1] - 1))  # (B, L)
        words = torch.where(first[:, :, None], self.no_text, found.words)
        return words, found.word_mask | first

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        fused = self.features(inputs)["fused"]
        return {k: {"fused": self.heads(fused, k)} for k in lengths}

    def relax_oracle(
        self, inputs: Inputs, labels: Tensor, lengths: Sequence[int]
    ) -> dict[int, dict[str, Tensor]]:
        """Relaxed codes with prompts of the true labels [B, C]: the published behaviour."""
        for bits in lengths:
            self.check_length(bits)
        told = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        fused = self.features(inputs, labels, told)["fused"]
        return {k: {"fused": self.heads(fused, k)} for k in lengths}

    def encode_oracle(
        self, inputs: Inputs, labels: Tensor, lengths: Sequence[int]
    ) -> dict[int, dict[str, Tensor]]:
        """+-1 codes with prompts of the true labels [B, C]: the published behaviour, for comparison
        only.
        """
        found = self.relax_oracle(inputs, labels, lengths)
        return {k: {view: binarise(h) for view, h in views.items()} for k, views in found.items()}

    # -- training ----------------------------------------------------------------------------------

    def prepare(self, labels: Tensor) -> None:
        self.memory.begin(labels)

    def after_epoch(self) -> None:
        self.memory.renew()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        weight, index, memory, y = self.settings.weights, batch.index, self.memory, batch.labels
        share = 1.0 if self.oracle_labels else self.settings.truth
        told = torch.rand(len(y), 1, device=y.device) < share
        found = self.features(batch.inputs, y, told)
        temperature = self.settings.temperature
        alignment = losses.info_nce(self.align(found["fused"]), found["prompt"], temperature)
        contrast = losses.info_nce(found["image"], found["text"], temperature)
        classes = F.binary_cross_entropy_with_logits(found["logits"], y)
        terms = {
            "alignment": weight.alignment * alignment,
            "contrast": weight.contrast * contrast,
            "classes": weight.classes * classes,
        }
        similar = memory.similar(y)
        longest = self.settings.auxiliary
        target = memory.signs(longest)[index]
        for k in self.heads.lengths:
            h = self.heads(found["fused"], k)
            memory.keep("fused", index, h)
            factor = weight.auxiliary if k == longest else 1.0
            likelihood = losses.likelihood(memory.codes("fused", k), h, similar)
            parts = {"likelihood": factor * weight.likelihood * likelihood}
            if k != longest:
                error = losses.squared_error(self.heads.rebuild(h), target)
                parts["reconstruction"] = weight.auxiliary * weight.reconstruction * error
            for name, value in parts.items():
                terms[name] = terms.get(name, 0) + value
        return terms
