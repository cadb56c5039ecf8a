"""Random configs, rows and reward outputs: a run works, or a ValueError names what was wrong. Nothing else.

Most cases are refused or only built; a share of those that are accepted trains a step.
"""

import copy
import math
import tempfile
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_trl import VARIANTS, GRPOConfig, GRPOTrainer
from grpo_trl.algorithm import LOSS_TYPES
from grpo_trl.batch import Group, Prompt
from grpo_trl.config import PARTS
from grpo_trl.config_checks import CHOICES
from grpo_trl.refused import UNUSED
from grpo_trl.rewards import RewardScorer
from tests.test_trainer import reward_vowels
from tests.tiny import tiny_model, tiny_tokenizer

CASES = [
    pytest.param((120, 40, 40), marks=[pytest.mark.slow, pytest.mark.ci], id="200"),
    pytest.param((1200, 400, 400), marks=pytest.mark.slow, id="2000"),
]
BASE = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_completion_length": 4, "max_steps": 1,
    "save_strategy": "no", "save_epochs": False, "plot_metrics": False, "gradient_checkpointing": False,
    "per_device_train_batch_size": 4, "num_iterations": 1, "logging_steps": 1,
}  # fmt: skip

# Not drawn: what reaches out of the process (the Hub, trackers, other engines), what changes it for the cases after
# (log levels, determinism), and what takes long (compilation).
LEFT_OUT = {
    *("output_dir", "use_cpu", "report_to", "run_name", "project", "push_to_hub", "hub_token", "hub_model_id"),
    *("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "log_level", "log_level_replica", "full_determinism", "tf32"),
    *("debug", "enable_jit_checkpoint", "skip_memory_metrics"),
    *("resume_from_checkpoint", "save_strategy", "save_epochs", "plot_metrics", "ddp_backend"),
}
NAMES = sorted({field.name for field in fields(GRPOConfig)} - LEFT_OUT)
# values that are right for some field each
PLAUSIBLE = [
    *(1, 2, 3, 4, 8, 16, 0.5, 0.9, 1e-3, 1.0, 2.0, True, False, None, "no", "steps", "epoch", "auto", "same", "cpu"),
    *(
        "text",
        "chat",
        "drop",
        "truncate",
        "error",
        "group",
        "batch",
        "none",
        "token",
        "sequence",
        "k1",
        "dapo",
        "gspo",
    ),
    *("clip", "cispo", "sapo", "vespo", "bnpo", "max_length", "leave_one_out", "normalize_then_sum", "static"),
    *("token_mask", "native", "hf_generate", "cosine", "constant", "cosine_with_min_lr", "warmup_stable_decay"),
    *("polynomial", "reduce_lr_on_plateau", "inverse_sqrt", "sgd", "adamw_torch", "adafactor", "rmsprop", "adagrad"),
    *("adamw_bnb_8bit", "galore_adamw", "lomo", "ademamix", "schedule_free_adamw", "stable_adamw", "reward", "all"),
    *({}, {"min_new_tokens": 2}, {"temperature": 0.7}, {"num_beams": 2}, {"min_lr": 1e-4}, {"enable_thinking": False}),
    *([1.0], [0.5, 0.5], ["loss"]),
]
JUNK = [
    *(-1, 0, 10**30, -0.5, 1.5, math.nan, math.inf, -math.inf, "", "x", "4", "1e-3", "{", "é\x00", "no/such/path"),
    *([], [1], [None], [math.nan], ["a"], {"a": 1}, {"": 7}, {"min_new_tokens": "a"}, {"no_repeat_ngram_size": -1}),
    *({"temperature": "hot"}, {"suppress_tokens": "a"}, {"bad_words_ids": 3}, (), b"bytes", 1 + 2j, object),
]
HINTS = get_type_hints(GRPOConfig)


def fitting(name: str) -> list:
    """Values that fit a field by itself; they may still contradict another's."""
    if name in (choices := PARTS | CHOICES | {"variant": VARIANTS, "loss_type": LOSS_TYPES}):
        return list(choices[name])
    kinds = {bool: [True, False], int: [1, 2, 4, 8], float: [0.1, 0.5, 1.0, 2.0]}
    options = {HINTS[name], *get_args(HINTS[name])}
    return next((values for kind, values in kinds.items() if kind in options), [])


FITTING = [name for name in NAMES if name not in UNUSED and fitting(name)]
OPTIONS = st.one_of(
    st.dictionaries(
        st.sampled_from(NAMES), st.one_of(st.sampled_from(PLAUSIBLE), st.sampled_from(JUNK)), min_size=1, max_size=4
    ),
    *[
        st.lists(st.sampled_from(FITTING), min_size=1, max_size=most, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: st.sampled_from(fitting(name)) for name in names})
        )
        for most in (2, 3)
    ],
)


def every(cases: int):
    """Settings of a property; the same cases each time."""
    return settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module")
def policy():
    return tiny_model("qwen3", num_hidden_layers=1)


def build(policy, rewards=reward_vowels, data=None, **options) -> GRPOTrainer:
    rows = [{"prompt": "a"}, {"prompt": "bb"}] if data is None else data
    evaluation = Dataset.from_dict({"prompt": ["c"]})
    return GRPOTrainer(
        copy.deepcopy(policy), rewards, GRPOConfig(**BASE | options), rows, evaluation,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def is_cheap(args: GRPOConfig) -> bool:
    """Whether a step of it takes a fraction of a second."""
    longest = max(args.max_completion_length, args.eval_max_completion_length or 0)
    rows = max(args.generation_batch_size, args.num_generations_eval or 0, args.num_generations)
    rounds = args.dynamic_sampling_max_rounds if args.dynamic_sampling else 1
    return longest <= 16 and rows <= 16 and rounds <= 16 and 0 < args.max_steps <= 4 and args.num_iterations <= 4


@pytest.mark.parametrize("cases", CASES)
def test_configs(policy, cases):
    counts = {"refused": 0, "built": 0, "trained": 0}

    @every(cases[0])
    @given(options=OPTIONS, trains=st.integers(0, 3))
    def works_or_is_refused(options, trains):
        with tempfile.TemporaryDirectory() as folder:
            try:
                args = GRPOConfig(**BASE | options | {"output_dir": folder})
                if not trains and is_cheap(args):
                    run = build(policy, **options, output_dir=folder)
                    run.train()
                    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
                    counts["trained"] += 1
                else:
                    counts["built"] += 1
            except ValueError as error:
                counts["refused"] += 1
                # a field that was wrong, or one with which it does not go together
                assert any(name in str(error) for name in options), error

    works_or_is_refused()
    assert min(counts.values()) > cases[0] // 40, counts
    print(counts)


MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system", "tool", "", None, 3]),
                "content": st.one_of(st.text(max_size=5), st.sampled_from([None, 3, [], [{"text": "a"}]])),
            }
        ),
        st.sampled_from([{}, {"role": "user"}, None, "a", 3, []]),
    ),
    max_size=3,
)  # fmt: skip
PROMPT = st.one_of(
    st.text(min_size=1, max_size=8),
    MESSAGES,
    st.sampled_from(["", " ", None, 3, 1.5, b"a", {}, {"role": "user"}, True]),
)
COLUMN = st.sampled_from(
    [
        "answer",
        "solution",
        "trainer_state",
        "prompts",
        "completions",
        "chat_template_kwargs",
        "completion",
        "x",
        "self",
    ]
)
VALUE = st.sampled_from([None, "a", 3, math.nan, [], {}, {"enable_thinking": False}, b"a", object])
ROW = st.one_of(
    st.builds(lambda prompt, rest: rest | {"prompt": prompt}, PROMPT, st.dictionaries(COLUMN, VALUE, max_size=2)),
    st.sampled_from([{}, {"text": "a"}, None, "a", 3, []]),
)
TEXTS = st.lists(st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=8)}), min_size=1, max_size=2)


@pytest.mark.parametrize("cases", CASES)
def test_rows(policy, cases):
    counts = {"refused": 0, "trained": 0}

    @every(cases[1])
    @given(
        rows=st.one_of(st.lists(ROW, max_size=3), TEXTS),
        options=st.sampled_from([{}, {"prompt_format": "chat"}, {"system_prompt": "s"}, {"max_prompt_length": 3}]),
    )  # fmt: skip
    def works_or_is_refused(rows, options):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = build(policy, data=rows, output_dir=folder, **options)
                run.train()
                counts["trained"] += 1
            except ValueError as error:
                counts["refused"] += 1
                assert any(word in str(error) for word in ("train_dataset", "prompt", "chat_template_kwargs")), error

    works_or_is_refused()
    assert min(counts.values()) > cases[1] // 20, counts
    print(counts)


NUMBER = st.one_of(
    st.floats(width=32), st.integers(-(10**40), 10**40), st.booleans(), st.none(),
    st.sampled_from([torch.tensor(1.0), torch.ones(1), "1", "a", [], [1.0], {}, 1j, object, b"a", math.nan, 3.5e38]),
)  # fmt: skip
GOOD = st.one_of(st.floats(-1e6, 1e6), st.none(), st.integers(-5, 5))
OUTPUT = st.one_of(
    st.lists(NUMBER, min_size=4, max_size=4),
    st.lists(GOOD, min_size=4, max_size=4),
    st.lists(NUMBER, max_size=6),
    st.lists(GOOD, min_size=4, max_size=4).map(tuple),
    st.sampled_from([None, 1.0, "abcd", {}, set(), {1, 2, 3, 4}, range(4), b"abcd", object, math.nan]),
    st.sampled_from([torch.zeros(4), torch.zeros(4, 1), torch.zeros(3), torch.full((4,), math.inf), torch.zeros(())]),
    st.just(0).map(lambda _: (1 / 0 for _ in range(4))),
)  # fmt: skip


@pytest.mark.parametrize("cases", CASES)
def test_reward_outputs(policy, cases):
    counts = {"refused": 0, "scored": 0, "trained": 0}
    group = Group(Prompt([1], {"prompt": "q"}, 0), [[1]] * 4, [True] * 4, completions=list("abcd"))

    @every(cases[2])
    @given(output=OUTPUT, trains=st.integers(0, 7))
    def works_or_is_refused(output, trains):
        def reward_drawn(**kwargs):
            return output

        try:
            rewards = RewardScorer([reward_drawn]).score([group])
            counts["scored"] += 1
            assert rewards.shape == (4, 1) and not rewards.isinf().any()
            assert rewards.isnan().flatten().tolist() == [value is None for value in output]
            if not trains:
                with tempfile.TemporaryDirectory() as folder:
                    run = build(policy, reward_drawn, output_dir=folder)
                    run.train()
                assert all(parameter.isfinite().all() for parameter in run.model.parameters())
                counts["trained"] += 1
        except (ValueError, RuntimeError) as error:
            counts["refused"] += 1
            assert "Reward function 'reward_drawn'" in str(error), error
            assert isinstance(error, ValueError) or isinstance(error.__cause__, ZeroDivisionError)  # its own

    works_or_is_refused()
    assert min(counts.values()) > 0, counts
    print(counts)
