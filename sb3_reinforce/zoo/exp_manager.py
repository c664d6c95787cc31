"""RL Zoo's experiment manager, for REINFORCE."""

import sys
import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import optuna
import yaml
from rl_zoo3 import exp_manager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.parallel import processes
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.resume import TrainingStateCallback
from sb3_reinforce.resume.archive import lock
from sb3_reinforce.vec_env.envpool import EnvPoolVecEnv
from sb3_reinforce.vec_env.shared_starts import SharedStarts
from sb3_reinforce.zoo import upstream
from sb3_reinforce.zoo.entries import check_entry, check_reinforce, convert_schedules
from sb3_reinforce.zoo.hyperparams import FOLDER, find_file, read_hyperparams
from sb3_reinforce.zoo.interrupts import ignoring_interrupts, stopping_at_an_update
from sb3_reinforce.zoo.resume import cut_monitor_files, has_ended, saved_hyperparams


class ExperimentManager(exp_manager.ExperimentManager):
    """
    RL Zoo's experiment manager, with six differences.

    * The hyperparameters that come with this package are found.
    * Hyperparameters are checked before an environment is created.
    * Agents can be trained on EnvPool's environments.
    * Environments of any kind can be told their starts, for ``group_size``.
    * ``--save-freq`` saves the training state of REINFORCE, from which ``--resume`` goes on.
    * Under ``torchrun``, several processes share one run.

    :param resume: Folder of a run to go on with
    :param on_envpool: Whether to train on EnvPool's environments
    :raises ValueError: If the arguments contradict each other, or there is no such trial or training state
    """

    def __init__(self, *args: Any, resume: Path | None = None, on_envpool: bool = False, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "config": find_file(kwargs.get("config"))})
        self.resume = resume
        self.on_envpool = on_envpool
        if on_envpool:
            self.args.vec_env = "envpool"  # For the record: RL Zoo was told dummy, which the evaluation uses
        if processes.world_size() > 1 and (self.algo != "reinforce" or self.optimize_hyperparameters):
            raise ValueError("torchrun is for training reinforce: searches are spread by --storage, see the README")
        self.save_path = processes.on_first(lambda: str(resume or self.save_path))
        self.params_path = f"{self.save_path}/{self.env_name}"
        if kwargs.get("config") is None:
            self._choose_config()
        if self.trial_id is not None:
            self._load_trial_zero()
        if resume is not None:
            self.continue_training = True
            processes.on_first(self._claim)
            self.monitor_starts = cut_monitor_files(resume)

    def _choose_config(self) -> None:
        """Take the hyperparameters of this package where RL Zoo has none."""
        env_id = self.env_name.gym_id
        if self.algo == "reinforce" or env_id in read_hyperparams(self.algo):
            self.config = str(FOLDER / f"{self.algo}.yml")
            if self.algo != "reinforce":
                print(f"{env_id} has no entry of its own in RL Zoo: its tuned settings for an earlier version are used")

    def _claim(self) -> None:
        """
        Keep other processes from going on with the same run.

        :raises ValueError: If another process trains it
        """
        self.lock = lock(Path(self.save_path))

    def _load_trial_zero(self) -> None:
        """
        Check that there is a trial of the given number, and load number 0, which RL Zoo takes for none.

        :raises ValueError: If there is no such trial
        """
        if self.storage is None or self.study_name is None:
            raise ValueError(f"--trial-id {self.trial_id} needs --storage and --study-name, to know where to look")
        try:
            if self.trial_id < 0:  # type: ignore[operator]
                raise IndexError(self.trial_id)
            hyperparams = self.load_trial(self.storage, self.study_name, self.trial_id)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"No trial {self.trial_id} in the study {self.study_name!r} of the storage {self.storage!r}"
            ) from error
        if self.trial_id == 0:
            self.custom_hyperparams = {**hyperparams, **(self.custom_hyperparams or {})}

    # === Hyperparameters ===

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read the hyperparameters, as RL Zoo does, or those of the run to go on with.

        :return: The hyperparameters, twice
        :raises ValueError: If the file of hyperparameters cannot be read
        """
        if self.resume is not None:
            saved = saved_hyperparams(self.params_path)
            return saved.copy(), saved
        try:
            return super().read_hyperparameters()
        except (AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError, yaml.YAMLError) as error:
            if error.args == ("atari",):  # RL Zoo's entry for all its games
                raise ValueError(f"{self.config} has no entry 'atari', which {self.env_name.gym_id} needs") from error
            raise ValueError(
                f"--conf-file {self.config} must be a .yml file, or a .py file or module with a dictionary "
                f"'hyperparams', of one dictionary per environment ({error!r})"
            ) from error
        except ValueError as error:  # RL Zoo's word for it names no remedy
            if "Hyperparameters not found" not in str(error):
                raise
            raise ValueError(f"{self.config} has neither an entry for {self.env_name.gym_id} nor a 'default'") from error

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        env_id = self.env_name.gym_id
        check_entry(self.algo, hyperparams, f"{env_id} in {self.config}")
        convert_schedules(self.algo, hyperparams)
        if isinstance(hyperparams.get("normalize"), dict):  # RL Zoo takes the arguments from a text only
            hyperparams["normalize"] = repr(hyperparams["normalize"])
        try:
            kwargs, env_wrapper, callbacks, vec_env_wrapper = super()._preprocess_hyperparams(hyperparams)
        except (AttributeError, ImportError, NameError, SyntaxError) as error:
            raise ValueError(f"A hyperparameter of {env_id} cannot be evaluated: {error}") from error
        if self._eval_env_kwargs_args is None:  # RL Zoo leaves out those of the entry
            self.eval_env_kwargs = self.env_kwargs
        if self.algo == "reinforce":
            check_reinforce(kwargs)
        if self.on_envpool:
            if env_wrapper is not None:
                raise ValueError("env_wrapper wraps Gymnasium's environments: it cannot be used with --vec-env envpool")
            self._make_envpool([None])  # Checks the arguments
        shares_starts = self.algo == "reinforce" and (kwargs.get("group_size", 1) > 1 or kwargs.get("baseline") == "greedy")
        if shares_starts and not self.on_envpool:
            # Those of a SubprocVecEnv are out of reach once they are made
            return kwargs, lambda env: SharedStarts(env_wrapper(env) if env_wrapper else env), callbacks, vec_env_wrapper
        return kwargs, env_wrapper, callbacks, vec_env_wrapper

    def objective(self, trial: optuna.Trial) -> float:
        """
        Try sampled hyperparameters, and prune the trial if they do not go with the given ones.

        :param trial: Trial of a search
        :return: Its score
        """
        trial.set_user_attr("policy", str(self._hyperparams["policy"]))
        try:
            return super().objective(trial)
        except ValueError as error:
            print(error)
            raise optuna.TrialPruned from error

    # === Environments ===

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Create environments, as RL Zoo does.

        :param n_envs: Number of environments
        :param eval_env: Whether the environments are for evaluation
        :param no_log: Whether to write no monitor files
        :return: The environments
        """
        manager = self if eval_env or not self.on_envpool else self._with_envpool(no_log)
        create = super(ExperimentManager, manager).create_envs
        if self.resume is None and self.save_freq <= 0 and processes.world_size() == 1:
            return create(n_envs, eval_env, no_log)
        start_index = processes.rank() * n_envs
        with upstream.vec_env_options(start_index, appends=self.resume is not None), ignoring_interrupts():
            return create(n_envs, eval_env, no_log)

    def _with_envpool(self, no_log: bool) -> "ExperimentManager":
        """
        Make a manager that creates EnvPool's environments: a copy, as a search can create others in another thread.

        :param no_log: Whether to write no monitor file
        :return: The copy
        """
        manager = copy(self)
        manager.vec_env_class = self._make_envpool  # type: ignore[assignment]
        manager.vec_env_kwargs = {"filename": None if no_log else f"{self.save_path}/{processes.rank()}"}
        return manager

    def _make_envpool(self, env_fns: list[Any], filename: str | None = None) -> VecEnv:
        """
        Make EnvPool's environments, in the place of ``DummyVecEnv``.

        :param env_fns: One per environment: only their number is used
        :param filename: Where to write the records of the episodes, without ``.monitor.csv``
        :return: The environments to train on
        """
        kwargs = {**self.env_kwargs, **self.monitor_kwargs}
        return EnvPoolVecEnv(self.env_name.gym_id, len(env_fns), filename=filename, **kwargs)

    # === Training ===

    def create_callbacks(self) -> None:
        """Create RL Zoo's callbacks, in process 0, and the one that saves the training state, in all processes."""
        save_freq = self.save_freq
        # SB3 counts steps of the vectorized environment
        self.save_freq, self.eval_freq = (
            max(freq // processes.world_size(), 1) if freq > 0 else freq for freq in (self.save_freq, self.eval_freq)
        )
        if processes.rank() > 0:
            self.eval_freq = -1
        super().create_callbacks()
        if self.algo == "reinforce" and save_freq > 0 and self.on_envpool:
            print("No training states are saved: the random generators of EnvPool's environments are out of reach")
        elif self.algo == "reinforce" and save_freq > 0 and not self.optimize_hyperparameters:
            self.callbacks.append(TrainingStateCallback(save_freq, self.save_path, verbose=self.verbose))
        if processes.rank() > 0:  # The others are called in process 0
            self.callbacks = [callback for callback in self.callbacks if isinstance(callback, TrainingStateCallback)]

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.resume is None:
            return super()._load_pretrained_agent(hyperparams, env)
        for index, start in enumerate(self.monitor_starts):  # The times in the files go on
            env.env_method("set_wrapper_attr", "t_start", start, indices=index)
        model = REINFORCE.resume(self.save_path, env=env, device=self.device)
        print(f"Going on with {self.save_path} from time step {model.num_timesteps} of {self.n_timesteps}")
        if has_ended(Path(self.save_path, f"{self.env_name}.zip")):
            print("The run has ended: its steps since the last training state are made again, and end with the same model")
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train the model, and exit if a signal has stopped training: with 128 and the number of the signal, as shells do.

        :param model: The model
        """
        with warnings.catch_warnings():
            if self.on_envpool:
                warnings.filterwarnings("ignore", "Training and eval env are not of the same type", UserWarning)
            with stopping_at_an_update(self.callbacks) as received:
                super().learn(model)
        number = int(processes.all_max(received[0] if received else 0))  # The signal of one process stops all
        if number and model.num_timesteps < self.n_timesteps:
            self.save_trained_model(model)
            print(f"Stopped by a signal: --resume {self.save_path} goes on from the last training state")
            sys.exit(128 + number)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.resume is None and processes.rank() == 0:
            super()._save_config(saved_hyperparams)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model, in process 0.

        :param model: The model
        """
        if processes.rank() == 0:
            super().save_trained_model(model)
