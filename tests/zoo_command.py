"""
``sb3-reinforce`` as tests start it: on a machine without a display, in a folder of its own.

:func:`run` starts an interpreter. :func:`call` forks a process that has imported RL Zoo once, which saves the seconds that the
import takes. Everything else is the same: a process of its own, its exit status and its two streams.
"""

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sb3_reinforce import REINFORCE

HIDDEN = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "TRUST_REMOTE_CODE", "WANDB_")
ENVIRON = {key: value for key, value in os.environ.items() if not key.startswith(HIDDEN)} | {"OMP_NUM_THREADS": "1"}

FORKSERVER = get_context("forkserver")
# Not MuJoCo, which reads MUJOCO_GL when it is imported. The last three are imported late by what the others import
FORKSERVER.set_forkserver_preload(
    ["sb3_reinforce.__main__", "sb3_reinforce.zoo.train", "matplotlib.pyplot", "scipy.signal", "torch._dynamo"]
)


def run(folder, *arguments, program=("-m", "sb3_reinforce"), **variables):
    """:return: Exit status, and what the command has printed to either stream"""
    command = [sys.executable, *program, *map(str, arguments)]
    environ = ENVIRON | variables
    process = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=900)
    return process.returncode, process.stdout, process.stderr


def main(folder, arguments, variables, streams):
    """Be the command, in a process that has been forked for it."""
    for target, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), target)
    os.environ.clear()
    os.environ.update(ENVIRON | variables)
    os.chdir(folder)
    sys.path.insert(0, folder)  # As python -m does
    sys.argv = ["sb3-reinforce", *arguments]
    sys.orig_argv = [sys.executable, "-m", "sb3_reinforce", *arguments]
    from sb3_reinforce.__main__ import main

    main()


class Started:
    """A forked command, while it is running."""

    def __init__(self, folder, *arguments, **variables):
        self.folder = TemporaryDirectory()
        self.streams = [Path(self.folder.name, name) for name in ("output", "errors")]
        arguments = (str(folder), [*map(str, arguments)], variables, [*map(str, self.streams)])
        self.process = FORKSERVER.Process(target=main, args=arguments)
        self.process.start()

    def finish(self):
        """:return: As :func:`run`"""
        self.process.join(900)
        assert self.process.exitcode is not None, "this took too long"
        texts = [path.read_text() for path in self.streams]
        self.folder.cleanup()
        return self.process.exitcode, *texts


def call(folder, *arguments, **variables):
    """:return: As :func:`run`, in a tenth of the time"""
    return Started(folder, *arguments, **variables).finish()


def succeed(folder, *arguments, runner=run, **kwargs):
    """:return: What the command has printed"""
    status, output, errors = runner(folder, *arguments, **kwargs)
    assert status == 0, errors
    assert "Traceback" not in errors
    return output


def files(folder):
    """:return: Names of the files in a folder, at any depth"""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def monitored(path):
    """:return: Rewards and lengths of the episodes"""
    rewards, lengths = np.loadtxt(path, delimiter=",", skiprows=2, usecols=(0, 1), ndmin=2).T
    return list(rewards), list(lengths)


def policy(path):
    """:return: Parameters of the policy of a saved model"""
    return REINFORCE.load(path).get_parameters()["policy"]
