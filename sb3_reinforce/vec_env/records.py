"""Records of episodes, for vectorized environments whose environments have no ``Monitor``."""

import time
from typing import Any

import numpy as np
from gymnasium import Wrapper
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices


class EpisodeRecords:
    """
    Keep the returns and lengths of running episodes, and make of them what ``Monitor`` puts into the last info of an episode.

    :param n_envs: Number of environments
    :param env_id: Id of the environments, for the file
    :param filename: Where to write the records, as ``Monitor`` does. ``None``: nowhere
    :param info_keywords: Keys of the last info of an episode that its record has too
    """

    def __init__(self, n_envs: int, env_id: str, filename: str | None = None, info_keywords: tuple[str, ...] = ()):
        self._t_start = time.time()
        self._info_keywords = info_keywords
        self._writer = None
        if filename is not None:
            header: dict[str, float | str] = {"t_start": self._t_start, "env_id": env_id}
            self._writer = ResultsWriter(filename, header, info_keywords)
        #: Return and number of steps of the running episode of each environment
        self.returns, self.lengths = np.zeros(n_envs), np.zeros(n_envs, dtype=int)

    def reset(self) -> None:
        """Forget the running episodes."""
        self.returns[:], self.lengths[:] = 0, 0

    def add(self, rewards: np.ndarray, env_indices: slice | np.ndarray = slice(None)) -> None:
        """
        Count a step.

        :param rewards: Rewards of the environments that were stepped
        :param env_indices: Which those are
        """
        self.returns[env_indices] += rewards
        self.lengths[env_indices] += 1

    def finish(self, env_idx: int, info: dict[str, Any]) -> None:
        """
        Put the record of an episode into its last info, and into the file.

        :param env_idx: Index of the environment
        :param info: The info
        """
        info["episode"] = {
            "r": round(float(self.returns[env_idx]), 6),
            "l": int(self.lengths[env_idx]),
            "t": round(time.time() - self._t_start, 6),
            **{key: info[key] for key in self._info_keywords},
        }
        if self._writer is not None:
            self._writer.write_row(info["episode"])
        self.returns[env_idx], self.lengths[env_idx] = 0, 0

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class RecordedVecEnv(VecEnv):
    """The base of vectorized environments that keep :class:`EpisodeRecords`, as environments with a ``Monitor`` do."""

    def env_is_wrapped(self, wrapper_class: type[Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Tell whether the environments have a wrapper.

        :param wrapper_class: Wrapper to look for
        :param indices: Indices of environments
        :return: ``True`` for ``Monitor``, whose records are in the infos
        """
        return [wrapper_class is Monitor for _ in self._indices(indices)]

    def _indices(self, indices: VecEnvIndices) -> list[int]:
        """Resolve indices of environments; an ``IndexError`` if there is no such environment."""
        return [range(self.num_envs)[i] for i in self._get_indices(indices)]
