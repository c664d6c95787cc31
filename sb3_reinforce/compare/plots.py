"""Pictures of a comparison, the same to the byte for the same data."""

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from scipy.stats import bootstrap

from sb3_reinforce.compare.files import KINDS
from sb3_reinforce.compare.results import REPS

Color: TypeAlias = tuple[float, float, float]

#: Colour of each algorithm, the same everywhere
COLORS: dict[str | None, Color] = {
    None: (0.5, 0.5, 0.5),
    **dict(zip(("reinforce", "ppo", "a2c"), sns.color_palette("colorblind"), strict=False)),
}

#: Contenders of one algorithm that shades of its colour can tell apart
MAX_SHADES = 4

#: Line styles and markers of the contenders, which tell them apart without colour
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1), (5, 1, 1, 1), (8, 2), (3, 1, 1, 1, 1, 1), (2, 2), (6, 1, 3, 1))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

AXES = {
    "num_timesteps": ("curves_steps", "Environment steps"),
    "seconds": ("curves_seconds", "Seconds of training"),
}


def styles(contenders: dict[str, Any]) -> dict[str, tuple[Color, tuple[float, ...], str]]:
    """
    Choose how each contender is drawn.

    :param contenders: Contenders of a comparison
    :return: Colour, dashes and marker of each. The first contender of an algorithm has its colour, further ones have
        lighter shades of it, or hues of their own if they are many
    """
    others = iter(sns.color_palette("colorblind")[len(COLORS) :] * len(contenders))
    hues = iter(sns.husl_palette(len(contenders), l=0.55))
    colors = dict(COLORS)
    totals = Counter(settings["algo"] for settings in contenders.values())
    count: Counter[str | None] = Counter()
    found = {}
    for number, (name, settings) in enumerate(contenders.items()):
        algo = settings["algo"]
        if algo not in colors:
            colors[algo] = next(others)
        if count[algo] and totals[algo] > MAX_SHADES:
            red, green, blue = next(hues)
        else:
            lightness = 1 - 0.75 ** count[algo]
            red, green, blue = (channel + (1 - channel) * lightness for channel in colors[algo])
        count[algo] += 1
        dashes = DASHES[(number + number // len(MARKERS)) % len(DASHES)]
        found[name] = ((red, green, blue), dashes, MARKERS[number % len(MARKERS)])
    return found


def save(figure: Figure, path: Path, svg: bool = False) -> None:
    """
    Write a figure as PNG. A palette of 256 colours makes the file a third as large.

    :param figure: The figure
    :param path: Where to write it, without extension
    :param svg: Whether to write an SVG too
    """
    buffer = BytesIO()
    figure.savefig(buffer, dpi=90)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256).save(path.with_suffix(".png"), optimize=True)
    if svg:
        with matplotlib.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def make_panels(envs: list[str], height: float) -> tuple[Figure, list[Axes]]:
    """
    Lay out a figure with a panel for each environment.

    :param envs: Ids of environments
    :param height: Height of a panel, in inches
    :return: The figure and its panels
    """
    # More than three in a row cannot be read on a page
    n_columns = 2 if len(envs) == 4 else min(len(envs), 3)
    n_rows = -(-len(envs) // n_columns)
    width = 8.0 if n_columns == 1 else 4.0 * n_columns
    # Not by pyplot, which would choose a backend for the whole program
    figure = Figure(figsize=(width, height * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(envs) :]:
        axes.set_axis_off()
    for axes, env_id in zip(panels, envs, strict=False):
        axes.set_title(env_id)
        axes.grid(alpha=0.3)
    return figure, panels[: len(envs)]


def is_first_of_row(axes: Axes) -> bool:
    """
    Tell which panels have the labels of their row.

    :param axes: A panel
    :return: Whether it is the first of its row
    """
    return axes.get_subplotspec().is_first_col()  # type: ignore[union-attr]


def label_threshold(axes: Axes, threshold: float) -> None:
    """
    Draw a threshold. Its label is on the side of the line that has more room, so that it does not lie on the frame.

    :param axes: A panel that has its curves
    :param threshold: Return that the runs are to reach
    """
    axes.axhline(threshold, color="0.3", linewidth=0.8, linestyle=":")
    place, is_high = axes.get_yaxis_transform(), threshold > sum(axes.get_ylim()) / 2
    axes.annotate(
        f"solved: {threshold:g}",
        (0.01, threshold),
        xycoords=place,
        xytext=(0, -2 if is_high else 2),
        textcoords="offset points",
        va="top" if is_high else "bottom",
    )


def add_legend(figure: Figure, panels: list[Axes]) -> None:
    """
    Add a legend of the lines of all panels: where the first free panel would be, or within the first panel.

    :param figure: A figure
    :param panels: Its panels
    """
    lines = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    if lines:
        free = figure.axes[len(panels) :]
        axes, place = (free[0], "center") if free else (panels[0], "best")
        axes.legend(handles=list(lines.values()), loc=place, fontsize="medium" if free else "small")  # type: ignore[call-overload]


def plot_curves(curves: pd.DataFrame, comparison: dict[str, Any], folder: Path, svg: bool = False) -> None:
    """
    Draw the mean learning curves over the seeds with their 95 % bootstrap intervals, over steps and over seconds. A curve
    ends where the first of its runs does.

    :param curves: As :func:`~sb3_reinforce.compare.results.make_curves` gives them
    :param comparison: What is compared
    :param folder: Where to write the pictures
    :param svg: Whether to write SVGs too
    """
    style = styles(comparison["contenders"])
    for axis, (name, label) in AXES.items():
        figure, panels = make_panels(comparison["envs"], 4.5 if len(comparison["envs"]) == 1 else 3.6)
        for axes, env_id in zip(panels, comparison["envs"], strict=True):
            of_axis = curves[(curves["env"] == env_id) & (curves["axis"] == axis)]
            for contender, curve in of_axis.groupby("contender", sort=False):
                # One row per run, at the points that all runs have
                runs = curve.pivot(index="seed", columns="x", values="return").dropna(axis="columns")
                x, returns = runs.columns.to_numpy(), runs.to_numpy()
                color, dashes, marker = style[str(contender)]
                axes.plot(
                    x, returns.mean(axis=0), color=color, label=contender, dashes=dashes or (None, None),
                    marker=marker, markevery=max(len(x) // 6, 1), markersize=6, markeredgecolor="white", clip_on=False,
                )  # fmt: skip
                if len(returns) > 1 and len(x):
                    resampled = bootstrap((returns,), np.mean, n_resamples=REPS, method="percentile", random_state=0)
                    axes.fill_between(x, *resampled.confidence_interval, color=color, alpha=0.2, linewidth=0)
            threshold = comparison["thresholds"][env_id]
            if threshold is not None:
                label_threshold(axes, threshold)
            axes.set_xlabel(label)
            if is_first_of_row(axes):
                axes.set_ylabel("Return (mean of 20 training episodes)")
            if axis == "num_timesteps":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            else:
                axes.set_xscale("log")
        add_legend(figure, panels)
        save(figure, folder / name, svg)


def plot_scores(
    runs: pd.DataFrame, statistics: dict[str, Any], comparison: dict[str, Any], folder: Path, svg: bool = False
) -> None:
    """
    Draw the final scores: each run, and the interquartile mean with its interval.

    :param runs: Runs of a comparison
    :param statistics: Their statistics
    :param comparison: What is compared
    :param folder: Where to write the picture
    :param svg: Whether to write an SVG too
    """
    style = styles(comparison["contenders"])
    names = list(comparison["contenders"])
    figure, panels = make_panels(comparison["envs"], 1.0 + 0.55 * len(names))
    for axes, env_id in zip(panels, comparison["envs"], strict=True):
        for position, name in enumerate(names):
            color, _, marker = style[name]
            for kind, offset in zip(KINDS, (-0.17, 0.17), strict=True):
                scores = runs[(runs["env"] == env_id) & (runs["contender"] == name)][kind].dropna()
                iqm = statistics[env_id][name][kind]["iqm"]
                if iqm["value"] is None:
                    continue
                face = color if kind == "deterministic" else "white"
                y = position + offset
                axes.plot(scores, np.full(len(scores), y), "|", color="0.4", markersize=7, alpha=0.7)
                low, high = iqm["interval"] or (iqm["value"], iqm["value"])
                axes.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.6)
                axes.plot(iqm["value"], y, marker, color=color, markerfacecolor=face, markersize=7)
        axes.set_yticks(range(len(names)), names if is_first_of_row(axes) else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(
        "Final score: deterministic (filled), stochastic (open)\nIQM with 95 % interval; bars: single runs", fontsize="medium"
    )
    save(figure, folder / "scores", svg)


def plot_gradients(table: pd.DataFrame, folder: Path, title: str) -> None:
    """
    Draw the signal-to-noise ratio of gradient estimates and the cosine between two of them against the number of episodes, one
    line per return and baseline, on a picture of the shape of a slide.

    :param table: As :func:`~sb3_reinforce.compare.quality.measure` gives it
    :param folder: Where to write the picture
    :param title: Its title
    """
    figure = Figure(figsize=(10.67, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"snr": "Signal-to-noise ratio", "cosine": "Cosine between two batches"}
    returns, baselines = (list(dict.fromkeys(table[key])) for key in ("returns", "baseline"))
    hues = sns.color_palette("colorblind")
    colors = [hues[number] for number in (0, 1, 2, 4, 7, 9)]
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for (name, baseline), line in table.groupby(["returns", "baseline"], sort=False):
            number = baselines.index(baseline)
            axes.plot(
                line["n_episodes"], line[key], color=colors[number], marker=MARKERS[number], markersize=5,
                dashes=DASHES[returns.index(name)] or (None, None), clip_on=False,
                label=baseline if len(returns) == 1 else f"{name}, {baseline}",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="Episodes per estimate", ylabel=label)
        axes.set_xticks(sorted(table["n_episodes"].unique()), [str(n) for n in sorted(table["n_episodes"].unique())])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if key != "cosine" and (table[key] > 0).any():  # No estimator need have a signal
            axes.set_yscale("log")
    panels[0].legend(title="Baseline" if len(returns) == 1 else "Return, baseline", fontsize="small")
    figure.suptitle(f"{title}, {returns[0]}" if len(returns) == 1 else title)
    save(figure, folder / "gradients")
