"""Which environments still owe episodes: an object that knows neither SB3 nor PyTorch."""

import subprocess
import sys

import numpy as np
import pytest

from sb3_reinforce.quota import EpisodeQuota


def run(quota, lengths):
    """Step environments whose episodes have fixed lengths; :return: episodes counted for each, and steps."""
    counts, step = np.zeros(len(lengths), dtype=int), 0
    while not quota.is_met:
        step += 1
        counts[quota.finish(step % np.array(lengths) == 0, step)] += 1
    return counts.tolist(), step


@pytest.mark.parametrize("n_episodes, n_envs, quotas", [(8, 3, [2, 3, 3]), (3, 3, [1, 1, 1]), (5, 1, [5])])
def test_quota_is_that_of_evaluate_policy(n_episodes, n_envs, quotas):
    """A short episode counts as often as a long one: the quota does not depend on who finishes first."""
    quota = EpisodeQuota(n_episodes, n_envs, 100)
    counts, steps = run(quota, range(1, n_envs + 1))
    assert counts == quotas
    assert steps == max(count * length for count, length in zip(quotas, range(1, n_envs + 1), strict=True))


def test_processes_share_a_quota():
    """Two processes with one and two environments give what one process with three gives."""
    parts = [EpisodeQuota(7, 1, 100, 0, 3), EpisodeQuota(7, 2, 100, 1, 3)]
    assert [*parts[0].quotas, *parts[1].quotas] == EpisodeQuota(7, 3, 100).quotas.tolist() == [2, 2, 3]


def test_owing():
    quota = EpisodeQuota(2, 2, 100)
    assert quota.owing.tolist() == [0, 1]
    assert quota.finish(np.array([False, True]), 1).tolist() == [1]
    assert quota.owing.tolist() == [0] and not quota.is_met
    assert quota.finish(np.array([False, True]), 2).tolist() == []
    assert quota.finish(np.array([True, False]), 3).tolist() == [0]
    assert quota.is_met
    assert quota.owing.tolist() == []


def test_lengths():
    """Only episodes that are waited for are measured, from their own start."""
    quota = EpisodeQuota(3, 2, 10)  # One episode of environment 0, two of environment 1
    for step in range(1, 10):
        quota.finish(np.array([step == 5, step == 8]), step)
        quota.check_lengths(step)
    for step in range(10, 18):
        quota.check_lengths(step)
    with pytest.raises(ValueError, match="Environment 1 has not finished its episode after max_episode_steps=10"):
        quota.check_lengths(18)


def test_imports_neither_sb3_nor_torch():
    """The file of the module alone: the package around it is not imported."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules, 'stable_baselines3' in sys.modules)"
    path = sys.modules[EpisodeQuota.__module__].__file__
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
