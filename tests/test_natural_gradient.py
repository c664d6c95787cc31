"""The natural gradient, against the Fisher information written out as a matrix."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector

from sb3_reinforce.batch_policy import divergence
from sb3_reinforce.line_search import PolicyStep
from tests.envs import CountEnv
from tests.helpers import (
    assert_same,
    batch_of,
    changed,
    clone,
    gradient_of,
    logged,
    set_chunk_size,
    state_of,
    step_of,
    train_again,
    vector_of,
)
from tests.helpers import make_model as make_any_model

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
    """Make a model with a batch on which it has made no step yet."""
    kwargs = dict(policy_kwargs=dict(net_arch=[3]), target_kl=None) | kwargs
    model = make_any_model(Contextual(action_space), learning_rate=0.0, natural_gradient=True, n_episodes=30, seed=1, **kwargs)
    # Away from the start, where the mean hardly depends on the observation
    generator = th.Generator().manual_seed(0)
    for parameter in model.policy.parameters():
        parameter.data += 0.3 * th.randn(parameter.shape, generator=generator)
    return model.learn(1)


def plain_and_natural_gradient(model):
    """Return the gradient of the loss, and the step of an update with learning rate 1 in the other direction."""
    plain = gradient_of(model)
    return vector_of(plain), -vector_of(step_of(model, learning_rate=1.0), plain)


def terms(distribution, action_space):
    """Return pairs (w, y): the Fisher information of the distribution is the sum of ``w grad y grad y^T``."""
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
    """Return the Fisher information of the policy as a matrix, a mean over the steps of the batch."""
    names = gradient_of(model).keys()
    parameters = [parameter for name, parameter in model.policy.named_parameters() if name in names]
    observations = batch_of(model).observations
    total = 0
    for observation in observations:
        for weight, y in terms(model.policy.get_distribution(observation[None]), model.action_space):
            slope = parameters_to_vector(th.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True))
            total = total + weight.item() * np.outer(slope.double(), slope.double())
    return total / len(observations)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("damping, chunk_size", [(0.1, None), (1e-2, 7)])
def test_it_solves_the_linear_system(name, damping, chunk_size):
    action_space, kwargs = POLICIES[name]
    model = make_model(action_space, cg_damping=damping, cg_max_steps=200, **kwargs)
    if chunk_size:
        set_chunk_size(model, chunk_size)
    information = fisher(model)
    plain, natural = plain_and_natural_gradient(model)
    expected = np.linalg.solve(information + damping * np.eye(len(plain)), plain)
    assert np.linalg.norm(natural - expected) < 1e-3 * np.linalg.norm(expected)
    # Without the Fisher information, the step is another one
    cosine = natural @ plain / np.linalg.norm(natural) / np.linalg.norm(plain)
    assert cosine < 0.99


# gSDE's noise depends on features that its gradient does not reach
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "gSDE"])
@pytest.mark.parametrize("damping", [0.1, 1e-2])
def test_length_of_the_step(name, damping):
    """A short step has the divergence that the Fisher information tells, as the damped one gives the target."""
    action_space, kwargs = POLICIES[name]
    model = make_model(action_space, cg_damping=damping, cg_max_steps=200, **kwargs)
    information, gradient = fisher(model), gradient_of(model)
    plain = vector_of(gradient)
    model.target_kl = TARGET_KL
    step = vector_of(step_of(model), gradient)
    damped = (step @ information @ step + damping * step @ step) / 2
    assert damped == pytest.approx(TARGET_KL, rel=1e-2)
    assert logged(model)["train/approx_kl"] == pytest.approx(step @ information @ step / 2, rel=0.1)
    natural = np.linalg.solve(information + damping * np.eye(len(plain)), plain)
    np.testing.assert_allclose(step, -logged(model)["train/step_length"] * natural, rtol=5e-3, atol=1e-5)


def test_without_a_limit_the_learning_rate_is_the_length():
    steps = []
    for learning_rate in (1.0, 0.05):
        model = make_model(POLICIES["Box"][0])
        steps.append(vector_of(step_of(model, learning_rate)))
        assert logged(model)["train/step_length"] == learning_rate
    np.testing.assert_allclose(steps[1], 0.05 * steps[0], rtol=1e-3, atol=1e-6)


def test_large_damping_leaves_the_direction_of_the_gradient():
    model = make_model(POLICIES["Box"][0], cg_damping=1e6)
    gradient = gradient_of(model)
    plain = vector_of(gradient)
    # So long a step that the rounding of the parameters is small beside it
    step = vector_of(step_of(model, learning_rate=1e6), gradient)
    np.testing.assert_allclose(-step, plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max())


def test_a_step_that_is_too_long_is_halved():
    """Far from where the quadratic form holds."""
    model = make_model(POLICIES["Discrete"][0], cg_damping=1e-4)
    twin = make_model(POLICIES["Discrete"][0], cg_damping=1e-4)
    natural = vector_of(step_of(twin, learning_rate=1.0))
    model.target_kl = 0.5
    step = vector_of(step_of(model))
    assert 0 < logged(model)["train/approx_kl"] <= 1
    halvings = np.log2(logged(model)["train/step_length"] * np.linalg.norm(natural) / np.linalg.norm(step))
    assert halvings == pytest.approx(round(halvings), abs=1e-3) and halvings > 0.5
    # The optimizer of the policy, should it be used again, still has the learning rate that was given
    model.natural_gradient = False
    assert train_again(model, learning_rate=1e-5)["train/learning_rate"] == 1e-5


@pytest.mark.parametrize("chunk_size, passes_per_product", [(150, 0), (149, 4)])
def test_the_products_of_a_single_chunk_share_its_graph(chunk_size, passes_per_product):
    """Of two chunks, each product takes the policy and the same policy fixed anew."""

    def count_passes(cg_max_steps):
        model = make_model(POLICIES["Box"][0], cg_max_steps=cg_max_steps)
        set_chunk_size(model, chunk_size)
        passes = []
        model.policy.action_net.register_forward_hook(lambda *_: passes.append(None))
        model.train()
        return len(passes)

    assert count_passes(5) - count_passes(1) == 4 * passes_per_product


def test_a_batch_of_one_step():
    """Whose advantage cannot be whitened."""
    model = make_any_model(CountEnv(length=1), natural_gradient=True, n_episodes=1, baseline=None, target_kl=0.01)
    before = clone(model)
    model.learn(1)
    assert changed(model, before)
    assert logged(model)["train/approx_kl"] == pytest.approx(0.01, rel=0.2)


def test_gradient_of_zero():
    model = make_any_model(CountEnv(rewarded=False), natural_gradient=True, target_kl=0.01)
    before = clone(model)
    model.learn(1)
    assert not changed(model, before)


@pytest.mark.parametrize("natural_gradient", [True, False])
@pytest.mark.parametrize("what", ["step", "gradient"])
def test_an_error_leaves_the_model_as_it_was(monkeypatch, what, natural_gradient):
    """Also the critic, which is fitted before."""
    model = make_any_model(CountEnv(), natural_gradient=natural_gradient, baseline="value").learn(40)
    before = state_of(model)

    def fail(*_, **__):
        raise ValueError("no more")

    if what == "step":
        monkeypatch.setattr(PolicyStep, "kl", fail)
    else:
        monkeypatch.setattr("sb3_reinforce.reinforce.policy_gradient", fail)
    with pytest.raises(ValueError, match="no more"):
        model.learn(1, reset_num_timesteps=False)
    assert_same(state_of(model), before)


def test_product_that_is_not_finite(monkeypatch):
    """Although the gradient is."""
    model = make_any_model(CountEnv(), natural_gradient=True, baseline="value").learn(40)
    monkeypatch.setattr("sb3_reinforce.natural_gradient.divergence", lambda old, new: np.inf * divergence(old, new))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"product with the Fisher matrix is not finite: no step was made"):
        model.learn(1, reset_num_timesteps=False)
    assert_same(state_of(model), before)


class WithoutDivergence(DiagGaussianDistribution):
    """A distribution that neither SB3 nor PyTorch has a divergence for."""

    def proba_distribution(self, *args):
        super().proba_distribution(*args)
        self.distribution = OwnNormal(self.distribution)
        return self


class OwnNormal:
    """A normal distribution that PyTorch does not know."""

    def __init__(self, normal):
        self.normal = normal

    def __getattr__(self, name):
        return getattr(self.normal, name)


def test_policy_without_a_divergence():
    def make(**kwargs):
        model = make_any_model(CountEnv(), baseline="value", **kwargs)
        model.policy.action_dist = WithoutDivergence(2)
        return model

    for kwargs in (dict(natural_gradient=True, target_kl=None), dict(natural_gradient=False, target_kl=0.1)):
        model = make(**kwargs)
        before = state_of(model)
        with pytest.raises(NotImplementedError, match=r"WithoutDivergence cannot be computed.*natural_gradient=False"):
            model.learn(1)
        assert_same(state_of(model), before)
    model = make(natural_gradient=False, target_kl=None)
    before = clone(model)
    model.learn(1)
    assert changed(model, before)
    assert np.isnan(logged(model)["train/approx_kl"])
