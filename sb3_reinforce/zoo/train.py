"""``sb3-reinforce train``: RL Zoo's ``train`` with our experiment manager, ``--resume``, and EnvPool."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from rl_zoo3 import train as rl_zoo_train

from sb3_reinforce.parallel import processes
from sb3_reinforce.zoo import register, upstream
from sb3_reinforce.zoo.arguments import split
from sb3_reinforce.zoo.exp_manager import ExperimentManager
from sb3_reinforce.zoo.resume import arguments_of_run, find_run

#: Options that find the run to go on with, or are of the display
TAKEN_WITH_RESUME = ("--resume", "--algo", "--env", "-f", "--log-folder", "-P", "--progress", "--verbose", "--gym-packages")


def train(arguments: Sequence[str], manager: type[ExperimentManager] = ExperimentManager) -> None:
    """
    Train an agent, go on with a run, or search for hyperparameters.

    :param arguments: Arguments of ``sb3-reinforce train``
    :param manager: Class of the experiment manager
    :raises ValueError: If the arguments contradict each other, or there is no such run, environment or hyperparameter
    """
    register()
    own, rest = split("train", arguments)
    processes.join()
    folder = processes.on_first(lambda: find_run(own.resume, rest)) if own.resume else None
    on_envpool = folder is None and own.vec_env == "envpool"
    if folder is not None:
        given = [argument for argument in arguments if argument.startswith("-")]
        dropped = [argument for argument in given if argument.split("=")[0] not in TAKEN_WITH_RESUME]
        # "auto" is for runs that may not have begun
        if dropped and own.resume != "auto" and processes.rank() == 0:
            print(f"A run is continued with the arguments it was started with: {' '.join(dropped)} has no effect")
        rest = arguments_of_run(folder, rest)
    elif own.vec_env and not on_envpool:
        rest += ["--vec-env", own.vec_env]
    if processes.rank() > 0:  # Process 0 speaks for all
        rest = [argument for argument in rest if argument != "--track"]
        sys.stdout = open(os.devnull, "w")
    make_manager = partial(manager, resume=folder, on_envpool=on_envpool)
    with upstream.experiment_manager(make_manager), upstream.replaced(sys, "argv", ["sb3-reinforce train", *rest]):
        rl_zoo_train.train()
