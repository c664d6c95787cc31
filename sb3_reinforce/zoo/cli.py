"""The command ``sb3-reinforce``: RL Zoo's commands, with ``reinforce`` among the algorithms. Imports nothing heavy."""

import argparse
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from sb3_reinforce import __version__
from sb3_reinforce.zoo import register, rendering, upstream
from sb3_reinforce.zoo.arguments import Parser, agent_arguments, split

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

PLOTS = ("plot_train", "all_plots", "plot_from_file")

#: Commands that show, or film, what an agent does
RENDERING = ("enjoy", "record_video", "record_training", "push_to_hub")

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


def needs_pictures(command: str, arguments: Sequence[str]) -> bool:
    """
    Tell whether a command renders.

    :param command: Name of the command
    :param arguments: Arguments of RL Zoo
    :return: Whether it does
    """
    if "--help" in arguments:
        return False
    return command.startswith("record") or (command in RENDERING and "--no-render" not in arguments)


def check_agent(command: str, arguments: Sequence[str]) -> None:
    """
    Check what a command that shows an agent needs: the environment, the agent, and a library to render.

    :param command: Name of the command
    :param arguments: Arguments of RL Zoo
    :raises ValueError: If one of them is missing
    """
    import gymnasium as gym
    from rl_zoo3 import import_envs  # noqa: F401  What it registers, and custom_envs.py

    from sb3_reinforce.checks import closest

    args = agent_arguments(arguments)
    if args.env not in gym.registry:
        raise ValueError(f"--env {args.env} is not registered, did you mean {closest(args.env, list(gym.registry))}?")
    root, name = Path(args.folder, args.algo), args.env.replace("/", "-")
    # RL Zoo asks the hub, where no agent of REINFORCE is, or deletes the videos before it finds out
    may_ask = "rl-trained-agents" in args.folder and args.algo != "reinforce" and command != "record_training"
    is_trusted = bool(os.environ.get("TRUST_REMOTE_CODE"))
    if not any([*root.glob(f"{name}.zip"), *root.glob(f"{name}_*/*.zip")]) and not (may_ask and is_trusted):
        hint = ". With TRUST_REMOTE_CODE=True, RL Zoo looks for one on the Hugging Face Hub" if may_ask else ""
        raise ValueError(f"no model of {args.algo} for {args.env} in --folder {args.folder}{hint}")
    if needs_pictures(command, arguments) and not rendering.can_render(args.env):
        packages = " or ".join(rendering.BACKENDS.values())
        raise ValueError(f"pictures of {args.env} need a display, or the system package {packages}")


def run_script(command: str, gym_packages: Sequence[str]) -> None:
    """
    Run a module of RL Zoo that is a script, and see to it that a failure does not look like a success.

    :param command: Name of the module
    :param gym_packages: Modules that the processes which the script starts have to import
    :raises ValueError: If the script has made nothing
    """
    if command == "benchmark":  # RL Zoo makes the folder with the first evaluation, and needs it without one
        parser = Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--benchmark-dir", default="logs/benchmark/")
        os.makedirs(parser.parse_known_args()[0].benchmark_dir, exist_ok=True)
    options = ["--gym-packages", *gym_packages] if gym_packages else []
    with rendering.ffmpeg_on_path(), upstream.children(options):
        results = runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")
    if command == "benchmark" and not results["results"]["algo"]:
        raise ValueError(f"no trained agent of {results['args'].log_dir} could be evaluated")
    if command == "record_training" and not os.path.isfile(results["final_video_path"]):
        raise ValueError(f"{results['final_video_path']} was not made: the run has no model, or ffmpeg has failed")


def run_agent_command(command: str, arguments: list[str], gym_packages: Sequence[str]) -> None:
    """
    Run a command of RL Zoo that loads trained agents.

    :param command: Name of the command
    :param arguments: Arguments of RL Zoo
    :param gym_packages: Modules that register environments
    """
    if command == "enjoy" and not rendering.has_display() and not {"--no-render", "--help"} & set(arguments):
        print("No display: the environment is not rendered. sb3-reinforce record_video makes a video")
        arguments = [*arguments, "--no-render"]
    if needs_pictures(command, arguments):  # MuJoCo chooses when it is imported, which a module of gym_packages may do
        rendering.choose_mujoco_backend()
    register()
    for package in gym_packages:
        import_module(package)
    args = agent_arguments(arguments)
    is_default = args.algo == "reinforce" and args.folder == "rl-trained-agents"
    if command == "enjoy" and is_default and not os.path.isdir(args.folder) and "--help" not in arguments:
        from sb3_reinforce.zoo.hyperparams import AGENTS

        arguments = ["-f", str(AGENTS), *arguments]
    if command in RENDERING and "--help" not in arguments:
        check_agent(command, arguments)
        if command in ("record_video", "push_to_hub"):
            arguments = rendering.follow_robot(args.env, arguments)
    with upstream.hub_functions(), upstream.action_masks(), upstream.replaced(sys, "argv", [sys.argv[0], *arguments]):
        if command == "enjoy":
            from rl_zoo3.enjoy import enjoy

            enjoy()
        else:
            run_script(command, gym_packages)


def run_plot(command: str, arguments: Sequence[str]) -> None:
    """
    Run a command of RL Zoo that plots, and save its figures where they cannot be shown.

    :param command: Name of the command
    :param arguments: Arguments of RL Zoo
    :raises ImportError: If the packages for plots are not installed
    :raises ValueError: If there are too few runs
    """
    try:
        from rl_zoo3 import plots
    except ModuleNotFoundError as error:
        raise ImportError(f'{command} needs the package {error.name}: pip install "sb3-reinforce[compare]"') from error
    warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
    try:
        with upstream.replaced(sys, "argv", [sys.argv[0], *arguments]):
            getattr(plots, command)()
    except ValueError as error:
        if "empty sequence" in str(error):
            raise ValueError("two runs or more of each algorithm and environment are needed") from error
        raise
    if not rendering.has_display():
        rendering.save_figures()


def run(command: str, arguments: Sequence[str]) -> None:
    """
    Run a command of RL Zoo.

    :param command: Name of the command
    :param arguments: Its arguments
    """
    if command == "train":
        from sb3_reinforce.zoo.train import train

        train(arguments)
        return
    own, rest = split(command, arguments)
    for folder in getattr(own, "exp_folders", None) or ():
        if not os.path.isdir(folder):
            raise ValueError(f"--exp-folders {folder} must be a folder")
    if command in PLOTS:
        run_plot(command, rest)
    else:
        run_agent_command(command, rest, own.gym_packages)


def is_answer_to_input(error: BaseException) -> bool:
    """
    Tell whether a check in one of the packages that a command calls raised an error, in words for the user.

    Any other code can be code that the user wants to debug.

    :param error: What ended a command
    :return: Whether its message is enough
    """
    specs = filter(None, map(find_spec, ANSWERING))
    folders = [folder + os.sep for spec in specs for folder in spec.submodule_search_locations or ()]
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return bool(str(error)) and origin.startswith(tuple(folders))


def describe(error: BaseException) -> str:
    """
    Describe an error in one line.

    :param error: What ended a command
    :return: Its message
    """
    message = " ".join(str(error).split())
    if type(error).__name__ == "ConnectError":  # That of httpx says no more than "Name or service not known"
        return f"the Hugging Face Hub cannot be reached: {message}"
    return message


def choose_command(commands: Mapping[str, str]) -> str | None:
    """
    Read the first argument.

    :param commands: The commands, and what they do
    :return: The command to run, ``None`` if there is no argument
    """
    parser = Parser(
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
    Run ``sb3-reinforce COMMAND [ARGUMENTS]``.

    The exit status is 2 for arguments that a parser refuses, 1 for another error.

    :param others: Commands besides RL Zoo's: what they do, and a function that reads ``sys.argv``
    """
    command = choose_command({**COMMANDS, **{name: text for name, (text, _) in others.items()}})
    if command is None:
        return
    if os.getcwd() not in sys.path:  # As python -m sb3_reinforce does: for custom_envs.py and --gym-packages
        sys.path.append(os.getcwd())
    arguments = sys.argv[2:]
    sys.argv = [f"sb3-reinforce {command}", *arguments]
    try:
        others[command][1]() if command in others else run(command, arguments)
    except Exception as error:
        if not is_answer_to_input(error):
            raise
        sys.exit(f"sb3-reinforce {command}: error: {describe(error)}")
