"""Whether episodes that share a start are worth it: how much of the variance of returns the start explains."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sb3_reinforce.compare.quality import Estimator, collect, copy_of, measure, table_lines
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.returns import RETURNS, episode_starts

#: Starts, and episodes of each, that the share is measured on
N_STARTS, N_PER_START = 32, 8

#: The baselines whose other episodes are those of the group
OF_GROUPS: tuple[Estimator, ...] = (("reward_to_go", "timestep"), ("episode", "leave_one_out"))

COLUMNS = ("returns", "baseline", "n_episodes", "group_size", "n_batches", "variance", "snr")

#: Share below which the start is no matter
SMALLEST_SHARE = 0.1

#: Variance of gradients in groups, beside that without, below which groups help, and above which they cost
HELPS, COSTS = 0.8, 1.25


def with_groups(model: REINFORCE, group_size: int) -> REINFORCE:
    """
    Copy a model, so that its episodes share starts.

    :param model: A model with an environment, which the copy uses too
    :param group_size: Number of episodes of a group, 1 for none
    :return: The copy
    """
    # Whichever baseline the model has, it is not asked for
    changes = {"baseline": "leave_one_out", "time_limit": "terminal", "gae_lambda": None, "n_episodes": None}
    return copy_of(model, group_size=group_size, **changes)


def start_share(model: REINFORCE) -> float:
    """
    Estimate the share of the variance of the returns that the start explains, ``1 - E[var(R | start)] / var(R)``, as the
    intraclass correlation of a one-way analysis of variance (Shrout & Fleiss, Intraclass correlations, Psychological Bulletin
    86, 1979, ICC(1)).

    :param model: A model with an environment
    :return: The share, 0 where all returns are equal
    """
    model = with_groups(model, N_PER_START)
    collect(model, N_STARTS * N_PER_START)
    buffer = model.rollout_buffer
    returns = RETURNS["episode"](buffer.rewards, buffer.lengths, model.gamma)[episode_starts(buffer.lengths)]
    by_start = returns[np.argsort(buffer.groups, kind="stable")].reshape(N_STARTS, N_PER_START)
    within = by_start.var(axis=1, ddof=1).mean()
    between = max(0.0, by_start.mean(axis=1).var(ddof=1) - within / N_PER_START)
    return float(between / (between + within)) if between + within > 0 else 0.0


def compare_groups(model: REINFORCE, n_episodes: int, batch_sizes: Sequence[int], group_size: int) -> pd.DataFrame:
    """
    Measure the quality of gradient estimates with and without groups, on as many episodes.

    :param model: A model with an environment
    :param n_episodes: Number of episodes, with and without
    :param batch_sizes: Numbers of episodes per estimate
    :param group_size: Number of episodes of a group
    :return: The columns of :func:`~sb3_reinforce.compare.quality.measure`, and ``group_size``
    """
    sizes = [size for size in batch_sizes if size % group_size == 0]
    tables = []
    for size in (1, group_size):
        copy = with_groups(model, size)
        collect(copy, n_episodes // group_size * group_size)
        tables.append(measure(copy, sizes, OF_GROUPS).assign(group_size=size))
    return pd.concat(tables).sort_values(["returns", "baseline", "n_episodes", "group_size"], kind="stable")


def describe(share: float, table: pd.DataFrame, group_size: int) -> str:
    """
    Write what was measured, and one line of advice.

    :param share: Result of :func:`start_share`
    :param table: Result of :func:`compare_groups`
    :param group_size: Number of episodes of a group
    :return: A section of a report, in Markdown
    """
    size = table["n_episodes"].max()
    # Of the baseline that is the better one, with and without
    best = table[table["n_episodes"] == size].groupby("group_size")["variance"].min()
    change = best[group_size] / best[1]
    if share < SMALLEST_SHARE:
        advice = "groups cannot help here: the start hardly matters, and a group has fewer episodes for its baseline"
    elif change < HELPS:
        advice = f"group_size={group_size} is worth a try: gradients of {size} episodes vary {change:.2f} times as much"
    elif change > COSTS:
        advice = f"groups cost: gradients of {size} episodes vary {change:.2f} times as much, as they come from fewer starts"
    else:
        advice = f"groups change little: gradients of {size} episodes vary {change:.2f} times as much with them"
    measured = f"{N_STARTS} starts of {N_PER_START} episodes"
    lines = [
        "## Episodes that share a start",
        "",
        f"The start explains {share:.0%} of the variance of the returns ({measured}): {advice}.",
        "",
        *table_lines(table, COLUMNS),
    ]
    return "\n".join(lines) + "\n"
