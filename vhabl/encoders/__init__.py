"""Encoders: what turns an item's raw inputs into embeddings. The first part of every method."""

from __future__ import annotations

from vhabl.encoders.base import Encoder, PixelEncoder, Tokens, digest_of
from vhabl.encoders.clip import ClipEncoder
from vhabl.encoders.cnn import CnnEncoder
from vhabl.encoders.features import FeatureScaling
from vhabl.settings import EncoderConfig
from vhabl.types import DataSpec

__all__ = [
    "ClipEncoder", "CnnEncoder", "Encoder", "FeatureScaling", "PixelEncoder", "Tokens", "build",
    "digest_of",
]  # fmt: skip


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
