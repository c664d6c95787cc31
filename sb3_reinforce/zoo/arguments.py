"""
The arguments that this package adds to RL Zoo's commands: they are taken from the command line before RL Zoo reads the rest.

Imports nothing heavy: a mistake on the command line is answered at once.
"""

import argparse
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

#: Commands that import the modules of ``--gym-packages`` themselves
IMPORTING = ("train", "enjoy")

#: Options of the form KEY:VALUE, by command
PAIRS = {
    "train": (("-params", "--hyperparams"), ("--env-kwargs",), ("--eval-env-kwargs",)),
    "enjoy": (("--env-kwargs",),),
    "record_video": (("--env-kwargs",),),
    "push_to_hub": (("--env-kwargs",),),
}

#: Options without which RL Zoo's plots end with an error about ``None``
REQUIRED = {
    "all_plots": (("-a", "--algos"), ("-e", "--env"), ("-f", "--exp-folders")),
    "plot_from_file": (("-i", "--input"),),
}

#: Values in YAML that Python writes in another way
CONSTANTS = {"null": "None", "true": "True", "false": "False"}

#: Texts that need no quotes: names of methods, classes, schedules, environments, files
WORD = re.compile(r"[A-Za-z_/][\w./+-]*")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, without the list of all arguments."""

    def error(self, message: str) -> NoReturn:
        """
        Print what is wrong, and exit with status 2.

        :param message: What is wrong
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_value(text: str) -> tuple[Any, str]:
    """
    Evaluate a value on the command line.

    Values are Python (``[64, 64]``, ``dict(net_arch=[8])``, ``1e-3``), with the names that RL Zoo knows (such as ``nn`` for
    ``torch.nn``), or else YAML (``{net_arch: [8]}``). A text of one word needs no quotes (``mean``, ``lin_0.1``), and
    ``null``, ``true`` and ``false`` can be written as in YAML.

    :param text: The value, as typed
    :return: The value, and the Python expression that the text stands for
    :raises ValueError: If the text is neither
    """
    import yaml
    from rl_zoo3 import utils

    text = CONSTANTS.get(text, text)
    if WORD.fullmatch(text) and text not in CONSTANTS.values():
        return text, repr(text)
    try:
        return eval(text, dict(vars(utils))), text
    except Exception as error:  # An expression can raise any
        try:
            value = yaml.safe_load(text) if text.startswith(("{", "[")) else None
        except yaml.YAMLError:
            value = None
        if value is None:
            raise ValueError(f"{text!r} is neither a word nor Python: {error}") from error
        return value, repr(value)


def plain_value(text: str) -> Any:
    """
    Evaluate a value on the command line, as it stands in a file of hyperparameters.

    :param text: The value, as typed
    :return: A value of numbers, texts, lists and dictionaries; the source of an expression that is none
    :raises ValueError: If the text is neither a word nor Python nor YAML
    """
    value, source = parse_value(text)
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return source


def python_pair(text: str) -> str:
    """
    Write an argument ``KEY:VALUE`` as RL Zoo reads it.

    :param text: The argument, as typed
    :return: The argument, with a Python expression for a value
    :raises argparse.ArgumentTypeError: If the text is no such pair
    """
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY:VALUE")
    try:
        return f"{key}:{parse_value(value)[1]}"
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{key}: {error}") from error


def module(name: str) -> str:
    """
    Check that a module can be imported.

    :param name: Name of the module
    :return: The name
    :raises argparse.ArgumentTypeError: If there is no such module
    """
    try:
        found = find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # The package that the module is said to be in
        found = False
    if not found:
        raise argparse.ArgumentTypeError(f"there is no module {name!r}")
    return name


def destination(flags: Sequence[str]) -> str:
    """
    Give the name under which argparse stores an option.

    :param flags: The spellings of the option, the long one last
    :return: The name
    """
    return flags[-1].lstrip("-").replace("-", "_")


def own_parser(command: str, is_complete: bool = True) -> Parser:
    """
    Make the parser of the arguments that this package adds to a command, or checks.

    :param command: Name of the command
    :param is_complete: Whether the arguments that the command needs have to be there
    :return: Its parser, to be used with ``parse_known_args``
    """
    parser = Parser(f"sb3-reinforce {command}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("options of sb3-reinforce, besides those of RL Zoo")
    if command == "train":
        group.add_argument(
            "--resume",
            metavar="FOLDER",
            help="Go on with a run of which --save-freq has saved the training state, with its arguments: its folder, "
            "'latest', or 'auto' (the latest that has not ended; if there is none, start a new one)",
        )
        group.add_argument("--vec-env", choices=["dummy", "subproc", "envpool"], help="VecEnv type (default: dummy)")
    group.add_argument(
        "--gym-packages", nargs="+", type=module, default=[], metavar="MODULE", help="Modules that register environments"
    )
    for flags in PAIRS.get(command, ()):
        group.add_argument(
            *flags, nargs="+", type=python_pair, metavar="KEY:VALUE", help="A word needs no quotes, anything else is Python"
        )
    for flags in REQUIRED.get(command, ()):
        parser.add_argument(*flags, nargs="+", required=is_complete, help=argparse.SUPPRESS)
    if command == "plot_from_file":  # Not -i with the value "qm"
        parser.add_argument("-iqm", "--iqm", action="store_true", help=argparse.SUPPRESS)
    return parser


def split(command: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    Separate the arguments that this package adds to a command from those of RL Zoo.

    :param command: Name of the command
    :param arguments: Its arguments
    :return: Our arguments, and RL Zoo's, with values as RL Zoo reads them
    """
    wants_help = bool({"-h", "--help"} & set(arguments))
    parser = own_parser(command, is_complete=not wants_help)
    if wants_help:
        print(parser.format_help())
    own, rest = parser.parse_known_args([] if wants_help else arguments)
    for flags in (*PAIRS.get(command, ()), *REQUIRED.get(command, ())):
        values = getattr(own, destination(flags))
        if values:
            rest += [flags[-1], *values]
    if getattr(own, "iqm", False):
        rest.append("--iqm")
    if own.gym_packages and command in IMPORTING:
        rest += ["--gym-packages", *own.gym_packages]
    return own, ["--help"] if wants_help else rest


def agent_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the arguments by which RL Zoo's commands find an agent, with RL Zoo's defaults.

    :param arguments: Arguments of a command
    :return: ``algo``, ``env`` and ``folder``
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("-f", "--folder", default="rl-trained-agents")
    return parser.parse_known_args(arguments)[0]
