import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_reinforce

PACKAGE = Path(sb3_reinforce.__file__).parent

# A module may only import from those with a lower rank; a new module needs one
RANKS = {"returns": 0, "baselines": 1, "buffers": 2, "policies": 2, "rollout": 3, "reinforce": 4, "__init__": 5}


def imported_modules(source):
    """The modules of the package that a source imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [PACKAGE.name if node.level else "", node.module]))
            # What is imported can be a module itself
            names += [f"{origin}.{alias.name}" for alias in node.names]
    modules = set()
    for name in names:
        package, _, rest = name.partition(".")
        if package == PACKAGE.name:
            module = rest.split(".")[0]
            modules.add(module if module in RANKS or "." in rest else "__init__")
    return modules


def backward_imports(module, source):
    return {name for name in imported_modules(source) if name not in RANKS or RANKS[name] >= RANKS[module]}


def test_every_module_has_a_rank():
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")} == set(RANKS)


@pytest.mark.parametrize("module", RANKS)
def test_no_import_runs_backwards(module):
    assert backward_imports(module, (PACKAGE / f"{module}.py").read_text()) == set()


@pytest.mark.parametrize(
    "source, found",
    [
        ("import numpy", set()),
        ("from sb3_reinforce.returns import RETURNS", set()),
        ("from sb3_reinforce import returns", set()),
        ("from sb3_reinforce.reinforce import REINFORCE", {"reinforce"}),
        ("from sb3_reinforce import reinforce", {"reinforce"}),
        ("from sb3_reinforce import REINFORCE", {"__init__"}),
        ("import sb3_reinforce", {"__init__"}),
        ("import sb3_reinforce.rollout as rollout", {"rollout"}),
        ("from .reinforce import REINFORCE", {"reinforce"}),
        ("from . import buffers, policies, returns", {"buffers", "policies"}),
        ("def f():\n    from sb3_reinforce.reinforce import REINFORCE", {"reinforce"}),
        ("from sb3_reinforce.unknown import x", {"unknown"}),
    ],
)
def test_backward_imports_are_found(source, found):
    assert backward_imports("buffers", source) == found


def test_import_is_light():
    heavy = ["rl_zoo3", "optuna", "matplotlib", "pandas", "scipy.signal"]
    code = f"import sys, sb3_reinforce; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
