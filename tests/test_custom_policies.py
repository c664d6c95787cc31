"""Policies that were written for A2C, policies that take the place of another one, and frozen parameters."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.batch_policy import critic_parameters
from tests.envs import SpacesEnv
from tests.helpers import PLAIN, changed, clone, logged

BOX = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


class Net(nn.Module):
    """What SB3 promises of an extractor, and no more."""

    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = 8, 6
        self.common = nn.Linear(features_dim, 10)
        self.actor = nn.Linear(10, 8)
        self.judge = nn.Linear(10, 6)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return th.tanh(self.actor(th.tanh(self.common(features))))

    def forward_critic(self, features):
        return th.tanh(self.judge(th.tanh(self.common(features))))


class A2CPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Net(self.features_dim)


@pytest.mark.parametrize("kwargs", [{}, {"baseline": "value"}, {"baseline": "value", "natural_gradient": True}])
def test_policy_of_a2c(kwargs):
    """The critic's own layers are found: fitted with the critic, left alone without one."""
    model = REINFORCE(A2CPolicy, SpacesEnv(BOX, spaces.Discrete(3)), **{**PLAIN, "seed": 0, "n_episodes": 4, **kwargs})
    before = clone(model)
    model.learn(1)
    of_actor = {f"{name}.{kind}" for name in ("mlp_extractor.common", "mlp_extractor.actor", "action_net") for kind in
                ("weight", "bias")}  # fmt: skip
    of_critic = {f"{name}.{kind}" for name in ("mlp_extractor.judge", "value_net") for kind in ("weight", "bias")}
    assert changed(model, before) == of_actor | (of_critic if kwargs else set())
    found = {id(parameter) for parameter in critic_parameters(model.policy)}
    assert {name for name, parameter in model.policy.named_parameters() if id(parameter) in found} == of_critic


@pytest.mark.parametrize(
    "policy, space, kwargs, own",
    [
        ("MlpPolicy", BOX, {}, {"value_net", "mlp_extractor.value_net"}),
        ("CnnPolicy", IMAGE, {}, {"value_net"}),
        ("CnnPolicy", IMAGE, {"share_features_extractor": False}, {"value_net", "vf_features_extractor"}),
    ],
)
def test_parameters_of_the_critic(policy, space, kwargs, own):
    model = REINFORCE(policy, SpacesEnv(space, spaces.Discrete(3)), policy_kwargs=kwargs)
    found = {id(parameter) for parameter in critic_parameters(model.policy)}
    names = {name for name, parameter in model.policy.named_parameters() if id(parameter) in found}
    assert names == {name for name, _ in model.policy.named_parameters() if name.startswith(tuple(own))}
    # From the head down: the order in which saved optimizers hold them
    assert critic_parameters(model.policy)[0] is model.policy.value_net.weight


@pytest.mark.parametrize("frozen", ["value_net", "mlp_extractor.value_net", "mlp_extractor.policy_net.0"])
@pytest.mark.parametrize("natural_gradient", [False, True])
def test_frozen_parameters_stay(frozen, natural_gradient):
    model = REINFORCE(
        "MlpPolicy", SpacesEnv(BOX, spaces.Discrete(3)), seed=0, baseline="value", natural_gradient=natural_gradient
    )
    model.policy.get_submodule(frozen).requires_grad_(False)
    before = clone(model)
    model.learn(1)
    assert changed(model, before) == {name for name in before if not name.startswith(frozen)}
    # And so does what was frozen when the critic was made: it can be thawed later
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    assert own == {id(parameter) for parameter in model.critic.parameters}


def test_frozen_features_of_the_critic():
    kwargs = {"share_features_extractor": False}
    model = REINFORCE("CnnPolicy", SpacesEnv(IMAGE, BOX), seed=0, n_episodes=2, baseline="value", policy_kwargs=kwargs)
    model.policy.vf_features_extractor.requires_grad_(False)
    before = clone(model)
    model.learn(1)
    left = {name for name in before if name.startswith("vf_features_extractor")}
    assert left and changed(model, before) == before.keys() - left


@pytest.mark.parametrize("attribute", ["policy", "state"])
def test_policy_in_the_place_of_another(attribute):
    """Start from a cloned policy: its critic is fitted, with statistics of its own, and so is its actor."""

    def make():
        return REINFORCE("MlpPolicy", SpacesEnv(BOX, spaces.Discrete(3)), seed=1, baseline="value", n_value_epochs=20)

    model, other = make().learn(1), REINFORCE("MlpPolicy", SpacesEnv(BOX, spaces.Discrete(3)), seed=2)
    if attribute == "policy":
        model.policy = other.policy
    else:
        model.policy.load_state_dict(other.policy.state_dict())
    before = clone(model)
    model.learn(1)
    assert changed(model, before) == before.keys()
    held = {id(parameter) for group in model.value_optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in critic_parameters(model.policy)}


def test_policy_in_the_place_of_another_learns_values():
    """Rewards of 5 a step: the new critic knows so after a while."""

    class Five(SpacesEnv):
        def step(self, action):
            observation, _, terminated, truncated, info = super().step(action)
            return observation, 5.0, terminated, truncated, info

    env = make_vec_env(lambda: Five(BOX, spaces.Discrete(3)))
    model = REINFORCE("MlpPolicy", env, seed=0, baseline="value", gamma=0.0, value_learning_rate=1e-2).learn(100)
    model.policy = REINFORCE("MlpPolicy", env, seed=1).policy
    model.learn(800, reset_num_timesteps=False)
    values = model.critic.predict(model.rollout_buffer.chunks(100))
    np.testing.assert_allclose(values, 5, atol=0.25)


@pytest.mark.parametrize("policy, kwargs", [("CnnPolicy", {}), ("CnnPolicy", {"share_features_extractor": False})])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_natural_gradient_with_images(policy, kwargs, baseline):
    """SB3's own image environments pay no reward, so that their gradient is zero: these rewards are noise."""
    model = REINFORCE(
        policy,
        SpacesEnv(IMAGE, spaces.Discrete(3)),
        seed=0,
        n_episodes=4,
        baseline=baseline,
        natural_gradient=True,
        target_kl=0.01,
        policy_kwargs=kwargs,
    )
    before = clone(model)
    model.learn(1)
    assert "features_extractor.cnn.0.weight" in changed(model, before)
    # The target is that of the quadratic approximation, which a whole network follows roughly
    assert 0.002 < logged(model)["train/approx_kl"] <= 2 * 0.01


def test_natural_gradient_with_images_in_a_dict():
    space = spaces.Dict(image=IMAGE, vector=BOX)
    model = REINFORCE("MultiInputPolicy", SpacesEnv(space, BOX), seed=0, n_episodes=4, natural_gradient=True, target_kl=0.01)
    model.learn(1)
    # The target is that of the quadratic approximation, which a whole network follows roughly
    assert 0.002 < logged(model)["train/approx_kl"] <= 2 * 0.01
