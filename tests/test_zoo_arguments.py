"""What is taken from the command line before RL Zoo reads the rest."""

import argparse
from concurrent.futures import ProcessPoolExecutor

import pytest
import yaml

from sb3_reinforce.zoo.arguments import module, parse_value, plain_value, split
from tests.zoo_command import FORKSERVER


@pytest.mark.parametrize(
    "text, value",
    [
        ("mean", "mean"),
        ("'mean'", "mean"),
        ("lin_0.1", "lin_0.1"),
        ("lin_1e-3", "lin_1e-3"),
        ("InvertedPendulum-v4", "InvertedPendulum-v4"),
        ("models/arm.xml", "models/arm.xml"),
        ("None", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("-1", -1),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("[64, 64]", [64, 64]),
        ("{'a': 1}", {"a": 1}),
        ("dict(net_arch=[8])", {"net_arch": [8]}),
        ("{net_arch: [8]}", {"net_arch": [8]}),
        ("1-0.01", 0.99),
        ("'a b'", "a b"),
    ],
)
def test_values(text, value):
    assert parse_value(text)[0] == eval(parse_value(text)[1]) == value


@pytest.mark.parametrize("text", ["[8", "a b", "", "x: 1"])
def test_what_is_no_value(text):
    with pytest.raises(ValueError, match="is neither a word nor Python"):
        parse_value(text)


@pytest.mark.parametrize(
    "text, value", [("(8, 8)", [8, 8]), ("null", None), ("dict(a=nn.Tanh)", "dict(a=nn.Tanh)"), ("1e-4", 1e-4)]
)
def test_values_in_a_file(text, value):
    assert plain_value(text) == value


def test_split():
    arguments = [
        "--algo",
        "ppo",
        "--resume",
        "auto",
        "-n",
        "-1",
        "--gym-packages",
        "json",
        "csv",
        "-P",
        "--vec-env",
        "envpool",
    ]
    own, rest = split("train", arguments)
    assert (own.resume, own.vec_env, own.gym_packages) == ("auto", "envpool", ["json", "csv"])
    assert rest == ["--algo", "ppo", "-n", "-1", "-P", "--gym-packages", "json", "csv"]
    # RL Zoo's command knows no such option
    own, rest = split("record_video", ["--gym-packages", "json", "--env", "x"])
    assert (own.gym_packages, rest) == (["json"], ["--env", "x"])


def test_what_plots_need(capsys):
    arguments = ["-a", "ppo", "-e", "x", "y", "--exp-folders", "logs", "--median"]
    own, rest = split("all_plots", arguments)
    assert own.exp_folders == ["logs"]
    assert rest == ["--median", "--algos", "ppo", "--env", "x", "y", "--exp-folders", "logs"]
    _, rest = split("plot_from_file", ["-i", "results.pkl", "-iqm", "-l", "a"])
    assert "--iqm" in rest and "results.pkl" in rest and "qm" not in rest
    with pytest.raises(SystemExit) as error:
        split("all_plots", arguments[:2])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("sb3-reinforce all_plots: error: the following arguments are required")


def test_help(capsys):
    assert split("all_plots", ["-h"])[1] == ["--help"]
    assert "--gym-packages" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.module", ""])
def test_module_that_is_not_there(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"there is no module '{name}'"):
        module(name)


def written(folder):
    """:return: What RL Zoo reads from the arguments of a run, written as they would be typed"""
    from rl_zoo3.utils import StoreDict

    from sb3_reinforce.zoo.resume import arguments_of_run

    parser = argparse.ArgumentParser()
    for name in ("env", "conf-file", "trained-agent"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    parser.add_argument("--track", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--verbose", type=int)
    return vars(parser.parse_args(arguments_of_run(folder, ["--seed", "7", "-P", "--verbose", "2"])))


@pytest.mark.zoo
def test_arguments_of_run(tmp_path):
    """Those of the run, whatever else is on the command line, but for what concerns the display."""
    saved = {"env": "x y", "conf_file": None, "trained_agent": "", "seed": -5, "env_kwargs": {"a": 0.5, "b": "c d"}}
    saved |= {"gym_packages": ["json", "csv"], "track": True}
    (tmp_path / "x").mkdir()
    ignored = {"progress": False, "verbose": 1, "hyperparams": {"gamma": 1}, "truncate_last_trajectory": True, "command": "c"}
    ignored |= {"trial_id": 0, "study_name": "s", "storage": "s.log"}
    (tmp_path / "x" / "args.yml").write_text(yaml.dump(saved | ignored))
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        found = pool.submit(written, tmp_path).result()
    assert found == saved | {"trained_agent": None, "progress": True, "verbose": 2}
