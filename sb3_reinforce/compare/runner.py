"""Run a comparison: each run in a process of its own, several at a time, here or on the workers of a cluster."""

import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from sb3_reinforce.checks import check_number, versions
from sb3_reinforce.compare.archive import pack, read_archive
from sb3_reinforce.compare.files import COMPARISON, FAILURE, JOB, RESULT, make_jobs, read_json, write_json
from sb3_reinforce.compare.plan import describe, open_folder
from sb3_reinforce.compare.progress import Progress, shown
from sb3_reinforce.compare.references import REFERENCES, evaluate_reference
from sb3_reinforce.compare.report import write_report

#: Seconds to wait for the scheduler of a cluster
CONNECT_TIMEOUT = 20

#: Seconds that a worker may take to import what runs a job
IMPORT_TIMEOUT = 120

#: Seconds between two looks at whether a run is still wanted
POLL_EVERY = 0.5

BACKENDS = ("loky", "dask")


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """
    Wait for a process.

    :param process: The process
    :param seconds: How long to wait for it
    :return: Its exit status, ``None`` if it has not ended by then
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def run_reference(folder: Path, job: dict[str, Any]) -> None:
    """
    Evaluate a reference, and leave its result or its failure in its folder.

    :param folder: Folder of the run
    :param job: The run
    """
    try:
        for module in job["gym_packages"]:
            import_module(module)
        scores = evaluate_reference(job["contender"], job["env"], job["seed"], job["n_eval_episodes"], job["settings"])
        write_json(folder / RESULT, {REFERENCES[job["contender"]]: scores, "versions": versions()})
    except Exception as error:
        (folder / "log.txt").write_text(traceback.format_exc())
        write_json(folder / FAILURE, {"error": repr(error)})


def run_training(folder: Path, job: dict[str, Any]) -> None:
    """
    Train and evaluate in a process of its own, which leaves its result in the folder, and leave its failure there.

    :param folder: Folder of the run
    :param job: The run
    """
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


def run_job(folder: Path, job: dict[str, Any]) -> None:
    """
    Do one run, and leave its result or its failure in its folder.

    :param folder: Folder of the run. What is there of an earlier attempt is removed
    :param job: The run
    :raises ValueError: If this machine does not see the folder of the comparison
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
        run_reference(folder, job)
    else:
        run_training(folder, job)


@contextmanager
def workers(backend: str, address: str | None, n_jobs: int) -> Iterator[joblib.Parallel]:
    """
    Connect to what runs jobs.

    :param backend: ``"loky"`` for processes here, ``"dask"`` for an existing cluster
    :param address: Address of the scheduler of the cluster
    :param n_jobs: Number of runs at a time here; a cluster runs as many as it has threads
    :return: What runs jobs
    :raises ValueError: If no cluster answers at the address, or its workers do not have this package
    """
    if backend == "loky":
        yield joblib.Parallel(n_jobs, backend=backend, batch_size=1)
        return
    from distributed import Client  # An extra

    try:
        client = Client(address, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError) as error:
        raise ValueError(f"no dask cluster answers at --address {address}: {error}") from error
    try:
        try:
            client.submit(versions, pure=False).result(IMPORT_TIMEOUT)
        except (ImportError, AttributeError, TimeoutError) as error:
            raise ValueError(f"no worker at {address} can import this package: {error}") from error
        with joblib.parallel_config(backend=backend):
            yield joblib.Parallel(n_jobs=-1, batch_size=1)
    finally:
        client.close()


def run_missing(out: Path, jobs: dict[Path, dict[str, Any]], parallel: joblib.Parallel) -> None:
    """
    Do the runs that have not finished.

    :param out: Folder of the comparison
    :param jobs: The runs, by their folders, in the order in which to do them
    :param parallel: What runs jobs
    """
    progress = Progress(jobs, read_archive(out))
    missing = {folder: job for folder, job in jobs.items() if progress.status(folder) != "done"}
    for folder in missing:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with shown(progress):
            parallel(joblib.delayed(run_job)(folder, job) for folder, job in missing.items())
    except TerminatedWorkerError:
        print("A process that was to see to some of the runs was killed: --resume goes on with what is missing")
    finally:
        for folder in missing:
            if progress.status(folder) == "running":
                (folder / JOB).unlink(missing_ok=True)  # Which ends it


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
    svg: bool = False,
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
    :param thresholds: Return to reach, one for all environments or one for each (default: Gymnasium's, if there is one)
    :param n_jobs: Number of runs at a time
    :param backend: ``"loky"`` (processes here) or ``"dask"`` (an existing cluster)
    :param address: Address of the cluster
    :param resume: Run what is missing in the folder or has failed, also with further seeds after those in the folder
    :param gym_packages: Modules that register environments
    :param vec_env: Kind of the vectorized environments, as in ``sb3-reinforce train``
    :param svg: Whether to write the pictures as SVG too
    :param command: The command that asked for this, for the report
    :return: Whether all runs are done
    :raises ValueError: If an argument cannot be, before anything is written
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    check_number("n_jobs", n_jobs, 1, integer=True)
    out = Path(out).resolve()
    asked = describe(envs, algos, seeds, n_timesteps, eval_freq, n_eval_episodes, thresholds, gym_packages, vec_env)
    with workers(backend, address, n_jobs) as parallel:
        comparison = open_folder(out, {**asked, "command": command}, resume)
        pack(out)  # What an interrupted comparison has left
        # Seed by seed, so that an interrupted comparison has about as many runs of each contender
        jobs = dict(sorted(make_jobs(out, comparison).items(), key=lambda item: seeds.index(item[1]["seed"])))
        try:
            run_missing(out, jobs, parallel)
        finally:
            pack(out)
            write_report(out, svg)
    print(f"Report: {out / 'report.md'}")
    progress = Progress(jobs, read_archive(out))
    return all(progress.status(folder) == "done" for folder in jobs)
