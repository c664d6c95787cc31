"""The rollout buffer: whole episodes end to end, in memory that grows."""

import itertools

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_reinforce.batch import Episode
from sb3_reinforce.buffers import EpisodeRolloutBuffer


def fill(buffer, lengths, n_envs=1, env_idx=0, first=0, truncated=()):
    """Store episodes of one environment, whose observation, action and reward count the steps."""
    step = first
    for i, length in enumerate(lengths):
        for t in range(length):
            values = np.full(n_envs, step, dtype=np.float32)
            done = np.full(n_envs, t == length - 1)
            buffer.add(np.stack([values, -values], axis=1), values[:, None], np.array([env_idx]))
            buffer.add_outcome(values, done, [{}] * n_envs)
            step += 1
        buffer.end_episode(Episode(env_idx, i in truncated, None))


def make_buffer(buffer_size, n_envs=1):
    space = spaces.Box(-1, 1, (1,))
    return EpisodeRolloutBuffer(buffer_size, spaces.Box(-1, 1, (2,)), space, device="cpu", n_envs=n_envs)


def assert_counts(buffer, steps):
    batch = next(buffer.get())
    assert batch.observations.tolist() == [[step, -step] for step in steps]
    assert batch.actions.tolist() == [[step] for step in steps]
    assert buffer.rewards.tolist() == list(steps)


@pytest.mark.parametrize("buffer_size", [1, 2, 7, 100])
def test_buffer_grows(buffer_size):
    buffer = make_buffer(buffer_size)
    fill(buffer, [1, 4, 10])
    buffer.finish()
    assert_counts(buffer, range(15))
    assert buffer.lengths.tolist() == [1, 4, 10]


def test_capacity_is_at_most_twice_the_largest_batch():
    buffer = make_buffer(4)
    capacities = []
    for n_steps in [3, 50, 10, 120, 7]:
        buffer.reset()
        assert buffer.n_steps == buffer.n_episodes == 0
        fill(buffer, [1, n_steps - 1])
        buffer.finish()
        assert_counts(buffer, range(n_steps))
        capacities.append(buffer.buffer_size)
    assert capacities[0] == 4
    assert 50 <= capacities[1] <= 100
    # The memory is kept from batch to batch
    assert capacities[2] == capacities[1]
    assert 120 <= capacities[3] <= 240
    assert capacities[4] == capacities[3]


def test_get_twice():
    buffer = make_buffer(1)
    fill(buffer, [2, 3])
    buffer.finish()
    buffer.advantages[:], buffer.targets[:] = np.arange(5), -np.arange(5)
    first, second = next(buffer.get()), next(buffer.get())
    for tensors in zip(first[:4], second[:4], strict=True):
        assert th.equal(*tensors)
    assert first.advantages.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch_size, shuffle", [*itertools.product([1, 4, 19, 20, 50], [False, True]), (None, False)])
def test_samples_cover_each_step_once(batch_size, shuffle):
    buffer = make_buffer(1)
    fill(buffer, [8, 12])
    buffer.finish()
    buffer.advantages[:], buffer.targets[:] = buffer.rewards, -buffer.rewards
    size = batch_size or 20
    if shuffle:
        batches, sizes = zip(*buffer.get_minibatches(batch_size), strict=True)
        assert [len(batch.actions) for batch in batches] == list(sizes)
    else:
        batches = list(buffer.get(batch_size))
    assert [len(batch.actions) for batch in batches] == [min(size, 20 - start) for start in range(0, 20, size)]
    steps = th.cat([batch.advantages for batch in batches])
    # The rows stay together
    assert th.equal(th.cat([batch.targets for batch in batches]), -steps)
    assert th.equal(th.cat([batch.actions for batch in batches]), steps[:, None])
    assert th.equal(th.cat([batch.observations for batch in batches]), th.stack([steps, -steps], dim=1))
    assert (steps.tolist() == list(range(20))) != shuffle
    assert sorted(steps.tolist()) == list(range(20))


def test_discard_truncated():
    buffer = make_buffer(1)
    fill(buffer, [2, 3, 1, 4], truncated=(0, 2))
    buffer.finish(discard_truncated=True)
    assert_counts(buffer, [2, 3, 4, 6, 7, 8, 9])
    assert buffer.lengths.tolist() == [3, 4]
    assert buffer.n_episodes == 2
    assert buffer.n_steps == 7


def test_envs_one_after_the_other():
    buffer = make_buffer(1, n_envs=3)
    fill(buffer, [2, 1], n_envs=3, env_idx=2, first=0)
    fill(buffer, [3], n_envs=3, env_idx=0, first=10)
    fill(buffer, [1], n_envs=3, env_idx=2, first=20)
    buffer.finish()
    assert_counts(buffer, [10, 11, 12, 0, 1, 2, 20])
    assert buffer.lengths.tolist() == [3, 2, 1, 1]
    assert [episode.env_idx for episode in buffer.episodes] == [0, 2, 2, 2]


def test_incomplete_episode_is_refused():
    buffer = make_buffer(1)
    fill(buffer, [2])
    buffer.add(np.zeros((1, 2)), np.zeros((1, 1)), np.array([0]))
    buffer.add_outcome(np.zeros(1), np.array([False]), [{}])
    with pytest.raises(AssertionError, match="not complete"):
        buffer.finish()
