"""``sb3-reinforce train --resume``: find a run, take its arguments, and set its files back to the saved training state."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sb3_reinforce.parallel import processes
from sb3_reinforce.resume.archive import load_latest
from sb3_reinforce.resume.capture import check_number_of_processes
from sb3_reinforce.zoo.arguments import Parser

#: Arguments of a run that its continuation does not take: those of the display are given anew, the hyperparameters, also
#: those of a trial, are in config.yml, and RL Zoo takes any text after --truncate-last-trajectory for true
NOT_CONTINUED = {
    *("command", "hyperparams", "progress", "resume", "truncate_last_trajectory", "verbose"),
    *("storage", "study_name", "trial_id"),
}


def has_ended(model: Path) -> bool:
    """
    Tell whether a run has had all its time steps.

    :param model: Where the run saves its model, at the end or when it is stopped
    :return: Whether the model is there, and has had them
    """
    try:
        with zipfile.ZipFile(model) as archive:
            data = json.loads(archive.read("data"))
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):  # The run was killed while it saved the model
        return False
    return data["num_timesteps"] >= data["_total_timesteps"]


def find_run(resume: str, arguments: Sequence[str]) -> Path | None:
    """
    Find the run to go on with.

    :param resume: A folder, ``latest``, or ``auto``: the latest run that has not ended
    :param arguments: Other arguments of ``train``
    :return: Folder of the run, ``None`` if ``auto`` finds none
    :raises ValueError: If the folder holds no such run, or ``latest`` finds none
    """
    folder = Path(resume)
    if resume in ("latest", "auto"):
        parser = Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--algo", default="ppo")
        parser.add_argument("--env", default="CartPole-v1")
        parser.add_argument("-f", "--log-folder", default="logs")
        args, _ = parser.parse_known_args(arguments)
        name = args.env.replace("/", "-")
        runs = [path for path in Path(args.log_folder, args.algo).glob(f"{name}_*") if any(path.glob("*.state"))]
        if resume == "auto":
            runs = [path for path in runs if not has_ended(path / f"{name}.zip")]
            if not runs:
                return None
        if not runs:
            raise ValueError(f"no run of {args.algo} in {args.env} has a training state in --log-folder {args.log_folder}")
        folder = max(runs, key=lambda path: max(state.stat().st_mtime for state in path.glob("*.state")))
    if not any(folder.glob("*/args.yml")) or not any(folder.glob("*.state")):
        raise ValueError(
            f"--resume {resume} must be 'latest', 'auto', or the folder of a run with a training state (--save-freq)"
        )
    return folder


def arguments_of_run(folder: Path, arguments: Sequence[str]) -> list[str]:
    """
    Write the arguments of a run as they would be typed.

    :param folder: Folder of the run
    :param arguments: Arguments of the command that goes on with the run, of which those of the display are kept
    :return: Arguments of RL Zoo's ``train``
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-P", "--progress", action="store_true")
    parser.add_argument("--verbose", type=int, default=1)
    display, _ = parser.parse_known_args(arguments)
    (path,) = folder.glob("*/args.yml")
    saved: dict[str, Any] = dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))  # Which RL Zoo reads it with, too
    written = [f"--verbose={display.verbose}", *(["--progress"] if display.progress else [])]
    for name, value in saved.items():
        option = "--" + name.replace("_", "-")
        if name in NOT_CONTINUED or value is None or value is False or value in ("", [], {}):
            continue
        if value is True:
            written.append(option)
        elif isinstance(value, dict):
            written += [option, *(f"{key}:{setting!r}" for key, setting in value.items())]
        elif isinstance(value, list):
            written += [option, *map(str, value)]
        else:
            written.append(f"{option}={value}")
    return written


def saved_hyperparams(params_path: str) -> dict[str, Any]:
    """
    Read the hyperparameters of a run.

    :param params_path: Where RL Zoo has saved its settings
    :return: The hyperparameters, as an entry of a file of them
    """
    return dict(yaml.load(Path(params_path, "config.yml").read_text(), Loader=yaml.UnsafeLoader))


def is_before(row: str, column: int, seconds: float) -> bool:
    """
    Tell whether an episode ended before a time.

    :param row: Row of a monitor file
    :param column: Where its time is
    :param seconds: The time
    :return: Whether the row is complete, and from before that time
    """
    try:
        return float(row.split(",")[column]) <= seconds
    except (IndexError, ValueError):  # A full disk, or a machine that was switched off, has torn the row
        return False


def cut_monitor_files(folder: Path) -> list[float]:
    """
    Remove the episodes that ended after the training state was saved from this process's monitor files: they come again.

    :param folder: Folder of the run
    :return: When each environment's first monitor started, in seconds since the epoch: the times in the files go on
    :raises ValueError: If the folder has no sound training state, or one of another number of processes
    """
    state, _ = load_latest(folder)
    check_number_of_processes(state)
    rank = processes.rank()
    own_state = state["processes"][rank]
    n_envs = own_state["env"]["n_envs"]
    starts = []
    for index in range(rank * n_envs, (rank + 1) * n_envs):
        path = folder / f"{index}.monitor.csv"
        header, names, *rows = path.read_text().splitlines()
        start = json.loads(header[1:])["t_start"]
        column = names.split(",").index("t")
        rows = [row for row in rows if is_before(row, column, own_state["time"] - start)]
        beside = path.with_suffix(".part")
        beside.write_text("\n".join([header, names, *rows, ""]))
        beside.replace(path)
        starts.append(start)
    return starts
