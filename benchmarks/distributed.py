"""
Measure how training spreads over processes: environment steps per second, what an update sends, how far a model of it
reaches, and what becomes of a run when a machine is replaced.

    python -m benchmarks.distributed

Every process collects 8 episodes per update, whatever their number, so that an update of P processes has P times the episodes.
"""

import argparse
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env

from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions
from sb3_reinforce.parallel import processes
from sb3_reinforce.resume.archive import find_states

ENV_ID = "HalfCheetah-v4"
N_EPISODES = 8
N_UPDATES = 4
N_REPETITIONS = 5
N_PROCESSES = (1, 2, 4)
RESULT = Path(__file__).parent / "results" / "distributed.md"

LAUNCHER = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
AGENTS_ENV_ID = "InvertedPendulum-v4"

#: Bytes per second of the network that the model is asked about
BANDWIDTH = 125e6


class Meter:
    """Notes what the functions of ``torch.distributed`` send, and how long it takes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.seconds: list[float] = []

    def attach(self, name: str, size: Callable[..., int]) -> None:
        """
        Watch a function.

        :param name: Name of the function to watch
        :param size: Bytes that its arguments are
        """
        function = getattr(dist, name)

        def watched(*args: Any) -> None:
            start = time.perf_counter()
            function(*args)
            self.seconds.append(time.perf_counter() - start)
            self.sizes.append(size(*args))

        setattr(dist, name, watched)


def child(out: str) -> None:
    """Train, and write down what it took."""
    th.set_num_threads(1)
    processes.join()
    env = make_vec_env(ENV_ID, seed=1000 * processes.rank())
    n_episodes = N_EPISODES * processes.world_size()
    model = REINFORCE("MlpPolicy", env, n_episodes=n_episodes, seed=0, device="cpu").learn(1)
    meter = Meter()
    meter.attach("all_reduce", lambda tensor, *_: tensor.numel() * tensor.element_size())
    meter.attach("all_gather_object", lambda values, value: len(pickle.dumps(value)) * len(values))
    start, before = time.perf_counter(), model.num_timesteps
    model.learn(N_UPDATES * n_episodes * 1000, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    waits, sizes = meter.seconds.copy(), meter.sizes.copy()  # Without what is sent from here on
    # Whoever comes last does not wait for anybody
    transfers = np.min(processes.gather(waits), axis=0)
    if processes.rank() == 0:
        figures = {
            "steps_per_second": (model.num_timesteps - before) / seconds,
            "seconds_per_update": seconds / N_UPDATES,
            "messages": len(sizes) / N_UPDATES,
            "bytes": sum(sizes) / N_UPDATES,
            "transfer_seconds": float(np.sum(transfers)) / N_UPDATES,
        }
        Path(out).write_text(json.dumps(figures))


def measure(n_processes: int) -> dict[str, float]:
    """
    Train with several processes, and measure it.

    :param n_processes: Number of processes, on this machine
    :return: Figures of :func:`child`
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        command = [*LAUNCHER, "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(n_processes)]
        subprocess.run([*command, "-m", "benchmarks.distributed", "--child", str(out)], check=True)
        return json.loads(out.read_text())


def start_agent(folder: str, port: int) -> subprocess.Popen:
    """
    Start one of two agents of ``torchrun``, with one process, that train :data:`AGENTS_ENV_ID`.

    :param folder: Where to run
    :param port: Where the agents of ``torchrun`` meet, on the loopback address
    :return: The process of the agent
    """
    command = [*LAUNCHER, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "benchmark"]
    arguments = ["--algo", "reinforce", "--env", AGENTS_ENV_ID, "--seed", "7", "--save-freq", "5000", "--resume", "auto"]
    return subprocess.Popen(
        [*command, "-m", "sb3_reinforce", "train", *arguments],
        cwd=folder,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # PyTorch tells at length that a connection is gone
    )


def replace_agent() -> dict[str, float]:
    """
    Train with two agents, kill one with its process, and start another in its place.

    :return: At which time step it was killed, where training ended, and the score of the last evaluation
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        first = start_agent(folder, port)
        time.sleep(5)  # It is to be the one where they meet
        second = start_agent(folder, port)
        run = Path(folder, "logs", "reinforce", f"{AGENTS_ENV_ID}_1")
        while not find_states(run):
            time.sleep(0.1)
        time.sleep(2)
        killed_at = find_states(run)[0].name.split("_")[1]
        workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for pid in (second.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        second.wait()
        third = start_agent(folder, port)
        assert first.wait(300) == 0 == third.wait(300)
        evaluations = np.load(run / "evaluations.npz")
        ended_at = find_states(run)[0].name.split("_")[1]
        return {"killed_at": int(killed_at), "ended_at": int(ended_at), "score": float(evaluations["results"][-1].mean())}


def transfer_seconds(messages: float, size: float, n_processes: int, latency: float, bandwidth: float) -> float:
    """
    Predict the time that messages take: gloo sums along a ring, in ``2 (P - 1)`` steps per message, each of which takes the
    latency and sends one ``P``-th.

    :param messages: Messages per update
    :param size: Bytes per update
    :param n_processes: Number of processes ``P``
    :param latency: Seconds from one process to the next
    :param bandwidth: Bytes per second from one process to the next
    :return: Seconds per update
    """
    steps = 2 * (n_processes - 1)
    return steps * (messages * latency + size / n_processes / bandwidth)


def report(runs: list[dict[int, dict[str, float]]], replaced: dict[str, float]) -> str:
    """
    Write the report.

    :param runs: Figures by the number of processes, of each repetition
    :param replaced: Result of :func:`replace_agent`
    :return: The text
    """
    figures = {n: {key: float(np.median([run[n][key] for run in runs])) for key in runs[0][n]} for n in N_PROCESSES}
    ratios = {n: [run[n]["steps_per_second"] / run[1]["steps_per_second"] for run in runs] for n in N_PROCESSES}
    one, two = figures[1], figures[2]
    # On one machine there is hardly more than the time that a message takes
    latency = two["transfer_seconds"] / (2 * two["messages"])
    measured = "\n".join(
        f"| {n} | {each['steps_per_second']:,.0f} | "
        f"{np.median(ratios[n]):.2f} ({min(ratios[n]):.2f} to {max(ratios[n]):.2f}) | "
        f"{each['messages']:.0f} | {each['bytes']:,.0f} | {1e3 * each['transfer_seconds']:.2f} | "
        f"{1e3 * transfer_seconds(each['messages'], 0, n, latency, BANDWIDTH):.2f} |"
        for n, each in figures.items()
    )
    work = one["seconds_per_update"]
    rows = []
    for milliseconds in (1, 10):
        for n in (2, 8, 64, 1000):
            seconds = transfer_seconds(two["messages"], two["bytes"], n, milliseconds / 1e3, BANDWIDTH)
            share = work / (work + seconds)
            episodes = 9 * seconds / work * N_EPISODES
            percent = f"{share:.0%}" if share >= 0.01 else "< 1%"
            rows.append(f"| {milliseconds} ms | {n} | {seconds:.2f} | {percent} | {n * share:.1f} | {episodes:,.0f} |")
    packages = ", ".join(" ".join(package) for package in versions().items())
    return f"""# Data-parallel training

```
python -m benchmarks.distributed
```

{ENV_ID}, default settings, {N_EPISODES} episodes (of 1000 steps) per update and process, {N_UPDATES} updates after one that is
not counted, seed 0, one PyTorch thread per process, all on one machine with {os.cpu_count()} cores; medians of
{len(runs)} repetitions, in turns, and the range of the ratios. *Transfer* is the time of the messages of an update for whoever
comes last to each; *model* is what that of two processes lets one expect.

| processes | steps/s | times one process | messages per update | bytes per update | transfer, ms | model, ms |
|---|---|---|---|---|---|---|
{measured}

Four processes share two cores, so that a message also waits for a core.

## Where it stops

gloo sums along a ring: 2 (P - 1) steps per message, each of which takes the latency of the network and sends one P-th of it.
With {two["messages"]:.0f} messages and {two["bytes"]:,.0f} bytes per update, 1 Gbit/s, and {work:.2f} s of work per update in
each process ({N_EPISODES} episodes):

| latency | processes | transfer, s per update | of its time a process works | speed-up | episodes per process for 90 % |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The messages are small, their number times the latency is what counts: more episodes per update and process are the remedy.
With the critic, each of its minibatches is one more message: `value_batch_size` should grow with the number of processes.

## A machine that is replaced

Two agents of `torchrun` on the loopback address, with one process each, train {AGENTS_ENV_ID} (`--seed 7 --save-freq 5000
--resume auto`, `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`). One is killed with its process (SIGKILL) after the training state of
step {replaced["killed_at"]:,}, and started again: training goes on, to its end (last training state: step
{replaced["ended_at"]:,}). The last evaluation, of 5 episodes, scores {replaced["score"]:.0f}.

{packages}.
"""


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    runs = [{n: measure(n) for n in N_PROCESSES} for _ in range(N_REPETITIONS)]
    RESULT.write_text(report(runs, replace_agent()))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
