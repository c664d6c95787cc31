"""REINFORCE in RL Zoo: the same commands, with ``reinforce`` among the algorithms."""


def register() -> None:
    """
    Put ``reinforce`` into RL Zoo's tables: the algorithms, the samplers of hyperparameters, and their converters.

    ``sb3-reinforce`` calls this function itself. For RL Zoo's own command, ``python -m rl_zoo3.train``, call it in a module
    ``custom_envs.py`` in the working folder, which RL Zoo imports.
    """
    # RL Zoo changes Gymnasium's time limit when it is imported: only for those who ask for it
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    from sb3_reinforce.reinforce import REINFORCE
    from sb3_reinforce.zoo.hyperparams_opt import convert_reinforce_params, sample_reinforce_params

    ALGOS["reinforce"] = REINFORCE
    HYPERPARAMS_SAMPLER["reinforce"] = sample_reinforce_params
    HYPERPARAMS_CONVERTER["reinforce"] = convert_reinforce_params
