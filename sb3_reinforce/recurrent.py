"""
Policies with memory: an LSTM or a GRU between the features and the layers of SB3's policies.

A batch is whole episodes that start from a reset. Hidden states are zero there, are never stored, and are never those of an
older policy: backpropagation through time is exact.
"""

from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import Schedule
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_reinforce.batch import EpisodeRolloutBufferSamples
from sb3_reinforce.masks import mask_distribution
from sb3_reinforce.policies import ReinforceCnnPolicy, ReinforceMultiInputPolicy, ReinforcePolicy

#: Hidden states and cells of a network, shape ``(n_layers, n_envs, hidden_size)``. A GRU uses the first one only
States = tuple[th.Tensor, ...]

#: Longest time constant of the initial memory, in steps
TIME_SCALE = 100.0

#: Arguments of PyTorch's LSTM and GRU that leave the shapes as sb3_contrib's policy expects them
RNN_ARGUMENTS = {"bias", "dropout"}


def pack(features: th.Tensor, episode_starts: th.Tensor) -> tuple[PackedSequence, th.Tensor]:
    """
    Arrange the steps of whole episodes by time, so that PyTorch's recurrent layers take all of them in one call.

    :param features: Features of the steps, episode by episode, shape ``(n_steps, n_features)``
    :param episode_starts: Whether a step is the first of its episode, shape ``(n_steps,)``
    :return: The features by time, without padding, and where each step is among them
    """
    starts = np.flatnonzero(episode_starts.cpu().numpy())
    lengths = np.diff(starts, append=len(features))
    time = np.arange(len(features)) - np.repeat(starts, lengths)
    # At each time, the longest episode comes first, as PyTorch wants it
    rank = np.argsort(np.argsort(-lengths, kind="stable"), kind="stable")
    order = np.lexsort((np.repeat(rank, lengths), time))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    by_time = features[th.as_tensor(order, device=features.device)]
    return PackedSequence(by_time, th.as_tensor(np.bincount(time))), th.as_tensor(places, device=features.device)


def init_memory(network: nn.RNNBase) -> None:
    """
    Initialize a recurrent network so that the past reaches far into an episode: orthogonal weights, as in the other layers of
    SB3's policies, and units that forget with time constants of 1 to :data:`TIME_SCALE` steps (Tallec & Ollivier,
    Can recurrent neural networks warp time?, https://arxiv.org/abs/1804.11188, section 3; the input gates stay half open).
    With PyTorch's initialization, every unit forgets half of what it holds in each step.

    :param network: An LSTM or a GRU
    """
    size = network.hidden_size
    for name, parameter in network.named_parameters():
        if "weight" in name:
            for gate in parameter.data.split(size):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if "bias_ih" in name:  # The forget gate of an LSTM, the update gate of a GRU
                parameter.data[size : 2 * size] = th.log(1 + th.rand(size) * (TIME_SCALE - 1))


class ReinforceLstmPolicy(ReinforcePolicy, RecurrentActorCriticPolicy):
    """
    A :class:`~sb3_reinforce.policies.ReinforcePolicy` with memory: sb3_contrib's ``RecurrentActorCriticPolicy``, whose
    arguments and ``predict(obs, state, episode_start, deterministic)`` it has.

    :param args: Arguments of ``ActorCriticPolicy``
    :param rnn_class: ``torch.nn.LSTM`` or ``torch.nn.GRU``
    :param kwargs: Arguments of :class:`~sb3_reinforce.policies.ReinforcePolicy`, and of sb3_contrib's policy:
        ``lstm_hidden_size`` (default: 64), ``n_lstm_layers`` (1), ``shared_lstm`` (whether the critic uses the memory of the
        actor), ``enable_critic_lstm`` (whether it has its own, default: unless it is shared), ``lstm_kwargs`` (``bias``,
        ``dropout``)
    :raises ValueError: If the arguments do not go together
    """

    def __init__(
        self,
        *args: Any,
        rnn_class: type[nn.RNNBase] = nn.LSTM,
        lstm_hidden_size: int = 64,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool | None = None,
        lstm_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if rnn_class not in (nn.LSTM, nn.GRU):
            raise ValueError(f"rnn_class={rnn_class!r} must be torch.nn.LSTM or torch.nn.GRU")
        if not (lstm_kwargs or {}).keys() <= RNN_ARGUMENTS:
            raise ValueError(f"lstm_kwargs={lstm_kwargs!r} can have {', '.join(sorted(RNN_ARGUMENTS))}")
        if enable_critic_lstm is None:
            enable_critic_lstm = not shared_lstm
        if shared_lstm and (enable_critic_lstm or not kwargs.get("share_features_extractor", True)):
            raise ValueError("shared_lstm=True needs enable_critic_lstm=False and share_features_extractor=True")
        self.rnn_class = rnn_class
        super().__init__(
            *args,
            lstm_hidden_size=lstm_hidden_size,
            n_lstm_layers=n_lstm_layers,
            shared_lstm=shared_lstm,
            enable_critic_lstm=enable_critic_lstm,
            lstm_kwargs=lstm_kwargs,
            **kwargs,
        )
        if rnn_class is not nn.LSTM:  # sb3_contrib makes LSTMs
            sizes = self.features_dim, lstm_hidden_size, n_lstm_layers
            self.lstm_actor = rnn_class(*sizes, **self.lstm_kwargs)  # type: ignore[assignment]
            if enable_critic_lstm:
                self.lstm_critic = rnn_class(*sizes, **self.lstm_kwargs)  # type: ignore[assignment]
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer = self.optimizer_class(self.parameters(), lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
        if self.ortho_init:
            for network in (self.lstm_actor, self.lstm_critic):
                if network is not None:
                    init_memory(network)

    def _build(self, lr_schedule: Schedule) -> None:
        self.features_dim = int(self.features_dim)  # NumPy's for MultiDiscrete observations, which PyTorch's LSTM refuses
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        n_lstm_layers, _, lstm_hidden_size = self.lstm_hidden_state_shape
        return {
            **super()._get_constructor_parameters(),
            "rnn_class": self.rnn_class,
            "lstm_hidden_size": lstm_hidden_size,
            "n_lstm_layers": n_lstm_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }

    @staticmethod
    def _process_sequence(  # type: ignore[override]
        features: th.Tensor, lstm_states: States | None, episode_starts: th.Tensor, lstm: nn.RNNBase
    ) -> tuple[th.Tensor, States | None]:
        """
        Pass steps through a recurrent network.

        :param features: Features of one step of each environment, or of whole episodes
        :param lstm_states: States before the step; ``None`` for whole episodes, which start from zero
        :param episode_starts: Whether a step is the first of its episode
        :param lstm: The network
        :return: Its output for each step, and its states after it
        """
        if lstm_states is None:
            if len(features) == 0:  # Another process can have all episodes of a minibatch
                return features.new_zeros(0, lstm.hidden_size), None
            packed, places = pack(features, episode_starts)
            # cuDNN has no second derivatives, which the natural gradient needs
            with th.backends.cudnn.flags(enabled=not th.is_grad_enabled()):
                output, _ = lstm(packed)
            return output.data[places], None
        hidden, cell = (state * (1 - episode_starts.float())[None, :, None] for state in lstm_states)
        if isinstance(lstm, nn.LSTM):
            output, states = lstm(features[None], (hidden, cell))
            return output[0], states
        output, hidden = lstm(features[None], hidden)
        return output[0], (hidden, cell)

    def distribution(self, batch: EpisodeRolloutBufferSamples) -> Distribution:
        """
        Compute the distribution of the actions.

        :param batch: Whole episodes
        :return: The distribution of each step
        """
        return self._distribution(batch, None)[0]

    def values(self, batch: EpisodeRolloutBufferSamples) -> th.Tensor:
        """
        Compute the output of the critic.

        :param batch: Whole episodes
        :return: Values, shape ``(n_steps,)``
        """
        assert batch.episode_starts is not None
        return self.predict_values(batch.observations, None, batch.episode_starts).flatten()  # type: ignore[arg-type]

    def step(self, batch: EpisodeRolloutBufferSamples, states: States | None) -> tuple[Distribution, States]:
        """
        Compute the distribution of the next action in each environment.

        :param batch: One step of each environment
        :param states: Hidden states before it, ``None`` at the start
        :return: The distribution, and the hidden states after it
        """
        if states is None:
            assert batch.episode_starts is not None
            n_layers, _, size = self.lstm_hidden_state_shape
            states = (th.zeros(n_layers, len(batch.episode_starts), size, device=self.device),) * 2
        return self._distribution(batch, states)

    def _distribution(self, batch: EpisodeRolloutBufferSamples, states: States | None) -> tuple[Distribution, Any]:
        assert batch.episode_starts is not None
        distribution, states = self.get_distribution(batch.observations, states, batch.episode_starts)  # type: ignore[arg-type]
        return mask_distribution(distribution, batch.action_masks), states


class ReinforceCnnLstmPolicy(ReinforceCnnPolicy, ReinforceLstmPolicy):
    """A :class:`ReinforceLstmPolicy` for images."""


class ReinforceMultiInputLstmPolicy(ReinforceMultiInputPolicy, ReinforceLstmPolicy):
    """A :class:`ReinforceLstmPolicy` for dict observations."""


MlpLstmPolicy = ReinforceLstmPolicy
CnnLstmPolicy = ReinforceCnnLstmPolicy
MultiInputLstmPolicy = ReinforceMultiInputLstmPolicy
