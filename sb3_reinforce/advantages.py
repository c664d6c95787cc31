"""Advantages of a batch of whole episodes: arrays in, arrays out. Knows no network, no logger and no environment."""

import math
from typing import NamedTuple

import numpy as np

from sb3_reinforce.baselines import BASELINES, greedy_baseline, linear_features, one_group, timestep_sums
from sb3_reinforce.parallel.processes import all_max, all_sum, mean_and_var
from sb3_reinforce.returns import RETURNS, episode_starts, generalized_advantage, timesteps

#: Advantages that are smaller than this share of the largest return are rounding errors
ROUNDING = 1e-9


class Advantages(NamedTuple):
    """
    Advantages and what they are made of, of each step, in double precision, shape ``(n_steps,)``.

    :param returns: Monte-Carlo returns
    :param baseline: Baseline ``b``
    :param advantages: ``R - b``, where ``R`` is the Monte-Carlo return, or with ``gae_lambda`` below 1 the lambda-return
    :param targets: Targets of the critic
    :param mean: Mean of the advantages of all processes
    :param var: Variance of the advantages of all processes
    """

    returns: np.ndarray
    baseline: np.ndarray
    advantages: np.ndarray
    targets: np.ndarray
    mean: float
    var: float


def compute_advantages(
    rewards: np.ndarray,
    lengths: np.ndarray,
    gamma: float,
    returns: str = "reward_to_go",
    baseline: str | None = None,
    values: np.ndarray | None = None,
    last_values: np.ndarray | None = None,
    gae_lambda: float = 1.0,
    observations: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    n_groups: int = 1,
    greedy: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Advantages:
    """
    Compute the factors ``R_it - b_it`` of the policy gradient. All processes that share a batch have to call this.

    :param rewards: Rewards, shape ``(n_steps,)``
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param gamma: Discount factor per step
    :param returns: Name of the return, a key of ``RETURNS``
    :param baseline: Name of the baseline: ``None``, a key of ``BASELINES``, ``"greedy"`` or ``"value"``
    :param values: The critic's value of each step, shape ``(n_steps,)``, for ``"value"``
    :param last_values: Value of the observation after the last step of each episode, zero where the episode terminated,
        shape ``(n_episodes,)``; ``None`` is zero for all
    :param gae_lambda: Factor of the lambda-return (``"value"`` only), 1 for Monte Carlo
    :param observations: Flat observations (``"linear"`` only), shape ``(n_steps, n_numbers)``
    :param groups: Group of each episode, shape ``(n_episodes,)``, ``None`` for one group
    :param n_groups: Number of groups of all processes
    :param greedy: Rewards, lengths and groups of the greedy episodes (``"greedy"`` only)
    :return: Returns, baseline, advantages, targets of the critic
    """
    groups = one_group(lengths) if groups is None else groups
    monte_carlo = RETURNS[returns](rewards, lengths, gamma, last_values)
    targets = monte_carlo
    if baseline is None:
        b = np.zeros_like(monte_carlo)
    elif baseline == "greedy":
        assert greedy is not None
        greedy_rewards, greedy_lengths, greedy_groups = greedy
        of_greedy = RETURNS[returns](greedy_rewards, greedy_lengths, gamma)
        horizon = int(all_max(max(lengths.max(initial=0), greedy_lengths.max(initial=0))))
        sums = all_sum(timestep_sums(of_greedy, greedy_lengths, greedy_groups, n_groups, horizon))
        b = greedy_baseline(lengths, groups, sums)
    elif baseline == "value":
        assert values is not None
        b = values
        targets = values + generalized_advantage(rewards, values, lengths, gamma, gae_lambda, last_values)
    else:
        horizon = int(all_max(lengths.max(initial=0)))
        features = {} if observations is None else {"features": linear_features(observations, lengths)}
        sums = all_sum(BASELINES[baseline].sums(monte_carlo, lengths, groups, n_groups, horizon, **features))
        b = BASELINES[baseline].values(monte_carlo, lengths, groups, sums, **features)
    advantages = (targets if gae_lambda < 1 else monte_carlo) - b
    return Advantages(monte_carlo, b, advantages, targets, *mean_and_var(advantages))


def describe(estimate: Advantages, lengths: np.ndarray, baseline: str | None) -> dict[str, float]:
    """
    Compute what is logged of the advantages. All processes that share a batch have to call this.

    :param estimate: Result of :func:`compute_advantages`
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param baseline: Name of the baseline
    :return: Numbers by name: mean and standard deviation of the returns of the episodes, standard deviation of the
        advantages, share of the variance of the targets that the baseline explains
    """
    return_mean, return_var = mean_and_var(estimate.returns[episode_starts(lengths)])
    found = {"return_mean": return_mean, "return_std": math.sqrt(return_var), "advantage_std": math.sqrt(estimate.var)}
    if baseline is not None:
        _, target_var = mean_and_var(estimate.targets)
        _, error_var = mean_and_var(estimate.targets - estimate.baseline)
        found["explained_variance"] = 1 - error_var / target_var if target_var else math.nan
    return found


def count_without_signal(estimate: Advantages, lengths: np.ndarray, groups: np.ndarray, n_groups: int) -> int:
    """
    Count the groups whose episodes all have the same return. All processes that share a batch have to call this.

    :param estimate: Result of :func:`compute_advantages`
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param groups: Group of each episode, shape ``(n_episodes,)``
    :param n_groups: Number of groups of all processes
    :return: Number of groups
    """
    first = estimate.returns[episode_starts(lengths)]
    extremes = np.full((n_groups, 2), -np.inf)
    np.maximum.at(extremes, groups, np.stack([first, -first], axis=1))
    highest, lowest = (all_max(extremes) * [1, -1]).T
    return int((highest - lowest <= ROUNDING * np.abs(highest)).sum())


def weights(
    estimate: Advantages, lengths: np.ndarray, total_steps: int, normalize: bool = False, discount: float = 1.0
) -> np.ndarray:
    """
    Turn advantages into the factors of the gradients of the log-probabilities. All processes that share a batch have to
    call this.

    :param estimate: Result of :func:`compute_advantages`
    :param lengths: Length of each episode in steps, shape ``(n_episodes,)``
    :param total_steps: Number of steps of all processes
    :param normalize: Whether to whiten the advantages: mean 0, standard deviation 1
    :param discount: Factor of step ``t``, ``discount^t`` (Nota & Thomas, https://arxiv.org/abs/1906.07073)
    :return: Factors, shape ``(n_steps,)``
    """
    factors = estimate.advantages.copy()
    normalize = normalize and total_steps > 1
    if normalize:
        factors -= estimate.mean
    # Equal returns differ by rounding: whitening and Adam would turn the rounding into a whole step
    smallest = ROUNDING * all_max(np.abs(estimate.returns).max(initial=0))
    factors[(-smallest <= factors) & (factors <= smallest)] = 0.0
    if normalize:
        _, var = mean_and_var(factors)
        factors /= math.sqrt(var * total_steps / (total_steps - 1)) + 1e-8
    if discount < 1:
        factors *= discount ** timesteps(lengths)
    return factors


def to_single_precision(rewards: np.ndarray, **arrays: np.ndarray) -> list[np.ndarray]:
    """
    Convert arrays to single precision. All processes that share a batch have to call this.

    :param rewards: Rewards that the arrays come from, for the message
    :param arrays: Arrays by name
    :return: The arrays in single precision
    :raises ValueError: If a number is not finite, in any process
    """
    with np.errstate(over="ignore", invalid="ignore"):
        converted = [array.astype(np.float32) for array in arrays.values()]
    if all_max(not all(np.isfinite(array).all() for array in converted)):
        raise ValueError(
            f"One of {', '.join(arrays)} is not finite in single precision (largest reward "
            f"{np.abs(rewards).max(initial=0)}): no update was made. Scale the rewards down, for example with "
            "VecNormalize; look at the rewards that a callback has filled in, and at the critic's values"
        )
    return converted
