from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from sb3_reinforce import REINFORCE, MlpPolicy
from tests.envs import CountEnv, Poison, SpacesEnv, TracingEnv
from tests.helpers import assert_same, hidden_state, logged, make_model, raises, set_chunk_size, weights

BOX = spaces.Box(-1, 1, (2,))
DICT = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(2))
NAN, INF = float("nan"), float("inf")


def kwargs_only(x):
    """Name a test case by the arguments that it is about, and not by the message."""
    return str(x) if isinstance(x, dict) else ""


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(returns="sum"), ("returns='sum'", "one of 'reward_to_go', 'episode', 'mean_reward_to_go'")),
        (
            dict(baseline="critic"),
            ("baseline='critic'", "one of None, 'mean', 'leave_one_out', 'timestep', 'linear', 'greedy', 'value'"),
        ),
        (dict(time_limit="ignore"), ("time_limit='ignore'", "one of None, 'terminal', 'bootstrap', 'discard'")),
        (dict(reduction="sum"), ("reduction='sum'", "one of 'episode', 'step'")),
        *((dict(n_episodes=x), (f"n_episodes={x!r}", "an integer in [1, inf), or None")) for x in (0, -1, 2.5, "8", NAN)),
        (dict(n_episodes=1, baseline="leave_one_out"), ("'leave_one_out'", "n_episodes=1", "in [2, inf)")),
        (dict(n_episodes=1, baseline="timestep"), ("'timestep'", "n_episodes=1", "in [2, inf)")),
        (dict(n_episodes=1, baseline="linear"), ("'linear'", "n_episodes=1", "in [2, inf)")),
        *((dict(gamma=x), (f"gamma={x!r}", "a number in [0, 1]")) for x in (-0.1, 1.1, NAN, "0.9", None)),
        *(
            (dict(gae_lambda=x, baseline="value"), (f"gae_lambda={x}", "a number in [0, 1], or None"))
            for x in (-0.1, 1.1, NAN)
        ),
        (dict(time_limit="bootstrap"), ("time_limit='bootstrap'", "baseline='value'", "not 'timestep'")),
        (dict(time_limit="bootstrap", baseline=None), ("time_limit='bootstrap'", "baseline='value'", "not None")),
        (dict(gae_lambda=0.9), ("gae_lambda=0.9", "baseline='value'", "not 'timestep'")),
        (dict(gae_lambda=0.9, baseline="value", returns="episode"), ("gae_lambda=0.9", "'reward_to_go'", "'episode'")),
        *(
            (dict(learning_rate=x), (f"learning_rate={x!r}", "[0, inf)", "function"))
            for x in ("lin_0.01", -0.01, NAN, None, INF)
        ),
        *((dict(value_learning_rate=x), (f"value_learning_rate={x!r}", "[0, inf)")) for x in ("lin_0.01", -0.01, NAN, None)),
        *((dict(target_kl=x), (f"target_kl={x!r}", "[0, inf)", "function")) for x in ("lin_0.01", -0.01, NAN)),
        *((dict(ent_coef=x), (f"ent_coef={x!r}", "[0, inf)", "function")) for x in ("lin_0.01", -0.01, NAN, None)),
        *((dict(max_grad_norm=x), (f"max_grad_norm={x!r}", "a number in [0, inf), or None")) for x in ("x", -0.5, NAN)),
        *((dict(n_value_epochs=x), (f"n_value_epochs={x!r}", "an integer in [1, inf)")) for x in (0, 1.5, None)),
        *((dict(value_batch_size=x), (f"value_batch_size={x!r}", "an integer in [1, inf)")) for x in (0, 1.5, None)),
        *((dict(cg_max_steps=x), (f"cg_max_steps={x!r}", "an integer in [1, inf)")) for x in (0, 1.5, None)),
        *((dict(cg_damping=x), (f"cg_damping={x!r}", "a number in [0, inf)")) for x in (-0.1, NAN, None)),
        *((dict(target_steps=x), (f"target_steps={x!r}", "an integer in [0, inf), or None")) for x in (-1, 1.5, "8", True)),
        *((dict(max_episode_steps=x), (f"max_episode_steps={x!r}", "an integer in [1, inf)")) for x in (0, 1.5, None)),
        (dict(n_episodes=True), ("n_episodes=True", "an integer in [1, inf), or None")),
        (dict(rollout_buffer_class="x"), ("rollout_buffer_class='x'", "EpisodeRolloutBuffer")),
        (dict(rollout_buffer_class=RolloutBuffer), ("rollout_buffer_class=RolloutBuffer", "EpisodeRolloutBuffer")),
    ],
    ids=kwargs_only,
)
def test_bad_argument(kwargs, message):
    with raises(*message):
        make_model(**kwargs)


@pytest.mark.parametrize("value", [1, 0.01, np.float64(0.01), lambda _: 0.01])
@pytest.mark.parametrize("name", ["learning_rate", "value_learning_rate", "target_kl", "ent_coef"])
def test_numbers_and_schedules(name, value):
    model = make_model(baseline="value", **{name: value})
    assert model.learn(1)._n_updates == 1


@pytest.mark.parametrize(
    "policy_kwargs, message",
    [
        *((dict(state_dependent_std=True, min_std=x), (f"min_std={x!r}", "above 0")) for x in (0, -1.0, NAN, "0.1", None)),
        (dict(state_dependent_std=True, min_std=1.0), ("min_std=1.0", "below the initial standard deviation", "=0.4")),
        (dict(state_dependent_std=True, min_std=0.2, log_std_init=-2), ("min_std=0.2", "exp(log_std_init)=0.135")),
        (dict(state_dependent_std=True, std_net_arch=[]), ("std_net_arch=[]", "at least one layer")),
        (dict(state_dependent_std=True, std_net_arch=64), ("std_net_arch=64", "at least one layer")),
        (dict(std_net_arch=[8]), ("std_net_arch=[8]", "needs state_dependent_std=True")),
    ],
    ids=kwargs_only,
)
def test_bad_policy_argument(policy_kwargs, message):
    with raises(*message):
        make_model(policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)], ids=str)
def test_state_dependent_std_needs_a_box(action_space):
    with raises("state_dependent_std=True needs a Box action space", str(action_space)):
        make_model(SpacesEnv(BOX, action_space), policy_kwargs=dict(state_dependent_std=True))


def test_state_dependent_std_excludes_gsde():
    with raises("state_dependent_std=True needs a Box action space and use_sde=False", "use_sde=True"):
        make_model(use_sde=True, policy_kwargs=dict(state_dependent_std=True))


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy])
def test_dict_observations_need_multi_input_policy(policy):
    with raises("MultiInputPolicy", "dict observation space"):
        make_model(SpacesEnv(DICT, BOX), policy)


@pytest.mark.parametrize(
    "action_space, message",
    [
        (spaces.Tuple([spaces.Discrete(2)]), ("spaces.box.Box", "MultiBinary", "but Tuple(Discrete(2)) was provided")),
        (spaces.Dict(a=spaces.Discrete(2)), ("spaces.box.Box", "MultiBinary", "but Dict('a': Discrete(2)) was provided")),
        (spaces.Box(-np.inf, np.inf, (1,)), ("finite lower and upper bound",)),
        (spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), ("finite lower and upper bound",)),
        (spaces.MultiBinary([2, 3]), ("MultiBinary((2, 3))", "not supported: flatten it")),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), ("[4 5]])", "not supported: flatten it")),
    ],
    ids=lambda x: "" if isinstance(x, tuple) else str(x),
)
def test_unsupported_action_space(action_space, message):
    with raises(*message):
        make_model(SpacesEnv(BOX, action_space))


# Too few episodes for the environments

TOO_FEW = ("n_episodes=2", "at least the number of environments, 3, or None")


def copies(n_envs):
    """Make a vectorized environment of ``CountEnv`` without a monitor."""
    return DummyVecEnv([CountEnv] * n_envs)


def test_fewer_episodes_than_envs():
    with raises(*TOO_FEW):
        make_model(copies(3), n_episodes=2)
    assert make_model(copies(2), n_episodes=2).learn(1)._n_updates == 1


def test_load_with_more_envs_than_episodes(tmp_path):
    make_model(n_episodes=2).save(tmp_path / "model")
    with raises(*TOO_FEW):
        REINFORCE.load(tmp_path / "model", env=copies(3), device="cpu")
    assert REINFORCE.load(tmp_path / "model", env=copies(2), device="cpu").learn(1)._n_updates == 1


def test_set_env_with_more_envs_than_episodes():
    env = copies(2)
    model = make_model(env, n_episodes=2).learn(1)
    with raises(*TOO_FEW):
        model.set_env(copies(3))
    assert model.get_env() is env
    assert model.n_envs == 2
    assert model.learn(1)._n_updates == 2


# Values that are not finite, and episodes without an end


def learned_state(model):
    """Return a copy of all that training changes in the parameters and in the states of the optimizers in use."""
    optimizers = [model.policy.optimizer] + ([model.value_optimizer] if model.baseline == "value" else [])
    return deepcopy([model.policy.state_dict(), *(optimizer.state_dict()["state"] for optimizer in optimizers)])


def check_failing_update(model, bad_env, *message):
    """Check that an update that fails changes nothing, and that the model can go on with the environment from before."""
    env = model.get_env()
    model.learn(1)
    before = learned_state(model)
    assert all(before)  # The optimizers hold moments
    n_updates = model._n_updates
    model.set_env(bad_env)
    with raises(*message):
        model.learn(1)
    assert_same(learned_state(model), before)
    model.set_env(env)
    assert model.learn(1)._n_updates == n_updates + 1
    assert not th.equal(model.policy.action_net.weight, before[0]["action_net.weight"])
    assert weights(model).isfinite().all()


def three_envs(make, bad):
    """Make three environments of which only the one in the middle is bad."""
    return DummyVecEnv([make, lambda: bad(make()), make])


@pytest.mark.parametrize("observation_space", [BOX, DICT], ids=["array", "dict"])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_observation_is_not_finite(observation_space, step, value):
    def make():
        return SpacesEnv(observation_space, BOX)

    model = make_model(
        DummyVecEnv([make] * 3), "MultiInputPolicy" if observation_space is DICT else "MlpPolicy", baseline="value"
    )
    bad_env = three_envs(make, lambda env: Poison(env, "observation", step, value))
    message = (f"observation of environment 1 at step {step} of the rollout is not finite", str(value), "must be finite")
    check_failing_update(model, bad_env, *message)


def test_observation_is_not_finite_in_single_precision():
    def make():
        return SpacesEnv(spaces.Box(-1, 1, (2,), dtype=np.float64), BOX)

    model = make_model(DummyVecEnv([make] * 3), baseline="value")
    bad_env = three_envs(make, lambda env: Poison(env, "observation", 2, 1e300))
    check_failing_update(model, bad_env, "observation of environment 1 at step 2", "not finite")


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_reward_is_not_finite(step, value):
    model = make_model(copies(3), baseline="value")
    bad_env = three_envs(CountEnv, lambda env: Poison(env, "reward", step, value))
    message = (f"reward of environment 1 at step {step} of the rollout is not finite", str(value), "must be finite")
    check_failing_update(model, bad_env, *message)


class HugeDoubles(VecEnvWrapper):
    """Rewards in double precision, as SubprocVecEnv gives them; one of them is too large for single precision."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards + np.array([0, 1e300, 0]), dones, infos


def test_reward_is_not_finite_in_single_precision():
    check_failing_update(
        make_model(copies(3), baseline="value"), HugeDoubles(copies(3)), "reward of environment 1 at step 0", "not finite"
    )


def test_last_observation_is_not_finite():
    """No action follows the last observation, but with "bootstrap" the critic sees the observation."""

    def make():
        return CountEnv(truncate=True)

    model = make_model(copies(3), baseline="value", time_limit="bootstrap")
    bad_env = three_envs(make, lambda env: Poison(env, "observation", 5, NAN))
    check_failing_update(model, bad_env, "not finite")


@pytest.mark.parametrize(
    "kwargs",
    [dict(normalize_advantage=False), dict(baseline="value"), dict(baseline="value", normalize_value=False)],
    ids=str,
)
def test_returns_overflow(kwargs):
    model = make_model(copies(3), **kwargs)
    # Each reward is finite in single precision, their sum is not
    bad_env = three_envs(CountEnv, lambda env: gym.wrappers.TransformReward(env, lambda _: 3e38))
    check_failing_update(model, bad_env, "not finite")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("baseline", ["timestep", "value"])
def test_policy_gradient_is_not_finite(value, max_grad_norm, baseline):
    model = make_model(max_grad_norm=max_grad_norm, baseline=baseline).learn(1)
    model._mean_episode_lengths *= 2  # The next rollout has episodes of the same length
    before, hidden_before = learned_state(model), hidden_state(model)
    handle = model.policy.action_net.weight.register_hook(lambda grad: th.full_like(grad, value))
    with raises("policy gradient is not finite", "no step was made"):
        model.learn(1, reset_num_timesteps=False)
    # The critic is fitted before the gradient is taken
    assert_same(learned_state(model), before)
    assert hidden_state(model) == hidden_before
    handle.remove()
    assert model.learn(1)._n_updates == 2
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("chunk_size", [1, 2**13])
@pytest.mark.parametrize("n_passes", [0, 1, 2])
def test_a_step_that_is_not_checked_is_not_made(error, chunk_size, n_passes):
    """An error while the divergence is measured undoes the step: RL Zoo saves the model after Ctrl-C."""
    left = []

    def interrupt(*_):
        if left and left.pop() is None:
            raise error

    model = make_model(learning_rate=10.0, target_kl=1e-6).learn(1)
    set_chunk_size(model, chunk_size)
    # Raised after the step, in the given one of the passes through the network that follow
    model.policy.optimizer.register_step_post_hook(lambda *_: left.extend([None, *[0] * n_passes]))
    model.policy.action_net.register_forward_hook(interrupt)
    before = weights(model)
    with pytest.raises(error):
        model.learn(1)
    assert th.equal(weights(model), before)


@pytest.mark.parametrize("natural_gradient", [False, True])
def test_target_kl_of_a_schedule(natural_gradient):
    model = make_model(target_kl=lambda progress: progress - 1.5, natural_gradient=natural_gradient)
    before = weights(model)
    with raises("target_kl=-", "must be in [0, inf)"):
        model.learn(1)
    assert th.equal(weights(model), before)


def test_critic_loss_is_not_finite():
    model = make_model(copies(3), baseline="value", normalize_value=False)
    # Finite in single precision, their squares are not
    bad_env = three_envs(CountEnv, lambda env: gym.wrappers.TransformReward(env, lambda _: 1e30))
    check_failing_update(model, bad_env, "loss of the critic is not finite")


def test_critic_loss_is_not_finite_after_its_first_step():
    model = make_model(baseline="value").learn(1)
    before = learned_state(model)
    model.value_learning_rate = 1e25
    with raises("loss of the critic is not finite"):
        model.learn(1)
    assert_same(learned_state(model), before)
    model.value_learning_rate = 1e-3
    assert model.learn(1)._n_updates == 2
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_step_too_far_is_taken_back(seed):
    """A standard deviation of exp(-1000) is zero: no policy, and no reason to fail with ``target_kl``."""
    model = make_model(learning_rate=1000.0, seed=seed).learn(1)
    assert model._n_updates == 1
    assert logged(model)["train/approx_kl"] <= 2 * 0.3
    model.learn(20)
    assert weights(model).isfinite().all()


def test_step_to_infinity_is_taken_back():
    policy_kwargs = dict(optimizer_class=th.optim.SGD)
    model = make_model(learning_rate=1e38, normalize_advantage=False, policy_kwargs=policy_kwargs)
    before = learned_state(model)
    # So that the step overflows
    model.policy.action_net.weight.register_hook(lambda grad: th.full_like(grad, 100))
    model.learn(1)
    assert_same(learned_state(model), before)


@pytest.mark.parametrize("lengths, env_idx", [([None], 0), ([3, None, 3], 1), ([None, 3, 3], 0), ([3, 3, None], 2)])
def test_episode_without_an_end(lengths, env_idx):
    def make(i, length):
        return lambda: TracingEnv(i, length)

    model = make_model(DummyVecEnv([make(i, 3) for i in range(len(lengths))]), max_episode_steps=50, n_episodes=6)
    bad_env = DummyVecEnv([make(i, length) for i, length in enumerate(lengths)])
    message = (f"Environment {env_idx} has not finished its episode after max_episode_steps=50 steps", "time limit")
    check_failing_update(model, bad_env, *message)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_longest_episode_allowed(n_envs):
    env = DummyVecEnv([lambda: TracingEnv(length=50)] * n_envs)
    model = make_model(env, max_episode_steps=50, n_episodes=4).learn(1)
    assert model.rollout_buffer.lengths.tolist() == [50] * 4
    model.max_episode_steps = 49
    with raises("Environment 0 has not finished", "max_episode_steps=49"):
        model.learn(1)


def test_numbers_of_numpy():
    """Numbers of NumPy are numbers."""
    model = make_model(
        learning_rate=np.float32(1e-2),
        gamma=np.float32(0.9),
        ent_coef=np.float32(0.1),
        max_grad_norm=np.float32(1),
        target_kl=np.float32(0.1),
        value_learning_rate=np.float64(1e-3),
        n_episodes=np.int64(4),
        baseline="value",
    )
    assert model.learn(1)._n_updates == 1
