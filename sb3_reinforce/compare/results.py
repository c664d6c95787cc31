"""What a comparison has measured: its runs, its learning curves, its statistics. Nothing but its folder is read."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm, probability_of_improvement

from sb3_reinforce.compare.files import EPISODES, FAILURE, RESULT, read_json
from sb3_reinforce.compare.references import REFERENCES

#: Episodes in the running mean of a learning curve
WINDOW = 20

#: Points of a learning curve
GRID_SIZE = 101

#: Resamples of the bootstrap
REPS = 2000

KINDS = ("deterministic", "stochastic")

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
    :param episodes: Episodes of a run
    :return: Mean return of the last :data:`WINDOW` episodes (at first, of those that there are) at the end of each one
    """
    return episodes["return"].rolling(WINDOW, min_periods=1).mean()


def reach(episodes: pd.DataFrame, threshold: float | None) -> tuple[float, float]:
    """
    :param episodes: Episodes of a run
    :param threshold: Return to reach
    :return: Time steps and seconds until the last :data:`WINDOW` episodes average the threshold, NaN if they never do
    """
    if threshold is None:
        return np.nan, np.nan
    means = learning_curve(episodes)
    reached = episodes[(means >= threshold) & (np.arange(len(means)) >= WINDOW - 1)]
    return (np.nan, np.nan) if reached.empty else (reached["num_timesteps"].iloc[0], reached["seconds"].iloc[0])


def read_runs(out: Path, comparison: dict[str, Any], jobs: dict[Path, dict[str, Any]]) -> pd.DataFrame:
    """
    :param out: Folder of a comparison
    :param comparison: What is compared
    :param jobs: Folders of the runs, and what they run
    :return: One row per run, what is not known is NaN
    """
    rows = []
    for folder, job in jobs.items():
        row = {key: job[key] for key in ("contender", "algo", "env", "seed")}
        row["folder"] = str(folder.relative_to(out))
        result, failure = read_json(folder / RESULT), read_json(folder / FAILURE)
        row["status"] = "done" if result else "failed" if failure else "missing"
        if failure and not result:
            row["error"] = failure["error"]
        if result:
            row.update({kind: float(np.mean(result[kind])) for kind in KINDS if kind in result})
        if result and job["algo"] is not None:
            row.update({key: result[key] for key in ("num_timesteps", "seconds")})
            row["steps_per_second"] = result["num_timesteps"] / result["seconds"]
            steps, seconds = reach(pd.read_csv(folder / EPISODES), comparison["thresholds"][job["env"]])
            row.update(steps_to_threshold=steps, seconds_to_threshold=seconds)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_curves(out: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """
    Learning curves of the runs that are done, each on the grids of its environment: time steps; seconds, from a
    thousandth, and episodes in geometric progression. A curve has no values after its last episode.

    :param out: Folder of a comparison
    :param runs: Its runs
    :return: One row per point: ``contender, algo, env, seed, axis, x, return``
    """
    pieces = []
    trained = runs[(runs["status"] == "done") & runs["algo"].notna()]
    for _, of_env in trained.groupby("env", sort=False):
        episodes = {index: pd.read_csv(out / run.folder / EPISODES) for index, run in of_env.iterrows()}
        episodes = {index: run for index, run in episodes.items() if len(run)}
        if not episodes:
            continue
        last = {axis: max(run[axis].iloc[-1] for run in episodes.values()) for axis in ("num_timesteps", "seconds")}
        grids = {
            "num_timesteps": np.unique(np.linspace(0, last["num_timesteps"], GRID_SIZE).round()),
            "seconds": np.geomspace(last["seconds"] / 1000, last["seconds"], GRID_SIZE),
            "episodes": np.unique(np.geomspace(1, max(map(len, episodes.values())), GRID_SIZE).round()),
        }
        for index, run in episodes.items():
            curve = learning_curve(run).to_numpy()
            for axis, grid in grids.items():
                ends = np.arange(1, len(run) + 1) if axis == "episodes" else run[axis].to_numpy()
                # The last episode that is over by then
                position = np.searchsorted(ends, grid, side="right") - 1
                known = (position >= 0) & (grid <= ends[-1])
                piece = pd.DataFrame({"axis": axis, "x": grid[known], "return": curve[position[known]]})
                for key in ("contender", "algo", "env", "seed"):
                    piece.insert(0, key, of_env.loc[index, key])
                pieces.append(piece)
    columns = ["contender", "algo", "env", "seed", "axis", "x", "return"]
    return pd.concat(pieces)[columns] if pieces else pd.DataFrame(columns=columns)


@contextmanager
def seeded() -> Iterator[None]:
    """The bootstrap of rliable draws from NumPy's global generator: always the same, and nothing of it is left."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def estimate(function: Callable[..., float], *scores: np.ndarray) -> Estimate:
    """
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
    :param x: Values, shape ``(n_runs, 1)``
    :param y: Other values
    :return: Ratio of the medians: :data:`NEVER` if only the first stands for that, 0 if only the second does, 1 if both do
    """
    above, below = np.median(x), np.median(y)
    if max(above, below) < NEVER / 2:
        return float(above / below)
    return NEVER if below < NEVER / 2 else 0.0 if above < NEVER / 2 else 1.0


def statistics(runs: pd.DataFrame) -> dict[str, Any]:
    """
    :param runs: Runs of a comparison. The first contender is the one that the others are compared with
    :return: By environment and contender: number of runs in each state, and estimates of the scores, the steps and
        seconds to the threshold, the speed, and the comparison with the first contender
    """
    found: dict[str, Any] = {}
    for env_id, of_env in runs.groupby("env", sort=False):
        first = of_env["contender"].iloc[0]
        done = {name: group[group["status"] == "done"] for name, group in of_env.groupby("contender", sort=False)}
        found[env_id] = {}
        for name, group in done.items():
            entry: dict[str, Any] = {
                status: int((of_env[of_env["contender"] == name]["status"] == status).sum())
                for status in ("done", "failed", "missing")
            }
            for kind in KINDS:
                scores = group[kind].dropna().to_numpy()
                entry[kind] = {
                    "mean": estimate(np.mean, scores),
                    "iqm": estimate(aggregate_iqm, scores),
                    "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                }
            if name not in REFERENCES:
                entry["steps_per_second"] = estimate(np.median, group["steps_per_second"].to_numpy())
                entry["reached"] = int(group["steps_to_threshold"].notna().sum())
                for key in ("steps_to_threshold", "seconds_to_threshold"):
                    mine, firsts = (frame[key].fillna(NEVER).to_numpy() for frame in (group, done[first]))
                    entry[key] = finite(estimate(np.median, mine))
                    reached = max(np.median(mine), np.median(firsts)) < NEVER / 2 if len(mine) and len(firsts) else False
                    entry[f"{key}_ratio"] = finite(estimate(median_ratio, mine, firsts)) if reached and name != first else None
            if name != first:
                entry["probability_of_improvement"] = {
                    kind: estimate(
                        probability_of_improvement, done[first][kind].dropna().to_numpy(), group[kind].dropna().to_numpy()
                    )
                    for kind in KINDS
                }
            found[env_id][name] = entry
    return found
