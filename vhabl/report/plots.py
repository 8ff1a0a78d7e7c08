"""Plots as PNG and SVG, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np

from vhabl.system.files import atomic_path

# Okabe & Ito (2008), each with a marker of its own so that colour is never the only sign; the
# second round has dashed lines and other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """Values at places x; error: half of each bar, or nothing."""

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ticks: texts at x = 0, 1, 2 ... instead of numbers."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    ticks: Sequence[str] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    marks: bool = True  # a marker at every point
    level: float | None = None  # a horizontal line of reference


def category_panel(
    title: str, x_label: str, y_label: str, lines: Mapping[str, Mapping[str, Sequence[float]]]
) -> Panel:
    """Means with standard errors from {name: {category: values over seeds}}; the categories stand
    at equal steps.
    """
    ticks = list(dict.fromkeys(x for line in lines.values() for x in line))
    drawn = {}
    for name, line in lines.items():
        means = [float(np.mean(v)) for v in line.values()]
        errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in line.values()]
        drawn[name] = Line([ticks.index(x) for x in line], means, [float(e) for e in errors])
    return Panel(title, x_label, y_label, drawn, ticks)


def plot(
    target: Path, panels: Sequence[Panel], order: Sequence[str] = (), columns: int = 2
) -> None:
    """Panels in a grid with one legend below, as target.png and target.svg.

    A name has one style in all panels, and in all plots that are given the same order of names.
    The same content gives the same files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {name for panel in panels for name in panel.lines}
    numbers = list(dict.fromkeys([*order, *(n for panel in panels for n in panel.lines)]))
    names = [name for name in numbers if name in drawn]
    columns = min(columns, len(panels))
    rows = ceil(len(panels) / columns)
    widest = max((len(panel.ticks) for panel in panels), default=0)
    size = (max(6.0 if columns == 1 else 4.6, 0.5 * widest) * columns, 3.4 * rows + 0.6)
    with plt.rc_context({"svg.hashsalt": target.name, "font.size": 9}):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, dpi=150, squeeze=False, layout="constrained"
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for panel, axes in zip(panels, grid.flat, strict=False):
            _draw(panel, axes, numbers)
        if len(names) > 1 or any("oracle labels" in name for name in names):
            found = dict(
                pair[::-1]
                for axes in grid.flat
                for pair in zip(*axes.get_legend_handles_labels(), strict=True)
            )
            figure.legend(
                [found[name] for name in names],
                names,
                loc="outside lower center",
                ncols=max(1, min(len(names), int(size[0] / (0.55 + 0.075 * max(map(len, names)))))),
                frameon=False,
            )
        for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            with atomic_path(target.with_name(target.name + ending)) as path:
                figure.savefig(path, format=ending[1:], metadata=metadata)
        plt.close(figure)


def _draw(panel: Panel, axes, numbers: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    for name, line in panel.lines.items():
        number = numbers.index(name)
        turn = number // len(COLOURS)  # of the list of colours
        axes.errorbar(
            line.x,
            line.y,
            None if line.error is None or not any(line.error) else line.error,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[turn % len(DASHES)],
            marker=MARKERS[(number + turn) % len(MARKERS)] if panel.marks else None,
            markersize=4,
            linewidth=1.4,
            capsize=3,
            label=name,
        )
    if panel.level is not None:
        axes.axhline(panel.level, color="#888888", linewidth=0.8)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ticks:
        crowded = len("".join(panel.ticks)) > 34
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=60 if crowded else 0)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(alpha=0.3)
    if not panel.ticks and not panel.log_x and _whole(panel):
        axes.xaxis.get_major_locator().set_params(integer=True)


def _whole(panel: Panel) -> bool:
    return all(float(x).is_integer() for line in panel.lines.values() for x in line.x)
