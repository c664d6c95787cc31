from copy import deepcopy

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_reinforce.masks import MaskLayout


class CountEnv(gym.Env):
    """
    Episodes of a fixed length, whose observation counts the steps and whose reward is the sum of the action.

    :param length: Steps per episode
    :param truncate: Whether a time limit ends the episodes
    :param rewarded: Whether there is a reward
    """

    observation_space = spaces.Box(0, 100, (1,))
    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, length: int = 5, truncate: bool = False, rewarded: bool = True):
        self.length = length
        self.truncate = truncate
        self.rewarded = rewarded

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        over = self.time == self.length
        reward = float(action.sum()) if self.rewarded else 0.0
        return self._observation(), reward, over and not self.truncate, over and self.truncate, {}

    def _observation(self):
        return np.array([self.time], dtype=np.float32)


class TracingEnv(gym.Env):
    """
    Episodes of a known length that tell where each step comes from.

    Step ``t`` of episode ``e`` of environment ``i`` shows ``(i, e, t)`` and is worth ``1000 i + 100 e + 10 t + action``,
    which is exact in single precision. An episode that is reset before its first step does not count.

    :param env_idx: i
    :param length: Steps per episode, None: they never end
    :param ends: How the episodes end, over and over: "terminated", "truncated" or "both"
    :param reward: A constant reward instead
    """

    observation_space = spaces.Box(0, 1000, (3,))
    action_space = spaces.Discrete(3)

    def __init__(self, env_idx=0, length=3, ends=("terminated",), reward=None):
        self.env_idx, self.length, self.ends, self.reward = env_idx, length, ends, reward
        self.episode = self.t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += self.t > 0
        self.t = 0
        return self._observation(), {}

    def step(self, action):
        reward = 1000 * self.env_idx + 100 * self.episode + 10 * self.t + int(action)
        self.t += 1
        end = self.ends[self.episode % len(self.ends)] if self.t == self.length else None
        terminated, truncated = end in ("terminated", "both"), end in ("truncated", "both")
        return self._observation(), float(reward if self.reward is None else self.reward), terminated, truncated, {}

    def _observation(self):
        return np.array([self.env_idx, self.episode, self.t], dtype=np.float32)


class SpacesEnv(gym.Env):
    """
    Random observations and rewards in episodes of a fixed length, for any spaces.

    :param observation_space: Observation space
    :param action_space: Action space
    :param length: Steps per episode
    :param truncate: Whether a time limit ends the episodes
    """

    def __init__(self, observation_space, action_space, length=4, truncate=False):
        self.observation_space, self.action_space = observation_space, action_space
        self.length, self.truncate = length, truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        over = self.time == self.length
        observation, reward = self.observation_space.sample(), self.np_random.normal()
        return observation, reward, over and not self.truncate, over and self.truncate, {}


def is_valid(action, mask, action_space):
    """Tell whether a mask allows an action."""
    start = 0
    for value, size in zip(np.ravel(action), MaskLayout(action_space).parts, strict=True):
        if not mask[start + int(value)]:
            return False
        start += size
    return True


def some_masks(action_space, n, seed=0):
    """Draw masks, each with a valid action for every choice."""
    generator = np.random.default_rng(seed)
    masks = generator.random((n, MaskLayout(action_space).size)) < 0.5
    start = 0
    for size in MaskLayout(action_space).parts:
        masks[np.arange(n), start + generator.integers(size, size=n)] = True
        start += size
    return masks


class MaskEnv(gym.Env):
    """
    Show a random mask, pay for actions that it allows, and fail at others.

    :param offer: How the mask is offered besides: "method", "info", "observation", or None
    :param lengths: Lengths of the episodes, in any order
    :param render_mode: "rgb_array" or None
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, offer="method", action_space=spaces.Discrete(4), lengths=(3, 5, 4), render_mode=None):  # noqa: B008
        self.action_space, self.offer, self.lengths, self.render_mode = action_space, offer, lengths, render_mode
        size = MaskLayout(action_space).size
        self.observation_space = box = spaces.Box(0, 1, (size,))
        if offer == "observation":
            self.observation_space = spaces.Dict(shown=box, action_mask=spaces.Box(0, 1, (size,), np.int8))
        self.masks = some_masks(action_space, 1000)
        if offer == "method":
            self.action_masks = lambda: self.mask

    def _next(self):
        self.mask = self.masks[self.np_random.integers(1000)]
        shown = self.mask.astype(np.float32)
        info = {"action_mask": self.mask.astype(np.int8)} if self.offer == "info" else {}
        return (dict(shown=shown, action_mask=self.mask.astype(np.int8)) if self.offer == "observation" else shown), info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.length = 0, self.np_random.choice(self.lengths)
        return self._next()

    def step(self, action):
        assert is_valid(action, self.mask, self.action_space), "An invalid action"
        if isinstance(self.action_space, spaces.Discrete):
            hash(action)  # Taxi looks it up: it must be a number, not an array
        self.time += 1
        obs, info = self._next()
        is_over = self.time == self.length
        return obs, float(np.sum(action)), is_over and self.length % 2 == 0, is_over, info

    def render(self):
        return np.full((480, 480, 3), 50 * self.time, np.uint8)


class NoisyImageEnv(FakeImageEnv):
    """SB3's random images with random rewards: SB3 pays none, from which nothing is learned."""

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(np.random.normal()), terminated, truncated, info


class Poison(gym.Wrapper):
    """
    Replace one value in every episode.

    :param env: Environment
    :param what: "reward" or "observation" (the first key if it is a dict)
    :param step: Index of the step in its episode: the one that is rewarded, or that acts on the observation
    :param value: The value to put there
    """

    def __init__(self, env, what, step, value):
        super().__init__(env)
        self.what, self.step_idx, self.value = what, step, value

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.time = 0
        return self._observation(observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if (self.what, self.step_idx) == ("reward", self.time):
            reward = self.value
        self.time += 1
        return self._observation(observation), reward, terminated, truncated, info

    def _observation(self, observation):
        if (self.what, self.step_idx) != ("observation", self.time):
            return observation
        if isinstance(observation, dict):
            key = next(iter(observation))
            return {**observation, key: np.full_like(observation[key], self.value)}
        return np.full_like(observation, self.value)


class RecordVec(VecEnvWrapper):
    """Record the steps since the last reset, one entry per step; ``observations`` holds those that were acted on."""

    def reset(self):
        self.observations, self.actions, self.rewards, self.dones = [], [], [], []
        observation = self.venv.reset()
        # A copy, as the wrapped environment may overwrite the array
        self._observation = deepcopy(observation)
        return observation

    def step_async(self, actions):
        self.observations.append(self._observation)
        self.actions.append(deepcopy(actions))
        self.venv.step_async(actions)

    def step_wait(self):
        observation, rewards, dones, infos = self.venv.step_wait()
        self._observation = deepcopy(observation)
        self.rewards.append(deepcopy(rewards))
        self.dones.append(deepcopy(dones))
        return observation, rewards, dones, infos

    def of_batch(self, column, quotas):
        """
        Pick the rows of a batch from a column of the record.

        :param column: One entry per step, of all environments
        :param quotas: Number of episodes wanted from each environment
        :return: The rows of these episodes, one environment after the other
        """
        dones = np.array(self.dones)
        ends = [np.flatnonzero(dones[:, i])[quota - 1] + 1 for i, quota in enumerate(quotas)]
        return np.concatenate([[row[i] for row in column[:end]] for i, end in enumerate(ends)])
