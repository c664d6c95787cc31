"""Who takes part in a comparison: algorithms of RL Zoo under names, each with its hyperparameters for every environment."""

import io
import re
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import rl_zoo3
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce.checks import closest
from sb3_reinforce.compare.references import REFERENCES
from sb3_reinforce.zoo.arguments import plain_value
from sb3_reinforce.zoo.entries import check_keys
from sb3_reinforce.zoo.exp_manager import ExperimentManager
from sb3_reinforce.zoo.hyperparams import find_file, read_hyperparams

#: Settings of a variant that say where its hyperparameters come from
SOURCES = ("conf_file", "entry")


class Contender(NamedTuple):
    """
    A row of a comparison.

    :param name: Its name in the comparison
    :param algo: Algorithm, as on the command line of RL Zoo
    :param settings: Hyperparameters that differ from the entry of the environment, and ``conf_file`` and ``entry``
    """

    name: str
    algo: str
    settings: dict[str, Any]


def split_items(text: str) -> list[str]:
    """
    Split a text at its commas.

    :param text: Items with commas between them
    :return: The items: a comma in brackets is part of one
    """
    items, depth = [""] if text else [], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return items


def parse_contender(text: str) -> Contender:
    """
    Read a contender as it is written on the command line.

    :param text: ``ALGO`` or ``NAME=ALGO:key:value,key:value``, with the values of ``train -params``. ``conf_file`` names a
        YAML file of hyperparameters, ``entry`` the entry to take from the file, instead of that of the environment
    :return: The contender
    :raises ValueError: If the text is of another form, or there is no such algorithm
    """
    match = re.fullmatch(r"(?:(\w[\w.-]*)=)?([^:=]+)(?::(.+))?", text)
    if match is None or (match[3] and not match[1]):
        raise ValueError(f"{text!r} must be ALGO or NAME=ALGO:key:value,key:value (NAME of letters, digits and . - _)")
    name, algo = match[1] or match[2], match[2]
    if algo not in ALGOS:
        raise ValueError(f"{algo!r} is no algorithm, did you mean {closest(algo, list(ALGOS))!r}?")
    if algo == "ars":
        raise ValueError("'ars' cannot be compared: it does not tell callbacks when episodes end, so none could be recorded")
    if name in REFERENCES:
        raise ValueError(f"{name!r} is the name of a reference, choose another one")
    settings: dict[str, Any] = {}
    for item in split_items(match[3] or ""):
        key, colon, value = item.partition(":")
        if not colon:
            raise ValueError(f"{item!r} in {text!r} must be key:value")
        try:
            settings[key.strip()] = plain_value(value.strip())
        except ValueError as error:
            raise ValueError(f"{item!r} in {text!r}: {error}") from error
    conf_file = settings.get("conf_file", "hyperparams.yml")
    if not (isinstance(conf_file, str) and str(find_file(conf_file)).endswith((".yml", ".yaml"))):
        raise ValueError(f"conf_file:{conf_file} must be a .yml file, or the name of one that comes with the package")
    return Contender(name, algo, settings)


def check_env(env_id: str) -> None:
    """
    Check that an environment is registered.

    :param env_id: Id of an environment
    :raises ValueError: If there is no such environment
    """
    if env_id not in gym.registry:
        raise ValueError(f"{env_id!r} is no environment, did you mean {closest(env_id, list(gym.registry))!r}?")


def read_entries(algo: str, conf_file: str | None) -> dict[str, Any]:
    """
    Read the hyperparameters of an algorithm.

    :param algo: Algorithm
    :param conf_file: A file of hyperparameters, ``None`` for RL Zoo's and those of this package
    :return: Its entries
    :raises ValueError: If there is no such file, or it is not YAML
    """
    if conf_file is None:
        zoo = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml"
        return {**(read_entries(algo, str(zoo)) if zoo.is_file() else {}), **read_hyperparams(algo)}
    try:
        entries = yaml.safe_load(Path(str(find_file(conf_file))).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"conf_file:{conf_file} cannot be read: {error}") from error
    if not (isinstance(entries, dict) and entries and all(isinstance(entry, dict) for entry in entries.values())):
        raise ValueError(f"conf_file:{conf_file} must have an entry, with keys, for each environment")
    return entries


def try_out(manager: ExperimentManager, hyperparams: dict[str, Any], name: str) -> None:
    """
    Set up environments and model, and drop them.

    :param manager: An experiment manager
    :param hyperparams: Hyperparameters, which this changes
    :param name: Name of the contender
    :raises ValueError: If they cannot be set up
    """
    env = None
    preprocessed, manager.env_wrapper, _, manager.vec_env_wrapper = manager._preprocess_hyperparams(hyperparams)
    manager.vec_env_class = DummyVecEnv  # In this process
    try:
        env = manager.create_envs(manager.n_envs, no_log=True)
        ALGOS[manager.algo](env=env, device="cpu", **manager._preprocess_action_noise(preprocessed, {}, env))
    except Exception as error:
        raise ValueError(f"{name} cannot be set up on {manager.env_name.gym_id}: {error!r}") from error
    finally:
        if env is not None:
            env.close()


def resolve(contender: Contender, env_id: str, n_timesteps: int, vec_env: str = "dummy") -> dict[str, Any]:
    """
    Find the hyperparameters of a contender, and check that they can be used.

    :param contender: A contender
    :param env_id: Id of an environment
    :param n_timesteps: Number of time steps, not positive for that of the entry
    :param vec_env: Kind of the vectorized environment
    :return: Its hyperparameters, as an entry of a file of RL Zoo
    :raises ValueError: If there are none, or the algorithm cannot be set up with them
    """
    overrides = {key: value for key, value in contender.settings.items() if key not in SOURCES}
    conf_file, entry = (contender.settings.get(key) for key in SOURCES)

    def make_manager(**kwargs: Any) -> ExperimentManager:
        return ExperimentManager(
            None, contender.algo, env_id, "", n_timesteps=n_timesteps, vec_env_type=vec_env, verbose=0, **kwargs
        )

    with redirect_stdout(io.StringIO()) as printed:
        manager = make_manager(config=conf_file, hyperparams=overrides)
        if entry is not None:
            entries = read_entries(contender.algo, conf_file)
            check_keys([entry], entries, f"an entry of {conf_file or contender.algo}")
            hyperparams = {**entries[entry], **overrides}
        else:
            hyperparams, _ = manager.read_hyperparameters()
        try_out(make_manager(), deepcopy(hyperparams), contender.name)
    if "Using 'default' hyperparameters" in printed.getvalue():
        print(f"{contender.name} has no entry for {env_id}: 'default' is used")
    if n_timesteps > 0:
        hyperparams["n_timesteps"] = n_timesteps
    return hyperparams
