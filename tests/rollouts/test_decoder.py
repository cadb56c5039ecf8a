"""One token per row by the short way: only where it gives what the layers give, and by their live weights."""

import logging

import pytest
import torch
from torch import nn

from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from grpo_trl.rollouts.native import NativeEngine, decoder
from tests.policy.test_packed import KINDS, build, lora
from tests.rollouts.test_native import assert_same, prepared, rollout
from tests.tiny import tiny_model

SHORT = [kind for kind in KINDS if kind not in ("phi3", "gpt2")]  # those join or name their projections otherwise


def run(model):
    ours = NativeEngine(prepared(model))
    return ours, rollout(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_are_run_the_short_way(kind):
    ours, _ = run(build(kind))
    assert (ours.runner.decoder is not None) == (kind in SHORT)


@pytest.mark.parametrize("options", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_act(options):
    model = tiny_model("llama", **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ours, groups = run(model)
    assert ours.runner.decoder is not None
    assert_same(groups, rollout(HFGenerateEngine(model)))


def test_adapters_act():
    ours, _ = run(lora(build("qwen3")))  # what is sampled: test_native.py
    assert ours.runner.decoder is not None


def test_a_model_that_only_looks_like_llama_is_noticed(caplog):
    """Granite multiplies what it adds to the residual."""
    model = tiny_model("granite", residual_multiplier=0.5, embedding_multiplier=2.0)
    assert decoder.Runner(model.base_model).decoder is not None
    with caplog.at_level(logging.INFO, logger="grpo_trl"):
        ours, groups = run(model)
    assert ours.runner.decoder is None and "own forward" in caplog.text
    assert_same(groups, rollout(HFGenerateEngine(model)))


def test_a_replaced_module_makes_another_model(qwen3):
    ours, before = run(qwen3)
    first = ours.runner
    rollout(ours)
    assert ours.runner is first
    layer = qwen3.model.layers[1]
    layer.mlp = nn.Sequential(layer.mlp, nn.Tanh())
    after = rollout(ours)
    assert ours.runner is not first and ours.runner.decoder is not None
    assert after != before
    assert_same(after, rollout(HFGenerateEngine(qwen3)))


def test_hooks_are_called(qwen3):
    ours, _ = run(qwen3)
    seen = []
    handle = qwen3.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    rollout(ours)
    assert ours.runner.decoder is None and len(seen) == 12  # the prompts, then eleven tokens
    handle.remove()
    rollout(ours)
    assert ours.runner.decoder is not None and len(seen) == 12


def test_the_first_step_leaves_behind_what_any_other_does(qwen3):
    """A run that was resumed compares again: that must not change a bit."""
    ours, _ = run(qwen3)
    compared, again = rollout(ours), rollout(NativeEngine(qwen3))
    for draw, group in compared.items():
        assert again[draw].sampling_per_token_logps == group.sampling_per_token_logps


@pytest.mark.parametrize("rows", [1, 2, 8, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_for_any_number_of_rows(rows, bias):
    module, x = nn.Linear(12, 20, bias=bias), torch.randn(rows, 12)
    torch.testing.assert_close(decoder._linear(module)(x), module(x))


def test_hooks_of_gradient_checkpointing_and_of_an_engine_leave_the_decoder(qwen3):
    """Checkpointing has one on the embeddings, which the decoder calls; DeepSpeed one on the whole model, which no way
    of decoding calls."""
    _, plain = run(qwen3)
    qwen3.gradient_checkpointing_enable()
    qwen3.enable_input_require_grads()
    qwen3.register_forward_pre_hook(lambda *_: None)
    ours, hooked = run(qwen3)
    assert ours.runner.decoder is not None
    assert_same(hooked, plain)
