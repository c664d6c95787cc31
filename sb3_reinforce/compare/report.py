"""The report of a comparison. It is made of what its folder holds, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from sb3_reinforce.compare.files import COMPARISON, RESULT, make_jobs, read_json, write_json
from sb3_reinforce.compare.plots import AXES, plot_curves, plot_scores
from sb3_reinforce.compare.references import REFERENCES
from sb3_reinforce.compare.results import KINDS, REPS, WINDOW, read_curves, read_runs, statistics


def number(value: float | None, digits: int = 0) -> str:
    """
    :param value: A number
    :param digits: Digits after the point
    :return: The number for a reader, blank if there is none
    """
    return "" if value is None or pd.isna(value) else f"{value:,.{digits}f}"


def interval(found: dict[str, Any] | None, digits: int = 0, never: str = "") -> str:
    """
    :param found: An estimate
    :param digits: Digits after the point
    :param never: What to say of a number that is not known although there are runs
    :return: The estimate and its interval
    """
    if found is None or found["n"] == 0:
        return ""
    texts = [number(value, digits) or never for value in (found["value"], *(found["interval"] or ()))]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """
    :param header: Names of the columns
    :param rows: Cells
    :return: Lines of a table in Markdown
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return [" ".join(line.split()) for line in lines] + [""]


def score_section(found: dict[str, Any]) -> list[str]:
    """
    :param found: Statistics of an environment
    :return: Lines of Markdown
    """
    header = ["", "n"]
    for kind in KINDS:
        header += [f"{kind}: IQM [95 %]", "mean [95 %]", "std"]
    rows = []
    for name, entry in found.items():
        cells = [name, str(entry["done"])]
        for kind in KINDS:
            scores = entry[kind]
            cells += [interval(scores["iqm"], 1), interval(scores["mean"], 1), number(scores["std"], 1)]
        rows.append(cells)
    return table(header, rows)


def efficiency_section(found: dict[str, Any], threshold: float | None) -> list[str]:
    """
    :param found: Statistics of an environment
    :param threshold: Return that the runs are to reach
    :return: Lines of Markdown
    """
    trained = {name: entry for name, entry in found.items() if name not in REFERENCES}
    first = next(iter(trained))
    if threshold is None:
        rows = [[name, interval(entry["steps_per_second"])] for name, entry in trained.items()]
        return table(["", "steps per second"], rows)
    header = ["", f"reached {threshold:g}", "steps until then", f"over {first}'s", "seconds until then", f"over {first}'s"]
    rows = []
    for name, entry in trained.items():
        cells = [name, f"{entry['reached']} of {entry['done']}" if entry["done"] else ""]
        for key, digits in (("steps_to_threshold", 0), ("seconds_to_threshold", 1)):
            cells += [interval(entry[key], digits, "never"), interval(entry[f"{key}_ratio"], 2, "never")]
        rows.append([*cells, interval(entry["steps_per_second"])])
    return table([*header, "steps per second"], rows)


def improvement_section(found: dict[str, Any]) -> list[str]:
    """
    :param found: Statistics of an environment
    :return: Lines of Markdown
    """
    rows = []
    for name, entry in found.items():
        if "probability_of_improvement" in entry:
            probabilities = entry["probability_of_improvement"]
            rows.append([name, *(interval(probabilities[kind], 2) for kind in KINDS)])
    return table([f"P({next(iter(found))} scores more than ...)", *KINDS], rows)


def seeds_section(runs: pd.DataFrame, value: Callable[[Any], str]) -> list[str]:
    """
    :param runs: Runs in one environment
    :param value: What to say of a run that is done
    :return: Lines of Markdown
    """
    names = list(dict.fromkeys(runs["contender"]))
    rows = []
    for seed, of_seed in runs.groupby("seed", sort=False):
        by_name = {run.contender: run for run in of_seed.itertuples()}
        cells = [value(by_name[name]) if by_name[name].status == "done" else by_name[name].status for name in names]
        rows.append([str(seed), *cells])
    return table(["seed", *names], rows)


def report(comparison: dict[str, Any], runs: pd.DataFrame, found: dict[str, Any], versions: list[dict[str, str]]) -> str:
    """
    :param comparison: What is compared
    :param runs: Its runs
    :param found: Their statistics
    :param versions: Versions of the packages, each set that was in use
    :return: The report, in Markdown
    """
    lines = ["# Comparison", ""]
    if comparison["command"]:
        lines += ["```", comparison["command"], "```", ""]
    lines += ["; ".join(", ".join(f"{name} {text}" for name, text in used.items()) for used in versions) + ".", ""]
    states = ["done", "failed", "missing"]
    counts = {name: group["status"].value_counts() for name, group in runs.groupby("contender", sort=False)}
    rows = [[name, *(str(count.get(state, 0)) for state in states)] for name, count in counts.items()]
    lines += ["## Runs", "", *table(["", *states], rows)]
    for run in runs[runs["status"] == "failed"].itertuples():
        lines.append(f"* `{run.folder}` failed: `{run.error}` (`log.txt` there has the whole message)")
    if (runs["status"] == "failed").any():
        lines.append("")
    if not (runs["status"] == "done").any():
        return "\n".join([*lines, "No run has finished: there is nothing to report."]) + "\n"

    n_seeds, n_episodes = len(comparison["seeds"]), comparison["n_eval_episodes"]
    lines += [
        f"Seeds: {' '.join(map(str, comparison['seeds']))} (n = {n_seeds}). Score of a run: mean return of its last policy",
        f"(not of the best one) over {n_episodes} episodes. IQM: mean of the middle half of the runs. std: with n - 1.",
        f"[Intervals]: 95 %, percentiles of the stratified bootstrap over runs (rliable, {REPS:,} resamples). Medians count",
        f"a run that never reaches the threshold (mean of {WINDOW} training episodes) as slower than any other. Seconds are",
        "those of training, without evaluation. random, zero_action: policies that learn nothing.",
        "",
    ]
    for env_id in comparison["envs"]:
        of_env, threshold = runs[runs["env"] == env_id], comparison["thresholds"][env_id]
        budgets = of_env["num_timesteps"].dropna()
        lines += [f"## {env_id}", ""]
        if len(budgets):
            lines += [f"Time steps of a run: {number(budgets.min())} to {number(budgets.max())}. Final scores:", ""]
        lines += score_section(found[env_id]) + efficiency_section(found[env_id], threshold)
        lines += improvement_section(found[env_id])
        for kind in KINDS:
            lines += [f"Each seed, {kind}:", ""]
            lines += seeds_section(of_env, lambda run, kind=kind: number(getattr(run, kind), 1))  # type: ignore[misc]
        if threshold is not None:
            lines += [f"Steps until {threshold:g}:", ""]
            trained = of_env[of_env["algo"].notna()]
            lines += seeds_section(trained, lambda run: number(run.steps_to_threshold) or "never")
    pictures = ["scores", *(name for name, _ in AXES.values())]
    lines += ["## Pictures", ""] + [f"![{name}]({name}.png)\n" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def write_report(out: Path) -> None:
    """
    Write ``runs.csv``, ``curves.csv``, ``results.json``, ``report.md`` and the pictures into the folder of a comparison.

    :param out: The folder
    :raises ValueError: If it holds no comparison
    """
    comparison = read_json(out / COMPARISON)
    if comparison is None or not (out / "runs").is_dir():
        raise ValueError(f"--out {out} holds no comparison, or not the runs of one")
    jobs = make_jobs(out, comparison)
    runs = read_runs(out, comparison, jobs)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.7g")
    curves = read_curves(out, runs)
    curves.to_csv(out / "curves.csv", index=False, float_format="%.5g")
    found = statistics(runs)
    results = [read_json(folder / RESULT) for folder in jobs]
    versions = [json.loads(text) for text in dict.fromkeys(json.dumps(r["versions"]) for r in results if r)]
    write_json(out / "results.json", {"comparison": comparison, "versions": versions, "statistics": found})
    (out / "report.md").write_text(report(comparison, runs, found, versions))
    if (runs["status"] == "done").any():
        plot_curves(curves, comparison, out)
        plot_scores(runs, found, comparison, out)
