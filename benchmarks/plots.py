from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

#: Episodes in the running mean.
WINDOW = 20

#: Colour and line style of each algorithm, the same everywhere and distinct without colour.
STYLES = {"REINFORCE": ("#0072b2", "-"), "PPO": ("#d55e00", "--")}


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """
    :param values: Values, shape ``(n,)``
    :param window: How many values each mean is over
    :return: Mean of each value and those before it, shape ``(n - window + 1,)``, or empty
    """
    sums = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    return (sums[window:] - sums[:-window]) / window


def plot_learning_curves(runs: dict[str, list[tuple[np.ndarray, np.ndarray]]], path: Path, title: str) -> None:
    """
    Draw the running mean of the training episodes of every run, and the median over the runs of each algorithm.
    A single run also shows its episodes.

    :param runs: For each algorithm its runs: time steps at the end of each episode, and the return of each episode
    :param path: Where the picture goes
    :param title: Its title
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, algorithm_runs in runs.items():
        color, style = STYLES[name]
        curves = [(steps[WINDOW - 1 :], running_mean(returns)) for steps, returns in algorithm_runs]
        if len(curves) == 1:
            axes.plot(*algorithm_runs[0], ".", color=color, alpha=0.3, markersize=4, label="training episode")
            axes.plot(*curves[0], style, color=color, linewidth=2, label=f"mean of the last {WINDOW}")
        else:
            for steps, means in curves:
                axes.plot(steps, means, style, color=color, alpha=0.3, linewidth=0.8)
            grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 200)
            median = np.median([np.interp(grid, *curve) for curve in curves], axis=0)
            axes.plot(grid, median, style, color=color, linewidth=2.5, label=f"{name}: median of {len(curves)} seeds")
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
        axes.plot(list(values), list(values.values()), "o-", color=STYLES["REINFORCE"][0])
        axes.set(xscale="log", xlabel=name.strip(":").capitalize(), ylabel="Microseconds per step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
