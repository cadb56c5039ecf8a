"""Imports go down only: the layers of the package, kept by reading the source."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = "grpo_trl"
SOURCE = Path(__file__).resolve().parent.parent / PACKAGE

# Lowest first. A module may import those of lower layers; units of one layer do not import each other.
LAYERS = [
    ["algorithm", "jsonable"],
    ["batch", "placement", "token_limit", "manifest", "signals", "ranks_exit", "worker", "fingerprint", "disk"],
    ["config_types"],
    ["refused", "config_checks", "generation_kwargs"],
    ["config_vllm"],
    ["config"],
    ["policy", "rollouts", "rewards", "data", "data_forms", "prompts", "prompt_memory", "metrics"],
    ["loader", "checkpoint", "moment", "nonfinite", "callbacks", "evaluation", "model_card"],
    ["resumable"],
    ["interruptible"],
    ["assembly", "hooks"],
    ["collection", "trainer_checks"],
    ["trainer", "memory"],
    ["selfcheck"],
    ["recipe"],
    ["commands"],
    ["cli"],
    ["__main__"],
    [PACKAGE],  # the package itself: `__init__.py` hands out names of every layer, so nothing below imports from it
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
BESIDE = {  # allowed inside a layer
    ("rollouts", "policy"),
    ("rewards", "policy"),
    ("data", "data_forms"),
    ("data", "prompts"),
}
MATHEMATICS = {"torch", *sys.stdlib_module_names}  # what `algorithm` may import from outside


def module_name(path: Path) -> str:
    """`grpo_trl/policy/logprobs.py` -> `grpo_trl.policy.logprobs`; a package's `__init__.py` -> the package."""
    parts = (PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """`grpo_trl.policy.logprobs` -> `policy`: the file or folder right under the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def imports(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import: at the top, in functions and under TYPE_CHECKING alike.

    `from package import name` counts as `package.name` where that can be a module of ours.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            if base == PACKAGE:
                # a name that is no unit, GRPOTrainer say, is one that the package's own `__init__.py` hands out
                names = [alias.name for alias in node.names]
                found += [(node.lineno, f"{PACKAGE}.{name}" if name in LEVEL else PACKAGE) for name in names]
            else:
                found.append((node.lineno, base))
    return found


def violations(source: str, module: str, file: str, is_package: bool = False) -> list[str]:
    """One line per import that goes up or sideways: file, line, import, and the rule."""
    unit = unit_of(module)
    if unit not in LEVEL:
        return [f"{file}: `{unit}` has no layer; give it one in LAYERS of tests/test_layers.py"]
    found = []
    for line, name in imports(source, module, is_package):
        where = f"{file}:{line} imports {name}"
        if name.split(".")[0] != PACKAGE:
            if unit == "algorithm" and name.split(".")[0] not in MATHEMATICS:
                found.append(f"{where}; `algorithm` imports torch and the standard library only")
            continue
        target = unit_of(name)
        if target not in LEVEL:
            found.append(f"{where}; `{target}` has no layer; give it one in LAYERS of tests/test_layers.py")
        elif target != unit and (unit, target) not in BESIDE and LEVEL[target] >= LEVEL[unit]:
            relation = "beside" if LEVEL[target] == LEVEL[unit] else "above"
            found.append(f"{where}; `{target}` stands {relation} `{unit}`, and imports go down only")
    return found


def test_imports_go_down_only():
    files = sorted(SOURCE.rglob("*.py"))
    assert SOURCE / "algorithm" / "loss.py" in files
    found = []
    for path in files:
        file = str(path.relative_to(SOURCE.parent))
        found += violations(path.read_text(), module_name(path), file, is_package=path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_tables_of_the_layers_name_what_is_there(document):
    text = (SOURCE.parent / document).read_text()
    table = text[text.index("| Layer | Holds |") :].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+(?:\.py|/))`", row.split("|")[1])}
    units = {path.name + "/" * path.is_dir() for path in SOURCE.iterdir() if path.name[0] != "_"}
    assert named == units


@pytest.mark.parametrize(
    ("module", "snippet", "problem"),
    [
        ("grpo_trl.batch", "from .trainer import GRPOTrainer", "above"),
        ("grpo_trl.batch", "import grpo_trl.trainer", "above"),
        ("grpo_trl.batch", "from grpo_trl.trainer import GRPOTrainer", "above"),
        ("grpo_trl.batch", "from . import trainer", "above"),
        ("grpo_trl.batch", "from grpo_trl import GRPOTrainer", "above"),
        ("grpo_trl.batch", "def late():\n    from .config import GRPOConfig", "above"),
        ("grpo_trl.batch", "if TYPE_CHECKING:\n    from .config import GRPOConfig", "above"),
        ("grpo_trl.batch", "from .placement import place", "beside"),
        ("grpo_trl.policy.logprobs", "from ..rollouts.engine import ENGINES", "beside"),
        ("grpo_trl.policy.logprobs", "from ..loader import RolloutLoader", "above"),
        ("grpo_trl.metrics", "from .data import load", "beside"),
        ("grpo_trl.algorithm.loss", "from transformers import Trainer", "torch and the standard library only"),
        ("grpo_trl.algorithm.loss", "import numpy as np", "torch and the standard library only"),
        ("grpo_trl.algorithm.loss", "from ..batch import Group", "above"),
        ("grpo_trl.batch", "from .helpers import thing", "has no layer"),
        ("grpo_trl.helpers", "import torch", "has no layer"),
    ],
)
def test_checker_finds(module, snippet, problem):
    found = violations(snippet, module, "bad.py")
    assert len(found) == 1
    assert problem in found[0]
    assert "bad.py" in found[0]


def test_message_names_file_line_and_import():
    (message,) = violations("import torch\n\nfrom ..trainer import GRPOTrainer\n", "grpo_trl.data.mix", "data/mix.py")
    assert message.startswith("data/mix.py:3 imports grpo_trl.trainer; `trainer` stands above `data`")


@pytest.mark.parametrize(
    ("module", "snippet"),
    [
        ("grpo_trl.batch", "import torch\nfrom .algorithm import policy_loss"),
        ("grpo_trl.trainer", "from . import loader, metrics\nfrom .algorithm.loss import policy_loss"),
        (
            "grpo_trl.rollouts.hf_generate",
            "from ..policy.logprobs import per_token_logps\nfrom .engine import ENGINES",
        ),
        ("grpo_trl.rewards.model", "from grpo_trl.policy import per_token_logps"),
        ("grpo_trl.algorithm.loss", "import math\nfrom collections.abc import Callable\nimport torch.nn.functional"),
        ("grpo_trl.cli", "from grpo_trl.selfcheck import check"),
    ],
)
def test_checker_allows(module, snippet):
    assert violations(snippet, module, "good.py") == []


def test_checker_resolves_relative_imports_of_packages():
    source = "from .loss import policy_loss\nfrom ..config import GRPOConfig"
    found = violations(source, "grpo_trl.algorithm", "algorithm/__init__.py", is_package=True)
    assert found == [
        "algorithm/__init__.py:2 imports grpo_trl.config; `config` stands above `algorithm`, and imports go down only"
    ]
