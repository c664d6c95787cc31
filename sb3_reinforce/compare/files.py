"""The files of a comparison and of its runs. Imports nothing heavy."""

import json
import os
from pathlib import Path
from typing import Any

#: What is compared, and the versions of the packages that the finished runs have used
COMPARISON = "comparison.json"

#: The training and evaluation episodes of all finished runs. With :data:`COMPARISON`, all that a report is made of
ARCHIVE = "episodes.csv.xz"

#: Folder of the runs: logs, models, and the episodes of the runs that are not in the archive yet
RUNS = "runs"

#: Training episodes of a run: time steps and seconds of training at its end, return, length in steps
EPISODES = "episodes.csv"

JOB = "job.json"
RESULT = "result.json"
FAILURE = "failure.json"
PROGRESS = "progress.json"

#: Hyperparameters of the environment, which those that learn and the references have in common
OF_ENVIRONMENT = ("env_kwargs", "env_wrapper")

#: Kinds of evaluation: with the most likely actions, and with sampled ones
KINDS = ("deterministic", "stochastic")


def path_beside(path: Path) -> Path:
    """
    Name a temporary file that is to replace another file, in the same folder and no other process's.

    :param path: Path of the file that will be replaced
    :return: Path of the temporary file
    """
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_json(path: Path, content: Any) -> None:
    """
    Write a JSON file atomically: as a temporary file that replaces the old one.

    :param path: Path of the file
    :param content: Content of the file
    """
    beside = path_beside(path)
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    """
    Read a JSON file.

    :param path: Path of the file
    :return: Content of the file, ``None`` if there is no such file
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def hyperparams_path(out: Path, contender: str) -> Path:
    """
    Name the file of hyperparameters that the runs of a contender read.

    :param out: Folder of a comparison
    :param contender: Name of a contender
    :return: Path of the file
    """
    return out / RUNS / contender / "hyperparams.yml"


def train_arguments(out: Path, comparison: dict[str, Any], job: dict[str, Any], folder: Path) -> list[str]:
    """
    Write the arguments of ``sb3-reinforce train`` that a run is.

    :param out: Folder of a comparison
    :param comparison: What is compared
    :param job: The run
    :param folder: Folder of the run
    :return: The arguments
    """
    pairs = {
        "--algo": job["algo"],
        "--env": job["env"],
        "--seed": job["seed"],
        "--conf-file": hyperparams_path(out, job["contender"]),
        "-tb": folder / "tensorboard",
        "--eval-freq": comparison["eval_freq"],
        "--eval-episodes": comparison["n_eval_episodes"],
        "--vec-env": comparison["vec_env"],
        "--num-threads": 1,
        "--verbose": 0,
    }
    arguments = [str(part) for pair in pairs.items() for part in pair]
    return [*arguments, "--gym-packages", *job["gym_packages"]] if job["gym_packages"] else arguments


def make_jobs(out: Path, comparison: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """
    List the runs of a comparison.

    :param out: Folder of a comparison
    :param comparison: What is compared
    :return: By the folder of a run: the run
    """
    jobs = {}
    trained = next(settings for settings in comparison["contenders"].values() if settings["algo"] is not None)
    common = {key: comparison[key] for key in ("n_eval_episodes", "gym_packages")}
    for contender, settings in comparison["contenders"].items():
        algo = settings["algo"]
        for env_id in comparison["envs"]:
            for index, seed in enumerate(comparison["seeds"], start=1):
                # RL Zoo numbers the runs in a log folder
                folder = out / RUNS / contender / (algo or contender) / f"{env_id.replace('/', '-')}_{index}"
                job = {"contender": contender, "algo": algo, "env": env_id, "seed": seed, **common}
                if algo is None:
                    job["settings"] = {key: trained["hyperparams"][env_id].get(key) for key in OF_ENVIRONMENT}
                else:
                    job["n_timesteps"] = settings["hyperparams"][env_id]["n_timesteps"]
                    job["arguments"] = train_arguments(out, comparison, job, folder)
                jobs[folder] = job
    return jobs
