"""What signals do to a run whose training state is saved."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_reinforce.resume import TrainingStateCallback


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """
    Let processes that are started meanwhile ignore Ctrl-C, which reaches all processes of a terminal.

    The processes of environments are needed to complete an update, and end with the one that has started them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopping_at_an_update(callbacks: Sequence[BaseCallback]) -> Iterator[list[int]]:
    """
    Let SIGTERM and Ctrl-C stop training when the running update is complete and its training state saved.

    The second signal has its usual effect, as the first one has if no callback saves training states.

    :param callbacks: Callbacks of the training
    :return: The signals that have been received
    """
    received: list[int] = []
    savers = [callback for callback in callbacks if isinstance(callback, TrainingStateCallback)]
    if not savers:
        yield received
        return

    def stop(number: int, frame: Any) -> None:
        print("Stopping when this update is complete", flush=True)
        received.append(number)
        for saver in savers:
            saver.is_to_stop = True
        restore_handlers()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield received
    finally:
        restore_handlers()
