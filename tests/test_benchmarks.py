import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plots import running_mean
from sb3_reinforce import REINFORCE
from sb3_reinforce.compare.archive import read_archive
from sb3_reinforce.compare.files import make_jobs, read_json
from sb3_reinforce.compare.report import report
from sb3_reinforce.compare.results import read_runs

ROOT = Path(__file__).parent.parent

#: Bytes that the files of a checkout may have together
MAX_SIZE = 12_000_000


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 4.0]), window=2), [1.5, 4.0, 5.0])
    assert len(running_mean(np.ones(3), window=4)) == 0


@pytest.mark.slow
def test_train(tmp_path):
    """What `make train` runs, with a tiny budget."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "-n", "500", "-f", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    folder = tmp_path / "InvertedPendulum-v4_1"
    assert "Mean return over 20 deterministic episodes: " in run.stdout
    for path in (folder / "InvertedPendulum-v4.zip", folder / "learning_curve.png"):
        assert str(path) in run.stdout and path.stat().st_size > 0
    assert len(list(folder.glob("REINFORCE_1/events.out.tfevents.*"))) == 1
    assert REINFORCE.load(folder / "InvertedPendulum-v4.zip").num_timesteps >= 500


def test_checkout_is_small():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run([git, "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert sum(sizes.values()) < MAX_SIZE, sorted(sizes.items(), key=lambda item: item[1])[-5:]
    assert not [name for name in sizes if "/runs/" in name]


def test_kept_episodes_are_those_of_the_kept_reports():
    archives = sorted(ROOT.glob("benchmarks/*/episodes.csv.xz"))
    assert len(archives) >= 7
    for out in (path.parent for path in archives):
        comparison = read_json(out / "comparison.json")
        jobs = make_jobs(out, comparison)
        runs = read_runs(out, comparison, jobs, read_archive(out))
        assert runs.to_csv(index=False, float_format="%.7g") == (out / "runs.csv").read_text()
        found = read_json(out / "results.json")["statistics"]
        assert report(comparison, runs, found, comparison["versions"]) == (out / "report.md").read_text()
