import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_reinforce

PACKAGE = Path(sb3_reinforce.__file__).parent

# A module may only import from those with a lower rank; a new module needs one
RANKS = {
    "checks": 0,
    "distributed": 0,
    "returns": 0,
    "baselines": 1,
    "checkpoint": 1,
    "buffers": 2,
    "policies": 2,
    "actor": 3,
    "rollout": 4,
    "reinforce": 5,
    "__init__": 6,
    "vec_env.envpool": 6,
    "vec_env": 7,
    "zoo.hyperparams": 7,
    "zoo.hyperparams_opt": 7,
    "zoo.rendering": 7,
    "zoo.hub": 7,
    "zoo.exp_manager": 8,
    "zoo": 9,
    "zoo.cli": 10,
    "compare.files": 11,
    "compare.references": 11,
    "compare.contenders": 12,
    "compare.job": 12,
    "compare.results": 12,
    "compare.plots": 13,
    "compare.gradients": 14,
    "compare.report": 14,
    "compare.runner": 15,
    "compare": 16,
    "compare.cli": 17,
    "__main__": 18,
}


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
            parts = rest.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            unknown = parts[0] if len(parts) > 1 else "__init__"
            modules.add(next((prefix for prefix in prefixes if prefix in RANKS), unknown))
    return modules


def path_of(module):
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def backward_imports(module, source):
    return {name for name in imported_modules(source) if name not in RANKS or RANKS[name] >= RANKS[module]}


def test_every_module_has_a_rank():
    assert set(PACKAGE.rglob("*.py")) == set(map(path_of, RANKS))


@pytest.mark.parametrize("module", RANKS)
def test_no_import_runs_backwards(module):
    assert backward_imports(module, path_of(module).read_text()) == set()


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
        ("from sb3_reinforce.zoo import register", {"zoo"}),
        ("from sb3_reinforce.zoo import rendering", {"zoo.rendering"}),
        ("from sb3_reinforce.zoo.cli import main", {"zoo.cli"}),
    ],
)
def test_backward_imports_are_found(source, found):
    assert backward_imports("buffers", source) == found


@pytest.mark.parametrize(
    "statement, heavy",
    [
        ("from sb3_reinforce import REINFORCE", ["rl_zoo3", "optuna", "matplotlib", "pandas", "scipy.signal"]),
        ("import sb3_reinforce.zoo.cli", ["torch", "gymnasium", "numpy", "yaml"]),
    ],
)
def test_import_is_light(statement, heavy):
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_of_the_package():
    assert sb3_reinforce.REINFORCE.__module__ == "sb3_reinforce.reinforce"
    assert {getattr(sb3_reinforce, name).__name__ for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")} == {
        "ReinforcePolicy",
        "ReinforceCnnPolicy",
        "ReinforceMultiInputPolicy",
    }
    with pytest.raises(AttributeError, match="has no attribute 'PPO'"):
        sb3_reinforce.__getattr__("PPO")
