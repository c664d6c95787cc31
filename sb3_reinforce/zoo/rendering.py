"""Pictures and videos on a machine without a display."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Backends of MuJoCo's renderer, in order of preference, and the Debian packages that they need
BACKENDS = {"egl": "libegl1", "osmesa": "libosmesa6"}


def has_display() -> bool:
    """
    Tell whether a window can be opened.

    :return: Whether there is a display
    """
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def choose_mujoco_backend() -> None:
    """Set ``MUJOCO_GL`` to the first backend that works here, if there is no display and the user has not set it."""
    if has_display() or os.environ.get("MUJOCO_GL"):
        return
    for backend in BACKENDS:
        # In a process of its own: MuJoCo chooses once, when it is imported, and a missing library can abort
        command = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if subprocess.run(command, env={**os.environ, "MUJOCO_GL": backend}, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return


def can_render(env_id: str) -> bool:
    """
    Tell whether pictures of an environment can be made here, as far as is known after :func:`choose_mujoco_backend`.

    :param env_id: ID of a registered environment
    :return: Whether they can
    """
    import gymnasium as gym

    is_mujoco = "mujoco" in str(gym.registry[env_id].entry_point)
    return not is_mujoco or has_display() or bool(os.environ.get("MUJOCO_GL"))


def follow_robot(env_id: str, arguments: list[str]) -> list[str]:
    """
    Let the camera follow the robot, if its model has a camera ``track`` and the user has chosen none.

    :param env_id: ID of a registered environment
    :param arguments: Arguments of a command that films
    :return: Its arguments, with the camera
    """
    import gymnasium as gym

    has_chosen = any(argument.startswith(("camera_name:", "camera_id:")) for argument in arguments)
    if has_chosen or "mujoco" not in str(gym.registry[env_id].entry_point):
        return arguments
    import mujoco

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the command itself, which makes the environment again
        env = gym.make(env_id)
    is_there = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0  # type: ignore[attr-defined]
    env.close()
    if not is_there:
        return arguments
    option = "--env-kwargs"
    position = arguments.index(option) + 1 if option in arguments else len(arguments)
    return [*arguments[:position], *([] if option in arguments else [option]), "camera_name:'track'", *arguments[position:]]


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """Let RL Zoo, which calls ``ffmpeg``, find the one that comes with imageio, if there is no other."""
    if shutil.which("ffmpeg") is not None:
        yield
        return
    import imageio_ffmpeg

    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(imageio_ffmpeg.get_ffmpeg_exe(), Path(folder) / "ffmpeg")
        os.environ["PATH"] = f"{before}{os.pathsep}{folder}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


def save_figures() -> None:
    """Save all figures in the working folder as PNG, for a machine on which they cannot be shown."""
    from matplotlib import pyplot as plt

    for number in plt.get_fignums():
        figure = plt.figure(number)
        path = Path(re.sub(r"\W+", "_", str(figure.get_label()) or f"figure_{number}") + ".png")
        figure.savefig(path, bbox_inches="tight")
        print(f"No display: saved {path}")
    plt.close("all")
