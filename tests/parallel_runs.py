"""What the processes of test_parallel.py do; as a program: ``torchrun -m tests.parallel_runs FAULT``."""

import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.parallel import processes
from tests.helpers import changed, clone, hidden_state, logged, make_model, raises, record_gradients, set_actions, vector_of

#: Environments of all processes together
N_ENVS = 4

MEMORY = dict(policy="MlpLstmPolicy", policy_kwargs=dict(lstm_hidden_size=8))

#: Settings whose gradients are to be those of one process
CASES = {
    "none": dict(baseline=None),
    "mean": dict(baseline="mean", returns="episode", normalize_advantage=False),
    "leave_one_out": dict(baseline="leave_one_out", reduction="step"),
    "timestep": dict(baseline="timestep", ent_coef=0.1, discount_states=True, max_grad_norm=0.5),
    "timestep, discarded": dict(baseline="timestep", time_limit="discard"),
    "linear": dict(baseline="linear", reduction="step"),
    "linear, discarded": dict(baseline="linear", time_limit="discard"),
    # Nine episodes at first, then twice as many
    "target_steps": dict(baseline="timestep", target_steps=150),
    "value": dict(baseline="value", gae_lambda=0.9, time_limit="bootstrap", n_value_epochs=2, value_batch_size=7),
    # A constant target: the progress depends on the surplus steps, and these on the number of processes
    "natural": dict(baseline="timestep", natural_gradient=True, target_kl=0.05),
    "natural, discarded": dict(baseline="timestep", natural_gradient=True, target_kl=0.05, time_limit="discard"),
    # As by default, but for the damping: where it is small, conjugate gradients make more of rounding
    "natural, value": dict(baseline="value", natural_gradient=True, target_kl=0.05, gae_lambda=None, time_limit=None),
    "memory": dict(**MEMORY, baseline="value", gae_lambda=0.9, n_value_epochs=2, value_batch_size=7, target_kl=None),
    "natural, memory": dict(**MEMORY, baseline="timestep", natural_gradient=True, target_kl=0.05, cg_damping=0.5),
    # Groups of three are not those of an environment, nor of a process
    "groups": dict(baseline="leave_one_out", n_episodes=12, group_size=3),
    "groups, greedy": dict(baseline="greedy", n_episodes=12, group_size=3),
    "value, discarded": dict(baseline="value", time_limit="discard", n_value_epochs=2, value_batch_size=64),
}


class Recorded(gym.Env):
    """
    Episodes of unlike lengths that are the same whenever they are played; a time limit ends those of odd environments.

    :param index: Index of the environment, counted over all processes
    :param shares_starts: Whether the seed of a reset decides what the episode starts with
    """

    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, index, shares_starts=False):
        self.index, self.episode, self.shares_starts = index, -1, shares_starts
        self.start = index

    def _observation(self):
        return np.sin([self.start, 1 + self.episode, 2 + self.time]).astype(np.float32)

    def reset(self, seed=None, options=None):
        if self.shares_starts and seed is not None:
            self.start, self.episode = seed % 1000, 0
        else:
            self.episode += 1
        self.time = 0
        self.length = 3 + (7 * self.index + 5 * self.episode) % 11
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        is_over = self.time == self.length
        reward = np.cos(self.time + self.index) + float(action[0])
        return self._observation(), reward, is_over and self.index % 2 == 0, is_over and self.index % 2 == 1, {}


def learn_case(kwargs):
    """
    Make two updates on the recorded episodes, each process with its own environments.

    :return: Of each update, the step of the parameters, the gradient of the optimizer (if it made the step) and what was
        logged; then the numbers of time steps and of episodes
    """
    n_envs = N_ENVS // processes.world_size()
    first = processes.rank() * n_envs
    shares_starts = "group_size" in kwargs
    indices = range(first, first + n_envs)
    env = DummyVecEnv([lambda index=index: Monitor(Recorded(index, shares_starts)) for index in indices])
    model = make_model(env, **{"seed": 5, "n_episodes": 9, **kwargs})
    set_actions(model, lambda obs: np.sin(13 * obs.sum(axis=1, keepdims=True)).astype(np.float32))
    gradients, steps, logs = record_gradients(model), [], []
    for reset_num_timesteps in (True, False):
        before = clone(model)
        for each in env.envs:  # Whatever has been played beyond the quota
            each.unwrapped.episode = 10 * model._n_updates
        model.learn(1, reset_num_timesteps=reset_num_timesteps)
        names = changed(model, before)
        steps.append(vector_of({name: clone(model)[name] - before[name] for name in sorted(names)}))
        logs.append({key: value for key, value in logged(model).items() if not key.startswith("time/")})
    return steps, [vector_of(gradient) for gradient in gradients], logs, model.num_timesteps, len(model.ep_info_buffer)


def gradients(out):
    """Write what process 0 makes of all cases to a file."""
    outcomes = {name: learn_case(kwargs) for name, kwargs in CASES.items()}
    if processes.rank() == 0:
        th.save(outcomes, out)


def digest(model):
    """Return all that processes must agree on after training."""
    parameters = b"".join(value.numpy().tobytes() for value in model.policy.state_dict().values())
    statistics = [(rms.mean.tolist(), rms.var.tolist(), rms.count) for rms in (model.env.obs_rms, model.env.ret_rms)]
    return hashlib.sha256(parameters).hexdigest(), statistics, model.num_timesteps, hidden_state(model)


def make_normalized_model(seed=3, **kwargs):
    """Make a model of CartPole with a critic and normalization, whose steps are short."""
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=seed))
    kwargs = dict(n_episodes=5, baseline="value", n_value_epochs=1, target_kl=1e-4) | kwargs
    return make_model(env, seed=seed, **kwargs)


class Normed(FlattenExtractor):
    """Features with batch normalization."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)


class Stop(BaseCallback):
    """Stop the training in the middle of a rollout."""

    def _on_step(self):
        return self.n_calls < 200


class Updates(BaseCallback):
    """Stop the training after 20 updates; the callback is called in process 0 only."""

    def _on_step(self):
        return self.model._n_updates < 20


def agreement(out):
    """Check that all processes end with the same model, and with the same one when they start again."""
    models = [make_normalized_model().learn(100_000, callback=Updates()) for _ in range(2)]
    everywhere = processes.gather([digest(model) for model in models])
    assert everywhere[0][0] == everywhere[0][1], "Two runs from the same seed differ"
    assert all(each == everywhere[0] for each in everywhere), everywhere
    assert models[0]._n_updates == 20
    assert digest(make_normalized_model(seed=4).learn(500)) != digest(make_normalized_model(seed=5).learn(500))

    # Their samples are not the same, nor are their first observations
    samples = processes.gather((th.rand(1).item(), np.random.rand(), make_normalized_model().env.reset().tolist()))
    assert all(a != b for a, b in zip(*samples, strict=True)), samples

    model = make_normalized_model()
    callback = Stop()
    model.learn(100_000, callback=callback)
    assert (callback.n_calls == 200) == (processes.rank() == 0)
    assert len(set(processes.gather(model.num_timesteps))) == 1
    model.learn(1000, reset_num_timesteps=False)
    assert len({str(digest) for digest in processes.gather(digest(model))}) == 1

    path = Path(out, str(processes.rank()))
    model.save(path)
    assert path.with_suffix(".zip").exists() == (processes.rank() == 0)

    # Without a seed, too
    model = make_normalized_model(seed=None).learn(1)
    assert len({str(digest) for digest in processes.gather(digest(model))}) == 1

    for kwargs, message in (
        (dict(n_episodes=4 + processes.rank()), "n_episodes is 4 in process 0 and 5 in process 1"),
        (dict(n_episodes=3), "n_episodes=3 must be at least the number of environments, 4"),
        (dict(policy_kwargs=dict(net_arch=[2 + processes.rank()])), "must train the same model: parameters is"),
        (dict(policy_kwargs=dict(features_extractor_class=Normed)), "Batch normalization is not supported"),
    ):
        with raises(message):
            make_normalized_model(**kwargs).learn(1)


def unlike_environments():
    """Learn from three episodes of three environments, one in process 0 and two in process 1; four would be too many."""
    model = make_model(make_vec_env("CartPole-v1", 1 + processes.rank(), seed=0), n_episodes=3).learn(1)
    assert model.rollout_buffer.n_episodes == 1 + processes.rank() and model.rollout_buffer.total_episodes == 3
    model.set_random_seed(7)
    seeds = [seed for part in processes.gather(model.env._seeds) for seed in part]
    assert seeds == [7, 8, 9], seeds
    model.n_episodes = 2
    with raises("n_episodes=2 must be at least the number of environments, 3"):
        model.learn(1)


def statistics():
    """Check that merged statistics are those of all that the processes have seen."""
    seen = np.random.default_rng(0).normal(3, 2, (processes.world_size() + 1, 50, 4)) * [1, 10, 100, 1e-3]
    merged, expected = RunningMeanStd(shape=(4,)), RunningMeanStd(shape=(4,))
    for rms in (merged, expected):
        rms.update(seen[-1])
    before = merged.copy()
    merged.update(seen[processes.rank()][: 20 + processes.rank()])
    processes.merge_statistics(merged, before)
    for process in range(processes.world_size()):
        expected.update(seen[process][: 20 + process])
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.var, expected.var, rtol=1e-12)
    assert merged.count == expected.count
    assert processes.all_max(processes.rank()) == processes.world_size() - 1
    assert processes.by_rank([processes.rank(), 5]).tolist() == [[0, 5], [1, 5]]
    mine = seen[processes.rank(), : 20 * processes.rank(), 2]  # Process 0 has none
    mean, var = processes.mean_and_var(mine)
    np.testing.assert_allclose([mean, var], [seen[1, :20, 2].mean(), seen[1, :20, 2].var()], rtol=1e-12)
    mean, var = processes.mean_and_var(seen[processes.rank(), : 20 + processes.rank(), 2])
    everything = np.concatenate([seen[0, :20, 2], seen[1, :21, 2]])
    np.testing.assert_allclose([mean, var], [everything.mean(), everything.var()], rtol=1e-12)
    with pytest.raises(KeyError, match="key"):  # An error of process 0 is one of all
        processes.on_first(lambda: {}["key"])


class Fault(gym.Wrapper):
    """Let something happen to process 1 in its 200th step."""

    def __init__(self, env, kind):
        super().__init__(env)
        self.kind, self.n_steps = kind, 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 200 and processes.rank() == 1:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hangs":
                time.sleep(1000)
            raise RuntimeError("the simulator is gone")
        return self.env.step(action)


def fault(kind):
    """Train until the fault happens."""
    env = make_vec_env("CartPole-v1", wrapper_class=Fault, wrapper_kwargs=dict(kind=kind))
    REINFORCE("MlpPolicy", env, seed=0, device="cpu").learn(100_000)


def process(variables, function, *args):
    """Join the other processes of the group, and call a function."""
    os.environ.update(variables)
    th.set_num_threads(1)
    processes.join()
    try:
        function(*args)
    finally:  # So that the others do not wait for this one, should it fail
        processes.leave()


def in_processes(n, function, *args):
    """
    Call a function in a group of processes, without torchrun, which takes seconds to start.

    :param n: Number of processes
    :param function: Function of a module
    :param args: Its arguments
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SB3_REINFORCE_TIMEOUT": "60"}
    with ProcessPoolExecutor(n, multiprocessing.get_context("forkserver")) as pool:
        futures = [pool.submit(process, {**variables, "RANK": str(rank)}, function, *args) for rank in range(n)]
        for future in futures:
            future.result()


if __name__ == "__main__":
    os.environ["SB3_REINFORCE_TIMEOUT"] = "5"
    th.set_num_threads(1)
    fault(sys.argv[1])
