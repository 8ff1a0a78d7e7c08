"""Plots as PNG and SVG, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vhabl.files import atomic_path

# Okabe & Ito (2008), each with a marker of its own so that colour is never the only sign.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)


def plot_lines(
    target: Path,
    lines: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """A line for each name: {name: {x: values over seeds}}; mean with standard error.

    Writes target.png and target.svg. The x values are labels at equal steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(x for line in lines.values() for x in line))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.62 * len(labels)), 4.2), dpi=150)
    for (name, line), (colour, marker) in zip(lines.items(), STYLES, strict=False):
        places = [labels.index(x) for x in line]
        means = [float(np.mean(v)) for v in line.values()]
        errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for v in line.values()]
        axes.errorbar(places, means, errors, color=colour, marker=marker, capsize=3, label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 10 else 0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    figure.tight_layout()
    for ending in (".png", ".svg"):
        with atomic_path(target.with_name(target.name + ending)) as path:
            figure.savefig(path, format=ending[1:])
    plt.close(figure)
