"""The progress of a comparison: a table that is kept up to date on a terminal, lines now and then elsewhere."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sb3_reinforce.compare.archive import KEYS
from sb3_reinforce.compare.files import FAILURE, JOB, PROGRESS, RESULT, read_json

#: States of a run, in the order of the table
ORDER = ("running", "failed", "waiting", "done")

#: Seconds between two lines, unless the state of a run has changed
PRINT_EVERY = 60.0

#: Seconds between two looks at the states of the runs
POLL_EVERY = 1.0

#: Columns of a table that is not for a terminal: as many as it needs
WIDTH = 10_000

State = dict[str, Any]


class Progress:
    """
    Knows the states of the runs of a comparison.

    :param jobs: The runs, by their folders
    :param episodes: Episodes of the runs that had finished before
    """

    def __init__(self, jobs: dict[Path, dict[str, Any]], episodes: pd.DataFrame):
        self.jobs = jobs
        folders = {tuple(job[key] for key in KEYS): folder for folder, job in jobs.items()}
        self.archived: dict[Path, State] = {}
        for key, run in episodes.groupby(list(KEYS), sort=False):
            state = run[["num_timesteps", "seconds"]].iloc[-1].to_dict()
            scores = {phase: list(group["return"]) for phase, group in run.groupby("phase")}
            self.archived[folders[key]] = state | scores

    def status(self, folder: Path) -> str:
        """
        Look up the state of a run.

        :param folder: Folder of the run
        :return: ``"done"``, ``"failed"``, ``"running"`` or ``"waiting"``
        """
        if folder in self.archived:
            return "done"
        for name, status in ((RESULT, "done"), (FAILURE, "failed"), (JOB, "running")):
            if (folder / name).is_file():
                return status
        return "waiting"

    def statuses(self) -> tuple[dict[Path, str], str]:
        """
        Look up the states of all runs.

        :return: The state of each run, and how many runs are in which state
        """
        found = {folder: self.status(folder) for folder in self.jobs}
        counts = Counter(found.values())
        return found, ", ".join(f"{counts[status]} {status}" for status in ORDER)

    def read(self, folder: Path, status: str) -> State:
        """
        Look up how far a run is.

        :param folder: Folder of the run
        :param status: Its state
        :return: Time steps, seconds and score, as far as they are known; ``left``: seconds that are left of a run
        """
        name = {"running": PROGRESS, "done": RESULT}.get(status)
        state = self.archived.get(folder) or (read_json(folder / name) if name else None) or {}
        # The mean of the last training episodes, later that of the evaluation
        scores = state.get("score", state.get("deterministic", state.get("stochastic")))
        found = {"score": None if scores is None else float(np.mean(scores))}
        if state.get("num_timesteps"):
            found |= {"steps": int(state["num_timesteps"]), "speed": state["num_timesteps"] / state["seconds"]}
            if status == "running":
                found["left"] = max(0.0, (self.jobs[folder]["n_timesteps"] - found["steps"]) / found["speed"])
        return found

    def table(self) -> Table:
        """
        Make a table of the runs.

        :return: How many runs are in which state, and each run: those that are running first
        """
        statuses, counts = self.statuses()
        n_envs = len({job["env"] for job in self.jobs.values()})
        table = Table(title=counts)
        table.add_column("run", overflow="fold")
        for column in ("seed", "status", "steps", "score", "steps/s", "time left"):
            table.add_column(column, justify="left" if column == "status" else "right", no_wrap=True)
        for folder in sorted(self.jobs, key=lambda folder: ORDER.index(statuses[folder])):
            job, status = self.jobs[folder], statuses[folder]
            state = self.read(folder, status)
            name = job["contender"] if n_envs == 1 else f"{job['contender']} {job['env']}"
            steps, speed = (f"{state[key]:,.0f}" if key in state else "" for key in ("steps", "speed"))
            score = "" if state["score"] is None else f"{state['score']:,.1f}"
            left = str(timedelta(seconds=round(state["left"]))) if "left" in state else ""
            table.add_row(name, str(job["seed"]), status, steps, score, speed, left)
        return table

    def summary(self) -> tuple[str, str]:
        """
        Write the progress as a line.

        :return: How many runs are in which state, and how far those are that are running
        """
        statuses, counts = self.statuses()
        running = []
        for folder, status in statuses.items():
            job = self.jobs[folder]
            if status == "running" and job["algo"] is not None:
                share = self.read(folder, status).get("steps", 0) / job["n_timesteps"]
                running.append(f"{job['contender']} {job['env']} seed {job['seed']} {min(share, 1):.0%}")
        return counts, "; ".join(running)


def print_lines(progress: Progress, stop: threading.Event) -> None:
    """
    Print a line whenever the state of a run has changed, and now and then.

    :param progress: The progress
    :param stop: Ends this when it is set
    """
    counts, printed = "", 0.0
    while not stop.is_set():
        new, running = progress.summary()
        if new != counts or time.monotonic() - printed > PRINT_EVERY:
            print(time.strftime("%H:%M:%S"), new, f"({running})" if running else "", flush=True)
            counts, printed = new, time.monotonic()
        stop.wait(POLL_EVERY)


@contextmanager
def shown(progress: Progress) -> Iterator[None]:
    """
    Show the progress while the runs go on: as a table on a terminal, as lines with the table at the end elsewhere.

    :param progress: The progress
    """
    if Console().is_terminal:
        with Live(get_renderable=progress.table, refresh_per_second=1):
            yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=print_lines, args=(progress, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        Console(width=WIDTH).print(progress.table())
