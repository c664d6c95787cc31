"""What exact resume needs of an SB3 algorithm."""

import io
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_reinforce.callbacks import all_callbacks
from sb3_reinforce.resume.archive import load_latest
from sb3_reinforce.resume.callback import TrainingStateCallback
from sb3_reinforce.resume.capture import restore

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


class ResumableAlgorithm(OnPolicyAlgorithm):
    """
    An on-policy algorithm whose runs can be resumed exactly. Its rollouts call :meth:`between_updates` before anything
    random happens, and start from a reset when this has saved or restored a state.
    """

    #: The state that a resumed run goes on from, until its first rollout
    _state_to_restore: dict[str, Any] | None = None

    @property
    def is_resuming(self) -> bool:
        """Whether the next rollout goes on from a training state."""
        return self._state_to_restore is not None

    @classmethod
    def resume(
        cls: type[SelfResumable], path: str | Path, env: GymEnv | None = None, device: th.device | str | None = None
    ) -> SelfResumable:
        """
        Go on with a run of which a :class:`~sb3_reinforce.resume.TrainingStateCallback` has saved the state:
        ``REINFORCE.resume(path, env).learn(total_timesteps, callback)``, with an environment, a number of time steps (of the
        whole run) and callbacks like those of the run, ends as the run would have.

        Several processes all have to call it, and to be as many as before.

        The file holds a model in SB3's format, which is unpickled: take it only from those whom you trust.

        :param path: A training state, or a folder of them: the latest that is sound
        :param env: The environment to learn from; without one, ``set_env`` has to follow
        :param device: Device on which the code should run, ``None`` for the same kind as before
        :return: The model
        :raises ValueError: If there is no sound training state
        """
        state, model = load_latest(Path(path))
        resumed = cls.load(io.BytesIO(model), env=env, device=device or state["device"])
        resumed._state_to_restore = state
        return resumed

    def between_updates(self, callback: BaseCallback) -> None:
        """
        Go on from a training state, if there is one, or else save one, where a callback wants it. The rollouts of such a run
        start from a reset: the state of environments that have started an episode is out of reach.

        :param callback: The callback that training calls
        """
        savers = [child for child in all_callbacks(callback) if isinstance(child, TrainingStateCallback)]
        if self._state_to_restore is not None:
            restore(self, callback, self._state_to_restore)
        else:
            for saver in savers:
                saver.on_update_end(callback)
        if self._state_to_restore is not None or savers:
            self._state_to_restore = self._last_obs = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_state_to_restore"]

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("There is no environment to learn from: give one to load or resume, or call set_env")
        state = self._state_to_restore
        if state is None:
            return super()._setup_learn(*args, **kwargs)
        has_logger = self._custom_logger
        if self.tensorboard_log is not None and state["log_dir"] and not has_logger:
            self.set_logger(configure(state["log_dir"], ["tensorboard", *(["stdout"] if self.verbose else [])]))
        total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        self._custom_logger = has_logger
        return total_timesteps, callback

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "OnPolicyAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        """
        Train the model; a resumed run up to ``total_timesteps`` of the whole run.

        :param total_timesteps: The total number of samples (env steps) to train on
        :param callback: Callback(s) called at every step with state of the algorithm
        :param log_interval: Number of updates between two logs, ``None`` for no logs
        :param tb_log_name: Name of the run for TensorBoard
        :param reset_num_timesteps: Whether to reset the number of time steps, and with it the schedules
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        """
        if self._state_to_restore is not None:
            reset_num_timesteps = False
            if total_timesteps != self._total_timesteps:
                warnings.warn(
                    f"total_timesteps={total_timesteps}, the run that is resumed has {self._total_timesteps}: "
                    "schedules are no longer those of that run"
                )
            total_timesteps -= self.num_timesteps
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,  # type: ignore[arg-type]
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
