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
        rest = arguments_of_run(folder, rest)
    elif not on_envpool:
        rest += ["--vec-env", own.vec_env]
    if processes.rank() > 0:  # Process 0 speaks for all
        rest = [argument for argument in rest if argument != "--track"]
        sys.stdout = open(os.devnull, "w")
    make_manager = partial(manager, resume=folder, on_envpool=on_envpool)
    with upstream.experiment_manager(make_manager), upstream.replaced(sys, "argv", ["sb3-reinforce train", *rest]):
        rl_zoo_train.train()
