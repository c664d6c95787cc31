"""The files of a comparison. Imports nothing heavy."""

import json
import os
import platform
from pathlib import Path
from typing import Any

#: Packages whose versions are recorded
PACKAGES = ("sb3-reinforce", "stable-baselines3", "sb3_contrib", "rl_zoo3", "torch", "gymnasium", "mujoco", "numpy")

#: What a comparison is, in its folder
COMPARISON = "comparison.json"

#: Every episode of a run: time steps and seconds of training at its end, return, length in steps
EPISODES = "episodes.csv"

JOB = "job.json"
RESULT = "result.json"
FAILURE = "failure.json"
PROGRESS = "progress.json"


def write_json(path: Path, content: Any) -> None:
    """
    Write a file that is there as a whole or not at all.

    :param path: Its path
    :param content: Its content
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    """
    :param path: Path of a file
    :return: Its content, ``None`` if there is no such file
    """
    return json.loads(path.read_text()) if path.is_file() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """
    Write what came out of a run, with the versions that made it.

    :param folder: Folder of the run
    :param result: What came out
    """
    from sb3_reinforce.checkpoint import versions  # Here as it is heavy

    write_json(folder / RESULT, {**result, "versions": {"python": platform.python_version(), **versions(PACKAGES)}})


def make_jobs(out: Path, comparison: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """
    :param out: Folder of a comparison
    :param comparison: What is compared
    :return: The folder of each run, and what it runs
    """
    jobs = {}
    trained = next(settings for settings in comparison["contenders"].values() if settings["algo"] is not None)
    # The same for all of them
    env_kwargs = {env_id: entry.get("env_kwargs") for env_id, entry in trained["hyperparams"].items()}
    common = {key: comparison[key] for key in ("n_eval_episodes", "gym_packages")}
    for contender, settings in comparison["contenders"].items():
        algo = settings["algo"]
        for env_id in comparison["envs"]:
            for index, seed in enumerate(comparison["seeds"], start=1):
                # RL Zoo numbers the runs in a log folder
                folder = out / "runs" / contender / (algo or contender) / f"{env_id.replace('/', '-')}_{index}"
                job = {"contender": contender, "algo": algo, "env": env_id, "seed": seed, **common}
                if algo is None:
                    job["env_kwargs"] = env_kwargs[env_id]
                else:
                    job["n_timesteps"] = settings["hyperparams"][env_id]["n_timesteps"]
                    pairs = {
                        "--algo": algo,
                        "--env": env_id,
                        "--seed": seed,
                        "--conf-file": out / "configs" / f"{contender}.yml",
                        "-tb": folder / "tensorboard",
                        "--eval-freq": comparison["eval_freq"],
                        "--eval-episodes": comparison["n_eval_episodes"],
                        "--vec-env": comparison["vec_env"],
                        "--num-threads": 1,
                        "--verbose": 0,
                    }
                    job["arguments"] = [str(part) for pair in pairs.items() for part in pair]
                    if common["gym_packages"]:
                        job["arguments"] += ["--gym-packages", *common["gym_packages"]]
                jobs[folder] = job
    return jobs
