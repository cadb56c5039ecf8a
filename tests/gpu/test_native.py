"""The native engine on a GPU, with decoding steps captured and not, against `model.generate`."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from grpo_trl.batch import RolloutBatch
from grpo_trl.policy import per_token_logps
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from grpo_trl.rollouts.native import NativeEngine
from tests.policy.test_packed import KINDS as KINDS_OF_THE_LEARNER
from tests.policy.test_packed import lora
from tests.rollouts.test_native import EVERYTHING, PROMPTS, SAMPLING, assert_same, prepared, rollout
from tests.tiny import PAD, tiny_model

DEVICE = torch.device("cuda")
KINDS = ["qwen3", "llama", "gemma"]
LONG = replace(SAMPLING, max_completion_length=40, temperature=0.7)


def build(kind="qwen3", **options):
    return tiny_model(kind, head_dim=32, **options).to(DEVICE)


@pytest.fixture
def autocast():
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16").autocast
    AcceleratorState._reset_state(True)


def captured(engine):
    assert engine.runner.decoder is not None  # not given up: what is captured is the short one
    return [replay for replay in engine.graphs.graphs.values() if replay is not None]


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_as_hf_generate_in_fp32(kind, options):
    model, sampling = prepared(build(kind)), replace(SAMPLING, **options)
    expected = rollout(HFGenerateEngine(model), sampling=sampling)
    assert_same(rollout(NativeEngine(model), sampling=sampling), expected)
    graphed = NativeEngine(model, cuda_graphs=True, max_concurrent_rows=8)
    for _ in range(2):
        assert_same(rollout(graphed, sampling=sampling), expected)
    assert bool(captured(graphed)) == (not sampling.history_processors)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_training_forward(kind, cuda_graphs):
    model = prepared(build(kind))
    groups = list(NativeEngine(model, cuda_graphs=cuda_graphs).generate(PROMPTS, LONG))
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD).to(DEVICE)
    with torch.no_grad():
        logps, _ = per_token_logps(model, batch, temperature=LONG.temperature)
    assert (logps - batch.sampling_per_token_logps)[batch.completion_mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_rounds_as_the_update_does(kind, cuda_graphs, autocast):
    model = prepared(build(kind))
    engine = NativeEngine(model, cuda_graphs=cuda_graphs)
    for _ in range(2):
        with autocast():
            groups = rollout(engine, sampling=LONG)
        batch = RolloutBatch.from_groups(list(groups.values()), pad_token_id=PAD).to(DEVICE)
        mask = batch.completion_mask.bool()
        with torch.no_grad():
            exact, _ = per_token_logps(model, batch, temperature=LONG.temperature)
            with autocast():
                trained, _ = per_token_logps(model, batch, temperature=LONG.temperature)
        gap = (batch.sampling_per_token_logps - trained)[mask].abs().mean()
        assert gap < 2 * (trained - exact)[mask].abs().mean() < 0.1
    assert not cuda_graphs or captured(engine)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_bf16_weights(cuda_graphs):
    model = prepared(build().bfloat16())
    engine = NativeEngine(model, cuda_graphs=cuda_graphs)
    for _ in range(2):
        groups = rollout(engine, sampling=LONG)
        batch = RolloutBatch.from_groups(list(groups.values()), pad_token_id=PAD).to(DEVICE)
        with torch.no_grad():
            logps, _ = per_token_logps(model, batch, temperature=LONG.temperature)
        assert (logps - batch.sampling_per_token_logps)[batch.completion_mask.bool()].abs().mean() < 0.05


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_captured_steps_follow_the_weights(adapter):
    model = prepared(lora(build()) if adapter else build())
    engine = NativeEngine(model, cuda_graphs=True)
    before = [rollout(engine) for _ in range(2)][-1]
    graphs = captured(engine)
    assert graphs
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = RolloutBatch.from_groups(list(before.values()), pad_token_id=PAD).to(DEVICE)
    (per_token_logps(model, batch)[0] * batch.completion_mask).mean().neg().backward()
    optimizer.step()
    after = rollout(engine)
    assert any(after[draw].completion_ids != before[draw].completion_ids for draw in after)
    assert_same(after, rollout(HFGenerateEngine(model)))
    assert captured(engine)[: len(graphs)] == graphs  # an update in place does not move what they read
    if adapter:
        with model.disable_adapter():
            assert_same(rollout(NativeEngine(model, cuda_graphs=True)), rollout(HFGenerateEngine(model)))


def test_captured_steps_follow_16_bit_copies(autocast):
    """fp32 weights under autocast are decoded from copies, which graphs read where they are."""
    model = prepared(build())
    engine = NativeEngine(model, cuda_graphs=True)
    with autocast():
        before = [rollout(engine) for _ in range(2)][-1]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        after, plain = rollout(engine), rollout(NativeEngine(model))
    assert captured(engine)
    # the first token is the prefill's, the second that of a captured step
    first = [[ids[:2] for ids in groups[draw].completion_ids] for groups in (before, after, plain) for draw in plain]
    third = len(plain)
    assert first[third : 2 * third] == first[2 * third :] != first[:third]


def test_each_way_of_sampling_has_its_own_graphs():
    model = prepared(build())
    engine = NativeEngine(model, cuda_graphs=True)
    others = [SAMPLING, replace(SAMPLING, temperature=0.0), replace(SAMPLING, eos_token_ids=(2,), seed=3)]
    for _ in range(2):
        for sampling in others:
            assert_same(rollout(engine, sampling=sampling), rollout(NativeEngine(model), sampling=sampling))


def test_adapters_that_are_switched_off_are_off_in_graphs():
    model = prepared(lora(build()))
    engine = NativeEngine(model, cuda_graphs=True)
    on = [rollout(engine) for _ in range(2)][-1]
    with model.disable_adapter():
        for _ in range(2):
            assert_same(rollout(engine), rollout(HFGenerateEngine(model)))
    assert_same(rollout(engine), on)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2", "phi3"])
def test_models_that_are_decoded_by_their_own_layers(kind):
    """Captured where they can be (experts may wait for the device), right either way."""
    model = prepared(tiny_model(kind, **KINDS_OF_THE_LEARNER[kind]).to(DEVICE))
    engine = NativeEngine(model, cuda_graphs=True)
    for _ in range(3):
        assert_same(rollout(engine), rollout(HFGenerateEngine(model)))


def test_parameters_that_are_replaced_are_captured_anew():
    model = prepared(build())
    engine = NativeEngine(model, cuda_graphs=True)
    rollout(engine), rollout(engine)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    for _ in range(2):
        assert_same(rollout(engine), rollout(HFGenerateEngine(model)))


def test_memory_of_all_graphs_is_shared():
    """Many sizes are captured; what a step needs in between is there once, not once for each."""
    model = prepared(build(vocab_size=50_000))
    sampling = replace(SAMPLING, max_completion_length=300, eos_token_ids=tuple(range(1, 50_000, 100)))
    engine = NativeEngine(model, cuda_graphs=True)
    rollout(engine, sampling=sampling), rollout(engine, sampling=sampling)
    torch.cuda.synchronize()
    number, reserved = len(captured(engine)), torch.cuda.memory_reserved()
    rows = 4 * len(PROMPTS)
    of_a_step = 40 * rows * 50_000  # bytes: logits, probabilities, sums in fp64, and some
    assert number > 3
    kept = sum(tensor.nbytes for tensor in engine.memory.tensors())
    assert reserved < kept + sum(p.nbytes for p in model.parameters()) + 3 * of_a_step + 2**27
