import warnings
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from sb3_reinforce.checks import check_number
from sb3_reinforce.parallel import processes
from sb3_reinforce.resume.archive import find_states, lock, n_steps_of, save_state


class TrainingStateCallback(BaseCallback):
    """
    Save the training state of ``REINFORCE`` between two updates, at the first opportunity after every ``save_freq`` time
    steps: ``PATH/NAME_PREFIX_N_steps.state``. ``REINFORCE.resume(path, env)`` goes on from there.

    With this callback every rollout starts from a reset, so that a run can be stopped after any update and resumed exactly.

    :param save_freq: Number of time steps between two states
    :param path: Folder to save to
    :param keep: Number of the latest states to keep
    :param name_prefix: Beginning of the names of the files
    :param verbose: Verbosity level: 0 for no output, 1 for the names of the files
    :raises ValueError: If a number is not positive, or (when training starts) the folder holds states of another run, or
        of one that is still training
    """

    #: Of several processes, each calls it: a state is made of the states of all
    runs_in_all_processes = True

    def __init__(self, save_freq: int, path: str | Path, keep: int = 2, name_prefix: str = "training", verbose: int = 0):
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            check_number(name, value, 1, integer=True)
        self.save_freq = save_freq
        self.path = Path(path)
        self.keep = keep
        self.name_prefix = name_prefix
        self.last_saved = 0
        #: Set it, from a signal handler for example, to save a state at the end of this update and stop there
        self.is_to_stop = False
        #: Whether it has done so
        self.has_stopped = False

    def _init_callback(self) -> None:
        if not hasattr(self.model, "between_updates"):  # Nothing else calls on_update_end
            raise ValueError(f"TrainingStateCallback is for REINFORCE, not for {type(self.model).__name__}")
        self.path.mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        if self.num_timesteps == 0:
            self.last_saved = 0
        processes.on_first(self._claim_folder)

    def _claim_folder(self) -> None:
        self._lock = lock(self.path)
        states = find_states(self.path, self.name_prefix)
        goes_on = self.model.is_resuming or self.last_saved > 0  # type: ignore[attr-defined]
        if states and not goes_on:
            raise ValueError(
                f"{self.path} holds training states of another run: go on with that one (resume), or choose another folder"
            )
        if states and n_steps_of(states[0]) > self.num_timesteps:
            warnings.warn(
                f"{self.path} holds training states of more than the {self.num_timesteps} time steps that this run goes on "
                "from: those that it saves will take their place"
            )

    def on_update_end(self, callback: BaseCallback) -> None:
        """
        Save the training state, if it is time. The rollout calls this between two updates, after all callbacks know that a
        rollout begins.

        :param callback: The callback that training calls, which this one is part of
        """
        is_to_stop = bool(processes.all_max(self.is_to_stop))  # A signal can reach the processes in different updates
        self.is_to_stop = False  # Not in the state, nor in the next run
        # That of the model: this one's is of the last step, before the processes met
        if is_to_stop or self.model.num_timesteps - self.last_saved >= self.save_freq:
            self._save(callback)
        self.has_stopped = is_to_stop

    def _on_step(self) -> bool:
        return not self.has_stopped

    def _on_training_end(self) -> None:
        if processes.rank() == 0:
            self._lock.release(force=True)

    def _save(self, callback: BaseCallback) -> None:
        self.last_saved = self.model.num_timesteps
        path = self.path / f"{self.name_prefix}_{self.last_saved}_steps.state"
        save_state(path, self.model, callback)
        if processes.rank() > 0:
            return
        if self.verbose >= 1:
            print(f"Saved the training state to {path}")
        # Those of more steps are from before this run went on from an earlier state: they go first
        states = sorted(find_states(self.path, self.name_prefix), key=lambda state: n_steps_of(state) > self.last_saved)
        for old in states[self.keep :]:
            old.unlink()
