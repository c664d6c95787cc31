"""
Training states: all that the rest of a run depends on, saved between two updates, from which it goes on as if nothing had
happened.

Whole-episode rollouts start from a reset, so that this is parameters, optimizers, normalization statistics, counters and
random generators. A state is a zip archive of ``manifest.json`` (what it is, and checksums), ``state.json`` (random
generators, normalization, counters of the callbacks) and ``model.zip`` (SB3's own archive).
"""

import base64
import hashlib
import inspect
import io
import json
import os
import random
import re
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from filelock import FileLock, Timeout
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_reinforce import distributed
from sb3_reinforce.checks import check_number

#: Changes when states of one version cannot be read by the other
FORMAT_VERSION = 2

#: Wrappers whose state a reset sets anew, or which have none that matters
STATELESS = (VecCheckNan, VecExtractDictObs, VecFrameStack, VecMonitor, VecTransposeImage, VecVideoRecorder)

MEMBERS = ("state.json", "model.zip")

#: The packages that say which numbers a run gets
PACKAGES = ("sb3-reinforce", "stable-baselines3", "torch", "gymnasium", "numpy")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """
    :param packages: Names of packages
    :return: Their versions
    """
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Used without being installed
            found[name] = "?"
    return found


def encode(value: Any) -> Any:
    """
    :param value: An array, or anything that JSON does not know
    :return: What stands for it in JSON
    """
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": str(value.dtype), "shape": value.shape, "data": data}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be part of a training state")


def decode(value: dict[str, Any]) -> Any:
    """
    :param value: An object of JSON
    :return: The array that it stands for, if it does, or else the object
    """
    if value.keys() != {"dtype", "shape", "data"}:
        return value
    return np.frombuffer(base64.b64decode(value["data"]), value["dtype"]).reshape(value["shape"]).copy()


def is_plain_value(value: Any) -> bool:
    """
    :param value: A value
    :return: Whether JSON, with arrays, can hold it
    """
    if isinstance(value, list | tuple):
        return all(map(is_plain_value, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def wrappers(env: VecEnv) -> Iterator[VecEnv]:
    """
    :param env: A vectorized environment
    :return: It, and what it wraps, from the outside to the inside
    """
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def subspaces(space: spaces.Space) -> Iterator[spaces.Space]:
    """
    :param space: A space
    :return: It, and those that it is made of
    """
    yield space
    parts = space.spaces if isinstance(space, spaces.Dict | spaces.Tuple) else ()
    for part in parts.values() if isinstance(parts, dict) else parts:
        yield from subspaces(part)


def statistics_of(normalizer: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    :param normalizer: A wrapper that normalizes
    :return: Statistics of the observations, by their keys
    """
    obs_rms = normalizer.obs_rms if normalizer.norm_obs else {}
    return obs_rms if isinstance(obs_rms, dict) else {"": obs_rms}


def running_statistics(env: VecEnv) -> list[RunningMeanStd]:
    """
    :param env: A vectorized environment
    :return: All statistics of normalization in it
    """
    normalizers = [wrapper for wrapper in wrappers(env) if isinstance(wrapper, VecNormalize)]
    return [rms for wrapper in normalizers for rms in (*statistics_of(wrapper).values(), wrapper.ret_rms)]


def capture_rms(rms: RunningMeanStd) -> dict[str, Any]:
    """
    :param rms: Running statistics
    :return: Their state
    """
    return {"mean": np.asarray(rms.mean), "var": np.asarray(rms.var), "count": rms.count}


def restore_rms(rms: RunningMeanStd, state: dict[str, Any]) -> None:
    """
    :param rms: Running statistics
    :param state: Result of :func:`capture_rms`
    """
    rms.mean, rms.var, rms.count = state["mean"], state["var"], state["count"]


def capture_env(env: VecEnv) -> dict[str, Any]:
    """
    :param env: A vectorized environment, between two episodes
    :return: Its state: the random generators of the environments and of their spaces, and the statistics of normalization
    """
    *outer, base = wrappers(env)
    state: dict[str, Any] = {"n_envs": env.num_envs, "normalization": []}
    for wrapper in outer:
        if isinstance(wrapper, VecNormalize):
            state["normalization"].append(
                {
                    "obs": {key: capture_rms(rms) for key, rms in statistics_of(wrapper).items()},
                    "ret": capture_rms(wrapper.ret_rms),
                    "returns": wrapper.returns,
                }
            )
        elif not isinstance(wrapper, STATELESS):
            warnings.warn(f"What {type(wrapper).__name__} remembers, if anything, is not part of the training state")
    generators: list[Any] = base.get_attr("np_random") if isinstance(base, DummyVecEnv | SubprocVecEnv) else [None]
    if not all(isinstance(generator, np.random.Generator) for generator in generators):
        warnings.warn(
            f"A random generator of {type(base).__name__} is out of reach: a resumed run gets other episodes than this one"
        )
        return state
    # Those of the next reset, which are None after it
    state["seeds"] = list(base._seeds)
    state["generators"] = [generator.bit_generator.state for generator in generators]
    state["spaces"] = []
    for name in ("observation_space", "action_space"):
        found = [[part._np_random for part in subspaces(space)] for space in base.get_attr(name)]
        states = [[generator and generator.bit_generator.state for generator in of_env] for of_env in found]
        # SB3 seeds that of the actions, whether it is used or not
        is_used = name == "observation_space" and any(generator for of_env in found for generator in of_env)
        if isinstance(base, SubprocVecEnv) and is_used:
            warnings.warn(
                f"An environment of the SubprocVecEnv samples from its {name}: this generator is out of reach in another "
                "process, and a resumed run gets other samples. DummyVecEnv can be resumed exactly"
            )
        state["spaces"].append(states)
    return state


def make_generator(state: dict[str, Any]) -> np.random.Generator:
    """
    :param state: State of a bit generator
    :return: A generator in that state
    """
    generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator.bit_generator.state = state
    return generator


def restore_env(env: VecEnv, state: dict[str, Any]) -> None:
    """
    :param env: A vectorized environment
    :param state: Result of :func:`capture_env`
    :raises ValueError: If it holds another number of environments, or is normalized in another way
    """
    if env.num_envs != state["n_envs"]:
        raise ValueError(f"The training state is of {state['n_envs']} environments, env has {env.num_envs}")
    *outer, base = wrappers(env)
    normalizers = [wrapper for wrapper in outer if isinstance(wrapper, VecNormalize)]
    if len(normalizers) != len(state["normalization"]):
        raise ValueError(
            f"The training state is of an environment with {len(state['normalization'])} VecNormalize, "
            f"env has {len(normalizers)}"
        )
    for wrapper, statistics in zip(normalizers, state["normalization"], strict=True):
        found = statistics_of(wrapper)
        if found.keys() != statistics["obs"].keys():
            saved, of_env = (", ".join(map(repr, keys)) or "none" for keys in (statistics["obs"], found))
            raise ValueError(
                f"The training state has statistics of the observations {saved}, VecNormalize of env those of {of_env}"
            )
        for key, rms in found.items():
            restore_rms(rms, statistics["obs"][key])
        restore_rms(wrapper.ret_rms, statistics["ret"])
        wrapper.returns = statistics["returns"]
    if "generators" not in state or not isinstance(base, DummyVecEnv | SubprocVecEnv):
        return
    base._seeds = state["seeds"]
    if isinstance(base, SubprocVecEnv):
        for index, generator in enumerate(state["generators"]):
            base.set_attr("np_random", make_generator(generator), indices=index)
    else:
        for found, generator in zip(base.get_attr("np_random"), state["generators"], strict=True):
            found.bit_generator.state = generator  # The object stays the same: the environment may have given it to others
        for name, states in zip(("observation_space", "action_space"), state["spaces"], strict=True):
            for space, of_env in zip(base.get_attr(name), states, strict=True):
                for part, generator in zip(subspaces(space), of_env, strict=True):
                    if generator and part._np_random is not None:
                        part._np_random.bit_generator.state = generator
                    else:
                        part._np_random = generator and make_generator(generator)


def all_callbacks(callback: BaseCallback, seen: list[BaseCallback] | None = None) -> Iterator[BaseCallback]:
    """
    :param callback: A callback
    :param seen: Those that have been visited, to which this adds
    :return: It, and those that it refers to, of those that have a state, each of them once
    """
    seen = [] if seen is None else seen
    if any(callback is other for other in seen):
        return
    seen.append(callback)
    # Those that SB3 puts around others, or that show the progress, need not be the same in the resumed run
    if not isinstance(callback, CallbackList | ConvertCallback | ProgressBarCallback):
        yield callback
    for value in callback.callbacks if isinstance(callback, CallbackList) else list(vars(callback).values()):
        if isinstance(value, BaseCallback) and value is not callback.parent:
            yield from all_callbacks(value, seen)


def capture_callback(callback: BaseCallback) -> dict[str, Any]:
    """
    :param callback: A callback
    :return: Its state: numbers, texts and lists that are no arguments of its constructor, and environments
    """
    arguments = {name for kind in type(callback).__mro__ for name in inspect.signature(kind).parameters}
    own = {name: value for name, value in vars(callback).items() if name not in arguments or isinstance(value, VecEnv)}
    values = {name: value for name, value in own.items() if is_plain_value(value)}
    envs = {name: capture_env(value) for name, value in own.items() if isinstance(value, VecEnv)}
    return {"type": type(callback).__name__, "values": values, "envs": envs}


def restore_callback(callback: BaseCallback, state: dict[str, Any]) -> None:
    """
    :param callback: A callback
    :param state: Result of :func:`capture_callback`
    """
    vars(callback).update(state["values"])
    for name, env_state in state["envs"].items():
        restore_env(getattr(callback, name), env_state)


def capture(model: BaseAlgorithm, callback: BaseCallback) -> dict[str, Any]:
    """
    :param model: A model, between two updates
    :param callback: The callback that its training calls
    :return: What SB3 does not save: random generators, environment, callbacks
    """
    assert model.env is not None
    algorithm, keys, *rest = np.random.get_state()
    return {
        "time": time.time(),
        "python": random.getstate(),
        "numpy": [algorithm, keys, *rest],
        "torch": th.get_rng_state().numpy(),
        "cuda": th.cuda.get_rng_state(model.device).numpy() if model.device.type == "cuda" else None,
        "env": capture_env(model.env),
        "callbacks": [capture_callback(child) for child in all_callbacks(callback)],
        # What the update before has recorded is written after the next rollout
        "logged": [
            [key, value, model.logger.name_to_excluded[key]]
            for key, value in model.logger.name_to_value.items()
            if is_plain_value(value)
        ],
    }


def check_number_of_processes(state: dict[str, Any]) -> None:
    """
    :param state: Result of :func:`load_state`
    :raises ValueError: If there are not as many processes as before
    """
    if len(state["processes"]) != distributed.world_size():
        raise ValueError(f"The training state is of {len(state['processes'])} processes, not {distributed.world_size()}")


def restore(model: BaseAlgorithm, callback: BaseCallback, state: dict[str, Any]) -> None:
    """
    :param model: A loaded model, whose training has been set up
    :param callback: The callback that its training calls
    :param state: Result of :func:`load_state`
    :raises ValueError: If the number of processes, the environment or the callbacks are others
    """
    assert model.env is not None
    if state["versions"] != versions():
        warnings.warn(f"The state was saved with {state['versions']}, not {versions()}: the numbers may differ from here on")
    check_number_of_processes(state)
    state = state["processes"][distributed.rank()]
    callbacks = list(all_callbacks(callback))
    found, wanted = [type(child).__name__ for child in callbacks], [child["type"] for child in state["callbacks"]]
    if found != wanted:
        raise ValueError(f"The training state is of a run with the callbacks {wanted}, this one has {found}")
    restore_env(model.env, state["env"])
    for child, child_state in zip(callbacks, state["callbacks"], strict=True):
        restore_callback(child, child_state)
    for key, value, exclude in state["logged"]:
        model.logger.record(key, value, exclude)
    python_version, internal, gauss = state["python"]
    random.setstate((python_version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    th.set_rng_state(th.from_numpy(state["torch"]))
    if state["cuda"] is not None and model.device.type == "cuda":
        th.cuda.set_rng_state(th.from_numpy(state["cuda"]), model.device)


def save_state(path: Path, model: BaseAlgorithm, callback: BaseCallback) -> None:
    """
    Save a training state. The file is there as a whole or not at all, also when the disk is full or the power fails. Of
    several processes, all take part, and the first one writes.

    :param path: Path of the file
    :param model: A model, between two updates
    :param callback: The callback that its training calls
    """
    state: dict[str, Any] = {"processes": distributed.gather(capture(model, callback))}
    if distributed.rank() > 0:
        return
    state |= {"log_dir": model.logger.dir, "device": model.device.type, "versions": versions()}
    model_file = io.BytesIO()
    model.save(model_file)
    contents = json.dumps(state, default=encode).encode()
    members = dict(zip(MEMBERS, (contents, model_file.getvalue()), strict=True))
    manifest = {
        "format": "sb3_reinforce training state",
        "version": FORMAT_VERSION,
        "num_timesteps": model.num_timesteps,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
    }
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in {"manifest.json": json.dumps(manifest).encode(), **members}.items():
                    archive.writestr(name, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Any], bytes]:
    """
    Read a training state. Nothing in it is executed: the model is given back as the bytes of SB3's archive.

    :param path: Path of the file
    :return: The state, with what :func:`capture` gave in each process, and the model
    :raises ValueError: If it is no training state, is damaged, or is of another version
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            format_version, digests = manifest["version"], dict(manifest["sha256"])
            contents = {name: archive.read(name) for name in MEMBERS}
    except Exception as error:  # A file of any content gives errors of any kind
        raise ValueError(f"{path} is no training state, or is damaged ({error})") from error
    if format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a training state of version {format_version}, this package reads version {FORMAT_VERSION}"
        )
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != digests.get(name):
            raise ValueError(f"{path} is damaged: the checksum of {name} is wrong")
    return json.loads(contents["state.json"], object_hook=decode), contents["model.zip"]


def n_steps_of(state: Path) -> int:
    """
    :param state: Path of a training state
    :return: The number of time steps in its name
    """
    return int(state.stem.split("_")[-2])


def find_states(folder: Path, name_prefix: str | None = None) -> list[Path]:
    """
    :param folder: Folder of training states
    :param name_prefix: Begin of their names, ``None`` for any
    :return: Their paths, the latest first
    """
    pattern = rf"{'.*' if name_prefix is None else re.escape(name_prefix)}_\d+_steps\.state"
    found = [path for path in folder.glob("*_steps.state") if re.fullmatch(pattern, path.name)]
    return sorted(found, key=n_steps_of, reverse=True)


def load_latest(path: Path) -> tuple[dict[str, Any], bytes]:
    """
    :param path: A training state, or a folder of them: the latest that is sound
    :return: As :func:`load_state`, in all processes, which all have to call it
    :raises ValueError: If there is none
    """
    return distributed.on_first(lambda: _load_latest(path))


def _load_latest(path: Path) -> tuple[dict[str, Any], bytes]:
    if not path.is_dir():
        return load_state(path)
    for candidate in find_states(path):
        try:
            return load_state(candidate)
        except ValueError as error:
            warnings.warn(f"{error}: the one before it is tried")
    raise ValueError(f"There is no sound training state in {path}")


def lock(folder: Path) -> FileLock:
    """
    Claim a run for this process, until it ends.

    :param folder: Folder of training states
    :return: The claim, which can be released
    :raises ValueError: If another process has claimed it
    """
    claim = FileLock(folder / ".lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        claim.acquire()
    except Timeout as error:
        raise ValueError(
            f"The run in {folder} is still training, in another process (or has failed in one that has not ended)"
        ) from error
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error}): see to it that nothing else goes on with this run meanwhile")
    return claim


class TrainingStateCallback(BaseCallback):
    """
    Saves the training state of ``REINFORCE`` between two updates, at the first opportunity after every ``save_freq`` time
    steps: ``PATH/NAME_PREFIX_N_steps.state``. ``REINFORCE.resume(path, env)`` goes on from there.

    :param save_freq: Number of time steps between two states
    :param path: Folder to save to
    :param keep: Number of the latest states to keep
    :param name_prefix: Begin of the names of the files
    :param verbose: Verbosity level: 0 for no output, 1 for the names of the files
    :raises ValueError: If a number is not positive, or (when training starts) the folder holds states of another run, or
        of one that is still training
    """

    def __init__(self, save_freq: int, path: str | Path, keep: int = 2, name_prefix: str = "training", verbose: int = 0):
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            check_number(name, value, 1, integer=True)
        self.save_freq = save_freq
        self.path = Path(path)
        self.keep = keep
        self.name_prefix = name_prefix
        self.last_saved = 0
        #: Set it, from a signal handler for example, to save a state at the end of this update and stop there
        self.is_to_stop = False
        #: Whether it has done so
        self.has_stopped = False

    def _init_callback(self) -> None:
        if not hasattr(self.model, "_between_updates"):  # Nothing else calls on_update_end
            raise ValueError(f"TrainingStateCallback is for REINFORCE, not for {type(self.model).__name__}")
        self.path.mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        if self.num_timesteps == 0:
            self.last_saved = 0
        distributed.on_first(self._claim_folder)

    def _claim_folder(self) -> None:
        self._lock = lock(self.path)
        states = find_states(self.path, self.name_prefix)
        if self.num_timesteps == 0 and states:
            raise ValueError(
                f"{self.path} holds training states of another run: go on with that one (resume), or choose another folder"
            )
        if states and n_steps_of(states[0]) > self.num_timesteps:
            warnings.warn(
                f"{self.path} holds training states of more than the {self.num_timesteps} time steps that this run goes on "
                "from: those that it saves will take their place"
            )

    def on_update_end(self, callback: BaseCallback) -> None:
        """
        Called between two updates, after all callbacks know that a rollout begins.

        :param callback: The callback that training calls, which this one is part of
        """
        is_to_stop = bool(distributed.all_max(self.is_to_stop))  # A signal can reach the processes in different updates
        self.is_to_stop = False  # Not in the state, nor in the next run
        # That of the model: this one's is of the last step, before the processes met
        if is_to_stop or self.model.num_timesteps - self.last_saved >= self.save_freq:
            self._save(callback)
        self.has_stopped = is_to_stop

    def _on_step(self) -> bool:
        return not self.has_stopped

    def _on_training_end(self) -> None:
        if distributed.rank() == 0:
            self._lock.release(force=True)

    def _save(self, callback: BaseCallback) -> None:
        self.last_saved = self.model.num_timesteps
        path = self.path / f"{self.name_prefix}_{self.last_saved}_steps.state"
        save_state(path, self.model, callback)
        if distributed.rank() > 0:
            return
        if self.verbose >= 1:
            print(f"Saved the training state to {path}")
        # Those of more steps are from before this run went on from an earlier state: they go first
        states = sorted(find_states(self.path, self.name_prefix), key=lambda state: n_steps_of(state) > self.last_saved)
        for old in states[self.keep :]:
            old.unlink()
