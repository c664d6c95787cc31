"""
All patches of upstream packages, each with the defect that it waits for.

``tests/test_zoo_upstream.py`` asserts that the defects are still there: a test that fails there names a patch that can go.
The versions are those of the installation that the patches were written for. Packages are imported inside the functions,
because each command needs some of them only, and importing RL Zoo takes seconds.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

#: The processes that RL Zoo's scripts start, and our commands that take their place
CHILDREN = {("python", "enjoy.py"): "enjoy", ("python", "-m", "rl_zoo3.record_video"): "record_video"}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """
    Give an attribute another value for a while.

    :param owner: A module or an object
    :param name: Name of its attribute
    :param value: Value of the attribute within the ``with`` statement
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def experiment_manager(manager: Callable[..., Any]) -> Iterator[None]:
    """
    Let ``rl_zoo3.train`` construct another experiment manager.

    rl_zoo3 2.9.2 has no argument for it. Its documentation has users replace names in its modules (page "SBX"), and its
    issue 384 advises a fork for a new algorithm. Waits for ``train(manager=...)`` or an entry point for plug-ins, which is
    not reported yet.

    :param manager: A subclass of RL Zoo's experiment manager, or a function that makes one
    """
    from rl_zoo3 import train

    with replaced(train, "ExperimentManager", manager):
        yield


@contextmanager
def vec_env_options(start_index: int, appends: bool) -> Iterator[None]:
    """
    Let ``ExperimentManager.create_envs`` number its monitor files from another index than 0, and go on with existing ones.

    rl_zoo3 2.9.2 calls ``make_vec_env`` without ``start_index``, so that several processes would write one monitor file, and
    replaces ``monitor_kwargs`` for some environments, so that ``override_existing`` cannot be given there. Not reported yet.

    :param start_index: Index of the first environment
    :param appends: Whether to append to the monitor files that are there
    """
    from rl_zoo3 import exp_manager
    from stable_baselines3.common.env_util import make_vec_env

    def make(env_id: Any, n_envs: int = 1, **kwargs: Any) -> Any:
        if appends:
            kwargs["monitor_kwargs"] = {**(kwargs.get("monitor_kwargs") or {}), "override_existing": False}
        return make_vec_env(env_id, n_envs, start_index=start_index, **kwargs)

    with replaced(exp_manager, "make_vec_env", make):
        yield


def call_child(command: Sequence[str], *args: Any, options: Sequence[str] = (), **kwargs: Any) -> int:
    """
    Call our command where RL Zoo asks for its own, and anything else as it is.

    :param command: Program and arguments
    :param options: Arguments to add to our command
    :return: Exit status of the process
    """
    for prefix, ours in CHILDREN.items():
        if tuple(command[: len(prefix)]) == prefix:
            command = [sys.executable, "-m", "sb3_reinforce", ours, *command[len(prefix) :], *options]
    with subprocess.Popen(command, *args, **kwargs) as process:
        return process.wait()


@contextmanager
def children(options: Sequence[str]) -> Iterator[None]:
    """
    Let RL Zoo's scripts start our commands.

    rl_zoo3 2.9.2 starts ``python enjoy.py``, which exists in a checkout of it only, and ``python -m rl_zoo3.record_video``,
    which knows no registered algorithm. ``benchmark`` then prints an empty table and exits with 0. Not reported yet.

    :param options: Arguments that our commands need besides those of RL Zoo
    """
    with replaced(subprocess, "call", partial(call_child, options=options)):
        yield


def generate_metadata(*args: Any) -> dict[str, Any]:
    """
    Generate the metadata of a model card.

    rl_zoo3 2.9.2 imports the function from ``huggingface_sb3.push_to_hub`` under the name, and with the type of the result,
    that it had before sb3-team-hf-integration 3.0. Without it ``push_to_hub`` ends with an ImportError, see a comment in
    huggingface_sb3's issue 54.

    :return: The metadata
    """
    return import_module("huggingface_sb3.push_to_hub")._generate_metadata(*args).to_dict()


def load_from_hub(repo_id: str, filename: str, *, original: Callable[[str, str], str]) -> str:
    """
    Download a file from the hub.

    rl_zoo3 2.9.2 takes the ``HTTPError`` of requests for a missing file, and goes on without normalization. The error of
    huggingface_hub 2 is another one, since it no longer uses requests. Not reported yet.

    :param repo_id: A repository on the hub
    :param filename: A file in it
    :param original: The function of ``huggingface_sb3``
    :return: Path of the downloaded file
    :raises HTTPError: If the hub has no such file; not if the hub cannot be reached
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from requests.exceptions import HTTPError

    try:
        return original(repo_id, filename)
    except RemoteEntryNotFoundError as error:
        raise HTTPError(str(error)) from error


def save_metadata(path: Path, metadata: dict[str, Any], *, original: Callable[[Path, dict[str, Any]], None]) -> None:
    """
    Add the metadata to a model card, and replace the commands in the card of a REINFORCE agent.

    rl_zoo3 2.9.2 writes its own commands into every card. They do not know ``reinforce``. Not reported yet.

    :param path: The card
    :param metadata: Result of :func:`generate_metadata`
    :param original: The function of ``huggingface_hub``
    """
    if metadata["model-index"][0]["name"] == "REINFORCE":
        card = path.read_text(encoding="utf-8")
        card = re.sub(r"If you installed the RL Zoo3 via pip .*?```\n\n", "", card, flags=re.DOTALL)
        card = card.replace("python -m rl_zoo3.", "sb3-reinforce ")
        card = card.replace("pip install rl_zoo3", "pip install -e .  # in a checkout of sb3_reinforce")
        path.write_text(card, encoding="utf-8")
    original(path, metadata)


@contextmanager
def hub_functions() -> Iterator[None]:
    """Let RL Zoo's commands, which have to be imported within the ``with`` statement, work with the current hub packages."""
    import huggingface_sb3
    from huggingface_hub import repocard

    push_to_hub = import_module("huggingface_sb3.push_to_hub")  # The package has a function of the same name
    push_to_hub.__dict__.setdefault("generate_metadata", generate_metadata)
    download = partial(load_from_hub, original=huggingface_sb3.load_from_hub)
    save = partial(save_metadata, original=repocard.metadata_save)
    with replaced(huggingface_sb3, "load_from_hub", download), replaced(repocard, "metadata_save", save):
        yield


@contextmanager
def action_masks() -> Iterator[None]:
    """
    Let the agents of REINFORCE that RL Zoo's scripts load, which have to be imported within the ``with`` statement, go by the
    action masks of the environment that the script has made, with the ``env_kwargs`` of its entry.

    rl_zoo3 2.9.2 calls ``model.predict`` without masks, and has no ``MaskablePPO`` among its algorithms. Its ``record_video``
    and ``push_to_hub`` leave out the ``env_kwargs`` of the entry.
    """
    import rl_zoo3
    from rl_zoo3 import utils

    from sb3_reinforce.masks import of_environment
    from sb3_reinforce.reinforce import REINFORCE

    envs: list[Any] = []
    create = utils.create_test_env

    def create_test_env(*args: Any, **kwargs: Any) -> Any:
        of_entry = (kwargs.get("hyperparams") or {}).pop("env_kwargs", None) or {}
        envs.append(create(*args, **{**kwargs, "env_kwargs": {**of_entry, **(kwargs.get("env_kwargs") or {})}}))
        return envs[-1]

    def load(*args: Any, original: Callable[..., Any] = REINFORCE.load, **kwargs: Any) -> Any:
        return of_environment(original(*args, **kwargs), envs[-1])

    with ExitStack() as stack:
        for module in (rl_zoo3, utils):
            stack.enter_context(replaced(module, "create_test_env", create_test_env))
        stack.enter_context(mock.patch.object(REINFORCE, "load", load))
        yield
