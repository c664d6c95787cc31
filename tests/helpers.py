"""
Helpers that several test files share.

The last part holds all that the tests know about the inside of the package: a rename there is a change here only.
"""

import re
from copy import copy
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import RIDGE
from sb3_reinforce.batch import Episode
from tests.envs import CountEnv

# Models and environments

#: The plain gradient, with Adam and without a critic. Whatever else a test is about, it asks for
PLAIN = dict(
    n_episodes=8,
    gae_lambda=1.0,
    baseline="timestep",
    time_limit="terminal",
    n_value_epochs=5,
    target_kl=LinearSchedule(0.3, 0.002, 1.0),
    natural_gradient=False,
    cg_damping=0.1,
)


def make_model(env=None, policy="MlpPolicy", **kwargs):
    """Make a plain model with a fixed seed that learns from four episodes of a ``CountEnv``, unless told otherwise."""
    kwargs = {**PLAIN, "n_episodes": 4, "seed": 0, "device": "cpu", **kwargs}
    return REINFORCE(policy, CountEnv() if env is None else env, **kwargs)


def count_envs(n_envs=1, **kwargs):
    """Make a vectorized environment of monitored ``CountEnv``."""
    return DummyVecEnv([lambda: Monitor(CountEnv(**kwargs))] * n_envs)


class LinearExtractor(BaseFeaturesExtractor):
    """Learned features: a linear layer on flat observations."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=4)
        self.linear = th.nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations):
        return self.linear(observations)


# Parameters


def weights(model):
    """Return a copy of the parameters of the policy as one vector."""
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def clone(model):
    """Return a copy of the parameters and buffers of the policy, by name."""
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def changed(model, before):
    """Return the names of the parameters and buffers of the policy that differ from a copy made by :func:`clone`."""
    return {name for name, tensor in model.policy.state_dict().items() if not th.equal(tensor, before[name])}


def critic_names(model):
    """Return the names of the parameters that only the critic uses; shared features belong to the actor."""
    prefix = "value_net" if model.policy.share_features_extractor else "vf_features_extractor"
    return {name for name in model.policy.state_dict() if "value_net" in name or name.startswith((prefix, "lstm_critic"))}


def vector_of(tensors, names=None):
    """Return tensors by name, all or those of the given names, as one vector in double precision."""
    return np.concatenate([np.ravel(tensors[name]) for name in names or tensors]).astype(np.float64)


def assert_same(left, right):
    """Check that two nested structures hold equal tensors and numbers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, th.Tensor):
        assert th.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


def raises(*parts):
    """Expect a ValueError whose message has these parts, in this order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))


# Memory, by definition


def obs_of_step(observations, step):
    """Take one step of observations, a tensor or a dict of them."""
    if isinstance(observations, dict):
        return {key: part[step : step + 1] for key, part in observations.items()}
    return observations[step : step + 1]


def step_by_step(policy, observations):
    """
    Pass an episode through a policy with memory one step at a time, with the states carried on by hand.

    :param policy: A policy with memory
    :param observations: Observations of the episode, a tensor or a dict of them
    :return: For each step a copy of the distribution, and the value
    """
    critic = policy.lstm_critic if policy.lstm_critic is not None else policy.lstm_actor
    extractor = policy.vf_features_extractor if policy.lstm_critic is not None else policy.pi_features_extractor
    zeros = th.zeros(policy.lstm_hidden_state_shape).to(next(policy.parameters()))
    states_pi = states_vf = (zeros, zeros)
    distributions, values = [], []
    for step in range(len(next(iter(observations.values())) if isinstance(observations, dict) else observations)):
        obs = obs_of_step(observations, step)
        distribution, states_pi = policy.get_distribution(obs, states_pi, th.zeros(1))
        distributions.append(copy(distribution))
        values.append(policy.predict_values(obs, states_vf, th.zeros(1)).flatten())
        features = BasePolicy.extract_features(policy, obs, extractor)[None]
        is_lstm = isinstance(critic, th.nn.LSTM)
        states_vf = critic(features, states_vf)[1] if is_lstm else (critic(features, states_vf[0])[1], zeros)
    return distributions, th.cat(values)


# The linear baseline, by definition


def linear_predictions(features, returns, own):
    """
    Predict the returns of one episode by least squares on the others. The penalty is one more row for each feature but the
    first. Predictions stay within three standard deviations of the others.

    :param features: For each episode a matrix with one row per step
    :param returns: For each episode its returns
    :param own: Index of the episode
    """
    rest = np.concatenate([rows for e, rows in enumerate(features) if e != own])
    wanted = np.concatenate([values for e, values in enumerate(returns) if e != own])
    is_seen = (rest != 0).any(axis=0)
    rest = rest[:, is_seen]
    penalties = len(rest) * (RIDGE / (len(features) - 1) * rest.var(axis=0) + 1e-8 * (rest**2).mean(axis=0))
    penalties[0] = 0
    augmented = np.vstack([rest, np.diag(np.sqrt(penalties))])
    solution, *_ = np.linalg.lstsq(augmented, np.append(wanted, np.zeros(len(penalties))), rcond=None)
    return np.clip(features[own][:, is_seen] @ solution, *(wanted.mean() + np.array([-3, 3]) * wanted.std()))


# What a training run shows


class Batches(BaseCallback):
    """
    Keep what a function makes of each batch, in ``results``.

    :param function: Function of the rollout buffer, called when a rollout ends
    """

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_training_start(self):
        self.results = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.results.append(self.function(self.locals["rollout_buffer"]))


def whole_episodes(length=5):
    """Make a callback that checks that each batch holds whole episodes of a ``CountEnv``, and counts the batches."""

    def check(buffer):
        (batch,) = buffer.get()
        np.testing.assert_array_equal(buffer.lengths, np.full(buffer.n_episodes, length))
        np.testing.assert_array_equal(batch.observations.flatten(), np.tile(np.arange(length), buffer.n_episodes))

    return Batches(check)


def batch_of(model):
    """Return the whole batch of the last rollout."""
    (batch,) = model.rollout_buffer.get()
    return batch


def logged(model):
    """Return what the model has logged since the logger last wrote: after ``learn(1)``, its update."""
    return dict(model.logger.name_to_value)


def record_gradients(model):
    """Return a list that grows with each step of the policy's optimizer: the gradients that it is given, by name."""
    found = []

    def record(*_):
        found.append({name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None})

    model.policy.optimizer.register_step_pre_hook(record)
    return found


def train_again(model, learning_rate=None):
    """Make another update on the last batch, and return what it logs."""
    if learning_rate is not None:
        model.lr_schedule = lambda _: learning_rate
    model.train()
    return logged(model)


def gradient_of(model):
    """Return the gradient of the loss on the last batch, by name; empty where no step is made as it is zero."""
    found = record_gradients(model)
    before, natural_gradient, lr_schedule = clone(model), model.natural_gradient, model.lr_schedule
    model.natural_gradient = False
    train_again(model, learning_rate=0.0)
    model.natural_gradient, model.lr_schedule = natural_gradient, lr_schedule
    model.policy.load_state_dict(before)
    return found[0] if found else {}


def step_of(model, learning_rate=None):
    """Update the policy with the last batch, and return how its parameters have moved, by name."""
    before = clone(model)
    train_again(model, learning_rate)
    return {name: tensor - before[name] for name, tensor in clone(model).items()}


# The inside of the package


def collect(model):
    """Collect one batch with the policy as it is, without an update."""
    _, callback = model._setup_learn(1)
    return model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, 0)


def store_batch(buffer, episodes, truncated=False, action_masks=None):
    """Replace what is in the rollout buffer by whole episodes: triples of observations, actions and rewards."""
    buffer.reset()
    for i, (observations, actions, rewards) in enumerate(episodes):
        n_steps = len(rewards)
        done = np.arange(n_steps) == n_steps - 1
        masks = None if action_masks is None else action_masks[i]
        buffer.add(observations, actions, np.zeros(n_steps, int), masks)
        buffer.add_outcome(np.asarray(rewards), done, [{}] * n_steps)
        buffer.end_episode(Episode(0, truncated, None))
    buffer.finish()


def set_chunk_size(model, n_steps):
    """Let the model pass so many steps of the batch through the network at once."""
    model._chunk_size = n_steps


def set_actions(model, function):
    """Let the model take the actions ``function(observations)`` in its rollouts."""
    collect_rollouts = model.collect_rollouts

    class Actor:
        def __init__(self, policy, n_envs):
            pass

        def __call__(self, obs, action_masks=None, greedy=None):
            return function(obs)

        def start_episodes(self, dones):
            pass

    def collect_with(*args, **kwargs):
        with mock.patch("sb3_reinforce.rollout.make_sampler", Actor):
            return collect_rollouts(*args, **kwargs)

    model.collect_rollouts = collect_with


def sample_with_pytorch(monkeypatch):
    """Let all models sample their actions with PyTorch, never with NumPy."""
    monkeypatch.setattr("sb3_reinforce.sampler.is_plain", lambda policy: False)


def record_noise(sampler):
    """Return a list that grows with the noise of each action that the NumPy sampler takes."""
    draws, draw = [], sampler._next_noise
    sampler._next_noise = lambda: draws.append(draw()) or draws[-1]
    return draws


def actions_of_noise(distribution, noise, action_space):
    """Return the actions that a distribution makes of the noise of the NumPy sampler."""
    inner, noise = distribution.distribution, th.as_tensor(noise)
    if isinstance(action_space, spaces.Box):
        return inner.mean + inner.stddev * noise
    if isinstance(action_space, spaces.Discrete):
        return (inner.logits + noise).argmax(dim=1)
    if isinstance(action_space, spaces.MultiDiscrete):
        noises = noise.split([part.logits.shape[1] for part in inner], dim=1)
        return th.stack([(part.logits + own).argmax(dim=1) for part, own in zip(inner, noises, strict=True)], dim=1)
    return (inner.logits + noise > 0).float()


def set_noise(sampler, noise):
    """Let the NumPy sampler use this noise for every action."""
    sampler._next_noise = lambda: noise


def hidden_state(model):
    """Return the learned numbers that no public attribute shows."""
    value_rms = model._value_rms
    of_critic = float(value_rms.mean), float(value_rms.var), value_rms.count
    lengths = tuple(model._mean_episode_lengths)
    return model._kl_learning_rate_factor, lengths, float(model._advantage_rms.var), *of_critic


def state_of(model):
    """Return copies of the parameters, of all that the optimizers remember, and of the statistics of the critic."""
    found = {name: value.clone() for name, value in model.policy.state_dict().items()}
    for name, optimizer in (("policy", model.policy.optimizer), ("critic", model.value_optimizer)):
        for i, state in optimizer.state_dict()["state"].items():
            found |= {(name, i, key): th.as_tensor(value).clone() for key, value in state.items()}
    return found | {"statistics": th.tensor(hidden_state(model)[-3:], dtype=th.float64)}
