import subprocess
import sys
from pathlib import Path

import pytest

import sb3_reinforce

PACKAGE = Path(sb3_reinforce.__file__).parent


@pytest.mark.parametrize(
    "statement, heavy",
    [
        ("from sb3_reinforce import REINFORCE", ["rl_zoo3", "optuna", "matplotlib", "pandas", "scipy.signal"]),
        ("import sb3_reinforce.zoo.cli", ["torch", "gymnasium", "numpy", "yaml"]),
    ],
)
def test_import_is_light(statement, heavy):
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_of_the_package():
    assert sb3_reinforce.REINFORCE.__module__ == "sb3_reinforce.reinforce"
    assert {getattr(sb3_reinforce, name).__name__ for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")} == {
        "ReinforcePolicy",
        "ReinforceCnnPolicy",
        "ReinforceMultiInputPolicy",
    }
    with pytest.raises(AttributeError, match="has no attribute 'PPO'"):
        sb3_reinforce.__getattr__("PPO")
