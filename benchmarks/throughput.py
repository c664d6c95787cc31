"""
Measure environment steps per second on InvertedPendulum-v4, updates and callbacks included, in one run on one torch thread:
environments alone, SB3's A2C and PPO, REINFORCE. The contenders take turns, and what counts is the median of the rounds.

Each phase starts every round from the same policy: a fresh one, whose episodes are short, and one that balances.

    OMP_NUM_THREADS=1 python -m benchmarks.throughput
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.plots import plot_growth
from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import PACKAGES, versions
from sb3_reinforce.vec_env import EnvPoolVecEnv

ENV = "InvertedPendulum-v4"
SEED = 100
FOLDER = Path(__file__).parent / "results" / "throughput"
#: Steps per round, for each number of environments
BUDGETS = {1: 8_000, 8: 16_000, 64: 64_000}

Contender = Callable[[], float]


def make_env(n_envs: int, on_envpool: bool = False) -> VecEnv:
    return EnvPoolVecEnv(ENV, n_envs, seed=SEED, num_threads=1) if on_envpool else make_vec_env(ENV, n_envs, seed=SEED)


def bare_stepping(n_steps: int) -> Contender:
    """
    Prepare to step the environment alone.

    :return: Steps of the environment itself, per second
    """
    env = gym.make(ENV).unwrapped
    action = np.zeros(1, np.float32)

    def measure() -> float:
        env.reset(seed=SEED)
        start = time.perf_counter()
        for _ in range(n_steps):
            if env.step(action)[2]:
                env.reset()
        return n_steps / (time.perf_counter() - start)

    return measure


def stepping(n_steps: int, env: VecEnv) -> Contender:
    """
    Prepare to step a vectorized environment with a fixed action.

    :return: Steps of a vectorized environment with a fixed action, per second
    """
    actions = np.zeros((env.num_envs, 1), np.float32)
    env.reset()

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(n_steps // env.num_envs):
            env.step(actions)
        return n_steps // env.num_envs * env.num_envs / (time.perf_counter() - start)

    return measure


def training(model: BaseAlgorithm, n_steps: int, weights: dict | None) -> Contender:
    """
    Prepare to train, always from the same policy.

    :return: Steps of training from the same policy, per second
    """
    weights = {name: value.clone() for name, value in (weights or model.policy.state_dict()).items()}

    def measure() -> float:
        model.policy.load_state_dict(weights)
        start = time.perf_counter()
        model.learn(n_steps, log_interval=None, callback=Count())
        return model.num_timesteps / (time.perf_counter() - start)

    return measure


class Count(BaseCallback):
    """Does nothing: shows what a callback costs."""

    def _on_step(self) -> bool:
        return True


def make_contenders(weights: dict | None) -> dict[str, Contender]:
    """
    Prepare all that is measured.

    :param weights: Parameters of a policy, None for fresh ones
    :return: What is to be measured, by name
    """
    contenders: dict[str, Contender] = {"bare environment, 1": bare_stepping(10_000)}
    for n_envs, n_steps in BUDGETS.items():
        contenders[f"DummyVecEnv stepping, {n_envs}"] = stepping(2 * n_steps, make_env(n_envs))
        for algorithm in (A2C, PPO, REINFORCE) if n_envs < 64 else (A2C, REINFORCE):
            model = algorithm("MlpPolicy", make_env(n_envs), seed=SEED, device="cpu")
            steps = min(n_steps, 4_000) if n_envs == 1 and algorithm is not REINFORCE else n_steps
            contenders[f"{algorithm.__name__}, {n_envs}"] = training(model, steps, weights)
        if n_envs > 1:
            contenders[f"EnvPool stepping, {n_envs}"] = stepping(4 * n_steps, make_env(n_envs, on_envpool=True))
            model = REINFORCE("MlpPolicy", make_env(n_envs, on_envpool=True), seed=SEED, device="cpu")
            contenders[f"REINFORCE on EnvPool, {n_envs}"] = training(model, n_steps, weights)
    return contenders


def measure_rounds(contenders: dict[str, Contender], n_rounds: int) -> dict[str, list[float]]:
    """
    Measure the contenders in turns.

    :return: Steps per second of every round after the first, which warms up
    """
    rounds = [{name: measure() for name, measure in contenders.items()} for _ in range(n_rounds + 1)]
    return {name: [round_[name] for round_ in rounds[1:]] for name in contenders}


class Clock(BaseCallback):
    """Notes time and steps at the end of every rollout."""

    def _on_training_start(self) -> None:
        self.times = [(0, time.perf_counter())]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.times.append((self.num_timesteps, time.perf_counter()))


def time_per_step_while_training(marks: list[int]) -> dict[int, float]:
    """
    Measure whether steps get slower as training goes on.

    :return: Microseconds per step around each mark (from half to one and a half of it) in one run
    """
    clock = Clock()
    REINFORCE("MlpPolicy", make_env(1), seed=SEED, device="cpu").learn(int(1.5 * marks[-1]), callback=clock, log_interval=None)
    steps, times = np.array(clock.times).T
    ends = np.interp([[0.5 * mark, 1.5 * mark] for mark in marks], steps, times)
    return {mark: 1e6 * (end - start) / mark for mark, (start, end) in zip(marks, ends, strict=True)}


def time_per_step_of(weights: dict, n_envs: int, n_episodes: int | None, n_rounds: int) -> float:
    """
    Measure an update.

    :return: Microseconds per step of one update with a policy that balances
    """
    model = REINFORCE("MlpPolicy", make_env(n_envs), n_episodes=n_episodes, baseline="mean", seed=SEED, device="cpu")
    measure = training(model, 1, weights)
    measure()
    return 1e6 / float(np.median([measure() for _ in range(n_rounds)]))


def resident_mb(what: str) -> float:
    """
    Read the memory of this process.

    :return: Megabytes of this process in memory: now (``"VmRSS"``), or at most so far (``"VmHWM"``)
    """
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def memory(weights_path: str) -> dict[str, float]:
    """
    Measure the memory of a batch.

    :return: Megabytes that a batch of a million steps takes, at the peak above the idle process and in its arrays
    """
    model = REINFORCE("MlpPolicy", make_env(1), seed=SEED, device="cpu")
    model.learn(1)
    model.policy.load_state_dict(th.load(weights_path))
    idle = resident_mb("VmRSS")
    model.n_episodes = 1000
    model.learn(1)
    buffer = model.rollout_buffer
    arrays = [*buffer._columns.values(), buffer.rewards, buffer.advantages, buffer.returns]
    batch = buffer.n_steps * sum(array.nbytes / len(array) for array in arrays)
    return {"steps": buffer.n_steps, "batch_mb": batch / 2**20, "peak_above_idle_mb": resident_mb("VmHWM") - idle}


def report(results: dict) -> str:
    """
    Write the report.

    :return: The tables
    """
    lines = [f"# Throughput on {ENV}", "", "```", results["command"], "```", ""]
    lines += [", ".join(f"{name} {number}" for name, number in results["versions"].items()), ""]
    lines += [f"REINFORCE: {results['setting']}.", ""]
    lines += [f"Environment steps per second, median of {results['n_rounds']} rounds (lowest to highest):", ""]
    lines += ["| contender, environments | short episodes | balancing |", "|---|---|---|"]
    speeds = results["speeds"]
    for name in speeds["balancing"]:
        cells = [f"{np.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in (speeds[phase][name] for phase in speeds)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio of medians | short episodes | balancing |", "|---|---|---|"]
    for name, ratios in results["ratios"].items():
        lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |")
    lines += ["", "| microseconds per step | |", "|---|---|"]
    for kind, values in results["growth"].items():
        lines += [f"| {kind} {number} | {value:.1f} |" for number, value in values.items()]
    batch = results["memory"]
    lines += [
        "",
        f"A batch of {batch['steps']:,} steps takes {batch['batch_mb']:.0f} MB, at the peak "
        f"{batch['peak_above_idle_mb']:.1f} MB above the idle process.",
    ]
    return "\n".join(lines) + "\n"


RATIOS = [
    ("REINFORCE, 1", "A2C, 1"),
    ("REINFORCE, 8", "A2C, 8"),
    ("REINFORCE, 1", "PPO, 1"),
    ("REINFORCE, 8", "PPO, 8"),
    ("REINFORCE, 1", "DummyVecEnv stepping, 1"),
    ("REINFORCE, 8", "DummyVecEnv stepping, 8"),
    ("REINFORCE on EnvPool, 64", "EnvPool stepping, 64"),
]


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds, besides the first")
    parser.add_argument("--memory", metavar="WEIGHTS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    th.set_num_threads(1)
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return

    model = REINFORCE("MlpPolicy", make_env(1), seed=SEED, device="cpu").learn()
    weights = {name: value.clone() for name, value in model.policy.state_dict().items()}
    FOLDER.parent.mkdir(exist_ok=True)
    phases = {"short episodes": None, "balancing": weights}
    speeds = {phase: measure_rounds(make_contenders(phases[phase]), args.rounds) for phase in phases}
    growth = {
        "episodes per update:": {n: time_per_step_of(weights, 1, n, 1 if n == 1000 else 5) for n in (1, 10, 100, 1000)},
        "environments:": {n: time_per_step_of(weights, n, None, 3) for n in (1, 2, 4, 8, 16, 32, 64)},
        "steps of training:": time_per_step_while_training([10**4, 10**5, 10**6]),
    }
    weights_path = FOLDER.with_suffix(".pt")
    th.save(weights, weights_path)
    command = [sys.executable, "-m", "benchmarks.throughput", "--memory", str(weights_path)]
    memory_result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights_path.unlink()
    results = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.throughput",
        "setting": "the default",
        "n_rounds": args.rounds,
        "versions": versions((*PACKAGES, "envpool")),
        "speeds": speeds,
        "ratios": {
            f"{a} / {b}": {phase: float(np.median(speeds[phase][a]) / np.median(speeds[phase][b])) for phase in speeds}
            for a, b in RATIOS
        },
        "growth": growth,
        "memory": memory_result,
    }
    FOLDER.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    FOLDER.with_suffix(".md").write_text(report(results))
    plot_growth(growth, FOLDER.with_suffix(".png"))
    print(report(results))


if __name__ == "__main__":
    main()
