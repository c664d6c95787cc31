import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_reinforce.checks import check_number, closest
from sb3_reinforce.vec_env.records import EpisodeRecords, RecordedVecEnv

Settings: TypeAlias = dict[str, Any]

#: Settings of a pool that ``EnvPoolVecEnv`` makes itself
RESERVED = {
    "base_path",
    "batch_size",
    "env_seed",
    "gym_reset_return_info",
    "max_episode_steps",
    "max_num_players",
    "num_envs",
    "num_threads",
    "seed",
}

#: What EnvPool tells after a step that does not come from the environment
NOT_FROM_THE_ENVIRONMENT = {"elapsed_step", "env_id", "players"}


def import_envpool() -> ModuleType:
    """
    Import EnvPool.

    :return: The module ``envpool``, which takes a second to import
    :raises ImportError: If it is not installed
    """
    try:
        import envpool
    except ImportError as error:
        raise ImportError('EnvPool is not installed: pip install "sb3-reinforce[envpool]"') from error
    return envpool


@contextmanager
def ignore_lowered_precision() -> Iterator[None]:
    """EnvPool's bounds have double precision where their spaces have single precision, of which Gymnasium warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered", UserWarning)
        yield


class EnvPoolVecEnv(RecordedVecEnv):
    """
    Environments of EnvPool, which run in C++ on several threads: https://envpool.readthedocs.io

    It behaves as a ``DummyVecEnv`` of environments with a ``Monitor``: an environment is reset in the step that ends its
    episode, whose info has ``episode``, ``terminal_observation`` and ``TimeLimit.truncated``. What else EnvPool tells
    about the environment is in the info of the last step of an episode only. Nothing is rendered.

    A seed gives other episodes than the same seed in Gymnasium.

    :param env_id: Id of an environment that EnvPool has
    :param n_envs: Number of environments
    :param seed: Environment ``i`` gets the seed ``seed + i``. ``None``: random seeds
    :param max_episode_steps: Time limit in steps. ``None``: that of Gymnasium's environment of the same id, or else
        EnvPool's
    :param num_threads: Number of threads. ``None``: EnvPool's choice, one per processor core
    :param filename: Where to write the records of the episodes, as ``Monitor`` does. ``None``: nowhere
    :param info_keywords: Keys of the last info of an episode that its record has too
    :param env_kwargs: Settings of the environment, by the names that they have in EnvPool
    :raises ImportError: If EnvPool is not installed
    :raises ValueError: If EnvPool has no such environment or setting, or a number is not positive, or the environment has
        several players or spaces other than Box, Discrete and (observations only) MultiBinary
    """

    render_mode: str | None = None

    def __init__(
        self,
        env_id: str,
        n_envs: int = 1,
        seed: int | None = None,
        max_episode_steps: int | None = None,
        num_threads: int | None = None,
        filename: str | None = None,
        info_keywords: tuple[str, ...] = (),
        **env_kwargs: Any,
    ):
        check_number("n_envs", n_envs, 1, integer=True)
        if max_episode_steps is not None:
            check_number("max_episode_steps", max_episode_steps, 1, integer=True, or_else="None")
        if num_threads is not None:
            check_number("num_threads", num_threads, 1, integer=True, or_else="None")
        self._envpool = import_envpool()
        self._env_id = env_id
        self._settings: Settings = {**env_kwargs, "num_envs": int(n_envs), "num_threads": int(num_threads or 0)}
        self._time_limit = np.iinfo(int).max
        registered = gym.registry.get(env_id)
        if registered is not None and registered.max_episode_steps is not None:
            # EnvPool takes an episode that terminates at its time limit for truncated: the limit is kept here
            self._time_limit = int(max_episode_steps or registered.max_episode_steps)
            self._settings["max_episode_steps"] = self._time_limit + 1
        elif max_episode_steps is not None:
            self._settings["max_episode_steps"] = int(max_episode_steps)
        with ignore_lowered_precision():
            pool_spec = self._make_pool_spec(env_kwargs)
            observation_space, action_space = pool_spec.gymnasium_observation_space, pool_spec.gymnasium_action_space
        self._check_kind(observation_space, action_space, pool_spec.config.max_num_players)
        if action_space.dtype == np.float64:  # Gymnasium's are in single precision
            action_space = spaces.Box(action_space.low.astype(np.float32), action_space.high.astype(np.float32))
        self.spec = deepcopy(registered) or EnvSpec(id=env_id)
        self.spec.max_episode_steps = min(self._time_limit, pool_spec.config.max_episode_steps)
        self.spec.kwargs.update(env_kwargs)
        super().__init__(n_envs, observation_space, action_space)

        self._pool: Any = None  # Made by the first reset, as EnvPool takes seeds only then
        self._is_waiting = False
        self._records = EpisodeRecords(n_envs, env_id, filename, info_keywords)
        self._action_shape = (n_envs, *action_space.shape)
        self._all = np.arange(n_envs, dtype=np.int32)
        self._active = self._all
        if seed is not None:
            self.seed(seed)

    def _make_pool_spec(self, env_kwargs: Settings) -> Any:
        """
        Describe the pool.

        :param env_kwargs: Settings of the environment
        :return: EnvPool's description of the pool
        :raises ValueError: If there is no such environment or setting
        """
        env_ids = self._envpool.list_all_envs()
        if self._env_id not in env_ids:
            raise ValueError(
                f"EnvPool has no environment {self._env_id!r}, did you mean {closest(str(self._env_id), env_ids)!r}?"
            )
        known = self._envpool.make_spec(self._env_id).config._fields
        names = sorted(set(known) - RESERVED)
        for name in env_kwargs.keys() - set(names):
            raise ValueError(f"{name!r} is no setting of {self._env_id} in EnvPool, did you mean {closest(name, names)!r}?")
        if "contact_cost_weight" in known:  # Where they count, Gymnasium's v4 computes contact forces too
            self._settings.setdefault("post_constraint", True)
        try:
            return self._envpool.make_spec(self._env_id, **self._settings)
        except TypeError as error:
            raise ValueError(f"EnvPool's {self._env_id} does not take {env_kwargs}: a value is of the wrong type") from error

    def _check_kind(self, observation_space: Any, action_space: Any, n_players: int) -> None:
        if n_players > 1:
            raise ValueError(f"{self._env_id} has {n_players} players: only environments with one are supported")
        for name, space, supported in (
            ("observation", observation_space, (spaces.Box, spaces.Discrete, spaces.MultiBinary)),
            ("action", action_space, (spaces.Box, spaces.Discrete)),
        ):
            if not isinstance(space, supported):
                allowed = ", ".join(kind.__name__ for kind in supported)
                raise ValueError(
                    f"The {name} space of {self._env_id} is a {type(space).__name__}, it must be one of: {allowed}"
                )

    def reset(self) -> np.ndarray:
        """Start a new episode in all environments, and return the first observations, shape ``(n_envs, *obs_shape)``."""
        if self._is_waiting:
            self._pool.recv()
            self._is_waiting = False
        if self._pool is None or self._seeds[0] is not None:
            self._pool = self._make_pool()
            self._reset_seeds()
        self._active = self._all
        self._records.reset()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._obs = self._first_observations(self._all)
        return self._obs

    def _make_pool(self) -> Any:
        """Make a pool with the seeds that were given, or else with random ones."""
        seeds = np.random.SeedSequence().generate_state(self.num_envs) if self._seeds[0] is None else self._seeds
        # EnvPool's seeds are signed
        seed = np.array(seeds, dtype=np.int64).astype(np.int32).tolist()
        pool = self._envpool.make_gymnasium(self._env_id, seed=seed, **self._settings)
        with ignore_lowered_precision():
            pool.observation_space  # noqa: B018 It is made now, and kept
        return pool

    def _first_observations(self, env_ids: np.ndarray) -> np.ndarray:
        obs, _ = self._pool.reset(env_ids)
        return obs.astype(self.observation_space.dtype, copy=False)

    def step_only(self, env_indices: Sequence[int] | np.ndarray) -> None:
        """
        Until the next reset of all environments, step no others than these. The others repeat their last observation,
        with reward 0, done ``False`` and an empty info.

        :param env_indices: Indices of the environments to step
        :raises ValueError: If there are none, one is twice, or there is no such environment
        """
        indices = np.asarray(env_indices)
        chosen = np.unique(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not 0 < len(indices) == len(chosen):
            raise ValueError(f"env_indices={env_indices!r} must be different indices of environments, one or more")
        if chosen[0] < 0 or chosen[-1] >= self.num_envs:
            raise ValueError(f"env_indices={env_indices!r} must be in [0, {self.num_envs - 1}]")
        self._active = self._all if len(chosen) == self.num_envs else chosen.astype(np.int32)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Send actions to the environments.

        :param actions: Actions of all environments, shape ``(n_envs, *action_shape)``
        :raises RuntimeError: If there was no reset
        :raises ValueError: If the shape is another
        """
        if self._pool is None:
            raise RuntimeError("Call reset() before step()")
        actions = np.asarray(actions)
        if actions.shape != self._action_shape:
            raise ValueError(f"actions have the shape {actions.shape}, it must be {self._action_shape}")
        self._pool.send(actions if self._active is self._all else actions[self._active], self._active)
        self._is_waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for observations, shape ``(n_envs, *obs_shape)``, rewards and dones, shape ``(n_envs,)``, and infos."""
        obs, rewards, terminated, truncated, arrays = self._pool.recv()
        self._is_waiting = False
        obs = obs.astype(self.observation_space.dtype, copy=False)
        active: slice | np.ndarray = slice(None) if self._active is self._all else self._active
        self._records.add(rewards, active)
        dones = terminated | truncated | (self._records.lengths[active] >= self._time_limit)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(len(dones))]
        if np.count_nonzero(dones):
            self._end_episodes(np.flatnonzero(dones), obs, terminated, infos, arrays)
        if self._active is self._all:
            self._obs = obs
            return obs, rewards, dones, infos

        self._obs = self._obs.copy()
        self._obs[active] = obs
        all_rewards = np.zeros(self.num_envs, dtype=np.float32)
        all_rewards[active] = rewards
        all_dones = np.zeros(self.num_envs, dtype=bool)
        all_dones[active] = dones
        all_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for env_idx, info in zip(self._active, infos, strict=True):
            all_infos[env_idx] = info
        return self._obs, all_rewards, all_dones, all_infos

    def _end_episodes(
        self,
        finished: np.ndarray,
        obs: np.ndarray,
        terminated: np.ndarray,
        infos: list[dict[str, Any]],
        arrays: dict[str, Any],
    ) -> None:
        """
        Reset environments and write their last observations into the infos, their first ones into ``obs``.

        :param finished: Positions among the active environments of those whose episode is over
        :param obs: Observations of the active environments
        :param terminated: Which of these have terminated
        :param infos: Infos of these
        :param arrays: EnvPool's information about these
        """
        env_ids = self._active[finished]
        for position, env_idx in zip(finished, env_ids, strict=True):
            info = infos[position]
            info.update({key: arrays[key][position] for key in arrays.keys() - NOT_FROM_THE_ENVIRONMENT})
            info["TimeLimit.truncated"] = not terminated[position]
            info["terminal_observation"] = obs[position].copy()
            self._records.finish(env_idx, info)
            self.reset_infos[env_idx] = {}
        obs[finished] = self._first_observations(env_ids)

    def close(self) -> None:
        """End the threads, and close the file."""
        self._pool = None
        self._is_waiting = False
        self._records.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        warnings.warn("EnvPoolVecEnv has no images: make a video in Gymnasium's environment")
        return [None] * self.num_envs

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        if options:
            raise NotImplementedError("EnvPool has no options for reset")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Look up an attribute of the environments.

        :param attr_name: ``"spec"``, ``"render_mode"``, ``"observation_space"`` or ``"action_space"``
        :param indices: Indices of environments
        :return: The attribute of each
        :raises AttributeError: If it is another attribute: EnvPool's environments are no Python objects
        """
        if attr_name not in ("spec", "render_mode", "observation_space", "action_space"):
            raise AttributeError(f"EnvPool's environments have no attribute {attr_name!r}")
        return [getattr(self, attr_name) for _ in self._indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError(f"EnvPool's environments have no attributes, {attr_name!r} cannot be set")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError(f"EnvPool's environments have no methods, {method_name!r} cannot be called")
