"""Several processes that torchrun starts learn what one would learn from all episodes, end together, and go on again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from tests.distributed_runs import CASES, learn_case
from tests.test_zoo_commands import ENVIRON, policy

ROOT = Path(__file__).parent.parent


def torchrun(*arguments, n=2, cwd=ROOT, options=(), **kwargs):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--shutdown-timeout", 3]
    command = [sys.executable, "-W", "ignore", *launcher, "--nproc-per-node", n, *options, "-m", *arguments]
    return subprocess.Popen([*map(str, command)], cwd=cwd, env={**ENVIRON, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)  # fmt: skip


def succeed(*arguments, **kwargs):
    process = torchrun(*arguments, **kwargs)
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        process.terminate()  # torchrun ends the others
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("n", [2, 4])
def test_gradients_are_those_of_one_process(n, tmp_path):
    succeed("tests.distributed_runs", "gradients", tmp_path / "outcomes", n=n)
    outcomes = th.load(tmp_path / "outcomes", weights_only=False)
    assert outcomes.keys() == CASES.keys()
    for name, kwargs in CASES.items():
        gradients, logged, parameters, num_timesteps, n_episodes = outcomes[name]
        expected = learn_case(kwargs)
        for found, wanted in zip(gradients, expected[0], strict=True):
            assert np.abs(wanted).max() > 1e-3
            np.testing.assert_allclose(found, wanted, atol=1e-6 * max(1, np.abs(wanted).max()), err_msg=name)
        for found, wanted in zip(logged, expected[1], strict=True):
            # One process steps all environments until the last is done, several only their own: fewer surplus steps
            skipped = {"rollout/surplus_steps"}
            assert found.keys() == wanted.keys()
            for key in found.keys() - skipped:
                assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), (name, key)
        np.testing.assert_allclose(parameters, expected[2], atol=1e-5, err_msg=name)
        assert num_timesteps <= expected[3]
        assert n_episodes == expected[4] >= 18


def test_processes_agree(tmp_path):
    succeed("tests.distributed_runs", "agreement", tmp_path)


def test_statistics():
    succeed("tests.distributed_runs", "statistics", "")


@pytest.mark.parametrize("kind", ["killed", "hangs", "raises"])
def test_a_process_that_fails_ends_all(kind):
    start = time.monotonic()
    process = torchrun("tests.distributed_runs", "fault", kind)
    output, _ = process.communicate(timeout=900)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert {"killed": "Signal 9 (SIGKILL)", "hangs": "Process 0 has lost the others", "raises": "the simulator is gone"}[
        kind
    ] in output


ENV_ID = "InvertedPendulum-v4"
FOLDER = Path("logs/reinforce", f"{ENV_ID}_1")
TRAIN = ("sb3_reinforce", "train", "--algo", "reinforce", "--env", ENV_ID, "--seed", 2, "-n", 15_000, "--save-freq", 3000,
         "--eval-freq", 6000, "--eval-episodes", 2, "--resume", "auto",
         "-params", "normalize:True", "baseline:'value'")  # fmt: skip


def outcome(folder):
    parameters = {name: value.numpy().tobytes() for name, value in policy(folder / FOLDER / f"{ENV_ID}.zip").items()}
    episodes = [
        np.loadtxt(folder / FOLDER / f"{rank}.monitor.csv", delimiter=",", skiprows=2)[:, :2].tolist() for rank in (0, 1)
    ]
    evaluations = np.load(folder / FOLDER / "evaluations.npz")
    return parameters, episodes, evaluations["timesteps"].tolist(), evaluations["results"].tolist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    output = succeed(*TRAIN, cwd=folder)
    assert output.count("Saving to") == 1
    rank_0, rank_1 = outcome(folder)[1]
    assert rank_0 != rank_1
    return folder


# After SIGTERM to one of them, all complete the update
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_start_again(number, undisturbed, tmp_path):
    process = torchrun(*TRAIN, cwd=tmp_path, options=("--max-restarts", 1))
    try:
        end = time.monotonic() + 600
        while not list((tmp_path / FOLDER).glob("*.state")):
            assert time.monotonic() < end
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), number)
        output, _ = process.communicate(timeout=900)
    finally:
        process.terminate()
    assert process.returncode == 0, output
    assert ("Stopped by a signal" in output) == (number == signal.SIGTERM)
    assert not (tmp_path / "logs/reinforce" / f"{ENV_ID}_2").exists()
    assert outcome(tmp_path) == outcome(undisturbed)
