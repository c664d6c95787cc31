"""
Data-parallel training with PyTorch's ``torchrun``: every process collects episodes of its own, and what one process would have
summed over all of them is summed over the processes.

Without ``torchrun``, and outside a process group, every function gives back what it is given. In a group, all processes have
to call the same functions, in the same order.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.running_mean_std import RunningMeanStd

T = TypeVar("T")

#: What ``torchrun`` tells each process
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def timeout() -> timedelta:
    """
    Read how long a process waits for the others, which can be evaluating.

    :return: ``SB3_REINFORCE_TIMEOUT`` seconds, or 600
    :raises ValueError: If this is not a number
    """
    seconds = os.environ.get("SB3_REINFORCE_TIMEOUT", "600")
    try:
        return timedelta(seconds=float(seconds))
    except ValueError as error:
        raise ValueError(f"SB3_REINFORCE_TIMEOUT={seconds!r} must be a number of seconds") from error


def join() -> None:
    """
    Join the processes that ``torchrun`` has started along with this one, if it has, and if that is not done yet.

    :raises RuntimeError: If they cannot be reached in time
    """
    if not dist.is_available() or any(name not in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        return
    backend = None  # gloo for tensors of the CPU, and nccl for those of a GPU
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % th.cuda.device_count())
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > th.cuda.device_count():
            backend = "cpu:gloo,cuda:gloo"  # nccl wants a GPU for each process
    if dist.is_initialized():
        return
    # Imported later, the defaults of its functions would keep the group, and its threads outlive the interpreter
    import torch.distributed.nn.functional  # noqa: F401

    with waiting_for_others():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, number, total = new_store()
            dist.init_process_group(backend, store=store, rank=number, world_size=total, timeout=timeout())
        else:
            dist.init_process_group(backend, timeout=timeout())
    atexit.register(leave)


def leave() -> None:
    """Leave the other processes, where that is not done yet."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_store() -> "tuple[dist.Store, int, int]":
    """
    Make a store through which the processes find each other. That of ``torchrun`` remembers the addresses of the processes
    from before a restart, and some would connect to them (https://github.com/pytorch/pytorch/issues/135712): this function
    only asks it where process 0 has a new one.

    :return: The store, the rank of this process, and how many there are
    :raises RuntimeError: If there is none in time
    """
    shared, number, total = next(dist.rendezvous("env://", timeout=timeout()))
    host, key = os.environ["MASTER_ADDR"], "sb3_reinforce/port"
    if number == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout())
        shared.set(key, str(store.port))
        return store, number, total
    end = time.monotonic() + timeout().total_seconds()
    while True:
        port = int(shared.get(key))
        try:
            store = dist.TCPStore(host, port, timeout=timedelta(seconds=2))
            break
        except dist.DistError:  # That of a process that is gone
            if time.monotonic() > end:
                raise
    store.set_timeout(timeout())
    return store, number, total


def world_size() -> int:
    """
    Count the processes that train together.

    :return: Number of processes
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """
    Tell which of the processes this one is.

    :return: Number from 0; process 0 is the one that logs, evaluates and saves
    """
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """
    Explain the error of a process that has lost the others.

    :raises RuntimeError: If another process is gone, or does not answer in time
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"Process {os.environ.get('RANK', '?')} has lost the others: one of them has failed (its own error says why), "
            f"hangs, or cannot be reached ({error})"
        ) from error


def all_sum(values: Any) -> np.ndarray:
    """
    Add up numbers over the processes.

    :param values: Numbers, as many in every process
    :return: Their sums over the processes, in double precision
    """
    return _all_reduce(values, "SUM")


def all_max(values: Any) -> np.ndarray:
    """
    Take the maxima of numbers over the processes.

    :param values: Numbers, as many in every process
    :return: Their maxima over the processes, in double precision
    """
    return _all_reduce(values, "MAX")


def _all_reduce(values: Any, operation: str) -> np.ndarray:
    values = np.array(values, dtype=np.float64)
    if world_size() == 1:
        return values
    with waiting_for_others():
        dist.all_reduce(th.from_numpy(values), getattr(dist.ReduceOp, operation))  # In place
    return values


def by_rank(values: Sequence[float]) -> np.ndarray:
    """
    Collect the numbers of all processes.

    :param values: Numbers, as many in every process
    :return: Those of each process, in double precision, shape ``(world_size, n_values)``
    """
    rows = np.zeros((world_size(), len(values)))
    rows[rank()] = values
    return all_sum(rows)


def mean_and_var(values: np.ndarray) -> tuple[float, float]:
    """
    Compute mean and variance of the values of all processes.

    :param values: Values of this process, any number of them
    :return: Mean and variance
    """
    mean = values.mean() if len(values) else 0.0
    deviations = values - mean
    counts, means, squares = by_rank([len(values), float(mean), float(deviations @ deviations)]).T
    total_mean = counts @ means / counts.sum()
    # The variance within the processes, and that between them
    return float(total_mean), float((squares.sum() + counts @ (means - total_mean) ** 2) / counts.sum())


def merge_statistics(rms: RunningMeanStd, before: RunningMeanStd) -> None:
    """
    Let running statistics be those of what all processes have seen.

    :param rms: Statistics of this process, which are changed
    :param before: What they were when they were the same in every process
    """
    if world_size() == 1:
        return

    def sums(of: RunningMeanStd) -> np.ndarray:
        """About the same mean, so that they can be added and subtracted"""
        shift = of.mean - before.mean
        return of.count * np.stack([np.ones_like(shift), shift, of.var + shift**2])

    counts, first, second = all_sum(sums(rms) - sums(before)) + sums(before)
    rms.count = float(counts.flat[0])
    rms.mean = before.mean + first / counts
    rms.var = second / counts - (first / counts) ** 2


def gather(value: T) -> list[T]:
    """
    Collect an object of each process.

    :param value: Something that can be pickled
    :return: That of each process, in the order of their ranks
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with waiting_for_others():
        dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[[], T]) -> T:
    """
    Let process 0 do something, which all processes wait for.

    :param function: What to do; its result can be pickled
    :return: Its result, in every process
    :raises Exception: What the function raises, in every process
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    with waiting_for_others():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def broadcast(tensors: Iterable[th.Tensor]) -> None:
    """
    Give all processes the values of process 0.

    :param tensors: Tensors to change, in place, alike in every process
    """
    if world_size() > 1:
        with waiting_for_others():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def all_sum_tensors(tensors: Sequence[th.Tensor | None], like: Sequence[th.Tensor] | None = None) -> list[th.Tensor | None]:
    """
    Add up tensors over the processes, in one message. ``None`` is zero where another process has a tensor, and stays
    ``None`` where no process has one.

    :param tensors: Tensors, as many in every process
    :param like: Tensors of the same shapes, needed where some are ``None``
    :return: Their sums
    """
    if world_size() == 1:
        return list(tensors)
    shapes = tensors if like is None else like
    filled = [th.zeros_like(shape) if tensor is None else tensor for tensor, shape in zip(tensors, shapes, strict=True)]  # type: ignore[arg-type]
    present = th.tensor([float(tensor is not None) for tensor in tensors], device=filled[0].device)
    packed = th.cat([present, *(tensor.flatten() for tensor in filled)])
    with waiting_for_others():
        dist.all_reduce(packed)
    counts, *parts = packed.split([len(tensors), *(tensor.numel() for tensor in filled)])
    return [
        part.view_as(tensor) if count else None for part, tensor, count in zip(parts, filled, counts.tolist(), strict=True)
    ]


class Counts(NamedTuple):
    """
    How far the rollouts of all processes are.

    :param timesteps: Time steps since the last meeting
    :param steps: Steps in the rollout buffers
    :param episodes: Episodes in the rollout buffers
    :param is_stopped: Whether a callback stops one of the processes
    :param are_all_done: Whether the same step has ended an episode in every environment of every process
    """

    timesteps: int
    steps: int
    episodes: int
    is_stopped: bool
    are_all_done: bool


class SharedRollout:
    """
    Tell the processes what they need of each other's rollouts: when to stop, steps, episodes, running statistics.

    :param statistics: Running statistics of the environments, the same in every process at the start of the rollout
    """

    def __init__(self, statistics: Sequence[RunningMeanStd]):
        self._statistics = statistics
        self._before = [rms.copy() for rms in statistics]
        #: Infos of the episodes of this process
        self.episode_infos: list[dict[str, Any]] = []

    def meet(self, n_timesteps: int, n_steps: int, n_episodes: int, last_step: int, is_stopped: bool) -> Counts:
        """
        Wait for the other processes, at the end of a round of episodes or when a callback stops this one.

        :param n_timesteps: Time steps of this process since the last meeting
        :param n_steps: Steps in its rollout buffer
        :param n_episodes: Episodes in its rollout buffer
        :param last_step: Number of its last step if this has ended an episode in each of its environments, -1 if it has not
        :param is_stopped: Whether a callback stops it
        :return: What all processes are to know
        """
        rows = by_rank([n_timesteps, n_steps, n_episodes, is_stopped, last_step]).astype(int)
        timesteps, steps, episodes, stopped, _ = rows.sum(axis=0).tolist()
        return Counts(timesteps, steps, episodes, stopped > 0, bool((rows[:, 4] == max(last_step, 0)).all()))

    def merge_statistics(self) -> None:
        """Let the running statistics be those of what all processes have seen."""
        for rms, before in zip(self._statistics, self._before, strict=True):
            merge_statistics(rms, before)

    def infos_of_others(self) -> list[dict[str, Any]]:
        """
        Collect the infos of the episodes of the other processes.

        :return: The infos
        """
        return [info for process, infos in enumerate(gather(self.episode_infos)) if process != rank() for info in infos]
