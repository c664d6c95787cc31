"""
Baselines that need no critic: pure functions on the returns of a batch of whole episodes.

Every function takes ``returns`` of shape ``(n_steps,)``, the episodes laid end to end, with their ``lengths`` and ``groups``
(numbers from 0) of shape ``(n_episodes,)``, and gives the baseline of each step, shape ``(n_steps,)``, in the unit of the
returns. The *return of an episode* is that of its first step. *The episodes* that a baseline is made of are those of the
group: by default, the batch is one group.

A baseline needs ``sums`` over the episodes of each group. Where several processes share a batch, the caller adds the sums of
all processes and hands them in; by default the batch is what the function is given.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sb3_reinforce.returns import episode_starts, timesteps

#: Strength of the ridge penalty of the linear baseline, in episodes
RIDGE = 3.0


def one_group(lengths: np.ndarray) -> np.ndarray:
    """
    Let all episodes be of one group.

    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Group of each episode, shape ``(n_episodes,)``
    """
    return np.zeros(len(lengths), dtype=int)


def episode_sums(
    returns: np.ndarray, lengths: np.ndarray, groups: np.ndarray, n_groups: int = 1, horizon: int | None = None
) -> np.ndarray:
    """
    Add up the returns of the episodes of each group, and count them: ``[sum_j R_j0, N]``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``
    :param n_groups: Number of groups of all processes
    :param horizon: Not used
    :return: Sums and numbers, shape ``(2, n_groups)``
    """
    first = returns[episode_starts(lengths)]
    return np.stack([np.bincount(groups, weights, n_groups) for weights in (first, np.ones(len(groups)))])


def timestep_sums(
    returns: np.ndarray, lengths: np.ndarray, groups: np.ndarray, n_groups: int = 1, horizon: int | None = None
) -> np.ndarray:
    """
    Add up, at each time, the returns of the episodes of each group that are not over, and count them: ``[sum_j R_j0,
    sum_j R_j1, ...]`` and ``[N_0, N_1, ...]``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``
    :param n_groups: Number of groups of all processes
    :param horizon: Length of the longest episode of all processes, ``None`` for that of these episodes
    :return: Sums and numbers, shape ``(2, n_groups, horizon)``
    """
    horizon = int(lengths.max(initial=0)) if horizon is None else horizon
    cells = np.repeat(groups, lengths) * horizon + timesteps(lengths)
    sums = [np.bincount(cells, weights, n_groups * horizon) for weights in (returns, np.ones(len(returns)))]
    return np.stack(sums).reshape(2, n_groups, horizon)


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


def linear_sums(
    returns: np.ndarray,
    lengths: np.ndarray,
    groups: np.ndarray,
    n_groups: int = 1,
    horizon: int | None = None,
    *,
    features: np.ndarray,
) -> np.ndarray:
    """
    Add up what linear regression needs, ``sum_jt [f_jt, R_jt] [f_jt, R_jt]^T``, and the number of episodes, over all groups.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Not used: the regression tells starts apart by their observations
    :param n_groups: Not used
    :param horizon: Not used
    :param features: Features ``f`` of each step, the first of which is 1, shape ``(n_steps, n_features)``
    :return: The sums and, in a row of its own, the number, shape ``(n_features + 2, n_features + 1)``
    """
    moments = _linear_moments(features, returns)
    return np.vstack([moments, np.full(moments.shape[1], len(lengths))])


def mean(
    returns: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None = None, sums: np.ndarray | None = None
) -> np.ndarray:
    """
    Compute the mean return of the episodes, ``b = 1/N sum_j R_j0``. The mean holds the episode's own return, which
    shrinks the expectation of the gradient by the factor ``1 - 1/N`` (exactly, if ``returns`` is ``"episode"`` or
    ``gamma`` is 1).

    Source: Williams, Machine Learning 8, 1992 (reinforcement comparison); the factor follows from
    ``E[sum_t grad log pi_it R_j0] = 0`` for every other episode ``j``.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``, ``None`` for one group
    :param sums: Result of :func:`episode_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    groups = one_group(lengths) if groups is None else groups
    total, n_episodes = (episode_sums(returns, lengths, groups) if sums is None else sums)[:, groups]
    return np.repeat(total / n_episodes, lengths)


def leave_one_out(
    returns: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None = None, sums: np.ndarray | None = None
) -> np.ndarray:
    """
    Compute the mean return of the *other* episodes, ``b_i = 1/(N - 1) sum_{j != i} R_j0``. Unbiased; needs two episodes.

    Source: Kool et al., Buy 4 REINFORCE samples, get a baseline for free!, ICLR 2019 workshop.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``, ``None`` for one group
    :param sums: Result of :func:`episode_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    groups = one_group(lengths) if groups is None else groups
    total, n_episodes = (episode_sums(returns, lengths, groups) if sums is None else sums)[:, groups]
    first = returns[episode_starts(lengths)]
    return np.repeat((total - first) / (n_episodes - 1), lengths)


def timestep(
    returns: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None = None, sums: np.ndarray | None = None
) -> np.ndarray:
    """
    Compute the mean return of the *other* episodes at the same time, ``b_it = 1/(N_t - 1) sum_{j != i} R_jt``, over the
    ``N_t`` episodes that are not over; where all others are over, their mean return over all times. Unbiased; needs two
    episodes. Made for the reward-to-go: returns that are the same at all times want :func:`leave_one_out`.

    Source: the time-dependent baseline of Peters & Schaal, Reinforcement learning of motor skills with policy gradients,
    Neural Networks 21, 2008, estimated from the other episodes.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``, ``None`` for one group
    :param sums: Result of :func:`timestep_sums`, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    groups = one_group(lengths) if groups is None else groups
    sums = timestep_sums(returns, lengths, groups) if sums is None else sums
    return _mean_at_time(sums, lengths, groups, np.stack([returns, np.ones_like(returns)]))


def _mean_at_time(sums: np.ndarray, lengths: np.ndarray, groups: np.ndarray, own: np.ndarray) -> np.ndarray:
    """
    Compute the mean of each group at the time of each step, or over all times where it is over at that time.

    :param sums: Result of :func:`timestep_sums`
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``
    :param own: What to leave out of the sums, of each step, shape ``(2, n_steps)``
    :return: Means, shape ``(n_steps,)``
    """
    of_steps = np.repeat(np.arange(len(lengths)), lengths)
    total, n_running = sums[:, groups[of_steps], timesteps(lengths)] - own
    own_total, own_steps = (np.bincount(of_steps, weights=row, minlength=len(lengths)) for row in own)
    all_total, all_steps = sums.sum(axis=2)[:, groups]
    at_all_times = (all_total - own_total) / (all_steps - own_steps)
    return np.divide(total, n_running, out=at_all_times[of_steps], where=n_running > 0)


def greedy_baseline(lengths: np.ndarray, groups: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """
    Take the return, at the same time, of the greedy episode that has the same start, or its mean over all times where it is
    over. Unbiased: it does not depend on the sampled actions.

    Sources: the self-critical baseline of Rennie et al., https://arxiv.org/abs/1612.00563; ReMax (Li et al.),
    https://arxiv.org/abs/2310.10505. There it is the return of the whole episode, as with ``returns="episode"``.

    :param lengths: Length of each sampled episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each sampled episode, shape ``(n_episodes,)``
    :param sums: Result of :func:`timestep_sums` for the greedy episodes, over all processes
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    return _mean_at_time(sums, lengths, groups, np.zeros((2, lengths.sum())))


def linear(
    returns: np.ndarray,
    lengths: np.ndarray,
    groups: np.ndarray | None = None,
    sums: np.ndarray | None = None,
    *,
    features: np.ndarray,
) -> np.ndarray:
    """
    Predict the returns of each episode by ridge regression on the *other* episodes. Unbiased; needs two episodes. The
    penalty of a weight is ``RIDGE / (N - 1)`` times the variance of its feature, whatever units features have; the mean of
    the returns has none. Predictions stay within three standard deviations of the others' mean return, so that a step unlike
    all of theirs does not get a baseline unlike all of theirs.

    Source: the linear feature baseline of Duan et al., ICML 2016, fitted without the episode that it is for.

    :param returns: Returns, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Not used
    :param sums: Result of :func:`linear_sums`, over all processes
    :param features: Result of :func:`linear_features`, shape ``(n_steps, n_features)``
    :return: Baseline of each step, shape ``(n_steps,)``
    """
    sums = linear_sums(returns, lengths, one_group(lengths), features=features) if sums is None else sums
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

    :param sums: Function ``(returns, lengths, groups, n_groups, horizon) -> sums``; that of ``"linear"`` takes ``features``
    :param values: Function ``(returns, lengths, groups, sums) -> baseline of each step``, likewise
    """

    sums: Callable[..., np.ndarray]
    values: Callable[..., np.ndarray]


#: The values of the argument ``baseline``, besides ``None``, ``"greedy"`` and ``"value"``.
BASELINES: dict[str, Baseline] = {
    "mean": Baseline(episode_sums, mean),
    "leave_one_out": Baseline(episode_sums, leave_one_out),
    "timestep": Baseline(timestep_sums, timestep),
    "linear": Baseline(linear_sums, linear),
}
