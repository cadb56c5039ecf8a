"""A run that was cut and resumed is the run: the same weights, optimizer, random state and logs, to the last bit."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from grpo_trl import GRPOTrainer
from grpo_trl.checkpoint import load_weights, weights_left_out
from grpo_trl.manifest import ResumeError
from tests.resuming import differences, outcome
from tests.test_trainer import PROMPTS, dataset, logged, trained_adapter, trainer
from tests.test_trainer_dynamic import some_equal
from tests.tiny import tiny_model


class ReferenceBesideSampling(GRPOTrainer):
    """Asks its reference as if that had a device of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert self.reference is not None
        self.reference.own_device = self.args.device


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def stream():
    return dataset(5).to_iterable_dataset()


# name -> (options, where to cut). 4 prompts, 2 per rollout unless said otherwise; a log every 3 steps, so that most
# cuts lie between two logs.
CASES = {
    "two passes, between them": ({"num_iterations": 2}, (1, 3)),
    "four passes, between them": ({"num_iterations": 4}, (1, 2, 3)),
    "in the middle of a rollout buffer": ({"num_iterations": 1, "steps_per_generation": 4}, (1, 3)),
    "in the middle of a reshuffled pass": ({"num_iterations": 2, "steps_per_generation": 4, "max_steps": 8}, (5, 7)),
    "in the second epoch": ({"num_iterations": 1}, (3, 5)),
    "in the second epoch and within a buffer": ({"num_iterations": 2, "max_steps": 8}, (5,)),
    "at the end of an epoch": ({"num_iterations": 1, "logging_strategy": "epoch"}, (2, 4)),
    "gradient accumulation": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 2},
        (1, 3),
    ),
    "accumulation and four passes": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 4, "max_steps": 8},
        (5,),
    ),
    "a learning-rate schedule": ({"lr_scheduler_type": "cosine", "warmup_steps": 3, "num_iterations": 2}, (2, 5)),
    "a synced reference": (
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "beta": 0.5},
        (2, 3),
    ),
    "a reference that works beside sampling": (
        {"cls": ReferenceBesideSampling, "beta": 0.5, "num_iterations": 2, "steps_per_generation": 2},
        (1, 2, 3),
    ),
    "evaluation": ({"eval_dataset": dataset(2), "eval_strategy": "steps", "eval_steps": 2}, (2, 3)),
    "dropout": ({"disable_dropout": False, "peft": lora(lora_dropout=0.5), "num_iterations": 2}, (1, 3)),
    "a trained adapter": ({"model": trained_adapter, "num_iterations": 2}, (3,)),
    "a stream": ({"data": stream, "num_iterations": 2}, (2, 3)),
    "a shuffled stream in its second lap": ({"data": stream, "num_iterations": 1}, (4,)),
    "dynamic sampling with carried groups": (
        {
            "rewards": some_equal, "data": lambda: dataset(8), "dynamic_sampling": True, "num_iterations": 1,
            "max_concurrent_rows": 16, "steps_per_generation": 2, "beta": 0.0,
        },
        (2, 3),
    ),
    # what transformers saves by other names, or in other pieces, than the model has it
    "experts": ({"model": lambda: tiny_model("qwen3_moe"), "num_iterations": 2}, (2,)),
    "a head of another name": ({"model": lambda: tiny_model("gpt_neox"), "num_iterations": 2}, (2,)),
    "a table of completions": ({"log_completions": True, "num_iterations": 4}, (1,)),
}  # fmt: skip


def build(path, **options):
    """A run of 6 steps; functions among the options are called, so that each run has objects of its own."""
    made = {"data": dataset, "model": lambda: None, "max_steps": 6, "logging_steps": 3} | options
    made |= {name: made[name]() for name in ("data", "model")}
    return trainer(path, **made)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_neox", "qwen3"])
def test_the_best_model_is_loaded_whole(tmp_path, kind):
    run = build(
        tmp_path, model=lambda: tiny_model(kind), max_steps=3, num_iterations=1, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, eval_dataset=dataset(2),
    )  # fmt: skip
    run.train()
    for step in (1, 3):
        run.state.best_model_checkpoint = str(tmp_path / f"checkpoint-{step}")
        run._load_best_model()  # what the end of a run calls
        best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint).state_dict()
        assert all(torch.equal(best[name], weight) for name, weight in run.model.state_dict().items())


def test_weights_keep_the_bits_that_a_model_has_more_of_than_its_first(tmp_path):
    model = tiny_model("gpt_neox").to(torch.bfloat16)
    head = model.get_output_embeddings().to(torch.float32)
    torch.nn.init.normal_(head.weight)
    model.save_pretrained(tmp_path)
    before = head.weight.detach().clone()
    torch.nn.init.zeros_(head.weight)
    load_weights(model, tmp_path, weights_left_out(model, tmp_path))
    assert torch.equal(head.weight, before)


def test_a_checkpoint_that_lacks_weights_is_named(tmp_path):
    run = build(tmp_path, model=lambda: tiny_model("qwen3_moe"), max_steps=1)
    run.save_model(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "model.safetensors"
    state = {name: weight for name, weight in load_file(path).items() if "layers.1.mlp.experts" not in name}
    save_file(state, path, metadata={"format": "pt"})
    left = weights_left_out(run.model, tmp_path / "saved")
    assert [name for name in left if "layers.1.mlp.experts" in name]
    with pytest.raises(ResumeError, match=r"Cannot load the weights of .*saved: it lacks model.layers.1.mlp.experts"):
        load_weights(run.model, tmp_path / "saved", left)


@pytest.mark.parametrize("name", CASES)
def test_a_run_cut_in_two_is_the_run(tmp_path, name):
    options, cuts = CASES[name]
    straight = build(tmp_path, save_strategy="steps", save_steps=1, **options)
    straight.train()
    expected = outcome(straight)
    tables = {path.name: path.read_bytes() for path in (tmp_path / "completions").glob("*")}
    for cut in cuts:
        for path in (tmp_path / "completions").glob("*"):
            path.unlink()
        resumed = build(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
        assert not differences(expected, outcome(resumed)), f"cut at {cut}"
        later = {path.name: path.read_bytes() for path in (tmp_path / "completions").glob("*")}
        assert later == {name: table for name, table in tables.items() if name in later} and len(later) == len(tables)
    assert len(expected["log"]) > 2 and expected["steps"] == options.get("max_steps", 6)
    assert max(entry.get("grad_norm", 0) for entry in expected["log"]) > 0
    if name == "dynamic sampling with carried groups":
        numbers = json.loads((tmp_path / "checkpoint-2" / "rollout_state_0.json").read_text())
        assert numbers["dynamic_sampling"]["surplus"]


def test_saving_does_not_change_the_run(tmp_path):
    runs = [build(tmp_path / strategy, save_strategy=strategy, save_steps=1) for strategy in ("no", "steps")]
    for run in runs:
        run.train()
    first, second = map(outcome, runs)
    del first["random"], second["random"]  # the second began where the first had ended
    assert not differences(first, second)


def test_every_step_of_a_run_can_be_its_last(tmp_path):
    """A chain of resumes, one after each step."""
    straight = build(tmp_path / "straight", num_iterations=2)
    straight.train()
    options = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    for _ in range(6):
        run = build(tmp_path / "chain", **options)
        run.add_callback(StopAfterOne())
        run.train(resume_from_checkpoint=True if (tmp_path / "chain" / "checkpoint-1").exists() else None)
    first, second = outcome(straight), outcome(run)
    del first["random"], second["random"]  # the second began where the first had ended
    assert not differences(first, second)


class StopAfterOne(TrainerCallback):
    """Ends a run after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class ResumedBefore(TrainerCallback):
    """Makes of a run one that had trained for a million seconds before it was resumed."""

    def __init__(self, run):
        self.run = run

    def on_step_end(self, args, state, control, **kwargs):
        self.run._earlier_seconds = 1e6


def test_another_number_of_steps(tmp_path):
    """A run that was planned shorter goes on as the longer one."""
    options = {"num_iterations": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3,
               "lr_scheduler_type": "constant"}  # fmt: skip
    longer = build(tmp_path / "longer", max_steps=8, **options)
    longer.train()
    build(tmp_path / "shorter", max_steps=3, **options).train()
    resumed = build(tmp_path / "shorter", max_steps=8, **options)
    resumed.train(resume_from_checkpoint=True)
    first, second = outcome(longer), outcome(resumed)
    assert not differences(first["weights"], second["weights"])
    assert not differences(first["optimizer"], second["optimizer"])
    assert not differences(first["log"], second["log"])


def test_a_finished_run_is_not_trained_further(tmp_path):
    options = {
        "max_steps": 3,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }  # within the first epoch
    straight = build(tmp_path, **options)
    straight.train()
    expected = outcome(straight)
    resumed = build(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(expected, outcome(resumed))


def test_a_resume_is_as_long_as_both_parts(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    straight = build(tmp_path, **options)
    straight.train()
    saved = json.loads((tmp_path / "checkpoint-5" / "rollout_state_0.json").read_text())["seconds"]
    resumed = build(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    (runtime,) = logged(resumed, "train_runtime")
    assert runtime > saved > 0


def test_a_run_that_was_resumed_and_is_saved_again_says_all_its_seconds(tmp_path):
    run = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.add_callback(ResumedBefore(run))
    run.train()
    state = json.loads((tmp_path / "checkpoint-1" / "rollout_state_0.json").read_text())
    assert state["seconds"] > 1e6 < logged(run, "train_runtime")[0]


def test_a_resumed_run_is_not_evaluated_at_its_start(tmp_path):
    options = {"eval_dataset": dataset(2), "eval_on_start": True, "save_strategy": "steps", "save_steps": 3}
    straight = build(tmp_path, max_steps=4, **options)
    straight.train()
    expected = outcome(straight)
    assert [log["step"] for log in straight.state.log_history if "eval_reward" in log] == [0]
    resumed = build(tmp_path, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not differences(expected, outcome(resumed))


# ---- What changed ----


def cut(path, **options):
    build(path, num_iterations=2, max_steps=3, save_strategy="steps", save_steps=3, **options).train()
    return str(path / "checkpoint-3")


def other_rows():
    return Dataset.from_dict({"prompt": [*PROMPTS[:3], "another question"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 8}, r"num_generations: 4 then, 8 now\. The rollout that was saved is of groups"),
        ({"per_device_train_batch_size": 16}, "per_device_train_batch_size: 8 then, 16 now"),
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"data": lambda: dataset(6)}, "prompts: 4 then, 6 now; data: .* they are not those that the run began with"),
        ({"data": other_rows}, "data: .* they are not those"),
    ],
)
def test_another_layout_is_refused(tmp_path, options, message):
    folder = cut(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **{"num_iterations": 2} | options).train(resume_from_checkpoint=folder)


def test_another_number_of_ranks_is_refused_with_the_reason(tmp_path):
    folder = cut(tmp_path)
    path = tmp_path / "checkpoint-3" / "rollout_state_0.json"
    run = build(tmp_path, num_iterations=2)
    loader = run.get_train_dataloader()
    then = json.loads(path.read_text())["loader"]["layout"] | {"ranks": 2}
    with pytest.raises(ValueError, match=r"ranks: 2 then, 1 now\. Each rank holds its own part of a rollout"):
        loader.check_layout(then)
    assert folder


def test_rows_read_anew_are_the_same_data(tmp_path):
    """What counts is what the rows say, not the object, its cache or its history."""
    folder = cut(tmp_path)
    again = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]).filter(
        lambda row: row["prompt"] in PROMPTS[:4]
    )
    run = build(tmp_path, num_iterations=2, data=lambda: again)
    run.train(resume_from_checkpoint=folder)
    assert run.state.global_step == run.state.max_steps  # it went on


def test_other_settings_are_named_and_do_not_stop_the_run(tmp_path, caplog):
    folder = cut(tmp_path)
    run = build(
        tmp_path, num_iterations=2, learning_rate=1e-3, weight_decay=0.5, epsilon=0.1, logging_steps=1, max_steps=6,
        lr_scheduler_type="constant",
    )  # fmt: skip
    run.train(resume_from_checkpoint=folder)
    (message,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert "learning_rate: 0.01 then, 0.001 now (without effect: the optimizer of the checkpoint" in message
    assert "epsilon: 0.2 then, 0.1 now" in message and "epsilon: 0.2 then, 0.1 now (without" not in message
    assert logged(run, "learning_rate")[-1] == 0.01
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0}
    assert "logging_steps" not in message and "max_steps" not in message


def test_another_model_type_adapter_or_optimizer_is_refused_and_other_rewards_are_named(tmp_path, caplog):
    folder = cut(tmp_path)
    for options, name in (
        ({"model": lambda: tiny_model("llama")}, "model_type was qwen3 then and is llama now"),
        ({"peft": lora()}, "adapter was None then and is LORA now"),
        ({"optim": "sgd"}, "optim was adamw_torch.* then and is sgd now"),
    ):
        with pytest.raises(ValueError, match=f"Cannot resume from .*{name}.*Start from its weights"):
            build(tmp_path, num_iterations=2, **options).train(resume_from_checkpoint=folder)
    build(tmp_path, num_iterations=2, rewards=some_equal).train(resume_from_checkpoint=folder)
    assert "reward functions: ['reward_vowels'] then, ['some_equal'] now" in caplog.text


def test_an_adapter_of_another_shape_is_refused_and_other_settings_of_it_are_named(tmp_path, caplog):
    tokens = {"trainable_token_indices": [6, 7]}
    folder = cut(tmp_path, peft=lora(**tokens))
    for options, name in (
        ({"r": 2}, "adapter.r was 4 then and is 2 now"),
        (
            {"target_modules": ["v_proj"]},
            r"adapter.target_modules was \['q_proj', 'v_proj'\] then and is \['v_proj'\] now",
        ),
        ({"use_dora": True}, "adapter.use_dora was False then and is True now"),
        (
            {"trainable_token_indices": [7, 6]},
            r"adapter.trainable_token_indices was \[6, 7\] then and is \[7, 6\] now",
        ),
    ):
        with pytest.raises(ValueError, match=f"Cannot resume from .*{name}"):
            build(tmp_path, num_iterations=2, peft=lora(**tokens | options)).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match=r"adapter.changes the base by was None then and is pissa now"):
        pissa = lora(init_lora_weights="pissa", **tokens)
        build(tmp_path, num_iterations=2, peft=pissa).train(resume_from_checkpoint=folder)
    caplog.clear()
    build(tmp_path, num_iterations=2, peft=lora(lora_alpha=64, init_lora_weights="gaussian", **tokens)).train(
        resume_from_checkpoint=folder
    )
    (message,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert "adapter.lora_alpha: 8 then, 64 now." in message and "init" not in message


def test_a_penalty_that_begins_within_a_rollout_is_refused(tmp_path):
    build(tmp_path, num_iterations=2, max_steps=3, save_steps=1, save_strategy="steps", beta=0.0).train()
    with pytest.raises(ValueError, match=r"beta=0.05 needs log-probabilities.*checkpoint-3 is in the middle of"):
        build(tmp_path, num_iterations=2, beta=0.05).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run = build(tmp_path, num_iterations=2, beta=0.05, max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4


def test_a_reference_that_begins_to_follow_is_the_one_that_was_loaded(tmp_path):
    folder = cut(tmp_path)
    run = build(tmp_path, num_iterations=2, sync_ref_model=True, ref_model_sync_steps=1)
    run.train(resume_from_checkpoint=folder)
    assert run.state.global_step == run.state.max_steps


def test_the_same_settings_are_not_mentioned(tmp_path, caplog):
    folder = cut(tmp_path)
    build(tmp_path, num_iterations=2).train(resume_from_checkpoint=folder)
    assert not [record for record in caplog.records if "other settings" in record.getMessage()]
