"""``sb3-reinforce train --resume``: the folder of a run that was killed or stopped ends as that of an undisturbed one."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.zoo_command import ENVIRON, call, monitored, policy, succeed

pytestmark = [pytest.mark.zoo, pytest.mark.slow]

ENV_ID = "Pendulum-v1"
TRAIN = ("train", "--algo", "reinforce", "--env", ENV_ID, "--seed", 5)
BUDGET = ("-n", 6000, "--save-freq", 1000, "--eval-freq", 2000, "--eval-episodes", 2, "-tb", "tb", "--vec-env", "subproc")
HYPERPARAMS = ("-params", "normalize:True", "n_envs:2", "n_episodes:2", "baseline:'value'", "gae_lambda:0.9")
FOLDER = f"logs/reinforce/{ENV_ID}_1"


def start(folder, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "sb3_reinforce", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def wait_for_states(folder, number):
    end = time.monotonic() + 600
    while len({path.name for path in folder.glob("*.state")}) < number:
        assert time.monotonic() < end
        time.sleep(0.02)


def outcome(folder):
    run_folder = folder / FOLDER
    episodes = [monitored(run_folder / f"{index}.monitor.csv") for index in range(2)]
    evaluations = np.load(run_folder / "evaluations.npz")
    parameters = {name: value.numpy().tobytes() for name, value in policy(run_folder / f"{ENV_ID}.zip").items()}
    return parameters, episodes, evaluations["timesteps"].tolist(), evaluations["results"].tolist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(folder, *TRAIN, *BUDGET, *HYPERPARAMS, runner=call)
    return folder


def test_killed(undisturbed, tmp_path):
    process = start(tmp_path, *TRAIN, *BUDGET, *HYPERPARAMS)
    wait_for_states(tmp_path / FOLDER, 2)
    process.send_signal(signal.SIGSTOP)  # It lives, and does nothing
    status, _, errors = call(tmp_path, *TRAIN[:5], "--resume", "latest")
    assert status == 1 and "is still training, in another process" in errors
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / FOLDER / f"{ENV_ID}.zip").exists()
    output = succeed(tmp_path, *TRAIN[:5], "--resume", "latest", "-n", 9, runner=call)
    assert re.search(rf"Going on with {FOLDER} from time step \d+ of {BUDGET[1]}\b", output)
    assert "with the arguments it was started with: -n has no effect" in output
    assert outcome(tmp_path) == outcome(undisturbed)
    assert "The run has ended" not in output
    # Again, from the last state
    assert "The run has ended" in succeed(tmp_path, *TRAIN[:5], "--resume", "latest", runner=call)
    assert outcome(tmp_path) == outcome(undisturbed)
    # One folder, one curve
    assert len(os.listdir(tmp_path / "logs/reinforce")) == len(os.listdir(tmp_path / "tb" / ENV_ID)) == 1
    times = np.loadtxt(tmp_path / FOLDER / "0.monitor.csv", delimiter=",", skiprows=2, usecols=2)
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped(undisturbed, tmp_path, number, status):
    # Ctrl-C reaches the processes of the environments too. The bar is one that the resumed run does not have
    process = start(tmp_path, *TRAIN, *BUDGET, "-P", *HYPERPARAMS)
    wait_for_states(tmp_path / FOLDER, 1)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == status, output
    assert "Stopping when this update is complete" in output and "Traceback" not in output
    (folder,) = re.findall(r"Stopped by a signal: --resume (\S+) goes on from the last training state", output)
    succeed(tmp_path, *TRAIN[:5], "--resume", folder if number == signal.SIGINT else "auto", runner=call)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_bad_input(tmp_path):
    def error(*arguments):
        status, _, errors = call(tmp_path, *TRAIN[:5], *arguments)
        assert status in (1, 2) and len(errors.strip().splitlines()) == 1, errors
        return errors

    assert "no run of reinforce in Pendulum-v1 has a training state in --log-folder logs" in error("--resume", "latest")
    (tmp_path / "empty").mkdir()
    assert "--resume empty must be 'latest', 'auto', or the folder of a run" in error("--resume", "empty")
    succeed(tmp_path, *TRAIN, "-n", 1000, "--eval-freq", -1, "--save-freq", 500, "-params", "n_episodes:2", runner=call)
    (state,) = (tmp_path / FOLDER).glob("*.state")
    state.write_bytes(state.read_bytes()[:100])
    status, _, errors = call(tmp_path, *TRAIN[:5], "--resume", FOLDER)
    assert status == 1 and "There is no sound training state in" in errors
