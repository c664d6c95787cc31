"""
Measure environment steps per second of training with memory and with masks, in one run on one torch thread, the contenders in
turns: REINFORCE with an LSTM beside RecurrentPPO (the settings of both on CartPoleNoVel-v1 are those of RL Zoo's entry where
they share them: an LSTM of 64 units for actor and critic), and REINFORCE with and without masks beside MaskablePPO.

    OMP_NUM_THREADS=1 python -m benchmarks.memory_speed
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit
from rl_zoo3 import import_envs  # noqa: F401  Registers CartPoleNoVel-v1
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.throughput import SEED, Contender, measure_rounds, training
from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions

OUT = Path(__file__).parent / "results" / "memory_speed.md"

#: RL Zoo's settings of RecurrentPPO for CartPoleNoVel-v1, without the normalization of the environment
LSTM = dict(lstm_hidden_size=64, net_arch=dict(pi=[64], vf=[64]), enable_critic_lstm=True)
RECURRENT_PPO = dict(n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20)


class FourActions(CartPoleEnv):
    """CartPole, each of whose actions comes twice. The mask excludes the second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(4)
        self.mask = np.array([True, True, False, False])

    def step(self, action: Any) -> Any:
        return super().step(int(action) % 2)

    def action_masks(self) -> np.ndarray:
        """
        Tell which actions are valid.

        :return: The first two
        """
        return self.mask


class Switches(gym.Env):
    """339 switches (sb3-contrib's issue 283), half of which cannot be turned on; episodes of 20 steps."""

    observation_space = spaces.Box(-1, 1, (10,))
    action_space = spaces.MultiBinary(339)
    mask = np.stack([np.ones(339, dtype=bool), np.arange(339) % 2 == 0], axis=1).ravel()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return self.observation_space.sample(), float(action.mean()), self.time == 20, False, {}

    def action_masks(self) -> np.ndarray:
        """
        Tell which actions are valid.

        :return: Whether each switch may be off, and on
        """
        return self.mask


def make_contenders() -> dict[str, Contender]:
    """
    Prepare all that is measured.

    :return: What is to be measured, by name
    """
    found: dict[str, Contender] = {}
    options: dict[str, Any] = dict(seed=SEED, device="cpu")
    for n_envs in (1, 8):
        env = make_vec_env("CartPoleNoVel-v1", n_envs, seed=SEED)
        model = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=LSTM, **RECURRENT_PPO, **options)
        found[f"CartPoleNoVel-v1: RecurrentPPO, {n_envs}"] = training(model, 2_000, None)
        for n_episodes in (None, 64):
            model = REINFORCE("MlpLstmPolicy", env, n_episodes=n_episodes, policy_kwargs=LSTM, **options)
            name = "default" if n_episodes is None else f"n_episodes={n_episodes}"
            found[f"CartPoleNoVel-v1: REINFORCE, {name}, {n_envs}"] = training(model, 4_000, None)
    for env_class, n_steps in ((FourActions, 16_000), (Switches, 4_000)):
        env = make_vec_env(lambda env_class=env_class: TimeLimit(env_class(), 500), 1, seed=SEED)  # type: ignore[misc]
        for use_masking in (False, True):
            model = REINFORCE("MlpPolicy", env, use_masking=use_masking, **options)
            found[f"{env_class.__name__}: REINFORCE, {'masks' if use_masking else 'no masks'}, 1"] = training(
                model, n_steps, None
            )
        found[f"{env_class.__name__}: MaskablePPO, 1"] = training(MaskablePPO("MlpPolicy", env, **options), 2_000, None)
    return found


def report(speeds: dict[str, list[float]]) -> str:
    """
    Write the report.

    :param speeds: Steps per second of each round, by name
    :return: The report, in Markdown
    """
    rounds = len(next(iter(speeds.values())))
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.memory_speed --rounds {rounds}"
    lines = ["# Speed with memory and masks", "", "```", command, "```", ""]
    lines += [", ".join(f"{name} {number}" for name, number in versions().items()) + ".", ""]
    lines += [f"Environment steps per second of training, median of {rounds} rounds (lowest to highest):", ""]
    lines += ["| task: contender, environments | steps per second |", "|---|---|"]
    lines += [f"| {name} | {np.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f}) |" for name, v in speeds.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds, besides the first")
    args = parser.parse_args()
    th.set_num_threads(1)
    OUT.write_text(report(measure_rounds(make_contenders(), args.rounds)))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
