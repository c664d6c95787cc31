"""``sb3-reinforce compare``, as it is started from a shell: faults, clusters, bad input, and what is in its folder."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from sb3_reinforce.compare.cli import COMMANDS
from sb3_reinforce.compare.contenders import parse_contender
from tests.test_zoo_commands import ENVIRON, files, run, succeed

ROOT = Path(__file__).parent.parent
BUDGET = ("-n", "300", "--eval-freq", "100", "--eval-episodes", "3", "--jobs", "2", "--gym-packages", "tests.compare_envs")
SMALL = ("--algos", "reinforce", "--seeds", "1", "--env")
FIXED = "fixed=reinforce:baseline:null,policy_kwargs:dict(net_arch=[8,8])"
REPORT = ["curves.csv", "report.md", "results.json", "runs.csv"] + [
    f"{name}.{kind}" for name in ("curves_episodes", "curves_seconds", "curves_steps", "scores") for kind in ("png", "svg")
]


def compare(out, *arguments, runner=run, **variables):
    arguments = ["compare", "--out", out, *arguments]
    return runner(ROOT, *arguments, program=("-W", "ignore", "-m", "sb3_reinforce"), **variables)


@contextmanager
def started(out, *arguments, **variables):
    """The command, while it is running."""
    command = [sys.executable, "-W", "ignore", "-m", "sb3_reinforce", "compare", "--out", str(out), *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may have switched it off, for the child too
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRON | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=600):
    """:return: What the condition gives as soon as that is true"""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.05)
    return result


def processes(text):
    """:return: Ids of the processes in whose command the text is"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(text).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # It has ended
            pass
    return found


def statuses(out):
    runs = pd.read_csv(out / "runs.csv")
    return dict(zip(zip(runs["contender"], runs["env"], runs["seed"], strict=True), runs["status"], strict=True))


def content(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


def test_commands_are_listed(tmp_path):
    output = succeed(tmp_path, "--help")
    assert all(f"  {name} " in output for name in COMMANDS)
    assert "NAME=ALGO:key:value" in succeed(tmp_path, "compare", "--help")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison in two environments, all of whose runs are done."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    variants = ("reinforce", FIXED, "ppo=ppo:n_steps:32")
    output = compare(out, "--algos", *variants, "--env", "Plain-v0", "CartPole-v1", "--seeds", 3, 5, *BUDGET, runner=succeed)
    assert "12 waiting" not in output and "16 done" in output
    return out


def test_files(finished):
    assert set(REPORT) < files(finished)
    assert (finished / "configs" / "fixed.yml").is_file()
    for name in REPORT:
        if name.endswith(".png"):
            with Image.open(finished / name) as picture:
                assert min(picture.size) > 300


def test_runs(finished):
    runs = pd.read_csv(finished / "runs.csv")
    # CartPole has no action of zeros: there is only the other reference
    assert list(dict.fromkeys(runs["contender"])) == ["reinforce", "fixed", "ppo", "random"]
    assert (runs["status"] == "done").all() and runs["error"].isna().all()
    trained, references = runs[runs["algo"].notna()], runs[runs["algo"].isna()]
    assert (trained["num_timesteps"] >= 300).all() and (trained["seconds"] > 0).all()
    np.testing.assert_allclose(trained["steps_per_second"], trained["num_timesteps"] / trained["seconds"], rtol=1e-5)
    assert trained[["deterministic", "stochastic"]].notna().all(axis=None)
    assert references["deterministic"].isna().all() and references["stochastic"].notna().all()
    # A random action between -1 and 1 costs a half per step, on average
    plain = references[references["env"] == "Plain-v0"]["stochastic"]
    assert (abs(plain - 5) < 1.5).all()


def test_each_run_is_one_of_rl_zoo(finished, tmp_path):
    """The recorded command gives the same run, and RL Zoo's commands work on its folder."""
    log_folder = finished / "runs" / "fixed"
    folder = log_folder / "reinforce" / "CartPole-v1_2"
    assert {"CartPole-v1.zip", "evaluations.npz", "0.monitor.csv", "CartPole-v1/config.yml"} < files(folder)
    assert len(list(folder.glob("tensorboard/CartPole-v1/REINFORCE_1/events.*"))) == 1
    succeed(tmp_path, "enjoy", "--algo", "reinforce", "--env", "CartPole-v1", "-f", log_folder, "-n", 20, "--no-render")
    succeed(tmp_path, "all_plots", "-a", "reinforce", "-e", "CartPole-v1", "-f", log_folder)

    command = (folder / "CartPole-v1" / "command.txt").read_text().split()
    assert command[:2] == ["sb3-reinforce", "train"] and command[command.index("--seed") + 1] == "5"
    command += ["-f", str(tmp_path)]
    command[command.index("-tb") + 1] = str(tmp_path / "tensorboard")
    succeed(tmp_path, *command[1:], PYTHONPATH=str(ROOT))
    both = [np.loadtxt(f / "0.monitor.csv", delimiter=",", skiprows=2, usecols=(0, 1)) for f in (
        folder, tmp_path / "reinforce" / "CartPole-v1_1")]  # fmt: skip
    np.testing.assert_array_equal(*both)
    config = yaml.unsafe_load((folder / "CartPole-v1" / "config.yml").read_text())
    assert config["baseline"] is None and config["policy_kwargs"] == "dict(net_arch=[8,8])"


def test_episodes_are_those_of_the_monitor(finished):
    folder = finished / "runs" / "reinforce" / "reinforce" / "Plain-v0_1"
    episodes = pd.read_csv(folder / "episodes.csv")
    returns, lengths = np.loadtxt(folder / "0.monitor.csv", delimiter=",", skiprows=2, usecols=(0, 1)).T
    np.testing.assert_allclose(episodes["return"], returns, rtol=1e-5)
    np.testing.assert_array_equal(episodes["num_timesteps"], lengths.cumsum())
    assert (np.diff(episodes["seconds"], prepend=0) >= 0).all()


def test_report_of_the_folder_alone(finished):
    """It is the same to the byte."""
    before = content(finished)
    for name in REPORT:
        (finished / name).unlink()
    compare(finished, "--report", runner=succeed)
    assert content(finished) == before


def test_report_leaves_cells_blank(finished):
    report = (finished / "report.md").read_text()
    assert "nan" not in report and "None" not in report and "0.0 +/-" not in report
    # One in each environment
    assert len([line for line in report.splitlines() if line.startswith("| random | 2 | | | |")]) == 2
    assert "Seeds: 3 5 (n = 2)" in report and "rliable, 2,000 resamples" in report
    assert "sb3-reinforce compare --out" in report and "torch" in report


def test_finished_runs_are_not_run_again(finished):
    results = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*/*/result.json")}
    comparison = json.loads((finished / "comparison.json").read_text())
    arguments = comparison["command"].split("--algos")[1]
    compare(finished, "--resume", "--algos", *shlex.split(arguments), runner=succeed)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*/*/result.json")} == results
    assert len(results) == 16


def test_runs_go_seed_by_seed(finished):
    runs = sorted(finished.glob("runs/*/*/*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    # The folder of the Kth seed ends in K
    assert [path.parent.name[-1] for path in runs] == ["1"] * 8 + ["2"] * 8


def test_seeds_can_be_added(finished, tmp_path):
    """To what a repository keeps of a comparison: of its runs, the results and the episodes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in out.glob("runs/**/*.*"):
        if path.is_file() and path.name not in ("result.json", "episodes.csv"):
            path.unlink()
    results = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*/result.json")}
    arguments = json.loads((out / "comparison.json").read_text())["command"].split("--algos")[1]
    arguments = shlex.split(arguments.replace("--seeds 3 5", "--seeds 3 5 8"))
    compare(out, "--resume", "--algos", *arguments, runner=succeed)
    assert {path: path.stat().st_mtime_ns for path in results} == results and len(results) == 16
    assert set(statuses(out).values()) == {"done"} and len(statuses(out)) == 24
    assert "Seeds: 3 5 8 (n = 3)" in (out / "report.md").read_text()


@pytest.fixture
def switches(tmp_path):
    folder = tmp_path / "switches"
    folder.mkdir()
    return folder


def test_faults(tmp_path, switches):
    """One environment raises, one run is killed; the others go on, the report says so, and what is missing can be run."""
    out = tmp_path / "out"
    arguments = ("--algos", "reinforce", "--seeds", 1, 2, "--env", "Plain-v0", "Raising-v0", "Slow-v0", *BUDGET)
    (switches / "raise").touch()
    (switches / "slow").touch()
    with started(out, *arguments, COMPARE_ENVS=str(switches)) as process:
        victim = out / "runs/reinforce/reinforce/Slow-v0_2"
        wait_for((victim / "0.monitor.csv").is_file)
        (pid,) = processes(victim)
        os.kill(pid, signal.SIGKILL)
        (switches / "slow").unlink()
        process.communicate(timeout=900)
        assert process.returncode == 1
    expected = {(name, env, seed): "done" for name in ("reinforce", "random", "zero_action")
                for env in ("Plain-v0", "Raising-v0", "Slow-v0") for seed in (1, 2)}  # fmt: skip
    failed = [("reinforce", "Raising-v0", 1), ("reinforce", "Raising-v0", 2), ("reinforce", "Slow-v0", 2)]
    assert statuses(out) == expected | dict.fromkeys(failed, "failed")
    report = (out / "report.md").read_text()
    assert "`runs/reinforce/reinforce/Slow-v0_2` failed: `killed by signal 9`" in report
    assert report.count("RuntimeError: the motor is broken") == 2
    assert "| reinforce | 3 | 3 | 0 |" in report
    assert "Traceback" in (out / "runs/reinforce/reinforce/Raising-v0_1/log.txt").read_text()
    results = json.loads((out / "results.json").read_text())["statistics"]
    assert results["Raising-v0"]["reinforce"]["deterministic"]["iqm"] == {"value": None, "interval": None, "n": 0}

    survivors = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*/result.json")}
    (switches / "raise").unlink()
    compare(out, "--resume", *arguments, COMPARE_ENVS=str(switches), runner=succeed)
    assert statuses(out) == expected
    assert {path: path.stat().st_mtime_ns for path in survivors} == survivors
    assert "failed:" not in (out / "report.md").read_text()


def test_interrupt(tmp_path, switches):
    """Ctrl-C: what has finished is reported, and no process is left behind."""
    out = tmp_path / "out"
    (switches / "slow").touch()
    arguments = ("--algos", "reinforce", "--seeds", 1, "--env", "Plain-v0", "Slow-v0", *BUDGET)
    with started(out, *arguments, COMPARE_ENVS=str(switches)) as process:
        wait_for((out / "runs/reinforce/reinforce/Plain-v0_1/result.json").is_file)
        wait_for((out / "runs/reinforce/reinforce/Slow-v0_1/0.monitor.csv").is_file)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "--resume goes on with what is missing" in output.decode()
    wait_for(lambda: not processes(out / "runs"))
    found = statuses(out)
    assert found["reinforce", "Plain-v0", 1] == "done" and found["reinforce", "Slow-v0", 1] == "missing"


def test_nothing_finished(tmp_path, switches):
    out = tmp_path / "out"
    (switches / "raise").touch()
    status, _, errors = compare(out, *SMALL, "Raising-v0", *BUDGET, "--eval-episodes", 20, COMPARE_ENVS=str(switches))
    assert status == 1 and "Traceback" not in errors
    assert "No run has finished: there is nothing to report." in (out / "report.md").read_text()
    assert set(statuses(out).values()) == {"failed"}


@contextmanager
def dask_cluster(folder, n_workers):
    """The address of a scheduler on the loopback address, and its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, programs = f"tcp://127.0.0.1:{port}", []

    def start(*arguments):
        command = [sys.executable, "-m", f"distributed.cli.dask_{arguments[0]}", *map(str, arguments[1:])]
        with (folder / f"{arguments[0]}_{len(programs)}.log").open("wb") as log:
            programs.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=log, stderr=log))

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show")
        for _ in range(n_workers):
            start("worker", address, "--nthreads", 1, "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
        yield address, programs[1:]
    finally:
        for program in programs:
            program.kill()
            program.wait()


def test_dask(tmp_path):
    """The runs spread over both workers; one of these is killed, and yet every run is delivered."""
    out = tmp_path / "out"
    with dask_cluster(tmp_path, 2) as (address, (first, second)):
        arguments = ("--algos", "reinforce", "--seeds", *range(1, 6), "--env", "Plain-v0", *BUDGET)
        with started(out, *arguments, "--backend", "dask", "--address", address) as process:

            def running_on(worker):
                jobs = [json.loads(path.read_text()) for path in out.glob("runs/reinforce/*/*/job.json")]
                return [job for job in jobs if job["worker"].endswith(f":{worker.pid}")]

            wait_for(lambda: running_on(first) and running_on(second))
            first.kill()
            output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output.decode()
    assert set(statuses(out).values()) == {"done"}
    assert not processes(out / "runs")


BAD_INPUT = [
    (("--algos", "reinforcee", "--env", "Plain-v0"), "'reinforcee' is no algorithm, did you mean 'reinforce'?"),
    (("--env", "Plane-v0"), "'Plane-v0' is no environment, did you mean 'Plain-v0'?"),
    (("--algos", "x=reinforce:basline:null"), "'basline' is not a hyperparameter of reinforce, did you mean 'baseline'?"),
    (("--algos", "x=reinforce:baseline:means"), "baseline='means' must be one of"),
    (("--algos", "x=reinforce:baseline"), "'baseline' in 'x=reinforce:baseline' must be key:value"),
    (("--algos", "x=reinforce:gamma:[1"), "is not YAML"),
    (("--algos", "x=reinforce:learning_rate:-1e-4"), "learning_rate"),
    (("--algos", "x=reinforce:n_envs:8,n_episodes:4"), "n_episodes=4 must be at least the number of environments, 8"),
    (("--algos", "reinforce", "x=ppo:n_steps:abc"), "x cannot be set up on Plain-v0: "),
    (("--algos", "x=ppo:normalize:dict(norm_rewards=False)"), "unexpected keyword argument 'norm_rewards'"),
    (
        ("--algos", "x=ppo", "y=ppo:env_kwargs:{scale: 2}"),
        "Plain-v0: the contenders have different env_kwargs [{}, {'scale': 2}]",
    ),
    (("--algos", "..=reinforce"), "must be ALGO or NAME=ALGO:key:value"),
    (("--env", "Plain-v0", "Game-v0"), "reinforce.yml has no entry 'atari', which Game-v0 needs"),
    (("--algos", "reinforce:baseline:null"), "must be ALGO or NAME=ALGO:key:value"),
    (("--algos", "random=reinforce"), "'random' is the name of a reference"),
    (("--algos", "x=ppo", "x=a2c"), "the name 'x' is given twice"),
    (("--algos", "x=ppo:entry:defalt"), "'defalt' is not an entry of ppo, did you mean 'default'?"),
    (("--algos", "x=ppo:conf_file:nowhere.yml"), "nowhere.yml"),
    (("--algos", "x=ppo:conf_file:nowhere.yml,entry:default"), "conf_file:nowhere.yml cannot be read"),
    (("--algos", "x=ppo:conf_file:setup.py"), "conf_file:setup.py must be a .yml file"),
    (("--algos",), "expected at least one argument"),
    (("--seeds", "1", "2", "1"), "--seeds: 1 is given twice"),
    (("--seeds", "-1"), "seeds=-1 must be an integer in [0, "),
    (("--env", "Plain-v0", "Plain-v0"), "--env: 'Plain-v0' is given twice"),
    (("--thresholds", "1", "2"), "--thresholds: 2 are given"),
    (("--jobs", "0"), "n_jobs=0 must be an integer in [1, "),
    (("--eval-episodes", "0"), "n_eval_episodes=0 must be an integer in [1, "),
    (("--backend", "dask"), "--backend dask needs the --address of a cluster"),
    (("--gym-packages", "nowhere_at_all"), "--gym-packages nowhere_at_all: there is no such module"),
    (("--gym-packages", "nowhere.at_all"), "--gym-packages nowhere.at_all: there is no such module"),
    (("--colour", "red"), "unrecognized arguments: --colour red"),
]


#: Calls the command once for each list of arguments: its exit statuses, and what it has printed to the error stream
CALLS = """
import contextlib, io, json, sys
from sb3_reinforce.__main__ import main

answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            answers.append([main(), ""])
        except SystemExit as end:
            answers.append([end.code, errors.getvalue()] if isinstance(end.code, int) else [1, errors.getvalue() + end.code])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What is said to bad input, and where the folder of each would be, under its number."""
    folder = tmp_path_factory.mktemp("answers")
    calls = [
        ["compare", "--out", str(folder / str(index)), *SMALL, "Plain-v0", *BUDGET, *arguments]
        for index, (arguments, _) in enumerate(BAD_INPUT)
    ]
    status, output, errors = run(ROOT, json.dumps(calls), program=("-W", "ignore", "-c", CALLS))
    assert status == 0 and errors == ""
    return json.loads(output.splitlines()[-1]), folder


@pytest.mark.parametrize("index, message", [(index, message) for index, (_, message) in enumerate(BAD_INPUT)])
def test_bad_input(answers, index, message):
    """One line, before anything is written."""
    status, errors = answers[0][index]
    assert status in (1, 2)
    assert message in errors and len(errors.strip().splitlines()) == 1, errors
    assert not (answers[1] / str(index)).exists()


def test_budgets_of_the_entries(tmp_path):
    arguments = ("--algos", "a=reinforce:n_timesteps:100", "b=reinforce:n_timesteps:200", "--seeds", 1, "--env", "CartPole-v1")
    status, _, errors = compare(tmp_path / "out", *arguments)
    assert status == 1 and "different numbers of steps [100, 200], choose one with -n" in errors


def test_unreachable_cluster(tmp_path):
    start = time.monotonic()
    status, _, errors = compare(
        tmp_path / "out", *SMALL, "Plain-v0", *BUDGET, "--backend", "dask", "--address", "tcp://127.0.0.1:1"
    )
    assert status == 1 and "no dask cluster answers at --address tcp://127.0.0.1:1" in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out").exists()


def test_missing_package(tmp_path):
    (tmp_path / "distributed.py").write_text("raise ImportError('hidden')")
    environ = {"PYTHONPATH": f"{tmp_path}"}
    arguments = (*SMALL, "Plain-v0", *BUDGET, "--backend", "dask", "--address", "tcp://127.0.0.1:1")
    status, _, errors = compare(tmp_path / "out", *arguments, **environ)
    assert status == 1 and 'pip install "sb3-reinforce[dask]"' in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ((), "holds a comparison already: choose another folder, or go on with --resume"),
        (("--resume", "--seeds", "3"), "holds another comparison: its seeds is [3, 5], not [3]"),
        (("--resume", "--eval-freq", "50"), "its eval_freq is 100, not 50"),
        (("--resume", "--algos", "reinforce"), "its contenders are reinforce, fixed, ppo, random, not reinforce, random"),
        (
            ("--resume", "--algos", "reinforce", FIXED, "ppo=ppo:n_steps:16"),
            "its contenders.ppo.hyperparams.Plain-v0.n_steps is 32, not 16",
        ),
    ],
)
def test_folder_of_another_comparison(finished, change, message):
    before = content(finished)
    command = json.loads((finished / "comparison.json").read_text())["command"]
    arguments = shlex.split(command)[4:]
    status, _, errors = compare(finished, *arguments, *change)
    assert status == 1 and message in errors and len(errors.strip().splitlines()) == 1, errors
    assert content(finished) == before


def test_folder_without_the_runs(finished, tmp_path):
    """What is left of a comparison may be all that there is."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("runs"))
    before = content(out)
    arguments = shlex.split(json.loads((out / "comparison.json").read_text())["command"])[4:]
    status, _, errors = compare(out, *arguments, "--resume")
    assert status == 1 and "the report of a comparison without its runs" in errors and len(errors.strip().splitlines()) == 1
    assert content(out) == before


def test_evaluation_is_that_of_the_setting(tmp_path):
    """In the environment that it is trained in, as the references are; with gSDE, each environment has noise of its own."""
    algo = "sde=reinforce:use_sde:true,env_kwargs:{scale: 100}"
    compare(tmp_path / "out", "--algos", algo, "--seeds", 1, "--env", "Plain-v0", *BUDGET, runner=succeed)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("out/runs/*/*/*/result.json"))]
    (random, trained, zero_action) = results
    assert zero_action["deterministic"] == [1000.0] * 3
    assert all(abs(score) > 10 for score in (*random["stochastic"], *trained["deterministic"]))
    assert np.ptp(trained["deterministic"]) < 1e-3 and np.diff(sorted(trained["stochastic"])).min() > 0.1


def test_folder_of_something_else(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "comparison.json").write_text("{}")
    status, _, errors = compare(tmp_path / "json", *SMALL, "Plain-v0", *BUDGET, "--resume")
    assert status == 1 and "holds another comparison: its envs is None" in errors and len(errors.strip().splitlines()) == 1
    shutil.rmtree(tmp_path / "json")
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, errors = compare(tmp_path / "thesis.txt", *SMALL, "Plain-v0", *BUDGET)
    assert status == 1 and "must be a folder" in errors and len(errors.strip().splitlines()) == 1
    status, _, errors = compare(tmp_path, *SMALL, "Plain-v0", *BUDGET)
    assert status == 1 and "must be a folder that does not exist or is empty" in errors
    assert files(tmp_path) == {"thesis.txt"}
    status, _, errors = compare(tmp_path, "--report")
    assert status == 1 and "holds no comparison" in errors


@pytest.mark.parametrize(
    "text, settings",
    [
        ("a=ppo", {}),
        ("a=ppo:gamma:0.9", {"gamma": 0.9}),
        (
            "a=ppo:learning_rate:1e-4,ent_coef:2E-3,target_kl:null",
            {"learning_rate": 1e-4, "ent_coef": 2e-3, "target_kl": None},
        ),
        (
            "a=ppo:policy_kwargs:dict(log_std_init=-2,net_arch=[64,64]),normalize:true",
            {"policy_kwargs": "dict(log_std_init=-2,net_arch=[64,64])", "normalize": True},
        ),
        ("a=ppo:policy_kwargs:{log_std_init: -2, net_arch: [8]}", {"policy_kwargs": {"log_std_init": -2, "net_arch": [8]}}),
    ],
)
def test_variants(text, settings):
    assert parse_contender(text) == ("a", "ppo", settings)


def test_help_is_quick():
    """It needs no PyTorch."""
    code = (
        "import sys, sb3_reinforce.compare.cli; print([n for n in ('torch', 'numpy', 'joblib', 'pandas') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"
