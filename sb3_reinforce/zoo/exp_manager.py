import inspect
import json
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import yaml
from rl_zoo3 import exp_manager
from rl_zoo3.utils import ALGOS, linear_schedule
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce import distributed
from sb3_reinforce.checkpoint import TrainingStateCallback, check_number_of_processes, load_latest, lock
from sb3_reinforce.checks import check_number, closest
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.vec_env.envpool import EnvPoolVecEnv
from sb3_reinforce.zoo.hyperparams import FOLDER, read_hyperparams
from sb3_reinforce.zoo.hyperparams_opt import target_kl_schedule

#: What an entry can hold besides the arguments of the algorithm
ZOO_KEYS = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
}

#: Arguments of the algorithm that have an option of the command line, or none
NOT_IN_AN_ENTRY = {"_init_setup_model", "device", "env", "seed", "tensorboard_log", "verbose"}

#: Where RL Zoo takes ``lin_0.1``
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "delta_std")

#: Those of REINFORCE that RL Zoo does not know
REINFORCE_SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "target_kl": target_kl_schedule,
    "value_learning_rate": linear_schedule,
}


def check_keys(given: Collection[str], allowed: Collection[str], what: str) -> None:
    """
    :param given: Keys to check
    :param allowed: Keys that can be
    :param what: What the keys are, for the message
    :raises ValueError: If a key is not allowed; names the closest one that is
    """
    for key in sorted(given, key=str):
        if key not in allowed:
            raise ValueError(f"{key!r} is not {what}, did you mean {closest(str(key), sorted(allowed))!r}?")


def make_vec_env_of_run(env_id: Any, n_envs: int = 1, *, appends: bool, **kwargs: Any) -> VecEnv:
    """
    :param appends: Whether to go on with the monitor files that are there
    :return: As SB3's ``make_vec_env``; several processes have monitor files of their own
    """
    if appends:
        kwargs["monitor_kwargs"] = {**(kwargs.get("monitor_kwargs") or {}), "override_existing": False}
    return make_vec_env(env_id, n_envs, start_index=distributed.rank() * n_envs, **kwargs)


def is_before(row: str, column: int, seconds: float) -> bool:
    """
    :param row: Row of a monitor file
    :param column: Where its time is
    :param seconds: A time
    :return: Whether the row is complete, and from before that time
    """
    try:
        return float(row.split(",")[column]) <= seconds
    except (IndexError, ValueError):  # A full disk, or a machine that was switched off, has torn it
        return False


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """
    Processes that are started meanwhile ignore Ctrl-C, which reaches all processes of a terminal: those of environments are
    needed to complete an update, and end with the one that has started them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopping_at_an_update(callbacks: Sequence[BaseCallback]) -> Iterator[list[int]]:
    """
    Let SIGTERM and Ctrl-C stop training when the running update is complete and its training state saved, if there is a
    callback that saves it. The second signal has its usual effect.

    :param callbacks: Callbacks of the training
    :return: The signals that have been received
    """
    received: list[int] = []
    savers = [callback for callback in callbacks if isinstance(callback, TrainingStateCallback)]
    if not savers:
        yield received
        return

    def stop(number: int, frame: Any) -> None:
        print("Stopping when this update is complete", flush=True)
        received.append(number)
        for saver in savers:
            saver.is_to_stop = True
        restore_handlers()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield received
    finally:
        restore_handlers()


class ExperimentManager(exp_manager.ExperimentManager):
    """
    RL Zoo's experiment manager, with five differences: it finds the hyperparameters that come with this package, it
    checks them before an environment is created, it can train on EnvPool's environments, with ``--save-freq`` it saves
    the training state of REINFORCE, from which ``--resume`` goes on, and under ``torchrun`` several processes share one run.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.on_envpool = kwargs.get("vec_env_type") == "envpool"
        if self.on_envpool:
            kwargs["vec_env_type"] = "dummy"  # Of the environments for evaluation
        super().__init__(*args, **kwargs)
        if distributed.world_size() > 1 and (self.algo != "reinforce" or self.optimize_hyperparameters):
            raise ValueError("torchrun is for training reinforce: searches are spread by --storage, see the README")
        self.save_path = distributed.on_first(lambda: self.save_path)
        self.params_path = f"{self.save_path}/{self.env_name}"
        env_id = self.env_name.gym_id
        if kwargs.get("config") is None and (self.algo == "reinforce" or env_id in read_hyperparams(self.algo)):
            self.config = str(FOLDER / f"{self.algo}.yml")
            if self.algo != "reinforce":
                print(f"{env_id} has no entry of its own in RL Zoo: its tuned settings for an earlier version are used")
        if self.trial_id is not None:
            self._load_trial_zero()
        self.resume = getattr(self.args, "resume", None)
        if self.resume:
            if self.on_envpool:
                raise ValueError("--resume: the random generators of EnvPool's environments are out of reach")
            self.save_path = self.resume
            self.params_path = f"{self.save_path}/{self.env_name}"
            self.continue_training = True
            distributed.on_first(self._claim)
            self._cut_monitor_files()

    def _claim(self) -> None:
        self.lock = lock(Path(self.save_path))

    def _cut_monitor_files(self) -> None:
        """Leave out the episodes that ended after the training state was saved: they come again."""
        state, _ = load_latest(Path(self.save_path))
        self.monitor_starts = []
        check_number_of_processes(state)
        own_state = state["processes"][distributed.rank()]
        n_envs = own_state["env"]["n_envs"]
        for index in range(n_envs):
            path = Path(self.save_path, f"{distributed.rank() * n_envs + index}.monitor.csv")
            header, names, *rows = path.read_text().splitlines()
            start = json.loads(header[1:])["t_start"]
            column = names.split(",").index("t")
            rows = [row for row in rows if is_before(row, column, own_state["time"] - start)]
            beside = path.with_suffix(".part")
            beside.write_text("\n".join([header, names, *rows, ""]))
            beside.replace(path)
            self.monitor_starts.append(start)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if not self.resume and distributed.rank() == 0:  # There it is
            super()._save_config(saved_hyperparams)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        if distributed.rank() == 0:
            super().save_trained_model(model)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if not self.resume:
            return super()._load_pretrained_agent(hyperparams, env)
        for index, start in enumerate(self.monitor_starts):  # The times in the files go on
            env.env_method("set_wrapper_attr", "t_start", start, indices=index)
        return REINFORCE.resume(self.save_path, env=env, device=self.device)

    def create_callbacks(self) -> None:
        save_freq = self.save_freq
        # SB3 counts steps of the vectorized environment
        self.save_freq, self.eval_freq = (
            max(freq // distributed.world_size(), 1) if freq > 0 else freq for freq in (self.save_freq, self.eval_freq)
        )
        if distributed.rank() > 0:
            self.eval_freq = -1
        super().create_callbacks()
        if self.algo == "reinforce" and save_freq > 0 and self.on_envpool:
            print("No training states are saved: the random generators of EnvPool's environments are out of reach")
        elif self.algo == "reinforce" and save_freq > 0 and not self.optimize_hyperparameters:
            self.callbacks.append(TrainingStateCallback(save_freq, self.save_path, verbose=self.verbose))
        if distributed.rank() > 0:  # The others are called in process 0
            self.callbacks = [callback for callback in self.callbacks if isinstance(callback, TrainingStateCallback)]

    def _load_trial_zero(self) -> None:
        """
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
        if self.trial_id == 0:  # RL Zoo takes it for none
            self.custom_hyperparams = {**hyperparams, **(self.custom_hyperparams or {})}

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.resume:
            saved = yaml.load(Path(self.params_path, "config.yml").read_text(), Loader=yaml.UnsafeLoader)
            return dict(saved), saved
        try:
            return super().read_hyperparameters()
        except (AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError, yaml.YAMLError) as error:
            if error.args == ("atari",):  # RL Zoo's entry for all its games
                raise ValueError(f"{self.config} has no entry 'atari', which {self.env_name.gym_id} needs") from error
            raise ValueError(
                f"--conf-file {self.config} must be a .yml file, or a .py file or module with a dictionary "
                f"'hyperparams', of one dictionary per environment ({error!r})"
            ) from error

    def objective(self, trial: optuna.Trial) -> float:
        try:
            return super().objective(trial)
        except ValueError as error:  # What was sampled does not go with what was given
            print(error)
            raise optuna.TrialPruned from error

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        arguments = inspect.signature(ALGOS[self.algo]).parameters.keys() - NOT_IN_AN_ENTRY
        check_keys(hyperparams, arguments | ZOO_KEYS, f"a hyperparameter of {self.algo}")
        for key in ("policy", "n_timesteps"):
            if key not in hyperparams:
                raise ValueError(f"{key!r} is missing from the hyperparameters of {self.env_name.gym_id} in {self.config}")
        known = [*SCHEDULES, *(REINFORCE_SCHEDULES if self.algo == "reinforce" else ())]
        for key, value in hyperparams.items():
            if isinstance(value, str) and (key in known or value.startswith("lin_")):
                if key not in known:
                    raise ValueError(f"{key}={value!r} must be a number: it takes no schedule, as {', '.join(known)} do")
                if not re.fullmatch(r"lin_[0-9.]+(e[+-]?[0-9]+)?", value):
                    raise ValueError(f"{key}={value!r} must be a number, or 'lin_' and the number where it starts to fall")
                if key in REINFORCE_SCHEDULES:
                    hyperparams[key] = REINFORCE_SCHEDULES[key](float(value.removeprefix("lin_")))
        check_number("n_envs", hyperparams.get("n_envs", 1), 1, integer=True)
        try:
            preprocessed = super()._preprocess_hyperparams(hyperparams)
        except (AttributeError, ImportError, NameError, SyntaxError) as error:
            raise ValueError(f"A hyperparameter of {self.env_name.gym_id} cannot be evaluated: {error}") from error
        if self._eval_env_kwargs_args is None:  # Those of the entry as well
            self.eval_env_kwargs = self.env_kwargs
        if self.algo == "reinforce":
            self._check_reinforce(preprocessed[0])
        if self.on_envpool:
            if preprocessed[1] is not None:
                raise ValueError("env_wrapper wraps Gymnasium's environments: it cannot be used with --vec-env envpool")
            self._make_envpool([None])  # Checks its arguments
        return preprocessed

    def _make_envpool(self, env_fns: list[Any], filename: str | None = None) -> VecEnv:
        """
        Takes the place of ``DummyVecEnv``.

        :param env_fns: One per environment: only their number is used
        :param filename: Where to write the records of the episodes, without ``.monitor.csv``
        :return: The environments to train on
        """
        kwargs = {**self.env_kwargs, **self.monitor_kwargs}
        return EnvPoolVecEnv(self.env_name.gym_id, len(env_fns), filename=filename, **kwargs)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        if self.resume or self.save_freq > 0 or distributed.world_size() > 1:
            make = partial(make_vec_env_of_run, appends=bool(self.resume))
            with mock.patch.object(exp_manager, "make_vec_env", make), ignoring_interrupts():
                return self._create_envs(n_envs, eval_env, no_log)
        return self._create_envs(n_envs, eval_env, no_log)

    def _create_envs(self, n_envs: int, eval_env: bool, no_log: bool) -> VecEnv:
        if not self.on_envpool or eval_env:
            return super().create_envs(n_envs, eval_env, no_log)
        manager = copy(self)  # A search in several threads creates the others at the same time
        manager.vec_env_class = self._make_envpool  # type: ignore[assignment]
        manager.vec_env_kwargs = {"filename": None if no_log else f"{self.save_path}/{distributed.rank()}"}
        return super(ExperimentManager, manager).create_envs(n_envs, eval_env, no_log)

    def learn(self, model: BaseAlgorithm) -> None:
        with warnings.catch_warnings():
            if self.on_envpool:
                warnings.filterwarnings("ignore", "Training and eval env are not of the same type", UserWarning)
            with stopping_at_an_update(self.callbacks) as received:
                super().learn(model)
        number = int(distributed.all_max(received[0] if received else 0))  # The signal of one process stops all
        if number and model.num_timesteps < self.n_timesteps:
            self.save_trained_model(model)
            print(f"Stopped by a signal: --resume {self.save_path} goes on from the last training state")
            sys.exit(128 + number)

    @staticmethod
    def _check_reinforce(hyperparams: dict[str, Any]) -> None:
        model = REINFORCE(env=None, _init_setup_model=False, **hyperparams)  # type: ignore[arg-type]
        model._check_arguments()
        # A policy hands on to its base what it does not take itself
        allowed = {name for policy in model.policy_class.__mro__ for name in inspect.signature(policy).parameters}
        check_keys(model.policy_kwargs, allowed, f"an argument of {model.policy_class.__name__}")
