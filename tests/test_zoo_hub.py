import io
import json
import pickle
import re
import shlex
import zipfile

import httpx2
import imageio_ffmpeg
import numpy as np
import pytest
import torch as th
import yaml
from huggingface_hub import ModelCard

from sb3_reinforce import REINFORCE
from sb3_reinforce.zoo.cli import describe
from tests import zoo_command
from tests.fake_hub import TOKEN, USER, FakeHub

pytestmark = [pytest.mark.zoo, pytest.mark.slow]

ENV_ID = "InvertedPendulum-v4"
NAME = f"reinforce-{ENV_ID}"
REPO = f"{USER}/{NAME}"
AGENT = ["--algo", "reinforce", "--env", ENV_ID]
TRAIN = ["train", *AGENT, "-f", "logs", "-n", "300", "--eval-freq", "100", "--seed", "0"]
PUSH = ["push_to_hub", *AGENT, "-f", "logs", "-n", "20", "-orga"]
LOAD = ["load_from_hub", *AGENT, "-f", "logs", "-orga"]
#: Where RL Zoo keeps a first agent
AGENT_FOLDER = f"logs/reinforce/{ENV_ID}_1"

#: In a repository besides the agent, which is there twice: as a file, and unpacked
FILES = {
    ".gitattributes",
    "README.md",
    "args.yml",
    "config.yml",
    "env_kwargs.yml",
    "replay.mp4",
    "results.json",
    "train_eval_metrics.zip",
}


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Run a command in a folder of its own. It knows no hub but the fake one, if it is one of the hub's."""
    hub_of_test = dict(
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "huggingface"),
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_XET="1",
        HF_TOKEN=TOKEN,
        NO_PROXY="127.0.0.1",
    )

    def run(command, *arguments, folder="here", **variables):
        (tmp_path / folder).mkdir(exist_ok=True)
        if command in ("push_to_hub", "load_from_hub"):  # The address is read when the hub's package is imported
            return zoo_command.run(tmp_path / folder, command, *arguments, **hub_of_test, **variables)
        return zoo_command.call(tmp_path / folder, command, *arguments)

    return run


def succeeded(outcome):
    status, output, errors = outcome
    assert status == 0, errors
    return output


def assert_refused(outcome, command, reason):
    """Nothing but one line on the error stream."""
    status, _, errors = outcome
    assert status == 1
    assert re.fullmatch(f"sb3-reinforce {command}: error: .*{reason}.*\n", errors), errors


def assert_same_policy(path, other):
    first, second = (REINFORCE.load(path).get_parameters()["policy"] for path in (path, other))
    assert first.keys() == second.keys() != set()
    assert all(th.equal(first[name], second[name]) for name in first)


def card_commands(card):
    """The lines of the code blocks of a card that are commands, as lists."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if re.match("(python|pip|sb3-reinforce) ", line)]


def check_card(card, results):
    assert "rl_zoo3" not in card.content
    assert card.data.library_name == "stable-baselines3"
    assert {ENV_ID, "reinforcement-learning", "stable-baselines3"} <= set(card.data.tags)
    assert card.data.model_name == "REINFORCE"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == (ENV_ID, "mean_reward")
    assert result.metric_value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    assert "## Hyperparameters" in card.text and "('policy', 'MlpPolicy')" in card.text


def check_video(path):
    # The first picture is that of the reset
    assert imageio_ffmpeg.count_frames_and_secs(path)[0] == 1 + 20
    frames = imageio_ffmpeg.read_frames(path)
    next(frames)  # What is known about the video
    assert np.frombuffer(next(frames), np.uint8).std() > 10
    frames.close()


def test_round_trip(hub, run, tmp_path):
    succeeded(run(*TRAIN))
    assert_refused(run(*PUSH, "somebody-else"), "push_to_hub", "403 Forbidden")
    assert hub.commits == {}

    succeeded(run(*PUSH, USER))
    _, commit = hub.commits[REPO]
    with zipfile.ZipFile(io.BytesIO(commit[f"{NAME}.zip"])) as archive:
        members = {f"{NAME}/{member}" for member in archive.namelist()}
    assert commit.keys() == FILES | members | {f"{NAME}.zip"}
    results = json.loads(commit["results.json"])
    assert results["n_eval_episodes"] == 10 and results["mean_reward"] > 1
    card = ModelCard(commit["README.md"].decode())
    check_card(card, results)
    (tmp_path / "replay.mp4").write_bytes(commit["replay.mp4"])
    check_video(tmp_path / "replay.mp4")
    assert yaml.safe_load(commit["env_kwargs.yml"]) == {"render_mode": "rgb_array"}

    # Elsewhere, with the commands of the card
    install, load, enjoy, train, push = card_commands(card)
    assert install[:2] == ["pip", "install"]
    assert [words[:2] for words in (train, push)] == [["sb3-reinforce", "train"], ["sb3-reinforce", "push_to_hub"]]
    assert "No normalization file" in succeeded(run(*load[1:], folder="there", TRUST_REMOTE_CODE="True"))
    here, there = tmp_path / "here" / AGENT_FOLDER, tmp_path / "there" / AGENT_FOLDER
    assert_same_policy(here / f"{ENV_ID}.zip", there / f"{ENV_ID}.zip")
    for path in ("evaluations.npz", "0.monitor.csv", f"{ENV_ID}/args.yml", f"{ENV_ID}/config.yml"):
        assert (there / path).read_bytes() == (here / path).read_bytes()
    assert "Mean reward: " in succeeded(run(*enjoy[1:], folder="there"))


def test_normalization_travels(hub, run, tmp_path):
    succeeded(run(*TRAIN, "-params", "normalize:True"))
    succeeded(run(*PUSH, USER, "--no-render"))
    _, commit = hub.commits[REPO]
    assert {path for path in commit if "/" not in path} == FILES - {"replay.mp4"} | {f"{NAME}.zip", "vec_normalize.pkl"}

    assert "No normalization file" not in succeeded(run(*LOAD, USER, folder="there", TRUST_REMOTE_CODE="True"))
    here, there = tmp_path / "here" / AGENT_FOLDER, tmp_path / "there" / AGENT_FOLDER
    assert_same_policy(here / f"{ENV_ID}.zip", there / f"{ENV_ID}.zip")
    # Where enjoy looks for it
    first, second = (pickle.loads((folder / ENV_ID / "vecnormalize.pkl").read_bytes()).obs_rms for folder in (here, there))
    assert first.count == second.count > 300
    np.testing.assert_array_equal([first.mean, first.var], [second.mean, second.var])


def test_refused_download(run, tmp_path):
    assert_refused(run(*LOAD, USER, TRUST_REMOTE_CODE="True"), "load_from_hub", f"Repository Not Found for url: .*{REPO}")
    assert not (tmp_path / "here" / "logs").exists()


def test_unreachable_hub():
    """``push_to_hub`` ends with the error of the library for HTTP, which does not say who cannot be reached."""
    error = httpx2.ConnectError("[Errno -2] Name or service not known")
    assert describe(error) == "the Hugging Face Hub cannot be reached: [Errno -2] Name or service not known"
