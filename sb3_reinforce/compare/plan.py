"""The plan of a comparison: what is asked for, checked before anything is written, and the folder that holds it."""

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from sb3_reinforce.checks import check_number
from sb3_reinforce.compare.archive import has_episodes
from sb3_reinforce.compare.contenders import check_env, parse_contender, resolve
from sb3_reinforce.compare.files import ARCHIVE, COMPARISON, OF_ENVIRONMENT, RUNS, hyperparams_path, read_json, write_json
from sb3_reinforce.compare.references import make_env
from sb3_reinforce.zoo import register

#: What must be the same to go on with a comparison. Seeds can be added
IDENTITY = ("envs", "contenders", "seeds", "eval_freq", "n_eval_episodes", "thresholds", "gym_packages", "vec_env")


def check_unique(name: str, values: Sequence[Any]) -> None:
    """
    Check that there are values, and none of them twice.

    :param name: Name of the argument
    :param values: Its values
    :raises ValueError: If there are none, or one is there twice
    """
    if not values:
        raise ValueError(f"--{name} is empty")
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"--{name}: {value!r} is given twice")


def describe_contenders(envs: Sequence[str], algos: Sequence[str], n_timesteps: int, vec_env: str) -> dict[str, Any]:
    """
    Look up the hyperparameters of the contenders, and add the references that there are.

    :param envs: Ids of environments
    :param algos: Algorithms, ``ALGO`` or ``NAME=ALGO:key:value,key:value``
    :param n_timesteps: Number of time steps of a run, not positive: as the entries of the algorithms say
    :param vec_env: Kind of the vectorized environments
    :return: By name: algorithm, and hyperparameters for each environment
    :raises ValueError: If a contender cannot be set up, or contenders cannot be compared
    """
    contenders = [parse_contender(text) for text in algos]
    for name, count in Counter(contender.name for contender in contenders).items():
        if count > 1:
            raise ValueError(f"--algos: the name {name!r} is given twice")
    described: dict[str, Any] = {}
    for contender in contenders:
        hyperparams = {env_id: resolve(contender, env_id, n_timesteps, vec_env) for env_id in envs}
        described[contender.name] = {"algo": contender.algo, "hyperparams": hyperparams}
    for env_id in envs:
        entries = {name: settings["hyperparams"][env_id] for name, settings in described.items()}
        budgets = {name: entry["n_timesteps"] for name, entry in entries.items()}
        if len({*budgets.values()}) > 1:
            steps = ", ".join(f"{name} {budget:,.0f}" for name, budget in budgets.items())
            raise ValueError(f"{env_id}: the entries have different numbers of steps ({steps}), choose one with -n")
        for key in OF_ENVIRONMENT:
            values = [entry.get(key) or {} for entry in entries.values()]
            if any(value != values[0] for value in values):
                raise ValueError(f"{env_id}: the contenders have different {key} {values}: their scores would not compare")
    (first, *_) = described.values()
    described["random"] = {"algo": None}
    if all(has_zero_action(env_id, first["hyperparams"][env_id]) for env_id in envs):
        described["zero_action"] = {"algo": None}
    return described


def has_zero_action(env_id: str, settings: dict[str, Any]) -> bool:
    """
    Tell whether the action of zeros means something in an environment.

    :param env_id: Id of an environment
    :param settings: Hyperparameters of those that learn
    :return: Whether actions are continuous
    """
    env = make_env(env_id, settings)
    env.close()
    return isinstance(env.action_space, gym.spaces.Box)


def describe(
    envs: Sequence[str],
    algos: Sequence[str],
    seeds: Sequence[int],
    n_timesteps: int,
    eval_freq: int,
    n_eval_episodes: int,
    thresholds: Sequence[float] | None,
    gym_packages: Sequence[str],
    vec_env: str,
) -> dict[str, Any]:
    """
    Check what is asked for. Parameters as in :func:`~sb3_reinforce.compare.runner.compare`.

    :return: What is compared, with all hyperparameters
    :raises ValueError: If it cannot be run
    """
    register()
    for module in gym_packages:
        import_module(module)
    for name, values in (("env", envs), ("algos", algos), ("seeds", seeds)):
        check_unique(name, values)
    for seed in seeds:
        check_number("seeds", seed, 0, 2**31 - 1, integer=True)
    check_number("eval_freq", eval_freq, -1, integer=True)
    check_number("n_eval_episodes", n_eval_episodes, 1, integer=True)
    for env_id in envs:
        check_env(env_id)
    if thresholds is None:
        given = [gym.spec(env_id).reward_threshold for env_id in envs]
    elif len(thresholds) in (1, len(envs)):
        given = [*thresholds] * (len(envs) if len(thresholds) == 1 else 1)
    else:
        raise ValueError(f"--thresholds: {len(thresholds)} are given, it must be one, or one per environment")
    return {
        "envs": list(envs),
        "contenders": describe_contenders(envs, algos, n_timesteps, vec_env),
        "seeds": list(seeds),
        "eval_freq": eval_freq,
        "n_eval_episodes": n_eval_episodes,
        "thresholds": dict(zip(envs, given, strict=True)),
        "gym_packages": list(gym_packages),
        "vec_env": vec_env,
    }


def find_difference(there: Any, asked: Any, name: str) -> str | None:
    """
    Find the first value in which two descriptions differ.

    :param there: What is there
    :param asked: What is asked for
    :param name: Its name
    :return: The difference in words; ``None`` if there is none
    """
    if isinstance(there, dict) and isinstance(asked, dict):
        if there.keys() != asked.keys():
            return f"{name} are {', '.join(there)}, not {', '.join(asked)}"
        differences = (find_difference(there[key], asked[key], f"{name}.{key}") for key in there)
        return next(filter(None, differences), None)
    return None if there == asked else f"{name} is {there}, not {asked}"


def check_resumable(out: Path, there: dict[str, Any], comparison: dict[str, Any]) -> None:
    """
    Check that a folder holds the comparison that is to be gone on with.

    :param out: The folder
    :param there: The comparison in the folder
    :param comparison: The comparison that is asked for
    :raises ValueError: If they differ, or there are no episodes to go on from
    """
    asked = {**comparison, "seeds": comparison["seeds"][: len(there.get("seeds", []))]}
    for key in IDENTITY:
        if difference := find_difference(there.get(key), asked[key], key):
            raise ValueError(f"--out {out} holds another comparison: its {difference}")
    if not has_episodes(out):
        raise ValueError(f"--out {out} holds a report without the episodes ({ARCHIVE}): it cannot be gone on with")


def open_folder(out: Path, comparison: dict[str, Any], resume: bool) -> dict[str, Any]:
    """
    Make the folder of a comparison, or check that it holds the same one.

    :param out: The folder
    :param comparison: What is compared
    :param resume: Whether to go on with what the folder holds
    :return: What is compared, as the folder now says
    :raises ValueError: If the folder holds something else, or cannot be made
    """
    there = read_json(out / COMPARISON)
    if there is not None:
        if not resume:
            raise ValueError(f"--out {out} holds a comparison already: choose another folder, or go on with --resume")
        check_resumable(out, there, comparison)
        comparison = there if there["seeds"] == comparison["seeds"] else {**there, **comparison}
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} must be a folder that does not exist or is empty, or that of a comparison")
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error}") from error
    for name, settings in comparison["contenders"].items():
        if settings["algo"] is not None:
            path = hyperparams_path(out, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(settings["hyperparams"]))
    write_json(out / COMPARISON, comparison)
    return comparison
