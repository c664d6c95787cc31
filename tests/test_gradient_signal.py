"""The share of signal in the gradient, estimated from two halves of the episodes."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_reinforce.batch_policy import batch_policy
from sb3_reinforce.gradient import policy_gradient
from tests.envs import CountEnv
from tests.helpers import logged, make_model

PLAIN = dict(natural_gradient=False, baseline=None, normalize_advantage=False, learning_rate=0.0, target_kl=None)


class Arms(CountEnv):
    """Episodes of one step: the second action is worth as much as is said, and there is noise."""

    action_space = spaces.Discrete(2)

    def __init__(self, worth, noise):
        super().__init__(length=1)
        self.worth, self.noise = worth, noise

    def step(self, action):
        observation, _, *rest = super().step(np.ones(2))
        return observation, self.worth * (2 * int(action) - 1) + self.noise * self.np_random.normal(), *rest


class Uneven(CountEnv):
    """Every episode is one step longer than the last one."""

    def reset(self, **kwargs):
        self.length += 1
        return super().reset(**kwargs)


@pytest.mark.parametrize("n_episodes", [2, 5])
@pytest.mark.parametrize("chunk_size", [3, 10_000])
def test_it_is_that_of_the_halves(n_episodes, chunk_size):
    """The mean gradient of every other episode times that of the rest, over the square of that of all."""
    model = make_model(Uneven(), n_episodes=n_episodes, **PLAIN).learn(1)
    buffer, policy = model.rollout_buffer, batch_policy(model.policy)
    (batch,) = buffer.get()
    log_prob = policy.distribution(batch).log_prob(batch.actions)
    gradients = []
    ends = np.cumsum(buffer.lengths)
    for start, end in zip(ends - buffer.lengths, ends, strict=True):
        steps = slice(start, end)
        loss = -(batch.advantages[steps] * log_prob[steps]).sum()
        parts = th.autograd.grad(loss, policy.parameters(), allow_unused=True, retain_graph=True)
        gradients.append(th.cat([part.flatten() for part in parts if part is not None]).numpy())
    gradients = np.stack(gradients)
    expected = gradients[::2].mean(axis=0) @ gradients[1::2].mean(axis=0) / np.linalg.norm(gradients.mean(axis=0)) ** 2
    share = len(gradients[::2]) / n_episodes
    found = policy_gradient(policy, buffer.chunks(chunk_size), n_episodes, buffer.total_steps, first_half=share)
    assert found.signal == pytest.approx(expected, rel=1e-4)
    assert logged(model)["train/grad_signal"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("worth, noise, expected", [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 3.0, 0.9)])
def test_signal_and_noise(worth, noise, expected):
    """
    With 100 episodes and fair actions, ``grad log pi`` is plus or minus the same vector: the signal is ``worth^2``, and the
    variance of the mean ``noise^2 / 100``. 200 batches: the standard error of the mean is below 0.015 in each case.
    """
    model = make_model(Arms(worth, noise), n_episodes=100, seed=1, **PLAIN)
    model.policy.action_net.weight.data.zero_()
    signals, norms = [], []
    for _ in range(200):
        found = logged(model.learn(1))
        norms.append(found["train/grad_norm"] ** 2)
        signals.append(found["train/grad_signal"] * norms[-1])
    # The mean of the product over the mean of the square: neither is a ratio of random numbers
    ratio = np.mean(signals) / np.mean(norms)
    assert ratio == pytest.approx(worth**2 / (worth**2 + noise**2 / 100) if worth or noise else 0.0, abs=0.06)
    assert ratio == pytest.approx(expected, abs=0.1)


def test_a_single_episode_has_no_halves():
    assert "train/grad_signal" not in logged(make_model(n_episodes=1, **PLAIN).learn(1))
    assert "train/grad_signal" in logged(make_model(n_episodes=2, **PLAIN).learn(1))


def test_no_gradient_has_no_signal():
    assert "train/grad_signal" not in logged(make_model(CountEnv(rewarded=False), **PLAIN).learn(1))
