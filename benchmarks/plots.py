from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
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
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
