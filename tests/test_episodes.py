"""The rollout buffer as a callback sees it: steps, whole episodes, padded episodes."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from tests.envs import SpacesEnv
from tests.helpers import PLAIN

LENGTHS = (3, 5)


class Told(gym.Wrapper):
    """Say in the infos what the observation, the action and the reward were, and end episodes after a number of steps."""

    def __init__(self, env, length):
        super().__init__(env)
        self.length = length

    def reset(self, **kwargs):
        self.time = 0
        self.last, info = self.env.reset(**kwargs)
        return self.last, info

    def step(self, action):
        obs, reward, _, _, _ = self.env.step(action)
        self.time += 1
        info = {"obs": self.last, "next_obs": obs, "action": action, "reward": reward, "time": self.time, "unasked": 1}
        self.last = obs
        return obs, reward, self.time == self.length, False, info


class Keep(BaseCallback):
    """Keep what a callback sees at the end of each rollout."""

    def _on_training_start(self):
        self.infos = {}
        self.n_rollouts = 0

    def _on_step(self):
        for env_idx in self.model.quota.owing:
            self.infos.setdefault(env_idx, []).append(self.locals["infos"][env_idx])
        return True

    def _on_rollout_end(self):
        buffer = self.locals["rollout_buffer"]
        self.n_rollouts += 1
        self.check(buffer)
        self.infos = {}

    def check(self, buffer):
        raise NotImplementedError


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return np.allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), atol=1e-6)


def learn(observation_space, action_space, callback, **kwargs):
    def make(length):
        return lambda: Monitor(Told(SpacesEnv(observation_space, action_space, length=99), length))

    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    env = DummyVecEnv([make(length) for length in LENGTHS])
    return REINFORCE(policy, env, **{**PLAIN, "n_episodes": 5, "seed": 0, **kwargs}).learn(60, callback=callback)


@pytest.mark.parametrize(
    "observation_space, action_space",
    [
        (spaces.Box(-1, 1, (3,)), spaces.Discrete(4)),
        (spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(-1, 1, (1,))), spaces.Box(-9, 9, (2,))),
        (spaces.Box(-1, 1, (2, 2)), spaces.MultiDiscrete([2, 3])),
    ],
)
def test_episodes(observation_space, action_space):
    """What the environments said step by step is what a callback reads episode by episode."""

    class Check(Keep):
        def check(self, buffer):
            assert [(e.env_idx, len(e)) for e in buffer.episodes] == [(0, 3), (0, 3), (1, 5), (1, 5), (1, 5)]
            for episode in buffer.episodes:
                said = [self.infos[episode.env_idx].pop(0) for _ in range(len(episode))]
                assert equal(episode.rewards, [info["reward"] for info in said])
                assert equal(episode.actions.reshape(len(said), -1), np.reshape([i["action"] for i in said], (len(said), -1)))
                assert equal(episode.terminal_observation, said[-1]["next_obs"]) and not episode.truncated
                assert [info["time"] for info in episode.infos] == list(range(1, len(said) + 1))
                assert all("unasked" not in info for info in episode.infos)
                observations = episode.observations
                for step, info in enumerate(said):
                    is_dict = isinstance(observations, dict)
                    here = {key: a[step] for key, a in observations.items()} if is_dict else observations[step]
                    assert equal(here, info["obs"])

    callback = Check()
    keywords = ("obs", "next_obs", "action", "reward", "time")
    learn(observation_space, action_space, callback, rollout_buffer_kwargs={"info_keywords": keywords})
    assert callback.n_rollouts > 1


def test_no_infos_unless_asked_for():
    buffer = learn(spaces.Box(-1, 1, (3,)), spaces.Discrete(4), None).rollout_buffer
    assert all(episode.infos == [{}] * len(episode) for episode in buffer.episodes)


def test_names_of_sb3():
    """The arrays of the batch hold the episodes end to end."""

    class Check(Keep):
        def check(self, buffer):
            buffer.episodes[1].rewards = 6.0
            buffer.episodes[1].rewards += 1.0
            assert (buffer.rewards[3:6] == 7).all()
            for name in ("observations", "actions", "rewards"):
                parts = np.concatenate([getattr(episode, name) for episode in buffer.episodes])
                np.testing.assert_array_equal(getattr(buffer, name), parts)
            assert np.flatnonzero(buffer.episode_starts).tolist() == [0, 3, 6, 11, 16]

    model = learn(spaces.Box(-1, 1, (3,)), spaces.Discrete(4), Check(), gamma=0.9)
    buffer = model.rollout_buffer
    discounts = 0.9 ** np.arange(3)
    assert buffer.returns[0] == pytest.approx(discounts @ buffer.rewards[:3], rel=1e-5)
    assert buffer.advantages.std() == pytest.approx(1, rel=0.05)


def test_steps_are_known_until_the_next_rollout():
    class Early(BaseCallback):
        kept = None

        def _on_step(self):
            for episode in [*self.model.rollout_buffer.episodes, *(self.kept or ())]:
                with pytest.raises(RuntimeError, match="from the end of its rollout to the start of the next one"):
                    _ = episode.rewards
            return True

        def _on_rollout_end(self):
            self.kept = self.model.rollout_buffer.episodes

    callback = Early()
    learn(spaces.Box(-1, 1, (3,)), spaces.Discrete(4), callback)
    assert len(callback.kept) == 5
