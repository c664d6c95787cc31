"""What a comparison has measured: its runs, its learning curves, its statistics."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm, probability_of_improvement

from sb3_reinforce.compare.archive import KEYS
from sb3_reinforce.compare.files import FAILURE, KINDS, read_json
from sb3_reinforce.compare.references import REFERENCES

#: Episodes in the running mean of a learning curve
WINDOW = 20

#: Points of a learning curve
GRID_SIZE = 101

#: Resamples of the bootstrap
REPS = 2000

#: States of a run
STATES = ("done", "failed", "missing")

#: Stands for a threshold that was not reached: slower than any that was
NEVER = 1e15

#: Columns of ``runs.csv``
COLUMNS = (
    "status",
    "contender",
    "algo",
    "env",
    "seed",
    "num_timesteps",
    "seconds",
    "steps_per_second",
    *KINDS,
    "steps_to_threshold",
    "seconds_to_threshold",
    "folder",
    "error",
)

Estimate = dict[str, Any]


def learning_curve(episodes: pd.DataFrame) -> pd.Series:
    """
    Average the returns of a run over a moving window.

    :param episodes: Training episodes of the run
    :return: Mean return of the last :data:`WINDOW` episodes (at first, of those that there are) at the end of each one
    """
    return episodes["return"].rolling(WINDOW, min_periods=1).mean()


def reach(episodes: pd.DataFrame, threshold: float | None) -> tuple[float, float]:
    """
    Find when a run reaches a return.

    :param episodes: Training episodes of the run
    :param threshold: Return to reach
    :return: Time steps and seconds until the last :data:`WINDOW` episodes average the threshold, NaN if they never do
    """
    if threshold is None:
        return np.nan, np.nan
    means = learning_curve(episodes)
    reached = episodes[(means >= threshold) & (np.arange(len(means)) >= WINDOW - 1)]
    return (np.nan, np.nan) if reached.empty else (reached["num_timesteps"].iloc[0], reached["seconds"].iloc[0])


def read_runs(out: Path, comparison: dict[str, Any], jobs: dict[Path, dict[str, Any]], episodes: pd.DataFrame) -> pd.DataFrame:
    """
    Summarize the runs of a comparison.

    :param out: Folder of the comparison
    :param comparison: What is compared
    :param jobs: The runs, by their folders
    :param episodes: Episodes of the finished runs
    :return: One row per run, what is not known is NaN
    """
    by_run = dict(iter(episodes.groupby(list(KEYS), sort=False)))
    rows = []
    for folder, job in jobs.items():
        row = {key: job[key] for key in ("contender", "algo", "env", "seed")}
        row["folder"] = str(folder.relative_to(out))
        run, failure = by_run.get(tuple(job[key] for key in KEYS)), read_json(folder / FAILURE)
        row["status"] = "done" if run is not None else "failed" if failure else "missing"
        if run is not None:
            phases = dict(iter(run.groupby("phase")))
            row.update({kind: float(np.mean(phases[kind]["return"].to_numpy())) for kind in KINDS if kind in phases})
            if job["algo"] is not None:
                row.update({key: run[key].iloc[-1] for key in ("num_timesteps", "seconds")})
                row["steps_per_second"] = row["num_timesteps"] / row["seconds"]
                steps, seconds = reach(phases.get("training", run[:0]), comparison["thresholds"][job["env"]])
                row.update(steps_to_threshold=steps, seconds_to_threshold=seconds)
        elif failure:
            row["error"] = failure["error"]
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def make_grids(runs: list[pd.DataFrame]) -> dict[str, np.ndarray]:
    """
    Lay the grids that the learning curves of an environment share.

    :param runs: Training episodes of each run
    :return: By axis: time steps; seconds, in geometric progression from a thousandth of the longest run
    """
    last = {axis: max(run[axis].iloc[-1] for run in runs) for axis in ("num_timesteps", "seconds")}
    return {
        "num_timesteps": np.unique(np.linspace(0, last["num_timesteps"], GRID_SIZE).round()),
        "seconds": np.geomspace(last["seconds"] / 1000, last["seconds"], GRID_SIZE),
    }


def make_curves(episodes: pd.DataFrame) -> pd.DataFrame:
    """
    Put the learning curves of the finished runs on the grids of their environment. A curve has no values after its last
    episode.

    :param episodes: Episodes of the finished runs
    :return: One row per point: ``contender, env, seed, axis, x, return``
    """
    pieces = []
    training = episodes[episodes["phase"] == "training"]
    for _, of_env in training.groupby("env", sort=False):
        runs = dict(iter(of_env.groupby(list(KEYS), sort=False)))
        grids = make_grids(list(runs.values()))
        for key, run in runs.items():
            curve = learning_curve(run).to_numpy()
            for axis, grid in grids.items():
                ends = run[axis].to_numpy()
                # The last episode that is over by then
                position = np.searchsorted(ends, grid, side="right") - 1
                known = (position >= 0) & (grid <= ends[-1])
                points = {"axis": axis, "x": grid[known], "return": curve[position[known]]}
                pieces.append(pd.DataFrame(dict(zip(KEYS, key, strict=True)) | points))
    columns = [*KEYS, "axis", "x", "return"]
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=columns)


@contextmanager
def seeded() -> Iterator[None]:
    """
    Seed NumPy's global generator, which the bootstrap of rliable draws from, and restore its state afterwards.
    """
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def estimate(function: Callable[..., float], *scores: np.ndarray) -> Estimate:
    """
    Estimate a statistic of runs and its interval.

    :param function: Statistic of the scores, arrays of shape ``(n_runs, 1)``
    :param scores: Score of each run, shape ``(n_runs,)``, one array or several whose runs are independent
    :return: The statistic, its 95 % interval (percentiles of rliable's stratified bootstrap with :data:`REPS`
        resamples; ``None`` with fewer than two runs) and the number of runs
    """
    columns = [array[:, None] for array in scores]
    n_runs = min(map(len, columns))
    if n_runs == 0:
        return {"value": None, "interval": None, "n": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Of p-values, which are not used, of runs that are all alike
        value = float(function(*columns))
        interval = None
        if n_runs > 1:
            with seeded():
                data = {"": columns[0] if len(columns) == 1 else columns}
                _, intervals = get_interval_estimates(data, lambda *x: np.array([function(*x)]), reps=REPS)
            interval = [float(bound) for bound in intervals[""][:, 0]]
    return {"value": value, "interval": interval, "n": n_runs}


def finite(found: Estimate) -> Estimate:
    """
    Replace what stands for a threshold that was not reached.

    :param found: An estimate of steps or seconds
    :return: The same, with ``None`` where the threshold was not reached
    """

    def known(value: Any) -> float | None:
        # A median of an even number of runs is half of it if one of two has not reached the threshold
        return value if value is not None and value < NEVER / 1e3 else None

    interval = found["interval"]
    return {**found, "value": known(found["value"]), "interval": interval and [known(bound) for bound in interval]}


def median_ratio(x: np.ndarray, y: np.ndarray) -> float:
    """
    Divide two medians.

    :param x: Values, shape ``(n_runs, 1)``
    :param y: Other values
    :return: Ratio of the medians: :data:`NEVER` if only the first stands for that, 0 if only the second does, 1 if both do
    """
    above, below = np.median(x), np.median(y)
    if max(above, below) < NEVER / 2:
        return float(above / below)
    return NEVER if below < NEVER / 2 else 0.0 if above < NEVER / 2 else 1.0


def threshold_statistics(group: pd.DataFrame, firsts: pd.DataFrame | None) -> dict[str, Any]:
    """
    Estimate how long a contender trains until it reaches the threshold.

    :param group: The finished runs of the contender in an environment
    :param firsts: Those of the first contender, ``None`` if this is the first one
    :return: Speed, number of runs that have reached the threshold, steps and seconds until then, and their ratios to those
        of the first contender, ``None`` where there is no ratio
    """
    entry: dict[str, Any] = {
        "steps_per_second": estimate(np.median, group["steps_per_second"].to_numpy()),
        "reached": int(group["steps_to_threshold"].notna().sum()),
    }
    for key in ("steps_to_threshold", "seconds_to_threshold"):
        mine = group[key].fillna(NEVER).to_numpy()
        entry[key] = finite(estimate(np.median, mine))
        entry[f"{key}_ratio"] = None
        if firsts is not None and len(mine) and len(firsts):
            others = firsts[key].fillna(NEVER).to_numpy()
            if max(np.median(mine), np.median(others)) < NEVER / 2:
                entry[f"{key}_ratio"] = finite(estimate(median_ratio, mine, others))
    return entry


def statistics(runs: pd.DataFrame) -> dict[str, Any]:
    """
    Estimate all that a report says of the runs of a comparison.

    :param runs: The runs. The first contender is the one that the others are compared with
    :return: By environment and contender: number of runs in each state, and estimates of the scores, the steps and
        seconds to the threshold, the speed, and the comparison with the first contender
    """
    found: dict[str, Any] = {}
    for env_id, of_env in runs.groupby("env", sort=False):
        found[env_id] = {}
        firsts: pd.DataFrame | None = None
        for name, group in of_env.groupby("contender", sort=False):
            entry: dict[str, Any] = {status: int((group["status"] == status).sum()) for status in STATES}
            done = group[group["status"] == "done"]
            for kind in KINDS:
                scores = done[kind].dropna().to_numpy()
                entry[kind] = {
                    "mean": estimate(np.mean, scores),
                    "iqm": estimate(aggregate_iqm, scores),
                    "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                }
            if name not in REFERENCES:
                entry.update(threshold_statistics(done, firsts))
            if firsts is not None:
                entry["probability_of_improvement"] = {
                    kind: estimate(probability_of_improvement, *(frame[kind].dropna().to_numpy() for frame in (firsts, done)))
                    for kind in KINDS
                }
            found[env_id][name] = entry
            firsts = done if firsts is None else firsts
    return found
