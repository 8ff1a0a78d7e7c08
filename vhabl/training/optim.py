"""Optimiser, learning-rate schedule and the running mean of weights, from a recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from vhabl.settings import OptimConfig
from vhabl.system.errors import fail

Model = TypeVar("Model", bound=nn.Module)


def build_optimizer(
    groups: Iterable[dict[str, Any]],
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
) -> torch.optim.Optimizer:
    """The recipe's optimiser over a method's parameter groups, each split by `optim.lr_scale`.

    groups: parameters, and `lr` where they have a rate of their own; named: all parameters. Raises
    VhablError where `optim.lr_scale` names no part of the model.
    """
    names = {id(p): name for name, p in named}
    for part in config.lr_scale:
        if not any(_is_in(name, part) for name in names.values()):
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names.values()))
            fail(f"optim.lr_scale.{part}", "no such part", f"Name a part of the model: {known} ...")
    scaled = []
    for group in groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            parts = [part for part in config.lr_scale if _is_in(names[id(p)], part)]
            factor = config.lr_scale[max(parts, key=len)] if parts else 1.0
            by_factor.setdefault(factor, []).append(p)
        for factor, some in by_factor.items():
            lr = group.get("lr", config.lr) * factor
            scaled.append({"params": some, "lr": lr, "base_lr": lr})
    decay = config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(scaled, config.lr, momentum=config.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    first, second = config.betas
    return kind(scaled, config.lr, (first, second), config.eps, weight_decay=decay, fused=True)


def _is_in(name: str, part: str) -> bool:
    """Whether a parameter belongs to a part: its name begins with these words."""
    return f"{name}.".startswith(f"{part}.")


def set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float) -> None:
    """Set every group's rate for `progress` in [0, 1) through the planned steps. The cosine falls
    over all of them, warm-up included, as in BertAdam.
    """
    if progress < config.warmup:
        factor = progress / config.warmup
    elif config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        factor = 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimConfig) -> None:
    """Scale gradients down to the norm `optim.clip`: all of them together, or each tensor alone."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not config.clip or not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))  # all of them, and no wait for a GPU
    if not config.clip_per_tensor:
        norms = norms.norm().expand_as(norms)
    factors = (config.clip / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))


class WeightMean(Generic[Model]):
    """Mean of a model's floating-point state over all updates, the t-th weighted as t^eta.

    Late weights count more, and no window has to be chosen for a length of training: the update is
    `mean += (eta + 1) / (t + eta) (now - mean)` (Shamir & Zhang, ICML 2013).
    """

    def __init__(self, model: Model, eta: float) -> None:
        self.eta = eta
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        share = (self.eta + 1) / (self.updates + self.eta)
        pairs = list(
            zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        )
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in moving], [now for _, now in moving], share)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
