"""The typed sections of a configuration, each key with its meaning and default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()  # the default of a key that must be given


def key(help: str, default: Any = REQUIRED) -> Any:
    """A configuration key with its meaning, which `--help` prints."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    name: str = key("name of the data set, used in paths and tables")
    kind: str = key(
        "features (one .mat with I_tr ... L_te) | pairs (caption, index, label .mat) | "
        "table (.csv, .tsv, .jsonl or .parquet with image, caption and labels) | "
        "npy (arrays of images, texts and labels, as HQ has them)"
    )
    path: str = key("the feature file, the folder of the pair or array files, or the table")
    text_order: int = key(
        "seed of a fixed order in which training texts stand against the training images, as HQ's "
        "release trains; -1 leaves them pairs",
        -1,
    )
    scale: str = key(
        "scaling measured on the training items: standard (each feature) | "
        "global (one factor a modality) | none",
        "standard",
    )
    image_root: str = key("pairs, table: folder of the images, beside the files", "images")
    image_column: str = key("table: column of the image's file name", "image")
    caption_column: str = key("table: column of the caption", "caption")
    label_column: str = key("table: column of the names of an item's classes", "labels")
    separator: str = key("table: text between the names of classes in one cell", ";")
    query: int = key(
        "pairs, table: number of query items; 0 is a tenth. Items of one image stay together", 0
    )
    train: int = key("pairs, table: number of training items; 0 is all but the queries", 0)
    split_seed: int = key(
        "pairs, table: seed of the permutation that draws query and training items", 1
    )
    min_count: int = key("pairs, table: a caption word must occur in so many training captions", 2)
    workers: int = key("pairs, table: processes that decode images where they are many", 2)
    class_names: list[str] = key("names of the classes, in label order", [])
    source: str = key("where the files come from; said when they are missing", "")

    @property
    def has_files(self) -> bool:
        """Whether items are image files and captions; else they are rows of arrays."""
        return self.kind in ("pairs", "table")


@dataclass(frozen=True)
class EncoderConfig:
    name: str = key(
        "features (ready-made ones, or descriptors and words of pairs) | clip (towers on pixels "
        "and tokens) | cnn (a network on pixels, and a bag of words)",
        "features",
    )
    model: str = key(
        "clip: a name of open_clip's, or a JSON file that describes towers; cnn: alexnet | vgg16",
        "ViT-B-32-quickgelu",
    )
    weights: str = key(
        "clip: a file (OpenAI's archive, a state dict, safetensors, the weights of a run), a name "
        "that open_clip downloads, such as openai, or empty: random; cnn: a file (a state dict of "
        "torchvision's, safetensors), a name that it downloads, such as DEFAULT, or empty: random",
        "cache/ViT-B-32.pt",
    )
    tune: str = key(
        "clip, cnn: frozen | all | N (the last N blocks of both towers, or layers with weights of "
        "the network)",
        "frozen",
    )
    tune_ends: bool = key(
        "clip: with the last N blocks, tune the norms and projections after them too", True
    )
    lr: float = key("clip, cnn: learning rate of what is tuned there; 0 is optim.lr", 1e-6)
    words: int = key("clip: tokens of a caption that are read, its two ends included", 32)
    side: int = key("cnn: side of the pictures that the network takes; 0 is 224", 0)
    standardise: bool = key(
        "cnn: standardise what the network gives of a picture by running statistics", True
    )
    resize: int = key(
        "clip, cnn: length to which the short side of images is resized; 0 is the network's own", 0
    )
    squeeze: bool = key("clip, cnn: squeeze images to a square; else the centre is cut out", False)
    augment: bool = key(
        "clip, cnn: in training mirror images at random, and cut them anywhere in the picture, not "
        "in its centre",
        False,
    )
    image_noise: float = key(
        "features: Gaussian noise on image features in training, in their standard deviations", 0.0
    )
    precision: str = key(
        "clip, cnn: arithmetic on a GPU: auto (bfloat16 where it has it) | float32", "auto"
    )
    cache: str = key("clip, cnn: folder of what frozen parts give; none computes it anew", "cache")
    cache_precision: str = key(
        "clip, cnn: what frozen parts give is rounded to: float16 | float32", "float16"
    )


@dataclass(frozen=True)
class OptimConfig:
    name: str = key("adam | adamw | sgd", "adam")
    lr: float = key("learning rate", 1e-3)
    weight_decay: float = key("weight decay (decoupled for adamw)", 0.0)
    momentum: float = key("momentum of sgd", 0.0)
    betas: list[float] = key("adam, adamw: decay of the two running means", [0.9, 0.999])
    eps: float = key("adam, adamw: added to the root of the second mean", 1e-8)
    schedule: str = key("learning rate over the epochs: constant | cosine", "constant")
    warmup: float = key("share of the steps in which the rate rises from 0", 0.0)
    lr_scale: dict[str, float] = key(
        "factors of the learning rate for parts of the model, by the first words of their "
        "parameters' names: optim.lr_scale.fusion=0.1; 0 leaves a part as it is",
        {},
    )
    clip: float = key("gradient norm is clipped to this; 0 is off", 0.0)
    clip_per_tensor: bool = key("clip the gradient of each tensor, not of all together", False)
    averaging: float = key(
        "keeps the mean of the weights over all updates, the t-th counting t^averaging; 0 is off",
        0.0,
    )


@dataclass(frozen=True)
class ValidationConfig:
    fraction: float = key(
        "share of the training items set aside as validation queries; "
        "0 trains for `epochs` without selection",
        0.1,
    )
    seed: int = key("seed of the permutation that draws them", 1)
    every: int = key("epochs between two validations", 5)
    patience: int = key("validations without a better result before the search ends; 0 is never", 0)
