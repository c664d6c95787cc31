"""
Problems that differ from start to start, with masks: the travelling salesman of 20 cities and the job-shop of 6 jobs on 6
machines of ``examples/``. REINFORCE with groups, without, and with the greedy baseline, beside sb3_contrib's MaskablePPO with
the same policy network; the same processor seconds for all.

    OMP_NUM_THREADS=1 python -m benchmarks.problems --jobs 2

A run that is in ``benchmarks/problems/runs.csv`` is not made again.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from joblib import Parallel, delayed
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.intervals import mean_interval
from examples import job_shop, salesman
from examples.scoring import Deadline, of_model, scoring
from sb3_reinforce.checks import versions

OUT = Path(__file__).parent / "problems"
SEEDS = range(3)
SECONDS = 60

#: Settings of MaskablePPO: its defaults, and what is usual for short episodes with a reward that is not discounted
PPO: dict[str, dict[str, Any]] = {
    "MaskablePPO": dict(),
    "MaskablePPO, tuned": dict(
        n_steps=64, batch_size=512, n_epochs=4, gamma=1.0, gae_lambda=0.95, learning_rate=1e-3, ent_coef=0.01
    ),
}

#: Settings of REINFORCE, beside those of the examples
REINFORCE: dict[str, dict[str, Any]] = {
    "REINFORCE, groups of 8": dict(),
    "REINFORCE, no groups": dict(group_size=1),
    "REINFORCE, greedy baseline": dict(group_size=7, n_episodes=56, baseline="greedy"),
}

TASKS: dict[str, Any] = {"salesman": salesman, "job_shop": job_shop}

#: Headings of the report
TITLES = {"salesman": "Tours (salesman)", "job_shop": "Schedules (job_shop)"}


def score(task: str, choose: Any) -> float:
    """
    Measure on the held-out problems.

    :param task: One of :data:`TASKS`
    :param choose: Function that takes the environment and its observation, and gives the action
    :return: Mean length of the tours, or mean makespan
    """
    return float((salesman.lengths(choose, 20) if task == "salesman" else job_shop.makespans(choose)).mean())


def run(task: str, name: str, seed: int, seconds: float) -> dict[str, Any]:
    """
    Train and evaluate.

    :param task: One of :data:`TASKS`
    :param name: One of :data:`REINFORCE` or :data:`PPO`
    :param seed: Seed
    :param seconds: Processor seconds
    :return: A row of the results
    """
    th.set_num_threads(1)
    module, deadline = TASKS[task], Deadline(seconds, time.process_time)
    if name in REINFORCE:
        model: Any = module.make_model(seed=seed, target_kl=deadline.falling(0.05), **REINFORCE[name])
    else:
        env = make_vec_env(module.Salesman if task == "salesman" else module.JobShop, 32, seed=seed)
        model = MaskablePPO(scoring(MaskableActorCriticPolicy), env, seed=seed, device="cpu", **PPO[name])
    model.learn(10**9, callback=deadline)
    row = {
        "task": task,
        "contender": name,
        "seed": seed,
        "score": score(task, of_model(model)),
        "steps": model.num_timesteps,
        "seconds": seconds,
    }
    if task == "job_shop":
        row["ft06"] = int(job_shop.makespans(of_model(model), jobs=job_shop.FT06)[0])
    print(row, flush=True)
    return row


def references() -> dict[str, dict[str, float]]:
    """
    Measure what needs no learning.

    :return: Scores by task and name
    """
    rules = {name: job_shop.by_rule(rule) for name, rule in job_shop.RULES.items()}
    return {
        "salesman": {
            "shortest tour": float(salesman.optima(20).mean()),
            "nearest neighbour": score("salesman", lambda env, _: salesman.nearest_neighbour(env)),
        },
        "job_shop": {name: score("job_shop", rule) for name, rule in rules.items()},
    }


def report(runs: pd.DataFrame, command: str, seconds: float) -> str:
    """
    Write the report.

    :param runs: Rows of :func:`run`
    :param command: What has made them
    :param seconds: Processor seconds of each run
    :return: The report, in Markdown
    """
    lines = ["# Problems that differ from start to start", "", "```", command, "```", ""]
    lines.append(
        f"{seconds:g} processor seconds of training for each run, one thread. Scores: mean over 100 held-out problems with "
        "the likeliest actions, the lower the better. [95 %]: percentiles of the bootstrap over the seeds."
    )
    for task, of_task in references().items():
        unit: Callable[[float], str] = (lambda x: f"{x:.3f}") if task == "salesman" else (lambda x: f"{x:.2f}")
        best = of_task.get("shortest tour")
        lines += ["", f"## {TITLES[task]}", "", "| | mean [95 %] | each seed | steps, median |", "|---|---|---|---|"]
        for name, rows in runs[runs["task"] == task].groupby("contender", sort=False):
            scores = rows.sort_values("seed")["score"].to_numpy()
            low, high = mean_interval(scores)
            more = f", {scores.mean() / best - 1:.1%} above the optimum" if best else ""
            each = ", ".join(map(unit, scores))
            cells = [
                str(name),
                f"{unit(scores.mean())} [{unit(low)}, {unit(high)}]{more}",
                each,
                f"{rows['steps'].median():,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for name, value in of_task.items():
            more = f", {value / best - 1:.1%} above the optimum" if best and value > best else ""
            lines.append(f"| {name} | {unit(value)}{more} | | |")
        if task == "job_shop":
            found = (
                runs[runs["task"] == task]
                .groupby("contender", sort=False)["ft06"]
                .apply(lambda x: ", ".join(f"{v:.0f}" for v in x))
            )
            lines += ["", f"The problem ft06 (optimum {job_shop.FT06_OPTIMUM}), makespan of each seed:", ""]
            lines += [f"* {name}: {values}" for name, values in found.items()]
            for name, rule in job_shop.RULES.items():
                lines.append(f"* {name}: {job_shop.makespans(job_shop.by_rule(rule), jobs=job_shop.FT06)[0]}")
    lines += ["", ", ".join(f"{package} {number}" for package, number in versions().items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of a run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.csv"
    runs = (
        pd.read_csv(path)
        if path.exists()
        else pd.DataFrame(columns=["task", "contender", "seed", "score", "steps", "seconds", "ft06"])
    )
    if (runs["seconds"] != args.seconds).any():
        parser.error(f"{args.out} has runs of other --seconds than {args.seconds}: choose another --out")
    done = set(runs[["task", "contender", "seed"]].itertuples(index=False, name=None))
    names = [*REINFORCE, *PPO]
    missing = [key for seed in SEEDS for task in TASKS for name in names if (key := (task, name, seed)) not in done]
    for row in Parallel(n_jobs=args.jobs, return_as="generator_unordered")(
        delayed(run)(*key, args.seconds) for key in missing
    ):
        runs = pd.concat([runs, pd.DataFrame([row])], ignore_index=True)
        order = runs["contender"].map(names.index)
        runs.iloc[np.lexsort([runs["seed"], order, runs["task"]])].to_csv(path, index=False)
    runs = pd.read_csv(path)
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.problems --jobs {args.jobs}"
    if args.seconds != SECONDS:
        command += f" --seconds {args.seconds:g}"
    (args.out / "report.md").write_text(report(runs, command, args.seconds))
    print((args.out / "report.md").read_text())


if __name__ == "__main__":
    main()
