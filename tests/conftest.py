import pytest

#: Test files that are to hold for both ways of sampling actions
BOTH_ACTORS = {"test_callbacks", "test_deterministic", "test_unbiased"}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.split(".")[-1] in BOTH_ACTORS:
        metafunc.fixturenames.append("actor")
        metafunc.parametrize("actor", ["numpy", "pytorch"], indirect=True)


@pytest.fixture
def actor(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr("sb3_reinforce.rollout.is_plain", lambda policy: False)
