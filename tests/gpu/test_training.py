"""Whole runs on a GPU: exact resume, frozen models on the CPU, memory that really runs out."""

import logging
import os

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from grpo_trl import GRPOTrainer
from tests.resuming import differences, outcome
from tests.test_trainer import config, dataset, logged, trainer
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_reward_model, tiny_tokenizer

OPTIONS = {"use_cpu": False, "beta": 0.1}


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that add up in the same order each time, where they can be chosen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_run_cut_in_two_is_the_run(tmp_path, bf16, cuda_graphs, deterministic):
    options = OPTIONS | {"bf16": bf16, "cuda_graphs": cuda_graphs, "save_strategy": "steps"}
    options |= {"num_iterations": 2, "max_steps": 6}  # a rollout at steps 0, 2 and, after the cut, 4

    def run(name, **more):
        result = trainer(tmp_path / name, tiny_model("qwen3", head_dim=32), **options, **more)
        assert result.args.device.type == "cuda" and result.args.bf16 == bf16
        return result

    whole = run("whole", save_steps=3)
    whole.train()
    expected = outcome(whole)
    cut = run("cut", save_steps=3)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert differences(outcome(cut), expected) == []
    assert max(logged(whole, "grad_norm")) > 0


def test_frozen_models_on_the_cpu_give_the_same_run(tmp_path):
    runs = {}
    for place in ("same", "cpu"):
        args = config(tmp_path / place, **OPTIONS, bf16=False, ref_device=place, reward_device=place)
        run = GRPOTrainer(
            tiny_model("qwen3"), tiny_reward_model(), args, dataset(), processing_class=tiny_tokenizer(),
            reward_processing_classes=tiny_tokenizer(chat=False, pair=True),
        )  # fmt: skip
        frozen = [run.reference.model, run.scorer.reward_funcs[0].model]
        wanted = "cpu" if place == "cpu" else "cuda"
        assert {p.device.type for model in frozen for p in model.parameters()} == {wanted}
        assert {p.device.type for p in run.model.parameters()} == {"cuda"}
        assert (run.reference.own_device is None) == (place == "same")
        run.train()
        runs[place] = run
    for key in ("loss", "kl", "reward", "grad_norm", "entropy"):
        assert logged(runs["cpu"], key) == pytest.approx(logged(runs["same"], key), rel=1e-3, abs=1e-5), key


def test_an_update_that_runs_out_of_memory_is_made_in_pieces(tmp_path, caplog):
    def run(name):
        options = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
        model = tiny_model("qwen3", **options, initializer_range=0.02)
        # all completions are as long as they may be
        result = trainer(
            tmp_path / name, model, **OPTIONS | {"beta": 0.0}, bf16=False, max_completion_length=400,
            per_device_train_batch_size=64, num_generations=16, max_steps=2, learning_rate=1e-4,
        )  # fmt: skip
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result.train()
        return result, torch.cuda.max_memory_reserved()

    assert VOCAB_SIZE < 2000
    enough, peak = run("enough")
    assert enough.policy_limit.tokens is None
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
        with caplog.at_level(logging.WARNING, "grpo_trl"):
            short, _ = run("short")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert short.policy_limit.tokens is not None
    assert "Out of memory in the policy" in " ".join(caplog.messages)
    for key in ("loss", "grad_norm", "entropy"):
        assert logged(short, key) == pytest.approx(logged(enough, key), rel=1e-3, abs=1e-5), key


def test_bf16_is_the_default(tmp_path):
    run = trainer(tmp_path, tiny_model("qwen3"), **OPTIONS)
    assert run.args.bf16 and run.args.device == torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    run.train()
    assert len(logged(run, "loss")) == 4 and all(map(float.__ge__, logged(run, "entropy"), [0.0] * 4))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_liger_layers_train_as_those_of_transformers(tmp_path, monkeypatch, bf16):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):  # put back what it replaces for all models
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    runs = {}
    for liger in (False, True):
        args = OPTIONS | {"bf16": bf16, "use_liger_kernel": liger, "gradient_checkpointing": True}
        run = runs[liger] = trainer(tmp_path / str(liger), tiny_model("qwen3", head_dim=32), **args)
        run.train()  # it is here that transformers puts them into the policy
        for model in (run.model, run.reference.model):
            layer = model.model.layers[0]
            assert ["forward" in vars(m) for m in (layer.mlp, layer.input_layernorm)] == [liger, liger]
    rounding = {"rel": 0.05, "abs": 5e-3} if bf16 else {"rel": 1e-3, "abs": 1e-5}
    for key in ("loss", "kl", "entropy"):
        # later rounds sample other tokens where rounding differs
        assert logged(runs[True], key)[0] == pytest.approx(logged(runs[False], key)[0], **rounding), key
    assert min(logged(runs[True], "grad_norm")) > 0
