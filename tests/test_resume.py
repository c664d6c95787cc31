"""Training states: a resumed run is the undisturbed one, bit for bit."""

import io
import multiprocessing
import pickle
import random
import shutil
import signal
import subprocess
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.resume import TrainingStateCallback
from sb3_reinforce.resume.archive import find_states, load_latest, load_state, lock, n_steps_of
from sb3_reinforce.resume.capture import capture_env, restore_env
from sb3_reinforce.vec_env.shared_starts import SharedStarts
from tests.envs import MaskEnv, SpacesEnv
from tests.helpers import PLAIN, assert_same, hidden_state, raises

DICT = spaces.Dict(vector=spaces.Box(-1, 1, (2,)), cell=spaces.Discrete(3))


class Noisy(gym.Wrapper):
    """Add noise from the environment's generator to the rewards, and end episodes at random."""

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        self.left = self.unwrapped.np_random.integers(5, 15)
        return result

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.left -= 1
        return observation, float(reward) + self.unwrapped.np_random.normal(), terminated, truncated or self.left == 0, info


def make_spaces_env():
    return Monitor(SpacesEnv(DICT, spaces.Box(-1, 1, (1,))))


def make_env(env_id="Pendulum-v1", n_envs=1, normalize=False, **kwargs):
    env = make_vec_env(lambda: Noisy(gym.make(env_id)), n_envs, seed=1, **kwargs)
    return VecNormalize(env) if normalize else env


#: Rollouts of about as many steps, the numbers of whose episodes follow from the rollouts before
STEPS = dict(n_episodes=2, target_steps=150)

GROUPS = dict(n_episodes=2, group_size=2, baseline="timestep", gae_lambda=None, time_limit="terminal")

#: How the environment is made, and the arguments of the model, besides those
CASES = {
    "one environment": (make_env, {}),
    "three environments": (lambda: make_env(n_envs=3), dict(n_episodes=5)),
    "processes": (lambda: make_env(n_envs=2, vec_env_cls=SubprocVecEnv), {}),
    "normalized": (lambda: make_env(n_envs=2, normalize=True), {}),
    "normalized rewards": (lambda: VecNormalize(make_env(), norm_obs=False), {}),
    "critic": (make_env, dict(baseline="value", gae_lambda=0.9, time_limit="bootstrap", n_value_epochs=2)),
    "plain": (make_env, {**PLAIN, **STEPS}),
    "linear": (make_env, dict(baseline="linear")),
    "gSDE": (lambda: make_env(n_envs=2), dict(use_sde=True, sde_sample_freq=3)),
    "discrete": (lambda: make_env("CartPole-v1"), {}),
    "dict, samples of a space": (lambda: DummyVecEnv([make_spaces_env] * 2), {}),
    "memory": (lambda: make_env(n_envs=2), {}),
    "memory and masks": (lambda: make_vec_env(MaskEnv, 2, seed=1), {}),
    "groups": (lambda: make_env(n_envs=2, normalize=True), {**GROUPS, "target_steps": 150}),
    "groups, processes": (
        lambda: make_env(n_envs=2, vec_env_cls=SubprocVecEnv, wrapper_class=SharedStarts),
        {**GROUPS, "baseline": "greedy", "target_steps": 60},
    ),
    "another optimizer": (
        make_env,
        dict(natural_gradient=False, policy_kwargs=dict(optimizer_class=th.optim.AdamW, state_dependent_std=True)),
    ),
}

N_STEPS = 900


class Counts(BaseCallback):
    """Count rollouts and steps: a resumed run must count on from the saved state."""

    n_rollouts = 0

    def _on_training_start(self):
        self.n_steps = 0

    def _on_rollout_start(self):
        self.n_rollouts += 1

    def _on_step(self):
        self.n_steps += 1
        return True


class History(BaseCallback):
    """Keep the rewards of the whole run: a resumed run must go on with those of the saved state."""

    def __init__(self):
        super().__init__()
        self.rewards = {}

    def _on_step(self):
        self.rewards[self.num_timesteps] = self.locals["rewards"].tolist()
        return True


def callbacks(folder, make):
    """Make the callbacks of a run: one that keeps the rewards, and the list of all."""
    eval_env = make()
    eval_env.training = False  # Of VecNormalize
    evaluation = EvalCallback(eval_env, n_eval_episodes=2, eval_freq=100, log_path=str(folder / "evaluations"), verbose=0)
    history = History()
    return history, CallbackList([Counts(), evaluation, TrainingStateCallback(150, folder / "states", keep=100), history])


def policy_of(case):
    """Return the policy that goes with the observations of a case."""
    return "MultiInputPolicy" if "dict" in case else "MlpLstmPolicy" if "memory" in case else "MlpPolicy"


def fingerprint(model):
    """Return all that a run leaves: parameters, optimizers, random generators, statistics, counters, episodes."""
    generators = [th.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()]
    normalizer = model.get_vec_normalize_env()
    statistics = normalizer and [
        rms.var.tobytes() for rms in (getattr(normalizer, "obs_rms", None), normalizer.ret_rms) if rms
    ]
    counters = (model.num_timesteps, model._n_updates, model._total_timesteps, hidden_state(model))
    episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
    # As bytes, so that all can be compared with ==
    parameters = repr_of(model.get_parameters())
    return parameters, generators, statistics, counters, episodes


def repr_of(value):
    """Return a nested structure with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: repr_of(part) for key, part in value.items()}
    if isinstance(value, list):
        return [repr_of(part) for part in value]
    return value.numpy().tobytes() if isinstance(value, th.Tensor) else value


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_one(case, tmp_path):
    make, kwargs = CASES[case]
    history, callback = callbacks(tmp_path / "one", make)
    model = REINFORCE(policy_of(case), make(), **{**STEPS, "seed": 3, "device": "cpu", **kwargs})
    model.learn(N_STEPS, callback=callback)
    expected = fingerprint(model)
    counts = vars(callback.callbacks[0])
    assert counts["n_rollouts"] > 3 and counts["n_steps"] * model.n_envs == model.num_timesteps
    evaluations = np.load(tmp_path / "one/evaluations/evaluations.npz")
    states = find_states(tmp_path / "one/states")
    assert len(states) >= 3

    for state in (states[-1], states[1]):
        start = int(state.name.split("_")[1])
        th.manual_seed(99), np.random.seed(99), random.seed(99)
        again, callback = callbacks(tmp_path / f"from {start}", make)
        resumed = REINFORCE.resume(state, env=make())
        assert resumed.num_timesteps == start
        resumed.learn(N_STEPS, callback=callback)
        assert fingerprint(resumed) == expected
        assert all(vars(callback.callbacks[0])[name] == counts[name] for name in ("n_rollouts", "n_steps"))
        assert again.rewards == history.rewards
        found = np.load(tmp_path / f"from {start}/evaluations/evaluations.npz")
        assert found["timesteps"].tolist() == evaluations["timesteps"].tolist()
        assert found["results"].tolist() == evaluations["results"].tolist()


@pytest.mark.parametrize("disturb", ["environment", "PyTorch"])
def test_one_number_of_a_generator_makes_another_run(disturb, tmp_path):
    """The test above notices a generator that is not restored."""
    make, _ = CASES["one environment"]
    _, callback = callbacks(tmp_path / "one", make)
    model = REINFORCE("MlpPolicy", make(), seed=3, device="cpu", **STEPS)
    expected = fingerprint(model.learn(N_STEPS, callback=callback))
    state = find_states(tmp_path / "one/states")[1]
    resumed = REINFORCE.resume(state, env=make())
    history, callback = callbacks(tmp_path / "two", make)
    first_step, on_step = resumed.num_timesteps + 1, history._on_step

    def draw_after_the_first_step():
        if resumed.num_timesteps == first_step:
            resumed.env.envs[0].unwrapped.np_random.random() if disturb == "environment" else th.rand(1)
        return on_step()

    history._on_step = draw_after_the_first_step
    resumed.learn(N_STEPS, callback=callback)
    assert fingerprint(resumed) != expected


RUN_LENGTH = 40_000


def train_to_the_end(folder, is_ready):
    """Start a run, or go on with it, and save the model at the end."""
    th.set_num_threads(1)
    env = make_vec_env("Pendulum-v1", 2, seed=1)
    if find_states(folder):
        model = REINFORCE.resume(folder, env=env)
    else:
        model = REINFORCE("MlpPolicy", env, seed=3, n_episodes=2, device="cpu")
    is_ready.set()
    model.learn(RUN_LENGTH, callback=TrainingStateCallback(400, folder))
    model.save(folder / "last")


def start(folder):
    """Start a process that trains, and wait until it does."""
    context = multiprocessing.get_context("forkserver")
    is_ready = context.Event()
    process = context.Process(target=train_to_the_end, args=(folder, is_ready))
    process.start()
    assert is_ready.wait(timeout=300)
    return process


def finish(folder):
    """Train to the end in another process."""
    process = start(folder)
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
def test_killed_processes(tmp_path):
    """Killed again and again at random moments, the run ends as the undisturbed one does."""
    finish(tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    rng = random.Random(0)
    for _ in range(4):
        process = start(folder)
        time.sleep(rng.uniform(0.05, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(folder)
    models = [REINFORCE.load(path / "last.zip") for path in (tmp_path / "undisturbed", folder)]
    assert_same(models[0].policy.state_dict(), models[1].policy.state_dict())
    assert models[0].num_timesteps == models[1].num_timesteps >= RUN_LENGTH
    assert not list(folder.glob("*.part"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two states of a run."""
    folder = tmp_path_factory.mktemp("saved") / "states"
    callback = TrainingStateCallback(30, folder, keep=2)
    REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), seed=0, n_episodes=2).learn(200, callback=callback)
    assert len(find_states(folder)) == 2  # Of more
    return folder


def test_learn_in_pieces(tmp_path):
    """The states in the folder are this run's own."""
    model = REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), seed=0, n_episodes=2)
    callback = TrainingStateCallback(30, tmp_path)
    n_steps = model.learn(100, callback=callback).num_timesteps
    model.learn(100, callback=callback, reset_num_timesteps=False)
    assert n_steps_of(find_states(tmp_path)[0]) >= n_steps
    with raises("holds training states of another run"):
        model.learn(100, callback=callback)


@pytest.fixture
def states(saved, tmp_path):
    """The two states, in a folder that the test may change."""
    shutil.copytree(saved, tmp_path / "states")
    return find_states(tmp_path / "states")


def truncate(path):
    """Cut the file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def empty(path):
    """Leave nothing in the file."""
    path.write_bytes(b"")


def foreign(path):
    """Put a model of SB3 in the place of the state."""
    REINFORCE("MlpPolicy", "CartPole-v1").save(path)
    path.with_suffix(".state.zip").replace(path) if path.with_suffix(".state.zip").exists() else None


@pytest.mark.parametrize("damage", [truncate, flip, empty, foreign])
def test_damaged_states_are_refused_and_the_one_before_is_used(states, damage):
    damage(states[0])
    with pytest.raises(ValueError, match=f"{states[0].name} is (no training state, or is )?damaged"):
        REINFORCE.resume(states[0], env=make_vec_env("CartPole-v1"))
    with pytest.warns(UserWarning, match=f"{states[0].name} is .*: the one before it is tried"):
        model = REINFORCE.resume(states[0].parent, env=make_vec_env("CartPole-v1"))
    assert f"_{model.num_timesteps}_steps" in states[1].name


def test_every_flipped_bit_is_found(states):
    """A flipped bit is an error, unless the state reads as before: zip holds some of its fields twice."""
    content = states[0].read_bytes()
    expected = load_state(states[0])
    rng = random.Random(0)
    n_refused = 0
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        states[0].write_bytes(changed)
        try:
            found = load_state(states[0])
        except ValueError:
            n_refused += 1
        else:
            assert found[1] == expected[1] and repr(found[0]) == repr(expected[0])
    assert n_refused > 190


def replace_members(path, change_state=None, model=None):
    """Change the state in the archive, or write other bytes in the place of the model."""
    state, old_model = load_state(path)
    if change_state is not None:
        change_state(state)
    contents = io.BytesIO()
    th.save(state, contents)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.pt", contents.getvalue())
        archive.writestr("model.zip", model or old_model)


def test_another_version(states):
    replace_members(states[0], lambda state: state.update(version=99))
    with pytest.raises(ValueError, match="is a training state of version 99, this package reads version 3"):
        load_latest(states[0])


def test_state_of_an_earlier_version(tmp_path):
    """Those had a manifest."""
    with zipfile.ZipFile(tmp_path / "training_8_steps.state", "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.writestr("model.zip", "")
    with pytest.raises(ValueError, match="is a training state of an earlier version, this package reads version 3"):
        load_latest(tmp_path / "training_8_steps.state")


def test_no_states(tmp_path):
    with pytest.raises(ValueError, match="There is no sound training state in"):
        REINFORCE.resume(tmp_path)
    with pytest.raises(ValueError, match="is no training state"):
        REINFORCE.resume(tmp_path / "nowhere.state")


def test_reading_a_state_executes_nothing(states, tmp_path):
    """The model, which SB3 pickles, comes back as bytes, and the rest of a state is refused if it wants to be executed."""

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    replace_members(states[0], model=pickle.dumps(Bomb()))
    _, model = load_state(states[0])
    replace_members(states[0], lambda state: state.update(version=Bomb()))
    with pytest.raises(ValueError, match="is no training state, or is damaged"):
        load_state(states[0])
    assert not (tmp_path / "exploded").exists()
    pickle.loads(model)
    assert (tmp_path / "exploded").exists()


def test_other_environments_and_callbacks(states):
    model = REINFORCE.resume(states[0], env=make_vec_env("CartPole-v1", 2))
    with pytest.raises(ValueError, match="The training state is of 1 environments, env has 2"):
        model.learn(200, callback=TrainingStateCallback(30, states[0].parent))
    model = REINFORCE.resume(states[0], env=VecNormalize(make_vec_env("CartPole-v1")))
    with pytest.raises(ValueError, match="with 0 VecNormalize, env has 1"):
        model.learn(200, callback=TrainingStateCallback(30, states[0].parent))
    callback = TrainingStateCallback(30, states[0].parent.parent / "rewards")
    env = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=False)
    REINFORCE("MlpPolicy", env, seed=0, n_episodes=2).learn(100, callback=callback)
    model = REINFORCE.resume(callback.path, env=VecNormalize(make_vec_env("CartPole-v1")))
    with pytest.raises(ValueError, match="statistics of the observations none, VecNormalize of env those of ''"):
        model.learn(100, callback=callback)
    model = REINFORCE.resume(states[0], env=make_vec_env("CartPole-v1"))
    with pytest.raises(ValueError, match=r"with the callbacks \['TrainingStateCallback'\], this one has \[\]"):
        model.learn(200)


def test_statistics_are_found_by_their_keys():
    box = spaces.Box(-1, 1, (2,))

    def make(keys):
        env = SpacesEnv(spaces.Dict(a=box, b=box), box)
        return VecNormalize(DummyVecEnv([lambda: env]), norm_obs_keys=keys)

    first, second = make(["a", "b"]), make(["b", "a"])
    first.obs_rms["a"].mean += 1
    restore_env(second, capture_env(first))
    assert (second.obs_rms["a"].mean == 1).all() and (second.obs_rms["b"].mean == 0).all()
    with pytest.raises(ValueError, match="statistics of the observations 'a', 'b', VecNormalize of env those of 'a'"):
        restore_env(make(["a"]), capture_env(first))


def test_folder_of_another_run(states):
    """The states of the other run are neither mixed with those of the new run nor removed."""
    model = REINFORCE("MlpPolicy", make_vec_env("CartPole-v1"), n_episodes=2)
    with pytest.raises(ValueError, match="holds training states of another run"):
        model.learn(200, callback=TrainingStateCallback(30, states[0].parent))
    assert find_states(states[0].parent) == states
    model.learn(200, callback=TrainingStateCallback(30, states[0].parent, keep=1, name_prefix="other"))
    assert set(states) < set(find_states(states[0].parent))


@pytest.mark.parametrize("keep", [1, 2])
def test_going_back_to_an_earlier_state(states, keep):
    """States of more steps make room for those of the run that has gone back."""
    abandoned = shutil.copy(states[0], states[0].with_name("training_100000_steps.state"))
    model = REINFORCE.resume(states[1], env=make_vec_env("CartPole-v1"))
    callback = TrainingStateCallback(30, states[0].parent, keep=keep)
    with pytest.warns(UserWarning, match=f"more than the {model.num_timesteps} time steps that this run goes on from"):
        model.learn(200, callback=callback)
    found = find_states(states[0].parent)
    assert abandoned not in found and len(found) == keep
    assert found[0].name == f"training_{callback.last_saved}_steps.state"


def test_a_prefix_that_begins_with_another(tmp_path):
    callbacks = [TrainingStateCallback(30, tmp_path, keep=2, name_prefix=prefix) for prefix in ("a", "a_b", "[a]*")]
    REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), seed=0, n_episodes=2).learn(300, callback=callbacks)
    found = [find_states(tmp_path, callback.name_prefix) for callback in callbacks]
    assert [len(states) for states in found] == [2, 2, 2] and len(find_states(tmp_path)) == 6


class Refers(BaseCallback):
    """Ask another callback to stop the training, after 100 steps."""

    other = None

    def _on_step(self):
        if self.num_timesteps == 100 and isinstance(self.other, TrainingStateCallback):
            self.other.is_to_stop = True
        return True


def test_callbacks_that_refer_to_others(tmp_path):
    saver, first, second = TrainingStateCallback(10**6, tmp_path), Refers(), Refers()
    first.other, second.other = saver, first
    model = REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), seed=0, n_episodes=2)
    model.learn(3000, callback=[second, saver, first])
    assert model.num_timesteps < 1200 and len(find_states(tmp_path)) == 1
    first.other, second.other = second, first
    model.learn(100, callback=[first, second])


def test_training_states_of_another_algorithm(tmp_path):
    with pytest.raises(ValueError, match="TrainingStateCallback is for REINFORCE, not for A2C"):
        A2C("MlpPolicy", "CartPole-v1").learn(10, callback=TrainingStateCallback(5, tmp_path / "states"))


def test_another_total(states):
    model = REINFORCE.resume(states[0], env=make_vec_env("CartPole-v1"))
    with pytest.warns(UserWarning, match="total_timesteps=300, the run that is resumed has 200"):
        model.learn(300, callback=TrainingStateCallback(30, states[0].parent))
    assert model.num_timesteps >= 300


@pytest.mark.parametrize("argument", ["save_freq", "keep"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_arguments(tmp_path, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}={value!r} must be an integer in \[1, inf\)$"):
        TrainingStateCallback(**{"save_freq": 1, "path": tmp_path, argument: value})


def test_full_disk(states, tmp_path):
    """A state that does not fit leaves the one before, and nothing half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={3 * states[0].stat().st_size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        model = REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), seed=0, n_episodes=2)
        with pytest.raises(OSError, match="No space left on device"):
            model.learn(1000, callback=TrainingStateCallback(30, disk, keep=9))
        assert find_states(disk) and {*disk.iterdir()} == {*find_states(disk), disk / ".lock"}
        load_latest(disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


class HiddenSpace(gym.Wrapper):
    """Use the generator of the observation space, which is out of reach in another process."""

    def reset(self, **kwargs):
        self.observation_space.seed(0)
        return super().reset(**kwargs)


def test_what_cannot_be_restored_is_said(tmp_path):
    env = SubprocVecEnv([lambda: HiddenSpace(gym.make("CartPole-v1"))])
    model = REINFORCE("MlpPolicy", env, seed=0, n_episodes=2)
    with pytest.warns(UserWarning, match="samples from its observation_space: this generator is out of reach"):
        model.learn(120, callback=TrainingStateCallback(30, tmp_path))
    env.close()


def claim(folder, is_claimed, is_over):
    """Hold the folder as a run that is still training does."""
    claimed = lock(folder)
    is_claimed.set()
    is_over.wait()
    del claimed


@contextmanager
def claimed_by_another_process(folder):
    """Let another process hold the folder, and kill the process in the end."""
    context = multiprocessing.get_context("forkserver")
    is_claimed, is_over = context.Event(), context.Event()
    other = context.Process(target=claim, args=(folder, is_claimed, is_over))
    other.start()
    try:
        assert is_claimed.wait(timeout=300)
        yield
    finally:
        other.kill()
        other.join()


def test_a_run_that_is_still_training_is_left_alone(states):
    folder = states[0].parent
    model = REINFORCE.resume(folder, env=make_vec_env("CartPole-v1"))
    with claimed_by_another_process(folder):
        with pytest.raises(ValueError, match="is still training, in another process"):
            model.learn(200, callback=TrainingStateCallback(30, folder))
    # Whoever is dead holds nothing, and whoever has failed can try again
    failing = CallbackList([TrainingStateCallback(30, folder), Counts()])
    with pytest.raises(ValueError, match="this one has"):
        REINFORCE.resume(folder, env=make_vec_env("CartPole-v1")).learn(200, callback=failing)
    model.learn(200, callback=TrainingStateCallback(30, folder))
    with claimed_by_another_process(folder):
        pass


def test_other_versions_of_packages(states, monkeypatch):
    model = REINFORCE.resume(states[0], env=make_vec_env("CartPole-v1"))
    monkeypatch.setattr("sb3_reinforce.checks.version", lambda name: "0.0")
    with pytest.warns(UserWarning, match="the numbers may differ from here on"):
        model.learn(200, callback=TrainingStateCallback(30, states[0].parent))


def test_a_run_that_was_stopped_before_its_first_rollout(tmp_path):
    undisturbed = REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=1), seed=0)
    undisturbed.learn(200, callback=TrainingStateCallback(1000, tmp_path / "undisturbed"))
    callback = TrainingStateCallback(1000, tmp_path / "stopped")
    callback.is_to_stop = True
    REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=1), seed=0).learn(200, callback=callback)
    assert [path.name for path in find_states(tmp_path / "stopped")] == ["training_0_steps.state"]
    resumed = REINFORCE.resume(tmp_path / "stopped", env=make_vec_env("CartPole-v1"))
    resumed.learn(200, callback=TrainingStateCallback(1000, tmp_path / "stopped"))
    assert fingerprint(resumed) == fingerprint(undisturbed)
    # A new run is still kept from mixing with an old one
    with pytest.raises(ValueError, match="holds training states of another run"):
        REINFORCE("MlpPolicy", make_vec_env("CartPole-v1")).learn(
            200, callback=TrainingStateCallback(30, tmp_path / "stopped")
        )


class Remembers(BaseCallback):
    """Remember something of every kind that a state can hold."""

    memory = None

    def _on_step(self):
        if self.memory is None:
            array = np.arange(3, dtype=np.int16)
            self.memory = [(1, (2.5, "x")), [None, True], {"a": (1, 2), 3: [4]}, array, np.float32(0.5), 2**100]
        return True


def test_callbacks_get_back_what_they_remember(tmp_path):
    callbacks = [Remembers(), TrainingStateCallback(10, tmp_path)]
    REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", seed=0), n_episodes=2, seed=0).learn(150, callback=callbacks)
    again = Remembers()
    model = REINFORCE.resume(tmp_path, env=make_vec_env("CartPole-v1"))
    again._on_step = lambda: True  # Nothing new
    model.learn(150, callback=[again, TrainingStateCallback(10, tmp_path)])
    for found, expected in zip(again.memory, callbacks[0].memory, strict=True):
        assert type(found) is type(expected)
        assert repr(found) == repr(expected)


def test_resume_without_an_environment(states):
    model = REINFORCE.resume(states[0])
    with pytest.raises(ValueError, match="There is no environment to learn from"):
        model.learn(200)
