from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

#: Episodes in the running mean.
WINDOW = 20

COLOR = "#0072b2"


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """
    Average values over a moving window.

    :param values: Values, shape ``(n,)``
    :param window: How many values each mean is over
    :return: Mean of each value and those before it, shape ``(n - window + 1,)``, or empty
    """
    sums = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    return (sums[window:] - sums[:-window]) / window


def plot_learning_curve(steps: np.ndarray, returns: np.ndarray, path: Path, title: str) -> None:
    """
    Draw the training episodes of a run and their running mean.

    :param steps: Time steps at the end of each episode
    :param returns: Return of each episode
    :param path: Where the picture goes
    :param title: Its title
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, returns, ".", color=COLOR, alpha=0.3, markersize=4, label="training episode")
    axes.plot(steps[WINDOW - 1 :], running_mean(returns), color=COLOR, linewidth=2, label=f"mean of the last {WINDOW}")
    axes.set(title=title, xlabel="Environment steps", ylabel=f"Return (mean of the last {WINDOW} episodes)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_growth(growth: dict[str, dict[int, float]], path: Path) -> None:
    """
    Draw how the time per step grows.

    :param growth: For each quantity that grows, microseconds per step by its value
    :param path: Where the picture goes
    """
    figure, all_axes = plt.subplots(1, len(growth), figsize=(4 * len(growth), 3.5), layout="constrained")
    for axes, (name, values) in zip(all_axes, growth.items(), strict=True):
        axes.plot(list(values), list(values.values()), "o-", color=COLOR)
        axes.set(xscale="log", xlabel=name.strip(":").capitalize(), ylabel="Microseconds per step")
        axes.set_ylim(0, 1.1 * max(values.values()))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_tutorial(episodes: pd.DataFrame, path: Path) -> None:
    """
    Draw returns as the tutorial does, mean and 95 % interval over the seeds by episode, and by seconds beside it.

    :param episodes: ``row``, ``seed``, ``return`` and ``seconds`` of the episodes of all runs
    :param path: Where the picture goes
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colors = dict(zip(episodes["row"].unique(), plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for row, rows in episodes.groupby("row", sort=False):
        runs = [run["return"].rolling(WINDOW).mean().to_numpy() for _, run in rows.groupby("seed")]
        n_episodes = min(map(len, runs))
        returns = np.array([run[WINDOW - 1 : n_episodes] for run in runs])
        places = np.arange(WINDOW, n_episodes + 1)[:: max(1, n_episodes // 250)]
        mean, error = returns.mean(axis=0), 1.96 * returns.std(axis=0, ddof=1) / np.sqrt(len(returns))
        chosen = places - WINDOW
        left.plot(places, mean[chosen], color=colors[row], label=row)
        left.fill_between(places, (mean - error)[chosen], (mean + error)[chosen], color=colors[row], alpha=0.2, linewidth=0)
        ends = [run["seconds"].to_numpy() for _, run in rows.groupby("seed")]
        # From where all have a mean of so many episodes to where the first one ends
        grid = np.geomspace(max(end[WINDOW - 1] for end in ends), min(end[-1] for end in ends), 200)
        by_time = [np.interp(grid, end, run) for end, run in zip(ends, runs, strict=True)]
        right.plot(grid, np.mean(by_time, axis=0), color=colors[row])
    left.set(xlabel="Episodes", ylabel=f"Return (mean of {WINDOW} episodes)", title="REINFORCE for InvertedPendulum-v4")
    right.set(xscale="log", xlabel="Seconds of training", title="The same over time")
    left.set_ylim(0, 1050)
    left.legend(loc="upper center", fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
