"""
Measure memory and open files of a long run with callbacks, TensorBoard, checkpoints and training states, and of many models
that are made, trained a little and dropped, in one process each.

    python -m benchmarks.endurance
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_reinforce import REINFORCE
from sb3_reinforce.checks import versions
from sb3_reinforce.resume import TrainingStateCallback

ENV = "InvertedPendulum-v4"
N_TIMESTEPS = 2_000_000
N_MODELS = 200
RESULT = Path(__file__).parent / "results" / "endurance.md"


def usage() -> tuple[float, int]:
    """
    Measure this process.

    :return: Megabytes of memory of this process, and its number of open files
    """
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 2**10, len(os.listdir("/proc/self/fd"))


class Watch(BaseCallback):
    """Notes the usage after a tenth of the run, and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, int]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        done = self.num_timesteps / N_TIMESTEPS
        if (not self.found and done >= 0.1) or (len(self.found) == 1 and done >= 1):
            self.found.append(usage())


def long_run(folder: Path) -> list[tuple[float, int]]:
    env = make_vec_env(ENV, 8, seed=100, monitor_dir=str(folder))
    watch = Watch()
    callbacks = [
        EvalCallback(make_vec_env(ENV, seed=200), eval_freq=25_000, log_path=str(folder), verbose=0),
        CheckpointCallback(12_500, str(folder / "checkpoints")),
        TrainingStateCallback(100_000, folder / "states"),
        watch,
    ]
    REINFORCE("MlpPolicy", env, seed=100, tensorboard_log=str(folder), device="cpu").learn(N_TIMESTEPS, callback=callbacks)
    return watch.found


def many_models(folder: Path) -> list[tuple[float, int]]:
    found = []
    for number in range(1, N_MODELS + 1):
        env = make_vec_env(ENV, 2, seed=number)
        model = REINFORCE("MlpPolicy", env, seed=number, n_episodes=4, tensorboard_log=str(folder), device="cpu")
        model.learn(200, callback=TrainingStateCallback(50, folder / str(number)))
        model.logger.close()
        env.close()
        del model, env
        if number in (N_MODELS // 10, N_MODELS):
            found.append(usage())
    return found


KINDS = {f"{N_TIMESTEPS:,} steps": long_run, f"{N_MODELS} models": many_models}


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        th.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(KINDS[args.kind](Path(folder))))
        return
    rows = []
    for kind in KINDS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.endurance", "--kind", kind]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (early, early_files), (late, late_files) = json.loads(output.splitlines()[-1])
        rows.append(
            f"| {kind} | {early:.1f} | {late:.1f} | {100 * (late / early - 1):+.1f} % | {early_files} | {late_files} |"
        )
        print(rows[-1], flush=True)
    packages = ", ".join(" ".join(package) for package in versions().items())
    RESULT.write_text(f"""# Memory and open files

```
python -m benchmarks.endurance
```

{ENV}: one run with 8 environments, `EvalCallback`, `CheckpointCallback`, `TrainingStateCallback`, TensorBoard, monitor files;
and models made, trained for 200 steps with TensorBoard and training states, and dropped, one after the other.

| | MB after 10 % | MB at the end | change | open files after 10 % | at the end |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{packages}.
""")


if __name__ == "__main__":
    main()
