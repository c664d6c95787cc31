"""Several processes learn what one would learn from all episodes, end together, and go on again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_reinforce import REINFORCE
from tests.parallel_runs import CASES, agreement, gradients, in_processes, learn_case, statistics, unlike_environments

ROOT = Path(__file__).parent.parent


def torchrun(*arguments, cwd=ROOT, options=(), **kwargs):
    """Start two processes with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--shutdown-timeout", 3]
    command = [sys.executable, "-W", "ignore", *launcher, "--nproc-per-node", 2, *options, "-m", *arguments]
    return subprocess.Popen([*map(str, command)], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)  # fmt: skip


@pytest.fixture(scope="module")
def of_one_process():
    return {name: learn_case(kwargs) for name, kwargs in CASES.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 4])
def test_gradients_are_those_of_one_process(n, of_one_process, tmp_path):
    in_processes(n, gradients, tmp_path / "outcomes")
    outcomes = th.load(tmp_path / "outcomes", weights_only=False)
    assert outcomes.keys() == of_one_process.keys()
    for name, (*vectors, logs, num_timesteps, n_episodes) in of_one_process.items():
        found = outcomes[name]
        assert [len(each) for each in vectors] == [2, 0 if "natural" in name else 2]
        # The steps of the parameters, which rounding moves more, and the gradients
        for found_vectors, expected, tolerance in zip(found, vectors, (1e-5, 1e-6), strict=False):
            for vector, wanted in zip(found_vectors, expected, strict=True):
                assert np.abs(wanted).max() > 1e-3
                np.testing.assert_allclose(vector, wanted, atol=tolerance * max(1, np.abs(wanted).max()), err_msg=name)
        for log, wanted in zip(found[2], logs, strict=True):
            assert log.keys() == wanted.keys()
            # One process steps all environments until the last is done, several only their own: fewer surplus steps
            for key in log.keys() - {"rollout/surplus_steps"}:
                assert log[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), (name, key)
        assert found[3] <= num_timesteps
        assert found[4] == n_episodes >= 18


@pytest.mark.distributed
def test_processes_with_unlike_numbers_of_environments():
    in_processes(2, unlike_environments)


@pytest.mark.distributed
def test_processes_agree(tmp_path):
    in_processes(2, agreement, tmp_path)


@pytest.mark.distributed
def test_statistics():
    in_processes(2, statistics)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, message",
    [("killed", "Signal 9 (SIGKILL)"), ("hangs", "Process 0 has lost the others"), ("raises", "the simulator is gone")],
)
def test_a_process_that_fails_ends_all(kind, message):
    start = time.monotonic()
    process = torchrun("tests.parallel_runs", kind)
    output, _ = process.communicate(timeout=900)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert message in output


ENV_ID = "InvertedPendulum-v4"
FOLDER = Path("logs/reinforce", f"{ENV_ID}_1")
TRAIN = ("sb3_reinforce", "train", "--algo", "reinforce", "--env", ENV_ID, "--seed", 2, "-n", 8000, "--save-freq", 2000,
         "--eval-freq", 3000, "--eval-episodes", 2, "--resume", "auto",
         "-params", "normalize:True", "baseline:'value'")  # fmt: skip


def outcome(folder):
    """Return the parameters of the trained policy, the episodes of each process, and the evaluations."""
    model = REINFORCE.load(folder / FOLDER / f"{ENV_ID}.zip", device="cpu")
    parameters = {name: value.numpy().tobytes() for name, value in model.policy.state_dict().items()}
    episodes = [
        np.loadtxt(folder / FOLDER / f"{rank}.monitor.csv", delimiter=",", skiprows=2)[:, :2].tolist() for rank in (0, 1)
    ]
    evaluations = np.load(folder / FOLDER / "evaluations.npz")
    return parameters, episodes, evaluations["timesteps"].tolist(), evaluations["results"].tolist()


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_start_again(tmp_path):
    """A run of which one process is killed, or asked to end, ends as the undisturbed one does."""
    # After SIGTERM to one of them, all processes complete the update
    signals = {"undisturbed": None, "killed": signal.SIGKILL, "terminated": signal.SIGTERM}
    processes, outputs = {}, {}
    try:
        for name, number in signals.items():
            (tmp_path / name).mkdir()
            processes[name] = process = torchrun(*TRAIN, cwd=tmp_path / name, options=("--max-restarts", 1))
            if number:
                end = time.monotonic() + 600
                while not list((tmp_path / name / FOLDER).glob("*.state")):
                    assert time.monotonic() < end
                    time.sleep(0.02)
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[1]), number)
        for name, process in processes.items():
            outputs[name], _ = process.communicate(timeout=900)
            assert process.returncode == 0, outputs[name]
    finally:
        for process in processes.values():
            process.terminate()  # torchrun ends the others
    outcomes = {name: outcome(tmp_path / name) for name in signals}
    of_rank_0, of_rank_1 = outcomes["undisturbed"][1]
    assert of_rank_0 != of_rank_1
    assert outputs["undisturbed"].count("Saving to") == 1
    for name, number in signals.items():
        assert outcomes[name] == outcomes["undisturbed"], name
        assert ("Stopped by a signal" in outputs[name]) == (number == signal.SIGTERM)
        assert not (tmp_path / name / "logs/reinforce" / f"{ENV_ID}_2").exists()
