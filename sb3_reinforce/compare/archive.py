"""
The episodes of all finished runs of a comparison, in one compressed file.

A run leaves ``episodes.csv`` and ``result.json`` in its folder. :func:`pack` moves what they hold into the archive, so that
the folders of the runs are needed neither for a report nor to go on with the comparison.
"""

import lzma
import os
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from sb3_reinforce.compare.files import (
    ARCHIVE,
    COMPARISON,
    EPISODES,
    KINDS,
    RESULT,
    RUNS,
    make_jobs,
    path_beside,
    read_json,
    write_json,
)

#: Columns that tell runs apart
KEYS = ("contender", "env", "seed")

#: Columns of the archive. ``phase`` is ``"training"``, ``"deterministic"`` or ``"stochastic"``. Episodes of an evaluation
#: stand at the end of training, and have no length
COLUMNS: dict[str, Any] = {
    **{"contender": str, "env": str, "seed": int, "phase": str},
    **{"num_timesteps": int, "seconds": float, "return": float, "length": "Int64"},
}

#: Lines that begin alike would make LZMA compare each with very many others: a small depth is ten times as fast
COMPRESSION = {"method": "xz", "filters": [{"id": lzma.FILTER_LZMA2, "preset": 6, "depth": 8}]}


def has_episodes(out: Path) -> bool:
    """
    Tell whether the folder of a comparison has room for what a report is made of, not only a report.

    :param out: Folder of a comparison
    :return: Whether there are an archive or folders of runs
    """
    return (out / ARCHIVE).is_file() or (out / RUNS).is_dir()


def read_run(folder: Path, job: dict[str, Any]) -> pd.DataFrame:
    """
    Read the episodes of a finished run from its folder.

    :param folder: Folder of the run
    :param job: The run
    :return: Its episodes, in the columns of the archive
    """
    result = read_json(folder / RESULT)
    end = {"num_timesteps": result.get("num_timesteps", 0), "seconds": result.get("seconds", 0.0)}
    pieces = [pd.DataFrame({"phase": kind, **end, "return": result[kind]}) for kind in KINDS if kind in result]
    if job["algo"] is not None:
        training = pd.read_csv(folder / EPISODES, float_precision="round_trip").assign(phase="training")
        pieces = [training, *pieces] if len(training) else pieces
    return pd.concat(pieces).assign(**{key: job[key] for key in KEYS}).reindex(columns=list(COLUMNS)).astype(COLUMNS)


def read_archive(out: Path) -> pd.DataFrame:
    """
    Read the archive of a comparison.

    :param out: Folder of the comparison
    :return: The episodes, none if there is no archive
    """
    if not (out / ARCHIVE).is_file():
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    # A contender may be called "nan"
    blank = {"return": [""], "length": [""]}
    return pd.read_csv(
        out / ARCHIVE, dtype=COLUMNS, keep_default_na=False, na_values=blank, float_precision="round_trip"
    )  # fmt: skip


def unpacked(jobs: dict[Path, dict[str, Any]]) -> list[Path]:
    """
    List the runs that have finished and are not in the archive yet.

    :param jobs: The runs of a comparison, by their folders
    :return: Folders of those runs
    """
    return [folder for folder in jobs if (folder / RESULT).is_file()]


def read_episodes(out: Path, jobs: dict[Path, dict[str, Any]]) -> pd.DataFrame:
    """
    Read the episodes of all finished runs, from their folders and from the archive.

    :param out: Folder of a comparison
    :param jobs: The runs of the comparison, by their folders
    :return: The episodes, run by run in the order of the jobs
    """
    runs = {tuple(jobs[folder][key] for key in KEYS): read_run(folder, jobs[folder]) for folder in unpacked(jobs)}
    runs = {**dict(iter(read_archive(out).groupby(list(KEYS), sort=False))), **runs}
    keys = [tuple(job[key] for key in KEYS) for job in jobs.values()]
    pieces = [runs[key] for key in keys if key in runs]
    return pd.concat(pieces, ignore_index=True) if pieces else read_archive(out)


def read_versions(comparison: dict[str, Any], jobs: dict[Path, dict[str, Any]]) -> list[dict[str, str]]:
    """
    List the versions of the packages that the finished runs have used.

    :param comparison: What is compared
    :param jobs: The runs of the comparison, by their folders
    :return: Each set of versions once
    """
    found = list(comparison.get("versions", []))
    for folder in unpacked(jobs):
        used = read_json(folder / RESULT)["versions"]
        found += [] if used in found else [used]
    return found


def pack(out: Path) -> None:
    """
    Move the episodes of the runs that have finished into the archive, atomically: an interruption loses nothing.

    :param out: Folder of a comparison
    """
    # Two comparisons of one folder would overwrite each other's runs
    with FileLock(out / RUNS / ".lock"):
        comparison = read_json(out / COMPARISON)
        jobs = make_jobs(out, comparison)
        finished = unpacked(jobs)
        if not finished:
            return
        write_json(out / COMPARISON, {**comparison, "versions": read_versions(comparison, jobs)})
        beside = path_beside(out / ARCHIVE)
        read_episodes(out, jobs).to_csv(beside, index=False, compression=COMPRESSION)
        os.replace(beside, out / ARCHIVE)
        for folder in finished:
            # In this order: episodes without a result are no finished run
            (folder / RESULT).unlink()
            (folder / EPISODES).unlink(missing_ok=True)
