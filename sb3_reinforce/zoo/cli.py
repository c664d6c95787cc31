"""The command ``sb3-reinforce``: RL Zoo's commands, with ``reinforce`` among the algorithms."""

import argparse
import json
import os
import runpy
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn
from unittest import mock

from sb3_reinforce import __version__
from sb3_reinforce.zoo import register, rendering

COMMANDS = {
    "train": "train an agent, or search for hyperparameters (-optimize)",
    "enjoy": "watch a trained agent, or evaluate it (--no-render)",
    "plot_train": "plot the rewards of training",
    "all_plots": "plot and tabulate the evaluations of several runs",
    "plot_from_file": "plot what all_plots has saved (-o)",
    "record_video": "record a video of a trained agent",
    "record_training": "record a video of the agent as it was at its checkpoints",
    "benchmark": "evaluate the trained agents of a log folder",
    "push_to_hub": "upload a trained agent to the Hugging Face Hub",
    "load_from_hub": "download a trained agent from the Hugging Face Hub",
}

#: Commands that show, or film, what an agent does
RENDERING = ("enjoy", "record_video", "record_training", "push_to_hub")

#: The processes that RL Zoo's commands start, and our commands that take their place
CHILDREN = {("python", "enjoy.py"): "enjoy", ("python", "-m", "rl_zoo3.record_video"): "record_video"}

#: Packages whose errors are about what the user has asked for
ANSWERING = (
    "gymnasium",
    "httpx2",
    "huggingface_hub",
    "huggingface_sb3",
    "optuna",
    "rl_zoo3",
    "sb3_reinforce",
    "sqlalchemy",
    "stable_baselines3",
)

#: Arguments that RL Zoo's commands cannot do without
REQUIRED = {"all_plots": ("algos", "env", "exp_folders"), "plot_from_file": ("input",)}


def argument_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """
    Takes the place of ``ArgumentParser.error``, which prints all the arguments of the command first.

    :param parser: Parser of the command
    :param message: What is wrong
    """
    parser.exit(2, f"{sys.argv[0]}: error: {message}\n")


def offer_envpool(parser: argparse.ArgumentParser) -> None:
    """
    Add ``envpool`` to the choices of ``--vec-env``, where there is this argument.

    :param parser: Parser of the command
    """
    action = parser._option_string_actions.get("--vec-env")
    if action is not None:
        action.choices = [*(action.choices or ()), "envpool"]


def has_module(name: str) -> bool:
    """
    :param name: Name of a module
    :return: Whether there is one
    """
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # Of the package that it is said to be in
        return False


def has_ended(model: Path) -> bool:
    """
    :param model: Where a run saves its model, at the end or when it is stopped
    :return: Whether the run has had all its time steps
    """
    if not model.exists():
        return False
    try:
        with zipfile.ZipFile(model) as archive:
            data = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError):  # It was ended while it saved it
        return False
    return data["num_timesteps"] >= data["_total_timesteps"]


def arguments_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """
    :param args: Arguments of ``train``
    :return: Those of the run that is to be gone on with, with its folder as ``resume``
    :raises ValueError: If there is no such run
    """
    if args.resume in ("latest", "auto"):
        name = args.env.replace("/", "-")
        runs = [path for path in Path(args.log_folder, args.algo).glob(f"{name}_*") if any(path.glob("*.state"))]
        if args.resume == "auto":
            runs = [path for path in runs if not has_ended(path / f"{name}.zip")]
            if not runs:
                return {"resume": None}
        if not runs:
            raise ValueError(f"no run of {args.algo} in {args.env} has a training state in --log-folder {args.log_folder}")
        args.resume = str(max(runs, key=lambda path: max(state.stat().st_mtime for state in path.glob("*.state"))))
    saved = list(Path(args.resume).glob("*/args.yml"))
    if not saved or not any(Path(args.resume).glob("*.state")):
        raise ValueError(
            f"--resume {args.resume} must be 'latest', 'auto', or the folder of a run with a training state (--save-freq)"
        )
    import yaml

    arguments = yaml.load(saved[0].read_text(), Loader=yaml.UnsafeLoader)  # Which is how RL Zoo reads it, too
    return {key: value for key, value in arguments.items() if key not in ("progress", "verbose")} | {"resume": args.resume}


def prepare_training(args: argparse.Namespace) -> None:
    """
    Take the arguments of the run that is to be gone on with, if one is, and let one of several processes speak.

    :param args: Arguments of ``train``, which are changed
    :raises ValueError: If there is no such run
    """
    from sb3_reinforce import distributed

    distributed.join()
    if args.resume:
        vars(args).update(distributed.on_first(lambda: arguments_of_run(args)))
    if distributed.rank() > 0:
        args.progress = args.track = False
        sys.stdout = open(os.devnull, "w")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace, command: str) -> None:
    """
    Check what RL Zoo does not check, or not in words for a user.

    :param parser: Parser of the command
    :param args: Its arguments
    :param command: Name of the command
    """
    for name in REQUIRED.get(command, ()):
        if getattr(args, name) is None:
            parser.error(f"--{name.replace('_', '-')} is required")
    for folder in getattr(args, "exp_folders", ()):
        if not os.path.isdir(folder):
            parser.error(f"--exp-folders {folder} must be a folder")
    trained_agent = getattr(args, "trained_agent", "")
    if trained_agent and not (trained_agent.endswith(".zip") and os.path.isfile(trained_agent)):
        parser.error(f"--trained-agent {trained_agent} must be the path of a .zip file")
    for package in getattr(args, "gym_packages", ()):
        if not has_module(package):
            parser.error(f"--gym-packages {package}: there is no such module")


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """
    Takes the place of ``ArgumentParser.parse_args``.

    :param parser: Parser of the command
    :return: Its arguments
    """
    parser.prog = sys.argv[0]
    offer_envpool(parser)
    if sys.argv[0].endswith(" train"):
        parser.add_argument("--resume", metavar="FOLDER", help="Go on with a run of which --save-freq has saved the training "
                            "state, with its arguments: its folder, 'latest', or 'auto' (the latest that has not ended; if "
                            "there is none, start a new one)")  # fmt: skip
    try:
        args, unknown = parser.parse_known_args()
    except (NameError, SyntaxError) as error:  # RL Zoo evaluates values
        parser.error(f"a value is not Python ({error}). Strings need quotes: returns:\"'episode'\"")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    command = sys.argv[0].split()[-1]
    check_args(parser, args, command)
    if command == "train":
        prepare_training(args)
    if command == "benchmark":  # RL Zoo makes it with the first evaluation
        os.makedirs(args.benchmark_dir, exist_ok=True)
    if command == "record_training":
        root = Path(args.folder, args.algo)
        if not [*root.glob("*.zip"), *root.glob(f"{args.env}_*/*.zip")]:
            parser.error(f"no model of {args.algo} for {args.env} in --folder {args.folder}")
    if command == "enjoy" and not args.no_render and not rendering.has_display():
        print("No display: the environment is not rendered. sb3-reinforce record_video makes a video")
        args.no_render = True
    elif command in RENDERING and not rendering.can_render(str(args.env)):
        packages = " or ".join(rendering.BACKENDS.values())
        parser.exit(1, f"{parser.prog}: error: pictures of {args.env} need a display, or the system package {packages}\n")
    return args


def call_child(command: Sequence[str], *args: Any, **kwargs: Any) -> int:
    """
    :return: ``subprocess.call``, but of our command where RL Zoo asks for its own
    """
    for prefix, ours in CHILDREN.items():
        if tuple(command[: len(prefix)]) == prefix:
            command = [sys.executable, "-m", "sb3_reinforce", ours, *command[len(prefix) :]]
    with subprocess.Popen(command, *args, **kwargs) as process:
        return process.wait()


def run_script(command: str) -> None:
    """
    Run a module of RL Zoo that is a script, and see to it that a failure does not look like a success.

    :param command: Name of the module
    """
    with rendering.ffmpeg_on_path(), mock.patch("subprocess.call", call_child):
        results = runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")
    if command == "benchmark" and not results["results"]["algo"]:
        raise ValueError(f"no trained agent of {results['args'].log_dir} could be evaluated")
    if command == "record_training" and not os.path.isfile(results["final_video_path"]):
        raise ValueError(f"ffmpeg could not make {results['final_video_path']}")


def train(arguments: Sequence[str], manager: Any = None) -> None:
    """
    ``sb3-reinforce train``

    :param arguments: Its arguments
    :param manager: The class of its experiment manager, ``None`` for that of this package
    """
    register()
    from rl_zoo3 import train

    from sb3_reinforce.zoo.exp_manager import ExperimentManager

    with (
        mock.patch.object(train, "ExperimentManager", manager or ExperimentManager),
        mock.patch.object(sys, "argv", ["sb3-reinforce train", *arguments]),
    ):
        train.train()


def run(command: str) -> None:
    """
    :param command: Command to run, with the arguments that are left in ``sys.argv``
    """
    if command == "train":
        train(sys.argv[1:])
        return
    if command in RENDERING and not {"-h", "--help"} & set(sys.argv):
        rendering.choose_mujoco_backend()
    register()
    if command.endswith("_plots") or command.startswith("plot_"):
        from rl_zoo3 import plots

        show_or_save = (
            nullcontext() if rendering.has_display() else mock.patch("matplotlib.pyplot.show", rendering.save_figures)
        )
        try:
            with show_or_save:
                getattr(plots, command)()
        except ValueError as error:
            if "empty sequence" in str(error):
                raise ValueError("two runs or more of each algorithm and environment are needed") from error
            raise
    else:
        from sb3_reinforce.zoo import hub

        hub.adapt()
        if command == "enjoy":
            from rl_zoo3.enjoy import enjoy

            enjoy()
        else:
            run_script(command)


def is_answer_to_input(error: BaseException) -> bool:
    """
    :param error: What ended a command
    :return: Whether a check in one of the packages that a command calls raised it, in words for the user. Any other
        code can be code that the user wants to debug.
    """
    specs = filter(None, map(find_spec, ANSWERING))
    folders = [folder + os.sep for spec in specs for folder in spec.submodule_search_locations or ()]
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return bool(str(error)) and origin.startswith(tuple(folders))


def choose_command(commands: Mapping[str, str]) -> str | None:
    """
    :param commands: The commands, and what they do
    :return: The one to run, which is the first argument
    """
    parser = argparse.ArgumentParser(
        prog="sb3-reinforce",
        usage="%(prog)s COMMAND [ARGUMENTS]",
        description="RL Zoo's commands, with reinforce among the algorithms. COMMAND --help lists the arguments of one.\n\n"
        + "\n".join(f"  {name:<16} {text}" for name, text in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", nargs="?", choices=commands, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    if command is None:
        parser.print_help()
    return command


def main(others: Mapping[str, tuple[str, Callable[[], None]]] = MappingProxyType({})) -> None:
    """
    ``sb3-reinforce COMMAND [ARGUMENTS]``

    The exit status is 2 for arguments that cannot be, 1 for another error.

    :param others: Commands besides RL Zoo's: what they do, and how
    """
    sys.argv[0] = "sb3-reinforce"
    with mock.patch.object(argparse.ArgumentParser, "error", argument_error):
        command = choose_command({**COMMANDS, **{name: text for name, (text, _) in others.items()}})
        if command is None:
            return
        sys.argv = [f"sb3-reinforce {command}", *sys.argv[2:]]
        try:
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
                others[command][1]() if command in others else run(command)
        except Exception as error:
            if not is_answer_to_input(error):
                raise
            sys.exit(f"{sys.argv[0]}: error: {' '.join(str(error).split())}")
