import multiprocessing
import os

import pytest

# Before PyTorch is imported, also by the processes that tests start: the number of threads changes the rounding
os.environ["OMP_NUM_THREADS"] = "1"

pytest.register_assert_rewrite("tests.helpers", "tests.parallel_runs")

from tests.helpers import sample_with_pytorch  # noqa: E402

#: Test files that must hold for both ways of sampling actions
BOTH_SAMPLERS = {"test_callbacks", "test_deterministic"}

# SubprocVecEnv forks its processes from a server: with the imports made once there, a process starts in milliseconds
multiprocessing.set_forkserver_preload(["tests.parallel_runs", "torch._dynamo"])


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.split(".")[-1] in BOTH_SAMPLERS:
        metafunc.fixturenames.append("sampler")
        metafunc.parametrize("sampler", ["numpy", "pytorch"], indirect=True)


@pytest.fixture
def sampler(request, monkeypatch):
    """Sample the actions of all models with NumPy where the policy allows it, or always with PyTorch."""
    if request.param == "pytorch":
        sample_with_pytorch(monkeypatch)
