"""``sb3-reinforce compare``: what is in its folder, going on with it, bad input, faults, clusters."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from rich.console import Console

from sb3_reinforce.__main__ import main
from sb3_reinforce.checks import PACKAGES, versions
from sb3_reinforce.compare.archive import pack, read_archive, read_episodes
from sb3_reinforce.compare.cli import COMMANDS
from sb3_reinforce.compare.contenders import parse_contender
from sb3_reinforce.compare.files import make_jobs, read_json, write_json
from sb3_reinforce.compare.plan import describe_contenders
from sb3_reinforce.compare.progress import Progress
from tests import compare_envs
from tests.zoo_command import ENVIRON, files, succeed

# What a process of its own may warn of, too
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
BUDGET = ("-n", "300", "--eval-freq", "100", "--eval-episodes", "3", "--gym-packages", "tests.compare_envs")
SMALL = ("--algos", "reinforce", "--seeds", "1", "--env")
FIXED = "fixed=reinforce:baseline:null,policy_kwargs:dict(net_arch=[8,8])"
REPORT = {"report.md", "results.json", "runs.csv", "curves_seconds.png", "curves_steps.png", "scores.png"}
KEPT = {*REPORT, "comparison.json", "episodes.csv.xz"}


def call(out, *arguments):
    """:return: Exit status of ``compare`` in this process, and what it has printed to the error stream"""
    argv = ["", "compare", "--out", *map(str, (out, *arguments))]
    with mock.patch.object(sys, "argv", argv), redirect_stderr(StringIO()) as errors:
        try:
            main()
        except SystemExit as end:
            return (end.code, errors.getvalue()) if isinstance(end.code, int) else (1, f"{errors.getvalue()}{end.code}\n")
    return 0, errors.getvalue()


@pytest.fixture(scope="module")
def done():
    """The runs that were done, none of which trains; and few resamples are drawn."""
    done = []

    def run_job(folder, job):
        done.append((job["contender"], job["env"], job["seed"]))
        compare_envs.fake_run(folder, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_reinforce.compare.runner.run_job", run_job)
        patch.setattr("sb3_reinforce.compare.results.REPS", 20)
        patch.setattr("sb3_reinforce.compare.plots.REPS", 20)
        yield done


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of something else than pictures, which take most of the time."""
    for name in ("plot_curves", "plot_scores"):
        monkeypatch.setattr(f"sb3_reinforce.compare.report.{name}", lambda *_: None)


def arguments_of(folder, **changes):
    """:return: The arguments that the comparison in a folder was made with, without ``--out``"""
    command = read_json(folder / "comparison.json")["command"]
    for old, new in changes.items():
        command = command.replace(f"--{old} {new[0]}", f"--{old} {new[1]}")
    return shlex.split(command)[4:]


def statuses(out):
    runs = pd.read_csv(out / "runs.csv")
    return dict(zip(zip(runs["contender"], runs["env"], runs["seed"], strict=True), runs["status"], strict=True))


def content(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def is_one_line(text):
    return len(text.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def finished(done, tmp_path_factory):
    """A comparison in two environments, all of whose runs are done."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    algos = ("reinforce", FIXED, "ppo=ppo:n_steps:32")
    arguments = ("--algos", *algos, "--env", "Plain-v0", "CartPole-v1", "--seeds", 3, 5, *BUDGET)
    assert call(out, *arguments) == (0, "")
    assert len(done) == 16
    # So that an interrupted comparison has as many runs of each contender
    assert [seed for _, _, seed in done] == [3] * 8 + [5] * 8
    return out


@pytest.fixture
def kept(finished, tmp_path):
    """What a repository keeps of that comparison."""
    shutil.copytree(finished, tmp_path / "kept", ignore=shutil.ignore_patterns("runs"))
    assert files(tmp_path / "kept") == KEPT
    return tmp_path / "kept"


def test_files(finished):
    assert {name for name in files(finished) if not name.startswith("runs/")} == KEPT
    assert not [name for name in files(finished) if name.endswith(("result.json", "episodes.csv"))]
    for name in REPORT:
        if name.endswith(".png"):
            with Image.open(finished / name) as picture:
                assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 10
    assert sum((finished / name).stat().st_size for name in KEPT) < 300_000


def test_archive_holds_every_number(finished, tmp_path):
    """To the last bit."""
    comparison = read_json(finished / "comparison.json")
    episodes = read_archive(finished).set_index(["contender", "env", "seed", "phase"])
    for job in make_jobs(finished, comparison).values():
        folder = tmp_path / f"{job['contender']}_{job['env']}_{job['seed']}"
        compare_envs.fake_run(folder, job)
        result, key = read_json(folder / "result.json"), (job["contender"], job["env"], job["seed"])
        for kind in {"deterministic", "stochastic"} & set(result):
            assert episodes.loc[(*key, kind), "return"].tolist() == result[kind]
        if job["algo"] is not None:
            training = pd.read_csv(folder / "episodes.csv", float_precision="round_trip")
            found = episodes.loc[(*key, "training"), list(training.columns)].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, training, check_exact=True, check_dtype=False)
            ends = episodes.loc[(*key, "stochastic"), ["num_timesteps", "seconds"]]
            assert (ends == [result["num_timesteps"], result["seconds"]]).all(axis=None)
    assert comparison["versions"] == [versions()] and set(versions()) == {"python", *PACKAGES}


def test_report_of_the_kept_files_alone(finished, kept, done):
    """It is the same to the byte."""
    before = content(kept)
    for name in REPORT:
        (kept / name).unlink()
    assert call(kept, "--report") == (0, "")
    assert content(kept) == before


def test_svg(kept, done):
    assert call(kept, "--report", "--svg") == (0, "")
    assert files(kept) == KEPT | {"curves_seconds.svg", "curves_steps.svg", "scores.svg"}


def test_report_leaves_cells_blank(finished):
    report = (finished / "report.md").read_text()
    assert "nan" not in report and "None" not in report and "0.0 +/-" not in report
    # One in each environment
    assert len([line for line in report.splitlines() if line.startswith("| random | 2 | | | |")]) == 2
    assert "Seeds: 3 5 (n = 2)" in report and "rliable, 2,000 resamples" in report
    assert "sb3-reinforce compare \\\n  --out" in report and "torch" in report
    command = report.split("```")[1]
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(read_json(finished / "comparison.json")["command"])


def test_finished_runs_are_not_run_again(finished, kept, done, no_pictures):
    before, n_done = content(kept), len(done)
    assert call(kept, *arguments_of(kept), "--resume") == (0, "")
    assert len(done) == n_done
    assert {name: text for name, text in content(kept).items() if name in KEPT} == before


def test_seeds_can_be_added(kept, done, no_pictures):
    """To what a repository keeps of a comparison."""
    before = read_archive(kept)
    n_done = len(done)
    assert call(kept, *arguments_of(kept, seeds=("3 5", "3 5 8")), "--resume") == (0, "")
    assert {seed for _, _, seed in done[n_done:]} == {8} and len(done) == n_done + 8
    after = read_archive(kept)
    pd.testing.assert_frame_equal(after[after["seed"] != 8].reset_index(drop=True), before, check_exact=True)
    assert set(statuses(kept).values()) == {"done"} and len(statuses(kept)) == 24
    assert "Seeds: 3 5 8 (n = 3)" in (kept / "report.md").read_text()


def test_failures_are_reported_and_run_again(done, tmp_path, monkeypatch, no_pictures):
    out = tmp_path / "out"
    monkeypatch.setattr(compare_envs, "SWITCHES", tmp_path)
    (tmp_path / "raise").touch()
    assert call(out, *SMALL, "Raising-v0", "Plain-v0", *BUDGET) == (1, "")
    report = (out / "report.md").read_text()
    assert "`runs/reinforce/reinforce/Raising-v0_1` failed: `RuntimeError('the motor is broken')`" in report
    assert "| reinforce | 1 | 1 | 0 |" in report
    found = read_json(out / "results.json")["statistics"]["Raising-v0"]["reinforce"]
    assert found["deterministic"]["iqm"] == {"value": None, "interval": None, "n": 0}
    (tmp_path / "raise").unlink()
    n_done = len(done)
    assert call(out, *SMALL, "Raising-v0", "Plain-v0", *BUDGET, "--resume") == (0, "")
    assert {env for _, env, _ in done[n_done:]} == {"Raising-v0"}
    assert set(statuses(out).values()) == {"done"} and "failed:" not in (out / "report.md").read_text()


def test_nothing_finished(done, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_envs, "SWITCHES", tmp_path)
    (tmp_path / "raise").touch()
    assert call(tmp_path / "out", *SMALL, "Raising-v0", *BUDGET) == (1, "")
    assert "No run has finished: there is nothing to report." in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "episodes.csv.xz").exists()
    assert set(statuses(tmp_path / "out").values()) == {"failed"}


@pytest.mark.parametrize("moment", ["to_csv", "replace", "unlink", "later unlink"])
def test_no_run_is_lost(finished, tmp_path, monkeypatch, moment):
    """Packing is interrupted, and done once more."""
    comparison = read_json(finished / "comparison.json") | {"versions": []}
    write_json(tmp_path / "comparison.json", comparison)
    jobs = make_jobs(tmp_path, comparison)
    for folder, job in jobs.items():
        compare_envs.fake_run(folder, job)
    expected = read_episodes(tmp_path, jobs)
    unlink, calls = Path.unlink, []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if moment == "later unlink" and len(calls) < 8:
            unlink(*args, **kwargs)
        else:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"to_csv": pd.DataFrame, "replace": os}.get(moment, Path)
        patch.setattr(owner, moment.split()[-1], interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path)
    pd.testing.assert_frame_equal(read_episodes(tmp_path, jobs), expected, check_exact=True)
    pack(tmp_path)
    pd.testing.assert_frame_equal(read_archive(tmp_path), expected, check_exact=True)
    assert not list(tmp_path.rglob("result.json"))


def test_names_that_pandas_takes_for_nothing(done, tmp_path, no_pictures):
    algos = ("nan=reinforce", "NA=ppo:n_steps:32")
    assert call(tmp_path / "out", "--algos", *algos, "--seeds", 1, "--env", "Plain-v0", *BUDGET) == (0, "")
    assert list(dict.fromkeys(read_archive(tmp_path / "out")["contender"])) == ["nan", "NA", "random", "zero_action"]


def test_episodes_that_are_not_there(kept, done):
    """What is left of a comparison may be its report."""
    (kept / "episodes.csv.xz").unlink()
    before = content(kept)
    for arguments, message in (
        (["--report"], "holds a report without the episodes (episodes.csv.xz): it can be read, not written again"),
        ([*arguments_of(kept), "--resume"], "without the episodes (episodes.csv.xz): it cannot be gone on with"),
    ):
        status, errors = call(kept, *arguments)
        assert status == 1 and message in errors and is_one_line(errors)
    assert content(kept) == before


def test_lines_for_a_file(done, tmp_path, capsys, monkeypatch, no_pictures):
    """Where no terminal is, progress is printed line by line, and the table is as wide as it must be."""
    name = "a_name_that_says_all_about_the_settings_of_this_contender_and_more_than_fits_into_eighty_columns"
    slow = lambda folder, job: time.sleep(0.2) or compare_envs.fake_run(folder, job)  # noqa: E731
    monkeypatch.setattr("sb3_reinforce.compare.runner.run_job", slow)
    monkeypatch.setattr("sb3_reinforce.compare.progress.POLL_EVERY", 0.05)
    algos = ("--algos", f"{name}=reinforce", "--seeds", 1, 2, "--env", "Plain-v0")
    assert call(tmp_path / "out", *algos, *BUDGET) == (0, "")
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if " waiting, " in line and ":" in line]
    assert re.match(r"\d\d:\d\d:\d\d \d running, 0 failed, [56] waiting, 0 done", lines[0]) and len(lines) >= 3
    assert len([line for line in output.splitlines() if line.startswith(f"│ {name} ")]) == 2 and "\u2026" not in output


def test_table_on_a_narrow_terminal(finished):
    """Nothing is cut off."""
    comparison = read_json(finished / "comparison.json")
    progress = Progress(make_jobs(finished, comparison), read_archive(finished))
    Console(file=(output := StringIO()), width=70).print(progress.table())
    assert "16 done" in output.getvalue() and "\u2026" not in output.getvalue()
    assert max(map(len, output.getvalue().splitlines())) <= 70


def test_progress_of_a_run(tmp_path, finished):
    """Steps, score and the time that is left, from what the run writes down."""
    comparison = read_json(finished / "comparison.json")
    jobs = make_jobs(tmp_path, comparison)
    folder = next(iter(jobs))
    progress = Progress(jobs, read_archive(tmp_path))
    assert progress.status(folder) == "waiting"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {})
    write_json(folder / "progress.json", {"num_timesteps": 100, "seconds": 2.0, "score": 1234.5})
    assert progress.summary() == (
        "1 running, 0 failed, 15 waiting, 0 done", "reinforce Plain-v0 seed 3 33%")  # fmt: skip
    Console(file=(output := StringIO()), width=120).print(progress.table())
    (line,) = [line for line in output.getvalue().splitlines() if "running" in line and "reinforce" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["3", "running", "100", "1,234.5", "50", "0:00:04"]


BAD_INPUT = [
    (("--algos", "reinforcee", "--env", "Plain-v0"), "'reinforcee' is no algorithm, did you mean 'reinforce'?"),
    (("--env", "Plane-v0"), "'Plane-v0' is no environment, did you mean 'Plain-v0'?"),
    (("--algos", "x=reinforce:basline:null"), "'basline' is not a hyperparameter of reinforce, did you mean 'baseline'?"),
    (("--algos", "x=reinforce:n_steps:9"), "'n_steps' is not a hyperparameter of reinforce: a batch is n_episodes whole"),
    (("--algos", "x=reinforce:baseline:means"), "baseline='means' must be one of"),
    (("--algos", "x=reinforce:baseline"), "'baseline' in 'x=reinforce:baseline' must be key:value"),
    (("--algos", "x=reinforce:gamma:[1"), "is neither a word nor Python"),
    (("--algos", "x=reinforce:learning_rate:-1e-4"), "learning_rate"),
    (("--algos", "x=reinforce:n_envs:8,n_episodes:4"), "n_episodes=4 must be at least the number of environments, 8"),
    (("--algos", "ars"), "'ars' cannot be compared"),
    (("--algos", "x=ppo:n_timesteps:many"), "n_timesteps='many' must be a number in [1, inf)"),
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
    (("--gym-packages", "nowhere_at_all"), "--gym-packages: there is no module 'nowhere_at_all'"),
    (("--gym-packages", "nowhere.at_all"), "--gym-packages: there is no module 'nowhere.at_all'"),
    (("--colour", "red"), "unrecognized arguments: --colour red"),
    (("--report",), "--env, --algos, --seeds and --thresholds have no effect"),
    (("--address", "tcp://127.0.0.1:1"), "--address is for --backend dask"),
]


@pytest.mark.parametrize("arguments, message", BAD_INPUT)
def test_bad_input(tmp_path, arguments, message):
    """One line, before anything is written."""
    status, errors = call(tmp_path / "out", *SMALL, "Plain-v0", *BUDGET, *arguments)
    assert status in (1, 2)
    assert message in errors and is_one_line(errors), errors
    assert not (tmp_path / "out").exists()


def test_budgets_of_the_entries(tmp_path):
    algos = ("--algos", "a=reinforce:n_timesteps:100", "b=reinforce:n_timesteps:200")
    status, errors = call(tmp_path / "out", *algos, "--seeds", 1, "--env", "CartPole-v1")
    assert status == 1 and "different numbers of steps (a 100, b 200), choose one with -n" in errors


def test_default_settings_are_named(tmp_path, capsys):
    """An algorithm that RL Zoo has no entry for is compared with the defaults of its constructor, and not in silence."""
    describe_contenders(["InvertedPendulum-v5"], ["reinforce", "a2c", "named=ppo:entry:default"], 100, "dummy")
    assert capsys.readouterr().out.splitlines() == ["a2c has no entry for InvertedPendulum-v5: 'default' is used"]


def test_unreachable_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_reinforce.compare.runner.CONNECT_TIMEOUT", 1)
    cluster = ("--backend", "dask", "--address", "tcp://127.0.0.1:1")
    status, errors = call(tmp_path / "out", *SMALL, "Plain-v0", *BUDGET, *cluster)
    assert status == 1 and "no dask cluster answers at --address tcp://127.0.0.1:1" in errors
    assert is_one_line(errors), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package, extra", [("joblib", "compare"), ("seaborn", "compare"), ("distributed", "dask")])
def test_missing_package(tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = (*SMALL, "Plain-v0", *BUDGET, "--backend", "dask", "--address", "tcp://127.0.0.1:1")
    status, errors = call(tmp_path / "out", *arguments)
    assert status == 1 and f'{package} must be installed for this: pip install "sb3-reinforce[{extra}]"' in errors
    assert is_one_line(errors)
    if extra == "compare":
        assert call(tmp_path / "out", "--report") == (status, errors)


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
def test_folder_of_another_comparison(kept, change, message):
    before = content(kept)
    status, errors = call(kept, *arguments_of(kept), *change)
    assert status == 1 and message in errors and is_one_line(errors), errors
    assert content(kept) == before


def test_folder_of_something_else(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "comparison.json").write_text("{}")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    for name, message, arguments in (
        ("json", "holds another comparison: its envs is None", (*SMALL, "Plain-v0", *BUDGET, "--resume")),
        ("thesis/thesis.txt", "must be a folder", (*SMALL, "Plain-v0", *BUDGET)),
        ("thesis", "must be a folder that does not exist or is empty", (*SMALL, "Plain-v0", *BUDGET)),
        ("thesis", "holds no comparison", ("--report",)),
        ("nowhere", "holds no comparison", ("--report",)),
    ):
        status, errors = call(tmp_path / name, *arguments)
        assert status == 1 and message in errors and is_one_line(errors), errors
    assert files(tmp_path) == {"json/comparison.json", "thesis/thesis.txt"}


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
            {"policy_kwargs": {"log_std_init": -2, "net_arch": [64, 64]}, "normalize": True},
        ),
        ("a=ppo:policy_kwargs:{log_std_init: -2, net_arch: [8]}", {"policy_kwargs": {"log_std_init": -2, "net_arch": [8]}}),
    ],
)
def test_variants(text, settings):
    assert parse_contender(text) == ("a", "ppo", settings)


def test_commands_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)
    assert call("out", "--help") == (0, "")
    assert "NAME=ALGO:key:value" in capsys.readouterr().out


def test_help_is_quick():
    """It needs no PyTorch."""
    code = (
        "import sys, sb3_reinforce.compare.cli; print([n for n in ('torch', 'numpy', 'joblib', 'pandas') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


# From here on, the command is started from a shell, and trains


def compare(out, *arguments, runner=succeed, **variables):
    arguments = ["compare", "--out", out, *arguments, "--jobs", 2]
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A comparison whose runs are real ones."""
    out = tmp_path_factory.mktemp("trained") / "comparison"
    # An evaluation in an environment without these arguments would have returns a hundred times as small
    algos = (FIXED + ",env_kwargs:{scale: 100}", "sde=reinforce:use_sde:true,env_kwargs:{scale: 100}")
    compare(out, "--algos", *algos, "--seeds", 3, 5, "--env", "Plain-v0", *BUDGET)
    return out


@pytest.mark.slow
def test_runs(trained):
    runs = pd.read_csv(trained / "runs.csv")
    assert list(dict.fromkeys(runs["contender"])) == ["fixed", "sde", "random", "zero_action"]
    assert (runs["status"] == "done").all() and runs["error"].isna().all()
    of_algos, references = runs[runs["algo"].notna()], runs[runs["algo"].isna()].set_index("contender")
    assert (of_algos["num_timesteps"] >= 300).all() and (of_algos["seconds"] > 0).all()
    np.testing.assert_allclose(of_algos["steps_per_second"], of_algos["num_timesteps"] / of_algos["seconds"], rtol=1e-5)
    assert of_algos[["deterministic", "stochastic"]].notna().all(axis=None)
    assert references.loc["random", "deterministic"].isna().all()
    # A random action between -1 and 1 costs a half per step, on average
    assert (abs(references.loc["random", "stochastic"] - 500) < 150).all()
    assert (references.loc["zero_action", "deterministic"] == 1000).all()


@pytest.mark.slow
def test_evaluation_is_that_of_the_setting(trained):
    """In the environment that it is trained in, as the references are; with gSDE, each environment has noise of its own."""
    episodes = read_archive(trained).set_index(["contender", "seed", "phase"])["return"]
    for name in ("fixed", "sde"):
        scores = episodes.loc[name, 3, "deterministic"]
        assert (abs(scores) > 10).all() and np.ptp(scores) < 1e-3
        assert np.diff(sorted(episodes.loc[name, 3, "stochastic"])).min() > 0.1


@pytest.mark.slow
def test_episodes_are_those_of_the_monitor(trained):
    found = read_archive(trained).set_index(["contender", "seed", "phase"]).loc["fixed", 3, "training"]
    monitor = trained / "runs/fixed/reinforce/Plain-v0_1/0.monitor.csv"
    returns, lengths = np.loadtxt(monitor, delimiter=",", skiprows=2, usecols=(0, 1)).T
    np.testing.assert_allclose(found["return"], returns, rtol=1e-5)
    np.testing.assert_array_equal(found["num_timesteps"], lengths.cumsum())
    assert (np.diff(found["seconds"], prepend=0) >= 0).all()


@pytest.mark.slow
@pytest.mark.zoo
def test_each_run_is_one_of_rl_zoo(trained, tmp_path):
    """The recorded command gives the same run, and RL Zoo's commands work on its folder."""
    log_folder = trained / "runs" / "fixed"
    folder = log_folder / "reinforce" / "Plain-v0_2"
    assert {"Plain-v0.zip", "evaluations.npz", "0.monitor.csv", "Plain-v0/config.yml"} < files(folder)
    assert len(list(folder.glob("tensorboard/Plain-v0/REINFORCE_1/events.*"))) == 1
    agent = ("--algo", "reinforce", "--env", "Plain-v0", "-f", log_folder, "--gym-packages", "tests.compare_envs")
    succeed(tmp_path, "enjoy", *agent, "-n", 20, "--no-render", PYTHONPATH=str(ROOT))
    succeed(tmp_path, "all_plots", "-a", "reinforce", "-e", "Plain-v0", "-f", log_folder)

    command = (folder / "Plain-v0" / "command.txt").read_text().split()
    assert command[:2] == ["sb3-reinforce", "train"] and command[command.index("--seed") + 1] == "5"
    command += ["-f", str(tmp_path)]
    command[command.index("-tb") + 1] = str(tmp_path / "tensorboard")
    succeed(tmp_path, *command[1:], PYTHONPATH=str(ROOT))
    both = [np.loadtxt(f / "0.monitor.csv", delimiter=",", skiprows=2, usecols=(0, 1)) for f in (
        folder, tmp_path / "reinforce" / "Plain-v0_1")]  # fmt: skip
    np.testing.assert_array_equal(*both)
    config = yaml.unsafe_load((folder / "Plain-v0" / "config.yml").read_text())
    assert config["baseline"] is None and config["policy_kwargs"] == {"net_arch": [8, 8]}


@pytest.fixture
def switches(tmp_path):
    folder = tmp_path / "switches"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_faults(tmp_path, switches):
    """One environment raises, one run is killed; the others go on, the report says so, and what is missing can be run."""
    out = tmp_path / "out"
    envs = ("Plain-v0", "Raising-v0", "Slow-v0")
    arguments = ("--algos", "reinforce", "--seeds", 1, "--env", *envs, *BUDGET)
    (switches / "raise").touch()
    (switches / "slow").touch()
    with started(out, *arguments, "--jobs", 2, COMPARE_ENVS=str(switches)) as process:
        victim = out / "runs/reinforce/reinforce/Slow-v0_1"
        wait_for((victim / "0.monitor.csv").is_file)
        (pid,) = processes(victim)
        os.kill(pid, signal.SIGKILL)
        (switches / "slow").unlink()
        process.communicate(timeout=900)
        assert process.returncode == 1
    expected = {(name, env, 1): "done" for name in ("reinforce", "random", "zero_action") for env in envs}
    failed = [("reinforce", "Raising-v0", 1), ("reinforce", "Slow-v0", 1)]
    assert statuses(out) == expected | dict.fromkeys(failed, "failed")
    report = (out / "report.md").read_text()
    assert "`runs/reinforce/reinforce/Slow-v0_1` failed: `killed by signal 9`" in report
    assert report.count("RuntimeError: the motor is broken") == 1
    assert "Traceback" in (out / "runs/reinforce/reinforce/Raising-v0_1/log.txt").read_text()

    before = read_archive(out)
    (switches / "raise").unlink()
    compare(out, "--resume", *arguments, COMPARE_ENVS=str(switches))
    assert statuses(out) == expected
    survivors = read_archive(out).merge(before[["contender", "env"]].drop_duplicates())
    pd.testing.assert_frame_equal(survivors, before, check_exact=True)


@pytest.mark.slow
def test_interrupt(tmp_path, switches):
    """Ctrl-C: what has finished is reported, and no process is left behind."""
    out = tmp_path / "out"
    (switches / "slow").touch()
    arguments = ("--algos", "reinforce", "--seeds", 1, "--env", "Plain-v0", "Slow-v0", *BUDGET, "--jobs", 2)
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
    assert set(read_archive(out)["env"]) >= {"Plain-v0"}


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


@pytest.mark.slow
def test_dask(tmp_path):
    """The runs spread over both workers; one of these is killed, and yet every run is delivered."""
    out = tmp_path / "out"
    with dask_cluster(tmp_path, 2) as (address, (first, second)):
        arguments = ("--algos", "reinforce", "--seeds", *range(1, 4), "--env", "Plain-v0", *BUDGET)
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
