"""
Training states as files: a zip archive, whose checksums tell a damaged one, of ``state.pt`` (what :func:`capture` gives in
each process) and ``model.zip`` (SB3's own archive).
"""

import _codecs
import io
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from filelock import FileLock, Timeout
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_reinforce.checks import versions
from sb3_reinforce.parallel import processes
from sb3_reinforce.resume.capture import capture

#: Changes when states of one version cannot be read by the other
FORMAT_VERSION = 3

_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray

#: What PyTorch may make of a state besides its own types: NumPy's arrays and numbers
SAFE_GLOBALS = [
    bytes,
    _codecs.encode,
    np.ndarray,
    np.dtype,
    _multiarray._reconstruct,
    _multiarray.scalar,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdg"),
]


def save_state(path: Path, model: BaseAlgorithm, callback: BaseCallback) -> None:
    """
    Save a training state atomically: to a temporary file that replaces the old one, also when the disk is full or the power
    fails. Of several processes, all take part, and the first one writes.

    :param path: Path of the file
    :param model: A model, between two updates
    :param callback: The callback that its training calls
    """
    state: dict[str, Any] = {"processes": processes.gather(capture(model, callback))}
    if processes.rank() > 0:
        return
    state |= {
        "version": FORMAT_VERSION,
        "num_timesteps": model.num_timesteps,
        "log_dir": model.logger.dir,
        "device": model.device.type,
        "versions": versions(),
    }
    contents, model_file = io.BytesIO(), io.BytesIO()
    th.save(state, contents)
    model.save(model_file)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("state.pt", contents.getvalue())
                archive.writestr("model.zip", model_file.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Any], bytes]:
    """
    Read a training state. Nothing in it is executed: the model is given back as the bytes of SB3's archive.

    :param path: Path of the file
    :return: The state, with the results of :func:`~sb3_reinforce.resume.capture.capture` in each process, and the model
    :raises ValueError: If it is no training state, is damaged, or is of another version
    """
    try:
        with zipfile.ZipFile(path) as archive:
            is_old = "manifest.json" in archive.namelist()
            contents = {} if is_old else {name: archive.read(name) for name in ("state.pt", "model.zip")}
        if not is_old:
            with th.serialization.safe_globals(SAFE_GLOBALS):
                state = th.load(io.BytesIO(contents["state.pt"]), weights_only=True)
            format_version = state["version"]
    except Exception as error:  # A file of any content gives errors of any kind
        raise ValueError(f"{path} is no training state, or is damaged ({' '.join(str(error).split())[:200]})") from error
    if is_old or format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a training state of {'an earlier version' if is_old else f'version {format_version}'}, this package "
            f"reads version {FORMAT_VERSION}. The model in it can be taken out: unzip {path.name} model.zip"
        )
    return state, contents["model.zip"]


def n_steps_of(state: Path) -> int:
    """
    Read the number of time steps in the name of a training state.

    :param state: Path of the training state
    :return: Number of time steps
    """
    return int(state.stem.split("_")[-2])


def find_states(folder: Path, name_prefix: str | None = None) -> list[Path]:
    """
    Find the training states in a folder.

    :param folder: A folder
    :param name_prefix: Beginning of their names, ``None`` for any
    :return: Their paths, the latest first
    """
    pattern = rf"{'.*' if name_prefix is None else re.escape(name_prefix)}_\d+_steps\.state"
    found = [path for path in folder.glob("*_steps.state") if re.fullmatch(pattern, path.name)]
    return sorted(found, key=n_steps_of, reverse=True)


def load_latest(path: Path) -> tuple[dict[str, Any], bytes]:
    """
    Read a training state, or the latest sound one of a folder. All processes have to call this.

    :param path: A training state, or a folder of them
    :return: As :func:`load_state`
    :raises ValueError: If there is none
    """
    return processes.on_first(lambda: _load_latest(path))


def _load_latest(path: Path) -> tuple[dict[str, Any], bytes]:
    if not path.is_dir():
        return load_state(path)
    for candidate in find_states(path):
        try:
            return load_state(candidate)
        except ValueError as error:
            warnings.warn(f"{error}: the one before it is tried")
    raise ValueError(f"There is no sound training state in {path}")


def lock(folder: Path) -> FileLock:
    """
    Claim a run for this process, until it ends.

    :param folder: Folder of training states
    :return: The claim, which can be released
    :raises ValueError: If another process has claimed it
    """
    claim = FileLock(folder / ".lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        claim.acquire()
    except Timeout as error:
        raise ValueError(
            f"The run in {folder} is still training, in another process (or has failed in one that has not ended)"
        ) from error
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error}): see to it that nothing else goes on with this run meanwhile")
    return claim
