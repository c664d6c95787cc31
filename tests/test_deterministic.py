import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_reinforce import REINFORCE
from tests.helpers import weights

PENDULUM = "InvertedPendulum-v4"


def learn(seed=0, env_id=PENDULUM, n_envs=1, vec_env_cls=None, **kwargs):
    """Train, and return the parameters, and the return and length of each episode."""
    env = make_vec_env(env_id, n_envs, vec_env_cls=vec_env_cls)
    model = REINFORCE("MlpPolicy", env, n_episodes=6, seed=seed, **kwargs).learn(300 * n_envs)
    env.close()
    assert model._n_updates > 1
    return weights(model), [(info["r"], info["l"]) for info in model.ep_info_buffer]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(n_envs=3),
        dict(n_envs=2, vec_env_cls=SubprocVecEnv),
        dict(baseline="timestep", natural_gradient=False),
        dict(baseline="linear", env_id="CartPole-v1"),
        dict(baseline="value", env_id="CartPole-v1", n_envs=3),
        dict(env_id="CartPole-v1"),
        dict(use_sde=True, sde_sample_freq=4),
        dict(policy_kwargs=dict(state_dependent_std=True, std_net_arch=[8])),
    ],
)
def test_deterministic(kwargs):
    parameters, episodes = learn(**kwargs)
    same_parameters, same_episodes = learn(**kwargs)
    assert th.equal(parameters, same_parameters)
    assert episodes == same_episodes


@pytest.mark.parametrize("env_id", [PENDULUM, "CartPole-v1"])
def test_seeds_differ(env_id):
    parameters, episodes = learn(seed=0, env_id=env_id)
    other_parameters, other_episodes = learn(seed=1, env_id=env_id)
    assert not th.equal(parameters, other_parameters)
    assert episodes != other_episodes


def test_env_by_name_is_seeded_as_one_that_is_passed():
    by_name = REINFORCE("MlpPolicy", "CartPole-v1", seed=3).learn(1)
    passed = REINFORCE("MlpPolicy", gym.make("CartPole-v1"), seed=3).learn(1)
    assert th.equal(weights(by_name), weights(passed))
