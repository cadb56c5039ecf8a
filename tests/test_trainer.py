"""Real runs of `GRPOTrainer` on tiny models."""

import copy
import logging
import math
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_trl import Group, GRPOConfig, GRPOTrainer, Prompt
from tests.tiny import save, tiny_model, tiny_reward_model, tiny_tokenizer

PROMPTS = [f"question {i}" * (1 + i % 3) for i in range(8)]


def reward_vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in str(text)) + len(str(text)) / 5 for text in completions]


def dataset(num_prompts: int = 4, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[:num_prompts], **columns})


def config(path, **options) -> GRPOConfig:
    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_completion_length": 8, "logging_steps": 1,
        "learning_rate": 1e-2, "max_steps": 4, "save_strategy": "no", "save_epochs": False, "plot_metrics": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(str(path), **defaults | options)


def trainer(
    path, model=None, rewards=reward_vowels, data=None, *, cls=GRPOTrainer, eval_dataset=None, peft=None, **options
):
    return cls(
        model=tiny_model("qwen3") if model is None else model, reward_funcs=rewards, args=config(path, **options),
        train_dataset=dataset() if data is None else data, eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(), peft_config=peft,
    )  # fmt: skip


def weights(run: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def logged(run: GRPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


# ---- The step ----


def test_a_run_moves_the_policy_and_logs_trls_metrics(tmp_path):
    run = trainer(tmp_path)
    before = weights(run)
    run.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(run).items())
    first = run.state.log_history[0]
    expected = (
        "loss policy_loss grad_norm learning_rate num_tokens kl entropy reward reward_std frac_reward_zero_std "
        "rewards/reward_vowels/mean rewards/reward_vowels/std completions/mean_length completions/min_length "
        "completions/max_length completions/clipped_ratio clip_ratio/low_mean clip_ratio/high_mean "
        "clip_ratio/region_mean sampling/logp_gap"
    )
    assert set(expected.split()) <= first.keys()
    assert first["sampling/logp_gap"] < 1e-5  # the sampler's log-probabilities are the trainer's
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["loss"] == pytest.approx(first["policy_loss"] + run.args.beta * first["kl"], abs=1e-6)


def test_the_time_of_a_step_begins_with_its_rollout(tmp_path):
    def slow(completions, **kwargs):
        time.sleep(0.5)
        return reward_vowels(completions)

    run = trainer(tmp_path, rewards=slow, num_iterations=2, max_steps=2)
    run.train()
    with_rollout, without = logged(run, "step_time")
    assert with_rollout > 0.5 and without > 0
    assert with_rollout + without < run.state.log_history[-1]["train_runtime"]


def test_the_first_pass_is_on_policy_and_the_next_use_the_stored_log_probs(tmp_path):
    run = trainer(tmp_path, num_iterations=4, beta=0.0)
    run.train()
    ratios = logged(run, "importance_ratio/token")
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios[1:4])
    assert logged(run, "clip_ratio/region_mean")[0] == 0


def test_dropout_in_an_adapter_leaves_the_first_ratio_at_one(tmp_path):
    peft = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft=peft, num_iterations=2)
    run.train()
    assert logged(run, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-6)
    assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("peft", [False, True])
def test_bf16_samples_with_what_it_trains(tmp_path, peft):
    run = trainer(tmp_path, bf16=True, max_steps=2, num_iterations=1, peft=adapter(0) if peft else None)
    dtypes = set()
    for name, module in run.model.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    run.train()
    assert dtypes == {torch.bfloat16}  # decoding, the reference and the update alike
    # Decoding sees one token at a time, and CPUs sum in different orders: each bf16 operation then rounds differently,
    # by up to 2^-9 of its value, some 3e-3 in a log-probability. The reference sees what the update sees: no gap.
    assert max(logged(run, "sampling/logp_gap")) < 3e-2
    assert logged(run, "kl")[0] == 0.0


def test_a_group_with_masks_of_another_length_is_refused():
    prompt = Prompt([1, 2], {"prompt": "a"}, 0)
    with pytest.raises(ValueError, match=r"loss_masks must have one value per token: got rows of \[1, 1\]"):
        Group(prompt, [[3, 4], [5]], [True, True], loss_masks=[[1], [1]])


def test_generation_kwargs_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_beams, eos_token_id cannot be used"):
        trainer(tmp_path, generation_kwargs={"num_beams": 2, "eos_token_id": 3})


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}, {"variant": "deepseekmath"}])
def test_runs_with(tmp_path, options):
    def no_ties(completions, **kwargs):
        return [float(row) for row in range(len(completions))]

    run = trainer(tmp_path, rewards=no_ties, max_steps=2, **options)
    run.train()
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    assert all(norm > 0 for norm in logged(run, "grad_norm"))


def test_gradient_checkpointing_does_not_change_the_weights(tmp_path):
    # SGD: Adam makes of the rounding of a small gradient a step as large as any
    options = {"optim": "sgd", "learning_rate": 0.1}
    plain, checkpointed = (trainer(tmp_path, gradient_checkpointing=on, **options) for on in (False, True))
    before = weights(plain)
    plain.train()
    assert max((weights(plain)[name] - weight).abs().max() for name, weight in before.items()) > 1e-2
    checkpointed.train()
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_all_completions_truncated_and_masked_is_a_finite_step_without_gradient(tmp_path, masked):
    def reward_by_row(completions, **kwargs):
        return [float(row % 4) for row in range(len(completions))]

    # the tiny model hardly ever ends within one token
    options = {
        "mask_truncated_completions": masked,
        "max_completion_length": 1,
        "beta": 0.1,
        "max_steps": 2,
        "seed": 1,
    }
    run = trainer(tmp_path, rewards=reward_by_row, **options)
    before = weights(run)
    run.train()
    assert logged(run, "completions/clipped_ratio") == [1.0]
    assert logged(run, "reward_std")[0] > 0
    numbers = [value for entry in run.state.log_history for value in entry.values() if isinstance(value, float)]
    assert len(numbers) > 20 and all(map(math.isfinite, numbers))
    if masked:
        assert logged(run, "loss") == [0.0, 0.0] and logged(run, "grad_norm") == [0.0, 0.0]
        assert_same(before, weights(run))
    else:
        assert all(norm > 0 for norm in logged(run, "grad_norm"))


def test_rewards_that_do_not_apply(tmp_path):
    def none_for_odd_rows(completions, **kwargs):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    def never(completions, **kwargs):
        return [None] * len(completions)

    run = trainer(tmp_path, rewards=[none_for_odd_rows, never])
    run.train()
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    assert "rewards/never/mean" not in run.state.log_history[0]


@pytest.mark.parametrize("call", ["batch", "group"])
def test_rewards_get_trls_arguments(tmp_path, call):
    calls = []

    def reward(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric):
        calls.append((prompts, answer, level, trainer_state.global_step))
        log_extra("shout", [text.upper() for text in completions])
        log_metric("calls", 1.0)
        assert all(isinstance(ids, list) for ids in completion_ids)
        return [len(ids) + i for i, ids in enumerate(completion_ids)]

    data = dataset(answer=list("abcd"), level=[1, 2, 3, 4])
    run = trainer(tmp_path, rewards=reward, data=data, reward_call=call, log_completions=True, max_steps=1)
    run.train()
    assert [len(prompts) for prompts, *_ in calls] == ([8] if call == "batch" else [4, 4])
    for prompts, answer, level, step in calls:
        assert [dict(zip(PROMPTS, "abcd", strict=False))[p] for p in prompts] == answer
        assert step == 0 and len(set(level)) == len(prompts) // 4
    assert logged(run, "calls") == [1.0]
    table = Dataset.from_parquet(str(next((tmp_path / "completions").glob("*.parquet"))))
    assert table["shout"] == [text.upper() for text in table["completion"]] and len(table) == 8


def test_numbers_that_rewards_log(tmp_path):
    def reward(completions, log_metric, **columns):
        log_metric("some", float("nan"))
        log_metric("some", torch.tensor(2.0))
        return [float(len(text)) for text in completions]

    def wrong(completions, log_metric, **columns):
        log_metric("text", "abc")
        return [0.0] * len(completions)

    run = trainer(tmp_path / "a", rewards=reward, max_steps=1)
    run.train()
    assert logged(run, "some") == [2.0]
    with pytest.raises(TypeError, match=r"log_metric\('text', 'abc'\): expected one number"):
        trainer(tmp_path / "b", rewards=wrong, max_steps=1).train()


@pytest.mark.parametrize("name", ["loss", "reward", "reward_std", "completions/max_length"])
def test_a_metric_under_a_name_of_the_trainer_is_refused(tmp_path, name):
    def reward(completions, log_metric, **columns):
        log_metric(name, 1.0)
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=rf"log_metric\('{name}', ...\): the trainer logs a metric of this name"):
        trainer(tmp_path, rewards=reward, max_steps=1).train()


# ---- Models ----


def test_everything_from_paths_with_a_reward_model_and_a_function(tmp_path):
    policy = save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "policy")
    judge = save(tiny_reward_model(), tiny_tokenizer(chat=False, pair=True), tmp_path / "judge")
    args = config(tmp_path / "out", save_epochs=True, plot_metrics=True, max_steps=-1, num_train_epochs=2,
                  save_strategy="epoch", log_completions=True, reward_weights=[1.0, 0.5])  # fmt: skip
    run = GRPOTrainer(policy, [judge, reward_vowels], args, dataset())
    run.train()
    assert run.reward_names == ["judge", "reward_vowels"]
    first = run.state.log_history[0]
    both = first["rewards/judge/mean"] + 0.5 * first["rewards/reward_vowels/mean"]
    assert first["reward"] == pytest.approx(both, rel=1e-4)
    out = Path(run.args.output_dir)
    assert (out / "training_metrics.png").stat().st_size > 10_000
    assert list((out / "completions").glob("*.parquet"))
    for folder in [*out.glob("checkpoint-*"), out / "epoch_1", out / "epoch_2"]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
    assert_same(weights(run), dict(model.named_parameters()))
    assert (out / "epoch_2" / "recipe.yaml").exists()


def adapter(seed: int) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trained_adapter():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("qwen3"), adapter(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("start", ["full", "new adapter", "trained adapter"])
def test_the_reference_is_where_the_policy_starts(tmp_path, start):
    model = trained_adapter() if start == "trained adapter" else tiny_model("qwen3")
    run = trainer(tmp_path, model=model, peft=adapter(0) if start == "new adapter" else None, num_iterations=1)
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    kl = logged(run, "kl")
    assert kl[0] == 0.0 and kl[-1] > 0
    for name, weight in frozen.items():
        assert torch.equal(run.model.get_parameter(name), weight), name


def test_synced_reference_follows_the_policy(tmp_path):
    run = trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, max_steps=2)
    run.train()
    assert_same(weights(run), dict(run.reference.model.named_parameters()))


def test_a_reference_of_its_own(tmp_path):
    path = save(tiny_model("qwen3", seed=1), tiny_tokenizer(), tmp_path / "reference")
    run = trainer(tmp_path, ref_model_name_or_path=path, max_steps=1)
    run.train()
    assert logged(run, "kl")[0] > 0.01
    assert_same(dict(tiny_model("qwen3", seed=1).named_parameters()), dict(run.reference.model.named_parameters()))


# ---- Data ----


def test_streaming_trains_as_map_style_when_not_shuffled(tmp_path):
    runs = [trainer(tmp_path, data=d, shuffle_dataset=False) for d in (dataset(), dataset().to_iterable_dataset())]
    for run in runs:
        run.train()
    assert_same(weights(runs[0]), weights(runs[1]))


def test_conversations_and_system_prompt_reach_template_and_rewards(tmp_path):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS[:4]]})
    run = trainer(tmp_path, rewards=reward, data=data, system_prompt="Be brief.", max_steps=1)
    run.train()
    prompt, completion = seen[0]
    assert [m["role"] for m in prompt] == ["system", "user"] and completion[0]["role"] == "assistant"
    ids = run.loader.prompts(0)[0].ids
    text = run.processing_class.decode(ids)
    assert "Be brief." in text and text.endswith("<|im_start|>assistant\n")


def test_overlong_prompts_are_dropped_before_training(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, eval_dataset={"long": dataset(3)}, max_prompt_length=12, max_steps=1)
    assert [len(PROMPTS[i]) for i in range(4)] == [10, 20, 30, 10]
    assert len(run.train_dataset) == 2 and "train_dataset: 2 of 4 prompts" in caplog.text
    assert len(run.eval_dataset["long"]) == 1 and "eval_dataset 'long': 2 of 3 prompts" in caplog.text


# ---- Evaluation ----


def test_overlong_prompts_are_dropped_from_a_set_that_evaluate_is_given(tmp_path):
    run = trainer(tmp_path / "drop", max_prompt_length=12, log_completions=True)
    run.evaluate(dataset(4))
    (table,) = (tmp_path / "drop" / "completions").glob("*.parquet")
    assert set(Dataset.from_parquet(str(table))["prompt"]) == {text for text in PROMPTS[:4] if len(text) <= 12}
    strict = trainer(tmp_path / "error", data=dataset(1), max_prompt_length=12, overlong_prompts="error")
    with pytest.raises(ValueError, match=r"^evaluate\(dataset\): 2 of 4 prompts .* max_prompt_length=12"):
        strict.evaluate(dataset(4))


def test_the_files_of_a_set_with_a_slash_in_its_name(tmp_path):
    trainer(tmp_path, log_completions=True).evaluate({"org/set": dataset(2)})
    assert [path.name for path in (tmp_path / "completions").glob("*.parquet")] == [
        "completions_00000_eval_org_set.parquet"
    ]


@pytest.mark.parametrize("given", [{}, "test"])
def test_a_set_that_is_not_there(tmp_path, given):
    with pytest.raises(ValueError, match=r"needs an eval_dataset|has the names \[\]"):
        trainer(tmp_path).evaluate(given)


def test_evaluation_does_not_change_training(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 3, "eval_temperature": 0.7}
    plain = trainer(tmp_path)
    evaluated = trainer(tmp_path, eval_dataset=dataset(3), eval_max_completion_length=5, **options)
    plain.train()
    evaluated.train()
    assert_same(weights(plain), weights(evaluated))
    for key in ("loss", "reward", "kl", "completions/mean_length"):
        assert logged(plain, key) == logged(evaluated, key)
    assert len(logged(evaluated, "eval_reward")) == 4
    assert {"eval_avg@3", "eval_pass@3", "eval_rewards/reward_vowels/mean"} <= evaluated.state.log_history[1].keys()
    assert max(logged(evaluated, "eval_completions/mean_length")) <= 5


def test_evaluation_by_hand(tmp_path):
    def two_of_four(completions, **kwargs):
        return [1.0, 0.0, 1.0, 0.0] * (len(completions) // 4)

    run = trainer(tmp_path, rewards=two_of_four, eval_dataset=dataset(3), num_generations_eval=4)
    metrics = run.evaluate()
    assert metrics["eval_reward"] == 0.5 and metrics["eval_avg@4"] == 0.5 and metrics["eval_pass@4"] == 1.0


def test_named_sets_and_greedy_evaluation(tmp_path):
    sets = {"easy": dataset(2), "hard": dataset(3)}
    run = trainer(tmp_path, eval_dataset=sets, num_generations_eval=1, eval_temperature=0.0)
    first, second = run.evaluate(), run.evaluate()
    assert {"eval_easy_reward", "eval_hard_reward", "eval_hard_pass@1"} <= first.keys()
    assert first == second
    assert first["eval_reward"] == pytest.approx((first["eval_easy_reward"] + first["eval_hard_reward"]) / 2)
    assert logged(run, "eval_reward") == [first["eval_reward"]] * 2  # where trackers and the plot see it
    assert run.evaluate(dataset(1), metric_key_prefix="test").keys() >= {"test_reward"}


def test_the_best_model_by_evaluation_reward_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path, eval_dataset=dataset(3), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, max_steps=4,
    )  # fmt: skip
    run.train()
    rewards = logged(run, "eval_reward")
    assert run.state.best_metric == max(rewards)
    best = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{rewards.index(max(rewards)) + 1}")
    assert_same(dict(best.named_parameters()), weights(run))


# ---- Resume ----


def test_a_checkpoint_without_rollout_state_is_named(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    for path in (tmp_path / "checkpoint-2").glob("rollout_*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"rollout_state_0\.json is missing"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- Errors ----


def test_the_loss_reads_what_was_sampled(tmp_path):
    """Ids in the loss are the ids sampled, and advantages stay with their rows through passes and shuffles."""
    seen = []

    class Watch(GRPOTrainer):
        def collect(self, prompts):
            batch = super().collect(prompts)
            self.expected = {
                tuple(ids[mask.bool()].tolist()) + tuple(p[m.bool()].tolist()): advantage
                for ids, mask, p, m, advantage in zip(
                    batch.completion_ids, batch.completion_mask, batch.prompt_ids, batch.prompt_mask,
                    batch.advantages.tolist(), strict=True,
                )
            }  # fmt: skip
            return batch

        def compute_loss(self, model, inputs, *args, **kwargs):
            for row in range(len(inputs)):
                key = tuple(inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist())
                key += tuple(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist())
                seen.append(self.expected[key] == inputs["advantages"][row].item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = trainer(
        tmp_path,
        cls=Watch,
        num_iterations=3,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        data=dataset(8),
        max_steps=12,
    )
    run.train()
    assert len(seen) == 48 and all(seen)


TRL_SCRIPT = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]

args = GRPOConfig(output_dir=OUTPUT, per_device_train_batch_size=8, num_generations=8, max_completion_length=8,
                  learning_rate=1e-4, logging_steps=1, max_steps=2, use_cpu=True, bf16=False, report_to="none",
                  loss_type="dapo", scale_rewards=True, beta=0.04, num_iterations=1, epsilon=0.2, epsilon_high=0.28,
                  use_vllm=False, temperature=0.9, log_completions=True, save_strategy="no", disable_tqdm=True)
trainer = GRPOTrainer(model=MODEL, reward_funcs=reward_len, args=args,
                      train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is", "The sea is"]}))
trainer.train()
"""


@pytest.mark.parametrize("package", ["trl", "grpo_trl"])
def test_a_trl_script_runs_after_changing_one_import(tmp_path, package):
    model = save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "model")
    script = TRL_SCRIPT.replace("from trl import", f"from {package} import")
    scope = {"OUTPUT": str(tmp_path / "out"), "MODEL": model, "__name__": "script"}
    exec(compile(script, "script.py", "exec"), scope)
    history = scope["trainer"].state.log_history
    assert len([entry for entry in history if "reward" in entry]) == 2
    assert {"kl", "entropy", "clip_ratio/region_mean", "rewards/reward_len/mean"} <= history[0].keys()


def test_model_instances_are_not_shared_with_the_reference(tmp_path):
    model = tiny_model("qwen3")
    before = copy.deepcopy(dict(model.named_parameters()))
    run = trainer(tmp_path, model=model)
    run.train()
    assert_same(before, dict(run.reference.model.named_parameters()))


# ---- What is refused, and what stays true after a resume ----


def test_syncing_a_reference_that_is_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a policy with an adapter is its own reference"):
        trainer(tmp_path, sync_ref_model=True, peft=adapter(0))


def test_overrides_in_generation_kwargs_reach_the_log_probabilities(tmp_path):
    run = trainer(tmp_path, generation_kwargs={"temperature": 0.5, "max_new_tokens": 4}, max_steps=1)
    run.train()
    assert run.args.temperature == 0.5 and run.args.max_completion_length == 4
    assert logged(run, "sampling/logp_gap")[0] < 1e-5 and logged(run, "completions/max_length") == [4]


@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_dropout_that_is_no_module_is_off_too(tmp_path, kind):
    """OPT keeps its rate as a number on the layer, Qwen3's attention too; both apply it by function."""
    sizes = {"dropout": 0.5, "ffn_dim": 64} if kind == "opt" else {"attention_dropout": 0.5}
    run = trainer(tmp_path, model=tiny_model(kind, **sizes), num_iterations=2, max_steps=2)
    run.train()
    assert logged(run, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-6)
    assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-9)


def test_an_adapter_run_can_be_trained_further_from_its_folder(tmp_path):
    base = save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "base")
    first = trainer(tmp_path / "first", model=base, peft=adapter(0))
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = trainer(tmp_path / "second", model=str(tmp_path / "adapter"))
    assert_same(lora_weights(first), lora_weights(second))
    second.train()
    assert logged(second, "kl")[0] == 0.0
    second.save_model(str(tmp_path / "again"))
    assert not list((tmp_path / "again").rglob("*/adapter_model.safetensors"))  # the frozen copy is no result


def lora_weights(run):
    return {name: p for name, p in weights(run).items() if "lora" in name and "frozen_reference" not in name}


def test_a_peft_model_can_be_given_to_a_second_trainer(tmp_path):
    model = trained_adapter()
    for _ in range(2):
        run = trainer(tmp_path, model=model, max_steps=1)
        run.train()
        assert logged(run, "kl") == [0.0]


@pytest.mark.parametrize("names", ["a", "ab"])
def test_named_sets_and_the_best_model(tmp_path, names):
    run = trainer(
        tmp_path, eval_dataset={name: dataset(1 + i) for i, name in enumerate(names)}, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    rewards = zip(*(logged(run, f"eval_{name}_reward") for name in names), strict=True)
    means = [sum(values) / len(values) for values in rewards]
    assert logged(run, "eval_reward") == pytest.approx(means)
    assert run.state.best_metric == pytest.approx(max(means))


def test_a_set_without_any_applicable_reward_has_no_mean(tmp_path):
    def only_short(prompts, completions, **kwargs):
        return [1.0 if len(prompt) == 10 else None for prompt in prompts]

    sets = {"short": dataset(1), "long": dataset(4).select([1, 2])}
    metrics = trainer(tmp_path, rewards=only_short, eval_dataset=sets).evaluate()
    assert metrics["eval_reward"] == metrics["eval_short_reward"] == 1.0 and "eval_long_reward" not in metrics


def test_passing_is_judged_by_the_first_reward(tmp_path):
    def right(completions, **kwargs):
        return [0.0] * len(completions)

    def tidy(completions, **kwargs):
        return [1.0] * len(completions)

    metrics = trainer(tmp_path, rewards=(right, tidy), eval_dataset=dataset(2)).evaluate()
    assert metrics["eval_pass@4"] == 0 and metrics["eval_rewards/tidy/pass@4"] == 1 and metrics["eval_reward"] == 1


def test_evaluate_and_predict_say_what_they_need(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="eval_dataset has no 'prompt' column"):
        run.evaluate(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="use evaluate"):
        run.predict(dataset(1))


def test_a_model_with_too_few_positions_is_said_so(tmp_path):
    model = tiny_model("gpt2", max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"tokens and max_completion_length=8 need more than the 16 positions"):
        trainer(tmp_path, model=model).train()


def test_log_extra_of_another_length_names_the_column(tmp_path):
    def reward(completions, log_extra, **kwargs):
        log_extra("note", ["only one"])
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"log_extra\('note', ...\) was given 1 values for 8 completions"):
        trainer(tmp_path, rewards=reward, log_completions=True).train()
