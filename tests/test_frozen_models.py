"""Reference and reward models of a run: frozen, whole, with a dtype of their own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from grpo_trl import GRPOTrainer
from tests.test_trainer import config, dataset, logged, trainer
from tests.tiny import save, tiny_model, tiny_reward_model, tiny_tokenizer


def test_frozen_models_are_not_prepared_optimised_or_saved(tmp_path, reward_model_dir):
    run = GRPOTrainer(
        tiny_model("qwen3"), reward_model_dir,
        config(tmp_path, beta=0.1, max_steps=2, save_strategy="steps", save_steps=2),
        dataset(), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    (reward,) = run.scorer.reward_funcs
    frozen = {"reference": run.reference.model, "reward": reward.model}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in frozen.items()}
    run.train()
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in run.model.parameters()}
    for name, model in frozen.items():
        assert not any(prepared is model for prepared in run.accelerator._models)
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    saved = [load_file(path) for path in checkpoint.rglob("model*.safetensors")]
    own = sum(parameter.numel() for parameter in run.model.parameters())
    assert sum(tensor.numel() for part in saved for tensor in part.values()) <= own


@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_models_may_be_quantised_and_keep_their_dtype(tmp_path, bits):
    # rows of whole blocks of 64, which bitsandbytes' kernel for AVX-512 takes for granted
    policy = save(tiny_model("qwen3", hidden_size=64, head_dim=32), tiny_tokenizer(), tmp_path / "policy")
    reader = tiny_tokenizer(chat=False, pair=True)
    judge = save(tiny_reward_model(hidden_size=64, pooler_hidden_size=64), reader, tmp_path / "judge")
    reading = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["classifier", "lm_head"]}  # nor one row
    quantised = {"quantization_config": reading, "dtype": "bfloat16"}
    run = GRPOTrainer(
        policy, judge,
        config(
            tmp_path, beta=0.1, max_steps=1, ref_model_init_kwargs=quantised, reward_model_init_kwargs=quantised
        ),
        dataset(), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    (reward,) = run.scorer.reward_funcs
    assert run.model.dtype == torch.float32
    for model in (run.reference.model, reward.model):
        assert getattr(model, f"is_loaded_in_{bits}bit") and model.dtype == torch.bfloat16
    run.train()
    kl = logged(run, "kl")[0]
    assert 0 < kl < 1  # a quantised copy is close to the policy, not equal


def test_a_reference_of_another_dtype(tmp_path, model_dir):
    run = trainer(tmp_path, model_dir, beta=0.1, ref_model_init_kwargs={"dtype": "bfloat16"}, max_steps=1)
    assert (run.model.dtype, run.reference.model.dtype) == (torch.float32, torch.bfloat16)
    run.train()
    assert 0 < logged(run, "kl")[0] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model=True needs a reference model of its own"),
        ({"ref_model_init_kwargs": {"dtype": "bfloat16"}}, "ref_model_init_kwargs has no effect: no reference"),
    ],
)
def test_a_policy_from_a_folder_with_an_adapter_has_no_reference_of_its_own(tmp_path, options, message):
    get_peft_model(tiny_model("qwen3"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, str(tmp_path / "adapter"), beta=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_model_init_kwargs": {"dtype": "bfloat16"}}, "ref_model_init_kwargs has no effect: no reference"),
        (
            {"sync_ref_model": True, "ref_model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            "which quantised ones do not allow",
        ),
        ({"ref_model_name_or_path": "adapter"}, "'adapter' has an adapter and no model: merge it into its base"),
        ({"reward_model_init_kwargs": {"dtype": "bfloat16"}}, "reward_model_init_kwargs has no effect: no reward is"),
    ],
)
def test_frozen_models_that_cannot_be(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    get_peft_model(tiny_model("qwen3"), LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, beta=0.1, **options)
