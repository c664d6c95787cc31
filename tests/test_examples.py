"""The examples: their environments keep Gymnasium's interface, their optima are right, and they run."""

import re
import sys
from itertools import permutations

import numpy as np
import pytest

from examples import job_shop, salesman, whole_episodes
from examples.scoring import Deadline
from sb3_reinforce.episode_reward import PlayedEpisode


@pytest.mark.parametrize("env", [salesman.Salesman(6), job_shop.JobShop(4, 3)], ids=["salesman", "job-shop"])
def test_environments(env):
    """They keep Gymnasium's interface, with any valid actions, and refuse the others."""
    observation, _ = env.reset(seed=0)
    rng, is_over = np.random.default_rng(0), False
    while not is_over:
        assert observation in env.observation_space
        invalid = np.flatnonzero(~env.action_masks())
        if len(invalid):
            with pytest.raises(ValueError, match=r"action_masks\(\) tells which"):
                env.step(invalid[0])
        observation, reward, is_over, truncated, _ = env.step(rng.choice(np.flatnonzero(env.action_masks())))
        assert isinstance(reward, float) and reward <= 0 and not truncated
    assert observation in env.observation_space and not env.action_masks().any()
    assert np.array_equal(env.reset(seed=0)[0], env.reset(seed=0)[0])


def test_shortest_tour():
    """Against all tours through seven cities."""
    env = salesman.Salesman(7)
    for seed in range(20):
        env.reset(seed=seed)
        tours = np.array([[0, *rest] for rest in permutations(range(1, 7))])
        expected = env.distances[tours, np.roll(tours, -1, axis=1)].sum(axis=1).min()
        assert salesman.optimum(env.distances) == pytest.approx(expected)


def test_rewards_of_a_tour():
    env = salesman.Salesman(5)
    env.reset(seed=0)
    total = sum(env.step(city)[1] for city in (2, 1, 4, 3))
    tour = env.cities[[0, 2, 1, 4, 3]]
    assert -total == pytest.approx(np.linalg.norm(tour - np.roll(tour, 1, axis=0), axis=1).sum())


def test_makespan():
    """Two jobs on two machines, by hand: job 0 takes 3 on machine 0, then 2 on machine 1; job 1 takes 4 on 1, then 1 on 0."""
    env = job_shop.JobShop(2, 2)
    jobs = (((0, 1), (3, 2)), ((1, 0), (4, 1)))
    env.reset(options={"jobs": jobs})
    assert env.bound == 6  # Machine 1
    outcomes = [env.step(job) for job in (0, 1, 0, 1)]
    assert [outcome[2] for outcome in outcomes] == [False, False, False, True]
    assert outcomes[-1][4] == {"makespan": 6} and sum(outcome[1] for outcome in outcomes) == 0
    env.reset(options={"jobs": jobs})
    outcomes = [env.step(job) for job in (0, 0, 1, 1)]
    assert outcomes[-1][4] == {"makespan": 10} and sum(outcome[1] for outcome in outcomes) == pytest.approx(-4 / 20)


def test_no_schedule_beats_the_optimum_of_ft06():
    rng = np.random.default_rng(0)
    found = [
        job_shop.makespans(lambda env, _: int(rng.choice(np.flatnonzero(env.action_masks()))), jobs=job_shop.FT06)[0]
        for _ in range(200)
    ]
    assert min(found) >= job_shop.FT06_OPTIMUM


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, arguments, expected",
    [
        (salesman, ["--cities", "6", "--minutes", "0.05"], "REINFORCE: "),
        (job_shop, ["--jobs", "3", "--machines", "3", "--minutes", "0.05"], "REINFORCE: "),
        (whole_episodes, ["--steps", "600"], r"Eval num_timesteps=(?s:.)*The judge: 0\.\d\d\nThe environment: \d"),
    ],
)
def test_programs(module, arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    module.main()
    assert re.search(expected, capsys.readouterr().out)


def test_judge():
    """The whole time in the middle is 1; half the time, half way to the edge, a quarter."""
    for n_steps, position, expected in ((500, 0.0, 1.0), (250, -1.2, 0.25)):
        steps = [(np.full(4, position), 0, 1.0, {})] * n_steps
        assert whole_episodes.judge(PlayedEpisode(steps)) == pytest.approx(expected)


def test_deadline():
    now = [0.0]
    deadline = Deadline(100, clock=lambda: now[0])
    schedule = deadline.falling(0.5)
    for now[0], value, goes_on in ((0.0, 0.5, True), (50.0, 0.25, True), (99.0, 0.05, True), (100.0, 0.05, False)):
        assert schedule(1.0) == pytest.approx(value) and deadline._on_step() == goes_on
