"""The statistics of a comparison against closed forms, against rliable, and against simulation."""

import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm, probability_of_improvement
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_reinforce import REINFORCE
from sb3_reinforce.compare.files import KINDS
from sb3_reinforce.compare.job import Recorder, TimedEvalCallback, counted_envs
from sb3_reinforce.compare.plots import COLORS, plot_curves, styles
from sb3_reinforce.compare.references import N_EVAL_ENVS, eval_seed, evaluate_reference
from sb3_reinforce.compare.report import command_lines, improvement_section, interval, number, overview, report
from sb3_reinforce.compare.results import (
    NEVER,
    REPS,
    WINDOW,
    estimate,
    finite,
    learning_curve,
    make_curves,
    median_ratio,
    reach,
    statistics,
)
from tests import compare_envs
from tests.envs import CountEnv


def episodes(returns, lengths=None, seconds=None):
    lengths = np.full(len(returns), 10) if lengths is None else np.asarray(lengths)
    seconds = np.arange(1, len(returns) + 1) / 10 if seconds is None else seconds
    columns = {"num_timesteps": lengths.cumsum(), "seconds": seconds, "return": returns, "length": lengths}
    return pd.DataFrame(columns)


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests of something else than intervals."""
    monkeypatch.setattr("sb3_reinforce.compare.results.REPS", 20)


def test_closed_forms(few_resamples):
    scores = np.array([8.0, 1, 3, 2, 5, 4, 6, 7])
    assert estimate(aggregate_iqm, scores)["value"] == 4.5  # The mean of 3, 4, 5, 6
    assert estimate(np.mean, scores)["value"] == 4.5
    x, y = np.array([1.0, 2, 3]), np.array([2.0, 2.5])
    # Of six pairs one and a half and two are won: 3 beats both, 2 is as good as 2
    assert estimate(probability_of_improvement, x, y)["value"] == pytest.approx(2.5 / 6)
    assert estimate(probability_of_improvement, x, x)["value"] == 0.5
    assert estimate(probability_of_improvement, np.full(3, 7.0), np.full(2, 7.0))["value"] == 0.5
    assert estimate(median_ratio, np.array([1.0, 2, 9]), np.array([4.0, 8]))["value"] == pytest.approx(2 / 6)


def test_intervals_are_those_of_rliable():
    scores = np.random.default_rng(0).normal(size=10)
    found = estimate(aggregate_iqm, scores)
    np.random.seed(0)
    points, intervals = get_interval_estimates(
        {"x": scores[:, None]}, lambda x: np.array([aggregate_iqm(x)]), method="percentile", reps=REPS
    )
    assert found == {"value": points["x"][0], "interval": intervals["x"][:, 0].tolist(), "n": 10}


def test_interval_of_a_mean():
    """That of the normal distribution, for many runs."""
    scores = np.random.default_rng(0).normal(5, 3, size=400)
    low, high = estimate(np.mean, scores)["interval"]
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    # The percentiles of 2000 resamples are this exact to about 4 %
    np.testing.assert_allclose([low, high], [scores.mean() - half, scores.mean() + half], atol=0.12 * half)


def test_coverage(monkeypatch):
    """The intervals of means of 20 runs hold the truth in about 95 % of the cases: 92.3 % are known for percentiles."""
    monkeypatch.setattr("sb3_reinforce.compare.results.REPS", 500)  # Enough for this
    rng = np.random.default_rng(1)
    n_cases = 200
    covered = 0
    for _ in range(n_cases):
        low, high = estimate(np.mean, rng.normal(size=20))["interval"]
        covered += low < 0 < high
    # Four standard deviations of a binomial distribution around 0.923: intervals of 80 % or 99.9 % are found out
    assert abs(covered / n_cases - 0.923) < 4 * np.sqrt(0.923 * 0.077 / n_cases)


def test_global_generator_is_left_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    estimate(np.mean, np.arange(4.0))
    assert np.random.random() == expected


def test_few_runs():
    assert estimate(np.mean, np.array([])) == {"value": None, "interval": None, "n": 0}
    assert estimate(np.mean, np.array([3.0])) == {"value": 3.0, "interval": None, "n": 1}


def test_thresholds_that_are_not_reached():
    """They count as slower than any other."""
    median = lambda *steps: finite(estimate(np.median, np.array(steps)))  # noqa: E731
    assert median(100.0, 200.0, NEVER)["value"] == 200
    assert median(100.0, NEVER)["value"] is None
    assert median(100.0, 200.0, NEVER)["interval"][1] is None
    x, never = np.array([[100.0], [300.0]]), np.full((2, 1), NEVER)
    assert median_ratio(x, x) == 1
    assert median_ratio(never, x) == NEVER and median_ratio(x, never) == 0
    assert median_ratio(never, never) == 1
    assert finite({"value": np.nan, "interval": [0.5, np.nan], "n": 2})["value"] is None


def test_reach():
    returns = np.r_[np.zeros(30), np.full(40, 100.0)]
    # After 10 of the 20 last episodes
    assert reach(episodes(returns), 50) == (400, 4.0)
    assert reach(episodes(returns), 100) == (500, 5.0)
    assert np.isnan(reach(episodes(returns), 100.1)).all()
    assert np.isnan(reach(episodes(returns), None)).all()
    # Not before there are as many episodes as are averaged
    assert reach(episodes(np.full(30, 100.0)), 100) == (10 * WINDOW, WINDOW / 10)
    assert np.isnan(reach(episodes(np.full(WINDOW - 1, 100.0)), 100)).all()


def test_learning_curve():
    curve = learning_curve(episodes(np.arange(50.0)))
    np.testing.assert_allclose(curve[:3], [0, 0.5, 1])
    np.testing.assert_allclose(curve[49], np.arange(30, 50).mean())


def test_curves_are_on_one_grid():
    runs = [(1, episodes([1.0, 3.0], [4, 6])), (2, episodes([5.0, 7.0, 9.0], [10, 10, 20]))]
    both = pd.concat([run.assign(contender="x", env="E", seed=seed, phase="training") for seed, run in runs])
    # Those of an evaluation are on no curve
    curves = make_curves(pd.concat([both, both.tail(1).assign(phase="stochastic", num_timesteps=99, **{"return": 99.0})]))
    by_steps = curves[curves["axis"] == "num_timesteps"].set_index(["seed", "x"])["return"]
    # Nothing is known before the first episode ends, nor after the last one
    first = by_steps.loc[1]
    assert first.index.min() == 4 and first.index.max() == 10
    assert first[4] == first[9] == 1 and first[10] == 2
    second = by_steps.loc[2]
    assert (second.index.min(), second.index.max()) == (10, 40)
    assert second[10] == 5 and second[20] == 6 and second[40] == 7
    by_seconds = curves[curves["axis"] == "seconds"].set_index(["seed", "x"])["return"]
    assert by_seconds.loc[1].index.max() <= 0.2 and by_seconds.loc[2].index.max() == pytest.approx(0.3)


def test_statistics_of_unequal_fates(few_resamples):
    """A run that has failed is counted, and does not count as a score; runs are compared with the first contender."""
    nan = np.nan
    rows = [
        ("done", "reinforce", "reinforce", 1, 10.0, 100.0, 1.0),
        ("done", "reinforce", "reinforce", 2, 20.0, 200.0, 2.0),
        ("failed", "reinforce", "reinforce", 3, nan, nan, nan),
        ("done", "ppo", "ppo", 1, 5.0, 400.0, 10.0),
        ("done", "ppo", "ppo", 2, 15.0, nan, nan),
        ("missing", "ppo", "ppo", 3, nan, nan, nan),
    ]
    keys = ["status", "contender", "algo", "seed", "deterministic", "steps_to_threshold", "seconds_to_threshold"]
    runs = pd.DataFrame(rows, columns=keys).assign(env="E", stochastic=nan, steps_per_second=50.0)
    found = statistics(runs)["E"]
    reinforce, ppo = found["reinforce"], found["ppo"]
    assert [reinforce[state] for state in ("done", "failed", "missing")] == [2, 1, 0]
    assert [ppo[state] for state in ("done", "failed", "missing")] == [2, 0, 1]
    assert reinforce["deterministic"]["mean"]["value"] == 15 and reinforce["deterministic"]["mean"]["n"] == 2
    assert reinforce["deterministic"]["std"] == pytest.approx(np.sqrt(50))  # With n - 1
    assert reinforce["stochastic"]["iqm"]["value"] is None and reinforce["stochastic"]["std"] is None
    assert (reinforce["reached"], ppo["reached"]) == (2, 1)
    assert reinforce["steps_to_threshold"]["value"] == 150 and ppo["steps_to_threshold"]["value"] is None
    assert "probability_of_improvement" not in reinforce
    assert ppo["probability_of_improvement"]["deterministic"]["value"] == 3 / 4


@pytest.fixture
def of_seeds():
    """Runs of two contenders with so many seeds, all of the first of which score more; and their statistics."""

    def of_seeds(n):
        rows = [("a", seed, 10.0 + seed) for seed in range(n)] + [("b", seed, float(seed)) for seed in range(n)]
        runs = pd.DataFrame(rows, columns=["contender", "seed", "deterministic"])
        runs = runs.assign(status="done", algo="ppo", env="E", stochastic=runs["deterministic"], num_timesteps=100)
        runs = runs.assign(steps_per_second=50.0, steps_to_threshold=np.nan, seconds_to_threshold=np.nan)
        return runs, statistics(runs)

    return of_seeds


def test_few_seeds_get_a_caution(of_seeds, few_resamples):
    settings = {"command": "", "n_eval_episodes": 3, "envs": ["E"], "thresholds": {"E": None}, "contenders": {}}
    runs, found = of_seeds(2)
    text = report({**settings, "seeds": [0, 1]}, runs, found, [])
    assert "| b | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in text
    # Of the six ways to rank two and two runs, one has those of the first on top
    assert "**Caution:** 2 runs are few." in text and "2 of the second in one case of 6: P would be 1.00 [1.00, 1.00]." in text
    runs, found = of_seeds(5)
    assert "Caution" not in report({**settings, "seeds": [*range(5)]}, runs, found, [])
    runs, found = of_seeds(1)
    text = report({**settings, "seeds": [0]}, runs, found, [])
    assert "one run shows nothing" in text and "scores more than" not in text


def test_several_environments_begin_with_one_table(of_seeds, few_resamples):
    _, found = of_seeds(5)
    assert overview(found) == []
    reference = {"random": {kind: {"mean": {"value": 1.5, "n": 5}} for kind in KINDS}}
    reference["random"]["deterministic"]["mean"] = {"value": None, "n": 0}
    lines = overview({"E": found["E"] | reference, "F": found["E"] | reference})
    assert lines[4:8] == ["| | a | b | random |", "|---|---|---|---|", "| E | 12.0 | 2.0 | 1.5 |", "| F | 12.0 | 2.0 | 1.5 |"]


def test_commands_are_broken_into_lines():
    command = "sb3-reinforce compare --env A B -n 9 --thresholds -3.5 -1 --algos 'a b --c' " + " ".join(["ppo"] * 30)
    lines = command_lines(command)
    assert lines[:4] == ["sb3-reinforce compare \\", "  --env A B \\", "  -n 9 \\", "  --thresholds -3.5 -1 \\"]
    assert lines[4].startswith("  --algos 'a b --c' ppo") and lines[5].startswith("    ppo ")
    assert max(map(len, lines)) <= 102
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(command)
    assert command_lines("python") == ["python"] and command_lines("") == []


def test_cells():
    assert number(None) == number(np.nan) == "" and number(1234.56, 1) == "1,234.6" and number(-0.03, 1) == "0.0"
    assert interval({"value": None, "interval": None, "n": 0}, never="never") == ""
    assert interval({"value": 5.0, "interval": [4.0, None], "n": 2}, never="never") == "5 [4, never]"
    assert interval({"value": 5.0, "interval": None, "n": 1}) == "5"
    assert interval(None) == ""


def test_styles():
    """The colour says which algorithm it is, in every comparison; each contender can be told apart without it."""
    contenders = {name: {"algo": algo} for name, algo in (
        ("a", "ppo"), ("b", "reinforce"), ("c", "ppo"), ("d", "tqc"), ("random", None))}  # fmt: skip
    found = styles(contenders)
    assert found["a"][0] == styles({"z": {"algo": "reinforce"}, "a": {"algo": "ppo"}})["a"][0]
    assert len({style[0] for style in found.values()}) == len({style[1:] for style in found.values()}) == 5
    assert len({*found["random"][0]}) == 1  # Grey


def test_styles_of_many_variants():
    contenders = {"ppo": {"algo": "ppo"}} | {str(number): {"algo": "reinforce"} for number in range(14)}
    found = list(styles(contenders).values())
    assert found[1][0] == COLORS["reinforce"]
    colors = np.array([style[0] for style in found])
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1) + np.eye(15)
    assert distances.min() > 0.05
    assert colors.mean(axis=1).max() < 0.8  # None is nearly white
    assert len({style[1:] for style in found}) == 15


def test_the_backend_of_the_program_is_left_alone():
    """Notebooks show the pictures of their own."""
    code = "import matplotlib; matplotlib.use('svg'); import sb3_reinforce.compare.plots; print(matplotlib.get_backend())"
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "svg"


def test_curves_are_means_with_intervals(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("sb3_reinforce.compare.plots.save", lambda figure, *_: figures.append(figure))
    points = [(0, 10, 0.0), (0, 20, 2.0), (0, 30, 9.0), (1, 10, 4.0), (1, 20, 2.0)]
    curves = pd.DataFrame(points, columns=["seed", "x", "return"]).assign(env="Plain-v0", axis="num_timesteps", contender="a")
    plot_curves(
        curves, {"envs": ["Plain-v0"], "thresholds": {"Plain-v0": None}, "contenders": {"a": {"algo": "ppo"}}}, tmp_path
    )
    axes = figures[0].axes[0]
    # It ends where the shorter run does
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[10, 2], [20, 2]])
    # A quarter of the resamples is the first run twice, another the second: the interval is from one to the other
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(10, 0), (10, 4), (20, 2)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]


def test_panels_can_be_read(monkeypatch, tmp_path):
    """At most three are in a row, and the label of a threshold does not lie on the frame."""
    figures = []
    monkeypatch.setattr("sb3_reinforce.compare.plots.save", lambda figure, *_: figures.append(figure))
    envs = [f"E{number}" for number in range(8)]
    points = pd.DataFrame([(10, 0.0), (20, 1.0)], columns=["x", "return"]).assign(seed=0, contender="a")
    curves = pd.concat([points.assign(env=env_id, axis="num_timesteps") for env_id in envs])
    thresholds = dict(zip(envs, (10.0, 1.0, 0.9, 0.1, 0.0, -10.0, 0.5, None), strict=True))
    plot_curves(curves, {"envs": envs, "thresholds": thresholds, "contenders": {"a": {"algo": "ppo"}}}, tmp_path)
    figure = figures[0]
    assert figure.axes[0].get_subplotspec().get_geometry()[:2] == (3, 3)
    assert [bool(axes.get_ylabel()) for axes in figure.axes[:8]] == [True, False, False] * 2 + [True, False]
    figure.draw_without_rendering()
    for axes in figure.axes[:7]:
        (label,) = axes.texts
        frame, box = axes.get_window_extent(), label.get_window_extent()
        assert frame.y0 < box.y0 and box.y1 < frame.y1


def test_references():
    assert evaluate_reference("zero_action", "Plain-v0", 0, 3, {}) == [10.0] * 3
    first, again, other = (evaluate_reference("random", "Plain-v0", seed, 40, {}) for seed in (0, 0, 1))
    assert first == again != other
    # Ten steps of 1 - |a|, a uniform: mean 5, standard deviation sqrt(10/12); six standard errors
    assert np.mean(first) == pytest.approx(5, abs=6 * np.sqrt(10 / 12 / 40))


def test_a_single_run_wins_nothing():
    """Whichever of the two has it."""
    half = {"value": 0.5, "interval": [0.4, 0.6], "n": 2}
    entry = {"probability_of_improvement": {"deterministic": half, "stochastic": half}}
    for runs, n_lines in (((2, 2), 4), ((1, 2), 0), ((2, 1), 0)):
        found = {"a": {"done": runs[0]}, "b": {"done": runs[1], **entry}}
        assert len(improvement_section(found)) == n_lines


def steps(episode):
    return 100.0 * len(episode)


def test_references_play_in_the_environment_of_those_that_learn():
    wrapper = {"sb3_reinforce.episode_reward.EpisodeRewardWrapper": {"function": f"{__name__}:steps"}}
    assert evaluate_reference("zero_action", "Plain-v0", 0, 3, {"env_wrapper": wrapper}) == [1000.0] * 3
    assert evaluate_reference("zero_action", "Plain-v0", 0, 3, {"env_kwargs": {"scale": 2}}) == [20.0] * 3


def test_evaluations_share_no_seed():
    """The environments of an evaluation have consecutive seeds."""
    seeds = [eval_seed(seed) + index for seed in (0, 1, 2, 5, 1000, 2**31 - 1) for index in range(N_EVAL_ENVS)]
    assert len({*seeds}) == len(seeds) and 0 < min(seeds) and max(seeds) < 2**32


def make_plain_env():
    return make_vec_env(compare_envs.SwitchedEnv)


class SlowVecEnv(VecEnvWrapper):
    """Takes a hundredth of a second per step."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        time.sleep(0.01)
        return self.venv.step_wait()


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_seconds_are_those_of_training(tmp_path):
    """Not of evaluation."""
    TimedEvalCallback.seconds = 0.0
    evaluation = TimedEvalCallback(SlowVecEnv(make_plain_env()), n_eval_episodes=5, eval_freq=50, verbose=0)
    recorder = Recorder(tmp_path)
    model = REINFORCE("MlpPolicy", make_plain_env(), seed=0)
    start = time.perf_counter()
    model.learn(100, callback=[evaluation, recorder])
    assert TimedEvalCallback.seconds > 2 * 5 * 10 * 0.01
    assert 0 < recorder.training_seconds < 0.9 * (time.perf_counter() - start)
    assert [episode[0] for episode in recorder.episodes] == list(range(10, 10 * len(recorder.episodes) + 1, 10))
    assert len(recorder.episodes) >= 10
    TimedEvalCallback.seconds = 0.0


def test_environments_that_count():
    assert list(counted_envs(SimpleNamespace(), 3)) == [0, 1, 2]
    assert list(counted_envs(SimpleNamespace(quota=SimpleNamespace(owing=[1])), 3)) == [1]


def test_surplus_episodes_are_not_recorded(tmp_path):
    """Those of environments that have met their quota over-represent short episodes."""
    env = make_vec_env(lambda: CountEnv(length=3), n_envs=2)
    env.envs[1].unwrapped.length = 9
    recorder = Recorder(tmp_path)
    REINFORCE("MlpPolicy", env, n_episodes=2, seed=0).learn(1, callback=recorder)
    assert sorted(episode[3] for episode in recorder.episodes) == [3, 9]
