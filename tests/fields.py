"""Which config fields are read: by this package, and by those parts of transformers' Trainer that run here."""

import ast
import dataclasses
from functools import cache
from pathlib import Path

import transformers

import grpo_trl

FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(grpo_trl.GRPOConfig))
TRANSFORMERS = Path(transformers.__file__).parent
# Functions of transformers that GRPOTrainer replaces or never reaches: what only they read has no effect here.
BYPASSED = {
    "compute_loss",
    "evaluate",
    "evaluation_loop",
    "extract_hyperparameters_from_trainer",  # a model card; ours is another
    "from_trainer",
    "get_eval_dataloader",
    "get_test_dataloader",
    "predict",
    "prediction_step",
    "_get_dataloader",
    "_get_eval_sampler",
    "_get_num_items_in_batch",
    "_get_train_sampler",
    "_remove_unused_columns",
    "_get_collator_with_removed_columns",
    "_report_to_hp_search",
    "_track_num_input_tokens",
}
# methods of TrainingArguments that check or derive fields, which is no effect yet
SETTERS = {"__post_init__", "_validate_args"}
# ... but for those that act there at once, and those that are read under a name made up on the way
READ_OTHERWISE = {"tf32", "torch_compile", "logging_steps", "eval_steps", "save_steps"}


@cache
def reads_of_this_package() -> frozenset[str]:
    """Names of attributes that the package reads, texts that name one (tables of fields), and parameters (fields that
    are passed by name), outside the config."""
    package = Path(grpo_trl.__file__).parent
    tables = ("config.py", "config_checks.py", "refused.py")
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py") if path.name not in tables]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return frozenset(
        getattr(node, kind[1])
        for kind in ((ast.Attribute, "attr"), (ast.Constant, "value"), (ast.arg, "arg"))
        for node in nodes
        if isinstance(node, kind[0])
    )


@cache
def reads_of_transformers() -> frozenset[str]:
    """Names read as `args.<name>` (`self.<name>` in TrainingArguments) in what runs."""
    paths = [
        TRANSFORMERS / "training_args.py",
        *TRANSFORMERS.glob("trainer*.py"),
        *TRANSFORMERS.glob("integrations/*.py"),
    ]
    found = [_reads(ast.parse(path.read_text()), "self" if path is paths[0] else "args") for path in paths]
    return frozenset(READ_OTHERWISE.union(*found))


def _reads(tree: ast.AST, owner: str) -> set[str]:
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if node.name in BYPASSED | (SETTERS if owner == "self" else set()) or node.name.startswith("set_"):
                continue
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value
            if getattr(base, "id", getattr(base, "attr", "")) == owner:
                names.add(node.attr)
        names |= _reads(node, owner)
    return names
