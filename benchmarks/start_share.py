"""
How much of the variance of returns the start of an episode explains, of the first policy and of that after 50,000 steps
without groups, and how much gradients of the latter vary with groups, on the tasks of ``groups`` and ``problems``.

    OMP_NUM_THREADS=1 python -m benchmarks.start_share --jobs 2
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
import yaml
from joblib import Parallel, delayed

from benchmarks import tasks
from examples import job_shop, salesman
from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions
from sb3_reinforce.compare.shared_starts import N_PER_START, N_STARTS, compare_groups, start_share

SETTINGS = Path(__file__).parent / "groups.yml"
OUT = Path(__file__).parent / "groups"
SEEDS = range(3)
N_TIMESTEPS = 50_000

#: Episodes in all, of an estimate and of a group
N_EPISODES, BATCH_SIZE, GROUP_SIZE = 1024, 16, 4

EXAMPLES: dict[str, Any] = {"tours": salesman, "schedules": job_shop}


def measure(task: str, seed: int) -> dict[str, Any]:
    """
    Measure a policy before and after its training.

    :param task: Id of an environment of ``groups.yml``, or one of :data:`EXAMPLES`
    :param seed: Seed
    :return: A row of the results
    """
    th.set_num_threads(1)
    if task in EXAMPLES:
        model: REINFORCE = EXAMPLES[task].make_model(seed=seed, group_size=1)
    else:
        settings = yaml.safe_load(SETTINGS.read_text())[task]
        del settings["n_timesteps"]
        model = REINFORCE(env=f"{tasks.__name__}:{task}", seed=seed, device="cpu", **settings)
    row = {"task": task, "seed": seed, "share_first": start_share(model), "share": start_share(model.learn(N_TIMESTEPS))}
    table = compare_groups(model, N_EPISODES, [BATCH_SIZE], GROUP_SIZE)
    variances = table[table["baseline"] == "timestep"].set_index("group_size")["variance"]
    row["variance_ratio"] = variances[GROUP_SIZE] / variances[1]
    print(row, flush=True)
    return row


def report(table: pd.DataFrame, command: str) -> str:
    """
    Write the report.

    :param table: Rows of :func:`measure`
    :param command: What has made them
    :return: The report, in Markdown
    """
    lines = ["# How much the start explains", "", "```", command, "```", ""]
    lines += [
        f"Share of the variance of the returns of {N_STARTS} starts of {N_PER_START} episodes; variance of gradients of "
        f"{BATCH_SIZE} episodes in groups of {GROUP_SIZE} over that without groups, baseline timestep, from {N_EPISODES} "
        f"episodes each. For each of the seeds {', '.join(map(str, SEEDS))}.",
        "",
        f"| | share, first policy | after {N_TIMESTEPS:,} steps | ratio of variances, after {N_TIMESTEPS:,} steps |",
        "|---|---|---|---|",
    ]
    for task, rows in table.groupby("task", sort=False):
        shares = [", ".join(f"{share:.0%}" for share in rows[column]) for column in ("share_first", "share")]
        ratios = ", ".join(f"{ratio:.2f}" for ratio in rows["variance_ratio"])
        lines.append(f"| {' | '.join([str(task), *shares, ratios])} |")
    return "\n".join([*lines, "", ", ".join(f"{package} {number}" for package, number in versions().items()) + "."]) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of measurements at a time")
    args = parser.parse_args()
    names = [*yaml.safe_load(SETTINGS.read_text()), *EXAMPLES]
    table = pd.DataFrame(Parallel(n_jobs=args.jobs)(delayed(measure)(task, seed) for task in names for seed in SEEDS))
    OUT.mkdir(exist_ok=True)
    table.to_csv(OUT / "start_share.csv", index=False)
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.start_share --jobs {args.jobs}"
    (OUT / "start_share.md").write_text(report(table, command))


if __name__ == "__main__":
    main()
