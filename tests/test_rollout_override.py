"""The examples of docs/rollouts.md, trained with."""

import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from grpo_trl import ENGINES, GRPOConfig, GRPOTrainer
from grpo_trl.batch import Group
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from tests.tiny import IM_END, tiny_model, tiny_tokenizer

DOCS = Path(__file__).resolve().parent.parent / "docs" / "rollouts.md"
PROMPTS = ["What is 1 + 1?", "Name a colour.", "Say hello.", "Count to 3."]
CANDIDATES = [[f"answer {i}, number {g}" + "!" * g for g in range(4)] for i in range(4)]


def example(name):
    """The class of this name from the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if f"class {name}(" in block]
    namespace = {}
    exec(compile(block, str(DOCS), "exec"), namespace)
    return namespace[name]


def keep_batches(trainer_class, kept):
    """Adds what reached the loss to `kept`."""

    class Kept(trainer_class):
        def compute_loss(self, model, inputs, **kwargs):
            kept.append(inputs)
            return super().compute_loss(model, inputs, **kwargs)

    return Kept


def train(trainer_class, tmp_path, columns=None, **options):
    fixed = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "save_epochs": False,
        "plot_metrics": False,
        "num_iterations": 1,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_completion_length": 8,
        "shuffle_dataset": False,
    }
    batches = []
    trainer = keep_batches(trainer_class, batches)(
        model=tiny_model("qwen3"),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=GRPOConfig(str(tmp_path), **(fixed | options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS} | (columns or {})),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer, batches


def moved(trainer):
    start = tiny_model("qwen3").state_dict()
    return any(not torch.equal(weight, start[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_own_completions_are_trained_on_as_given(tmp_path, num_iterations):
    trainer, batches = train(
        example("OwnCompletions"), tmp_path, {"candidates": CANDIDATES}, num_iterations=num_iterations
    )
    tokenizer = trainer.processing_class
    given = [[*tokenizer(text).input_ids, IM_END] for group in CANDIDATES for text in group]
    assert len(batches) == 2 * num_iterations
    trained = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.completion_ids, batch.loss_mask, strict=True)
    ]
    assert sorted(trained) == sorted(given * num_iterations)
    assert moved(trainer)
    lengths = [len(ids) for ids in given]
    # one collection of two prompts per pass
    logged = [entry for entry in trainer.state.log_history if "completions/max_length" in entry]
    assert max(entry["completions/max_length"] for entry in logged) == max(lengths)
    assert all(entry["completions/clipped_ratio"] == 0 for entry in logged)
    assert "sampling/logp_gap" not in trainer.state.log_history[0]


def test_prompt_is_in_front_of_the_completion(tmp_path):
    trainer, batches = train(example("OwnCompletions"), tmp_path, {"candidates": CANDIDATES})
    texts = {
        trainer.processing_class.decode(ids[mask.bool()])
        for batch in batches
        for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    }
    assert texts == set(PROMPTS)


def test_tool_output_is_attended_to_but_not_in_the_loss(tmp_path):
    trainer, batches = train(example("WithTool"), tmp_path)
    tokenizer = trainer.processing_class
    outputs = 0
    for batch in batches:
        for ids, mask, loss_mask, weights in zip(
            batch.completion_ids, batch.completion_mask, batch.loss_mask, batch.token_weights, strict=True
        ):
            tool = mask.bool() & ~loss_mask.bool()
            assert re.fullmatch(r"\[\d+ characters\] ", tokenizer.decode(ids[tool]))
            assert torch.equal(weights > 0, loss_mask.bool())
            first, last = tool.nonzero().flatten()[[0, -1]].tolist()
            assert loss_mask[first - 1] == 1 and loss_mask[last + 1] == 1  # between two turns of the policy
            outputs += 1
    assert outputs == 16
    assert moved(trainer)


def test_turns_of_a_group_differ(tmp_path):
    _, batches = train(example("WithTool"), tmp_path)
    for batch in batches:
        turns = set()
        for ids, mask, loss_mask in zip(batch.completion_ids, batch.completion_mask, batch.loss_mask, strict=True):
            last = (mask.bool() & ~loss_mask.bool()).nonzero().max().item()
            turns.add(tuple(ids[last + 1 : int(mask.sum())].tolist()))
        assert len(turns) == len(batch)


def test_ids_that_do_not_survive_tokenising_stay(tmp_path):
    # bytes of half a character: decoding and tokenising again would change them
    ids = [[50, 200, 201, 230, IM_END], [240, IM_END], [250, 250], [60, 245, IM_END]]
    tokenizer = tiny_tokenizer()
    assert tokenizer(tokenizer.decode(ids[0][:-1])).input_ids != ids[0][:-1]

    class HalfCharacters(GRPOTrainer):
        def rollout(self, prompts):
            groups = [Group(prompt, ids, terminated=[True, True, False, True]) for prompt in prompts]
            return groups[::-1]  # any order

    _, batches = train(HalfCharacters, tmp_path)
    for batch in batches:
        rows = zip(batch.completion_ids, batch.completion_mask, strict=True)
        assert [row[mask.bool()].tolist() for row, mask in rows] == ids * 2


@pytest.mark.parametrize("options", [{"sampler_correction": "token_mask"}, {"num_iterations": 2}, {}])
def test_a_log_probability_that_the_sampler_did_not_give_is_no_difference(tmp_path, options):
    class Forgetful(GRPOTrainer):
        def rollout(self, prompts):
            for group in super().rollout(prompts):
                assert group.sampling_per_token_logps is not None
                group.sampling_per_token_logps[0][0] = math.nan
                yield group

    trainer, _ = train(Forgetful, tmp_path, **options)
    assert moved(trainer)
    values = [value for entry in trainer.state.log_history for value in entry.values() if isinstance(value, float)]
    assert values and all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups[1:], r"draws without a group: \[0\]"),
        (
            lambda groups: [Group(groups[0].prompt, [[9]], [True]), *groups[1:]],
            r"another number of completions: \[0\]",
        ),
    ],
)
def test_an_incomplete_rollout_is_refused(tmp_path, change, message):
    class Incomplete(GRPOTrainer):
        def rollout(self, prompts):
            return change(list(super().rollout(prompts)))

    with pytest.raises(ValueError, match=r"rollout\(\) must give one group of 4 .*" + message):
        train(Incomplete, tmp_path)


def test_engine_of_ones_own(tmp_path, monkeypatch):
    calls = []

    class Counting(HFGenerateEngine):
        def generate(self, prompts, sampling):
            calls.append(len(prompts))
            return super().generate(prompts, sampling)

    monkeypatch.setitem(ENGINES, "mine", Counting)
    trainer, _ = train(GRPOTrainer, tmp_path, rollout_engine="mine")
    assert calls == [2, 2]
    assert moved(trainer)
