"""Rewards that a function gives to whole episodes, in place of those of the environment."""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.callbacks import BaseCallback

from sb3_reinforce.batch import Episode
from sb3_reinforce.buffers import EpisodeRolloutBuffer

#: Takes an episode, and returns one number or one for each step
Judge = Callable[[Any], Any]


def load_judge(judge: Judge | str) -> Judge:
    """
    Find a function by its name.

    :param judge: A function, or ``"module:function"``
    :return: The function
    :raises ValueError: If it is neither
    """
    found: Any = load_env_creator(judge) if isinstance(judge, str) and ":" in judge else judge
    if not callable(found):
        raise ValueError(f"The reward of an episode is given by a function, or by its name 'module:function', not {judge!r}")
    return found


def to_rewards(judgement: Any, n_steps: int) -> np.ndarray:
    """
    Turn the judgement of an episode into the rewards of its steps.

    :param judgement: One number, which is paid in the last step, or one for each step
    :param n_steps: Number of steps
    :return: Rewards, shape ``(n_steps,)``
    :raises ValueError: If it is neither, or not finite
    """
    given = np.asarray(judgement, dtype=np.float64)
    if given.shape not in ((), (n_steps,)) or not np.isfinite(given).all():
        raise ValueError(
            f"The reward of an episode of {n_steps} steps is a finite number, or {n_steps} of them, not {judgement!r}"
        )
    rewards = np.zeros(n_steps)
    rewards[slice(None) if given.shape else -1] = given
    return rewards


class EpisodeReward(BaseCallback):
    """
    Learn from rewards that a function gives to whole episodes, at the end of each rollout, in place of the environment's.

    ``rollout/ep_rew_mean`` is then the mean of these rewards; the environment's own is ``rollout/ep_env_rew_mean``. Under
    ``torchrun``, each process judges its own episodes.

    :param function: Takes an :class:`~sb3_reinforce.batch.Episode` and returns its return, or the reward of each step. Actions
        are those that the policy sampled, before clipping; observations and rewards are as ``VecNormalize`` has made them
    :param of_batch: Whether it takes a list of the episodes of the batch instead, and returns a list: for judges that compare
    :param info_keywords: Keys of the infos that the function needs
    :param verbose: Verbosity level, not used
    :raises ValueError: If an argument, or a reward, cannot be
    """

    #: Its episodes would keep the rewards of the environment otherwise
    runs_in_all_processes = True

    def __init__(
        self, function: Judge | str, of_batch: bool = False, info_keywords: Sequence[str] = (), verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.function = load_judge(function)
        self.of_batch = of_batch
        if isinstance(info_keywords, str):
            raise ValueError(f"info_keywords={info_keywords!r} must be a list of keys, not a text")
        self.info_keywords = tuple(info_keywords)
        self._has_warned = False

    def _init_callback(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, EpisodeRolloutBuffer):
            raise ValueError(
                f"EpisodeReward is for REINFORCE, which learns from whole episodes, not for {type(self.model).__name__}: "
                "EpisodeRewardWrapper is for all algorithms"
            )
        if getattr(self.model, "time_limit", None) == "discard":
            raise ValueError("time_limit='discard' leaves out episodes, which EpisodeReward could not judge: take 'terminal'")
        buffer.info_keywords = tuple(dict.fromkeys([*buffer.info_keywords, *self.info_keywords]))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        # Greedy episodes are judged like those that they are compared with
        episodes: list[Episode] = [*buffer.episodes, *buffer.greedy_episodes]
        judgements = list(self.function(episodes)) if self.of_batch else [self.function(episode) for episode in episodes]
        if len(judgements) != len(episodes):
            raise ValueError(f"{len(episodes)} episodes were judged, and {len(judgements)} judgements returned")
        model: Any = self.model
        if model.time_limit is None and model.bootstraps and not self._has_warned and any(e.truncated for e in episodes):
            self._has_warned = True
            warnings.warn(
                "A time limit has cut off episodes, and the critic adds to their judgement what would have come: choose "
                "time_limit='terminal' if the judgement is the whole reward, or 'bootstrap' if it is not"
            )
        for episode, judgement in zip(episodes, judgements, strict=True):
            episode.rewards = to_rewards(judgement, len(episode))
            if episode.record is not None:  # The one that SB3 logs
                episode.record.setdefault("env_r", episode.record["r"])
                episode.record["r"] = float(episode.rewards.sum())


@dataclass
class PlayedEpisode:
    """What an :class:`~sb3_reinforce.batch.Episode` tells, of an episode that is not part of a rollout buffer."""

    steps: list[tuple[Any, Any, float, dict[str, Any]]] = field(default_factory=list)
    terminal_observation: Any = None
    truncated: bool = False

    @property
    def observations(self) -> Any:
        """Observations that were acted on, shape ``(n_steps, *obs_shape)``, or a dict of them."""
        observations = [observation for observation, *_ in self.steps]
        if isinstance(self.terminal_observation, dict):
            return {key: np.stack([each[key] for each in observations]) for key in self.terminal_observation}
        return np.stack(observations)

    @property
    def actions(self) -> np.ndarray:
        """Actions, shape ``(n_steps, action_dim)``."""
        return np.stack([np.ravel(action) for _, action, _, _ in self.steps])

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of the environment, shape ``(n_steps,)``."""
        return np.array([reward for _, _, reward, _ in self.steps])

    @property
    def infos(self) -> list[dict[str, Any]]:
        """Infos of each step."""
        return [info for *_, info in self.steps]

    def __len__(self) -> int:
        return len(self.steps)


class EpisodeRewardWrapper(gym.Wrapper):
    """
    Let an environment pay, in the last step of an episode, what a function says of the whole episode, and nothing before. A
    ``TimeLimit`` belongs inside of it: it could not know of an end that a wrapper around it decides. The end of an
    episode is a termination then, also where a time limit decides it.

    It brings the reward to evaluation (``EvalCallback``), ``compare`` and other algorithms; what ``Monitor`` has noted of the
    episode becomes that reward, and the environment's own is kept beside it, as ``env_r``. In RL Zoo's files:
    ``env_wrapper: [{sb3_reinforce.episode_reward.EpisodeRewardWrapper: {function: "module:function"}}]``.

    :param env: Environment
    :param function: Takes a :class:`PlayedEpisode` and returns its return, or the reward of each step, whose sum is paid
    :raises ValueError: If a reward is not finite, or not one number or one for each step
    """

    def __init__(self, env: gym.Env, function: Judge | str):
        super().__init__(env)
        self.function = load_judge(function)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._episode = PlayedEpisode()
        observation, info = super().reset(seed=seed, options=options)
        self._observation = deepcopy(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        # Copies, as some environments return the same arrays in each step
        self._episode.steps.append((self._observation, deepcopy(action), float(reward), info.copy()))
        self._observation = self._episode.terminal_observation = deepcopy(observation)
        self._episode.truncated = truncated and not terminated
        if not (terminated or truncated):
            return observation, 0.0, terminated, truncated, info
        total = float(to_rewards(self.function(self._episode), len(self._episode)).sum())
        if "episode" in info:
            info["episode"].update(r=total, env_r=info["episode"]["r"])
        # What is judged as a whole has no future that a critic could add
        return observation, total, True, False, info
