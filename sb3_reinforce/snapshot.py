"""Parameters and their optimizer as they were. Knows no SB3 algorithm, no logger and no environment."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch as th
from torch import nn


def _copy_state(state: dict[str, Any]) -> dict[str, Any]:
    # deepcopy takes ten times as long for tensors
    return {key: value.clone() if isinstance(value, th.Tensor) else deepcopy(value) for key, value in state.items()}


class Snapshot:
    """
    A copy of parameters and of what their optimizer remembers.

    :param parameters: Parameters
    :param optimizer: Optimizer of these parameters, and perhaps of others
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: th.optim.Optimizer):
        self._parameters = parameters
        self._optimizer = optimizer
        #: Copies of the parameters
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._state = {parameter: _copy_state(state) for parameter, state in optimizer.state.items()}

    def set_parameters(self, values: Sequence[th.Tensor]) -> None:
        """
        Change the parameters, without the optimizer.

        :param values: Value of each parameter
        """
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data.copy_(value)

    def restore(self) -> None:
        """Go back to parameters and optimizer as they were."""
        self._optimizer.zero_grad()
        self.set_parameters(self.values)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
