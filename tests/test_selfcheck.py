"""The self-test: a set-up that is well, and one sabotage for each row."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console

import grpo_trl.policy.attention
import grpo_trl.selfcheck.trial
from grpo_trl import GRPOTrainer
from grpo_trl.cli import main
from grpo_trl.policy.attention import GroupLayout
from grpo_trl.rollouts import ENGINES
from grpo_trl.rollouts.native import NativeEngine
from grpo_trl.selfcheck import CHECKS, check_table, reward_table, run_checks, shortened, verdict
from tests.test_trainer import config, reward_vowels
from tests.tiny import BOS, CHAT_TEMPLATE, ENDOFTEXT, IM_END, save, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [f"question {i}" * (1 + i % 3) for i in range(8)]
CHATS = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in QUESTIONS]})
ENDS = [IM_END, ENDOFTEXT, *range(8, 260, 4)]  # so many that completions of random weights end
NAMES = [check.name for check in CHECKS]
TEMPLATE, EOS, SAMPLER, PACKED, REFERENCE, ACCUMULATION, REWARDS = NAMES


def model_that_ends(kind="qwen3", eos=ENDS, **options):
    model = tiny_model(kind, **options)
    model.generation_config.eos_token_id = eos
    return model


def build(
    path, model=None, tokenizer=None, rewards=reward_vowels, data=CHATS, *, cls=GRPOTrainer, peft=None, **options
):
    args = config(path / "out", **{"max_completion_length": 16} | options)
    return cls(
        model=model or model_that_ends(), reward_funcs=rewards, args=shortened(args, str(path / "scratch")),
        train_dataset=data, processing_class=tokenizer or tiny_tokenizer(), peft_config=peft,
    )  # fmt: skip


def lora(**options):
    return LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def failing(results):
    return {name for name, result in results.items() if not result.passed}


def looks(results):
    return {name: result.remedy for name, result in results.items() if result.passed and result.remedy}


# ---- Set-ups that are well ----


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_a_good_set_up_is_ready_and_stays_as_it_was(tmp_path, peft, options):
    run = build(tmp_path, peft=lora() if peft else None, **options)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    results, trial = run_checks(run)
    assert verdict(results) == (["ready"], True), verdict(results)
    assert list(results) == NAMES
    assert "exactly 0" in results[REFERENCE].detail and "KL 0 nats" in results[REFERENCE].detail
    assert ("adapter off = base" in results[REFERENCE].detail) is peft
    assert "no BOS" in results[TEMPLATE].detail and "<|im_start|>assistant\n" in results[TEMPLATE].detail
    assert len(trial.rewards) == 8
    after = run.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not (tmp_path / "out").exists() and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "dapo", "num_generations": 8, "max_completion_length": 100},  # dynamic sampling
        {"variant": "gspo", "num_iterations": 1, "num_generations": 2, "temperature": 0.7},
        {"variant": "top_entropy", "beta": 0.1, "num_generations": 3, "per_device_train_batch_size": 3},
        {"rollout_engine": "hf_generate", "disable_dropout": False, "eval_strategy": "no"},
        {"data": CHATS.to_iterable_dataset(), "skip_solved_after": 1},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 8, "log_rollouts": True},
    ],
)
def test_other_recipes_are_ready(tmp_path, options):
    results, trial = run_checks(build(tmp_path, **options))
    assert failing(results) == set(), results
    assert len(trial.batch) in (8, 12) and trial.length == min(options.get("max_completion_length", 16), 64)


def test_a_model_that_cannot_be_packed_is_told_so(tmp_path):
    results, _ = run_checks(build(tmp_path, model_that_ends("gemma2")))
    assert failing(results) == set(), results
    assert "runs on padded rows" in results[PACKED].detail and "0 but for rounding" in results[REFERENCE].detail


def test_text_prompts_end_at_the_tokenizers_eos(tmp_path):
    data = Dataset.from_dict({"prompt": QUESTIONS})
    results, _ = run_checks(build(tmp_path, data=data, beta=0.0, tokenizer=tiny_tokenizer(pad_is_eos=True)))
    assert failing(results) == set(), results
    assert "the tokenizer's EOS <|im_end|>" in results[EOS].detail and "none is lost" in results[EOS].detail
    assert "no reference" in results[REFERENCE].detail


def test_a_reference_that_is_another_model_need_not_agree(tmp_path):
    other = save(tiny_model("qwen3", seed=1), tiny_tokenizer(), tmp_path / "other")
    results, _ = run_checks(build(tmp_path, ref_model_name_or_path=other))
    assert failing(results) == set()
    assert "another model" in results[REFERENCE].detail and "KL 0 " not in results[REFERENCE].detail


def test_truncated_sampling_is_something_to_look_at(tmp_path):
    results, _ = run_checks(build(tmp_path, top_k=5))
    assert failing(results) == set() and list(looks(results)) == [SAMPLER]
    assert "set top_p: 1, top_k: 0" in results[SAMPLER].remedy


# ---- Sabotage: each makes its row fail, and no other ----


def test_a_second_bos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|bos|>"
    results, trial = run_checks(build(tmp_path / "one", tokenizer=tokenizer))
    assert failing(results) == set() and "one BOS (<|bos|>)" in results[TEMPLATE].detail
    assert trial.prompts[0].ids.count(BOS) == 1
    tokenizer.chat_template = "<|bos|>" + CHAT_TEMPLATE
    results, _ = run_checks(build(tmp_path / "two", tokenizer=tokenizer))
    assert failing(results) == {TEMPLATE}
    assert "BOS (<|bos|>) at 0, 1, " in results[TEMPLATE].detail
    assert "take <|bos|> out of the chat template" in results[TEMPLATE].remedy


def test_a_bos_that_begins_each_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # as of SmolLM2-Instruct
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token if bos_token }}", "")
    results, trial = run_checks(build(tmp_path / "turns", tokenizer=tokenizer))
    assert failing(results) == set() and trial.prompts[0].ids.count(tokenizer.bos_token_id) > 1
    talks = [[{"role": "user", "content": f"What is <|im_start|> {i}?"}] for i in range(4)]
    results, _ = run_checks(build(tmp_path / "data", tokenizer=tokenizer, data=Dataset.from_dict({"prompt": talks})))
    assert failing(results) == {TEMPLATE}


@pytest.mark.parametrize(
    ("declared", "tokenizers", "said"),
    [
        ([*ENDS, 9999], "<|im_end|>", "ids [9999] are not among the model's 263 tokens"),
        (ENDS[1:], "<|endoftext|>", "The template's end of turn <|im_end|> (3) does not end a completion"),
    ],
)
def test_eos_that_is_not_there_or_not_the_templates(tmp_path, declared, tokenizers, said):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizers
    results, _ = run_checks(build(tmp_path, model_that_ends(eos=declared), tokenizer))
    assert failing(results) == {EOS}
    assert said in results[EOS].detail + results[EOS].remedy
    assert "set eos_token_id: [3, " in results[EOS].remedy


class Shifted(NativeEngine):
    def generate(self, prompts, sampling):
        for group in super().generate(prompts, sampling):
            group.sampling_per_token_logps = [[x - 0.2 for x in row] for row in group.sampling_per_token_logps]
            yield group


class Hotter(NativeEngine):
    def generate(self, prompts, sampling):
        return super().generate(prompts, dataclasses.replace(sampling, temperature=1.3))


@pytest.mark.parametrize("engine", [Shifted, Hotter])
@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_a_sampler_that_is_not_the_trainer(tmp_path, monkeypatch, engine, options):
    monkeypatch.setitem(ENGINES, "own", engine)
    results, _ = run_checks(build(tmp_path, rollout_engine="own", **options))
    assert failing(results) == {SAMPLER}
    assert f"with the engine {engine.__name__}" in results[SAMPLER].detail
    assert "What is trained is not what sampled" in results[SAMPLER].remedy
    corrected, _ = run_checks(build(tmp_path, rollout_engine="own", sampler_correction="token_truncate", **options))
    assert failing(corrected) == set() and "corrected by" in corrected[SAMPLER].detail


def test_padded_attention_that_is_another(tmp_path, monkeypatch):
    run = build(tmp_path)
    plain = grpo_trl.policy.attention.AttentionInterface()["sdpa"]

    def broken(module, query, key, value, *args, **options):
        return plain(module, query, key, value.roll(1, dims=2), *args, **options)

    monkeypatch.setattr(grpo_trl.policy.attention, "AttentionInterface", lambda: {"sdpa": broken})
    results, _ = run_checks(run)
    assert failing(results) == {PACKED} and "attn_implementation: eager" in results[PACKED].remedy


def test_attention_of_the_update_that_is_another(tmp_path, monkeypatch):
    run = build(tmp_path)
    attend = GroupLayout.attend
    monkeypatch.setattr(GroupLayout, "attend", lambda self, *args, **options: 1.1 * attend(self, *args, **options))
    results, _ = run_checks(run)
    assert failing(results) == {SAMPLER, PACKED}  # it is neither what sampled nor the model


def test_an_adapter_that_does_not_begin_as_nothing(tmp_path):
    results, _ = run_checks(build(tmp_path, peft=lora(init_lora_weights=False)))
    assert not failing(results) and results[REFERENCE].detail.startswith("a frozen copy of the adapter, first KL 0 ")


def test_an_adapter_that_moved(tmp_path):
    run = build(tmp_path, peft=lora())
    with torch.no_grad():
        run.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    results, _ = run_checks(run)
    assert failing(results) == {REFERENCE} and results[REFERENCE].detail.startswith("adapter off = base, first KL ")
    assert "init_lora_weights" in results[REFERENCE].remedy


def test_a_reference_whose_weights_moved(tmp_path):
    run = build(tmp_path)
    with torch.no_grad():
        run.reference.model.model.layers[0].mlp.up_proj.weight.add_(1e-4)
    results, _ = run_checks(run)
    assert failing(results) == {REFERENCE}
    assert "give both the same path" in results[REFERENCE].remedy


class MeanOfMeans(GRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / inputs.loss_mask.sum()


def test_a_loss_that_hangs_on_the_micro_batch(tmp_path):
    results, _ = run_checks(build(tmp_path, cls=MeanOfMeans))
    assert failing(results) == {ACCUMULATION} and "1 micro-batch against 4" in results[ACCUMULATION].detail


class WithoutGradient(GRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 0 * super().compute_loss(model, inputs)


def test_a_gradient_that_does_not_arrive(tmp_path):
    results, _ = run_checks(build(tmp_path, cls=WithoutGradient))
    assert failing(results) == {ACCUMULATION} and "No finite gradient" in results[ACCUMULATION].remedy


# ---- Rewards ----


def reward_that_raises(completions, **kwargs):
    raise KeyError("answer_column")


def reward_of_nothing(completions, **kwargs):
    return [None] * len(completions)


def reward_one(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (reward_that_raises, "Reward function 'reward_that_raises' failed on row 0: KeyError: 'answer_column'"),
        (reward_of_nothing, "every reward with a weight gave None for every completion"),
    ],
)
def test_rewards_that_cannot_be_used(tmp_path, rewards, said):
    results, _ = run_checks(build(tmp_path, rewards=rewards))
    assert failing(results) == {REWARDS}
    assert said in results[REWARDS].detail, results[REWARDS].detail


@pytest.mark.parametrize(
    ("rewards", "options", "said"),
    [
        (reward_one, {}, "All completions have the same sum"),
        ([reward_vowels, reward_one], {}, "For all completions alike: reward_one"),
        (reward_vowels, {"max_completion_length": 2}, "All completions were cut at 2 tokens (max_completion_length)"),
        (
            reward_vowels,
            {"max_completion_length": 9},
            "completions were cut at 3 tokens (the length of this test)",
        ),
    ],
)
def test_rewards_to_look_at(tmp_path, monkeypatch, rewards, options, said):
    monkeypatch.setattr(grpo_trl.selfcheck.trial, "MAX_TOKENS", 3 if options else 64)
    model = model_that_ends(eos=IM_END) if options else None
    results, _ = run_checks(build(tmp_path, model, rewards=rewards, **options))
    lines, ready = verdict(results)
    assert ready and list(looks(results)) == [REWARDS], results
    assert said in results[REWARDS].remedy and lines[-1] == "ready"


def test_the_table_of_completions(tmp_path):
    def half(completions, **kwargs):
        return [None if row % 2 else 0.5 for row in range(len(completions))]

    run = build(tmp_path, rewards=[reward_vowels, half], reward_weights=[1.0, 2.0])
    results, trial = run_checks(run)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(check_table(results))
    console.print(reward_table(trial))
    text = console.export_text()
    assert text.count("None") == 4 and "reward_vowels" in text and "<|im_start|>assistant" in text
    total = trial.rewards_per_func[0, 0] + 2 * 0.5
    assert trial.rewards[0] == pytest.approx(float(total)) and f"{float(total):.3g}" in text
    assert "\x1b" not in text


# ---- What fails on the way ----


class NoRollout(GRPOTrainer):
    def rollout(self, prompts):
        raise RuntimeError("the sampler is gone")


def test_a_part_that_fails_spoils_the_rows_that_need_it_and_no_other(tmp_path):
    results, _ = run_checks(build(tmp_path, cls=NoRollout))
    assert failing(results) == set(NAMES) - {TEMPLATE, EOS}
    assert results[PACKED].detail == "RuntimeError: the sampler is gone"
    lines, ready = verdict(results)
    assert not ready and len(lines) == 6 and lines[-1] == "not ready: 5 of 7 checks failed"


def test_several_processes_are_refused(tmp_path):
    args = config(tmp_path)
    args.fsdp = True
    with pytest.raises(ValueError, match="runs in one process that holds the whole policy"):
        shortened(args, str(tmp_path))


def test_the_arguments_of_the_run_stay_as_they_are(tmp_path):
    args = config(
        tmp_path, num_generations=16, per_device_train_batch_size=16, disable_dropout=False,
        report_to=["tensorboard"], push_to_hub=True,
    )  # fmt: skip
    before = dict(vars(args))
    changed = shortened(args, "elsewhere")
    assert vars(args) == before
    assert (changed.num_generations, changed.generation_batch_size, changed.output_dir) == (4, 8, "elsewhere")
    assert (changed.report_to, changed.push_to_hub) == ([], False)


# ---- The command ----


@pytest.fixture
def recipe(tmp_path):
    """A recipe with local model and data; and the folder of a model whose generation config does not end a turn."""
    good = save(model_that_ends(), tiny_tokenizer(), tmp_path / "good")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    bad = save(model_that_ends(eos=ENDOFTEXT), tokenizer, tmp_path / "bad")
    rows = [{"question": text, "answer": "1"} for text in QUESTIONS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def length(completions, answer, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    entry = {"path": str(tmp_path / "train.jsonl"), "type": "jsonl", "input": "question", "output": "answer"}
    fields = {
        "model_name_or_path": good, "train_datasets": [entry], "reward_funcs": ["own.length"], "use_cpu": True,
        "output_dir": "out", "max_completion_length": 24, "prompt_format": "chat", "report_to": "none",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path, bad


def check(folder, *argv):
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "grpo_trl.cli", "check", "--config", "recipe.yaml", *argv]
    return subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=120)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_the_command_says_ready_and_leaves_nothing_behind(recipe):
    folder, _ = recipe
    before = contents(folder)
    run = check(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "ready"
    assert all(name in run.stdout for name in [*NAMES, "length", "Sum"])
    assert contents(folder) == before and not (folder / "out").exists()


@pytest.fixture
def checked(recipe, monkeypatch, capsys):
    """Runs the command here: its exit code, and what it said."""
    monkeypatch.chdir(recipe[0])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "160")

    def run(*argv):
        with pytest.raises(SystemExit) as end:
            main(["check", "--config", "recipe.yaml", *argv])
        return end.value.code, capsys.readouterr()

    yield run
    sys.modules.pop("own", None)  # of the recipe's folder


def test_the_command_says_what_to_fix(recipe, checked):
    _, bad = recipe
    code, said = checked("--model", bad, "--num_generations", "2")
    assert code == 1, said
    *_, fix, last = [line for line in said.out.splitlines() if not line.startswith("Look")]
    assert fix.startswith("Fix EOS and pad: ") and "set eos_token_id: [3, 1]" in fix
    assert last == "not ready: 1 of 7 checks failed"


@pytest.mark.parametrize(
    ("option", "message"), [(("--model", "./nowhere"), "no such folder"), (("--report_to", "azure_ml"), "pip install")]
)
def test_a_set_up_that_cannot_be_built_ends_with_code_2(checked, option, message):
    code, said = checked(*option)
    assert code == 2 and message in said.err and "Self-test" not in said.out
