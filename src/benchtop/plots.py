"""Figures: one style, learning curves with bands over seeds, forest plots, and alt text that travels with the output."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from benchtop.report import display

# Okabe and Ito (2008): told apart with any common colour vision. Yellow is left out: too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))  # a second cue beside colour
STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE, linestyle=LINES),
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

plt.rcParams.update(STYLE)  # for good, not in a context: legends and ticks made later must look alike


def subplots(*args, **kwargs) -> tuple[Figure, Axes]:
    """``plt.subplots``; a name of this module, so that the style of the book is set before the first figure."""
    return plt.subplots(*args, **kwargs)


def png(fig: Figure, colours: int = 64) -> bytes:
    """The figure as a palette PNG: a third of the usual size. Closes the figure.

    Its palette: white, the colours of the lines (a choice by area would merge thin ones), and ``colours`` more.
    """
    raw = io.BytesIO()
    fig.savefig(raw, format="png", dpi=110)
    plt.close(fig)
    image, palette, small = Image.open(raw).convert("RGB"), Image.new("P", (1, 1)), io.BytesIO()
    fixed = [int(colour[i : i + 2], 16) for colour in ("#FFFFFF", *PALETTE) for i in (1, 3, 5)]
    palette.putpalette(fixed + image.quantize(colours).getpalette()[: 3 * colours])
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def show(fig: Figure, *, alt: str, caption: str = "") -> None:
    """Show a figure; ``alt`` says what is to be seen and is stored in the metadata of the output.

    Raises ValueError without alt text: a page with a picture nobody can hear described is not finished.
    """
    if not alt.strip():
        raise ValueError('show(fig) has no alt text: say what is to be seen, show(fig, alt="Loss falls ...")')
    image = base64.b64encode(png(fig)).decode()
    display({"image/png": image, "text/plain": f"[figure: {alt}]"}, {"image/png": {"alt": alt}})
    if caption:
        display({"text/markdown": f"*{caption}*", "text/plain": caption})


def curves(runs, metric: str, *, ax: Axes | None = None, ylabel: str | None = None, log: bool = False) -> Figure:
    """Learning curves: the mean over seeds of each arm with its 95 % t-interval as a band.

    ``runs`` is one result of `fit`, a list of them, or a tidy DataFrame with arm, seed, step, metric, value.
    One line for each arm and each hyper-parameter setting that the frame holds.
    """
    history = tidy(runs)
    history = history[history["metric"] == metric]
    if history.empty:
        known = ", ".join(map(repr, tidy(runs)["metric"].unique()))
        raise ValueError(f"no metric {metric!r} in the history: it holds {known}; evaluate must return it")
    if ax is None:
        _, ax = subplots()
    settings = [c for c in history.columns if c not in ("seed", "step", "metric", "value") and history[c].nunique() > 1]
    groups = history.groupby(settings, sort=False) if settings else [((history["arm"].iloc[0],), history)]
    for k, (names, group) in enumerate(groups):
        wide = group.pivot_table(index="step", columns="seed", values="value")
        mean, half = wide.mean(axis=1), t_half_width(wide.to_numpy())
        label = " ".join(f"{c}={v:g}" if isinstance(v, float) else str(v) for c, v in zip(settings or ["arm"], names))
        (line,) = ax.plot(wide.index, mean, label=label, color=PALETTE[k % 7], linestyle=LINES[k % 7])
        ax.fill_between(wide.index, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="step", ylabel=ylabel or metric, yscale="log" if log else "linear")
    ax.legend(title=f"mean and 95 % band, {history['seed'].nunique()} seeds", title_fontsize=8)
    return ax.figure


def t_half_width(values: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % t-interval of the mean along the last axis; 0 for a single column."""
    n = values.shape[-1]
    if n < 2:
        return np.zeros(values.shape[:-1])
    return stats.t.ppf(0.975, n - 1) * values.std(axis=-1, ddof=1) / np.sqrt(n)


def forest(rows: Sequence[dict], *, xlabel: str, ax: Axes | None = None) -> Figure:
    """One line a claim: interval, mean, and the value of each seed as a small dot.

    A row has ``label``, ``effect``, ``low``, ``high`` and optionally ``values`` (per seed) and ``threshold``.
    """
    if ax is None:
        _, ax = subplots(figsize=(6.4, 0.9 + 0.5 * len(rows)))
    for y, row in enumerate(reversed(rows)):
        ax.plot([row["low"], row["high"]], [y, y], "-", color=PALETTE[0], linewidth=2)
        ax.plot(row["effect"], y, "D", color=PALETTE[0], markersize=6)
        values = row.get("values", [])
        ax.plot(values, np.full(len(values), y - 0.22), "o", color=PALETTE[1], markersize=3, alpha=0.8)
        if row.get("threshold") is not None:
            ax.plot([row["threshold"]] * 2, [y - 0.4, y + 0.4], ":", color=PALETTE[6])
    ax.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    ax.set(ylim=(-0.6, len(rows) - 0.4), xlabel=xlabel)
    ax.axvline(0, color="0.6", linewidth=0.8, linestyle="-")
    ax.grid(axis="y", visible=False)
    return ax.figure


def tidy(runs) -> pd.DataFrame:
    """The history of one run, of several, or a frame that is one already."""
    if isinstance(runs, pd.DataFrame):
        return runs
    if hasattr(runs, "history"):
        return runs.history
    return pd.concat([run.history for run in runs], ignore_index=True)
