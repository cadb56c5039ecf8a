"""The table of what is where."""

import logging

import pytest
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState

from grpo_trl import GRPOTrainer
from grpo_trl.callbacks import DeviceTableCallback, ModelRow, device_table, model_rows
from grpo_trl.callbacks.device_table import _short, _size
from tests.test_trainer import config, dataset, trainer
from tests.tiny import tiny_model, tiny_tokenizer

# parameters of the tiny Qwen3: 263 x 32 embeddings and head; 2 layers of attention (32 x 32 + 2 x 32 x 16 + 32 x 32),
# its norms (2 x 8), MLP (3 x 32 x 64) and norms (2 x 32); one norm of 32
QWEN3 = 2 * 263 * 32 + 2 * (32 * 32 * 3 + 16 + 3 * 32 * 64 + 64) + 32
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_policy_reference_and_reward_models(tmp_path, model_dir, reward_model_dir):
    run = GRPOTrainer(
        model_dir, [reward_model_dir, "accuracy"],
        config(
            tmp_path, beta=0.1, ref_device="meta", ref_model_init_kwargs={"dtype": "bfloat16"},
            reward_model_init_kwargs={"quantization_config": {"load_in_4bit": True}, "dtype": "float32"},
        ),
        dataset(answer=["1"] * 4), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    policy, reference, reward = model_rows(run.model, run.reference, run.scorer.reward_funcs)
    assert sum(p.numel() for p in run.model.parameters()) == QWEN3
    name = model_dir.split("/")[-1]
    assert policy == ModelRow(f"policy {name}", "cpu", "float32", f"{_short(QWEN3)}, all trained", "0.14 MiB")
    assert reference == ModelRow(f"reference {name}", "offloaded", "bfloat16", _short(QWEN3), "0.07 MiB")
    assert reward.model == f"reward {reward_model_dir.split('/')[-1]}"
    assert reward.device == "cpu" and set(reward.dtype.split(", ")) == {"4-bit", "float32"}
    unquantised = GRPOTrainer(
        model_dir, reward_model_dir, config(tmp_path), dataset(), processing_class=tiny_tokenizer()
    )
    whole = model_rows(unquantised.model, None, unquantised.scorer.reward_funcs)[1]
    assert whole.parameters == reward.parameters  # as many weights, whatever they are stored in
    assert float(reward.size.split()[0]) < float(whole.size.split()[0])


def test_an_adapter_that_is_switched_off(tmp_path):
    run = trainer(tmp_path, beta=0.1, peft=LORA)
    policy, reference = model_rows(run.model, run.reference, [])
    assert policy.parameters.endswith(" trained") and "all" not in policy.parameters
    assert reference == ModelRow("reference: the policy, adapter off", "cpu", "float32", "shared", "shared")


def test_an_adapter_that_is_kept_as_it_was(tmp_path):
    model = get_peft_model(tiny_model("qwen3"), LORA)
    run = trainer(tmp_path, model, beta=0.1)
    assert model_rows(run.model, run.reference, [])[1].model == "reference: the policy, first adapter"


def test_without_kl_term_there_is_no_reference(tmp_path):
    run = trainer(tmp_path, beta=0.0)
    assert [row.model for row in model_rows(run.model, run.reference, [])] == ["policy"]


def test_a_model_that_is_partly_offloaded(qwen3):
    cpu_offload(qwen3.model.layers)
    assert model_rows(qwen3, None, [])[0].device == "cpu, offloaded"


@pytest.mark.parametrize(("count", "expected"), [(999, "999"), (37_216, "37.2k"), (596_049_920, "596M"), (7e9, "7B")])
def test_counts_are_short(count, expected):
    assert _short(count) == expected


def test_sizes():
    assert (_size(2**20), _size(2**31 + 2**30 // 2)) == ("1.00 MiB", "2.50 GiB")


def test_the_table_has_a_row_for_each():
    table = device_table([ModelRow("policy", "cuda:0", "float32", "1M", "4 MiB")])
    assert [column.header for column in table.columns] == ["model", "device", "dtype", "parameters", "size"]
    assert [next(iter(column.cells)) for column in table.columns] == ["policy", "cuda:0", "float32", "1M", "4 MiB"]


@pytest.mark.parametrize(("main_process", "disable_tqdm"), [(True, False), (True, True), (False, False)])
def test_it_is_shown_once_on_the_main_process(tmp_path, capsys, caplog, main_process, disable_tqdm):
    run = trainer(tmp_path, beta=0.1, disable_tqdm=disable_tqdm)
    (callback,) = [c for c in run.callback_handler.callbacks if isinstance(c, DeviceTableCallback)]
    capsys.readouterr()
    with caplog.at_level(logging.INFO, "grpo_trl"):
        callback.on_train_begin(run.args, TrainerState(is_world_process_zero=main_process), TrainerControl())
    logged = [record.message for record in caplog.records if record.name == "grpo_trl.callbacks.device_table"]
    printed = capsys.readouterr().out
    if not main_process:
        assert not logged and not printed
    elif disable_tqdm:
        assert not printed and [line.split(",")[0] for line in logged] == ["policy", "reference"]
    else:
        assert not logged
        assert all(word in printed for word in ("What is where", "policy", "reference", "cpu", "float32", "MiB"))
