"""Run a comparison: each run in a process of its own, several at a time, here or on the workers of a cluster."""

import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from socket import create_connection
from typing import Any
from uuid import uuid4

import gymnasium as gym
import joblib
import numpy as np
import yaml
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.live import Live
from rich.table import Table

from sb3_reinforce.checks import check_number
from sb3_reinforce.compare.contenders import check_env, parse_contender, resolve
from sb3_reinforce.compare.files import (
    COMPARISON,
    FAILURE,
    JOB,
    PROGRESS,
    RESULT,
    make_jobs,
    read_json,
    write_json,
    write_result,
)
from sb3_reinforce.compare.references import REFERENCES, evaluate_reference
from sb3_reinforce.compare.report import write_report
from sb3_reinforce.zoo import register

#: Seconds to wait for the scheduler of a cluster
CONNECT_TIMEOUT = 20

#: Seconds that a worker may take to import what runs a job
IMPORT_TIMEOUT = 120

#: States of a run, in the order of the table
ORDER = ("running", "failed", "waiting", "done")

#: Seconds between two looks at whether a run is still wanted
POLL_EVERY = 0.5

BACKENDS = ("loky", "dask", "ray")

#: What must be the same to go on with a comparison. Seeds can be added
IDENTITY = ("envs", "contenders", "seeds", "eval_freq", "n_eval_episodes", "thresholds", "gym_packages", "vec_env")


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """
    :param process: A process
    :param seconds: How long to wait for it
    :return: Its exit status, ``None`` if it has not ended by then
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def run_job(folder: Path, job: dict[str, Any]) -> None:
    """
    Run one run, and leave its result or its failure in its folder.

    :param folder: Folder of the run. What is there of an earlier attempt is removed
    :param job: What to run
    """
    root = folder.parents[3]
    if not (root / COMPARISON).is_file():
        raise ValueError(f"{root} must be a folder that all machines share")
    if (folder / RESULT).is_file():  # The worker was lost only after that
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    job = {**job, "worker": f"{platform.node()}:{os.getpid()}", "token": uuid4().hex}
    write_json(folder / JOB, job)
    if job["algo"] is None:
        try:
            for module in job["gym_packages"]:
                import_module(module)
            scores = evaluate_reference(job["contender"], job["env"], job["seed"], job["n_eval_episodes"], job["env_kwargs"])
            write_result(folder, {REFERENCES[job["contender"]]: scores})
        except Exception as error:
            (folder / "log.txt").write_text(traceback.format_exc())
            write_json(folder / FAILURE, {"error": repr(error)})
        return

    log = folder / "log.txt"
    command = [sys.executable, "-m", "sb3_reinforce.compare.job", str(folder)]
    # Unbuffered, so that an error comes last in the log
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # The run ends when the other end of its standard input is closed, so that it does not outlive this process; a session
    # of its own keeps Ctrl-C from it
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            while (status := wait(process, POLL_EVERY)) is None:
                # Another comparison has taken the run over, or this one was interrupted
                if (read_json(folder / JOB) or {}).get("token") != job["token"]:
                    return
        finally:
            process.kill()
            process.wait()
    if not (folder / RESULT).is_file():
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = f"killed by signal {-status}" if status < 0 else lines[-1] if lines else f"exit status {status}"
        write_json(folder / FAILURE, {"error": reason})


def status_of(folder: Path) -> str:
    """
    :param folder: Folder of a run
    :return: ``"done"``, ``"failed"``, ``"running"`` or ``"waiting"``
    """
    for name, status in ((RESULT, "done"), (FAILURE, "failed"), (JOB, "running")):
        if (folder / name).is_file():
            return status
    return "waiting"


def status_table(jobs: dict[Path, dict[str, Any]]) -> Table:
    """
    :param jobs: Folders of all runs, and what they run
    :return: How many runs are in which state, and each run: those that are running first
    """
    statuses = {folder: status_of(folder) for folder in jobs}
    counts = Counter(statuses.values())
    n_envs = len({job["env"] for job in jobs.values()})
    table = Table(title=", ".join(f"{counts[status]} {status}" for status in ORDER))
    table.add_column("run", no_wrap=True)
    for column, width in (("seed", 4), ("status", 7), ("steps", 9), ("score", 8), ("steps/s", 7), ("time left", 9)):
        table.add_column(column, justify="left" if column == "status" else "right", min_width=width, no_wrap=True)
    for folder in sorted(jobs, key=lambda folder: ORDER.index(statuses[folder])):
        job, status = jobs[folder], statuses[folder]
        state = read_json(folder / {"running": PROGRESS, "done": RESULT}[status]) if status in ("running", "done") else None
        steps = speed = left = score = ""
        if state and "num_timesteps" in state:
            steps, per_second = f"{state['num_timesteps']:,}", state["num_timesteps"] / state["seconds"]
            speed = f"{per_second:,.0f}"
            if status == "running":
                left = str(timedelta(seconds=max(0, round((job["n_timesteps"] - state["num_timesteps"]) / per_second))))
        if state:
            # The mean of the last training episodes, then of those of the evaluation
            scores = state.get("score", state.get("deterministic", state.get("stochastic")))
            score = "" if scores is None else f"{np.mean(scores):,.1f}"
        name = job["contender"] if n_envs == 1 else f"{job['contender']} {job['env']}"
        table.add_row(name, str(job["seed"]), status, steps, score, speed, left)
    return table


@contextmanager
def workers(backend: str, address: str | None, n_jobs: int) -> Iterator[joblib.Parallel]:
    """
    :param backend: ``"loky"`` for processes here, ``"dask"`` or ``"ray"`` for an existing cluster
    :param address: Address of the scheduler of the cluster
    :param n_jobs: Number of runs at a time here; a cluster runs as many as it has threads
    :return: What runs jobs
    :raises ValueError: If there is nothing at the address
    :raises ImportError: If the package of the cluster is not installed
    """
    if backend == "loky":
        yield joblib.Parallel(n_jobs, backend=backend, batch_size=1)
        return
    try:
        cluster = import_module({"dask": "distributed", "ray": "ray"}[backend])
    except ImportError as error:
        raise ImportError(f'--backend {backend} needs a package more: pip install "sb3-reinforce[{backend}]"') from error
    try:
        if backend == "dask":
            client = cluster.Client(address, timeout=CONNECT_TIMEOUT)
        else:
            host, _, port = str(address).removeprefix("ray://").rpartition(":")
            create_connection((host, int(port)), CONNECT_TIMEOUT).close()  # Ray itself waits for longer
            client = cluster.init(address)
            import_module("ray.util.joblib").register_ray()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"no {backend} cluster answers at --address {address}: {error}") from error
    try:
        if backend == "dask":
            try:
                client.submit(status_of, Path(), pure=False).result(IMPORT_TIMEOUT)
            except (ImportError, AttributeError, TimeoutError) as error:
                raise ValueError(f"no worker at {address} can import this package: {error}") from error
        with joblib.parallel_config(backend=backend):
            yield joblib.Parallel(n_jobs=-1, batch_size=1)
    finally:
        client.close() if backend == "dask" else cluster.shutdown()


def describe(
    envs: Sequence[str],
    algos: Sequence[str],
    seeds: Sequence[int],
    n_timesteps: int,
    eval_freq: int,
    n_eval_episodes: int,
    thresholds: Sequence[float] | None,
    gym_packages: Sequence[str],
    vec_env: str,
) -> dict[str, Any]:
    """
    Check what is asked for. Parameters as in :func:`compare`.

    :return: What is compared, with all hyperparameters
    :raises ValueError: If it cannot be run
    """
    register()
    for module in gym_packages:
        import_module(module)
    for name, values in (("env", envs), ("algos", algos), ("seeds", seeds)):
        duplicates = [value for value, count in Counter(values).items() if count > 1]
        if duplicates or not values:
            raise ValueError(f"--{name}: {duplicates[0]!r} is given twice" if duplicates else f"--{name} is empty")
    for seed in seeds:
        check_number("seeds", seed, 0, 2**31 - 1, integer=True)
    check_number("eval_freq", eval_freq, -1, integer=True)
    check_number("n_eval_episodes", n_eval_episodes, 1, integer=True)
    for env_id in envs:
        check_env(env_id)
    if thresholds is not None and len(thresholds) not in (1, len(envs)):
        raise ValueError(f"--thresholds: {len(thresholds)} are given, it must be one, or one per environment")
    contenders = [parse_contender(text) for text in algos]
    names = [contender.name for contender in contenders]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"--algos: the name {name!r} is given twice")
    described: dict[str, Any] = {}
    for contender in contenders:
        hyperparams = {env_id: resolve(contender, env_id, n_timesteps, vec_env) for env_id in envs}
        described[contender.name] = {"algo": contender.algo, "hyperparams": hyperparams}
    for env_id in envs:
        budgets = {entry["hyperparams"][env_id]["n_timesteps"] for entry in described.values()}
        if len(budgets) > 1:
            raise ValueError(f"{env_id}: the entries have different numbers of steps {sorted(budgets)}, choose one with -n")
        env_kwargs = [entry["hyperparams"][env_id].get("env_kwargs") or {} for entry in described.values()]
        if any(kwargs != env_kwargs[0] for kwargs in env_kwargs):
            raise ValueError(
                f"{env_id}: the contenders have different env_kwargs {env_kwargs}: their scores would not compare"
            )
    described["random"] = {"algo": None}
    if all(isinstance(gym.make(env_id).action_space, gym.spaces.Box) for env_id in envs):
        described["zero_action"] = {"algo": None}
    given: list[float | None] = (
        [gym.spec(env_id).reward_threshold for env_id in envs]
        if thresholds is None
        else [*thresholds] * (len(envs) if len(thresholds) == 1 else 1)
    )
    return {
        "envs": list(envs),
        "contenders": described,
        "seeds": list(seeds),
        "eval_freq": eval_freq,
        "n_eval_episodes": n_eval_episodes,
        "thresholds": dict(zip(envs, given, strict=True)),
        "gym_packages": list(gym_packages),
        "vec_env": vec_env,
    }


def find_difference(there: Any, asked: Any, name: str) -> str | None:
    """
    :param there: What is there
    :param asked: What is asked for
    :param name: Its name
    :return: The first value in which they differ, in words; ``None`` if they are the same
    """
    if isinstance(there, dict) and isinstance(asked, dict):
        if there.keys() != asked.keys():
            return f"{name} are {', '.join(there)}, not {', '.join(asked)}"
        differences = (find_difference(there[key], asked[key], f"{name}.{key}") for key in there)
        return next(filter(None, differences), None)
    return None if there == asked else f"{name} is {there}, not {asked}"


def open_folder(out: Path, comparison: dict[str, Any], resume: bool) -> None:
    """
    Make the folder of a comparison, or see to it that it holds the same one.

    :param out: The folder
    :param comparison: What is compared
    :param resume: Whether to go on with what the folder holds
    :raises ValueError: If it holds something else
    """
    there = read_json(out / COMPARISON)
    if there is None:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"--out {out} must be a folder that does not exist or is empty, or that of a comparison")
        try:
            for name in ("configs", "runs"):
                (out / name).mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be made: {error}") from error
        for name, settings in comparison["contenders"].items():
            if settings["algo"] is not None:
                (out / "configs" / f"{name}.yml").write_text(yaml.safe_dump(settings["hyperparams"]))
        write_json(out / COMPARISON, comparison)
        return
    if not resume:
        raise ValueError(f"--out {out} holds a comparison already: choose another folder, or go on with --resume")
    # As it looks after it was written and read
    seeds = there.get("seeds", [])
    asked = {**comparison, "seeds": comparison["seeds"][: len(seeds)]}
    for key in IDENTITY:
        if difference := find_difference(there.get(key), asked[key], key):
            raise ValueError(f"--out {out} holds another comparison: its {difference}")
    if not (out / "runs").is_dir():
        raise ValueError(f"--out {out} holds the report of a comparison without its runs: it cannot be gone on with")
    if seeds != comparison["seeds"]:
        write_json(out / COMPARISON, comparison)


def compare(
    envs: Sequence[str],
    algos: Sequence[str],
    seeds: Sequence[int],
    out: Path | str,
    n_timesteps: int = -1,
    eval_freq: int = 25_000,
    n_eval_episodes: int = 20,
    thresholds: Sequence[float] | None = None,
    n_jobs: int = 1,
    backend: str = "loky",
    address: str | None = None,
    resume: bool = False,
    gym_packages: Sequence[str] = (),
    vec_env: str = "dummy",
    command: str | None = None,
) -> bool:
    """
    Train each algorithm on each environment with each seed, evaluate the last policies, and write a report.

    :param envs: Ids of environments
    :param algos: Algorithms, ``ALGO`` or ``NAME=ALGO:key:value,key:value``, see
        :func:`~sb3_reinforce.compare.contenders.parse_contender`
    :param seeds: Seeds of the runs
    :param out: Folder to write to, the same on all machines
    :param n_timesteps: Number of time steps of a run, not positive: as the entries of the algorithms say
    :param eval_freq: Evaluate every so many time steps, -1: only at the end
    :param n_eval_episodes: Number of episodes of an evaluation
    :param thresholds: Return that a run is to reach, one for all environments or one for each; ``None``: Gymnasium's
        ``reward_threshold``, if there is one
    :param n_jobs: Number of runs at a time
    :param backend: ``"loky"`` (processes here), ``"dask"`` or ``"ray"`` (an existing cluster)
    :param address: Address of the cluster
    :param resume: Go on with the comparison in the folder: run what is missing or has failed, with further seeds if
        ``seeds`` goes on after its seeds
    :param gym_packages: Modules that register environments
    :param vec_env: Kind of the vectorized environments, as in ``sb3-reinforce train``
    :param command: The command that asked for this, for the report
    :return: Whether all runs are done
    :raises ValueError: If an argument cannot be, before anything is written
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    check_number("n_jobs", n_jobs, 1, integer=True)
    out = Path(out).resolve()
    comparison = describe(envs, algos, seeds, n_timesteps, eval_freq, n_eval_episodes, thresholds, gym_packages, vec_env)
    comparison["command"] = command
    with workers(backend, address, n_jobs) as parallel:
        open_folder(out, comparison, resume)
        jobs = make_jobs(out, comparison)
        # Seed by seed, so that an interrupted comparison has about as many runs of each contender
        by_seed = sorted(jobs.items(), key=lambda item: seeds.index(item[1]["seed"]))
        missing = {folder: job for folder, job in by_seed if status_of(folder) != "done"}
        for folder in missing:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            with Live(get_renderable=lambda: status_table(jobs), refresh_per_second=1):
                parallel(joblib.delayed(run_job)(folder, job) for folder, job in missing.items())
        except TerminatedWorkerError:
            print("A process that was to see to some of the runs was killed: --resume goes on with what is missing")
        finally:
            for folder in jobs:
                if status_of(folder) == "running":
                    (folder / JOB).unlink(missing_ok=True)  # Which ends it
            write_report(out)
    print(f"Report: {out / 'report.md'}")
    return all(status_of(folder) == "done" for folder in jobs)
