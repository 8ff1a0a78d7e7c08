"""Published recipes against plain formulas: loops over items, bits, classes and tokens in NumPy.

The expected side takes weights and inputs in float64 and no function of vhabl or torch. A term and
the total loss agree to a relative 1e-10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import COLOURS, TINY_TOWERS, picture_arrays, write_arrays, write_pair_folder

from vhabl.config import CONFIG_DIR, Config, build_method, load
from vhabl.data import load as load_data
from vhabl.methods.base import HashingMethod
from vhabl.nn import quantisation
from vhabl.nn.layers import Dropout
from vhabl.training import trainer
from vhabl.training.optim import build_optimizer, clip_gradients, set_rate
from vhabl.types import Batch, Embeddings, Inputs

Array = np.ndarray
State = dict[str, Array]

CLOSE = 1e-10  # relative


# -- plain layers and formulas ---------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log1pexp(x: float) -> float:
    """log(1 + e^x)."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def relu(x: Array) -> Array:
    return np.array([value if value > 0 else 0.0 for value in x])


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x."""
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def quick_gelu(x: Array) -> Array:
    return np.array([v * sigmoid(1.702 * v) for v in x])


def linear(state: State, name: str, x: Array) -> Array:
    """One vector through Linear: y_o = sum_i W_oi x_i + b_o."""
    y = state[f"{name}.weight"] @ x
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Array) -> Array:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(state: State, name: str, items: list[Array], training: bool) -> list[Array]:
    """Each feature by the statistics of the batch, or by the running ones."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean, variance = np.empty_like(mean), np.empty_like(variance)
        for j in range(len(mean)):
            column = [x[j] for x in items]
            mean[j] = sum(column) / len(column)
            variance[j] = sum((v - mean[j]) ** 2 for v in column) / len(column)
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    return [(x - mean) / np.sqrt(variance + 1e-5) * scale + shift for x in items]


def softmax(x: Sequence[float]) -> list[float]:
    top = max(x)
    powers = [math.exp(v - top) for v in x]
    return [p / sum(powers) for p in powers]


def attend(query: Array, keys: list[Array], values: list[Array], heads: int) -> Array:
    """What one query finds: in each head the values, weighted by the softmax of q . k / sqrt(d)."""
    width = len(query) // heads
    found = np.zeros(len(query))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = [float(query[part] @ key[part]) / math.sqrt(width) for key in keys]
        for weight, value in zip(softmax(scores), values, strict=True):
            found[part] += weight * value[part]
    return found


def multihead(
    state: State, name: str, queries: list[Array], tokens: list[Array], heads: int
) -> list[Array]:
    """Multi-head attention with a projection of queries, keys, values and of what is found."""
    (wq, wk, wv), (bq, bk, bv) = (
        np.split(state[f"{name}.in_proj_{part}"], 3) for part in ("weight", "bias")
    )
    keys, values = [wk @ x + bk for x in tokens], [wv @ x + bv for x in tokens]
    found = [attend(wq @ x + bq, keys, values, heads) for x in queries]
    return [linear(state, f"{name}.out_proj", x) for x in found]


def clip_block(
    state: State, name: str, x: list[Array], heads: int, mlp: tuple[str, str] = ("0", "2")
) -> list[Array]:
    """x + attention(LN x), then x + Linear(QuickGELU(Linear(LN x)))."""
    y = [layer_norm(state, f"{name}.ln_1", token) for token in x]
    x = [a + b for a, b in zip(x, multihead(state, f"{name}.attn", y, y, heads), strict=True)]
    mixed = []
    for token in x:
        y1 = linear(state, f"{name}.mlp.{mlp[0]}", layer_norm(state, f"{name}.ln_2", token))
        mixed.append(token + linear(state, f"{name}.mlp.{mlp[1]}", quick_gelu(y1)))
    return mixed


def dropped(x: Array, rate: float) -> Array:
    """What Dropout does in these tests: no chance, but numbers that tell its place and rate."""
    return np.array([value * (1 + rate * j / len(x)) for j, value in enumerate(x)])


def residual_mlp(state: State, name: str, x: Array) -> Array:
    """Two blocks x + Linear(Dropout(GELU(Linear(LayerNorm(x))))), 4 times as wide inside."""
    for block in range(2):
        inner = f"{name}.{block}.inner"
        hidden = linear(state, f"{inner}.1", layer_norm(state, f"{inner}.0", x))
        assert len(hidden) == 4 * len(x)
        x = x + linear(state, f"{inner}.4", dropped(gelu(hidden), 0.5))
    return x


def tanh_of(x: Array) -> Array:
    return np.array([math.tanh(v) for v in x])


def cosine(x: Array, y: Array) -> float:
    return float(sum(x * y)) / (math.sqrt(sum(x * x)) * math.sqrt(sum(y * y)))


def info_nce(x: list[Array], y: list[Array]) -> float:
    """Mean of both directions of -log softmax of cosines over 0.07, the own partner's."""
    n, total = len(x), 0.0
    for rows, others in ((x, y), (y, x)):
        for i in range(n):
            scores = [cosine(rows[i], others[j]) / 0.07 for j in range(n)]
            total -= math.log(softmax(scores)[i]) / n
    return total / 2


def likelihood(memory: Array, codes: list[Array], similar: Array) -> float:
    """Mean over memory x batch of log(1 + e^s) - S s, s = clamp(a . h, -64, 64) / 2."""
    total = 0.0
    for i, a in enumerate(memory):
        for j, h in enumerate(codes):
            s = min(64.0, max(-64.0, float(sum(a * h)))) / 2
            total += log1pexp(s) - similar[i, j] * s
    return total / (len(memory) * len(codes))


def squared_distance(x: list[Array], y: list[Array]) -> float:
    """Sum over bits of squared differences, mean over items."""
    sums = [sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for u, v in zip(x, y, strict=True)]
    return float(sum(sums)) / len(x)


def share_a_label(x: Array, y: Array) -> Array:
    """1 where an item of x and one of y have a class in common."""
    return np.array([[float(sum(a * b) > 0) for b in y] for a in x])


def bce(logits: list[Array], y: Array) -> float:
    """Binary cross-entropy, mean over items and classes."""
    total = 0.0
    for i, row in enumerate(logits):
        for c, logit in enumerate(row):
            total += y[i, c] * log1pexp(-logit) + (1 - y[i, c]) * log1pexp(logit)
    return float(total) / (len(logits) * len(logits[0]))


# -- methods with random weights -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that ask for float32 after mixed arithmetic keep float64 here."""
    to_float32, kept = torch.Tensor.float, torch.float64
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == kept else to_float32(x))


@pytest.fixture(autouse=True)
def _dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout is `dropped` in training and in evaluation."""

    def forward(self: Dropout, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        return x * (1 + self.rate * torch.arange(width).to(x) / width)

    monkeypatch.setattr(Dropout, "forward", forward)


def randomise(method: HashingMethod, seed: int, but: str = "encoder.") -> None:
    """Random numbers in every parameter, and in BatchNorm's running statistics."""
    rng = np.random.default_rng(seed)
    tensors = dict(method.named_parameters())
    for name, buffer in method.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            tensors[name] = buffer  # type: ignore[assignment]
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(but):
                continue
            values = rng.normal(size=tuple(tensor.shape))
            if name.endswith("running_var"):
                values = rng.uniform(0.1, 0.6, size=tuple(tensor.shape))
            elif tensor.ndim > 1:
                values *= 2 / math.sqrt(tensor.shape[-1])
            elif name.endswith("weight"):  # of a norm
                values = 1 + 0.3 * values
            else:
                values *= 0.4
            tensor.copy_(torch.from_numpy(values))


def state_of(method: HashingMethod) -> State:
    tensors = [*method.state_dict().items(), *method.named_buffers()]
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors}


def check(found: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    """Each term and the total; no other term has a weight."""
    values = {name: value.item() for name, value in found.items()}
    assert values == pytest.approx(expected, rel=CLOSE, abs=0)
    assert all(value != 0 for value in expected.values())
    assert sum(values.values()) == pytest.approx(sum(expected.values()), rel=CLOSE, abs=0)


# -- VH-ABL and HIAMH ------------------------------------------------------------------------------

K = 12  # bits of the longest code
#: Several classes an item, equal label sets, an item without a label, one that shares with all
MIXED = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0],
         [1, 1, 1, 1]]  # fmt: skip
#: The last item has no negatives, the first and the fourth have no other positive than it
JOINED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1],
          [1, 1, 1, 1]]  # fmt: skip


def fused_method(
    recipe: str, file: Path, labels: list[list[int]], training: bool
) -> tuple[HashingMethod, Batch]:
    """A published recipe with small widths and random weights, and seven items: the sixth has the
    inputs of the first.
    """
    overrides = [
        "data=wiki", f"data.path={file}", "data.class_names=[]", f"bits=[6,{K}]", "device=cpu",
        "model.net.dim=8", "model.net.image_hidden=10", "model.net.text_hidden=9",
    ]  # fmt: skip
    config = load(CONFIG_DIR / f"{recipe}.yaml", overrides)
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    method.encoder.fit(data.train, config.data.scale)
    method.double().train(training)
    randomise(method, 3, but="encoder")
    rng = np.random.default_rng(5)
    image, text = rng.normal(size=(7, 12)), rng.normal(size=(7, 9))
    image[5], text[5] = image[0], text[0]
    inputs = Inputs(torch.from_numpy(image), torch.from_numpy(text))
    return method, Batch(inputs, torch.tensor(labels, dtype=torch.float64), torch.arange(7))


def fused_codes(state: State, batch: Batch, training: bool) -> list[Array]:
    """The network of VH-ABL and HIAMH on raw features: relaxed codes."""
    net, features = "net.members.0", []
    assert batch.inputs.image is not None and batch.inputs.text is not None
    given = {"image": batch.inputs.image.numpy(), "text": batch.inputs.text.numpy()}
    for number, (view, items) in enumerate(given.items()):
        rows = list(items)
        for block in range(3):  # Linear, Tanh, BatchNorm, Dropout: d -> d -> hidden -> D
            rows = [tanh_of(linear(state, f"{net}.{view}.{4 * block}", x)) for x in rows]
            rows = batch_norm(state, f"{net}.{view}.{4 * block + 2}", rows, training)
            rows = [dropped(x, 0.01) for x in rows]
        # 4 heads over the class prototypes; Linear, BatchNorm, ReLU of what is found
        name = f"{net}.attention.{number}"
        prototypes = state[f"{name}.prototypes"]
        keys = [linear(state, f"{name}.key", p) for p in prototypes]
        values = [linear(state, f"{name}.value", p) for p in prototypes]
        found = [attend(linear(state, f"{name}.query", x), keys, values, 4) for x in rows]
        dense = [linear(state, f"{name}.dense.0", x) for x in found]
        refined = [relu(x) for x in batch_norm(state, f"{name}.dense.1", dense, training)]
        # the merge that both modalities share, of feature and refinement
        both = [np.concatenate(pair) for pair in zip(rows, refined, strict=True)]
        features.append([linear(state, f"{net}.merge", x) for x in both])
    x = [np.concatenate(pair) for pair in zip(*features, strict=True)]
    for layer in (0, 2):  # 2D -> D -> D with ReLU
        x = [relu(linear(state, f"{net}.fusion.{layer}", item)) for item in x]
    x = [linear(state, f"{net}.fusion.4", item) for item in x]  # D -> K
    x = [tanh_of(item) for item in batch_norm(state, f"{net}.fusion.5", x, training)]
    x = [relu(linear(state, f"{net}.fusion.7", item)) for item in x]  # K -> D
    return [tanh_of(linear(state, f"{net}.hash", item)) for item in x]  # D -> K


def label_target(y: Array, i: int, j: int) -> float:
    return 2 * sigmoid(float(sum(y[i] * y[j]))) - 1


def mean_over_pairs(n: int, term: Callable[[int, int], float]) -> float:
    return sum(term(i, j) for i in range(n) for j in range(n)) / n**2


def multi_similarity(h: list[Array], y: Array) -> tuple[float, dict[str, int]]:
    """The loss, and how often each of its edges was met."""
    n, total = len(h), 0.0
    met = dict.fromkeys(("same", "no positive", "no negative", "dropped", "kept"), 0)
    for i in range(n):
        similarity = [cosine(h[i], h[j]) for j in range(n)]
        related = [sum(y[i] * y[j]) > 0 for j in range(n)]
        positives = [s for s, r in zip(similarity, related, strict=True) if r and s < 1 - 1e-5]
        negatives = [s for s, r in zip(similarity, related, strict=True) if not r]
        met["same"] += sum(related) > len(positives) + 1
        if not positives or not negatives:
            met["no positive" if not positives else "no negative"] += 1
            continue
        kept_negatives = [s for s in negatives if s + 0.1 > min(positives)]
        kept_positives = [s for s in positives if s - 0.1 < max(kept_negatives, default=-9)]
        met["dropped"] += len(positives) - len(kept_positives)
        met["dropped"] += len(negatives) - len(kept_negatives)
        if not kept_positives or not kept_negatives:
            continue
        met["kept"] += 1
        pull = sum(math.exp(-2 * (s - 0.5)) for s in kept_positives)
        push = sum(math.exp(40 * (s - 0.5)) for s in kept_negatives)
        total += math.log(1 + pull) / 2 + math.log(1 + push) / 40
    return total / n, met


def centre_distance(centres: Array) -> float:
    """Mean and smallest distance of two centres, over K, with the sign that pushes them apart."""
    distances = [
        math.sqrt(sum((a - b) ** 2)) for i, a in enumerate(centres) for b in centres[i + 1 :]
    ]
    return -(sum(distances) / len(distances) + min(distances)) / K


CASES = pytest.mark.parametrize(
    ("labels", "training"),
    [(MIXED, False), (MIXED, True), (JOINED, False), (JOINED, True)],
    ids=["mixed", "mixed-training", "joined", "joined-training"],
)


def met_edges(labels: list[list[int]], met: dict[str, int]) -> bool:
    """Whether the mining of this batch sees what the batch is made for."""
    edges = ("same", "no positive") if labels is MIXED else ("no negative",)
    return all(met[name] for name in (*edges, "dropped", "kept"))


@CASES
@torch.no_grad()
def test_vh_abl(feature_file: Path, labels: list[list[int]], training: bool) -> None:
    """Every term: METHODS.md, section 1."""
    method, batch = fused_method("vh_abl_published", feature_file, labels, training)
    state, y, n = state_of(method), np.array(labels, dtype=float), 7
    h, centres = fused_codes(state, batch, training), state["centres"]
    logits = [linear(state, "classifier", x) for x in h]

    contrasts = []
    for i in range(n):
        power = [math.exp(float(sum(h[i] * c)) / K) for c in centres]
        others = sum(p for p, owned in zip(power, y[i], strict=True) if not owned)
        own = [-math.log(p / (p + others)) for p, o in zip(power, y[i], strict=True) if o]
        if own:  # an item without a class has no contrast
            contrasts.append(sum(own) / len(own))

    # importance: softplus(net(h)), K -> K/2 -> K with ReLU between, scaled to mean 1 over bits
    weights = []
    for x in h:
        hidden = linear(state, "importance_in", x)
        assert len(hidden) == K // 2
        w = [log1pexp(v) for v in linear(state, "importance_out", relu(hidden))]
        weights.append([v * K / sum(w) for v in w])

    def weighted(i: int, j: int) -> float:
        return sum((weights[i][k] + weights[j][k]) / 2 * h[i][k] * h[j][k] / K for k in range(K))

    mined, met = multi_similarity(h, y)
    assert met_edges(labels, met)
    expected = {
        "similarity": mean_over_pairs(
            n, lambda i, j: (cosine(h[i], h[j]) - label_target(y, i, j)) ** 2
        ),
        "classification": sum(
            (sigmoid(logits[i][c]) - y[i, c]) ** 2 for i in range(n) for c in range(4)
        ) / (n * 4),
        "importance": mean_over_pairs(
            n, lambda i, j: (weighted(i, j) - label_target(y, i, j)) ** 2
        ),
        "multi_similarity": 0.01 * mined,
        "contrast": 0.01 * sum(contrasts) / len(contrasts),
        "centre": 0.01 * centre_distance(centres),
        "bce": 1e-4 * bce([np.array([sum(x * c) for c in centres]) for x in h], y),
    }  # fmt: skip
    check(method.loss(batch), expected)


@CASES
@torch.no_grad()
def test_hiamh(feature_file: Path, labels: list[list[int]], training: bool) -> None:
    """Every term: METHODS.md, section 2; what it shares with VH-ABL, section 1."""
    method, batch = fused_method("hiamh_published", feature_file, labels, training)
    state, y = state_of(method), np.array(labels, dtype=float)
    h = fused_codes(state, batch, training)
    steps = [log1pexp(v) for v in state["theta"]]
    w = [sum(steps[k:]) for k in range(K)]  # each bit weighs more than the next
    mined, met = multi_similarity(h, y)
    assert met_edges(labels, met)

    def similarity(i: int, j: int) -> float:
        return sum(h[i][k] * w[k] * h[j][k] for k in range(K)) / sum(w)

    expected = {
        "similarity": mean_over_pairs(
            7, lambda i, j: (similarity(i, j) - label_target(y, i, j)) ** 2
        ),
        "centre": 0.01 * centre_distance(state["centres"]),
        "multi_similarity": 0.01 * mined,
    }
    check(method.loss(batch), expected)


# -- CMCL and PGHMH --------------------------------------------------------------------------------

LENGTHS, LONGEST = (6, 8), 10  # the longest is the auxiliary one
#: Every length with the factor of its terms
FACTORS = (*((k, 1.0) for k in LENGTHS), (LONGEST, 20.0))
ROWS = [2, 7, 0, 5, 3]  # the batch, of nine training items
TRAINING_LABELS = np.array(
    [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0],
     [0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=float,
)  # fmt: skip


def tower_config(
    recipe: str, folder: Path, width: int, *overrides: str, data: str = "mirflickr"
) -> Config:
    """A published recipe on a few pictures and tiny towers whose joint space has this width."""
    towers = folder / "joint.json"
    description = TINY_TOWERS | {"embed_dim": width, "quick_gelu": True}
    description["vision_cfg"] = TINY_TOWERS["vision_cfg"] | {"patch_size": 16}  # type: ignore[operator]
    write_pair_folder(folder / "pairs", items=20)
    towers.write_text(json.dumps(description), encoding="utf-8")
    return load(
        CONFIG_DIR / f"{recipe}.yaml",
        [
            f"data={data}", f"data.path={folder / 'pairs'}", "data.query=5", "data.train=9",
            f"data.class_names=[{','.join(COLOURS)}]", "device=cpu", f"encoder.model={towers}",
            "encoder.weights=", "encoder.words=12", "encoder.resize=0", "encoder.augment=false",
            f"bits=[{','.join(map(str, LENGTHS))}]", f"model.auxiliary={LONGEST}", *overrides,
        ],
    )  # fmt: skip


def tower_method(
    recipe: str, folder: Path, width: int, *overrides: str
) -> tuple[Any, Batch, Embeddings]:
    """That with random weights and memories, a batch of five pictures with captions, and what the
    towers make of them.
    """
    config = tower_config(recipe, folder, width, *overrides)
    data = load_data(config.data, config.encoder)
    torch.manual_seed(0)
    method: Any = build_method(config, data.spec)
    inputs = data.train.inputs(np.arange(5))
    made = vars(method.eval().embeddings(inputs)).items()
    seen = Embeddings(
        **{name: x if x is None or name == "word_mask" else x.double() for name, x in made}
    )
    method.encoder.of_batch = lambda _: seen  # what the towers make is given
    method.prepare(torch.from_numpy(TRAINING_LABELS))
    method.double()
    randomise(method, 7)
    rng = np.random.default_rng(11)
    for name, buffer in method.memory.named_buffers():
        if name.startswith("signs"):  # of an epoch ago: not those of the codes now
            buffer.copy_(torch.from_numpy(rng.choice([-1.0, 1.0], size=tuple(buffer.shape))))
        elif name != "labels":
            values = rng.normal(size=tuple(buffer.shape))
            values[[1, 6]] *= 60  # beyond where the likelihood is clamped
            buffer.copy_(torch.from_numpy(values))
    batch = Batch(inputs, torch.from_numpy(TRAINING_LABELS[ROWS]), torch.tensor(ROWS))
    return method, batch, seen


def hashed(state: State, features: list[Array], k: int) -> list[Array]:
    return [tanh_of(linear(state, f"heads.hash.{k}", f)) for f in features]


def decoded(state: State, h: list[Array], k: int) -> list[Array]:
    """k -> 128 -> 128: ReLU between, tanh at the end."""
    name = f"heads.decode.{k}"
    hidden = [relu(linear(state, f"{name}.0", x)) for x in h]
    return [tanh_of(linear(state, f"{name}.2", x)) for x in hidden]


def memory_with(state: State, view: str, k: int, h: list[Array]) -> Array:
    """The memory of a view where the batch's items have their latest codes."""
    memory = state[f"memory.{view}_{k}"].copy()
    for row, code in zip(ROWS, h, strict=True):
        memory[row] = code
    return memory


def clamped(memory: Array, h: list[Array]) -> int:
    return sum(abs(float(sum(a * x))) > 64 for a in memory for x in h)


def numpy_of(x: torch.Tensor | None) -> Array:
    assert x is not None
    return x.detach().numpy()


CMCL_HEADS = 2  # of a joint space of 128: D / 64


def cmcl_features(state: State, seen: Embeddings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Global features [B] and concepts [B][M] of both modalities, from what the towers give."""
    whole: dict[str, Any] = {}
    local: dict[str, Any] = {}
    words = [row[mask] for row, mask in
             zip(numpy_of(seen.words), numpy_of(seen.word_mask), strict=True)]  # fmt: skip
    assert len({len(row) for row in words}) > 1  # some texts are shorter than others
    pooled = {"image": numpy_of(seen.image), "text": numpy_of(seen.text)}
    for view, parts in {"image": list(numpy_of(seen.patches)), "text": words}.items():
        whole[view] = [residual_mlp(state, "shared", x) for x in pooled[view]]
        name, local[view] = f"attend.{view}", []
        queries = [layer_norm(state, "norm_concepts", c) for c in state["concepts"]]
        for tokens in parts:
            tokens = [layer_norm(state, f"{name}.norm_parts", x) for x in tokens]
            found = multihead(state, f"{name}.attention", queries, tokens, CMCL_HEADS)
            local[view].append(clip_block(state, f"{name}.block", found, CMCL_HEADS))
    return whole, local


@torch.no_grad()
def test_cmcl(tmp_path: Path) -> None:
    """Every term: METHODS.md, section 3, with reconstruction, decoder and concepts as published."""
    method, batch, seen = tower_method("cmcl_published", tmp_path, 128, "model.concepts=3")
    state = state_of(method)
    whole, local = cmcl_features(state, seen)
    similar = share_a_label(TRAINING_LABELS, TRAINING_LABELS[ROWS])
    within = [info_nce(i, t) for i, t in zip(local["image"], local["text"], strict=True)]
    expected = {
        "contrast": 1 * 5 * info_nce(whole["image"], whole["text"]),
        "concepts": 1 * sum(within) / len(within),
        **dict.fromkeys(("inter", "intra", "quantisation", "reconstruction"), 0.0),
    }
    features = {
        view: [f + sum(c) / len(c) for f, c in zip(whole[view], local[view], strict=True)]
        for view in whole
    }
    targets = [state[f"memory.signs_{LONGEST}"][row] for row in ROWS]
    beyond = 0
    for k, factor in FACTORS:
        h = {view: hashed(state, features[view], k) for view in features}
        memory = {view: memory_with(state, view, k, h[view]) for view in h}
        common = [state[f"memory.signs_{k}"][row] for row in ROWS]
        for view, other in (("image", "text"), ("text", "image")):
            beyond += clamped(memory[other], h[view])
            expected["inter"] += factor * 5 * likelihood(memory[other], h[view], similar)
            expected["intra"] += factor * 0.005 * likelihood(memory[view], h[view], similar)
            expected["quantisation"] += factor * 1 * squared_distance(h[view], common) / k
            if k != LONGEST:
                rebuilt = decoded(state, h[view], k)
                expected["reconstruction"] += 20 * 0.001 * squared_distance(rebuilt, targets)
    assert beyond
    check(method.loss(batch), expected)


@torch.no_grad()
def test_targets_of_cmcl_are_the_signs_of_both_memories_renewed_each_epoch(tmp_path: Path) -> None:
    """B = sign(F_I + F_T), 0 counting as +1; in an epoch it stays while the memory changes."""
    method, batch, seen = tower_method("cmcl_published", tmp_path, 128, "model.concepts=3")
    method.memory.codes("image", 6)[8] = 0
    method.memory.codes("text", 6)[8] = 0
    state = state_of(method)
    whole, local = cmcl_features(state, seen)
    method.loss(batch)
    for k, _ in FACTORS:
        assert np.array_equal(method.memory.signs(k).numpy(), state[f"memory.signs_{k}"])
    method.after_epoch()
    for k, _ in FACTORS:
        total = np.zeros((9, k))
        for view in ("image", "text"):
            features = [f + sum(c) / len(c) for f, c in zip(whole[view], local[view], strict=True)]
            total += memory_with(state, view, k, hashed(state, features, k))
        signs = [[1.0 if value >= 0 else -1.0 for value in row] for row in total]
        assert np.array_equal(method.memory.signs(k).numpy(), signs)
        assert not np.array_equal(signs, state[f"memory.signs_{k}"])


def pghmh_features(
    state: State, seen: Embeddings, truth: Array, told: Sequence[bool]
) -> dict[str, list[Array]]:
    """Logits of the classes, and image, text and prompt after fusion, from what the towers give."""
    found: dict[str, list[Array]] = {name: [] for name in ("logits", "image", "text", "prompt")}
    images, texts = numpy_of(seen.image), numpy_of(seen.text)
    words, masks = numpy_of(seen.words), numpy_of(seen.word_mask)
    assert len({int(mask.sum()) for mask in masks}) > 1  # some texts are shorter than others
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        # classes that image and text let expect
        both = layer_norm(state, "classifier.0", np.concatenate([image, text]))
        logits = linear(state, "classifier.3", gelu(linear(state, "classifier.1", both)))
        shares = truth[i] if told[i] else np.array([sigmoid(v) for v in logits])
        name = np.zeros(words.shape[2])
        for c, share in enumerate(shares):
            if sum(shares):
                name += share / sum(shares) * state["names"][c]
        # words and prompt, the name its last token, through two blocks of the text tower
        own = list(words[i][masks[i]])
        x = [*own, *state["context"][:-1], state["context"][-1] + name]
        assert len(x) == len(own) + 4 + 1
        for block in range(2):
            x = clip_block(state, f"reader.{block}", x, 2, ("c_fc", "c_proj"))
        x = [layer_norm(state, "norm", token) for token in x]
        end, guide = x[len(own) - 1], x[-1]
        before = [image, *(linear(state, "text_projection", v) for v in (end * guide, guide))]
        # fusion: attention, response norm over the tokens, half a residual, a Transformer layer
        tokens = [layer_norm(state, "fusion.norm", token) for token in before]
        attended = multihead(state, "fusion.attention", tokens, tokens, 4)
        strength = np.array([math.sqrt(sum(t[j] ** 2 for t in attended)) for j in range(12)])
        response = strength / (sum(strength) / 12 + 1e-6)
        scale, shift = state["fusion.response.scale"], state["fusion.response.shift"]
        y = [
            t + scale * t * response + shift + b / 2 for t, b in zip(attended, before, strict=True)
        ]
        z = [layer_norm(state, "fusion.layer.norm1", token) for token in y]
        z = multihead(state, "fusion.layer.self_attn", z, z, 4)
        y = [a + b for a, b in zip(y, z, strict=True)]
        fused = []
        for token in y:
            hidden = linear(
                state, "fusion.layer.linear1", layer_norm(state, "fusion.layer.norm2", token)
            )
            fused.append(token + linear(state, "fusion.layer.linear2", gelu(hidden)))
        # each keeps half of itself
        kept = [0.5 * a + 0.5 * b for a, b in zip(before, fused, strict=True)]
        for part, value in zip(("logits", "image", "text", "prompt"), (logits, *kept), strict=True):
            found[part].append(value)
    return found


#: What decides whether the prompt of an item names its true classes: half do on average
DRAWS = [0.49, 0.51, 0.9, 0.3, 0.1]


def pghmh_method(folder: Path) -> tuple[Any, Batch, Embeddings]:
    return tower_method("pghmh_published", folder, 12)


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have DRAWS drawn; for which items they name the true classes."""
    draws = torch.tensor(DRAWS, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: draws.reshape(shape))
    return [draw < 0.5 for draw in DRAWS]


@torch.no_grad()
def test_pghmh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every term: METHODS.md, section 5, with fusion and alignment as published."""
    method, batch, seen = pghmh_method(tmp_path)
    told = drawn(monkeypatch)
    state, y = state_of(method), TRAINING_LABELS[ROWS]
    assert told[4] and not y[4].any()  # no class to name
    found = pghmh_features(state, seen, y, told)
    f = [image + text for image, text in zip(found["image"], found["text"], strict=True)]
    similar = share_a_label(TRAINING_LABELS, y)
    expected = {
        "alignment": 5 * info_nce([residual_mlp(state, "align", x) for x in f], found["prompt"]),
        "contrast": 5 * info_nce(found["image"], found["text"]),
        "classes": bce(found["logits"], y),
        "likelihood": 0.0,
        "reconstruction": 0.0,
    }
    targets = [state[f"memory.signs_{LONGEST}"][row] for row in ROWS]
    beyond = 0
    for k, factor in FACTORS:
        h = hashed(state, f, k)
        memory = memory_with(state, "fused", k, h)
        beyond += clamped(memory, h)
        expected["likelihood"] += factor * 5.005 * likelihood(memory, h, similar)
        if k != LONGEST:
            error = squared_distance(decoded(state, h, k), targets)
            expected["reconstruction"] += 20 * 0.005 * error
    assert beyond
    check(method.loss(batch), expected)
    for k, _ in FACTORS:
        assert np.array_equal(method.memory.signs(k).numpy(), state[f"memory.signs_{k}"])
    method.after_epoch()
    for k, _ in FACTORS:
        latest = memory_with(state, "fused", k, hashed(state, f, k))
        signs = [[1.0 if value >= 0 else -1.0 for value in row] for row in latest]
        assert np.array_equal(method.memory.signs(k).numpy(), signs)


@torch.no_grad()
def test_codes_of_pghmh_come_of_expected_classes(tmp_path: Path) -> None:
    """Relaxed codes of f itself; no true class is named."""
    method, batch, seen = pghmh_method(tmp_path)
    state = state_of(method)
    found = pghmh_features(state, seen, TRAINING_LABELS[ROWS], [False] * 5)
    f = [image + text for image, text in zip(found["image"], found["text"], strict=True)]
    for k, views in method.relax_lengths(batch.inputs, LENGTHS).items():
        np.testing.assert_allclose(views["fused"].numpy(), hashed(state, f, k), rtol=CLOSE)


@torch.no_grad()
def test_the_prompt_of_pghmh_begins_with_the_end_of_the_text_tower(tmp_path: Path) -> None:
    """Its blocks, norm and projection are copies; they are trained apart from the tower."""
    config = tower_config("pghmh_published", tmp_path, 12)
    method: Any = build_method(config, load_data(config.data, config.encoder).spec)
    clip = dict(method.encoder.clip.named_parameters())
    for block, original in enumerate((1, 2)):  # the last two of three
        for name, copied in method.reader[block].named_parameters():
            source = clip[f"transformer.resblocks.{original}.{name}"]
            assert torch.equal(copied, source) and copied is not source
    for name, copied in method.norm.named_parameters():
        assert torch.equal(copied, clip[f"ln_final.{name}"])
    assert torch.equal(method.text_projection.weight, clip["text_projection"].T)


# -- HQ --------------------------------------------------------------------------------------------

HQ_ITEMS, HQ_ROWS = 12, [4, 0, 7, 2, 9, 11]


def hq_config(folder: Path) -> Config:
    """HQ as published on a few small arrays as its release has them."""
    arrays = picture_arrays(train=HQ_ITEMS)
    rng = np.random.default_rng(2)
    for name in ("train_image_label", "train_text_label"):  # of images and of texts apart
        arrays[name] = (rng.random((HQ_ITEMS, 3)) < 0.4).astype(np.int64)
        arrays[name][0] = 0  # no class
    return load(
        CONFIG_DIR / "hq_published.yaml",
        ["data=mirflickr", "protocol=own", f"data.path={write_arrays(folder / 'a', arrays)}",
         "data.class_names=[]", "encoder.weights=", f"bits=[6,{K}]", "model.dim=10", "device=cpu",
         "model.centres=5"],
    )  # fmt: skip


def hq_method(folder: Path) -> tuple[Any, Batch, list[Array]]:
    """That with random weights, six rows of images and texts, and what AlexNet's last convolution
    gives for the pictures.
    """
    config = hq_config(folder)
    data = load_data(config.data, config.encoder)
    torch.manual_seed(0)
    method: Any = build_method(config, data.spec)
    method.encoder.fit(data.train, config.data.scale)
    method.prepare(torch.from_numpy(data.train.labels).double())
    method.double().eval()
    randomise(method, 13, but="encoder.network.features")
    rows = np.array(HQ_ROWS)
    given = data.train.take(rows)
    words = given.text[:]
    assert set(np.unique(words)) == {0, 1}  # raw words
    inputs = Inputs(given.inputs().image, torch.from_numpy(words).double())
    of_images, of_texts = (
        torch.from_numpy(y).double() for y in (given.labels, given.labels_of_texts)
    )
    seen: list[Array] = []
    hook = method.encoder.network.avgpool.register_forward_hook(
        lambda _, __, out: seen.extend(out.flatten(1).numpy())
    )
    method.embeddings(inputs)
    hook.remove()
    return method, Batch(inputs, of_images, torch.tensor(HQ_ROWS), of_texts), seen


def hq_features(
    state: State, batch: Batch, pictures: list[Array], k: int
) -> tuple[list[Array], list[Array]]:
    """Features of images, fc6 and fc7 with ReLU -> k, and of texts, words -> hidden, ReLU -> k."""
    x = pictures
    for layer in (1, 4):
        x = [relu(linear(state, f"encoder.network.classifier.{layer}", item)) for item in x]
    assert batch.inputs.text is not None
    words = batch.inputs.text.numpy()
    hidden = [relu(linear(state, "branches.text.0", item)) for item in words]
    return (
        [linear(state, f"features.image.{k}", item) for item in x],
        [linear(state, f"features.text.{k}", item) for item in hidden],
    )


@torch.no_grad()
@pytest.mark.usefixtures("tiny_alexnet")
@pytest.mark.parametrize("begun", [False, True])
def test_hq(tmp_path: Path, begun: bool) -> None:
    """Every term: METHODS.md, section 4, with sums as published; before and with dictionaries."""
    method, batch, pictures = hq_method(tmp_path)
    rng = np.random.default_rng(17)
    if begun:
        method.begun.fill_(1)
        for k in (6, K):
            for name, values in (
                ("centres", rng.normal(size=(1, 5, k))),
                ("codes", rng.integers(5, size=(2 * HQ_ITEMS, 1))),
            ):
                method.get_buffer(f"{name}_{k}").copy_(torch.from_numpy(values))
    state, n = state_of(method), len(HQ_ROWS)
    of_images, of_texts = batch.labels.numpy(), batch.labels_of_texts.numpy()
    similar = [float(sum(of_images[i] * of_texts[i]) > 0) for i in range(n)]
    assert set(similar) == {0, 1}
    expected = dict.fromkeys(("similarity", "hash", "balance", "quantisation"), 0.0)
    for k in (6, K):
        f, g = hq_features(state, batch, pictures, k)
        products = [float(sum(a * b)) for a, b in zip(f, g, strict=True)]
        expected["similarity"] += (
            30
            * sum(log1pexp(s) - alike * s for s, alike in zip(products, similar, strict=True))
            / n
        )
        for side in (f, g):  # MSE(b_f, f) + MSE(b_g, g)
            squares = [(x - (1 if x >= 0 else -1)) ** 2 for row in side for x in row]
            expected["hash"] += 0.6 * sum(squares) / len(squares)
        both = f + g
        means = [sum(row[j] for row in both) / len(both) for j in range(k)]
        expected["balance"] += 1e-4 * sum(mean**2 for _ in both for mean in means)
        if begun:  # images first
            rows = [*HQ_ROWS, *(row + HQ_ITEMS for row in HQ_ROWS)]
            for x, row in zip(both, rows, strict=True):
                centre = state[f"centres_{k}"][0][state[f"codes_{k}"][row, 0]]
                expected["quantisation"] += 1e-4 * float(sum((x - centre) ** 2))
    found = method.loss(batch)
    if not begun:
        assert found.pop("quantisation").item() == 0
        del expected["quantisation"]
    check(found, expected)


def closed_form(x: Array, codes: Array, count: int) -> Array:
    """(h^T h + 0.001 I)^-1 h^T x with one dictionary: sums of vectors over their number + 0.001."""
    centres = np.zeros((count, x.shape[1]))
    for j in range(count):
        own = [row for row, code in zip(x, codes, strict=True) if code == j]
        centres[j] = sum(own) / (len(own) + 0.001) if own else 0
    return centres


def nearest(x: Array, centres: Array) -> Array:
    return np.array([min(range(len(centres)), key=lambda j: sum((row - centres[j]) ** 2))
                     for row in x])  # fmt: skip


@torch.no_grad()
@pytest.mark.usefixtures("tiny_alexnet")
def test_centres_of_hq_follow_the_features_of_each_epoch(tmp_path: Path) -> None:
    """No dictionary before two epochs; then codes are nearest centres, centres in closed form."""
    method, batch, pictures = hq_method(tmp_path)
    method.loss(batch)
    method.after_epoch()
    assert method.begun == 0 and not method.codebook(6).any()
    method.after_epoch()
    assert method.begun == 1 and method.codebook(6).any()
    rng = np.random.default_rng(19)
    method.codebook(6).copy_(torch.from_numpy(rng.normal(size=(1, 5, 6))))
    method.loss(batch)
    state = state_of(method)
    seen = np.zeros((2 * HQ_ITEMS, 6))  # images first; of items that no batch had, nothing
    for offset, side in zip((0, HQ_ITEMS), hq_features(state, batch, pictures, 6), strict=True):
        for row, x in zip(HQ_ROWS, side, strict=True):
            seen[offset + row] = x
    method.after_epoch()
    codes = nearest(seen, state["centres_6"][0])
    assert len(set(codes)) > 2
    centres = closed_form(seen, codes, 5)
    np.testing.assert_allclose(method.codebook(6)[0].numpy(), centres, rtol=CLOSE, atol=1e-12)


def test_codes_and_centres_of_two_dictionaries() -> None:
    """Iterated conditional modes and closed form with M = 2: METHODS.md, section 4."""
    rng = np.random.default_rng(23)
    x, centres = rng.normal(size=(30, 4)), rng.normal(size=(2, 3, 4))
    begun = rng.integers(3, size=(30, 2))
    codes = begun.copy()
    for _ in range(quantisation.SWEEPS):
        for m in (0, 1):  # the best centre of one, that of the other held
            for i, row in enumerate(x):
                rest = row - centres[1 - m][codes[i, 1 - m]]
                codes[i, m] = min(range(3), key=lambda j: sum((rest - centres[m][j]) ** 2))
    found = quantisation.assign(*(torch.from_numpy(part) for part in (x, centres, begun)))
    assert np.array_equal(found.numpy(), codes) and not np.array_equal(codes, begun)
    h = np.zeros((30, 6))
    for i, (first, second) in enumerate(codes):
        h[i, first] = h[i, 3 + second] = 1
    expected = np.linalg.inv(h.T @ h + 0.001 * np.eye(6)) @ h.T @ x
    solved = quantisation.solve(torch.from_numpy(x), torch.from_numpy(codes), 3)
    np.testing.assert_allclose(solved.numpy().reshape(6, 4), expected, rtol=1e-7)


# -- first weights ---------------------------------------------------------------------------------


def moments(x: torch.Tensor) -> tuple[float, float]:
    values = x.detach().numpy().ravel()
    mean = float(sum(values)) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def test_first_weights(feature_file: Path, tmp_path: Path) -> None:
    """Centres and concepts from N(0, 1), HIAMH's weights from N(.25, 1/K^2), memories N(0, 1)."""
    torch.manual_seed(0)
    for recipe in ("vh_abl_published", "hiamh_published"):
        given = ["data=wiki", f"data.path={feature_file}", "data.class_names=[]", "bits=[512]"]
        config = load(CONFIG_DIR / f"{recipe}.yaml", given)
        fused: Any = build_method(config, load_data(config.data).spec)
        assert moments(fused.centres) == pytest.approx((0, 1), abs=0.06)
        if recipe == "hiamh_published":
            assert moments(fused.theta) == pytest.approx((0.25, 1 / 512), abs=4e-4)
    config = tower_config("cmcl_published", tmp_path, 32)
    cmcl: Any = build_method(config, load_data(config.data, config.encoder).spec)
    assert cmcl.concepts.shape == (64, 32)
    assert moments(cmcl.concepts) == pytest.approx((0, 1), abs=0.06)
    cmcl.prepare(torch.ones(900, 4))
    for view in ("image", "text"):
        assert moments(cmcl.memory.codes(view, 6)) == pytest.approx((0, 1), abs=0.06)


# -- optimisers ------------------------------------------------------------------------------------


def step_by_step(config: Config, gradients: list[Array], first: Array) -> list[Array]:
    """A parameter after each update by the recipe's optimiser, from the values in METHODS.md."""
    name = config.method
    p, m, v = first.copy(), np.zeros_like(first), np.zeros_like(first)
    lr, path = 1e-3, []
    beta1, beta2, eps, decay = (
        (0.9, 0.98, 1e-6, 0.01) if name in ("cmcl", "pghmh") else (0.9, 0.999, 1e-8, 0.0)
    )
    for t, g in enumerate(gradients, 1):
        if name == "hq":
            m = 0.2 * m + g if t > 1 else g
            p = p - lr * m
        else:
            if name in ("cmcl", "pghmh"):  # each tensor alone
                norm = math.sqrt(float(np.sum(g**2)))
                g = g if norm <= 1 else g / (norm + 1e-6)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            update = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
            p = p - lr * (update + decay * p)
        path.append(p.copy())
    return path


PUBLISHED = ("vh_abl", "hiamh", "cmcl", "pghmh", "hq")


@pytest.mark.parametrize("name", PUBLISHED)
def test_updates(name: str) -> None:
    """Adam; AdamW with BertAdam's betas, eps and decay, each tensor clipped to norm 1; SGD."""
    config = load(CONFIG_DIR / f"{name}_published.yaml", ["data=mirflickr", "protocol=own"])
    optim = replace(config.optim, lr_scale={})
    rng = np.random.default_rng(29)
    first = [rng.normal(size=(3, 4)), rng.normal(size=5)]
    # one far beyond norm 1, one that is small, and a small epsilon that counts
    gradients = [[3 * rng.normal(size=(3, 4)), 1e-5 * rng.normal(size=5)] for _ in range(3)]
    parameters = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in first]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    optimizer = build_optimizer([{"params": parameters}], named, optim)
    expected = [step_by_step(config, [g[i] for g in gradients], first[i]) for i in range(2)]
    for step, now in enumerate(gradients):
        for p, g in zip(parameters, now, strict=True):
            p.grad = torch.from_numpy(g.copy())
        clip_gradients(parameters, optim)
        optimizer.step()
        for i, p in enumerate(parameters):
            np.testing.assert_allclose(p.detach().numpy(), expected[i][step], rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules(name: str) -> None:
    """Warm-up over 5 % of the steps, then (1 + cos(pi x)) / 2 of all steps; else constant."""
    config = load(CONFIG_DIR / f"{name}_published.yaml", ["data=mirflickr", "protocol=own"])
    optim = replace(config.optim, lr_scale={})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([{"params": [parameter]}], [("p", parameter)], optim)
    for step in range(200):
        x = step / 200
        rising = name in ("cmcl", "pghmh")
        factor = (x / 0.05 if x < 0.05 else 0.5 * (1 + math.cos(math.pi * x))) if rising else 1
        set_rate(optimizer, optim, x)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor, rel=1e-12, abs=0)


def rates(method: HashingMethod, config: Config) -> dict[str, float]:
    """The learning rate of each parameter; 0 where it is not trained."""
    named = dict(method.named_parameters())
    optimizer = build_optimizer(method.param_groups(), named.items(), config.optim)
    given = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: given[id(p)] if p.requires_grad else 0.0 for name, p in named.items()}


def tower_part(name: str) -> str:
    """Which part of CLIP a parameter belongs to: a block, or its whole name."""
    return name.split("resblocks.")[1].split(".")[0] if "resblocks." in name else name


def test_rates_of_pghmh(tmp_path: Path) -> None:
    """Heads 1e-3, fusion 1e-4, last two blocks of both towers and prompt 1e-5, ends frozen."""
    config = tower_config("pghmh_published", tmp_path, 12)
    method = build_method(config, load_data(config.data, config.encoder).spec)
    found = rates(method, config)
    expected = {}
    for name in found:
        if name.startswith("encoder."):
            expected[name] = 1e-5 if tower_part(name) in ("1", "2") else 0  # of three blocks
        elif name.startswith(("norm.", "text_projection.")):
            expected[name] = 0
        elif name.startswith("fusion."):
            expected[name] = 1e-4
        elif name.startswith("reader."):
            expected[name] = 1e-5
        else:
            expected[name] = 1e-3
    assert found == pytest.approx(expected, rel=CLOSE, abs=0)
    trained = {rate for rate in found.values() if rate}
    assert sorted(trained) == pytest.approx([1e-5, 1e-4, 1e-3])


@pytest.mark.parametrize(("data", "rate"), [("mirflickr", 1e-3), ("nuswide", 2e-3), ("coco", 2e-3)])
def test_rates_of_cmcl(tmp_path: Path, data: str, rate: float) -> None:
    """Both towers whole at 1e-6, all else at the data set's rate."""
    config = tower_config("cmcl_published", tmp_path, 32, data=data)
    method = build_method(config, load_data(config.data, config.encoder).spec)
    found = rates(method, config)
    del found["encoder.clip.logit_scale"]  # no loss has it
    expected = {name: 1e-6 if name.startswith("encoder.") else rate for name in found}
    assert found == pytest.approx(expected, rel=CLOSE, abs=0)


@pytest.mark.usefixtures("tiny_alexnet")
def test_rates_of_hq(tmp_path: Path) -> None:
    """5e-4 for AlexNet with the image's last layer, 1e-3 for the text's layers."""
    config = hq_config(tmp_path)
    method = build_method(config, load_data(config.data, config.encoder).spec)
    found = rates(method, config)
    expected = {
        name: 5e-4 if name.startswith(("encoder.", "features.image.")) else 1e-3 for name in found
    }
    assert found == pytest.approx(expected, rel=CLOSE, abs=0)


def test_the_schedule_runs_over_all_steps(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is the number of finished updates over that of all, 0 at the first."""
    given = ["data=wiki", f"data.path={feature_file}", "data.class_names=[]", "bits=[8]",
             "device=cpu", "codes=none", "epochs=3", "batch_size=15", "model.dim=8",
             "encoder.name=features", "validation.fraction=0", "out=run"]  # fmt: skip
    config = load(CONFIG_DIR / "cmcl_published.yaml", given)
    seen: list[float] = []
    monkeypatch.setattr(trainer, "set_rate", lambda _, __, progress: seen.append(progress))
    trainer.Trainer(config, load_data(config.data), False).run()
    assert seen == pytest.approx([step / 12 for step in range(12)])


# -- recipes ---------------------------------------------------------------------------------------

BITS = {"bits": [16, 32, 64, 128]}
BERT_ADAM = {
    "optim.name": "adamw", "optim.betas": [0.9, 0.98], "optim.eps": 1e-6,
    "optim.weight_decay": 0.01, "optim.clip": 1, "optim.clip_per_tensor": True,
    "optim.schedule": "cosine", "optim.warmup": 0.05, "optim.averaging": 0, "batch_size": 128,
}  # fmt: skip
FUSED = {
    **BITS, "seed": 2021, "epochs": 140, "batch_size": 1024, "data.scale": "none",
    "optim.name": "adam", "optim.lr": 1e-3, "optim.weight_decay": 0, "optim.clip": 0,
    "optim.schedule": "constant", "optim.warmup": 0, "optim.averaging": 0, "optim.lr_scale": {},
    "encoder.name": "features", "model.target": "sigmoid", "model.centres": "raw",
    "model.net.members": 1, "model.net.image_hidden": 2048, "model.net.text_hidden": 1024,
    "model.net.heads": 4, "model.net.activation": "tanh", "model.net.modality_dropout": 0,
    "model.net.joint_hidden": 0, "model.net.fusion_norm": False, "model.net.prototypes": True,
    "model.net.network": "deep", "model.weights.similarity": 1, "model.weights.centre": 0.01,
    "model.weights.multi_similarity": 0.01, "model.weights.nested": 0,
    "model.weights.decorrelation": 0,
}  # fmt: skip
VH_ABL = {
    **FUSED, "model.weights.classification": 1, "model.weights.contrast": 0.01,
    "model.weights.bce": 1e-4, "model.weights.nested_classes": 0,
}  # fmt: skip
HIAMH = {**FUSED, "model.weights.contrast": 0}
CMCL = {
    **BITS, **BERT_ADAM, "seed": 1, "data.split_seed": 1, "encoder.name": "clip",
    "encoder.model": "ViT-B-32-quickgelu", "encoder.tune": "all", "encoder.lr": 1e-6,
    "encoder.words": 32, "encoder.resize": 0, "encoder.squeeze": False, "encoder.augment": False,
    "model.blocks": 2, "model.dropout": 0.5, "model.concepts": 64, "model.auxiliary": 128,
    "model.temperature": 0.07, "model.weights.inter": 5, "model.weights.intra": 0.005,
    "model.weights.quantisation": 1, "model.weights.contrast": 5, "model.weights.concepts": 1,
    "model.weights.auxiliary": 20,
}  # fmt: skip
PGHMH = {
    **BITS, **BERT_ADAM, "seed": 1814, "data.split_seed": 1814, "epochs": 100, "optim.lr": 1e-3,
    "validation.patience": 10, "validation.every": 1, "encoder.name": "clip",
    "encoder.model": "ViT-B-16-quickgelu", "encoder.weights": "metaclip_fullcc",
    "encoder.tune": "2", "encoder.tune_ends": False, "encoder.words": 77, "encoder.resize": 256,
    "encoder.augment": True, "data.train": 10000, "model.layers": 2, "model.blocks": 2,
    "model.block_dropout": 0.5, "model.auxiliary": 128, "model.temperature": 0.07,
    "model.truth": 0.5, "model.modality_dropout": 0, "model.weights.likelihood": 5.005,
    "model.weights.alignment": 5, "model.weights.contrast": 5,
    "model.weights.reconstruction": 0.005, "model.weights.auxiliary": 20,
}  # fmt: skip
HQ = {
    **BITS, "batch_size": 50, "data.scale": "none", "optim.name": "sgd", "optim.momentum": 0.2,
    "optim.lr": 1e-3, "optim.schedule": "constant", "optim.weight_decay": 0, "optim.clip": 0,
    "encoder.name": "cnn", "encoder.model": "alexnet", "encoder.tune": "all", "encoder.lr": 5e-4,
    "encoder.side": 227, "encoder.standardise": False, "model.branches": "plain",
    "model.dim": 4096, "model.pairs": "rows", "model.dictionaries": 1, "model.centres": 2**7,
    "model.begin": 2, "model.weights.similarity": 30, "model.weights.hash": 0.6,
    "model.weights.balance": 1e-4, "model.weights.quantisation": 1e-4,
}  # fmt: skip
NARROW = {"model.net.dim": 128}
TABLE: dict[tuple[str, str], dict[str, Any]] = {
    ("vh_abl", "mirflickr"): {**VH_ABL, "model.net.dim": 256, "model.net.dropout": 0.01},
    ("vh_abl", "nuswide"): {**VH_ABL, **NARROW, "model.net.dropout": 0.4},
    ("vh_abl", "coco"): {**VH_ABL, **NARROW, "model.net.dropout": 0.5},
    ("hiamh", "mirflickr"): {**HIAMH, "model.net.dim": 256, "model.net.dropout": 0.01},
    ("hiamh", "nuswide"): {**HIAMH, **NARROW, "model.net.dropout": 0.4},
    ("hiamh", "coco"): {**HIAMH, **NARROW, "model.net.dropout": 0.5},
    ("cmcl", "mirflickr"): {
        **CMCL, "epochs": 30, "optim.lr": 1e-3, "model.weights.reconstruction": 0.001,
        "data.query": 2000, "data.train": 10000,
    },
    ("cmcl", "nuswide"): {
        **CMCL, "epochs": 10, "optim.lr": 2e-3, "model.weights.reconstruction": 0.001,
        "data.query": 2100, "data.train": 10500,
    },
    ("cmcl", "coco"): {
        **CMCL, "epochs": 30, "optim.lr": 2e-3, "model.weights.reconstruction": 0.005,
        "data.query": 5000, "data.train": 10000,
    },
    ("pghmh", "mirflickr"): {**PGHMH, "data.query": 2000},
    ("pghmh", "nuswide"): {**PGHMH, "data.query": 2000},
    ("pghmh", "coco"): {**PGHMH, "data.query": 5000},
    ("hq", "mirflickr"): HQ,
    ("hq", "nuswide"): HQ,
}  # fmt: skip


@pytest.mark.parametrize("protocol", ["own", "common"])
@pytest.mark.parametrize(("name", "data"), TABLE)
def test_values_of_recipes(name: str, data: str, protocol: str) -> None:
    """METHODS.md's values, on each method's own data; on a split in common those of training."""
    given = [f"data={data}", f"protocol={protocol}"]
    config = load(CONFIG_DIR / f"{name}_published.yaml", given)
    assert config.method == name and config.variant == "published"
    found, expected = {}, {}
    for key, value in TABLE[name, data].items():
        if protocol == "common" and key.startswith(("data.", "model.net.")):
            continue
        part: Any = config
        for word in key.split("."):
            part = getattr(part, word)
        found[key], expected[key] = part, value
    assert found == expected
