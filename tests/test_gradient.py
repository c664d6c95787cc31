"""The gradient that `train()` leaves in the parameters, against formulas that are written out."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.buffers import Episode
from sb3_reinforce.returns import RETURNS
from tests.envs import SpacesEnv

SGD = dict(optimizer_class=th.optim.SGD)
ESTIMATOR = dict(normalize_advantage=False, target_kl=None, policy_kwargs=SGD)


class FixedLength(gym.Wrapper):
    """
    Pendulum whose episodes terminate after 5 steps (no time limit, nothing to bootstrap) and start from the same state.
    """

    def reset(self, **kwargs):
        self.n_steps = 0
        return self.env.reset(seed=0)

    def step(self, action):
        self.n_steps += 1
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, self.n_steps == 5, False, info


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def parameters(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def assert_close(actual, expected, rtol=1e-6):
    """Relative to the length of the whole vector, as the terms of a gradient cancel."""
    assert actual.keys() == expected.keys() and len(actual) > 0
    scale = th.cat([g.flatten() for g in expected.values()]).norm()
    assert scale > 0
    error = th.cat([(actual[name] - expected[name]).flatten() for name in expected]).norm()
    assert error <= rtol * scale, f"{error / scale:.2e}"


def slow_gradient(model):
    """The estimator of the class docstring, episode by episode, in a batch that is already collected."""
    buffer = model.rollout_buffer
    batch = next(buffer.get())
    _, log_probs, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    returns = RETURNS[model.returns](buffer.rewards, buffer.lengths, model.gamma)
    baseline = BASELINES[model.baseline](returns, buffer.lengths) if model.baseline else np.zeros_like(returns)
    advantages = returns - baseline
    if model.normalize_advantage:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    total = 0.0
    start = 0
    for length in buffer.lengths:
        for t in range(length):
            w_t = model.gamma**t if model.discount_states else 1.0
            total = total + w_t * advantages[start + t] * log_probs[start + t]
        start += length
    total = total / (len(buffer.lengths) if model.reduction == "episode" else buffer.n_steps)
    names, params = zip(*[(n, p) for n, p in model.policy.named_parameters() if "value" not in n], strict=True)
    return dict(zip(names, th.autograd.grad(total, params), strict=True))


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("baseline", [None, *BASELINES])
@pytest.mark.parametrize("reduction", ["episode", "step"])
@pytest.mark.parametrize("discount_states, normalize_advantage", [(False, False), (True, False), (True, True)])
def test_update_is_the_estimator(returns, baseline, reduction, discount_states, normalize_advantage):
    """With SGD and learning rate 1, the parameters move by exactly the estimator."""
    model = REINFORCE(
        "MlpPolicy",
        "InvertedPendulum-v4",
        learning_rate=1.0,
        n_episodes=3,
        gamma=0.9,
        returns=returns,
        baseline=baseline,
        reduction=reduction,
        discount_states=discount_states,
        normalize_advantage=normalize_advantage,
        target_kl=None,
        policy_kwargs=dict(optimizer_class=th.optim.SGD, net_arch=[8]),
        seed=0,
    )
    expected = {}
    before = parameters(model.policy)
    model.train_ = model.train
    model.train = lambda: (expected.update(slow_gradient(model)), model.train_())
    model.learn(1)
    assert model.rollout_buffer.n_episodes == 3 and len(set(model.rollout_buffer.lengths)) > 1
    assert_close(gradients(model.policy), {name: -g for name, g in expected.items()}, rtol=5e-6)
    for name, parameter in model.policy.named_parameters():
        np.testing.assert_allclose(
            parameter.detach(), before[name] + expected.get(name, 0.0), rtol=1e-5, atol=1e-5 * expected["log_std"].abs().item()
        )


def test_entropy_gradient():
    """The entropy of a Gaussian grows by 1 per unit of log_std, at each of the steps of an episode."""
    model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", learning_rate=0.0, n_episodes=3, seed=0, **ESTIMATOR)
    model.learn(1)
    without = model.policy.log_std.grad.item()
    model.ent_coef = 0.5
    model.train()
    expected = without - 0.5 * model.rollout_buffer.n_steps / 3
    np.testing.assert_allclose(model.policy.log_std.grad.item(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["InvertedPendulum-v4", "InvertedPendulum-v4-as-published"])
def test_tutorial(name):
    """The loss of the tutorial, corrected and as published, with its network written out, on a recorded episode."""
    settings = yaml.safe_load((Path(__file__).parent.parent / "hyperparams" / "tutorial.yml").read_text())[name]
    del settings["n_timesteps"]
    settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"th": th})
    model = REINFORCE(env="InvertedPendulum-v4", seed=1, **{**settings, "learning_rate": 0.0})
    model.learn(1)
    batch = next(model.rollout_buffer.get())
    actual = gradients(model.policy)

    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh())
    mean_net, stddev_net = nn.Linear(32, 1), nn.Linear(32, 1)
    policy = model.policy
    network.load_state_dict(policy.mlp_extractor.policy_net.state_dict())
    mean_net.load_state_dict(policy.action_net.state_dict())
    stddev_net.load_state_dict(policy.std_net.state_dict())
    features = network(batch.observations)
    stddev = th.log(1 + th.exp(stddev_net(features)))
    log_probs = Normal(mean_net(features), stddev + 1e-6).log_prob(batch.actions).squeeze()
    deltas, running = [], 0.0
    for reward in model.rollout_buffer.rewards[::-1]:
        running = reward + 0.99 * running
        deltas.insert(0, running)
    deltas = th.tensor(np.array(deltas), dtype=th.float32)
    loss = -th.sum(log_probs.mean() * deltas) if "published" in name else -th.sum(log_probs * deltas)
    loss.backward()

    expected = {}
    for prefix, module in (("mlp_extractor.policy_net", network), ("action_net", mean_net), ("std_net", stddev_net)):
        expected.update({f"{prefix}.{key}": p.grad for key, p in module.named_parameters()})
    assert len(deltas) > 3 and isinstance(policy.optimizer, th.optim.AdamW)
    np.testing.assert_allclose(stddev.mean().item(), np.log(2), atol=0.2)
    assert_close(actual, expected)


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_reduces_to_a2c(normalize_advantage):
    """On whole episodes and without bootstrapping, one A2C step is our step with the critic and reduction="step"."""
    a2c_env, env = (make_vec_env("Pendulum-v1", wrapper_class=FixedLength) for _ in range(2))
    common = dict(seed=3, learning_rate=1e-3, gamma=0.9, policy_kwargs=SGD, normalize_advantage=normalize_advantage)
    a2c = A2C(ActorCriticPolicy, a2c_env, n_steps=20, vf_coef=0.0, max_grad_norm=0.5, use_rms_prop=False, **common)
    model = REINFORCE(
        ActorCriticPolicy,
        env,
        n_episodes=4,
        baseline="value",
        reduction="step",
        normalize_value=False,
        value_learning_rate=0.0,
        max_grad_norm=0.5,
        target_kl=None,
        **common,
    )
    before = parameters(model.policy)
    for name, parameter in a2c.policy.named_parameters():
        assert th.equal(parameter, before[name])
    for algorithm in (a2c, model):
        algorithm.set_random_seed(3)
        algorithm.learn(20)
    np.testing.assert_array_equal(model.rollout_buffer.rewards, a2c.rollout_buffer.rewards.flatten())
    moved = {name: p - before[name] for name, p in parameters(model.policy).items()}
    assert_close(moved, {name: p - before[name] for name, p in parameters(a2c.policy).items()}, rtol=1e-4)


@pytest.mark.parametrize("space, size", [(spaces.Discrete(20_000), 209), (spaces.Box(-1, 1, (4,)), 2**13)])
def test_chunks_fit_the_observations_as_the_network_sees_them(space, size):
    model = REINFORCE("MlpPolicy", SpacesEnv(space, spaces.Discrete(2)), policy_kwargs=dict(net_arch=[2]), device="cpu")
    assert model._chunk_size == size


def test_chunks_make_no_difference():
    critic = dict(baseline="value", normalize_value=False, value_learning_rate=0.0)
    model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", learning_rate=0.0, seed=0, **critic, **ESTIMATOR)
    model.learn(1)
    whole, policy_loss = gradients(model.policy), model.logger.name_to_value["train/policy_loss"]
    model._chunk_size = 7
    model.train()
    actor = {name: g for name, g in gradients(model.policy).items() if "value" not in name}
    assert_close(actor, {name: whole[name] for name in actor}, rtol=1e-5)
    assert model.logger.name_to_value["train/policy_loss"] == pytest.approx(policy_loss, rel=1e-4)


LARGE_BATCH = """
import resource, sys
import numpy as np
from sb3_reinforce import REINFORCE
from sb3_reinforce.buffers import Episode

model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", baseline=sys.argv[1] or None, n_value_epochs=1, value_batch_size=10_000)
model.learn(1)
rng, buffer, n_steps = np.random.default_rng(0), model.rollout_buffer, 10**6
buffer.reset()
dones = np.arange(1, 10**4 + 1) % 1000 == 0
for _ in range(n_steps // len(dones)):
    for i in range(0, len(dones), 1000):
        obs, actions = rng.normal(size=(1000, 4)), rng.normal(size=(1000, 1))
        buffer.add(obs, actions, np.ones(1000), dones[i : i + 1000], np.zeros(1000, int))
        buffer.end_episode(Episode(0, False, None))
buffer.finish()
assert buffer.n_steps == n_steps and buffer.n_episodes == 1000
n_updates = model._n_updates
model.train()
assert model._n_updates == n_updates + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_memory_of_a_large_batch(baseline):
    """A batch of a million steps trains within 2 GiB, PyTorch included."""
    command = [sys.executable, "-W", "ignore", "-c", LARGE_BATCH, baseline]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kib = int(output) / (1024 if sys.platform == "darwin" else 1)
    assert kib < 2 * 1024**2


class TestTargetKL:
    """The KL divergence of the step, recomputed from the closed form for Gaussians."""

    @staticmethod
    def gaussian(model):
        batch = next(model.rollout_buffer.get())
        with th.no_grad():
            normal = model.policy.get_distribution(batch.observations).distribution
        return normal.mean, normal.stddev

    def step(self, **kwargs):
        model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", seed=0, learning_rate=0.0, **kwargs)
        model.learn(1)
        return model

    def kl(self, old, new):
        (m0, s0), (m1, s1) = old, new
        return (th.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5).mean().item()

    @pytest.mark.parametrize("learning_rate, rises", [(1e-4, True), (1e-2, True), (1.0, False), (100.0, False)])
    def test_step_stays_within_the_limit(self, learning_rate, rises):
        model = self.step(target_kl=0.01)
        old = self.gaussian(model)
        model._kl_learning_rate_factor, model.lr_schedule = 0.9, lambda _: learning_rate
        model.train()
        kl = self.kl(old, self.gaussian(model))
        assert 0 < kl <= 2 * 0.01
        assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        # The learning rate follows: up after a short step, down after one that had to be halved
        assert (model._kl_learning_rate_factor > 0.9) == rises

    def test_without_a_limit(self):
        model = self.step(target_kl=None)
        old = self.gaussian(model)
        model.lr_schedule = lambda _: 1.0
        model.train()
        kl = self.kl(old, self.gaussian(model))
        assert kl > 1 and model._kl_learning_rate_factor == 1.0
        assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(kl, rel=1e-3)

    def test_limit_of_zero_forbids_the_step(self):
        model = self.step(target_kl=0.0)
        before = parameters(model.policy)
        model.lr_schedule = lambda _: 1e-2
        model.train()
        assert all(th.equal(p, before[name]) for name, p in model.policy.named_parameters())

    @pytest.mark.parametrize("kwargs", [dict(normalize_advantage=False), {}, dict(natural_gradient=True)])
    def test_equal_returns_make_no_step(self, kwargs):
        """Eight episodes of 1000 steps with reward 1, whose returns differ by rounding alone."""
        model = self.step(**kwargs)
        model.rollout_buffer.reset()
        dones = np.arange(1, 8001) % 1000 == 0
        obs, actions = np.random.default_rng(0).normal(size=(2, 8000, 4))
        model.rollout_buffer.add(obs, actions[:, :1], np.ones(8000), dones, np.zeros(8000, int))
        model.rollout_buffer.episodes = [Episode(0, True, None)] * 8
        model.rollout_buffer.finish()
        before = parameters(model.policy)
        model.lr_schedule, factor = lambda _: 1e-2, model._kl_learning_rate_factor
        model.train()
        assert all(th.equal(p, before[name]) for name, p in model.policy.named_parameters())
        assert model._kl_learning_rate_factor == factor

    def test_schedule(self):
        model = REINFORCE("MlpPolicy", "InvertedPendulum-v4", seed=0, target_kl=LinearSchedule(0.1, 1e-4, 1.0))
        kls = []
        train = model.train
        model.train = lambda: (train(), kls.append(model.logger.name_to_value["train/approx_kl"]))
        model.learn(4000)
        assert kls[0] > 1e-3 and kls[-1] <= 2e-4


def test_value_fit():
    """The critic learns the return of a task where it depends on the observation alone, and nothing else moves."""
    env = make_vec_env("Pendulum-v1", wrapper_class=FixedLength, seed=0)
    model = REINFORCE("MlpPolicy", env, baseline="value", learning_rate=0.0, gamma=0.0, n_value_epochs=20, seed=0)
    before = parameters(model.policy)
    model.learn(2000)
    assert model.logger.name_to_value["train/explained_variance"] > 0.8
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    assert moved == {name for name in before if "value_net" in name}
    # In the unit of the rewards, which are about -5 on average
    batch = next(model.rollout_buffer.get())
    error = F.mse_loss(th.as_tensor(model._predict_values(batch.observations)), batch.returns.double())
    assert error < 0.5 * batch.returns.var()
