"""The commands ``compare`` and ``gradients`` of ``sb3-reinforce``. Imports nothing heavy."""

import argparse
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from sb3_reinforce.zoo.arguments import Parser, module

#: Packages that these commands need besides those of the algorithm, by the extra that installs them
EXTRAS = {"compare": ("joblib", "pandas", "rliable", "seaborn"), "dask": ("distributed",)}


def require(extra: str) -> None:
    """
    Check that the packages of an extra are installed.

    :param extra: Name of the extra
    :raises ImportError: If one is missing
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} must be installed for this: pip install "sb3-reinforce[{extra}]"')


def make_parser() -> argparse.ArgumentParser:
    """
    Define the arguments of ``sb3-reinforce compare``.

    :return: The parser
    """
    parser = Parser(
        "sb3-reinforce compare",
        description="Train algorithms on environments with many seeds, evaluate them, and write a report.",
        epilog="A variant of an algorithm is NAME=ALGO:key:value,key:value with the values of train -params, for example "
        "no_baseline=reinforce:baseline:null. conf_file:FILE.yml takes the hyperparameters from another file, "
        "entry:NAME another entry than that of the environment, such as RL Zoo's entry:default.",
    )
    parser.add_argument("--env", nargs="+", default=[], metavar="ID", help="environment IDs")
    parser.add_argument("--algos", nargs="+", default=[], metavar="ALGO", help="algorithms of RL Zoo, or variants of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="random generator seeds")
    parser.add_argument("-n", "--n-timesteps", type=int, default=-1, help="time steps of a run (default: those of the entry)")
    parser.add_argument("--eval-freq", type=int, default=25_000, help="evaluate every n steps (-1: at the end only)")
    parser.add_argument("--eval-episodes", type=int, default=20, help="number of episodes of an evaluation")
    parser.add_argument(
        "--thresholds", nargs="+", type=float, help="return to reach, one or one per environment (default: Gymnasium's)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--backend", choices=["loky", "dask"], default="loky", help="processes here, or a cluster")
    parser.add_argument("--address", help="address of the cluster's scheduler")
    parser.add_argument("--resume", action="store_true", help="run what is missing in --out, or has failed")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what is in --out again")
    parser.add_argument("--svg", action="store_true", help="write the pictures as SVG too")
    parser.add_argument("--vec-env", choices=["dummy", "subproc"], default="dummy", help="VecEnv type")
    parser.add_argument("--gym-packages", nargs="+", type=module, default=[], help="modules that register environments")
    return parser


def compare() -> None:
    """
    Run ``sb3-reinforce compare``: the exit status is 0 if all runs are done, 1 if one has failed, 130 after Ctrl-C.
    """
    parser = make_parser()
    args = parser.parse_args()
    require("compare")
    if args.report:
        if args.env or args.algos or args.seeds or args.thresholds:
            parser.error("--report writes what is in --out: --env, --algos, --seeds and --thresholds have no effect on it")
        from sb3_reinforce.compare.report import write_report

        write_report(args.out, args.svg)
        return
    if args.address is not None and args.backend != "dask":
        parser.error("--address is for --backend dask")
    if args.backend == "dask":
        require("dask")
        if args.address is None:
            parser.error("--backend dask needs the --address of a cluster")
    from sb3_reinforce.compare import runner

    try:
        is_complete = runner.compare(
            envs=args.env,
            algos=args.algos,
            seeds=args.seeds,
            out=args.out,
            n_timesteps=args.n_timesteps,
            eval_freq=args.eval_freq,
            n_eval_episodes=args.eval_episodes,
            thresholds=args.thresholds,
            n_jobs=args.jobs,
            backend=args.backend,
            address=args.address,
            resume=args.resume,
            gym_packages=args.gym_packages,
            vec_env=args.vec_env,
            svg=args.svg,
            command=shlex.join([*sys.argv[0].split(), *sys.argv[1:]]),
        )
    except KeyboardInterrupt:
        print("Interrupted: --resume goes on with what is missing")
        sys.exit(130)
    sys.exit(0 if is_complete else 1)


def estimator(text: str) -> tuple[str, str | None]:
    """
    Read an estimator of ``--estimators``.

    :param text: A return and a baseline
    :return: Both
    """
    returns, _, baseline = text.partition(":")
    return returns, None if baseline == "none" else baseline


def gradients() -> None:
    """Run ``sb3-reinforce gradients``."""
    parser = Parser(
        "sb3-reinforce gradients",
        description="Measure the quality of gradient estimates of a policy: variance, signal-to-noise ratio, cosine between "
        "independent batches and noise scale, for every return and baseline of REINFORCE, by the number of episodes.",
    )
    parser.add_argument("--model", type=Path, metavar="ZIP", help="a trained REINFORCE (default: a fresh one)")
    parser.add_argument("--env", metavar="ID", help="environment ID (default: the name of the model's file)")
    parser.add_argument("-n", "--n-episodes", type=int, default=256, help="number of episodes")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="episodes per estimate (default: 2 4 8 16 32)")
    parser.add_argument(
        "--estimators", nargs="+", type=estimator, metavar="RETURNS:BASELINE",
        help="such as reward_to_go:timestep episode:none (default: all, of which the picture shows the reward_to_go)",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, default=1, help="measure too what groups of so many episodes are worth")
    parser.add_argument("--seed", type=int, default=0, help="random generator seed")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--gym-packages", nargs="+", type=module, default=[], help="modules that register environments")
    args = parser.parse_args()
    require("compare")
    from sb3_reinforce.compare import gradients

    for name in args.gym_packages:
        import_module(name)
    command = shlex.join([*sys.argv[0].split(), *sys.argv[1:]])
    gradients.gradients(
        args.out,
        args.model,
        args.env,
        args.n_episodes,
        args.batch_sizes,
        args.seed,
        command,
        args.estimators,
        args.group_size,
    )
    print((args.out / "gradients.md").read_text())


#: Name of each command, what it does, and how
COMMANDS = {
    "compare": ("compare algorithms over many seeds", compare),
    "gradients": ("measure the quality of gradient estimates", gradients),
}
