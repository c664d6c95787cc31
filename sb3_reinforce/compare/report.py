"""The report of a comparison, made of nothing but the files in its folder."""

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from sb3_reinforce.compare.archive import has_episodes, read_episodes, read_versions
from sb3_reinforce.compare.files import ARCHIVE, COMPARISON, KINDS, make_jobs, read_json, write_json
from sb3_reinforce.compare.plots import AXES, plot_curves, plot_scores
from sb3_reinforce.compare.references import REFERENCES
from sb3_reinforce.compare.results import REPS, STATES, WINDOW, make_curves, read_runs, statistics

#: With fewer runs of each contender, a report says what they cannot show
MIN_RUNS = 5

#: Columns of a command in a report, after which it goes on in the next line
WIDTH = 100

#: What each picture shows, for those who cannot see it
ALT_TEXTS = {
    "scores": "Final scores of every run",
    "curves_steps": "Learning curves over environment steps",
    "curves_seconds": "Learning curves over seconds of training",
}


def number(value: float | None, digits: int = 0) -> str:
    """
    Write a number for a reader.

    :param value: A number
    :param digits: Digits after the point
    :return: The number for a reader, blank if there is none
    """
    # There is no negative zero
    return "" if value is None or pd.isna(value) else f"{round(value, digits) + 0.0:,.{digits}f}"


def interval(found: dict[str, Any] | None, digits: int = 0, never: str = "") -> str:
    """
    Write an estimate and its interval.

    :param found: An estimate
    :param digits: Digits after the point
    :param never: What to write for a number that is not known although there are runs
    :return: The estimate and its interval, blank if there are none
    """
    if found is None or found["n"] == 0:
        return ""
    texts = [number(value, digits) or never for value in (found["value"], *(found["interval"] or ()))]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def command_lines(command: str) -> list[str]:
    """
    Break a command into lines: one for each option, more where an option has many values. A shell reads them as one line.

    :param command: The command, in one line
    :return: Its lines
    """
    lines: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if lines and re.match("-+[a-z]", word, re.IGNORECASE):
            lines.append(f"  {word}")
        elif lines and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(f"    {word}")
        elif lines:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """
    Write a table.

    :param header: Names of the columns
    :param rows: Cells
    :return: Lines of a table in Markdown
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return [" ".join(line.split()) for line in lines] + [""]


def score_section(found: dict[str, Any]) -> list[str]:
    """
    Write the final scores.

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
    Write how long training takes until the threshold, and its speed.

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
    Write how probably the first contender scores more than the others.

    :param found: Statistics of an environment
    :return: Lines of Markdown
    """
    rows = []
    for name, entry in found.items():
        # A single run would win, or lose, with certainty
        if "probability_of_improvement" in entry and min(entry["done"], next(iter(found.values()))["done"]) > 1:
            probabilities = entry["probability_of_improvement"]
            rows.append([name, *(interval(probabilities[kind], 2) for kind in KINDS)])
    return table([f"P({next(iter(found))} scores more than ...)", *KINDS], rows) if rows else []


def overview(found: dict[str, Any]) -> list[str]:
    """
    Write the final scores of all contenders on all environments.

    :param found: Statistics of a comparison
    :return: Lines of Markdown, none for a single environment
    """
    if len(found) == 1:
        return []
    names = list(dict.fromkeys(name for of_env in found.values() for name in of_env))
    rows = []
    for env_id, of_env in found.items():
        means = [of_env[name][KINDS[-1] if name == "random" else KINDS[0]]["mean"] for name in names]
        rows.append([env_id, *(number(mean["value"], 1) if mean["n"] else "" for mean in means)])
    return ["## Overview", "", "Mean final score, deterministic (of random: stochastic):", "", *table(["", *names], rows)]


def seeds_section(runs: pd.DataFrame, value: Callable[[Any], str]) -> list[str]:
    """
    Write a value of each run, by seed and contender.

    :param runs: Runs in one environment
    :param value: Gives the text for a run that is done
    :return: Lines of Markdown
    """
    names = list(dict.fromkeys(runs["contender"]))
    rows = []
    for seed, of_seed in runs.groupby("seed", sort=False):
        by_name = {run.contender: run for run in of_seed.itertuples()}
        cells = [value(by_name[name]) if by_name[name].status == "done" else by_name[name].status for name in names]
        rows.append([str(seed), *cells])
    return table(["seed", *names], rows)


def runs_section(runs: pd.DataFrame) -> list[str]:
    """
    Write how many runs are in which state, and why runs have failed.

    :param runs: Runs of a comparison
    :return: Lines of Markdown
    """
    counts = {name: group["status"].value_counts() for name, group in runs.groupby("contender", sort=False)}
    rows = [[name, *(str(count.get(state, 0)) for state in STATES)] for name, count in counts.items()]
    lines = ["## Runs", "", *table(["", *STATES], rows)]
    failed = runs[runs["status"] == "failed"]
    for run in failed.itertuples():
        lines.append(f"* `{run.folder}` failed: `{run.error}` (`log.txt` there has the whole message)")
    return lines if failed.empty else [*lines, ""]


def caution(found: dict[str, Any]) -> list[str]:
    """
    Write what few runs cannot show.

    :param found: Statistics of a comparison
    :return: Lines of Markdown, none if there are enough runs
    """
    n = min((entry["done"] for of_env in found.values() for entry in of_env.values() if entry["done"]), default=0)
    if n == 0 or n >= MIN_RUNS:
        return []
    if n == 1:
        return ["**Caution:** one run shows nothing of how runs differ.", ""]
    return [
        f"**Caution:** {n} runs are few. The bootstrap only knows the runs that there are: its intervals are too narrow",
        f"with fewer than {MIN_RUNS}. Even if two contenders were equal, all {n} runs of the first would score more than all",
        f"{n} of the second in one case of {math.comb(2 * n, n)}: P would be 1.00 [1.00, 1.00].",
        "",
    ]


def environment_section(env_id: str, runs: pd.DataFrame, found: dict[str, Any], threshold: float | None) -> list[str]:
    """
    Write all about one environment.

    :param env_id: Id of the environment
    :param runs: Runs in the environment
    :param found: Statistics of the environment
    :param threshold: Return that the runs are to reach
    :return: Lines of Markdown
    """
    budgets = runs["num_timesteps"].dropna()
    lines = [f"## {env_id}", ""]
    if len(budgets):
        lines += [f"Time steps of a run: {number(budgets.min())} to {number(budgets.max())}. Final scores:", ""]
    lines += score_section(found) + efficiency_section(found, threshold) + improvement_section(found)
    for kind in KINDS:
        lines += [f"Each seed, {kind}:", ""]
        lines += seeds_section(runs, lambda run, kind=kind: number(getattr(run, kind), 1))  # type: ignore[misc]
    if threshold is not None:
        lines += [f"Steps until {threshold:g}:", ""]
        lines += seeds_section(runs[runs["algo"].notna()], lambda run: number(run.steps_to_threshold) or "never")
    return lines


def report(comparison: dict[str, Any], runs: pd.DataFrame, found: dict[str, Any], versions: list[dict[str, str]]) -> str:
    """
    Write the report of a comparison.

    :param comparison: What is compared
    :param runs: Its runs
    :param found: Their statistics
    :param versions: Versions of the packages, each set that was in use
    :return: The report, in Markdown
    """
    lines = ["# Comparison", ""]
    if comparison["command"]:
        lines += ["```", *command_lines(comparison["command"]), "```", ""]
    if versions:
        lines += ["; ".join(", ".join(f"{name} {text}" for name, text in used.items()) for used in versions) + ".", ""]
    lines += runs_section(runs)
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
    lines += caution(found) + overview(found)
    for env_id in comparison["envs"]:
        lines += environment_section(env_id, runs[runs["env"] == env_id], found[env_id], comparison["thresholds"][env_id])
    pictures = ["scores", *(name for name, _ in AXES.values())]
    lines += ["## Pictures", ""] + [f"![{ALT_TEXTS[name]}]({name}.png)\n" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def write_report(out: Path, svg: bool = False) -> None:
    """
    Write ``runs.csv``, ``results.json``, ``report.md`` and the pictures into the folder of a comparison.

    :param out: The folder
    :param svg: Whether to write the pictures as SVG too
    :raises ValueError: If the folder holds no comparison, or not its episodes
    """
    comparison = read_json(out / COMPARISON)
    if comparison is None:
        raise ValueError(f"--out {out} holds no comparison")
    if not has_episodes(out):
        raise ValueError(f"--out {out} holds a report without the episodes ({ARCHIVE}): it can be read, not written again")
    jobs = make_jobs(out, comparison)
    episodes = read_episodes(out, jobs)
    runs = read_runs(out, comparison, jobs, episodes)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.7g")
    found = statistics(runs)
    write_json(out / "results.json", {"statistics": found})
    (out / "report.md").write_text(report(comparison, runs, found, read_versions(comparison, jobs)))
    if not episodes.empty:
        plot_curves(make_curves(episodes), comparison, out, svg)
        plot_scores(runs, found, comparison, out, svg)
