"""
Every block of Python and of Bash in the README and on the pages of the documentation runs, with few steps. Commands that need
an address, a cluster or a display are marked as text.
"""

import gc
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from stable_baselines3.common.base_class import BaseAlgorithm
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

from tests.zoo_command import call, succeed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
MAX_STEPS = 2000

#: Arguments that take the place of those on the page
FEW = {"train": ("-n", MAX_STEPS), "compare": ("-n", 200, "--seeds", 1), "gradients": ("-n", 64)}


#: Files of one's own that commands name: the first block in its language on the page
OWN_FILES = {"python": "reach.py", "yaml": "mine.yml"}

#: Commands of blocks that are not run: they install, or do not end
NOT_RUN = {"export", "pip", "tensorboard"}


def run_commands(example):
    """Run the commands of a block, with few steps; those of ``torchrun`` in one process. Programs and targets are to exist."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not word.startswith("OMP_NUM_THREADS=")]
        if not words:
            continue
        name = Path(words[0]).name
        if name == "torchrun" and "sb3_reinforce" in words:
            name, words = "sb3-reinforce", words[words.index("sb3_reinforce") :]
        if name == "sb3-reinforce":
            _, command, *arguments = words
            few = () if "--report" in arguments else FEW.get(command, ())
            succeed(Path.cwd(), command, *arguments, *few, runner=call)
        elif name == "make":
            assert f"\n{words[1]}:" in MAKEFILE, line
        elif name == "python":
            assert words[1] == "-m" and find_spec(words[2]), line
        elif name == "torchrun":
            assert words[-1] == "script.py", line  # The block of Python before
        else:
            assert name in NOT_RUN, line


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
    for language, file in OWN_FILES.items():
        block = re.search(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
        Path(file).write_text(block[1] if block else "")
    document = SYBIL.parse(page)
    for example in document.examples():
        example.evaluate()
    document.namespace.clear()
    gc.collect()  # Files that a page leaves open are not to be those of another test


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    """Sphinx checks the links of its own pages: those to other files are to exist, too."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)#?([^)]*)", text):
        assert (page.parent / target).exists(), target
        if anchor and target.endswith(".md"):
            headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
