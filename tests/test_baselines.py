import numpy as np
import pytest

from sb3_reinforce.baselines import BASELINES, leave_one_out, mean, timestep
from sb3_reinforce.returns import episode_return

LENGTHS = np.array([1, 4, 2])
RETURNS = np.array([3.0, 7.0, 5.0, 2.0, 1.0, 8.0, 4.0])


def test_mean():
    np.testing.assert_allclose(mean(RETURNS, LENGTHS), np.full(7, (3 + 7 + 8) / 3))


def test_leave_one_out():
    np.testing.assert_allclose(leave_one_out(RETURNS, LENGTHS), [7.5, *[5.5] * 4, *[5.0] * 2])


def test_timestep():
    """The episodes of lengths 1 and 2 count as 0 once they are over."""
    expected = [(7 + 8) / 2, (3 + 8) / 2, 4 / 2, 0.0, 0.0, (3 + 7) / 2, 5 / 2]
    np.testing.assert_allclose(timestep(RETURNS, LENGTHS), expected)


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
