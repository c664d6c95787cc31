import numpy as np
import pytest

from sb3_reinforce.returns import (
    discounted_cumsum,
    episode_return,
    episode_starts,
    generalized_advantage,
    mean_reward_to_go,
    reward_to_go,
    timesteps,
)

LENGTHS = np.array([1, 4, 2])


@pytest.fixture
def rewards():
    return np.random.default_rng(0).normal(size=LENGTHS.sum()).astype(np.float32)


def episodes(array):
    return np.split(array, np.cumsum(LENGTHS)[:-1])


def test_episode_starts():
    np.testing.assert_array_equal(episode_starts(np.array([2, 3])), [0, 2])


def test_timesteps():
    np.testing.assert_array_equal(timesteps(np.array([2, 3])), [0, 1, 0, 1, 2])


def test_discounted_cumsum():
    np.testing.assert_array_equal(discounted_cumsum(np.ones(3), np.array([3]), 0.5), [1.75, 1.5, 1.0])
    np.testing.assert_array_equal(discounted_cumsum(np.ones(3), np.array([1, 2]), 0.5), [1.0, 1.5, 1.0])


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_reward_to_go(rewards, gamma):
    returns = reward_to_go(rewards, LENGTHS, gamma)
    assert returns.dtype == np.float64
    for r, actual in zip(episodes(rewards), episodes(returns), strict=True):
        expected = [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_reward_to_go_of_constant_rewards():
    """Geometric sum, at a length and a discount at which single precision would show."""
    n, gamma = 10_000, 0.9999
    expected = (1 - gamma ** np.arange(n, 0, -1.0)) / (1 - gamma)
    np.testing.assert_allclose(reward_to_go(np.ones(n, np.float32), np.array([n]), gamma), expected, rtol=1e-12)


def test_last_values(rewards):
    """A last value is a reward that comes one step after the last."""
    last_values = np.array([2.0, 0.0, -3.0])
    appended = np.concatenate([[*r, v] for r, v in zip(episodes(rewards), last_values, strict=True)])
    expected = reward_to_go(appended, LENGTHS + 1, 0.9)
    kept = np.delete(np.arange(len(appended)), np.cumsum(LENGTHS + 1) - 1)
    before = rewards.copy()
    np.testing.assert_allclose(reward_to_go(rewards, LENGTHS, 0.9, last_values), expected[kept], rtol=1e-6)
    np.testing.assert_array_equal(rewards, before)  # rewards are not edited


def test_episode_return(rewards):
    for r, actual in zip(episodes(rewards), episodes(episode_return(rewards, LENGTHS, 0.9)), strict=True):
        np.testing.assert_allclose(actual, np.full(len(r), sum(0.9**k * r[k] for k in range(len(r)))), rtol=1e-6)


def test_mean_reward_to_go(rewards):
    to_go = reward_to_go(rewards, LENGTHS, 0.9)
    for expected, actual in zip(episodes(to_go), episodes(mean_reward_to_go(rewards, LENGTHS, 0.9)), strict=True):
        np.testing.assert_allclose(actual, np.full(len(expected), expected.mean()), rtol=1e-12)


@pytest.mark.parametrize("last_values", [None, np.array([0.5, 0.0, 2.0])])
def test_generalized_advantage(rewards, last_values):
    gamma, gae_lambda = 0.9, 0.8
    values = np.random.default_rng(1).normal(size=len(rewards))
    actual = episodes(generalized_advantage(rewards, values, LENGTHS, gamma, gae_lambda, last_values))
    for i, (r, v) in enumerate(zip(episodes(rewards), episodes(values), strict=True)):
        v_next = [*v[1:], 0.0 if last_values is None else last_values[i]]
        delta = [r[t] + gamma * v_next[t] - v[t] for t in range(len(r))]
        expected = [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
        np.testing.assert_allclose(actual[i], expected, rtol=1e-6)


def test_generalized_advantage_reduces_to_monte_carlo(rewards):
    values = np.random.default_rng(1).normal(size=len(rewards))
    last_values = np.array([0.5, 0.0, 2.0])
    actual = generalized_advantage(rewards, values, LENGTHS, 0.9, 1.0, last_values)
    np.testing.assert_allclose(actual, reward_to_go(rewards, LENGTHS, 0.9, last_values) - values, rtol=1e-6)


def test_generalized_advantage_reduces_to_temporal_difference(rewards):
    values = np.random.default_rng(1).normal(size=len(rewards))
    actual = generalized_advantage(rewards, values, LENGTHS, 0.9, 0.0)
    np.testing.assert_allclose(actual[1:5], rewards[1:5] + 0.9 * np.array([*values[2:5], 0.0]) - values[1:5], rtol=1e-6)
