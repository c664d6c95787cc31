"""The gradient that the optimizer of the policy is given, and the step that is made, against formulas written out."""

import multiprocessing
import resource
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch import nn
from torch.distributions import Normal

from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import BASELINES, linear_features
from sb3_reinforce.returns import RETURNS
from tests.envs import SpacesEnv
from tests.helpers import (
    batch_of,
    changed,
    clone,
    collect,
    critic_names,
    gradient_of,
    logged,
    make_model,
    set_chunk_size,
    store_batch,
    train_again,
)

PENDULUM = "InvertedPendulum-v4"
SGD = dict(optimizer_class=th.optim.SGD)
ESTIMATOR = dict(normalize_advantage=False, target_kl=None, policy_kwargs=SGD)


class FixedLength(gym.Wrapper):
    """Pendulum whose episodes terminate after 5 steps (no time limit, nothing to bootstrap) and start from the same state."""

    def reset(self, **kwargs):
        self.n_steps = 0
        return self.env.reset(seed=0)

    def step(self, action):
        self.n_steps += 1
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, self.n_steps == 5, False, info


def assert_close(actual, expected, rtol=1e-6):
    """Check that gradients agree, relative to the length of the whole vector, as the terms of a gradient cancel."""
    assert actual.keys() == expected.keys() and len(actual) > 0
    scale = th.cat([g.flatten() for g in expected.values()]).norm()
    assert scale > 0
    error = th.cat([(actual[name] - expected[name]).flatten() for name in expected]).norm()
    assert error <= rtol * scale, f"{error / scale:.2e}"


def slow_gradient(model):
    """Return the estimator of the class docstring, episode by episode, on the last batch."""
    buffer = model.rollout_buffer
    batch = batch_of(model)
    _, log_probs, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    returns = RETURNS[model.returns](buffer.rewards, buffer.lengths, model.gamma)
    baseline = np.zeros_like(returns)
    if model.baseline is not None:
        features = linear_features(batch.observations.numpy(), buffer.lengths)
        arguments = {"features": features} if model.baseline == "linear" else {}
        baseline = BASELINES[model.baseline].values(returns, buffer.lengths, **arguments)
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


@pytest.fixture(scope="module")
def collected():
    """A model with a batch of three episodes of unequal lengths, and the parameters with which they were collected."""
    policy_kwargs = dict(optimizer_class=th.optim.SGD, net_arch=[8])
    model = make_model(PENDULUM, n_episodes=3, gamma=0.9, target_kl=None, policy_kwargs=policy_kwargs)
    collect(model)
    assert model.rollout_buffer.n_episodes == 3 and len(set(model.rollout_buffer.lengths)) > 1
    return model, clone(model)


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("baseline", [None, *BASELINES])
@pytest.mark.parametrize("reduction", ["episode", "step"])
@pytest.mark.parametrize("discount_states, normalize_advantage", [(False, False), (True, False), (True, True)])
def test_update_is_the_estimator(collected, returns, baseline, reduction, discount_states, normalize_advantage):
    """With SGD and learning rate 1, the parameters move by exactly the estimator."""
    model, before = collected
    model.policy.load_state_dict(before)
    model.returns, model.baseline, model.reduction = returns, baseline, reduction
    model.discount_states, model.normalize_advantage = discount_states, normalize_advantage
    expected = slow_gradient(model)
    assert_close(gradient_of(model), {name: -g for name, g in expected.items()}, rtol=5e-6)
    train_again(model, learning_rate=1.0)
    for name, parameter in model.policy.named_parameters():
        np.testing.assert_allclose(
            parameter.detach(), before[name] + expected.get(name, 0.0), rtol=1e-5, atol=1e-5 * expected["log_std"].abs().item()
        )


def test_entropy_gradient():
    """The entropy of a Gaussian grows by 1 per unit of log_std, at each of the steps of an episode."""
    model = make_model(PENDULUM, n_episodes=3, **ESTIMATOR)
    collect(model)
    without = gradient_of(model)["log_std"].item()
    model.ent_coef = 0.5
    expected = without - 0.5 * model.rollout_buffer.n_steps / 3
    np.testing.assert_allclose(gradient_of(model)["log_std"].item(), expected, rtol=1e-5)


def test_entropy_schedule():
    """A function of the progress counts as the number that it gives where the batch begins, as the log says."""
    model = make_model(PENDULUM, n_episodes=3, **ESTIMATOR)
    collect(model)
    model._current_progress_remaining = 0.75
    model.ent_coef = 0.3
    expected = gradient_of(model)
    model.ent_coef = lambda progress: 0.4 * progress
    actual = gradient_of(model)
    assert all(th.equal(actual[name], part) for name, part in expected.items())
    assert train_again(model)["train/ent_coef"] == pytest.approx(0.3)


def test_entropy_gradient_without_an_analytical_form(monkeypatch):
    """``log pi grad log pi`` is -1 per unit of log_std in expectation (within 5 standard errors), ``grad log pi`` is 0."""
    model = make_model(PENDULUM, n_episodes=3, **ESTIMATOR)
    collect(model)
    without = gradient_of(model)["log_std"].item()
    batch = batch_of(model)
    distribution = model.policy.get_distribution(batch.observations).distribution
    log_prob = distribution.log_prob(batch.actions).flatten().detach()
    z = ((batch.actions - distribution.mean) / distribution.stddev).flatten().detach()
    terms = (log_prob * (z**2 - 1)).numpy()
    assert abs(terms.mean() + 1) < 5 * terms.std() / np.sqrt(len(terms))
    monkeypatch.setattr(DiagGaussianDistribution, "entropy", lambda _: None)
    model.ent_coef = 0.5
    np.testing.assert_allclose(gradient_of(model)["log_std"].item(), without + 0.5 * terms.sum() / 3, rtol=1e-4)
    assert train_again(model)["train/entropy_loss"] == pytest.approx(log_prob.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["InvertedPendulum-v4", "InvertedPendulum-v4-as-published"])
def test_tutorial(name):
    """The loss of the tutorial, corrected and as published, with its network written out, on a recorded episode."""
    settings = yaml.safe_load((Path(__file__).parent.parent / "hyperparams" / "tutorial.yml").read_text())[name]
    del settings["n_timesteps"]
    settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"th": th})
    model = REINFORCE(env=PENDULUM, seed=1, **settings)
    collect(model)
    batch = batch_of(model)
    actual = gradient_of(model)

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
    model = make_model(
        env,
        ActorCriticPolicy,
        n_episodes=4,
        baseline="value",
        reduction="step",
        normalize_value=False,
        value_learning_rate=0.0,
        max_grad_norm=0.5,
        target_kl=None,
        **common,
    )
    before = clone(model)
    assert not changed(a2c, before)
    for algorithm in (a2c, model):
        algorithm.set_random_seed(3)
        algorithm.learn(20)
    np.testing.assert_array_equal(model.rollout_buffer.rewards, a2c.rollout_buffer.rewards.flatten())
    moved, expected = ({name: p - before[name] for name, p in clone(one).items()} for one in (model, a2c))
    assert_close(moved, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "space, n_steps, size", [(spaces.Discrete(20_000), 500, 209), (spaces.Box(-1, 1, (4,)), 10_000, 2**13)]
)
def test_chunks_fit_the_observations_as_the_network_sees_them(space, n_steps, size):
    model = make_model(SpacesEnv(space, spaces.Discrete(2)), policy_kwargs=dict(net_arch=[2]))
    collect(model)
    observations = [np.array([space.sample() for _ in range(n_steps // 2)]) for _ in range(2)]
    episodes = [(obs, np.zeros((len(obs), 1), int), np.random.rand(len(obs))) for obs in observations]
    store_batch(model.rollout_buffer, episodes)
    rows = []
    model.policy.action_net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model.train()
    assert max(rows) == size


def test_chunks_make_no_difference():
    critic = dict(baseline="value", normalize_value=False, value_learning_rate=0.0)
    model = make_model(PENDULUM, n_episodes=8, **critic, **ESTIMATOR)
    collect(model)
    whole, policy_loss = gradient_of(model), logged(model)["train/policy_loss"]
    set_chunk_size(model, 7)
    assert_close(gradient_of(model), whole, rtol=1e-5)
    assert logged(model)["train/policy_loss"] == pytest.approx(policy_loss, rel=1e-4)


def train_on_a_large_batch(baseline):
    """Train on a million steps, and return the largest memory of this process in KiB."""
    model = make_model(PENDULUM, baseline=baseline, n_value_epochs=1, value_batch_size=10_000)
    collect(model)
    rng, buffer = np.random.default_rng(0), model.rollout_buffer
    store_batch(buffer, ((rng.normal(size=(1000, 4)), rng.normal(size=(1000, 1)), np.ones(1000)) for _ in range(1000)))
    assert buffer.n_steps == 10**6 and buffer.n_episodes == 1000
    model.train()
    assert model._n_updates == 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_memory_of_a_large_batch(baseline):
    """A batch of a million steps trains within 2 GiB, PyTorch included."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(train_on_a_large_batch, (baseline,)) < 2 * 1024**2


class TestTargetKL:
    """The KL divergence of the step, recomputed from the closed form for Gaussians."""

    @staticmethod
    def gaussian(model):
        with th.no_grad():
            normal = model.policy.get_distribution(batch_of(model).observations).distribution
        return normal.mean, normal.stddev

    @staticmethod
    def collected(**kwargs):
        model = make_model(PENDULUM, n_episodes=8, **kwargs)
        collect(model)
        return model

    @staticmethod
    def kl(old, new):
        (m0, s0), (m1, s1) = old, new
        return (th.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5).mean().item()

    @pytest.mark.parametrize("learning_rate, rises", [(1e-4, True), (1e-2, True), (1.0, False), (100.0, False)])
    def test_step_stays_within_the_limit(self, learning_rate, rises):
        model = self.collected(target_kl=0.01)
        old = self.gaussian(model)
        log = train_again(model, learning_rate)
        kl = self.kl(old, self.gaussian(model))
        assert 0 < kl <= 2 * 0.01
        assert log["train/learning_rate"] == learning_rate
        assert log["train/approx_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        # The learning rate follows: up after a short step, down after one that had to be halved
        assert (train_again(model)["train/learning_rate"] > learning_rate) == rises

    def test_without_a_limit(self):
        model = self.collected(target_kl=None)
        old = self.gaussian(model)
        log = train_again(model, learning_rate=2.0)
        kl = self.kl(old, self.gaussian(model))
        assert kl > 1
        assert log["train/approx_kl"] == pytest.approx(kl, rel=1e-3)
        assert train_again(model)["train/learning_rate"] == 2.0

    def test_limit_of_zero_forbids_the_step(self):
        model = self.collected(target_kl=0.0)
        before = clone(model)
        train_again(model, learning_rate=1e-2)
        assert not changed(model, before)

    @pytest.mark.parametrize("kwargs", [dict(normalize_advantage=False), {}, dict(natural_gradient=True)])
    def test_equal_returns_make_no_step(self, kwargs):
        """Eight episodes of 1000 steps with reward 1, whose returns differ by rounding alone."""
        model = make_model(PENDULUM, **kwargs).learn(1)  # The optimizer has moments
        buffer, rng = model.rollout_buffer, np.random.default_rng(0)
        length = "train/step_length" if model.natural_gradient else "train/learning_rate"
        learning_rates = [train_again(model)[length]]
        episodes = [(rng.normal(size=(1000, 4)), rng.normal(size=(1000, 1)), np.ones(1000)) for _ in range(8)]
        store_batch(buffer, episodes, truncated=True)
        before = clone(model)
        learning_rates += [train_again(model)[length] for _ in range(2)]
        assert not changed(model, before)
        # Nor does the learning rate change from then on
        assert learning_rates[1] == learning_rates[2] > 0

    def test_schedule(self):
        model = make_model(PENDULUM, n_episodes=8, target_kl=LinearSchedule(0.1, 1e-4, 1.0))
        kls = []
        train = model.train
        model.train = lambda: (train(), kls.append(logged(model)["train/approx_kl"]))
        model.learn(4000)
        # Batches of 1600 steps: the last one begins at 80 % of the run
        assert kls[0] > 1e-3 and kls[-1] <= 2 * (1e-4 + 0.2 * (0.1 - 1e-4))


@pytest.mark.filterwarnings("ignore:No step has been made")
def test_value_fit():
    """The critic learns the return of a task where it depends on the observation alone, and nothing else moves."""
    env = make_vec_env("Pendulum-v1", wrapper_class=FixedLength, seed=0)
    model = make_model(env, n_episodes=8, baseline="value", normalize_advantage=False, learning_rate=0.0, gamma=0.0,
                       n_value_epochs=20)  # fmt: skip
    before = clone(model)
    model.learn(2000)
    assert logged(model)["train/explained_variance"] > 0.8
    assert changed(model, before) == critic_names(model)
    # The advantages are its errors, in the unit of the rewards, which are about -5 on average
    variance = model.rollout_buffer.rewards.var()
    assert (model.rollout_buffer.advantages**2).mean() < 0.5 * variance
    assert logged(model)["train/value_loss"] < 0.5 * variance
