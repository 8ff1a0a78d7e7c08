"""PGHMH: prompt-guided hierarchical multi-modal hashing (fused).

A prompt in words says what an item shows, guides how its text is read, and is fused with image and
text. Here the prompt is made of what the item itself shows: class names weighted by the classes
that its image and text let expect. The release writes the item's true labels into it, in the test
too; `oracle_labels` does the same for comparison, through `encode_oracle`, and everything made with
it says so.

    names    one vector a class: its name in a few templates, read by the text tower, then learned
    expected class probabilities from image and text; prompt = learned context + expected names
    text     words, context and prompt go together through a Transformer; text feature =
             projection(what it makes of the text * what it makes of the prompt)
    fusion   image, text and prompt attend to each other; f = image + text after it

Codes of every trained length come from f, with decoders to an auxiliary code, as in CMCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vhabl import losses
from vhabl.codes import binarise
from vhabl.encoders import Encoder
from vhabl.errors import fail
from vhabl.layers import CodeMemory, LengthHeads
from vhabl.methods.base import HashingMethod, stand_in
from vhabl.settings import key
from vhabl.types import Batch, DataSpec, Inputs

TEMPLATES = ("An image showing {}.", "An image of {}.", "A photo of {}.", "There is {} here.")


@dataclass(frozen=True)
class Weights:
    likelihood: float = key("likelihood of codes against those of all training items", 5.005)
    alignment: float = key("InfoNCE of an item's fused feature and its prompt", 5.0)
    contrast: float = key("InfoNCE of an item's image and text", 5.0)
    reconstruction: float = key("distance of decoded codes from the auxiliary code", 0.005)
    classes: float = key("prediction of the classes that the prompt names", 1.0)
    auxiliary: float = key("factor of all that has to do with the auxiliary code", 20.0)


@dataclass(frozen=True)
class PGHMHSettings:
    dim: int = key("features: width of image, text and prompt; towers have their own", 512)
    context: int = key("learned vectors that stand before the prompt", 4)
    layers: int = key("layers of the Transformer of words and prompt", 2)
    heads: int = key("heads of attention", 8)
    dropout: float = key("dropout in the Transformer layers", 0.1)
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
        self.layer = transformer_layer(dim, heads, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        attended, _ = self.attention(x, x, x, need_weights=False)
        fused: Tensor = self.layer(self.response(attended) + tokens / 2)
        return fused


def transformer_layer(dim: int, heads: int, dropout: float) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True
    )


class PGHMH(HashingMethod):
    title = "PGHMH"
    task = "fused"
    any_length = False
    tokens = True
    Settings = PGHMHSettings

    def __init__(
        self, spec: DataSpec, bits: list[int], settings: PGHMHSettings, encoder: Encoder
    ) -> None:
        super().__init__(spec, bits, settings, encoder)
        dim = encoder.image_dim if encoder.gives_tokens else settings.dim
        if dim % settings.heads:
            fail("key model.heads", str(settings.heads), f"a divisor of the width {dim}")
        self.stand_in = stand_in(encoder, settings.modality_dropout)
        widths = {"image": encoder.image_dim, "text": encoder.text_dim}
        # Towers end in a joint space; features need a way into one.
        self.project = nn.ModuleDict(
            {v: nn.Linear(w, dim) for v, w in widths.items() if not encoder.gives_tokens}
        )
        self.classifier = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, spec.classes)
        )
        self.names = nn.Parameter(self._read_names(spec, dim))
        self.context = nn.Parameter(torch.randn(settings.context, dim) / dim**0.5)
        self.kinds = nn.Parameter(torch.zeros(3, dim))  # marks what is text, context and prompt
        self.reader = nn.ModuleList(
            transformer_layer(dim, settings.heads, settings.dropout) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.text_projection = nn.Linear(dim, dim)
        self.prompt_projection = nn.Linear(dim, dim)
        self.fusion = Fusion(dim, settings.heads, settings.dropout)
        self.heads = LengthHeads(dim, self.lengths, settings.auxiliary)
        self.memory = CodeMemory(("fused",), self.heads.lengths, spec.train_items, spec.classes)

    @classmethod
    def check_settings(cls, settings: PGHMHSettings) -> None:
        for name in ("dim", "layers", "heads", "auxiliary"):
            if getattr(settings, name) < 1:
                fail(f"key model.{name}", str(getattr(settings, name)), "at least 1")
        if settings.context < 0:
            fail("key model.context", str(settings.context), "at least 0")
        for name in ("dropout", "modality_dropout"):
            if not 0 <= getattr(settings, name) < 1:
                fail(f"key model.{name}", str(getattr(settings, name)), "0 up to below 1")
        if not 0 <= settings.truth <= 1:
            fail("key model.truth", str(settings.truth), "0 to 1")
        if settings.temperature <= 0:
            fail("key model.temperature", str(settings.temperature), "more than 0")

    def _read_names(self, spec: DataSpec, dim: int) -> Tensor:
        """A first vector for each class, [C, D] of length 1: its name in the templates as the text
        tower reads it; random ones where features stand for a tower.
        """
        if not self.encoder.gives_tokens:
            return F.normalize(torch.randn(spec.classes, dim), dim=1)
        if len(spec.class_names) != spec.classes:
            fail(
                "key data.class_names",
                f"{len(spec.class_names)} names",
                f"{spec.classes}: the prompts of {self.title} are made of them",
            )
        names = [name.replace("_", " ").replace("-", " ") for name in spec.class_names]
        texts = [template.format(name) for template in TEMPLATES for name in names]
        read = F.normalize(self.encoder.read(texts), dim=1).unflatten(0, (len(TEMPLATES), -1))
        names_read = read.mean(dim=0)
        # What all of them share says nothing; of an untrained tower that is nearly all.
        return F.normalize(names_read - names_read.mean(dim=0), dim=1)

    # -- features ----------------------------------------------------------------------------------

    def _features(
        self, inputs: Inputs, truth: Tensor | None = None, told: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Fused feature, prompt, image and text [B, D] each, and class logits [B, C].

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
        prompt = (named @ self.names).unsqueeze(1)  # (B, 1, D)

        # Text, words, context and prompt, read together: (B, 1 + L + M + 1, D).
        parts = [text.unsqueeze(1) + self.kinds[0]]
        present = [torch.ones(len(text), 1, dtype=torch.bool, device=text.device)]
        if found.words is not None and found.word_mask is not None:
            parts.append(found.words + self.kinds[0])
            present.append(found.word_mask)
        parts += [(self.context + self.kinds[1]).expand(len(text), -1, -1), prompt + self.kinds[2]]
        rest = self.settings.context + 1
        present.append(present[0].expand(-1, rest))
        x, absent = torch.cat(parts, dim=1), ~torch.cat(present, dim=1)
        with self.encoder.arithmetic():
            for layer in self.reader:
                x = layer(x, src_key_padding_mask=absent)
        x = self.norm(x)
        text = text + self.text_projection(x[:, 0] * x[:, -1])
        guide = self.prompt_projection(x[:, -1])

        fused = self.fusion(torch.stack([image, text, guide], dim=1))
        return {
            "fused": fused[:, 0] + fused[:, 1],
            "prompt": guide,
            "image": image,
            "text": text,
            "logits": logits,
        }

    def embed(self, inputs: Inputs) -> dict[str, Tensor]:
        return {"fused": self._features(inputs)["fused"]}

    def relax_lengths(self, inputs: Inputs, lengths: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        fused = self.embed(inputs)["fused"]
        return {k: {"fused": self.heads(fused, k)} for k in lengths}

    def relax_oracle(
        self, inputs: Inputs, labels: Tensor, lengths: Sequence[int]
    ) -> dict[int, dict[str, Tensor]]:
        """Relaxed codes with prompts of the true labels [B, C]: the published behaviour."""
        for bits in lengths:
            self.check_length(bits)
        told = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        fused = self._features(inputs, labels, told)["fused"]
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
        found = self._features(batch.inputs, y, told)
        temperature = self.settings.temperature
        alignment = losses.info_nce(found["fused"], found["prompt"], temperature)
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
                error = F.mse_loss(self.heads.rebuild(h), target)
                parts["reconstruction"] = weight.auxiliary * weight.reconstruction * error
            for name, value in parts.items():
                terms[name] = terms.get(name, 0) + value
        return terms
