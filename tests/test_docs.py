"""Every block of code in the README and on the pages of the documentation runs, with few steps."""

import gc
import re
import shlex
from pathlib import Path

import pytest
from stable_baselines3.common.base_class import BaseAlgorithm
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

from tests.zoo_command import call, succeed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_STEPS = 2000

#: Arguments that take the place of those on the page
FEW = {"train": ("-n", MAX_STEPS), "compare": ("-n", 200, "--seeds", 1), "gradients": ("-n", 64)}


def run_commands(example):
    """Run the lines of a block that start ``sb3-reinforce``, with few steps."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if not line.startswith("sb3-reinforce"):
            continue
        _, command, *arguments = shlex.split(line, comments=True)
        succeed(Path.cwd(), command, *arguments, *FEW.get(command, ()), runner=call)


SYBIL = Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_commands)], encoding="utf-8")


def name(page):
    """Return the path of a page from the top of the repository."""
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
@pytest.mark.filterwarnings("default")
def test_code(page, tmp_path, monkeypatch):
    setup_learn = BaseAlgorithm._setup_learn

    def short_setup_learn(self, total_timesteps, *args, **kwargs):
        return setup_learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)

    monkeypatch.setattr(BaseAlgorithm, "_setup_learn", short_setup_learn)
    monkeypatch.chdir(tmp_path)
    document = SYBIL.parse(page)
    for example in document.examples():
        example.evaluate()
    document.namespace.clear()
    gc.collect()  # Files that a page leaves open are not to be those of another test


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    """Sphinx checks the links of its own pages: those to other files are to exist, too."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
