"""The commands of ``sb3-reinforce``, as they are started from a shell on a machine without a display."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch as th
import yaml

import sb3_reinforce
from sb3_reinforce import REINFORCE
from sb3_reinforce.zoo.hyperparams import FOLDER, read_hyperparams
from sb3_reinforce.zoo.rendering import follow_robot
from tests.zoo_command import ENVIRON, FORKSERVER, call, files, monitored, policy, succeed

ENV_ID = "InvertedPendulum-v4"
AGENT = ("--algo", "reinforce", "--env", ENV_ID)
TRAIN = ("train", *AGENT, "--eval-freq", "-1")
RUN = f"reinforce/{ENV_ID}_1"
BUDGET = ("-n", "200", "--eval-freq", "100", "--eval-episodes", "5")
COMMANDS = [
    "train",
    "enjoy",
    "plot_train",
    "all_plots",
    "plot_from_file",
    "record_video",
    "record_training",
    "benchmark",
    "push_to_hub",
    "load_from_hub",
    "compare",
    "gradients",
]
pytestmark = pytest.mark.zoo


def call_and_succeed(folder, *arguments, **variables):
    """:return: What the command has printed"""
    return succeed(folder, *arguments, runner=call, **variables)


def frames(path):
    """:return: The frames of a video"""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    process = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(process.stdout, np.uint8).reshape(-1, 480, 480, 3)


def shows_cart_and_pole(frame):
    red, green, blue = np.moveaxis(frame.astype(int), -1, 0)
    cart = (red > blue + 50) & (green > blue + 50)
    pole = (green > red + 30) & (blue > red + 30)
    return cart.sum() > 2000 and pole.sum() > 2000


def saved_figures(output):
    """:return: Names of the pictures that were saved instead of shown"""
    return re.findall(r"^No display: saved (.+)$", output, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, the second of which continues the first, but cannot change its policy; and what they have printed."""
    folder = tmp_path_factory.mktemp("runs")
    train, short = ("train", *AGENT, *BUDGET), ("-params", "n_episodes:2")
    first = call_and_succeed(folder, *train, "--seed", "3", "--save-freq", "100", "-P", "-tb", "tb", *short, "target_kl:1e-3")
    agent = f"logs/{RUN}/{ENV_ID}.zip"
    fixed = (*short, "target_kl:0.0", "value_learning_rate:0.0")
    second = call_and_succeed(folder, *train, "--seed", "5", "--trained-agent", agent, *fixed)
    return folder, first, second


# === The program ===


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help(tmp_path, arguments):
    output = succeed(tmp_path, *arguments)
    assert re.findall(r"^  (\w+) +\w.*$", output, flags=re.MULTILINE) == COMMANDS


@pytest.mark.parametrize(
    "command, options",
    [
        ("train", ["--resume", "{dummy,subproc,envpool}", "--sampler"]),
        ("record_video", ["--gym-packages", "--load-best"]),
        ("all_plots", ["--print-n-trials"]),
    ],
)
def test_help_of_a_command(tmp_path, command, options):
    """Our options, and RL Zoo's."""
    output = call_and_succeed(tmp_path, command, "--help")
    assert [option for option in options if option not in output] == []


def test_version(tmp_path):
    assert succeed(tmp_path, "--version") == f"{sb3_reinforce.__version__}\n"


def test_unknown_command(tmp_path):
    status, _, errors = call(tmp_path, "tarin")
    assert status == 2
    assert re.fullmatch(r"sb3-reinforce: error: .*'tarin'.*'train'.*\n", errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("offer", ["method", "info"])
def test_all_commands_go_by_action_masks(tmp_path, offer):
    """The environment fails at an invalid action."""
    (tmp_path / "masked.py").write_text(
        f"import gymnasium as gym\ngym.register('Masked-v0', 'tests.envs:MaskEnv', kwargs=dict(offer='{offer}'))"
    )
    agent = ("--algo", "reinforce", "--env", "Masked-v0", "--gym-packages", "masked", "-f", "logs")
    options = ("-n", "60", "--eval-freq", "20", "--eval-episodes", "5", "--seed", "0")
    call_and_succeed(tmp_path, "train", *agent, *options, "-params", "n_episodes:3", "policy:'MlpLstmPolicy'")
    for option in ("--deterministic", "--stochastic"):
        output = call_and_succeed(tmp_path, "enjoy", *agent, "-n", "50", "--no-render", option)
        assert "Mean reward" in output
    call_and_succeed(tmp_path, "record_video", *agent, "-n", "20", "-o", "videos")
    (path,) = (tmp_path / "videos").glob("*.mp4")
    assert len(frames(path)) == 1 + 20
    compare = ("--env", "Masked-v0", "--algos", "reinforce", "--seeds", "1", "--gym-packages", "masked", "--out", "comparison")
    call_and_succeed(tmp_path, "compare", *compare, *options[:-2], PYTHONPATH=str(Path(__file__).parents[1]))


MY_ENVS = """
import gymnasium as gym

gym.register("Mine-v0", "gymnasium.envs.mujoco.inverted_pendulum_v4:InvertedPendulumEnv", max_episode_steps=100)
"""


@pytest.mark.slow
def test_console_script_and_gym_packages(tmp_path):
    """Commands find modules in the working folder, also those commands that RL Zoo lets import none."""
    (tmp_path / "my_envs.py").write_text(MY_ENVS)
    script = shutil.which("sb3-reinforce", path=Path(sys.executable).parent)
    assert script is not None
    agent = ("--algo", "reinforce", "--env", "Mine-v0", "--gym-packages", "my_envs", "-f", "logs")
    command = [script, "train", *agent, "-n", "40", "--eval-freq", "-1", "-params", "n_episodes:2"]
    subprocess.run(command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True, check=True)
    call_and_succeed(tmp_path, "enjoy", *agent, "-n", "10", "--no-render")

    # With the ffmpeg that is on the path: for a caption, and to join the parts
    (tmp_path / "programs").mkdir()
    ffmpeg = tmp_path / "programs" / "ffmpeg"
    ffmpeg.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    ffmpeg.chmod(0o755)
    call_and_succeed(tmp_path, "record_training", *agent, "-n", "5", PATH=str(ffmpeg.parent))
    assert (tmp_path / "calls").read_text() == "called\n" * 2
    assert len(frames(tmp_path / "logs/reinforce/Mine-v0_1/videos/training.mp4")) == 1 + 5


# === train ===


def test_train(runs):
    folder, output, _ = runs
    assert f"Loading hyperparameters from: {FOLDER / 'reinforce.yml'}\n" in output
    # The progress bar
    assert re.search(r"100% .* \d+/200 ", output)
    run_folder = folder / "logs" / RUN
    checkpoints = {f"rl_model_{n}_steps.zip" for n in (100, 200)}
    settings = {f"{ENV_ID}/{name}" for name in ("config.yml", "args.yml", "command.txt")}
    expected = {"0.monitor.csv", "best_model.zip", "evaluations.npz", f"{ENV_ID}.zip"} | checkpoints | settings | {".lock"}
    # The last rollout goes beyond the budget
    assert {
        name for name in files(run_folder) if not re.fullmatch(r"rl_model_[3-9]00_steps.zip|training_\d+_steps.state", name)
    } == expected

    config = dict(yaml.unsafe_load((run_folder / ENV_ID / "config.yml").read_text()))
    assert config == read_hyperparams("reinforce")[ENV_ID] | {"n_episodes": 2, "target_kl": 1e-3}
    arguments = yaml.unsafe_load((run_folder / ENV_ID / "args.yml").read_text())
    assert (arguments["algo"], arguments["env"], arguments["seed"]) == ("reinforce", ENV_ID, 3)
    assert f" -m sb3_reinforce train {' '.join((*AGENT, *BUDGET))} " in (run_folder / ENV_ID / "command.txt").read_text()

    model = REINFORCE.load(run_folder / f"{ENV_ID}.zip")
    assert 200 <= model.num_timesteps == sum(monitored(run_folder / "0.monitor.csv")[1])
    assert REINFORCE.load(run_folder / "rl_model_100_steps.zip").num_timesteps == 100
    evaluations = np.load(run_folder / "evaluations.npz")
    assert list(evaluations["timesteps"][:2]) == [100, 200]
    assert evaluations["results"].shape[1] == 5
    best = evaluations["timesteps"][evaluations["results"].mean(axis=1).argmax()]
    assert REINFORCE.load(run_folder / "best_model.zip").num_timesteps == best

    (events,) = (folder / "tb" / ENV_ID / "REINFORCE_1").iterdir()
    assert b"rollout/ep_rew_mean" in events.read_bytes()


def test_continue(runs):
    """The parameters are those of the agent that was loaded: with another seed, and steps of length zero."""
    folder, _, output = runs
    assert "Loading pretrained agent\n" in output
    first, second = (folder / f"logs/reinforce/{ENV_ID}_{n}/{ENV_ID}.zip" for n in (1, 2))
    assert REINFORCE.load(second)._n_updates > REINFORCE.load(first)._n_updates
    parameters = policy(second)
    assert all(th.equal(tensor, parameters[name]) for name, tensor in policy(first).items())
    # The seed is not the same
    assert monitored(first.parent / "0.monitor.csv") != monitored(second.parent / "0.monitor.csv")


PROCESSES = """
from multiprocessing import current_process
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym


class Processes(gym.Wrapper):
    def __init__(self, env):
        super().__init__(env)
        Path(f"{current_process().name}.process").touch()
"""


def schedules(agent):
    """:return: Values of the schedules of a saved model at the begin, in the middle, and at the end"""
    from stable_baselines3.common.utils import FloatSchedule

    model = REINFORCE.load(agent)
    names = ("learning_rate", "target_kl", "value_learning_rate", "ent_coef")
    return {name: [FloatSchedule(getattr(model, name))(progress) for progress in (1, 0.5, 0)] for name in names}


@pytest.mark.slow
def test_hyperparams_and_subprocesses(tmp_path):
    (tmp_path / "processes.py").write_text(PROCESSES)
    hyperparams = ["n_envs:2", "n_episodes:3", "baseline:timestep", "group_size:3", "policy_kwargs:dict(net_arch=[8])"]
    hyperparams += ["learning_rate:'lin_0.02'", "target_kl:lin_0.1", "value_learning_rate:lin_1e-3", "ent_coef:lin_0.2"]
    hyperparams += ["env_wrapper:processes.Processes", "policy:'sb3_reinforce.MlpPolicy'"]
    options = ["--vec-env", "subproc", "--uuid", "--seed", "1", "--log-interval", "2", "--device", "cpu", "--num-threads", "1"]
    output = succeed(tmp_path, *TRAIN, "-n", "80", "--verbose", "2", *options, "-params", *hyperparams)
    assert "Setting torch.num_threads to 1\n" in output
    assert "Using cpu device\n" in output
    assert set(re.findall(r"\| +iterations +\| (\d+)", output)) >= {"2"}
    assert not re.search(r"\| +iterations +\| 1 ", output)
    # The processes of the environments do not run the command again
    assert output.count("Log path: ") == 1
    processes = {path.stem for path in tmp_path.glob("*.process")}
    assert len(processes - {"MainProcess"}) == len(processes) == 2
    (folder,) = (tmp_path / "logs" / "reinforce").iterdir()
    assert re.fullmatch(rf"{ENV_ID}_1_[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}", folder.name)
    assert {"0.monitor.csv", "1.monitor.csv"} < files(folder)

    agent = folder / f"{ENV_ID}.zip"
    with ProcessPoolExecutor(1, FORKSERVER) as pool:  # The model needs RL Zoo's classes, and RL Zoo changes Gymnasium
        found = pool.submit(schedules, agent).result()
    assert found == {
        "learning_rate": [0.02, 0.01, 0.0],
        "target_kl": pytest.approx([0.1, 0.0505, 0.001]),
        "value_learning_rate": [1e-3, 5e-4, 0.0],
        "ent_coef": [0.2, 0.1, 0.0],
    }
    constant = dict.fromkeys(("learning_rate", "lr_schedule", "target_kl", "value_learning_rate", "ent_coef"), 0.1)
    model = REINFORCE.load(agent, custom_objects=constant)
    assert (model.n_envs, model.group_size, model.baseline) == (2, 3, "timestep")
    assert model.policy.mlp_extractor.latent_dim_pi == 8


def test_conf_file_and_seed(tmp_path):
    """The same settings from three kinds of files, and the same seed: the same episodes, of normalized observations."""
    hyperparams = {ENV_ID: {"n_timesteps": 40.0, "policy": "MlpPolicy", "n_episodes": 2, "normalize": True}}
    (tmp_path / "settings.yml").write_text(yaml.dump(hyperparams))
    (tmp_path / "settings.py").write_text(f"hyperparams = {hyperparams}")
    episodes = []
    for i, config in enumerate(("settings.yml", "settings.py", "settings"), start=1):
        output = call_and_succeed(tmp_path, *TRAIN, "--conf-file", config, "--seed", "3", "--save-freq", "20")
        assert f"Loading hyperparameters from: {config}\n" in output
        folder = tmp_path / f"logs/reinforce/{ENV_ID}_{i}"
        assert f"{ENV_ID}/vecnormalize.pkl" in files(folder)
        model = REINFORCE.load(folder / f"{ENV_ID}.zip")
        assert (model.n_episodes, model._total_timesteps) == (2, 40)
        episodes.append(monitored(folder / "0.monitor.csv"))
    assert episodes[0] == episodes[1] == episodes[2]

    output = call_and_succeed(tmp_path, "enjoy", *AGENT, "-f", "logs", "--load-last-checkpoint", "--no-render", "-n", "100")
    last = model.num_timesteps // 20 * 20
    assert "Loading latest experiment, id=3\n" in output
    assert f"Loading logs/reinforce/{ENV_ID}_3/rl_model_{last}_steps.zip\n" in output
    assert "Loading running average\n" in output
    assert "No display" not in output


def test_env_kwargs(tmp_path):
    """The noise at the start of an episode: too much to train, none to evaluate."""
    agent = ("--algo", "reinforce", "--env", "InvertedPendulum-v5")
    env_kwargs = ["--env-kwargs", "reset_noise_scale:100.0", "--eval-env-kwargs", "reset_noise_scale:0.0"]
    budget = ["-n", "20", "--eval-freq", "20", "--eval-episodes", "3", "--n-eval-envs", "2"]
    call_and_succeed(tmp_path, "train", *agent, *budget, "--seed", "1", *env_kwargs, "-params", "n_episodes:8")
    folder = tmp_path / "logs" / "reinforce" / "InvertedPendulum-v5_1"
    assert set(monitored(folder / "0.monitor.csv")[1]) == {1}
    (lengths,) = np.load(folder / "evaluations.npz")["ep_lengths"]
    assert len(lengths) == 3
    assert len(set(lengths)) == 1 < lengths[0]

    # Without noise, the episodes of one policy differ only if its actions are sampled
    enjoy = ("enjoy", *agent, "-f", "logs", "-n", "200", "--no-render", "--env-kwargs", "reset_noise_scale:0.0")
    output = call_and_succeed(tmp_path, *enjoy, "--deterministic", "-P")
    assert re.search(r"^Mean reward: \d+\.\d\d \+/- 0\.00$", output, flags=re.MULTILINE)
    call_and_succeed(tmp_path, *enjoy, "--stochastic", "--n-envs", "2", "--reward-log", "rewards")
    assert files(tmp_path / "rewards") == {"0.monitor.csv", "1.monitor.csv"}
    lengths = [length for i in range(2) for length in monitored(tmp_path / "rewards" / f"{i}.monitor.csv")[1]]
    assert 1 not in lengths
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("algo, env_id", [("ppo", ENV_ID), ("ppo", "CartPole-v1"), ("a2c", "Hopper-v5")])
def test_other_algorithms(tmp_path, algo, env_id):
    """Settings that RL Zoo has for an earlier version of an environment come with this package."""
    output = call_and_succeed(tmp_path, "train", "--algo", algo, "--env", env_id, "-n", "40", "--eval-freq", "-1")
    (path,) = re.findall(r"^Loading hyperparameters from: (.*)$", output, flags=re.MULTILINE)
    ours = read_hyperparams(algo).get(env_id)
    note = f"{env_id} has no entry of its own in RL Zoo: its tuned settings for an earlier version are used\n"
    assert (note in output) == (ours is not None) == (env_id != "CartPole-v1")
    assert Path(path) == FOLDER / f"{algo}.yml" if ours else path.endswith(f"rl_zoo3/hyperparams/{algo}.yml")
    folder = tmp_path / "logs" / algo / f"{env_id}_1"
    assert f"{env_id}.zip" in files(folder)
    used = yaml.unsafe_load((folder / env_id / "config.yml").read_text())
    assert used == ours if ours else used["clip_range"] == "lin_0.2"


@pytest.mark.slow
def test_command_of_rl_zoo(tmp_path):
    (tmp_path / "custom_envs.py").write_text("from sb3_reinforce.zoo import register\nregister()\n")
    arguments = (*AGENT, "--eval-freq", "-1", "-n", "40", "-conf", "sb3_reinforce.zoo.hyperparams")
    output = succeed(tmp_path, *arguments, program=("-m", "rl_zoo3.train"))
    assert "Loading hyperparameters from: sb3_reinforce.zoo.hyperparams\n" in output
    assert REINFORCE.load(tmp_path / "logs" / RUN / f"{ENV_ID}.zip").num_timesteps >= 40


@pytest.mark.slow
def test_track(tmp_path):
    options = ("--track", "--wandb-project-name", "pendulums", "--wandb-group", "swinging", "-tags", "tagged")
    succeed(tmp_path, *TRAIN, "-n", "40", "--seed", "7", *options, WANDB_MODE="offline")  # Written when Python exits
    (tracked,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = tracked.read_bytes()
    for text in ("pendulums", "swinging", "tagged", f"{ENV_ID}__reinforce__7__", "rollout/ep_rew_mean"):
        assert text.encode() in content, text
    assert len(list(tmp_path.glob(f"runs/{ENV_ID}__reinforce__7__*/{ENV_ID}/REINFORCE_1/events.*"))) == 1


# === Trained agents ===


@pytest.mark.parametrize(
    "env_id, arguments, expected",
    [
        ("HalfCheetah-v4", [], ["--env-kwargs", "camera_name:'track'"]),
        ("HalfCheetah-v4", ["--env-kwargs", "width:64"], ["--env-kwargs", "camera_name:'track'", "width:64"]),
        ("HalfCheetah-v4", ["--env-kwargs", "camera_id:0"], ["--env-kwargs", "camera_id:0"]),
        ("Reacher-v5", ["-n", "5"], ["-n", "5"]),  # No such camera
        ("CartPole-v1", [], []),
    ],
)
@pytest.mark.filterwarnings("ignore:.*MUJOCO_LOG")
def test_camera_follows(env_id, arguments, expected):
    assert follow_robot(env_id, arguments) == expected


@pytest.mark.parametrize("env_id, score", [("InvertedPendulum-v4", 950), ("Swimmer-v4", 340), ("HalfCheetah-v4", 4000)])
def test_enjoy_trained_agents(env_id, score, tmp_path):
    """Those of the package, found in any folder."""
    root = Path(sb3_reinforce.__file__).parents[1]
    output = call_and_succeed(tmp_path, "enjoy", "--algo", "reinforce", "--env", env_id, "--no-render", "-n", "1000")
    assert float(re.search(r"Mean reward: (\S+)", output)[1]) > score
    (agent,) = (root / "rl-trained-agents" / "reinforce").glob(f"{env_id}_*/{env_id}.zip")
    assert agent.stat().st_size < 200_000


@pytest.mark.parametrize(
    "options, name", [(["--load-best"], "best_model"), (["--load-checkpoint", "100"], "rl_model_100_steps")]
)
def test_enjoy_without_display(runs, tmp_path, options, name):
    logs = runs[0] / "logs"
    output = call_and_succeed(tmp_path, "enjoy", *AGENT, "-f", logs, "--exp-id", "1", "-n", "200", *options)
    assert output.startswith("No display: the environment is not rendered.")
    assert f"Loading {logs}/{RUN}/{name}.zip\n" in output
    rewards = [float(reward) for reward in re.findall(r"^Episode Reward: (.*)$", output, flags=re.MULTILINE)]
    assert f"Mean reward: {np.mean(rewards):.2f} +/- {np.std(rewards):.2f}\n" in output


def test_record_video(runs, tmp_path):
    logs = runs[0] / "logs"
    arguments = ("-f", logs, "--exp-id", "1", "-n", "30", "-o", "videos", "--load-checkpoint", "100")
    output = call_and_succeed(tmp_path, "record_video", *AGENT, *arguments)
    assert f"Loading {logs}/{RUN}/rl_model_100_steps.zip\n" in output
    (path,) = (tmp_path / "videos").glob("*.mp4")
    assert path.name.startswith(f"checkpoint-100-reinforce-{ENV_ID}")
    pictures = frames(path)
    assert len(pictures) == 1 + 30
    assert shows_cart_and_pole(pictures[15])


@pytest.mark.parametrize("command", ["record_video", "record_training", "push_to_hub"])
def test_without_a_library_to_render(tmp_path, command):
    (tmp_path / "mujoco.py").write_text("raise ImportError('there is no libEGL')")
    (tmp_path / "logs" / RUN).mkdir(parents=True)
    (tmp_path / "logs" / RUN / f"{ENV_ID}.zip").touch()
    organization = ["-orga", "somebody"] if command == "push_to_hub" else []
    status, _, errors = call(tmp_path, command, *AGENT, "-f", "logs", *organization)
    assert status == 1
    assert errors.count("\n") == 1 and errors.startswith(f"sb3-reinforce {command}: error: pictures of {ENV_ID} need")
    assert "libegl1 or libosmesa6" in errors


@pytest.mark.slow
def test_record_training(runs, tmp_path):
    """Of the end and of a checkpoint, with a caption each, without an ffmpeg on the path."""
    source, copy = runs[0] / "logs" / RUN, tmp_path / "logs" / RUN
    shutil.copytree(source / ENV_ID, copy / ENV_ID)
    for name in (f"{ENV_ID}.zip", "rl_model_100_steps.zip"):
        shutil.copy(source / name, copy)
    arguments = (*AGENT, "-f", "logs", "-n", "20", "--gif")
    output = call_and_succeed(tmp_path, "record_training", *arguments, PATH="/nowhere")
    videos = copy / "videos"
    assert f"Saving video to {videos / 'training.mp4'}\n" in output
    names = {f"{model}-reinforce-{ENV_ID}-step-0-to-step-20.mp4" for model in ("final-model", "checkpoint-100")}
    assert {path.name for path in videos.iterdir()} == names | {"training.mp4", "training.gif"}
    assert len(frames(videos / "training.mp4")) == pytest.approx(2 * (1 + 20), abs=2)
    for name in ("training.mp4", "training.gif"):
        first, *_, last = frames(videos / name)
        captions = first[:50], last[:50]
        assert all(caption.max() > 200 for caption in captions)
        assert np.abs(captions[0].astype(int) - captions[1]).max() > 100
        assert all(shows_cart_and_pole(frame) for frame in (first, last))


@pytest.mark.slow
def test_benchmark(runs, tmp_path):
    options = ("--no-hub", "--log-dir", runs[0] / "logs", "-n", "200", "--benchmark-dir", "results")
    output = call_and_succeed(tmp_path, "benchmark", *options)
    (reward,) = re.findall(r"^Mean reward: (.*) \+- .*$", output, flags=re.MULTILINE)
    (row,) = re.findall(r"^\|reinforce *\|(.*)\|$", (tmp_path / "benchmark.md").read_text(), flags=re.MULTILINE)
    env_id, mean_reward, *_ = (cell.strip() for cell in row.split("|"))
    assert env_id == ENV_ID
    assert float(mean_reward) == pytest.approx(float(reward), abs=0.006)
    assert files(tmp_path) == {"benchmark.md", "results/benchmark.md", f"results/reinforce-{ENV_ID}/0.monitor.csv"}


# === Plots ===


def test_plot_train(runs, tmp_path):
    arguments = ("-a", "reinforce", "-e", ENV_ID, "-f", runs[0] / "logs", "-w", "2", "-x", "episodes")
    assert saved_figures(call_and_succeed(tmp_path, "plot_train", *arguments)) == ["Training_Episodic_Reward.png"]
    assert files(tmp_path) == {"Training_Episodic_Reward.png"}


def test_all_plots_and_plot_from_file(runs, tmp_path):
    for i in (1, 2):
        folder = f"logs/reinforce/{ENV_ID}_{i}"
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(runs[0] / folder / "evaluations.npz", tmp_path / folder)
    arguments = ("-a", "reinforce", "-e", ENV_ID, "-f", "logs", "-l", "here", "--no-million")
    output = call_and_succeed(tmp_path, "all_plots", *arguments, "--print-n-trials", "-o", "results")
    assert f"{ENV_ID}-REINFORCE-here: 2\n" in output
    last = [np.load(path)["results"][1].mean() for path in tmp_path.glob("logs/reinforce/*/evaluations.npz")]
    (score,) = re.findall(rf"^\|{ENV_ID}\|(\d+) \+/- \d+ *\|$", output, flags=re.MULTILINE)
    assert int(score) == pytest.approx(np.mean(last), abs=0.51)
    results = "Results_InvertedPendulum_v4.png"
    assert saved_figures(output) == [results]

    arguments = ("-i", "results", "--rliable", "--boxplot", "-o", "scores.out", "--format", "png")
    figures = saved_figures(call_and_succeed(tmp_path, "plot_from_file", *arguments))
    known = {results, "Sensitivity_plot.png", "Sensitivity_box_plot.png"}
    assert known < set(figures)
    assert len(figures) == len(known) + 2  # Those of rliable
    assert set(figures) | {"scores.out"} <= files(tmp_path)


def test_plots_without_their_packages(tmp_path):
    (tmp_path / "seaborn.py").write_text("raise ModuleNotFoundError('No module named seaborn', name='seaborn')")
    status, _, errors = call(tmp_path, "plot_train", "-a", "reinforce", "-e", ENV_ID, "-f", "logs")
    assert status == 1
    assert errors == (
        'sb3-reinforce plot_train: error: plot_train needs the package seaborn: pip install "sb3-reinforce[compare]"\n'
    )


# === What cannot be ===

STUDY = ("--storage", "sqlite:///studies.db", "--study-name", "swinging")

BAD_TRAIN = [
    ((*AGENT[:3], "InvertedPendulm-v4"), 1, ["InvertedPendulm-v4", "InvertedPendulum-v"]),
    ((*AGENT[:3], "InvertedPendulum-v2"), 1, ["v2"]),
    (AGENT[:3], 2, ["--env", "expected one argument"]),
    (("--algo", "reinfroce"), 2, ["'reinfroce'", "'reinforce'"]),
    ((*AGENT, "--sede", "3"), 2, ["--sede"]),
    ((*AGENT, "--vec-env", "pool"), 2, ["'pool'", "'envpool'"]),
    ((*AGENT, "--gym-packages", "my_envs"), 2, ["no module 'my_envs'"]),
    ((*AGENT, "--conf-file", "gama.yml"), 1, ["'gama'", "'gamma'"]),
    ((*AGENT, "--conf-file", "other.yml"), 1, ["other.yml has neither an entry for", "nor a 'default'"]),
    ((*AGENT, "-params", "returns:'foo'"), 1, ["returns='foo'", "'reward_to_go'"]),
    ((*AGENT, "-params", "returns:foo"), 1, ["returns='foo'", "'reward_to_go'"]),
    ((*AGENT, "-params", "returns"), 2, ["'returns' must be KEY:VALUE"]),
    ((*AGENT, "-params", "policy_kwargs:dict(net_arch=[8]"), 2, ["policy_kwargs: 'dict(net_arch=[8]'", "never closed"]),
    ((*AGENT, "-params", "policy_kwargs:dict(activation_fn=ReLU)"), 2, ["policy_kwargs", "'ReLU' is not defined"]),
    ((*AGENT, "-params", "policy_kwargs:dict(net_arc=[8])"), 1, ["'net_arc'", "'net_arch'"]),
    ((*AGENT, "-params", "ent_coef:lin_x"), 1, ["ent_coef='lin_x'", "'lin_'"]),
    ((*AGENT, "-params", "learning_rate:linear"), 1, ["learning_rate='linear'", "'lin_'"]),
    ((*AGENT, "-params", "target_kl:lin_x"), 1, ["target_kl='lin_x'", "'lin_'"]),
    ((*AGENT, "-i", "missing.zip"), 1, ["path to a .zip file"]),
    ((*AGENT, "--trial-id", "0"), 1, ["--trial-id 0", "--storage"]),
    ((*AGENT, "--trial-id", "3", *STUDY), 1, ["3", "'swinging'", "'sqlite:///studies.db'"]),
    ((*AGENT, "--conf-file", "missing.yml"), 1, ["missing.yml", "No such file"]),
    ((*AGENT, "--conf-file", "missing.py"), 1, ["missing.py", "No such file"]),
    ((*AGENT, "--conf-file", "missing.module"), 1, ["missing.module", "No module named 'missing'"]),
]
PLOT = ("-a", "reinforce", "-e", ENV_ID, "-f", "missing")
BAD_AGENT = [
    (("enjoy", *AGENT[:3], "CartPole-v1"), 1, ["no model of reinforce for CartPole-v1", "rl-trained-agents"]),
    (("enjoy", *AGENT[:3], "Parity-v0"), 1, ["--env Parity-v0 is not registered"]),
    # Registered by RL Zoo
    (("enjoy", *AGENT[:3], "CartPoleNoVel-v1"), 1, ["no model of reinforce for CartPoleNoVel-v1"]),
    (("enjoy", "--env", "CartPole-v1"), 1, ["no model of ppo for CartPole-v1", "TRUST_REMOTE_CODE=True"]),
    (("enjoy", *AGENT, "-f", "empty"), 1, ["no model of reinforce", "empty"]),
    (("enjoy", *AGENT, "-f", "runs"), 1, [ENV_ID, "--folder runs"]),
    (("record_video", *AGENT, "-f", "empty"), 1, ["no model of reinforce", "empty"]),
    (("record_training", *AGENT, "-f", "runs"), 1, ["reinforce", ENV_ID, "runs"]),
    (("benchmark", "--no-hub", "--log-dir", "missing"), 1, ["missing"]),
    (("benchmark", "--no-hub", "--log-dir", "empty"), 1, ["empty"]),
    (("plot_train", *PLOT), 1, ["missing"]),
    (("all_plots", *PLOT), 1, ["--exp-folders", "missing"]),
    (("all_plots",), 2, ["--algos"]),
    (("plot_from_file", "-i", "missing"), 1, ["missing.pkl"]),
    (("load_from_hub", *AGENT, "-f", "runs"), 1, ["TRUST_REMOTE_CODE"]),
]
BAD_INPUT = [(("train", *arguments), status, words) for arguments, status, words in BAD_TRAIN] + BAD_AGENT


@pytest.mark.parametrize("arguments, status, words", BAD_INPUT, ids=[" ".join(arguments) for arguments, *_ in BAD_INPUT])
def test_bad_input(tmp_path, arguments, status, words):
    """One line on the error stream says what is wrong with what; RL Zoo's parsers print their arguments before it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / RUN).mkdir(parents=True)
    (tmp_path / "gama.yml").write_text(yaml.dump({ENV_ID: {"n_timesteps": 40, "policy": "MlpPolicy", "gama": 0.9}}))
    (tmp_path / "other.yml").write_text(yaml.dump({"Other-v0": {"n_timesteps": 40, "policy": "MlpPolicy"}}))
    actual, _, errors = call(tmp_path, *arguments)
    *usage, line = errors.splitlines()
    assert not usage or usage[0].startswith(f"usage: sb3-reinforce {arguments[0]}"), errors
    assert line.startswith(f"sb3-reinforce {arguments[0]}: error: "), errors
    assert [word for word in words if word not in line] == []
    assert actual == status
    # No traces of a run
    assert arguments[-1] == "InvertedPendulum-v2" or arguments[0] == "benchmark" or not (tmp_path / "logs").exists()
