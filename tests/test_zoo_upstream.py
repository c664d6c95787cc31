"""
The defects of upstream packages that ``sb3_reinforce/zoo/upstream.py`` waits for.

A test that fails here says that a patch can go, or has to be looked at again.
"""

import inspect
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from sb3_reinforce.zoo import upstream
from tests.zoo_command import FORKSERVER

RL_ZOO = Path(find_spec("rl_zoo3").origin).parent


def source(name):
    """:return: Source of a module of RL Zoo, without importing it"""
    return (RL_ZOO / f"{name}.py").read_text()


def test_experiment_manager():
    """There is no way to hand another manager to RL Zoo's train."""
    assert "def train() -> None:" in source("train")
    assert "\n    exp_manager = ExperimentManager(\n" in source("train")


@pytest.mark.parametrize("name", ["enjoy", "record_video", "push_to_hub"])
def test_action_masks(name):
    """RL Zoo knows no masks."""
    assert "action_masks" not in source(name) and "create_test_env" in source(name)


def test_env_kwargs_of_an_entry():
    """RL Zoo's ``record_video`` and ``push_to_hub`` leave them out."""
    for name in ("record_video", "push_to_hub"):
        assert 'hyperparams["env_kwargs"]' not in source(name)
    import rl_zoo3

    def is_sutton_barto(**kwargs):
        with upstream.action_masks():
            env = rl_zoo3.create_test_env("CartPole-v1", should_render=False, **kwargs)
        return env.unwrapped.envs[0].unwrapped._sutton_barto_reward

    assert not is_sutton_barto(hyperparams={})
    assert is_sutton_barto(hyperparams={"env_kwargs": {"sutton_barto_reward": True}})
    given = {"env_kwargs": {"sutton_barto_reward": False}}
    assert not is_sutton_barto(hyperparams={"env_kwargs": {"sutton_barto_reward": True}}, **given)


def test_vec_env_options():
    """Neither option of ``make_vec_env`` is there."""
    body = source("exp_manager").partition("def create_envs(")[2].partition("\n    def ")[0]
    assert "make_vec_env(" in body
    assert "start_index" not in body
    assert "self.monitor_kwargs = dict(info_keywords=" in body


def test_children():
    """The scripts start RL Zoo's own commands."""
    assert 'subprocess.call(["python", "enjoy.py", *arguments])' in source("benchmark")
    assert 'subprocess.call(["python", "-m", "rl_zoo3.record_video", *args_final_model])' in source("record_training")


def test_generate_metadata():
    """RL Zoo imports a name that is not there."""
    assert "from huggingface_sb3.push_to_hub import _evaluate_agent, _generate_replay, generate_metadata" in source(
        "push_to_hub"
    )
    package = Path(find_spec("huggingface_sb3").origin).parent
    assert "def generate_metadata" not in (package / "push_to_hub.py").read_text()


def test_load_from_hub():
    """RL Zoo expects an error of requests, which the hub's is not."""
    assert "from requests.exceptions import HTTPError" in source("load_from_hub")
    assert not issubclass(RemoteEntryNotFoundError, requests.HTTPError)


def test_save_metadata():
    """The cards name RL Zoo's own commands."""
    assert "python -m rl_zoo3.enjoy --algo {algo_name}" in source("push_to_hub")
    assert "If you installed the RL Zoo3 via pip" in source("push_to_hub")


# === What the patches do ===


def test_replaced():
    with pytest.raises(ZeroDivisionError), upstream.replaced(sys, "argv", ["other"]):
        assert sys.argv == ["other"]
        raise ZeroDivisionError
    assert sys.argv != ["other"]


@pytest.mark.parametrize(
    "command, called",
    [
        (["python", "enjoy.py", "-n", "1"], [sys.executable, "-m", "sb3_reinforce", "enjoy", "-n", "1", "--option"]),
        (["python", "-m", "rl_zoo3.record_video"], [sys.executable, "-m", "sb3_reinforce", "record_video", "--option"]),
        (["git", "status"], ["git", "status"]),
    ],
)
def test_which_child_is_called(monkeypatch, command, called):
    class Popen:
        def __init__(self, command, **kwargs):
            assert (command, kwargs) == (called, {"cwd": "here"})

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def wait(self):
            return 7

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with upstream.children(["--option"]):
        assert subprocess.call(command, cwd="here") == 7
    assert inspect.getmodule(subprocess.call) is subprocess


def test_a_file_that_cannot_be_reached_is_not_missing():
    """RL Zoo goes on without the normalization if it is missing."""

    def fail(repo_id, filename):
        raise LocalEntryNotFoundError("check your connection")

    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        upstream.load_from_hub("somebody/agent", "vec_normalize.pkl", original=fail)


def make_twice(folder):
    """:return: What is in the monitor files of two environments, the third and fourth, made anew after an episode"""
    from rl_zoo3 import exp_manager

    for appends in (False, True):
        with upstream.vec_env_options(2, appends):
            exp_manager.make_vec_env("CartPole-v1", 2, monitor_dir=folder).close()
        for path in folder.iterdir():
            path.write_text(path.read_text() + "an episode\n")
    return {path.name: path.read_text().splitlines()[2:] for path in folder.iterdir()}


@pytest.mark.zoo
def test_monitor_files_are_numbered_and_kept(tmp_path):
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        files = pool.submit(make_twice, tmp_path).result()
    assert files == {f"{index}.monitor.csv": ["an episode"] * 2 for index in (2, 3)}
