"""Helpers for SB3's callbacks."""

from collections.abc import Iterator

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback


class TimestepsBarCallback(ProgressBarCallback):
    """SB3's progress bar, which counts the time steps of all processes, and none of environments that are not stepped."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._start = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self._start - self.pbar.n)
        return True

    def _on_training_end(self) -> None:
        self._on_step()  # The steps of the other processes in the last rollout
        super()._on_training_end()


def all_callbacks(callback: BaseCallback, seen: list[BaseCallback] | None = None) -> Iterator[BaseCallback]:
    """
    Iterate over a callback and those that it refers to, each of them once.

    :param callback: A callback
    :param seen: Callbacks that have been visited, to which this adds
    :return: The callbacks that have a state. Those that SB3 puts around others, or that show the progress, need not be the
        same in a resumed run
    """
    seen = [] if seen is None else seen
    if any(callback is other for other in seen):
        return
    seen.append(callback)
    if not isinstance(callback, CallbackList | ConvertCallback | ProgressBarCallback):
        yield callback
    for value in callback.callbacks if isinstance(callback, CallbackList) else list(vars(callback).values()):
        if isinstance(value, BaseCallback) and value is not callback.parent:
            yield from all_callbacks(value, seen)
