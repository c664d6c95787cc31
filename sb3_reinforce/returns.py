"""
Return estimators: pure functions on the rewards of a batch of whole episodes.

Every function takes the episodes of a batch laid end to end, ``rewards`` of shape ``(n_steps,)``, with their
``lengths`` of shape ``(n_episodes,)`` in steps, ``lengths.sum() == n_steps``. Rewards and returns share one unit.
"""

from collections.abc import Callable

import numpy as np


def episode_starts(lengths: np.ndarray) -> np.ndarray:
    """
    Find the first step of each episode: ``lengths=[2, 3]`` gives ``[0, 2]``.

    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Indices into the steps of the batch, shape ``(n_episodes,)``
    """
    return np.cumsum(lengths) - lengths


def timesteps(lengths: np.ndarray) -> np.ndarray:
    """
    Count the steps within each episode: ``lengths=[2, 3]`` gives ``[0, 1, 0, 1, 2]``.

    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :return: Time of each step, counted from 0 at the start of its episode, shape ``(n_steps,)``
    """
    return np.arange(lengths.sum()) - np.repeat(episode_starts(lengths), lengths)


def discounted_cumsum(x: np.ndarray, lengths: np.ndarray, discount: float) -> np.ndarray:
    """
    Add up, with a discount, the rest of the episode from each step on, ``y[t] = x[t] + discount * y[t + 1]``:
    ``x=[1, 1, 1], lengths=[3], discount=0.5`` gives ``[1.75, 1.5, 1]``.

    :param x: Values of the steps, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param discount: Factor per step, in [0, 1]
    :return: Sums in double precision, shape ``(n_steps,)``
    """
    # Imported here because scipy.signal takes longer to import than the rest of this package
    from scipy.signal import lfilter

    y = np.empty(len(x), dtype=np.float64)
    end = 0
    for length in lengths:
        start, end = end, end + length
        y[start:end] = lfilter([1.0], [1.0, -discount], x[start:end][::-1].astype(np.float64))[::-1]
    return y


def reward_to_go(rewards: np.ndarray, lengths: np.ndarray, gamma: float, last_values: np.ndarray | None = None) -> np.ndarray:
    """
    Compute the return from each step on, which its action can influence: ``R_t = sum_{k >= t} gamma^(k - t) r_k``, plus
    ``gamma^(T - t) V(s_T)`` for an episode of length ``T`` that a time limit cut off.

    Source: Sutton & Barto, Reinforcement Learning: An Introduction, 2nd ed., eq. 3.8 and section 13.3.

    :param rewards: Rewards, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param gamma: Discount factor per step
    :param last_values: Value of the observation after the last step, zero where the episode terminated,
        shape ``(n_episodes,)``; ``None`` is zero for all
    :return: Returns, shape ``(n_steps,)``
    """
    if last_values is not None:
        rewards = rewards.astype(np.float64)
        rewards[np.cumsum(lengths) - 1] += gamma * last_values
    return discounted_cumsum(rewards, lengths, gamma)


def episode_return(
    rewards: np.ndarray, lengths: np.ndarray, gamma: float, last_values: np.ndarray | None = None
) -> np.ndarray:
    """
    Compute the return of the whole episode, for each of its steps: ``R_t = sum_{k >= 0} gamma^k r_k``.

    Source: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    Machine Learning 8, 1992, theorem 2 (episodic REINFORCE). Parameters as in :func:`reward_to_go`.

    :return: Returns, shape ``(n_steps,)``
    """
    returns = reward_to_go(rewards, lengths, gamma, last_values)
    return np.repeat(returns[episode_starts(lengths)], lengths)


def mean_reward_to_go(
    rewards: np.ndarray, lengths: np.ndarray, gamma: float, last_values: np.ndarray | None = None
) -> np.ndarray:
    """
    Compute the mean of the rewards-to-go of the episode, for each of its steps: ``R_t = 1/T sum_k R^togo_k``.
    Its loss is the mean log-probability of an episode times the sum of its rewards-to-go, which is what an earlier
    version of Gymnasium's tutorial "Training using REINFORCE for Mujoco" published. It is *not* an unbiased estimator
    of the policy gradient. Parameters as in :func:`reward_to_go`.

    :return: Returns, shape ``(n_steps,)``
    """
    returns = reward_to_go(rewards, lengths, gamma, last_values)
    sums = np.add.reduceat(returns, episode_starts(lengths))
    return np.repeat(sums / lengths, lengths)


def generalized_advantage(
    rewards: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    gamma: float,
    gae_lambda: float,
    last_values: np.ndarray | None = None,
) -> np.ndarray:
    """
    Compute the generalized advantage estimate ``A_t = sum_{k >= t} (gamma * lambda)^(k - t) delta_k`` of the temporal
    differences ``delta_k = r_k + gamma V(s_{k+1}) - V(s_k)``. With ``gae_lambda=1`` this is :func:`reward_to_go` minus
    ``values``.

    Source: Schulman et al., https://arxiv.org/abs/1506.02438, eq. 16.

    :param rewards: Rewards, shape ``(n_steps,)``
    :param values: Value of the observation of each step, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param gamma: Discount factor per step
    :param gae_lambda: Trade-off of bias against variance, 1 for Monte Carlo
    :param last_values: As in :func:`reward_to_go`
    :return: Advantages, shape ``(n_steps,)``
    """
    next_values = np.append(values[1:], 0.0).astype(np.float64)
    next_values[np.cumsum(lengths) - 1] = 0.0 if last_values is None else last_values
    return discounted_cumsum(rewards + gamma * next_values - values, lengths, gamma * gae_lambda)


#: The values of the argument ``returns``.
RETURNS: dict[str, Callable[..., np.ndarray]] = {
    "reward_to_go": reward_to_go,
    "episode": episode_return,
    "mean_reward_to_go": mean_reward_to_go,
}
