"""What several processes that train together need of an SB3 algorithm."""

import inspect
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import set_random_seed

from sb3_reinforce.callbacks import TimestepsBarCallback, all_callbacks
from sb3_reinforce.parallel import processes
from sb3_reinforce.vec_env.normalize import running_statistics

#: Arguments in which processes that train together can differ
OWN_ARGUMENTS = {"seed", "verbose", "device", "tensorboard_log"}


def is_comparable(value: Any) -> bool:
    """
    Tell whether two values are equal exactly if ``==`` says so.

    :param value: A value
    :return: Whether it is a number, a text, ``None``, or a list or tuple of such
    """
    if isinstance(value, list | tuple):
        return all(map(is_comparable, value))
    return value is None or isinstance(value, bool | int | float | str | np.generic)


class DataParallelAlgorithm(OnPolicyAlgorithm):
    """
    An on-policy algorithm that several processes train together (:mod:`sb3_reinforce.parallel.processes`). The first
    process logs, evaluates and saves. In a single process this is SB3's ``OnPolicyAlgorithm``.
    """

    def _setup_model(self) -> None:
        processes.join()
        super()._setup_model()
        if processes.rank() > 0:
            self.verbose, self.tensorboard_log = 0, None

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators (python, numpy, pytorch, gym, action_space). The environments of several
        processes are seeded as one process would seed them all, and their samples differ. All processes have to call this.

        :param seed: Seed, ``None`` for no change
        """
        super().set_random_seed(seed)
        first_env, _ = self.locate_envs(0 if self.env is None else self.env.num_envs)
        if seed is None or processes.rank() == 0:
            return
        own_seed = int(np.random.SeedSequence([seed, processes.rank()]).generate_state(1)[0])
        set_random_seed(own_seed, using_cuda=self.device.type == "cuda")
        if self.env is not None:
            self.env.seed(seed + first_env)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, as in SB3; of several processes, the first one saves."""
        if processes.rank() == 0:
            super().save(*args, **kwargs)

    def locate_envs(self, n_envs: int) -> tuple[int, int]:
        """
        Number the environments of all processes.

        :param n_envs: Number of environments of this process
        :return: Index of the first of them, and number of environments of all processes
        """
        all_envs = processes.by_rank([n_envs]).astype(int)
        return int(all_envs[: processes.rank()].sum()), int(all_envs.sum())

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """
        Prepare the callbacks, and let all processes start from the same parameters and statistics. Callbacks are called in
        process 0, and in the others only those with ``runs_in_all_processes``.

        :param callback: Callback(s) called at every step with state of the algorithm.
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: A callback
        :raises ValueError: If the processes are not about to do the same
        """
        if processes.rank() > 0:
            given = callback if isinstance(callback, list) else [callback]
            seen: list[BaseCallback] = []
            found = [child for each in given if isinstance(each, BaseCallback) for child in all_callbacks(each, seen)]
            callback = [child for child in found if getattr(child, "runs_in_all_processes", False)]
            progress_bar = False
            self._logger = Logger(None, [])
        if progress_bar:
            every = callback if isinstance(callback, list) else [callback]
            wrapped = [each if isinstance(each, BaseCallback) else ConvertCallback(each) for each in every if each is not None]
            callback = [*wrapped, TimestepsBarCallback()]
        callback = super()._init_callback(callback)
        self._check_agreement(callback)
        processes.broadcast(self.policy.state_dict().values())
        assert self.env is not None
        statistics = running_statistics(self.env)
        for rms, first in zip(statistics, processes.on_first(lambda: statistics), strict=True):
            vars(rms).update(vars(first))
        return callback

    def _check_agreement(self, callback: BaseCallback) -> None:
        """
        Check that all processes train the same model in the same way.

        :param callback: Callback of the training
        :raises ValueError: If they do not
        """
        names = inspect.signature(type(self)).parameters.keys() - OWN_ARGUMENTS
        mine = {name: getattr(self, name, None) for name in sorted(names)}
        mine = {name: value for name, value in mine.items() if is_comparable(value)}
        mine["total_timesteps"], mine["num_timesteps"] = self._total_timesteps, self.num_timesteps
        mine["parameters"] = {name: tuple(value.shape) for name, value in self.policy.state_dict().items()}
        shared = [child for child in all_callbacks(callback) if getattr(child, "runs_in_all_processes", False)]
        mine["callbacks of all processes"] = len(shared)
        has_batch_norm = any(isinstance(module, th.nn.modules.batchnorm._BatchNorm) for module in self.policy.modules())
        if processes.world_size() > 1 and has_batch_norm:
            raise ValueError(
                "Batch normalization is not supported in several processes: each would have statistics of its own"
            )
        first, *others = processes.gather(mine)
        for process, other in enumerate(others, 1):
            for name in mine:
                if other[name] != first[name]:
                    raise ValueError(
                        f"The processes must train the same model: {name} is {first[name]} in process 0 and "
                        f"{other[name]} in process {process}"
                    )
