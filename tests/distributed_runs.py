"""What the processes of test_distributed.py do: ``torchrun --nproc-per-node N -m tests.distributed_runs NAME [ARGUMENT]``."""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE, distributed

#: Environments of all processes together
N_ENVS = 4

#: Settings whose gradients are to be those of one process
CASES = {
    "none": dict(baseline=None),
    "mean": dict(baseline="mean", returns="episode", normalize_advantage=False),
    "leave_one_out": dict(baseline="leave_one_out", reduction="step"),
    "timestep": dict(baseline="timestep", ent_coef=0.1, discount_states=True, max_grad_norm=0.5),
    "timestep, discarded": dict(baseline="timestep", time_limit="discard"),
    # More steps than a process has, and less than all have
    "min_steps": dict(baseline="timestep", min_steps=50),
    "value": dict(baseline="value", gae_lambda=0.9, time_limit="bootstrap", n_value_epochs=2, value_batch_size=7),
    "natural": dict(baseline="timestep", natural_gradient=True),
    "natural, discarded": dict(baseline="timestep", natural_gradient=True, time_limit="discard"),
    "value, discarded": dict(baseline="value", time_limit="discard", n_value_epochs=2, value_batch_size=64),
}


class Recorded(gym.Env):
    """
    Episodes of unlike lengths that are the same whenever they are played. A time limit ends those of odd environments.

    :param index: Which environment it is, of those of all processes
    """

    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, index):
        self.index, self.episode = index, -1

    def _observation(self):
        return np.sin([self.index, 1 + self.episode, 2 + self.time]).astype(np.float32)

    def reset(self, seed=None, options=None):
        self.episode += 1
        self.time = 0
        self.length = 3 + (7 * self.index + 5 * self.episode) % 11
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        is_over = self.time == self.length
        reward = np.cos(self.time + self.index) + float(action[0])
        return self._observation(), reward, is_over and self.index % 2 == 0, is_over and self.index % 2 == 1, {}


class Recording(REINFORCE):
    """Acts in the same way in the same state, and keeps what it has learned from."""

    def collect_rollouts(self, env, *args, **kwargs):
        for each in env.envs:  # Whatever has been played beyond the quota
            each.unwrapped.episode = 10 * self._n_updates
        return super().collect_rollouts(env, *args, **kwargs)

    def _actor(self, n_envs):
        return lambda obs: np.sin(13 * obs.sum(axis=1, keepdims=True)).astype(np.float32)

    def _compute_gradient(self):
        super()._compute_gradient()
        self.gradients.append(flat([p.grad for p in self.policy.parameters() if p.grad is not None]))

    def train(self):
        super().train()
        self.logged.append({key: value for key, value in self.logger.name_to_value.items() if not key.startswith("time/")})


def flat(tensors):
    return th.cat([tensor.detach().flatten() for tensor in tensors]).numpy().copy()


def learn_case(kwargs):
    """Two updates on the recorded episodes, each process with its own environments."""
    n_envs = N_ENVS // distributed.world_size()
    first = distributed.rank() * n_envs
    env = DummyVecEnv([lambda index=index: Monitor(Recorded(index)) for index in range(first, first + n_envs)])
    model = Recording("MlpPolicy", env, seed=5, n_episodes=9, device="cpu", **kwargs)
    model.gradients, model.logged = [], []
    model.learn(1)
    model.learn(1, reset_num_timesteps=False)
    return model.gradients, model.logged, flat(model.policy.parameters()), model.num_timesteps, len(model.ep_info_buffer)


def gradients(out):
    outcomes = {name: learn_case(kwargs) for name, kwargs in CASES.items()}
    if distributed.rank() == 0:
        th.save(outcomes, out)


def digest(model):
    parameters = b"".join(value.numpy().tobytes() for value in model.policy.state_dict().values())
    statistics = [(rms.mean.tolist(), rms.var.tolist(), rms.count) for rms in (model.env.obs_rms, model.env.ret_rms)]
    return hashlib.sha256(parameters).hexdigest(), statistics, model.num_timesteps, model._kl_learning_rate_factor


def make_model(seed=3, **kwargs):
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=seed))
    kwargs = dict(n_episodes=5, baseline="value", n_value_epochs=1, target_kl=1e-4) | kwargs
    return REINFORCE("MlpPolicy", env, seed=seed, device="cpu", **kwargs)


class Normed(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)


class Stop(BaseCallback):
    """Stops training in the middle of a rollout."""

    def _on_step(self):
        return self.n_calls < 200


class Updates(BaseCallback):
    """Stops training after 50 updates; only in process 0 is it called."""

    def _on_step(self):
        return self.model._n_updates < 50


def agreement(out):
    """All processes end with the same model, and again when they start again."""
    models = [make_model().learn(100_000, callback=Updates()) for _ in range(2)]
    everywhere = distributed.gather([digest(model) for model in models])
    assert everywhere[0][0] == everywhere[0][1], "Another run is another run"
    assert all(each == everywhere[0] for each in everywhere), everywhere
    assert models[0]._n_updates == 50
    assert digest(make_model(seed=4).learn(500)) != digest(make_model(seed=5).learn(500))

    # Their samples are not the same, nor are their first observations
    samples = distributed.gather((th.rand(1).item(), np.random.rand(), make_model().env.reset().tolist()))
    assert all(a != b for a, b in zip(*samples, strict=True)), samples

    model = make_model()
    callback = Stop()
    model.learn(100_000, callback=callback)
    assert (callback.n_calls == 200) == (distributed.rank() == 0)
    assert len(set(distributed.gather(model.num_timesteps))) == 1
    model.learn(1000, reset_num_timesteps=False)
    assert len({str(digest) for digest in distributed.gather(digest(model))}) == 1

    path = Path(out, str(distributed.rank()))
    model.save(path)
    assert path.with_suffix(".zip").exists() == (distributed.rank() == 0)

    # Without a seed, too
    model = make_model(seed=None).learn(1)
    assert len({str(digest) for digest in distributed.gather(digest(model))}) == 1

    for kwargs, message in (
        (dict(n_episodes=4 + distributed.rank()), "n_episodes is 4 in process 0 and 5 in process 1"),
        (dict(n_episodes=3), "n_episodes=3 must be at least the number of environments, 4"),
        (dict(policy_kwargs=dict(net_arch=[2 + distributed.rank()])), "must train the same model: parameters is"),
        (dict(policy_kwargs=dict(features_extractor_class=Normed)), "Batch normalization is not supported"),
    ):
        try:
            make_model(**kwargs).learn(1)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def statistics(out):
    """Merged statistics are those of all that the processes have seen."""
    seen = np.random.default_rng(0).normal(3, 2, (distributed.world_size() + 1, 50, 4)) * [1, 10, 100, 1e-3]
    merged, expected = RunningMeanStd(shape=(4,)), RunningMeanStd(shape=(4,))
    for rms in (merged, expected):
        rms.update(seen[-1])
    before = merged.copy()
    merged.update(seen[distributed.rank()][: 20 + distributed.rank()])
    distributed.merge_statistics(merged, before)
    for process in range(distributed.world_size()):
        expected.update(seen[process][: 20 + process])
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.var, expected.var, rtol=1e-12)
    assert merged.count == expected.count
    assert distributed.all_max(distributed.rank()) == distributed.world_size() - 1
    assert distributed.by_rank([distributed.rank(), 5]).tolist() == [[0, 5], [1, 5]]
    mine = seen[distributed.rank(), : 20 * distributed.rank(), 2]  # Process 0 has none
    mean, var = distributed.mean_and_var(mine)
    np.testing.assert_allclose([mean, var], [seen[1, :20, 2].mean(), seen[1, :20, 2].var()], rtol=1e-12)
    mean, var = distributed.mean_and_var(seen[distributed.rank(), : 20 + distributed.rank(), 2])
    everything = np.concatenate([seen[0, :20, 2], seen[1, :21, 2]])
    np.testing.assert_allclose([mean, var], [everything.mean(), everything.var()], rtol=1e-12)
    try:
        distributed.on_first(lambda: {}["key"])
    except KeyError as error:
        assert error.args == ("key",)
    else:
        raise AssertionError("An error of process 0 is one of all")


class Fault(gym.Wrapper):
    """Something that happens to process 1 in its 500th step."""

    def __init__(self, env, kind):
        super().__init__(env)
        self.kind, self.n_steps = kind, 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 500 and distributed.rank() == 1:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hangs":
                time.sleep(1000)
            raise RuntimeError("the simulator is gone")
        return self.env.step(action)


def fault(kind):
    os.environ["SB3_REINFORCE_TIMEOUT"] = "5"
    env = make_vec_env("CartPole-v1", wrapper_class=Fault, wrapper_kwargs=dict(kind=kind))
    REINFORCE("MlpPolicy", env, seed=0, device="cpu").learn(100_000)


if __name__ == "__main__":
    th.set_num_threads(1)
    if sys.argv[1] != "fault":
        distributed.join()
    {"gradients": gradients, "agreement": agreement, "statistics": statistics, "fault": fault}[sys.argv[1]](sys.argv[2])
