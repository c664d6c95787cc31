"""
Baselines that need no critic: pure functions on the returns of a batch of whole episodes.

Every function takes ``returns`` of shape ``(n_steps,)``, the episodes laid end to end, with their ``lengths`` of shape
``(n_episodes,)``, and gives the baseline of each step, shape ``(n_steps,)``, in the unit of the returns.
The *return of an episode* is that of its first step. With several processes (:mod:`sb3_reinforce.distributed`), each gives its
own episodes, and the other episodes are those of all.
"""

from collections.abc import Callable

import numpy as np

from sb3_reinforce.distributed import all_max, all_sum
from sb3_reinforce.returns import episode_starts, timesteps


def mean(returns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    The mean return of the episodes, ``b = 1/N sum_j R_j0``. It holds the episode's own return, which shrinks the
    expectation of the gradient by the factor ``1 - 1/N`` (exactly, if ``returns`` is ``"episode"`` or ``gamma`` is 1).

    Source: Williams, Machine Learning 8, 1992 (reinforcement comparison); the factor follows from
    ``E[sum_t grad log pi_it R_j0] = 0`` for every other episode ``j``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    total, n_episodes = all_sum([returns[episode_starts(lengths)].sum(), len(lengths)])
    return np.full(len(returns), total / n_episodes)


def leave_one_out(returns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    The mean return of the *other* episodes, ``b_i = 1/(N - 1) sum_{j != i} R_j0``. Unbiased; needs two episodes.

    Source: Kool et al., Buy 4 REINFORCE samples, get a baseline for free!, ICLR 2019 workshop.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    first = returns[episode_starts(lengths)]
    total, n_episodes = all_sum([first.sum(), len(lengths)])
    return np.repeat((total - first) / (n_episodes - 1), lengths)


def timestep(returns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    The mean return of the *other* episodes at the same time, ``b_it = 1/(N - 1) sum_{j != i} R_jt``. An episode that
    is over by then counts with what it still earns, ``R_jt = 0``: an episode that outlives the others is compared with
    their end, not with nobody. Unbiased; needs two episodes. Made for the reward-to-go: returns that are the same at
    all times want :func:`leave_one_out`.

    Source: the time-dependent baseline of Greensmith et al., Variance reduction techniques for gradient estimates in
    reinforcement learning, JMLR 5, 2004, estimated from the other episodes.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    time = timesteps(lengths)
    horizon = int(all_max(lengths.max(initial=0)))
    sums = all_sum(np.append(np.bincount(time, weights=returns, minlength=horizon), len(lengths)))
    return (sums[time] - returns) / (sums[-1] - 1)


def drop_rounding(advantages: np.ndarray, returns: np.ndarray) -> None:
    """
    Set advantages to zero, in place, that are nothing but the rounding of equal returns: normalization and Adam would turn
    them into a whole step.

    :param advantages: Returns less their baseline, shape ``(n_steps,)``
    :param returns: Returns, shape ``(n_steps,)``
    """
    rounding = 1e-9 * all_max(max(returns.max(initial=0), -returns.min(initial=0)))
    advantages[(-rounding <= advantages) & (advantages <= rounding)] = 0.0


#: The values of the argument ``baseline``, besides ``None`` and ``"value"``.
BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": mean,
    "leave_one_out": leave_one_out,
    "timestep": timestep,
}
