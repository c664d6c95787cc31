"""
The hyperparameters that come with the package, one file per algorithm.

As a module it is a configuration of RL Zoo: ``python -m rl_zoo3.train --algo reinforce -conf sb3_reinforce.zoo.hyperparams``.
"""

from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """
    Find a folder that comes with the package.

    :param name: Its name in a checkout, where it lies beside the package
    :return: The folder, which is part of an installed package
    """
    installed = PACKAGE / name.replace("-", "_")
    return installed if installed.is_dir() else PACKAGE.parent / name


FOLDER = shipped("hyperparams")
AGENTS = shipped("rl-trained-agents")


def read_hyperparams(algo: str) -> dict[str, Any]:
    """
    Read the hyperparameters that come with the package.

    :param algo: Name of an algorithm, as on the command line
    :return: Its hyperparameters, one entry per environment; empty if there is no file for it
    """
    path = FOLDER / f"{algo}.yml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def find_file(name: str | None) -> str | None:
    """
    Find a file of hyperparameters.

    :param name: A file, a module, or the name of a file that comes with the package, such as ``mujoco``
    :return: Path of the package's file if the name is that of one, otherwise the name
    """
    path = FOLDER / f"{name}.yml"
    return str(path) if name and "/" not in name and path.is_file() else name


hyperparams = read_hyperparams("reinforce")
