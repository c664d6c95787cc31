"""What RL Zoo's commands for the Hugging Face Hub need to work with the current libraries of the hub."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_sb3
from huggingface_hub import repocard
from huggingface_hub.errors import RemoteEntryNotFoundError
from requests.exceptions import HTTPError

# The package has a function of the same name
push_to_hub = import_module("huggingface_sb3.push_to_hub")
upstream_load_from_hub = huggingface_sb3.load_from_hub
upstream_metadata_save = repocard.metadata_save


def generate_metadata(*args: Any) -> dict[str, Any]:
    """
    :return: Metadata of a model card. RL Zoo imports the function under the name, and with the type of the result, that
        it had before
    """
    return push_to_hub._generate_metadata(*args).to_dict()


def metadata_save(path: Path, metadata: dict[str, Any]) -> None:
    """
    Add the metadata to a model card. RL Zoo's own commands, which it names, do not know REINFORCE, and what it says to
    those who installed RL Zoo alone would be wrong.

    :param path: The card
    :param metadata: Result of :func:`generate_metadata`
    """
    if metadata["model-index"][0]["name"] == "REINFORCE":
        card = path.read_text(encoding="utf-8")
        card = re.sub(r"If you installed the RL Zoo3 via pip .*?```\n\n", "", card, flags=re.DOTALL)
        card = card.replace("python -m rl_zoo3.", "sb3-reinforce ")
        card = card.replace("pip install rl_zoo3", "pip install -e .  # in a checkout of sb3_reinforce")
        path.write_text(card, encoding="utf-8")
    upstream_metadata_save(path, metadata)


def load_from_hub(repo_id: str, filename: str) -> str:
    """
    :return: Path of a downloaded file
    :raises HTTPError: If there is no such file on the hub: that of ``requests``, which RL Zoo expects
    """
    try:
        return upstream_load_from_hub(repo_id, filename)
    except RemoteEntryNotFoundError as error:  # Not that of a hub that cannot be reached
        raise HTTPError(str(error)) from error


def adapt() -> None:
    """Put these functions in the places where RL Zoo's commands, which are imported later, take them from."""
    for module, function in (
        (push_to_hub, generate_metadata),
        (huggingface_sb3, load_from_hub),
        (repocard, metadata_save),
    ):
        setattr(module, function.__name__, function)
