"""
Baselines that need no critic: pure functions on the returns of a batch of whole episodes.

Every function takes ``returns`` of shape ``(n_steps,)``, the episodes laid end to end, with their ``lengths`` of shape
``(n_episodes,)``, and gives the baseline of each step, shape ``(n_steps,)``, in the unit of the returns.
The *return of an episode* is that of its first step.

A baseline needs ``sums`` over the episodes of the batch. Where several processes share a batch, the caller adds the sums of
all processes and hands them in; by default the batch is what the function is given.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sb3_reinforce.returns import episode_starts, timesteps

#: Strength of the ridge penalty of the linear baseline, in episodes
RIDGE = 3.0


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
    Add up, at each time, the returns of the episodes that are not over, and count them: ``[sum_j R_j0, sum_j R_j1, ...]``
    and ``[N_0, N_1, ...]``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param horizon: Length of the longest episode of all processes, ``None`` for that of these episodes
    :return: Sums and numbers, shape ``(2, horizon)``
    """
    times = timesteps(lengths)
    sums = np.bincount(times, weights=returns, minlength=horizon or 0)
    return np.stack([sums, np.bincount(times, minlength=horizon or 0)])


def linear_features(observations: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    Make the features that the linear baseline is linear in: ``[1, s, s^2, t, t^2, t^3]`` for an observation ``s`` (as the
    network gets it, flat) at time ``t``, in 100 steps.

    Source: Duan et al., Benchmarking deep reinforcement learning for continuous control, ICML 2016, section 5.

    :param observations: Observations, shape ``(n_steps, n_numbers)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Features in double precision, shape ``(n_steps, 2 n_numbers + 4)``
    """
    observations = observations.astype(np.float64)
    time = timesteps(lengths)[:, None] / 100
    return np.hstack([np.ones_like(time), observations, observations**2, time, time**2, time**3])


def _linear_moments(features: np.ndarray, returns: np.ndarray) -> np.ndarray:
    columns = np.column_stack([features, returns])
    return columns.T @ columns


def linear_sums(returns: np.ndarray, lengths: np.ndarray, horizon: int | None = None, *, features: np.ndarray) -> np.ndarray:
    """
    Add up what linear regression needs, ``sum_jt [f_jt, R_jt] [f_jt, R_jt]^T``, and the number of episodes.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param horizon: Not used
    :param features: Features ``f`` of each step, the first of which is 1, shape ``(n_steps, n_features)``
    :return: The sums and, in a row of its own, the number, shape ``(n_features + 2, n_features + 1)``
    """
    moments = _linear_moments(features, returns)
    return np.vstack([moments, np.full(moments.shape[1], len(lengths))])


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
    Compute the mean return of the *other* episodes at the same time, ``b_it = 1/(N_t - 1) sum_{j != i} R_jt``, over the
    ``N_t`` episodes that are not over; where all others are over, their mean return over all times. Unbiased; needs two
    episodes. Made for the reward-to-go: returns that are the same at all times want :func:`leave_one_out`.

    Source: the time-dependent baseline of Peters & Schaal, Reinforcement learning of motor skills with policy gradients,
    Neural Networks 21, 2008, estimated from the other episodes.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param sums: Result of :func:`timestep_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    sums = timestep_sums(returns, lengths) if sums is None else sums
    total, n_running = sums[:, timesteps(lengths)] - np.stack([returns, np.ones_like(returns)])
    own = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=returns)
    at_all_times = (sums[0].sum() - own) / (sums[1].sum() - lengths)
    return np.divide(total, n_running, out=np.repeat(at_all_times, lengths), where=n_running > 0)


def linear(returns: np.ndarray, lengths: np.ndarray, sums: np.ndarray | None = None, *, features: np.ndarray) -> np.ndarray:
    """
    Predict the returns of each episode by ridge regression on the *other* episodes. Unbiased; needs two episodes. The
    penalty of a weight is ``RIDGE / (N - 1)`` times the variance of its feature, whatever units features have; the mean of
    the returns has none. Predictions stay within three standard deviations of the others' mean return, so that a step unlike
    all of theirs does not get a baseline unlike all of theirs.

    Source: the linear feature baseline of Duan et al., ICML 2016, fitted without the episode that it is for.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param sums: Result of :func:`linear_sums`, over all processes
    :param features: Result of :func:`linear_features`, shape ``(n_steps, n_features)``
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    sums = linear_sums(returns, lengths, features=features) if sums is None else sums
    n_others = sums[-1, 0] - 1
    # Exactly zero in a single process. To subtract the episode itself instead would cancel digits
    elsewhere = sums[:-1] - _linear_moments(features, returns)

    def predictions() -> Iterator[np.ndarray]:
        for start, length in zip(episode_starts(lengths), lengths, strict=True):
            rest = np.r_[:start, start + length : len(returns)]
            others = elsewhere + _linear_moments(features[rest], returns[rest])
            n_steps, total, squares = others[0, 0], others[0, -1], np.diag(others)
            mean, std = total / n_steps, np.sqrt(max(squares[-1] / n_steps - (total / n_steps) ** 2, 0))
            # Features that the others have not had get no weight
            scale = np.sqrt(np.where(squares[:-1] > 0, squares[:-1], np.inf))
            system, right = others[:-1, :-1] / np.outer(scale, scale), others[:-1, -1] / scale
            penalty = RIDGE / n_others * np.clip(1 - system[0] ** 2, 0, 1) + 1e-8
            penalty[0] = 0
            predicted = features[start : start + length] / scale @ np.linalg.solve(system + np.diag(penalty), right)
            yield np.clip(predicted, mean - 3 * std, mean + 3 * std)

    return np.concatenate([np.zeros(0), *predictions()])


class Baseline(NamedTuple):
    """
    A baseline and the sums that it needs.

    :param sums: Function ``(returns, lengths, horizon) -> sums``; that of ``"linear"`` takes ``features``, too
    :param values: Function ``(returns, lengths, sums) -> baseline of each step``, likewise
    """

    sums: Callable[..., np.ndarray]
    values: Callable[..., np.ndarray]


#: The values of the argument ``baseline``, besides ``None`` and ``"value"``.
BASELINES: dict[str, Baseline] = {
    "mean": Baseline(episode_sums, mean),
    "leave_one_out": Baseline(episode_sums, leave_one_out),
    "timestep": Baseline(timestep_sums, timestep),
    "linear": Baseline(linear_sums, linear),
}
