import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.policies import ReinforcePolicy
from sb3_reinforce.sampler import NumpySampler, is_plain
from tests.helpers import actions_of_noise, collect, record_noise, set_noise

OBS_SPACES = {"vector": spaces.Box(-1, 1, (4,), np.float64), "matrix": spaces.Box(-1, 1, (2, 3))}
ACTION_SPACES = {
    "box": spaces.Box(-1, 1, (1,)),
    "box matrix": spaces.Box(-1, 1, (2, 3)),
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([2, 4, 3]),
    "multi-binary": spaces.MultiBinary(3),
}
STDS = {
    "shared trunk": dict(state_dependent_std=True),
    "own trunk": dict(state_dependent_std=True, std_net_arch=[7]),
    "own trunk of a linear policy": dict(state_dependent_std=True, std_net_arch=[7, 7], net_arch=[]),
}


def make_policy(action="box", obs="vector", policy_class=ReinforcePolicy, **kwargs):
    th.manual_seed(0)
    policy = policy_class(OBS_SPACES[obs], ACTION_SPACES[action], lambda _: 0.0, **kwargs)
    for parameter in policy.parameters():  # The last layer starts near zero, the standard deviation at one
        parameter.data.add_(0.5 * th.randn_like(parameter))
    return policy


def observations(policy, n_envs):
    space = policy.observation_space
    return np.random.default_rng(0).uniform(-1, 1, (n_envs, *space.shape)).astype(space.dtype)


def reference(policy, obs, noise):
    """Return the actions that the policy's own distribution makes of this noise."""
    with th.no_grad():
        distribution = policy.get_distribution(th.as_tensor(obs, dtype=th.float32))
        actions = actions_of_noise(distribution, noise, policy.action_space)
    return actions.reshape(len(obs), *policy.action_space.shape).numpy()


def assert_same(policy, n_envs=3):
    """Check that the same noise gives the same actions as with the policy's own distribution."""
    assert is_plain(policy)
    actor = NumpySampler(policy, n_envs)
    obs = observations(policy, n_envs)
    draws = record_noise(actor)
    for _ in range(10):
        before = obs.copy()
        actions = actor(obs)
        expected = reference(policy, obs, draws[-1])
        assert actions.shape == expected.shape and actions.dtype == expected.dtype
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(obs, before)
    return actor


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("obs", OBS_SPACES)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_same_actions(action, obs, n_envs):
    assert_same(make_policy(action, obs), n_envs)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("std", STDS)
def test_state_dependent_std(std, n_envs):
    assert_same(make_policy("box matrix", **STDS[std]), n_envs)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, dict(net_arch=[]), dict(full_std=False), dict(squash_output=True)])
def test_sde(kwargs, n_envs):
    """The policy holds the noise: the actions are the same, also after the noise is sampled anew."""
    policy = make_policy("box matrix", use_sde=True, **kwargs)
    assert is_plain(policy)
    actor, obs, actions = NumpySampler(policy, n_envs), observations(policy, n_envs), []
    for _ in range(2):
        policy.reset_noise(n_envs)
        actions.append(actor(obs))
        with th.no_grad():
            expected = policy.get_distribution(th.as_tensor(obs, dtype=th.float32)).sample()
        assert actions[-1].dtype == np.float32
        np.testing.assert_allclose(actions[-1], expected.reshape(n_envs, 2, 3), rtol=1e-4, atol=1e-5)
    assert np.abs(actions[0] - actions[1]).max() > 0.01


@pytest.mark.parametrize("activation_fn", [nn.ELU, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh])
def test_activations(activation_fn):
    assert_same(make_policy(activation_fn=activation_fn, net_arch=[8, 8, 8], **STDS["shared trunk"]))


@pytest.mark.parametrize("kwargs", [dict(net_arch=[]), dict(net_arch=dict(pi=[5], vf=[9, 9])), dict(log_std_init=-2.0)])
def test_other_arguments(kwargs):
    assert_same(make_policy("discrete" if "log_std_init" not in kwargs else "box", **kwargs))


@pytest.mark.parametrize("action", ["box", "discrete", "multi-discrete", "multi-binary"])
def test_distribution(action):
    """
    Compare the moments of 40000 samples with those of the policy, at 5 standard errors.

    A false alarm comes once in a million; an error of a twentieth of a standard deviation (10 standard errors) is found.
    """
    policy = make_policy(action)
    obs = np.repeat(observations(policy, 1), 1000, axis=0)
    actor = NumpySampler(policy, len(obs))
    samples = np.concatenate([actor(obs) for _ in range(40)]).reshape(40_000, -1).astype(float)
    with th.no_grad():
        distribution = policy.get_distribution(th.as_tensor(obs[:1], dtype=th.float32)).distribution
    if action == "box":
        assert abs(samples.mean() - distribution.mean.item()) < 5 * distribution.stddev.item() / 200
        assert abs(samples.std() / distribution.stddev.item() - 1) < 5 / np.sqrt(2 * 40_000)
        return
    if action == "multi-binary":
        probabilities, frequencies = distribution.probs[0].numpy(), samples.mean(axis=0)
    else:
        parts = distribution if action == "multi-discrete" else [distribution]
        probabilities = np.concatenate([part.probs[0].numpy() for part in parts])
        columns = zip(samples.astype(int).T, parts, strict=True)
        counts = [np.bincount(column, minlength=part.probs.shape[1]) for column, part in columns]
        frequencies = np.concatenate(counts) / len(samples)
    assert (np.abs(frequencies - probabilities) < 5 * np.sqrt(probabilities * (1 - probabilities) / len(samples))).all()


def in_place(policy, other):
    with th.no_grad():
        for parameter, value in zip(policy.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)


def other_memory(policy, other):
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector.detach().clone(), policy.parameters())


def data_in_place(policy, other):
    for parameter, value in zip(policy.parameters(), other.parameters(), strict=True):
        parameter.data.mul_(0).add_(value.data)


def state_dict(policy, other):
    policy.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kwargs", [{}, STDS["own trunk"]], ids=["std", "state-dependent std"])
@pytest.mark.parametrize("change", [in_place, other_memory, data_in_place, state_dict])
def test_changed_weights(change, kwargs):
    policy = make_policy(**kwargs)
    actor = assert_same(policy)
    other = make_policy(**kwargs)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    change(policy, other)
    obs, noise = observations(policy, 3), np.ones((3, 1), np.float32)
    set_noise(actor, noise)
    np.testing.assert_allclose(actor(obs), reference(other, obs, noise), rtol=1e-5)


class OtherPolicy(ReinforcePolicy):
    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(0 * latent_pi)


class OtherExtractor(FlattenExtractor):
    def forward(self, observations):
        return 0 * super().forward(observations)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(policy_class=OtherPolicy),
        dict(features_extractor_class=OtherExtractor),
        dict(activation_fn=nn.GELU),
    ],
)
def test_what_is_not_plain(kwargs):
    assert not is_plain(make_policy(**kwargs))


def test_hooks_are_not_plain():
    policy = make_policy()
    handle = policy.action_net.register_forward_hook(lambda module, args, output: 0 * output)
    assert not is_plain(policy)
    handle.remove()
    assert is_plain(policy)
    assert not is_plain(policy.double())


@pytest.mark.parametrize(
    "policy, env, library",
    [
        ("MlpPolicy", IdentityEnvBox(ep_length=5), "NumPy"),
        ("MlpPolicy", IdentityEnv(dim=2, ep_length=5), "PyTorch"),
        ("CnnPolicy", FakeImageEnv(n_channels=3), "PyTorch"),
        ("MultiInputPolicy", SimpleMultiObsEnv(), "PyTorch"),
    ],
    ids=["box", "discrete observations", "images", "dict"],
)
def test_which_is_used(policy, env, library, capsys, monkeypatch):
    """The model says with which library it samples, and asks PyTorch for a distribution only if it samples with it."""
    model = REINFORCE(policy, env, n_episodes=2, verbose=1)
    assert capsys.readouterr().out.count(f"Sampling actions with {library}\n") == 1
    # Counted there, as a hook on the policy is a reason to sample with PyTorch
    distribution, calls = model.policy.action_dist, []
    make = distribution.proba_distribution
    monkeypatch.setattr(distribution, "proba_distribution", lambda *args, **kwargs: calls.append(1) or make(*args, **kwargs))
    collect(model)
    assert len(calls) == (0 if library == "NumPy" else model.num_timesteps)
