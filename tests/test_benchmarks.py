import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.plots import running_mean
from sb3_reinforce import REINFORCE


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 4.0]), window=2), [1.5, 4.0, 5.0])
    assert len(running_mean(np.ones(3), window=4)) == 0


def test_train(tmp_path):
    """What `make train` runs, with a tiny budget."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "-n", "500", "-f", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    folder = tmp_path / "InvertedPendulum-v4_1"
    assert "Mean return over 20 deterministic episodes: " in run.stdout
    for path in (folder / "InvertedPendulum-v4.zip", folder / "learning_curve.png"):
        assert str(path) in run.stdout and path.stat().st_size > 0
    assert len(list(folder.glob("REINFORCE_1/events.out.tfevents.*"))) == 1
    assert REINFORCE.load(folder / "InvertedPendulum-v4.zip").num_timesteps >= 500
