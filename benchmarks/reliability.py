"""
Let runs meet real faults, and see whether they end as the undisturbed run does, with the same parameters bit for bit.

Each trial is a run in a process of its own that meets one fault; it is then started again, and goes on from its last sound
training state.

    python -m benchmarks.reliability
"""

import argparse
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions
from sb3_reinforce.resume import TrainingStateCallback
from sb3_reinforce.resume.archive import find_states

N_TIMESTEPS = 24_000
SAVE_FREQ = 800
RESULT = Path(__file__).parent / "reliability.md"


class Faulty(gym.Wrapper):
    """
    Does something bad once.

    :param env: Environment
    :param fault: "step" or "reset" (raises there), "nan observation", "inf observation", "nan reward" or "inf reward"
    :param at: In which call of step or reset
    """

    def __init__(self, env: gym.Env, fault: str = "", at: int = 0):
        super().__init__(env)
        self.fault, self.at = fault, at
        self.calls = {"step": 0, "reset": 0}

    def _is_due(self, kind: str) -> bool:
        self.calls[kind] += 1
        return self.calls[kind] == self.at

    def reset(self, **kwargs):
        if self._is_due("reset") and self.fault == "reset":
            raise RuntimeError("the simulator is gone")
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._is_due("step"):
            if self.fault == "step":
                raise RuntimeError("the simulator is gone")
            value, _, where = self.fault.partition(" ")
            if where == "observation":
                observation = np.full_like(observation, float(value))
            if where == "reward":
                reward = float(value)
        return observation, reward, terminated, truncated, info


class NotANumber(BaseCallback):
    """
    Puts NaN into a parameter once, as a fault of the memory can.

    :param name: Name of the parameter
    :param at: In which step
    """

    def __init__(self, name: str, at: int):
        super().__init__()
        self.name, self.at = name, at

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            dict(self.model.policy.named_parameters())[self.name].data.view(-1)[0] = float("nan")
        return True


def child(folder: Path, fault: str, at: int) -> None:
    """Train in a folder, or go on with the training there."""
    th.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Which a shell may have switched off
    env = make_vec_env(
        "Pendulum-v1",
        2,
        seed=1,
        wrapper_class=Faulty,
        wrapper_kwargs=dict(fault=fault, at=at),
        vec_env_cls=SubprocVecEnv if fault == "worker" else DummyVecEnv,
    )
    env = VecNormalize(env)
    if find_states(folder):
        model = REINFORCE.resume(folder, env=env)
    else:
        model = REINFORCE("MlpPolicy", env, seed=3, n_episodes=2, baseline="value", gae_lambda=0.9, device="cpu")
    print("started", flush=True)
    parameter = NotANumber(fault if "net." in fault else "", at if "net." in fault else 0)
    model.learn(N_TIMESTEPS, callback=[parameter, TrainingStateCallback(SAVE_FREQ, folder)])
    parameters = b"".join(value.numpy().tobytes() for value in model.policy.state_dict().values())
    # On standard output, as the disk may be full
    print("finished", hashlib.sha256(parameters + env.obs_rms.mean.tobytes()).hexdigest(), flush=True)


def start(folder: Path, fault: str = "", at: int = 0) -> subprocess.Popen:
    """
    Start a run, and wait until it trains.

    :return: The run, which has begun to train
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability", "--child", str(folder), fault, str(at)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(folder: Path) -> str:
    """
    Do the undisturbed run.

    :return: What the run ends with when it is left alone
    """
    output, errors = start(folder).communicate()
    return output.strip() or errors


def children(pid: int | str) -> list[str]:
    """
    List child processes.

    :return: Ids of the processes that a process has started
    """
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def send(number: int, to_worker: bool = False) -> Callable[[Path, random.Random], None]:
    """
    Make a fault of a signal.

    :return: A fault: a signal at a random moment, to the run or to one of the processes of its environments
    """

    def meet(folder: Path, rng: random.Random) -> None:
        process = start(folder, "worker" if to_worker else "")
        time.sleep(rng.uniform(0.1, 1.5))
        pid = process.pid
        if to_worker:
            # They are children of a server that makes them
            pid = int(rng.choice([worker for child in children(pid) for worker in children(child)]))
        os.kill(pid, number)
        process.communicate()
        assert process.returncode != 0

    return meet


def misbehave(fault: str, latest: int) -> Callable[[Path, random.Random], None]:
    """
    Make a fault inside the run.

    :return: A fault: the environment, or the memory, does something bad in a random call
    """

    def meet(folder: Path, rng: random.Random) -> None:
        process = start(folder, fault, rng.randint(2, latest))
        process.communicate()
        assert process.returncode != 0

    return meet


def damage(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    """
    Make a fault of a damaged file.

    :return: A fault: the run is killed, and its last training state damaged
    """

    def meet(folder: Path, rng: random.Random) -> None:
        process = start(folder)
        while len(find_states(folder)) < 2:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        state = find_states(folder)[0]
        state.write_bytes(change(state.read_bytes(), rng))

    return meet


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def other_version(content: bytes, rng: random.Random) -> bytes:
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, json.dumps({**json.loads(member), "version": 99}) if name == "manifest.json" else member)
    return changed.getvalue()


def fill_disk(folder: Path, rng: random.Random) -> None:
    """Fill the disk: a fault on a file system with room for one state or two."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={rng.randint(150, 400)}k", "tmpfs", str(folder)], check=True)
    try:
        process = start(folder)
        _, errors = process.communicate()
        assert "No space left on device" in errors
        # On a larger disk
        for state in find_states(folder):
            (folder.parent / state.name).write_bytes(state.read_bytes())
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    for state in find_states(folder.parent):
        state.rename(folder / state.name)


FAULTS: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
    "SIGKILL at a random moment": (20, send(signal.SIGKILL)),
    "SIGTERM at a random moment": (3, send(signal.SIGTERM)),
    "Ctrl-C at a random moment": (3, send(signal.SIGINT)),
    "a SubprocVecEnv worker killed": (3, send(signal.SIGKILL, to_worker=True)),
    "an environment raises in step": (3, misbehave("step", 9000)),
    "an environment raises in reset": (3, misbehave("reset", 50)),
    "NaN in an observation": (3, misbehave("nan observation", 9000)),
    "infinity in an observation": (3, misbehave("inf observation", 9000)),
    "NaN in a reward": (3, misbehave("nan reward", 9000)),
    "infinity in a reward": (3, misbehave("inf reward", 9000)),
    "NaN in the actor, so in the actions": (3, misbehave("action_net.weight", 9000)),
    "NaN in the critic, so in its loss": (3, misbehave("value_net.weight", 9000)),
    "the last state truncated": (3, damage(lambda content, rng: content[: rng.randrange(1, len(content))])),
    "a bit of the last state flipped": (3, damage(flip)),
    "the last state empty": (3, damage(lambda content, rng: b"")),
    "the last state a foreign file": (3, damage(lambda content, rng: rng.randbytes(5000))),
    "the last state of another version of the format": (3, damage(other_version)),
    "disk full while saving": (3, fill_disk),
}


def write(rows: list[str]) -> None:
    """Write the table, as far as it goes."""
    packages = ", ".join(" ".join(package) for package in versions().items())
    text = f"""# Faults, and what became of the runs

```
python -m benchmarks.reliability
```

A run of {N_TIMESTEPS:,} steps of Pendulum-v1 (2 environments, `VecNormalize`, the critic), with a training state every
{SAVE_FREQ} steps, meets a fault once and is started again. Survived: it ends with the parameters and statistics of the
undisturbed run, bit for bit.

| fault | times tried | survived | lost |
|---|---|---|---|
{chr(10).join(rows)}

{packages}.
"""
    RESULT.write_text(text)


def main() -> None:
    """Try every fault, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), args.child[1], int(args.child[2]))
        return

    rows = []
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "undisturbed").mkdir()
        expected = finish(Path(root) / "undisturbed")
        assert expected.startswith("finished "), expected
        for name, (n_trials, meet) in FAULTS.items():
            survived = 0
            for trial in range(n_trials):
                folder = Path(root) / name.replace(" ", "_") / str(trial)
                folder.mkdir(parents=True)
                meet(folder, random.Random(f"{name} {trial}"))
                survived += finish(folder) == expected
            rows.append(f"| {name} | {n_trials} | {survived} | {n_trials - survived} |")
            print(rows[-1], flush=True)
            write(rows)


if __name__ == "__main__":
    main()
