import numpy as np
import pytest

from sb3_reinforce.baselines import (
    BASELINES,
    greedy_baseline,
    leave_one_out,
    linear,
    linear_features,
    mean,
    one_group,
    timestep,
    timestep_sums,
)
from sb3_reinforce.returns import episode_return
from tests.helpers import linear_predictions

LENGTHS = np.array([1, 4, 2])
RETURNS = np.array([3.0, 7.0, 5.0, 2.0, 1.0, 8.0, 4.0])


def random_batch(n_episodes=6, seed=0):
    """Return random returns, the lengths of their episodes, and observations of three numbers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, n_episodes)
    n_steps = lengths.sum()
    return rng.normal(20, 5, n_steps), lengths, rng.normal([0, 1, 10], [1, 5, 0.1], (n_steps, 3))


def values(name, returns, lengths, features, n_parts=1):
    """Return a baseline of all steps, whose episodes can be shared by several processes."""
    baseline, ends = BASELINES[name], np.cumsum(lengths)
    parts = []
    for episodes in np.array_split(np.arange(len(lengths)), n_parts):
        steps = slice(*(np.append(0, ends)[[episodes[0], episodes[-1] + 1]]))
        parts.append((returns[steps], lengths[episodes], features[steps]))
    parts = [(*part, {"features": rows} if name == "linear" else {}) for *part, rows in parts]
    groups = [one_group(part_lengths) for _, part_lengths, _ in parts]
    sums = sum(
        baseline.sums(part, part_lengths, group, 1, lengths.max(), **rows)
        for (part, part_lengths, rows), group in zip(parts, groups, strict=True)
    )
    return np.concatenate(
        [
            baseline.values(part, part_lengths, group, sums, **rows)
            for (part, part_lengths, rows), group in zip(parts, groups, strict=True)
        ]
    )


def test_mean():
    np.testing.assert_allclose(mean(RETURNS, LENGTHS), np.full(7, (3 + 7 + 8) / 3))


def test_leave_one_out():
    np.testing.assert_allclose(leave_one_out(RETURNS, LENGTHS), [7.5, *[5.5] * 4, *[5.0] * 2])


def test_timestep():
    """The mean of the other episodes that are still running; that of all their steps where none is."""
    of_all_steps = (3 + 8 + 4) / 3
    expected = [(7 + 8) / 2, (3 + 8) / 2, 4, of_all_steps, of_all_steps, (3 + 7) / 2, 5]
    np.testing.assert_allclose(timestep(RETURNS, LENGTHS), expected)


def test_timestep_of_two_episodes():
    np.testing.assert_allclose(timestep(np.array([1.0, 2.0, 5.0]), np.array([1, 2])), [2, 1, 1])


def test_timestep_reduces_to_leave_one_out():
    """With the return of the whole episode and episodes of one length, time makes no difference."""
    lengths = np.array([3, 3, 3])
    returns = episode_return(np.arange(9.0), lengths, 0.9)
    np.testing.assert_allclose(timestep(returns, lengths), leave_one_out(returns, lengths))


@pytest.mark.parametrize("name", ["leave_one_out", "timestep"])
def test_baseline_does_not_depend_on_own_episode(name):
    changed = RETURNS.copy()
    changed[1:5] += 100.0
    before, after = BASELINES[name].values(RETURNS, LENGTHS), BASELINES[name].values(changed, LENGTHS)
    np.testing.assert_array_equal(before[1:5], after[1:5])
    assert (before[:1] != after[:1]).all() and (before[5:] != after[5:]).all()


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_shifts_with_the_returns(name):
    returns, lengths, observations = random_batch()
    features = linear_features(observations, lengths)
    before, after = (values(name, returns + shift, lengths, features) for shift in (0.0, 1000.0))
    # The tiny penalty that makes the system solvable takes a little of it
    np.testing.assert_allclose(after, before + 1000.0, rtol=0, atol=0.01 if name == "linear" else 1e-9)
    assert np.abs(before - returns).max() > 1


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("n_parts", [2, 6])
def test_processes_add_up_their_sums(name, n_parts):
    returns, lengths, observations = random_batch()
    features = linear_features(observations, lengths)
    alone = BASELINES[name].values(returns, lengths, **({"features": features} if name == "linear" else {}))
    np.testing.assert_allclose(values(name, returns, lengths, features, n_parts), alone, rtol=1e-6)


# Groups


@pytest.mark.parametrize("name", ["mean", "leave_one_out", "timestep"])
def test_each_group_is_a_batch(name):
    returns, lengths, _ = random_batch(9)
    groups = np.array([2, 0, 1, 0, 2, 1, 1, 0, 2])
    of_steps = np.repeat(groups, lengths)
    found = BASELINES[name].values(returns, lengths, groups, BASELINES[name].sums(returns, lengths, groups, 3))
    for group in range(3):
        alone = BASELINES[name].values(returns[of_steps == group], lengths[groups == group])
        np.testing.assert_allclose(found[of_steps == group], alone)


def test_greedy():
    """The return of the group's greedy episode at the same time; where it is over, its mean over all times."""
    sums = timestep_sums(np.array([10.0, 6.0, 1.0, 5.0, 3.0]), np.array([2, 3]), np.array([1, 0]), 2, horizon=4)
    found = greedy_baseline(np.array([1, 4, 3]), np.array([0, 0, 1]), sums)
    np.testing.assert_allclose(found, [1, 1, 5, 3, 3, 10, 6, 8])


# The linear baseline


def test_linear_features():
    observations = np.array([[2, -3], [0, 4], [5, 1]], dtype=np.float32)
    expected = [
        [1, 2, -3, 4, 9, 0, 0, 0],
        [1, 0, 4, 0, 16, 0, 0, 0],
        [1, 5, 1, 25, 1, 0.01, 0.0001, 0.000001],
    ]
    found = linear_features(observations, np.array([1, 2]))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_linear_by_hand():
    """One feature besides the constant: the slope of the others' returns, made smaller by the penalty."""
    returns, lengths = np.array([100.0, 1.0, 3.0, 5.0, 2.0]), np.array([1, 2, 2])
    x = np.array([10.0, 0.0, 1.0, 2.0, 3.0])
    rest, others = x[1:], returns[1:]
    # Three over the number of the other episodes, times the variance
    slope = ((rest - 1.5) * others).mean() / (rest.var() * (1 + 3 / 2))
    found = linear(returns, lengths, features=np.column_stack([np.ones(5), x]))
    assert found[0] == pytest.approx(others.mean() + slope * (10 - 1.5), rel=1e-6)


@pytest.mark.parametrize("scale", [1, 1000])
def test_linear_is_least_squares_on_the_others(scale):
    """Also if the observations of one episode are far larger than those of the others: nothing of it is left in theirs."""
    returns, lengths, observations = random_batch()
    observations[: lengths[0]] *= scale
    features = linear_features(observations, lengths)
    found, ends = linear(returns, lengths, features=features), np.cumsum(lengths)[:-1]
    parts = np.split(features, ends), np.split(returns, ends)
    for own, predictions in enumerate(np.split(found, ends)):
        expected = linear_predictions(*parts, own)
        np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_linear_does_not_depend_on_own_returns():
    returns, lengths, observations = random_batch()
    features = linear_features(observations, lengths)
    own = slice(lengths[0], lengths[:2].sum())
    changed = returns.copy()
    changed[own] += np.linspace(-100, 100, lengths[1])
    before, after = (linear(each, lengths, features=features) for each in (returns, changed))
    np.testing.assert_allclose(after[own], before[own], rtol=1e-6)
    assert np.abs(np.delete(after - before, np.r_[own])).min() > 1e-3


def test_linear_is_exact_where_returns_are_linear(monkeypatch):
    """But for the penalty."""
    monkeypatch.setattr("sb3_reinforce.baselines.RIDGE", 0.0)
    _, lengths, observations = random_batch()
    features = linear_features(observations, lengths)
    returns = features @ np.random.default_rng(1).normal(size=features.shape[1])
    found = linear(returns, lengths, features=features)
    near = np.abs(returns - returns.mean()) < 2 * returns.std()  # Predictions stay near the mean of the others
    np.testing.assert_allclose(found[near], returns[near], rtol=0, atol=1e-3 * returns.std())
    monkeypatch.setattr("sb3_reinforce.baselines.RIDGE", 3.0)
    assert np.abs(linear(returns, lengths, features=features) - returns).max() > 0.1 * returns.std()


def test_linear_with_a_large_penalty_is_the_mean_of_the_others(monkeypatch):
    monkeypatch.setattr("sb3_reinforce.baselines.RIDGE", 1e9)
    returns, lengths, observations = random_batch()
    expected = [np.delete(returns, np.r_[end - n : end]).mean() for end, n in zip(np.cumsum(lengths), lengths, strict=True)]
    found = linear(returns, lengths, features=linear_features(observations, lengths))
    np.testing.assert_allclose(found, np.repeat(expected, lengths), rtol=1e-6)


def test_linear_does_not_depend_on_the_units_of_the_observations():
    returns, lengths, observations = random_batch()
    found = [linear(returns, lengths, features=linear_features(each, lengths)) for each in (observations, 1000 * observations)]
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[5, 14, 9, 7, 12, 6], [900, 700, 1000, 800, 600]])
def test_linear_leaves_out_what_the_others_have_not_seen(lengths):
    """A number that is zero in all of the other episodes, although it is far from zero in this one."""
    rng, lengths = np.random.default_rng(0), np.array(lengths)
    returns, observations = rng.normal(20, 5, lengths.sum()), rng.normal(size=(lengths.sum(), 8))
    for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        own = slice(start, start + length)
        seen = np.zeros_like(observations)
        seen[:, 1:], seen[own, 0] = observations[:, 1:], observations[own, 0]
        found, expected = (linear(returns, lengths, features=linear_features(each, lengths)) for each in (seen, seen[:, 1:]))
        np.testing.assert_allclose(found[own], expected[own], rtol=1e-6)


def test_linear_knows_equal_returns():
    """Down to rounding: whitening would make a whole step of anything more."""
    _, lengths, observations = random_batch()
    found = linear(np.full(lengths.sum(), 7.0), lengths, features=linear_features(observations, lengths))
    np.testing.assert_allclose(found, 7.0, rtol=1e-10)


def test_linear_stays_near_the_others():
    """A step that is unlike all others is not extrapolated to."""
    returns, lengths, observations = random_batch()
    observations[: lengths[0]] *= 1000
    found = linear(returns, lengths, features=linear_features(observations, lengths))
    others = returns[lengths[0] :]
    assert np.abs(found[: lengths[0]] - others.mean()).max() == pytest.approx(3 * others.std())
