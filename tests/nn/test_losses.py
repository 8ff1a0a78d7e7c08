"""Every loss equals plain loops over pairs and items, and is defined where no pair is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vhabl.nn import losses

Rows = list[list[float]]

# One class, two, none and all of them; classes 0 and 2 have two items that share nothing else.
LABELS = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]]
BITS = 4
LENGTHS = [1, 3, 4]


@dataclass(frozen=True)
class Case:
    """A batch with all that any loss takes."""

    h: Tensor  # (B, K)
    y: Tensor  # (B, C)
    centres: Tensor  # (C, K)
    w: Tensor  # (B, K)
    weight: Tensor  # (C, K)
    bias: Tensor  # (C,)


def make_case(labels: list[list[int]], dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, classes = len(labels), len(labels[0])
    return Case(
        h=torch.tanh(normal(batch, BITS)),
        y=torch.tensor(labels, dtype=dtype),
        centres=normal(classes, BITS),
        w=normal(batch, BITS).exp(),
        weight=normal(classes, BITS),
        bias=normal(classes),
    )


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / length if length else 0.0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop_target(y: Rows, kind: str) -> Rows:
    if kind == "sigmoid":
        return [[2 * sigmoid(dot(a, b)) - 1 for b in y] for a in y]
    return [[2 * cosine(a, b) - 1 for b in y] for a in y]


def loop_similarity(h: Rows, target: Rows) -> float:
    return mean(
        [(cosine(h[i], h[j]) - target[i][j]) ** 2 for i in range(len(h)) for j in range(len(h))]
    )


def loop_weighted_similarity(h: Rows, w: Rows, target: Rows) -> float:
    errors = []
    for i, a in enumerate(h):
        for j, b in enumerate(h):
            bits = [(w[i][k] + w[j][k]) / 2 * a[k] * b[k] for k in range(len(a))]
            errors.append((mean(bits) - target[i][j]) ** 2)
    return mean(errors)


def loop_nested_similarity(h: Rows, target: Rows) -> float:
    return mean([loop_similarity([row[:m] for row in h], target) for m in LENGTHS])


def loop_class_shares(logits: Rows, y: Rows) -> float:
    values = []
    for row, own in zip(logits, y, strict=True):
        total = sum(math.exp(x) for x in row)
        parts = [-math.log(math.exp(row[c]) / total) for c in range(len(own)) if own[c]]
        values.append(mean(parts) if parts else 0.0)
    return mean(values)


def loop_nested_classification(h: Rows, weight: Rows, bias: list[float], y: Rows) -> float:
    values = []
    for m in LENGTHS:
        scale = math.sqrt(BITS / m)
        logits = [
            [scale * dot(row[:m], v[:m]) + b for v, b in zip(weight, bias, strict=True)]
            for row in h
        ]
        values.append(loop_class_shares(logits, y))
    return mean(values)


def loop_multi_similarity(
    h: Rows, y: Rows, t: float = 0.5, margin: float = 0.1, a: float = 2.0, b: float = 40.0
) -> float:
    """The releases' loop over anchors; an anchor without both kinds of pairs adds nothing."""
    total = 0.0
    for i, anchor in enumerate(h):
        s = [cosine(anchor, other) for other in h]
        shares = [dot(y[i], other) > 0 for other in y]
        positives = [x for x, share in zip(s, shares, strict=True) if share and x < 1 - 1e-5]
        if not positives:
            continue
        negatives = [x for x, share in zip(s, shares, strict=True) if not share]
        negatives = [x for x in negatives if x + margin > min(positives)]
        if not negatives:
            continue
        positives = [x for x in positives if x - margin < max(negatives)]
        if not positives:
            continue
        total += math.log(1 + sum(math.exp(-a * (x - t)) for x in positives)) / a
        total += math.log(1 + sum(math.exp(b * (x - t)) for x in negatives)) / b
    return total / len(h)


def loop_classification(logits: Rows, y: Rows) -> float:
    return mean(
        [
            (sigmoid(x) - own) ** 2
            for row, labels in zip(logits, y, strict=True)
            for x, own in zip(row, labels, strict=True)
        ]
    )


def loop_centre_contrast(h: Rows, centres: Rows, y: Rows) -> float:
    items = []
    for row, own in zip(h, y, strict=True):
        e = [math.exp(dot(row, c) / len(row)) for c in centres]
        others = sum(e[c] for c in range(len(own)) if not own[c])
        terms = [-math.log(e[c] / (e[c] + others)) for c in range(len(own)) if own[c]]
        if terms:
            items.append(mean(terms))
    return mean(items) if items else 0.0


def loop_centre_bce(h: Rows, centres: Rows, y: Rows) -> float:
    values = []
    for row, own in zip(h, y, strict=True):
        for c, centre in enumerate(centres):
            p = sigmoid(dot(row, centre))
            values.append(-math.log(p if own[c] else 1 - p))
    return mean(values)


def loop_centre_separation(centres: Rows) -> float:
    distances = [math.dist(centres[i], centres[j]) for i in range(len(centres)) for j in range(i)]
    return -(mean(distances) + min(distances)) / len(centres[0])


def loop_decorrelation(h: Rows) -> float:
    bits = range(len(h[0]))
    products = [mean([row[k] * row[m] for row in h]) ** 2 for k in bits for m in bits if k != m]
    return mean(products) + mean([mean([row[k] for row in h]) ** 2 for k in bits])


def loop_likelihood(memory: Rows, h: Rows, y: Rows) -> float:
    values = []
    for row, own in zip(memory, y, strict=True):
        for code, label in zip(h, y, strict=True):
            s = max(-64.0, min(64.0, dot(row, code))) / 2
            values.append(math.log(1 + math.exp(s)) - (s if dot(own, label) > 0 else 0.0))
    return mean(values)


def loop_info_nce(x: Rows, y: Rows, temperature: float) -> float:
    values = []
    for one, other in ((x, y), (y, x)):
        for i, row in enumerate(one):
            weights = [math.exp(cosine(row, column) / temperature) for column in other]
            values.append(-math.log(weights[i] / sum(weights)))
    return mean(values)


LOSSES: dict[str, Callable[[Case], Tensor]] = {
    "similarity": lambda c: losses.similarity(c.h, losses.sigmoid_target(c.y)),
    "weighted_similarity": lambda c: losses.weighted_similarity(
        c.h, c.w, losses.cosine_target(c.y)
    ),
    "nested_similarity": lambda c: losses.nested_similarity(
        c.h, losses.cosine_target(c.y), LENGTHS
    ),
    "nested_classification": lambda c: losses.nested_classification(
        c.h, c.weight, c.bias, c.y, LENGTHS
    ),
    "class_shares": lambda c: losses.class_shares(c.h @ c.weight.T + c.bias, c.y),
    "multi_similarity": lambda c: losses.multi_similarity(c.h, c.y),
    "classification": lambda c: losses.classification(c.h @ c.weight.T + c.bias, c.y),
    "centre_contrast": lambda c: losses.centre_contrast(c.h, c.centres, c.y),
    "centre_bce": lambda c: losses.centre_bce(c.h, c.centres, c.y),
    "centre_separation": lambda c: losses.centre_separation(c.centres),
    "squared_error": lambda c: losses.squared_error(c.h, c.w),
    "decorrelation": lambda c: losses.decorrelation(c.h),
    "likelihood": lambda c: losses.likelihood(4 * c.w, c.h, (c.y @ c.y.T > 0).to(c.y)),
    "info_nce": lambda c: losses.info_nce(c.h, c.w, 0.3),
}
OF_A_BATCH = sorted(LOSSES.keys() - {"centre_separation"})


def loop(name: str, case: Case) -> float:
    h, y, centres = case.h.tolist(), case.y.tolist(), case.centres.tolist()
    weight, bias = case.weight.tolist(), case.bias.tolist()
    logits = [[dot(a, v) + b for v, b in zip(weight, bias, strict=True)] for a in h]
    return {
        "similarity": lambda: loop_similarity(h, loop_target(y, "sigmoid")),
        "weighted_similarity": lambda: loop_weighted_similarity(
            h, case.w.tolist(), loop_target(y, "cosine")
        ),
        "nested_similarity": lambda: loop_nested_similarity(h, loop_target(y, "cosine")),
        "nested_classification": lambda: loop_nested_classification(h, weight, bias, y),
        "class_shares": lambda: loop_class_shares(logits, y),
        "multi_similarity": lambda: loop_multi_similarity(h, y),
        "classification": lambda: loop_classification(logits, y),
        "centre_contrast": lambda: loop_centre_contrast(h, centres, y),
        "centre_bce": lambda: loop_centre_bce(h, centres, y),
        "centre_separation": lambda: loop_centre_separation(centres),
        "squared_error": lambda: (
            sum(
                (a - b) ** 2
                for x, w in zip(h, case.w.tolist(), strict=True)
                for a, b in zip(x, w, strict=True)
            )
            / len(h)
        ),
        "decorrelation": lambda: loop_decorrelation(h),
        "likelihood": lambda: loop_likelihood((4 * case.w).tolist(), h, y),
        "info_nce": lambda: loop_info_nce(h, case.w.tolist(), 0.3),
    }[name]()


def gradients(name: str, case: Case) -> tuple[Tensor, list[Tensor]]:
    """A loss and its gradients with respect to all that can be trained."""
    leaves = [t.clone().requires_grad_() for t in (case.h, case.centres, case.w, case.weight)]
    h, centres, w, weight = leaves
    value = LOSSES[name](replace(case, h=h, centres=centres, w=w, weight=weight))
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), [g for g in found if g is not None]


def test_every_loss_is_tested() -> None:
    functions = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__
    }
    assert functions == set(LOSSES) | {"sigmoid_target", "cosine_target", "doubling_lengths"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_equals_plain_loops(
    name: str, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    case = make_case(LABELS, dtype, seed)
    value = LOSSES[name](case)
    assert value.shape == () and value.dtype == dtype
    assert value.item() == pytest.approx(loop(name, case), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["sigmoid", "cosine"])
def test_target_equals_plain_loops(kind: str) -> None:
    y = torch.tensor(LABELS, dtype=torch.float64)
    expected = torch.tensor(loop_target(y.tolist(), kind), dtype=torch.float64)
    torch.testing.assert_close(losses.TARGETS[kind](y), expected)


def test_targets_by_hand() -> None:
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    one, two = 2 / (1 + math.exp(-1)) - 1, 2 / (1 + math.exp(-2)) - 1  # shared classes
    sigmoid_target = torch.tensor([[one, one, 0], [one, two, one], [0, one, one]])
    torch.testing.assert_close(losses.sigmoid_target(y), sigmoid_target)
    half = math.sqrt(2) - 1  # 2 / sqrt(2) - 1
    cosine_target = torch.tensor([[1, half, -1], [half, 1, half], [-1, half, 1]])
    torch.testing.assert_close(losses.cosine_target(y), cosine_target)


def test_weights_may_be_the_same_for_all_items() -> None:
    case = make_case(LABELS)
    target = losses.cosine_target(case.y)
    shared = losses.weighted_similarity(case.h, case.w[0], target)
    repeated = losses.weighted_similarity(case.h, case.w[:1].expand_as(case.h), target)
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize(
    ("shortest", "bits", "expected"),
    [(8, 64, [8, 16, 32, 64]), (8, 100, [8, 16, 32, 64, 100]), (8, 8, [8]), (16, 8, [8])],
)
def test_doubling_lengths_end_with_the_whole_code(
    shortest: int, bits: int, expected: list[int]
) -> None:
    assert losses.doubling_lengths(shortest, bits) == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tight", [0.3, 3.0])
def test_multi_similarity_equals_the_releases_loop(seed: int, tight: float) -> None:
    """Groups that are tight and loose: with and without pairs that mining drops."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(24, 5, generator=generator, dtype=torch.float64) < 0.25).double()
    h = torch.tanh(
        y @ torch.randn(5, 6, generator=generator, dtype=torch.float64) * 2
        + tight * torch.randn(24, 6, generator=generator, dtype=torch.float64)
    )
    expected = loop_multi_similarity(h.tolist(), y.tolist())
    assert expected > 0
    assert losses.multi_similarity(h, y).item() == pytest.approx(expected, abs=1e-9)
    assert losses.multi_similarity(h.float(), y.float()).item() == pytest.approx(
        expected, rel=1e-6, abs=1e-6
    )


def test_multi_similarity_takes_its_settings() -> None:
    case = make_case(LABELS, seed=3)
    settings = (0.2, 0.4, 3.0, 5.0)
    expected = loop_multi_similarity(case.h.tolist(), case.y.tolist(), *settings)
    assert losses.multi_similarity(case.h, case.y, *settings).item() == pytest.approx(expected)
    assert expected != pytest.approx(loop_multi_similarity(case.h.tolist(), case.y.tolist()))


def test_multi_similarity_by_hand() -> None:
    """Directions 0 and 60 degrees of class A, 90 degrees of class B.

    Anchor 0: positive 0.5, negative 0; 0 + 0.1 > 0.5 fails, so no negative: adds 0.
    Anchor 60: positive 0.5, negative cos 30 = 0.8660; both kept:
        ln(1 + e^0) / 2 + ln(1 + e^(40 * 0.3660254)) / 40 = 0.3465736 + 0.3660254 = 0.7125990
    Anchor 90: no positive: adds 0. Divided by 3 items: 0.2375330.
    """
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64))
    h = torch.stack([angles.cos(), angles.sin()], dim=1)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert losses.multi_similarity(h, y).item() == pytest.approx(0.2375330, abs=1e-7)


def test_mined_pairs_alone_have_a_gradient() -> None:
    """Of two negatives, the one that mining drops does not move."""
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 90.0, 240.0], dtype=torch.float64))
    h = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    y = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(losses.multi_similarity(h, y), h)
    assert gradient[2].abs().max() > 0.01
    assert gradient[3].abs().max() == 0


def test_centre_losses_by_hand() -> None:
    """Two bits, centres (1, 1), (1, -1) and (-1, -1), an item (1, 1) of the first class.

    h.c / K = 1, 0, -1: contrast ln(1 + e^(0 - 1) + e^(-1 - 1)) = 0.4076059.
    h.c = 2, 0, -2: BCE (ln(1 + e^-2) + ln 2 + ln(1 + e^-2)) / 3 = 0.3156678.
    Distances 2, 2 sqrt 2, 2: separation -((4 + 2 sqrt 2) / 3 + 2) / 2 = -2.1380712.
    """
    centres = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    h = torch.ones(1, 2, dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert losses.centre_contrast(h, centres, y).item() == pytest.approx(0.4076059, abs=1e-7)
    assert losses.centre_bce(h, centres, y).item() == pytest.approx(0.3156678, abs=1e-7)
    assert losses.centre_separation(centres).item() == pytest.approx(-2.1380712, abs=1e-7)


def test_decorrelation_by_hand() -> None:
    """0 for balanced bits that differ; 1 for bits that repeat; 1 + 1 for constant bits."""
    balanced = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    repeated = balanced[:, :1].expand(4, 2)
    assert losses.decorrelation(balanced) == 0
    assert losses.decorrelation(repeated) == 1
    assert losses.decorrelation(torch.ones(4, 2)) == 2


NOTHING_DEFINED = {
    "all of one class": [[1, 0, 0]] * 4,
    "all of different classes": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no label at all": [[0, 0, 0]] * 4,
    "a single item": [[1, 0, 0]],
    "all of all classes": [[1, 1, 1]] * 4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "batch"),
    [("multi_similarity", batch) for batch in NOTHING_DEFINED]
    + [
        ("nested_classification", "no label at all"),
        ("centre_contrast", "no label at all"),
        ("centre_contrast", "all of all classes"),
    ],
)
def test_where_nothing_is_defined_loss_and_gradient_are_zero(
    name: str, batch: str, dtype: torch.dtype
) -> None:
    value, found = gradients(name, make_case(NOTHING_DEFINED[batch], dtype))
    assert value == 0
    assert found
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [*NOTHING_DEFINED, "duplicates", "a code of zeros"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_gradient_are_always_finite(name: str, batch: str, dtype: torch.dtype) -> None:
    case = make_case(NOTHING_DEFINED.get(batch, LABELS), dtype)
    if batch == "duplicates":
        case = replace(
            case, h=case.h[:1].expand_as(case.h), centres=case.centres[:1].expand_as(case.centres)
        )
    if batch == "a code of zeros":
        case = replace(case, h=case.h * torch.tensor([0] + [1] * (len(case.h) - 1))[:, None])
    value, found = gradients(name, case)
    assert torch.isfinite(value)
    assert found
    assert all(torch.isfinite(g).all() for g in found)


def test_a_duplicate_is_no_positive_pair() -> None:
    """Equal codes of one class have nothing to learn from each other, however near a negative."""
    twin = torch.tensor([0.5, -0.5, 0.9])
    h = torch.stack([twin, twin, twin + 0.1])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert losses.multi_similarity(h, y) == 0


def test_one_class_has_nothing_to_separate() -> None:
    centre = torch.ones(1, 4, requires_grad=True)
    value = losses.centre_separation(centre)
    (gradient,) = torch.autograd.grad(value, centre)
    assert value == 0 and (gradient == 0).all()


def test_an_item_without_a_label_does_not_change_the_contrast() -> None:
    case = make_case(LABELS)
    labelled = case.y.sum(dim=1) > 0
    assert not labelled.all()
    torch.testing.assert_close(
        losses.centre_contrast(case.h, case.centres, case.y),
        losses.centre_contrast(case.h[labelled], case.centres, case.y[labelled]),
    )


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_order_of_the_items_does_not_matter(name: str) -> None:
    case = make_case(LABELS)
    order = torch.tensor([3, 0, 6, 5, 1, 4, 2])
    shuffled = replace(case, h=case.h[order], y=case.y[order], w=case.w[order])
    torch.testing.assert_close(LOSSES[name](shuffled), LOSSES[name](case))


@pytest.mark.parametrize(
    "name", sorted(LOSSES.keys() - {"nested_similarity", "nested_classification"})
)
def test_order_of_the_bits_does_not_matter(name: str) -> None:
    case = make_case(LABELS)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(
        case,
        h=case.h[:, order],
        w=case.w[:, order],
        centres=case.centres[:, order],
        weight=case.weight[:, order],
    )
    torch.testing.assert_close(LOSSES[name](shuffled), LOSSES[name](case))


@pytest.mark.parametrize("name", ["nested_similarity", "nested_classification"])
def test_nested_losses_know_the_first_bits(name: str) -> None:
    case = make_case(LABELS)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(case, h=case.h[:, order], weight=case.weight[:, order])
    assert abs(LOSSES[name](shuffled) - LOSSES[name](case)) > 1e-3


@pytest.mark.parametrize("name", ["similarity", "nested_similarity", "multi_similarity"])
def test_cosine_losses_do_not_see_the_length_of_a_code(name: str) -> None:
    case = make_case(LABELS)
    lengths = torch.linspace(0.1, 7, len(case.h), dtype=torch.float64)[:, None]
    scaled = replace(case, h=case.h * lengths)
    torch.testing.assert_close(LOSSES[name](scaled), LOSSES[name](case))


def test_a_gradient_step_separates_the_centres() -> None:
    """The releases add the distances with a plus sign, which pulls the centres together."""
    centres = make_case(LABELS).centres.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.centre_separation(centres), centres)
    before, after = torch.pdist(centres), torch.pdist(centres - 0.1 * gradient)
    assert after.mean() > before.mean()
    assert after.min() > before.min()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_equals_finite_differences(name: str) -> None:
    case = make_case(LABELS, seed=1)
    # The memory of a likelihood, which w stands for, is held fixed.
    names = ("h",) if name == "likelihood" else ("h", "centres", "w", "weight")
    leaves = {k: getattr(case, k).requires_grad_() for k in names}

    def function(*tensors: Tensor) -> Tensor:
        return LOSSES[name](replace(case, **dict(zip(leaves, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_the_likelihood_stops_at_64() -> None:
    """Beyond it codes agree well enough: there is no gradient."""
    h = torch.tensor([[10.0, 0.0]], requires_grad=True)
    memory, similar = torch.tensor([[7.0, 0.0]]), torch.zeros(1, 1)
    value = losses.likelihood(memory, h, similar)
    assert value.item() == pytest.approx(32)  # log(1 + e^32)
    (gradient,) = torch.autograd.grad(value, h)
    assert (gradient == 0).all()


def test_info_nce_by_hand() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    same, wrong = losses.info_nce(x, 3 * x, 0.5), losses.info_nce(x, x.flip(0), 0.5)
    assert same.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert wrong.item() == pytest.approx(math.log(1 + math.exp(2)))
