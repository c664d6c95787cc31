"""The natural gradient, against the Fisher information written out as a matrix."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector

from sb3_reinforce import REINFORCE

TARGET_KL = 1e-5


class Contextual(gym.Env):
    """Episodes of five steps with random observations. The reward depends on the observation and the action."""

    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, action_space):
        self.action_space = action_space

    def _observe(self):
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action):
        self.time += 1
        reward = float(self.obs[0] * np.sum(action))
        return self._observe(), reward, self.time == 5, False, {}


POLICIES = {
    "Box": (spaces.Box(-1, 1, (2,)), {}),
    "state_dependent_std": (spaces.Box(-1, 1, (1,)), dict(policy_kwargs=dict(net_arch=[3], state_dependent_std=True))),
    "gSDE": (spaces.Box(-1, 1, (1,)), dict(use_sde=True)),
    "Discrete": (spaces.Discrete(3), {}),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 3]), {}),
    "MultiBinary": (spaces.MultiBinary(2), {}),
}


def make_model(action_space, **kwargs):
    """A model whose last update has made no step, and has left the natural gradient in the parameters."""
    kwargs = dict(policy_kwargs=dict(net_arch=[3]), target_kl=None) | kwargs
    model = REINFORCE(
        "MlpPolicy", Contextual(action_space), learning_rate=0.0, natural_gradient=True, n_episodes=30, seed=1, **kwargs
    )
    # Away from the start, where the mean hardly depends on the observation
    generator = th.Generator().manual_seed(0)
    for parameter in model.policy.parameters():
        parameter.data += 0.3 * th.randn(parameter.shape, generator=generator)
    return model.learn(1)


def learned(model):
    return [parameter for parameter in model.policy.parameters() if parameter.grad is not None]


def gradient(model):
    return parameters_to_vector([parameter.grad for parameter in learned(model)]).double().numpy()


def values(model):
    return parameters_to_vector(learned(model)).detach().double().numpy()


def terms(distribution, action_space):
    """:return: Pairs (w, y): the Fisher information of the distribution is the sum of ``w grad y grad y^T``"""
    if isinstance(distribution.distribution, Normal):
        mean, std = distribution.distribution.mean.flatten(), distribution.distribution.stddev.flatten()
        return [*zip(std**-2, mean, strict=True), *zip(2 * std**-2, std, strict=True)]
    if isinstance(action_space, spaces.Discrete):
        actions = th.arange(action_space.n)[:, None]
    else:
        sizes = action_space.nvec if isinstance(action_space, spaces.MultiDiscrete) else [2] * action_space.n
        actions = th.tensor(list(product(*map(range, sizes)))).float()[:, None]
    log_probs = [distribution.log_prob(action) for action in actions]
    return [(log_prob.exp(), log_prob) for log_prob in log_probs]


def fisher(model):
    observations = next(model.rollout_buffer.get()).observations
    total = 0
    for observation in observations:
        for weight, y in terms(model.policy.get_distribution(observation[None]), model.action_space):
            slope = parameters_to_vector(th.autograd.grad(y, learned(model), retain_graph=True, materialize_grads=True))
            total = total + weight.item() * np.outer(slope.double(), slope.double())
    return total / len(observations)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("damping, chunk_size", [(0.1, None), (1e-2, 7)])
def test_it_solves_the_linear_system(name, damping, chunk_size):
    action_space, kwargs = POLICIES[name]
    model = make_model(action_space, cg_damping=damping, cg_max_steps=200, **kwargs)
    model._chunk_size = chunk_size or model._chunk_size
    model._compute_gradient()
    plain = gradient(model)
    expected = np.linalg.solve(fisher(model) + damping * np.eye(len(plain)), plain)
    model.train()
    natural = gradient(model)
    assert np.linalg.norm(natural - expected) < 1e-3 * np.linalg.norm(expected)
    # What it would be without the Fisher information is something else
    cosine = natural @ plain / np.linalg.norm(natural) / np.linalg.norm(plain)
    assert cosine < 0.99


# gSDE's noise depends on features that its gradient does not reach
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "gSDE"])
@pytest.mark.parametrize("damping", [0.1, 1e-2])
def test_length_of_the_step(name, damping):
    """A short step has the divergence that the Fisher information tells, as the damped one gives the target."""
    action_space, kwargs = POLICIES[name]
    model = make_model(action_space, cg_damping=damping, cg_max_steps=200, **kwargs)
    model.target_kl = TARGET_KL
    information, before = fisher(model), values(model)
    model.train()
    step = values(model) - before
    damped = (step @ information @ step + damping * step @ step) / 2
    assert damped == pytest.approx(TARGET_KL, rel=1e-2)
    logged = model.logger.name_to_value
    assert logged["train/approx_kl"] == pytest.approx(step @ information @ step / 2, rel=0.1)
    np.testing.assert_allclose(step, -logged["train/learning_rate"] * gradient(model), rtol=1e-3, atol=1e-5)


def test_without_a_limit_the_learning_rate_is_the_length():
    model = make_model(POLICIES["Box"][0])
    before = values(model)
    model.lr_schedule = lambda _: 0.05
    model.train()
    np.testing.assert_allclose(values(model) - before, -0.05 * gradient(model), rtol=1e-3, atol=1e-6)
    assert model.logger.name_to_value["train/learning_rate"] == 0.05


def test_large_damping_leaves_the_direction_of_the_gradient():
    model = make_model(POLICIES["Box"][0], cg_damping=1e6)
    model._compute_gradient()
    plain = gradient(model)
    model.train()
    np.testing.assert_allclose(1e6 * gradient(model), plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max())


def test_a_step_that_is_too_long_is_halved():
    """Far from where the quadratic form holds."""
    model = make_model(POLICIES["Discrete"][0], cg_damping=1e-3)
    model.target_kl = 0.5
    before = values(model)
    model.train()
    logged = model.logger.name_to_value
    assert 0 < logged["train/approx_kl"] <= 1
    halvings = np.log2(
        np.linalg.norm(logged["train/learning_rate"] * gradient(model)) / np.linalg.norm(values(model) - before)
    )
    assert halvings == pytest.approx(round(halvings), abs=1e-3) and halvings > 0.5
    # Nothing of it stays for the optimizer of the policy, should that be used again
    assert model._kl_learning_rate_factor == 1.0


@pytest.mark.parametrize("chunk_size, once", [(150, True), (149, False)])
def test_the_products_of_a_single_chunk_share_its_graph(monkeypatch, chunk_size, once):
    model = make_model(POLICIES["Box"][0], cg_max_steps=5)
    model._chunk_size = chunk_size
    model._compute_gradient()
    calls = []
    get_distribution = model.policy.get_distribution
    monkeypatch.setattr(model.policy, "get_distribution", lambda obs: calls.append(len(obs)) or get_distribution(obs))
    model._precondition(1.0)
    # The policy, and the same policy fixed
    assert calls == [150, 150] if once else calls == 5 * [149, 149, 1, 1]
