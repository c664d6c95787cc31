"""Vectorized environments of Gymnasium's interface, for the algorithms of SB3."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_reinforce.vec_env.records import EpisodeRecords, RecordedVecEnv


def to_numpy(values: Any) -> Any:
    """
    Copy what is in arrays, or in tensors of a device.

    :param values: An array, a tensor, or a dict or tuple of such
    :return: The same as arrays of NumPy
    """
    if isinstance(values, dict):
        return {key: to_numpy(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(map(to_numpy, values))
    # A copy: some environments write the next step into the same memory
    return np.array(values.detach().cpu().numpy() if hasattr(values, "detach") else values)


def at(values: Any, index: Any) -> Any:
    """
    Take some rows.

    :param values: An array, or a dict or tuple of such
    :param index: Which rows
    :return: A copy of these
    """
    if isinstance(values, dict):
        return {key: at(value, index) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(at(value, index) for value in values)
    return np.copy(values[index])


def split_infos(infos: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """
    Turn a dictionary of arrays, of which ``_key`` tells the environments that have the ``key``, into a dictionary for each
    environment.

    :param infos: Infos of Gymnasium's interface
    :param n_envs: Number of environments
    :return: Infos of SB3's. What is no array with a row for each environment is left out
    """
    found: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        rows = split_infos(values, n_envs) if isinstance(values, dict) else to_numpy(values)
        if np.shape(rows)[:1] != (n_envs,) or (isinstance(values, dict) and not any(rows)):
            continue
        for env_idx in np.flatnonzero(to_numpy(infos.get(f"_{key}", np.ones(n_envs, dtype=bool)))):
            found[env_idx][key] = rows[env_idx]
    return found


class GymnasiumVecEnv(RecordedVecEnv):
    """
    A vectorized environment of Gymnasium's interface that any algorithm of SB3 can learn in: ``PPO("MlpPolicy",
    GymnasiumVecEnv(gymnasium.make_vec("CartPole-v1", 8, vectorization_mode="async")))``.

    It behaves as a ``DummyVecEnv`` of environments with a ``Monitor``: an environment is reset in the step that ends its
    episode, whose info has ``episode``, ``terminal_observation`` and ``TimeLimit.truncated``. Tensors of a device are
    converted once in a step.

    All modes of the automatic reset will do, where single environments can be reset by ``options={"reset_mask": ...}`` in
    those other than ``SAME_STEP``: Gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv`` can. In the mode ``NEXT_STEP`` the
    observation that begins an episode comes one step late otherwise, and the algorithms of SB3 would learn from a step that is
    none.

    :param env: A vectorized environment
    :param filename: Where to write the records of the episodes, as ``Monitor`` does. ``None``: nowhere
    :param info_keywords: Keys of the last info of an episode that its record has too
    :raises ValueError: If single environments cannot be reset, and are not reset in the step that ends their episode
    """

    def __init__(self, env: VectorEnv, filename: str | None = None, info_keywords: tuple[str, ...] = ()):
        self.env = env
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._members: Any = env.unwrapped
        self._has_members = isinstance(self._members, SyncVectorEnv | AsyncVectorEnv)
        # Such workers do not notice that they have been reset
        is_deaf = self._mode == AutoresetMode.NEXT_STEP and not getattr(self._members, "shared_memory", True)
        if self._mode != AutoresetMode.SAME_STEP and (not self._has_members or is_deaf):
            raise ValueError(
                f"{env} has the autoreset_mode {self._mode.name}, and cannot reset single environments in the step that ends "
                "their episode, as the algorithms of SB3 need it: take one whose metadata['autoreset_mode'] is "
                "AutoresetMode.SAME_STEP, or gymnasium.make_vec(..., vectorization_mode='sync' or 'async')"
            )
        self.spec = env.spec
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._records = EpisodeRecords(env.num_envs, getattr(env.spec, "id", str(env)), filename, info_keywords)

    def reset(self) -> VecEnvObs:
        """
        Start a new episode in all environments.

        :return: The first observations, shape ``(n_envs, *obs_shape)``, or a dict of them
        :raises ValueError: If the options differ
        """
        if any(options != self._options[0] for options in self._options):
            raise ValueError(f"The options of a reset must be the same for all environments, not {self._options}")
        seed: Any = self._seeds[0]
        if seed is not None and self._seeds != list(range(seed, seed + self.num_envs)):
            seed = self._seeds
        obs, infos = self.env.reset(seed=seed, options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self._records.reset()
        self.reset_infos = split_infos(infos, self.num_envs)
        return to_numpy(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for observations, shape ``(n_envs, *obs_shape)``, rewards and dones, shape ``(n_envs,)``, and infos."""
        obs, rewards, terminated, truncated, arrays = self.env.step(self.actions)
        obs, terminated, truncated = to_numpy(obs), to_numpy(terminated), to_numpy(truncated)
        rewards = to_numpy(rewards)
        dones = terminated | truncated
        last_obs, last_infos, *_ = (arrays.pop(key, None) for key in ("final_obs", "final_info", "_final_obs", "_final_info"))
        infos = split_infos(arrays, self.num_envs)
        self._records.add(rewards)
        finished = np.flatnonzero(dones).tolist()
        if len(finished):
            if self._mode == AutoresetMode.SAME_STEP:
                for env_idx in finished:
                    self.reset_infos[env_idx] = infos[env_idx]
                ended = split_infos(last_infos or {}, self.num_envs)
                if last_obs is None:
                    raise ValueError(f"{self.env} has ended an episode without the last observation in its infos, 'final_obs'")
                # Of a batch, or an array that holds what each environment gives
                rows = to_numpy(last_obs) if isinstance(last_obs, dict) else None
                last = [to_numpy(last_obs[i]) if rows is None else at(rows, i) for i in finished]
            else:
                ended, last = infos, [at(obs, env_idx) for env_idx in finished]
                obs, first_infos = self.env.reset(options={"reset_mask": dones})
                obs, first = to_numpy(obs), split_infos(first_infos, self.num_envs)
                for env_idx in finished:
                    self.reset_infos[env_idx] = first[env_idx]
            for env_idx, observation in zip(finished, last, strict=True):
                infos[env_idx] = ended[env_idx] | {"terminal_observation": observation}
                self._records.finish(env_idx, infos[env_idx])
        for info, is_truncated in zip(infos, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = is_truncated
        return obs, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the environments, and the file."""
        self.env.close()
        self._records.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        frames: Any = self.env.render()
        return list(frames or [None] * self.num_envs)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Look up an attribute of the environments, or of the vectorized environment where it holds no single ones.

        :param attr_name: Name of the attribute
        :param indices: Indices of environments
        :return: The attribute of each
        """
        if self._has_members and not self.has_attr(attr_name):
            raise AttributeError(f"The environments of {self.env} have no attribute {attr_name!r}")
        if attr_name == "render_mode":
            values: Any = [self.env.render_mode] * self.num_envs
        else:
            values = self._members.get_attr(attr_name) if self._has_members else [getattr(self.env, attr_name)] * self.num_envs
        return [values[i] for i in self._indices(indices)]

    def has_attr(self, attr_name: str) -> bool:
        """
        Tell whether the environments have an attribute.

        :param attr_name: Name of the attribute
        :return: Whether all have it
        """
        # Asked for in this way, a missing one does not end the processes of an AsyncVectorEnv
        return all(self._members.call("has_wrapper_attr", attr_name)) if self._has_members else hasattr(self.env, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of all environments.

        :param attr_name: Name of the attribute
        :param value: Its value
        :param indices: All environments
        :raises NotImplementedError: If not all environments are meant, or there are no single ones
        """
        self._check_all(indices)
        self._members.set_attr(attr_name, [value] * self.num_envs)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of all environments.

        :param method_name: Name of the method
        :param method_args: Its arguments
        :param indices: All environments
        :param method_kwargs: Its arguments by name
        :return: The result of each
        :raises NotImplementedError: If not all environments are meant, or there are no single ones
        """
        self._check_all(indices)
        return list(self._members.call(method_name, *method_args, **method_kwargs))

    def _check_all(self, indices: VecEnvIndices) -> None:
        if not self._has_members or sorted(self._indices(indices)) != list(range(self.num_envs)):
            raise NotImplementedError(
                "Attributes can be set, and methods called, in all environments of a SyncVectorEnv or AsyncVectorEnv at once, "
                f"not in {indices} of {self.env}"
            )
