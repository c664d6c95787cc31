"""
Do one run of a comparison, in a process of its own: an ordinary run of RL Zoo, then the evaluation of its last policy.

    python -m sb3_reinforce.compare.job FOLDER

``FOLDER`` holds ``job.json``, the run. ``result.json`` is written there last: a run without one has not finished.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch as th
from rl_zoo3 import exp_manager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_reinforce.checks import versions
from sb3_reinforce.compare.files import EPISODES, JOB, KINDS, PROGRESS, RESULT, read_json, write_json
from sb3_reinforce.compare.references import N_EVAL_ENVS, eval_seed
from sb3_reinforce.masks import of_environment
from sb3_reinforce.zoo.exp_manager import ExperimentManager
from sb3_reinforce.zoo.train import train

#: Seconds between two reports of the progress
REPORT_EVERY = 1.0

#: Episodes that the reported score is the mean of
SCORE_WINDOW = 100


def counted_envs(model: BaseAlgorithm, n_envs: int) -> Iterable[int]:
    """
    List the environments whose episodes an algorithm learns from.

    :param model: The algorithm
    :param n_envs: Number of environments
    :return: Their indices. For REINFORCE, environments that have met their quota are left out: while the others go on,
        the short ones of their surplus episodes would be over-represented
    """
    quota = getattr(model, "quota", None)
    return range(n_envs) if quota is None else quota.owing


class TimedEvalCallback(EvalCallback):
    """Adds up the time that evaluations take, which is no time of training."""

    seconds = 0.0

    def _on_step(self) -> bool:
        start = time.perf_counter()
        go_on = super()._on_step()
        TimedEvalCallback.seconds += time.perf_counter() - start
        return go_on


class Recorder(BaseCallback):
    """
    Records each episode and reports the progress.

    :param folder: Folder of the run
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.start = self.reported = time.perf_counter()
        #: Time steps and seconds of training at its end, return, length in steps
        self.episodes: list[tuple[int, float, float, int]] = []

    @property
    def seconds(self) -> float:
        """Count the seconds of training until now."""
        return time.perf_counter() - self.start - TimedEvalCallback.seconds

    def _on_training_start(self) -> None:
        self.start = self.reported = time.perf_counter()

    def _on_step(self) -> bool:
        dones = self.locals.get("dones")
        if dones is not None and np.count_nonzero(dones):
            for env_idx in counted_envs(self.model, len(dones)):
                record = self.locals["infos"][env_idx].get("episode") if dones[env_idx] else None
                if record:  # Not where a wrapper ends an episode at a lost life
                    self.episodes.append((self.num_timesteps, self.seconds, float(record["r"]), int(record["l"])))
        if time.perf_counter() - self.reported > REPORT_EVERY:
            self.reported = time.perf_counter()
            scores = [episode[2] for episode in self.episodes[-SCORE_WINDOW:]]
            progress = {"num_timesteps": self.num_timesteps, "seconds": self.seconds}
            write_json(self.folder / PROGRESS, {**progress, "score": float(np.mean(scores)) if scores else None})
        return True

    def _on_training_end(self) -> None:
        self.training_seconds = self.seconds


class RunManager(ExperimentManager):
    """
    Works in the folder of the run, records its episodes, and evaluates the last policy.
    """

    folder: ClassVar[Path]
    job: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.save_path = str(self.folder)
        self.params_path = f"{self.save_path}/{self.env_name}"

    def create_callbacks(self) -> None:
        with mock.patch.object(exp_manager, "EvalCallback", TimedEvalCallback):
            super().create_callbacks()
        self.recorder = Recorder(self.folder)
        self.callbacks.append(self.recorder)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        super()._save_config(saved_hyperparams)
        command = shlex.join(["sb3-reinforce", "train", *self.job["arguments"]])
        Path(self.params_path, "command.txt").write_text(command + "\n")

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        super().save_trained_model(model)
        rows = [f"{steps},{seconds:.4f},{r:.7g},{length}\n" for steps, seconds, r, length in self.recorder.episodes]
        (self.folder / EPISODES).write_text("num_timesteps,seconds,return,length\n" + "".join(rows))
        result: dict[str, Any] = {"num_timesteps": model.num_timesteps, "seconds": self.recorder.training_seconds}
        env = self.create_envs(min(self.job["n_eval_episodes"], N_EVAL_ENVS), eval_env=True)
        sync_envs_normalization(model.env, env)  # type: ignore[arg-type]
        if getattr(model, "use_sde", False):  # One noise for each environment, not that of training for all
            model.policy.reset_noise(env.num_envs)  # type: ignore[operator]
        evaluated = of_environment(model, env)
        for kind in KINDS:
            env.seed(eval_seed(self.job["seed"]))
            result[kind], _ = evaluate_policy(
                evaluated, env, self.job["n_eval_episodes"], kind == "deterministic", return_episode_rewards=True
            )
            if not np.isfinite(result[kind]).all():
                raise ValueError(f"The {kind} evaluation of the last policy has a return that is not finite")
        env.close()
        write_json(self.folder / RESULT, {**result, "versions": versions()})


def exit_with_parent() -> None:
    """End this process when the one that started it, which holds the other end of standard input, is gone."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Do the run of a folder."""
    # RL Zoo takes Ctrl-C for the end of training
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exit_with_parent()
    RunManager.folder = Path(sys.argv[1])
    RunManager.job = read_json(RunManager.folder / JOB)
    for module in RunManager.job["gym_packages"]:
        import_module(module)
    th.set_num_threads(1)
    train(RunManager.job["arguments"], RunManager)


if __name__ == "__main__":
    main()
