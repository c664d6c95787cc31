"""
Baselines that need no critic: pure functions on the returns of a batch of whole episodes.

Every function takes ``returns`` of shape ``(n_steps,)``, the episodes laid end to end, with their ``lengths`` of shape
``(n_episodes,)``, and gives the baseline of each step, shape ``(n_steps,)``, in the unit of the returns.
The *return of an episode* is that of its first step.

A baseline needs ``sums`` over the episodes of the batch. Where several processes share a batch, the caller adds the sums of
all processes and hands them in; by default the batch is what the function is given.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sb3_reinforce.returns import episode_starts, timesteps


def episode_sums(returns: np.ndarray, lengths: np.ndarray, horizon: int | None = None) -> np.ndarray:
    """
    Add up the returns of the episodes: ``[sum_j R_j0, N]``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param horizon: Not used
    :return: Sum and number of episodes, shape ``(2,)``
    """
    return np.array([returns[episode_starts(lengths)].sum(), len(lengths)], dtype=np.float64)


def timestep_sums(returns: np.ndarray, lengths: np.ndarray, horizon: int | None = None) -> np.ndarray:
    """
    Add up the returns of the episodes at each time: ``[sum_j R_j0, sum_j R_j1, ..., N]``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param horizon: Length of the longest episode of all processes, ``None`` for that of these episodes
    :return: Sums and number of episodes, shape ``(horizon + 1,)``
    """
    sums = np.bincount(timesteps(lengths), weights=returns, minlength=horizon or 0)
    return np.append(sums, len(lengths))


def mean(returns: np.ndarray, lengths: np.ndarray, sums: np.ndarray | None = None) -> np.ndarray:
    """
    Compute the mean return of the episodes, ``b = 1/N sum_j R_j0``. The mean holds the episode's own return, which
    shrinks the expectation of the gradient by the factor ``1 - 1/N`` (exactly, if ``returns`` is ``"episode"`` or
    ``gamma`` is 1).

    Source: Williams, Machine Learning 8, 1992 (reinforcement comparison); the factor follows from
    ``E[sum_t grad log pi_it R_j0] = 0`` for every other episode ``j``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param sums: Result of :func:`episode_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    total, n_episodes = episode_sums(returns, lengths) if sums is None else sums
    return np.full(len(returns), total / n_episodes)


def leave_one_out(returns: np.ndarray, lengths: np.ndarray, sums: np.ndarray | None = None) -> np.ndarray:
    """
    Compute the mean return of the *other* episodes, ``b_i = 1/(N - 1) sum_{j != i} R_j0``. Unbiased; needs two episodes.

    Source: Kool et al., Buy 4 REINFORCE samples, get a baseline for free!, ICLR 2019 workshop.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param sums: Result of :func:`episode_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    total, n_episodes = episode_sums(returns, lengths) if sums is None else sums
    first = returns[episode_starts(lengths)]
    return np.repeat((total - first) / (n_episodes - 1), lengths)


def timestep(returns: np.ndarray, lengths: np.ndarray, sums: np.ndarray | None = None) -> np.ndarray:
    """
    Compute the mean return of the *other* episodes at the same time, ``b_it = 1/(N - 1) sum_{j != i} R_jt``. An episode
    that is over by then counts with what it still earns, ``R_jt = 0``: an episode that outlives the others is compared
    with their end, not with nobody. Unbiased; needs two episodes. Made for the reward-to-go: returns that are the same at
    all times want :func:`leave_one_out`.

    Source: the time-dependent baseline of Greensmith et al., Variance reduction techniques for gradient estimates in
    reinforcement learning, JMLR 5, 2004, estimated from the other episodes.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param sums: Result of :func:`timestep_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    if sums is None:
        sums = timestep_sums(returns, lengths)
    return (sums[timesteps(lengths)] - returns) / (sums[-1] - 1)


class Baseline(NamedTuple):
    """
    A baseline and the sums that it needs.

    :param sums: Function ``(returns, lengths, horizon) -> sums``
    :param values: Function ``(returns, lengths, sums) -> baseline of each step``
    """

    sums: Callable[..., np.ndarray]
    values: Callable[..., np.ndarray]


#: The values of the argument ``baseline``, besides ``None`` and ``"value"``.
BASELINES: dict[str, Baseline] = {
    "mean": Baseline(episode_sums, mean),
    "leave_one_out": Baseline(episode_sums, leave_one_out),
    "timestep": Baseline(timestep_sums, timestep),
}
