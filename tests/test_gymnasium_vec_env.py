"""``GymnasiumVecEnv`` does what ``DummyVecEnv`` with ``Monitor`` does."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import ClipReward
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.vec_env import GymnasiumVecEnv
from sb3_reinforce.vec_env.shared_starts import SharedStarts
from tests.envs import MaskEnv
from tests.helpers import assert_same, clone

MODES = list(AutoresetMode)


def short_pendulum():
    return gym.make("Pendulum-v1", max_episode_steps=7)


def dict_env():
    env = gym.make("CartPole-v1")
    space = spaces.Dict(cart=spaces.Box(-np.inf, np.inf, (2,)), pole=spaces.Box(-np.inf, np.inf, (2,)))
    return gym.wrappers.TransformObservation(env, lambda obs: {"cart": obs[:2], "pole": obs[2:]}, space)


MAKERS = {
    "CartPole": lambda: gym.make("CartPole-v1"),
    "Pendulum": short_pendulum,
    "dict": dict_env,
    "Taxi": lambda: gym.make("Taxi-v4"),
}


def both(make, mode, kind=SyncVectorEnv, n_envs=3):
    return GymnasiumVecEnv(kind([make] * n_envs, autoreset_mode=mode)), DummyVecEnv([lambda: Monitor(make())] * n_envs)


def without_seconds(info):
    info = dict(info)
    if "episode" in info:
        info["episode"] = {key: info["episode"][key] for key in ("r", "l")}
    return info


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_those_of_dummy_vec_env(name, mode, kind):
    """Observations, rewards, dones, infos, infos of resets, seeds: one after the other."""
    env, expected = both(MAKERS[name], mode, kind)
    assert env.observation_space == expected.observation_space and env.action_space == expected.action_space
    for each in (env, expected):
        each.seed(5)
    assert_same(env.reset(), expected.reset())
    assert_same(env.reset_infos, expected.reset_infos)
    env.action_space.seed(0)
    n_dones = 0
    for _ in range(120):
        actions = np.array([env.action_space.sample() for _ in range(3)])
        obs, rewards, dones, infos = env.step(actions)
        wanted = expected.step(actions)
        assert rewards.dtype == np.float32 and dones.dtype == bool
        for found, other in zip((obs, rewards, dones), wanted, strict=False):
            assert_same(found, other)
        assert_same([without_seconds(info) for info in infos], [without_seconds(info) for info in wanted[3]])
        assert_same(env.reset_infos, expected.reset_infos)
        n_dones += dones.sum()
    assert n_dones > 3 or name == "Taxi"
    # Without a seed, the generators go on
    assert_same(env.reset(), expected.reset())
    env.close()


@pytest.mark.parametrize("mode", MODES)
def test_learns_what_is_learned_in_dummy_vec_env(mode):
    """Bit for bit, and with dict observations."""
    for make, policy in ((MAKERS["CartPole"], "MlpPolicy"), (dict_env, "MultiInputPolicy"), (MaskEnv, "MlpPolicy")):
        trained = []
        for env in both(make, mode):
            trained.append(REINFORCE(policy, env, n_episodes=6, seed=1, device="cpu").learn(300))
        assert trained[0].num_timesteps == trained[1].num_timesteps and trained[0].mask_source == trained[1].mask_source
        parameters = [clone(model) for model in trained]
        assert all(th.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])


def test_processes_survive_a_missing_attribute():
    env = GymnasiumVecEnv(AsyncVectorEnv([MAKERS["CartPole"]] * 2))
    assert not env.has_attr("action_masks")
    with pytest.raises(AttributeError, match="have no attribute 'action_masks'"):
        env.get_attr("action_masks")
    assert REINFORCE("MlpPolicy", env, device="cpu").learn(100)._n_updates > 0
    env.close()


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_algorithms_of_sb3(algorithm):
    env = VecNormalize(GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")))
    kwargs = {"n_steps": 16, "seed": 0, "device": "cpu"} | ({"batch_size": 32} if algorithm is PPO else {})
    model = algorithm("MlpPolicy", env, **kwargs).learn(200)
    assert len(model.ep_info_buffer) > 2
    assert evaluate_policy(model, env, n_eval_episodes=3)[0] > 5


class Device(VectorEnv):
    """Two environments that give tensors, as simulators on a device do; episodes of three steps, reset in the same step."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    num_envs = 2
    single_observation_space = spaces.Box(-10, 10, (1,))
    single_action_space = spaces.Discrete(2)
    limit = 3

    def reset(self, *, seed=None, options=None):
        self.time = th.zeros(2, 1)
        return self.time.clone(), {}

    def step(self, actions):
        self.time += 1
        dones = self.time[:, 0] == self.limit
        infos = {"push": th.as_tensor(actions), "_push": np.array([True, False])}
        if dones.any():
            infos |= {"final_obs": self.time.clone(), "final_info": {"score": th.arange(2.0)}}
            self.time[dones] = 0
        return self.time.clone(), th.ones(2), th.zeros(2, dtype=th.bool), dones, infos


def test_tensors():
    env = GymnasiumVecEnv(Device())
    assert isinstance(env.reset(), np.ndarray)
    for _ in range(2):
        obs, rewards, dones, infos = env.step(np.array([1, 0]))
        assert not dones.any() and infos == [{"push": 1, "TimeLimit.truncated": False}, {"TimeLimit.truncated": False}]
    obs, rewards, dones, infos = env.step(np.array([1, 0]))
    assert obs.tolist() == [[0], [0]] and rewards.tolist() == [1, 1] and dones.all()
    assert [info["terminal_observation"].tolist() for info in infos] == [[3], [3]]
    assert [info["score"] for info in infos] == [0, 1] and all(info["TimeLimit.truncated"] for info in infos)
    assert [info["episode"]["r"] for info in infos] == [3, 3] and [info["episode"]["l"] for info in infos] == [3, 3]
    assert env.get_attr("limit") == [3, 3] and not env.has_attr("goal")
    model = REINFORCE("MlpPolicy", env, device="cpu").learn(20)
    assert model.ep_info_buffer[0]["r"] == 3


def test_records_in_a_file(tmp_path):
    env = GymnasiumVecEnv(SyncVectorEnv([short_pendulum] * 2), str(tmp_path / "0"))
    REINFORCE("MlpPolicy", env, device="cpu").learn(50)
    env.close()
    assert (load_results(str(tmp_path))["l"] == 7).all() and len(load_results(str(tmp_path))) >= 8


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_attributes(kind):
    env = GymnasiumVecEnv(ClipReward(kind([MAKERS["CartPole"]] * 2), 0, 0.5))
    env.reset()
    assert env.step(np.zeros(2, dtype=int))[1].tolist() == [0.5, 0.5]
    assert env.get_attr("gravity") == [9.8, 9.8] and env.get_attr("gravity", 1) == [9.8]
    env.set_attr("mass", 3)
    assert env.get_attr("mass") == [3, 3]
    assert [each.id for each in env.get_attr("spec")] == ["CartPole-v1"] * 2
    assert env.env_is_wrapped(Monitor) == [True, True] and env.env_is_wrapped(gym.wrappers.TimeLimit, [0]) == [False]
    with pytest.raises(NotImplementedError, match="in all environments of a SyncVectorEnv or AsyncVectorEnv at once"):
        env.set_attr("mass", 3, indices=[0])
    env.close()


def test_options():
    class Placed(gym.Env):
        observation_space, action_space = spaces.Box(-10, 10, (1,)), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.full(1, (options or {}).get("place", 0), np.float32), {}

    env = GymnasiumVecEnv(SyncVectorEnv([Placed] * 2))
    env.set_options({"place": 4})
    assert env.reset().tolist() == [[4], [4]] and env.reset().tolist() == [[0], [0]]
    env.set_options([{"place": 4}, {"place": 5}])
    with pytest.raises(ValueError, match="The options of a reset must be the same for all environments"):
        env.reset()


def test_unequal_seeds():
    env = GymnasiumVecEnv(SyncVectorEnv([MAKERS["CartPole"]] * 2))
    env._seeds = [3, 3]
    obs = env.reset()
    assert (obs[0] == obs[1]).all()


def test_late_resets_are_refused():
    """Gymnasium's own vectorized CartPole cannot reset single environments, nor can processes without shared memory."""
    deaf = AsyncVectorEnv([MAKERS["CartPole"]] * 2, shared_memory=False)
    disabled = Device()
    disabled.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
    for env in (gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"), deaf, disabled):
        with pytest.raises(ValueError, match="cannot reset single environments in the step that ends their episode"):
            GymnasiumVecEnv(env)
    deaf.close()


class Simulator(Device):
    """One memory for all observations, dict observations with a batch of last ones, infos of the whole batch."""

    single_observation_space = spaces.Dict(time=spaces.Box(-10, 10, (1,)))
    gives_last = True

    def reset(self, *, seed=None, options=None):
        self.time = np.zeros((2, 1), np.float32)
        return {"time": self.time}, {}

    def step(self, actions):
        self.time += 1
        dones = self.time[:, 0] == 3
        infos = {"fps": 3.0, "log": {"mean": 1.0}}
        if dones.any() and self.gives_last:
            infos["final_obs"] = {"time": self.time.copy()}
        self.time[dones] = 0
        return {"time": self.time}, np.ones(2), np.zeros(2, dtype=bool), dones, infos


def test_what_simulators_do():
    env = GymnasiumVecEnv(Simulator())
    first = env.reset()
    assert env.step(np.zeros(2, dtype=int))[3] == [{"TimeLimit.truncated": False}] * 2
    assert first["time"].tolist() == [[0], [0]]
    env.step(np.zeros(2, dtype=int))
    infos = env.step(np.zeros(2, dtype=int))[3]
    assert [info["terminal_observation"]["time"].tolist() for info in infos] == [[3], [3]]
    env = GymnasiumVecEnv(Simulator())
    env.env.gives_last = False
    env.reset()
    with pytest.raises(ValueError, match="without the last observation in its infos, 'final_obs'"):
        for _ in range(3):
            env.step(np.zeros(2, dtype=int))


def test_groups_are_refused():
    for make in (MAKERS["CartPole"], lambda: SharedStarts(gym.make("CartPole-v1"))):
        env = GymnasiumVecEnv(SyncVectorEnv([make] * 2))
        with pytest.raises(ValueError, match="GymnasiumVecEnv are out of reach"):
            REINFORCE("MlpPolicy", env, n_episodes=4, group_size=2, baseline="timestep").learn(1)


def test_same_seed_as_make_vec_env():
    env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    env.seed(7)
    expected = make_vec_env("CartPole-v1", 2)
    expected.seed(7)
    np.testing.assert_array_equal(env.reset(), expected.reset())
