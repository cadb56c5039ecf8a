"""One token per row by the short way: only where it gives what the layers give, and by their live weights."""

import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from grpo_trl.batch import Prompt
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from grpo_trl.rollouts.native import NativeEngine, decoder, engine
from grpo_trl.rollouts.native.weights import joined, may_be_packed
from tests.policy.test_packed import KINDS, build, lora
from tests.rollouts.test_native import PROMPTS, SAMPLING, assert_same, prepared, rollout
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_told_from_another_model(dtype):
    """In weights of 16 bit, and under an autocast to it."""
    other = tiny_model("granite", residual_multiplier=0.5, embedding_multiplier=2.0)
    for model, short in ((other, False), (build("qwen3"), True)):
        ours = NativeEngine(prepared(model.to(dtype)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            rollout(ours)
        assert (ours.runner.decoder is not None) is short


def test_a_model_that_turns_a_part_of_a_head_is_run_by_its_own_layers():
    model = tiny_model("glm", head_dim=8, num_key_value_heads=2, partial_rotary_factor=0.5)
    ours, groups = run(model)
    assert ours.runner.decoder is None
    assert_same(groups, rollout(HFGenerateEngine(model)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("olmo", {"clip_qkv": 4.0}),  # which a first step may not reach
        (
            "ministral3",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
                    "llama_4_scaling_beta": 0.5,
                },
            },
        ),
    ],
)  # fmt: skip
def test_a_model_that_does_more_in_later_steps_is_run_by_its_own_layers(kind, options):
    ours, groups = run(model := tiny_model(kind, **options))
    assert ours.runner.decoder is None
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


@pytest.mark.parametrize("hook", ["before", "of accelerate"])
def test_hooks_of_other_kinds_leave_the_model_to_its_own_layers(qwen3, hook):
    layer = qwen3.model.layers[0].mlp.up_proj
    if hook == "before":
        layer.register_forward_pre_hook(lambda *_: None)
    else:
        add_hook_to_module(layer, ModelHook())
    assert run(qwen3)[0].runner.decoder is None


def test_the_first_step_leaves_behind_what_any_other_does(qwen3):
    """A run that was resumed compares again: that must not change a bit."""
    ours, _ = run(qwen3)
    compared, again = rollout(ours), rollout(NativeEngine(qwen3))
    for draw, group in compared.items():
        assert again[draw].sampling_per_token_logps == group.sampling_per_token_logps


@pytest.mark.parametrize("rows", [1, 2, 8, 64, 65])
@pytest.mark.parametrize("bias", [(False, False), (True, True), (True, False)])
def test_products_for_any_number_of_rows(rows, bias):
    modules, x = (
        [nn.Linear(12, size, bias=own) for size, own in zip((20, 7), bias, strict=True)],
        torch.randn(rows, 12),
    )
    product, expected = decoder._Product(*modules), [module(x) for module in modules]
    for pack in (False, True):
        if pack:
            product.pack()
        torch.testing.assert_close(product(x), torch.cat(expected, dim=1))
        for ours, part in zip(product.each(x), expected, strict=True):
            torch.testing.assert_close(ours, part)
    assert product.packed is not None


def test_a_layer_that_is_a_linear_one_and_more_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(12, 7), torch.randn(3, 12)
    product = decoder._Product(layer)
    product.pack()
    torch.testing.assert_close(product(x), layer(x))


def packed_parts(ours):
    return [part.packed is not None for part in ours.runner.decoder.parts]


def test_weights_are_packed_for_as_long_as_a_rollout_takes(qwen3):
    ours, expected = run(qwen3)
    assert not any(packed_parts(ours))
    groups = ours.generate(PROMPTS, SAMPLING)
    first = next(groups)
    assert all(packed_parts(ours)) and len(packed_parts(ours)) == 1 + 5 * qwen3.config.num_hidden_layers
    assert first.completion_ids == expected[first.prompt.draw].completion_ids
    groups.close()  # whoever asks for the groups may stop
    assert not any(packed_parts(ours))


def test_steps_are_of_few_sizes(qwen3, monkeypatch):
    """oneDNN keeps a kernel for each number of rows."""
    sizes, step = [], engine.Rollout._step
    monkeypatch.setattr(engine.Rollout, "_step", lambda self, shape: sizes.append(shape.rows) or step(self, shape))
    prompts = [Prompt([40 + draw], {"prompt": "?"}, draw) for draw in range(7)]
    packed = rollout(NativeEngine(prepared(qwen3)), prompts)
    assert {16, 24, 28} <= set(sizes) <= {*range(1, 9), 16, 24, 28}  # 28 is all of them
    sizes.clear()
    monkeypatch.setattr("grpo_trl.rollouts.native.weights.MOST_PACKED", 0)
    assert_same(rollout(NativeEngine(qwen3), prompts), packed)
    assert not set(sizes) <= {*range(1, 9), 16, 24, 28}


def test_rows_are_counted_beside_the_packed_weights(qwen3, monkeypatch):
    ours, seen = NativeEngine(prepared(qwen3)), []
    monkeypatch.setattr(engine, "groups_that_fit", lambda *_: seen.append(all(packed_parts(ours))) or 1)
    rollout(ours)
    assert seen == [True]


def test_packed_weights_are_those_of_now(qwen3):
    """Those of the norms too."""
    ours, before = run(qwen3)
    with torch.no_grad():
        for parameter in qwen3.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = rollout(ours)
    assert after != before
    assert_same(after, rollout(HFGenerateEngine(qwen3)))


def test_a_rollout_that_nobody_ended_leaves_later_ones_the_weights_of_now(qwen3):
    ours, _ = run(qwen3)
    abandoned = ours.generate(PROMPTS, SAMPLING)
    next(abandoned)
    with torch.no_grad():
        for parameter in qwen3.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_same(rollout(ours), rollout(HFGenerateEngine(qwen3)))
    with torch.autocast("cpu", torch.bfloat16):  # in which nothing is packed
        next(other := ours.generate(PROMPTS, SAMPLING))
        assert not any(packed_parts(ours))
        other.close()
    abandoned.close()
    assert not any(packed_parts(ours))


def test_what_cannot_be_packed(qwen3, monkeypatch):
    weights = list(qwen3.lm_head.parameters())
    assert may_be_packed(weights)
    quantized = type("Quantized", (torch.Tensor,), {"__tensor_flatten__": lambda self: ([], None)})
    for other in (weights[0].bfloat16(), weights[0].to("meta"), weights[0].as_subclass(quantized)):
        assert not may_be_packed([*weights, other])
    whole = weights[0].detach()
    assert joined([whole[:10], whole[10:]]) is not None
    assert joined([part.as_subclass(quantized) for part in (whole[:10], whole[10:])]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_be_packed(weights)
    with monkeypatch.context() as patch:

        class Memory:
            total = 8 * weights[0].nbytes

        patch.setattr("grpo_trl.rollouts.native.weights.virtual_memory", Memory)
        assert may_be_packed(weights)
        Memory.total -= 8
        assert not may_be_packed(weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not may_be_packed(weights)
    _, packed = run(qwen3)
    monkeypatch.setattr("grpo_trl.rollouts.native.weights.MOST_PACKED", 0)
    assert not may_be_packed(weights)
    ours = NativeEngine(prepared(qwen3))
    next(groups := ours.generate(PROMPTS, SAMPLING))
    assert not any(packed_parts(ours))
    groups.close()
    assert_same(rollout(ours), packed)


def test_adapters_are_not_packed():
    ours = NativeEngine(prepared(lora(build("qwen3"))))
    next(groups := ours.generate(PROMPTS, SAMPLING))
    plain = [part.packed is not None for part in ours.runner.decoder.parts if isinstance(part, decoder._Product)]
    assert plain == [part.plain for part in ours.runner.decoder.parts if isinstance(part, decoder._Product)]
    assert True in plain and False in plain
    groups.close()


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
