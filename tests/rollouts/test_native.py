"""The native engine samples what `hf_generate` samples, whatever runs beside it."""

import logging
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

from grpo_trl.batch import Prompt, RolloutBatch
from grpo_trl.policy import causal_lm, per_token_logps, prepare
from grpo_trl.rollouts import EVAL_STREAM, SamplingParams, make_engine
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from grpo_trl.rollouts.native import NativeEngine, engine
from grpo_trl.rollouts.native.attention import Shape, attention_and_lse, products_and_lse
from grpo_trl.rollouts.native.cuda_graph import GraphedSteps, bucket
from grpo_trl.rollouts.native.decoder import Decoder
from grpo_trl.rollouts.native.engine import close_gaps, free_memory, groups_that_fit
from grpo_trl.rollouts.native.weights import LowPrecisionWeights, joined
from tests.policy.test_packed import KINDS, build, lora
from tests.tiny import IM_END, PAD, VOCAB_SIZE, tiny_model

MANY_EOS = tuple(range(1, VOCAB_SIZE, 8))  # one token in eight ends a completion, so that rows leave at all times
SAMPLING = SamplingParams(
    num_generations=4, max_completion_length=12, eos_token_ids=MANY_EOS, pad_token_id=PAD, seed=7
)
LENGTHS = (7, 1, 3, 11, 2, 7)
PROMPTS = [
    Prompt([(31 * draw + 7 * i) % (VOCAB_SIZE - 10) + 10 for i in range(length)], {"prompt": "?"}, draw=3 * draw)
    for draw, length in enumerate(LENGTHS)
]
EVERYTHING = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "truncated": {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.3},
    "history": {"logits_processors": (NoRepeatNGramLogitsProcessor(2),)},
}


def prepared(model):
    assert prepare(model) is None
    return model


def rollout(sampler, prompts=PROMPTS, sampling=SAMPLING):
    return {group.prompt.draw: group for group in sampler.generate(prompts, sampling)}


def assert_same(ours, expected, atol=1e-4):
    assert ours.keys() == expected.keys()
    for draw, group in expected.items():
        assert ours[draw].completion_ids == group.completion_ids
        assert ours[draw].terminated == group.terminated
        for logps, of_row in zip(ours[draw].sampling_per_token_logps, group.sampling_per_token_logps, strict=True):
            assert logps == pytest.approx(of_row, abs=atol)


def test_weights_in_16_bit_without_autocast():
    model = prepared(tiny_model("qwen3").to(torch.bfloat16))
    groups = rollout(NativeEngine(model))
    assert groups.keys() == {prompt.draw for prompt in PROMPTS}
    expected = rollout(HFGenerateEngine(model))
    first = [[ids[0] for ids in group.completion_ids] for group in groups.values()]
    hits = sum(
        a == b
        for ids, draw in zip(first, groups, strict=True)
        for a, b in zip(ids, (x[0] for x in expected[draw].completion_ids), strict=True)
    )
    assert hits >= 0.75 * 4 * len(PROMPTS)  # rounding moves some


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_as_hf_generate(kind, options):
    model, sampling = prepared(build(kind)), replace(SAMPLING, **options)
    expected = rollout(HFGenerateEngine(model), sampling=sampling)
    assert_same(rollout(NativeEngine(model), sampling=sampling), expected)
    # one group at a time, two with refill in another order, three in yet another
    for rows, order in ((4, [0, 1, 2, 3, 4, 5]), (8, [3, 1, 0, 5, 2, 4]), (13, [5, 4, 3, 2, 1, 0])):
        ours = NativeEngine(model, max_concurrent_rows=rows)
        assert_same(rollout(ours, [PROMPTS[i] for i in order], sampling), expected)


def test_lengths_vary_and_both_ends_occur(qwen3):
    groups = rollout(NativeEngine(prepared(qwen3)))
    lengths = Counter(len(ids) for group in groups.values() for ids in group.completion_ids)
    assert len(lengths) > 4 and lengths[1] and lengths[12]
    for group in groups.values():
        for ids, terminated in zip(group.completion_ids, group.terminated, strict=True):
            eos = [token in MANY_EOS for token in ids]
            assert not any(eos[:-1]) and eos[-1] == terminated
            assert terminated or len(ids) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_training_forward(kind):
    model = prepared(build(kind))
    sampling = replace(SAMPLING, temperature=0.7, max_completion_length=40)
    groups = list(NativeEngine(model).generate(PROMPTS, sampling))
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    with torch.no_grad():
        logps, _ = per_token_logps(model, batch, temperature=0.7)
    assert (logps - batch.sampling_per_token_logps)[batch.completion_mask.bool()].abs().max() < 1e-4


def test_adapters_act_without_being_merged():
    model = lora(build("qwen3"))
    base = rollout(NativeEngine(prepared(build("qwen3"))))
    expected = rollout(HFGenerateEngine(model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ours = rollout(make_engine("native", prepared(model)))
    assert_same(ours, expected)
    assert all(ours[draw].completion_ids != base[draw].completion_ids for draw in (0, 9, 15))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with model.disable_adapter():
        assert_same(rollout(NativeEngine(model)), base)


def test_weights_are_the_live_ones(qwen3):
    ours = NativeEngine(prepared(qwen3))
    before = rollout(ours)
    optimizer = torch.optim.SGD(qwen3.parameters(), lr=0.5)
    batch = RolloutBatch.from_groups(list(before.values()), pad_token_id=PAD)
    (per_token_logps(qwen3, batch)[0] * batch.completion_mask).mean().neg().backward()
    optimizer.step()
    after = rollout(ours)
    assert any(after[draw].completion_ids != before[draw].completion_ids for draw in after)
    assert_same(after, rollout(HFGenerateEngine(qwen3)))


def test_a_pass_over_prompts_has_so_many_tokens(qwen3, monkeypatch):
    expected, passes, layout = rollout(NativeEngine(prepared(qwen3))), [], engine.PromptLayout
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 6)
    monkeypatch.setattr(engine, "PromptLayout", lambda *args: passes.append(args[-1]) or layout(*args))
    assert_same(rollout(NativeEngine(qwen3)), expected)
    assert passes == [[7], [1, 3], [11], [2], [7]]


def test_each_prompt_is_run_once_and_rows_leave_at_once(qwen3):
    rows = []
    qwen3.model.layers[0].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))
    groups = rollout(NativeEngine(prepared(qwen3)))
    rows = rows[-12:]  # behind the trial runs of `prepare`
    lengths = [len(ids) for group in groups.values() for ids in group.completion_ids]
    assert rows[0] == (1, sum(LENGTHS))
    alive = [sum(length > step for length in lengths) for step in range(1, 12)]
    assert rows[1:] == [(n, 1) for n in alive]


def test_concurrency_is_bounded_and_groups_come_as_they_finish(qwen3):
    ours = NativeEngine(prepared(qwen3), max_concurrent_rows=9)
    rows = []
    qwen3.model.layers[0].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape))
    order = [group.prompt.draw for group in ours.generate(PROMPTS, SAMPLING)]
    assert sorted(order) == [prompt.draw for prompt in PROMPTS] and order != sorted(order)
    assert 4 < max(shape[0] for shape in rows) <= 8  # whole groups
    prefills = [shape[1] for shape in rows if shape[0] == 1 and shape[1] > 1]
    assert sum(prefills) >= sum(length for length in LENGTHS if length > 1)


def test_a_group_larger_than_the_bound_is_decoded_alone(qwen3):
    assert_same(rollout(NativeEngine(prepared(qwen3), max_concurrent_rows=1)), rollout(NativeEngine(prepared(qwen3))))


def test_rows_that_fit_follow_from_free_memory(qwen3, monkeypatch):
    # 2 (keys, values) x 100 tokens x 2 layers x 2 heads x 8 x 4 bytes = 25,600 bytes
    class Memory:
        available = 25_600 * 2 * 3 + 1

    monkeypatch.setattr("grpo_trl.rollouts.native.engine.virtual_memory", Memory)
    assert groups_that_fit(qwen3, 100, free_memory(qwen3.device)) == 3
    sampling = replace(SAMPLING, num_generations=2, max_completion_length=45)
    assert NativeEngine(qwen3)._memory(qwen3, 5, 10, sampling, kept=False).most.groups == 3


def test_nothing_random_is_touched_and_modes_are_restored(qwen3):
    qwen3.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    generator = NativeEngine(prepared(qwen3)).generate(PROMPTS, SAMPLING)
    next(generator)
    # where the consumer runs, between two groups, the model is as it was and gradients are on
    assert qwen3.training and torch.is_grad_enabled()
    list(generator)
    assert qwen3.training and torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_after_an_exception(qwen3):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("inside")

    prepared(qwen3).train()
    with pytest.raises(RuntimeError, match="inside"):
        rollout(NativeEngine(qwen3), sampling=replace(SAMPLING, logits_processors=(Broken(),)))
    assert qwen3.training and torch.is_grad_enabled()


def test_gradient_checkpointing_and_dropout_do_not_matter():
    expected = rollout(NativeEngine(prepared(build("qwen3"))))
    model = prepared(tiny_model("qwen3", attention_dropout=0.5)).train()
    model.gradient_checkpointing_enable()
    assert_same(rollout(NativeEngine(model)), expected)
    assert model.is_gradient_checkpointing


def test_processors_see_each_row_without_padding(qwen3):
    seen = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.extend(input_ids.tolist())
            return scores

    groups = rollout(NativeEngine(prepared(qwen3)), sampling=replace(SAMPLING, logits_processors=(Recorder(),)))
    expected = [
        [*group.prompt.ids, *ids[:t]]
        for group in groups.values()
        for ids in group.completion_ids
        for t in range(len(ids))
    ]
    assert Counter(map(tuple, seen)) == Counter(map(tuple, expected))


def test_seed_draw_and_stream_matter(qwen3):
    ours = NativeEngine(prepared(qwen3))
    base = rollout(ours, PROMPTS[:1])
    for sampling in (replace(SAMPLING, seed=8), replace(SAMPLING, stream=EVAL_STREAM)):
        assert rollout(ours, PROMPTS[:1], sampling)[0].completion_ids != base[0].completion_ids


@pytest.mark.parametrize("kind", ["gemma2", "mamba", "bloom"])
def test_models_that_it_cannot_run_are_left_to_generate(kind):
    model = tiny_model(kind, **({"n_layer": 2, "n_head": 4} if kind == "bloom" else {}))
    assert prepare(model) is not None
    assert isinstance(make_engine("native", model), HFGenerateEngine)


def test_generation_kwargs_are_left_to_generate(qwen3, caplog):
    sampling = replace(SAMPLING, generation_kwargs={"min_new_tokens": 6})
    groups = rollout(NativeEngine(prepared(qwen3)), sampling=sampling)
    assert_same(groups, rollout(HFGenerateEngine(qwen3), sampling=sampling))
    assert min(len(ids) for group in groups.values() for ids in group.completion_ids) >= 6


def test_too_many_positions_are_refused():
    model = prepared(tiny_model("gpt2", max_position_embeddings=16, n_positions=16))
    with pytest.raises(ValueError, match="need more than the 16 positions"):
        rollout(NativeEngine(model))


@pytest.fixture
def autocast():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    yield accelerator.autocast
    AcceleratorState._reset_state(True)


def test_bf16_autocast(autocast):
    model = prepared(build("qwen3"))
    with autocast():
        groups = rollout(NativeEngine(model))
    batch = RolloutBatch.from_groups(list(groups.values()), pad_token_id=PAD)
    mask = batch.completion_mask.bool()
    with torch.no_grad():
        exact, _ = per_token_logps(model, batch)
        with autocast():
            trained, _ = per_token_logps(model, batch)
    gap = (batch.sampling_per_token_logps - trained)[mask].abs().mean()
    # the engine rounds as the update does: no further from it than both are from fp32
    assert gap < 2 * (trained - exact)[mask].abs().mean() < 0.1


# ---- What CUDA needs, on the CPU ----


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("check_every", [3, 8])
def test_looking_late_at_who_has_ended(qwen3, check_every, rows, monkeypatch):
    expected = rollout(NativeEngine(prepared(qwen3)))
    monkeypatch.setitem(engine.CHECK_EVERY, "cpu", check_every)
    assert_same(rollout(NativeEngine(qwen3, max_concurrent_rows=rows)), expected)


def graphed_engine(model, captured, **options):
    """An engine that replays steps by running them again, with the sizes that they were captured with."""
    result = NativeEngine(model, **options)
    result.graphs = GraphedSteps(lambda: lambda step: captured.append(step) or step)
    return result


@pytest.mark.parametrize("rows", [None, 8])
def test_captured_steps(qwen3, rows, monkeypatch):
    monkeypatch.setitem(engine.CHECK_EVERY, "cpu", 4)
    expected = rollout(NativeEngine(prepared(qwen3)))
    captured = []
    ours = graphed_engine(qwen3, captured, max_concurrent_rows=rows)
    assert_same(rollout(ours), expected)
    # later rollouts of the same size capture at most what the first has only warmed up
    shapes = {shape for shape, _ in ours.graphs.graphs}
    assert {shape.rows for shape in shapes} <= {1, 2, 4, 8, 16, 24} and {shape.length for shape in shapes} == {12}
    assert_same(rollout(ours), expected)
    number = len(captured)
    assert number == len(shapes)
    assert_same(rollout(ours), expected)
    assert len(captured) == number


def test_graphs_outlive_an_update_in_place_but_not_a_move(qwen3):
    captured = []
    ours = graphed_engine(prepared(qwen3), captured)
    rollout(ours), rollout(ours)
    graphs = ours.graphs.graphs
    with torch.no_grad():
        for parameter in qwen3.parameters():
            parameter.mul_(1.1)
    assert_same(rollout(ours), rollout(NativeEngine(qwen3)))
    assert ours.graphs.graphs is graphs
    qwen3.lm_head.weight = torch.nn.Parameter(qwen3.lm_head.weight.clone())
    assert_same(rollout(ours), rollout(NativeEngine(qwen3)))
    assert ours.graphs.graphs is not graphs


def test_each_way_of_sampling_has_its_own_graphs(qwen3):
    """An evaluation between two rollouts, say: the same sizes, another temperature and other EOS tokens."""
    captured = []
    ours = graphed_engine(prepared(qwen3), captured)
    others = [SAMPLING, replace(SAMPLING, temperature=0.0), replace(SAMPLING, eos_token_ids=(IM_END,), seed=3)]
    for _ in range(3):
        for sampling in others:
            assert_same(rollout(ours, sampling=sampling), rollout(NativeEngine(qwen3), sampling=sampling))
    assert captured


def test_adapters_that_are_switched_off_are_off_in_graphs():
    model = prepared(lora(build("qwen3")))
    ours = graphed_engine(model, [])
    for _ in range(2):
        rollout(ours)
    graphs = ours.graphs.graphs
    with model.disable_adapter():
        assert_same(rollout(ours), rollout(NativeEngine(model)))
    assert ours.graphs.graphs is not graphs  # which hold the adapters
    assert_same(rollout(ours), rollout(NativeEngine(model)))


def test_a_step_that_cannot_be_captured_is_run(qwen3, caplog):
    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    ours = NativeEngine(prepared(qwen3))
    ours.graphs = GraphedSteps(lambda: fail)
    with caplog.at_level(logging.WARNING, "grpo_trl"):
        for _ in range(2):
            assert_same(rollout(ours), rollout(NativeEngine(qwen3)))
    assert caplog.text.count("not captured: operation not permitted") == 1


def test_the_memory_of_graphs_grows_and_is_kept(qwen3):
    ours = graphed_engine(prepared(qwen3), [])
    small, large = PROMPTS[:2], PROMPTS
    rollout(ours, small)
    first = ours.memory
    rollout(ours, large)
    assert ours.memory is not first
    addresses = [tensor.data_ptr() for tensor in ours.memory.tensors()]
    assert_same(rollout(ours, small), rollout(NativeEngine(qwen3), small))
    assert [tensor.data_ptr() for tensor in ours.memory.tensors()] == addresses
    longer = replace(SAMPLING, max_completion_length=20)
    assert_same(rollout(ours, large, longer), rollout(NativeEngine(qwen3), large, longer))
    assert NativeEngine(qwen3).memory is None  # without graphs it ends with the rollout


def test_a_rollout_within_a_rollout_has_memory_of_its_own(qwen3):
    """As of a tool's second turn, asked for while groups of the first are taken."""
    expected = rollout(NativeEngine(prepared(qwen3)))
    ours = graphed_engine(qwen3, [])
    rollout(ours)
    kept, inner, outer = ours.memory, [Prompt([40, 41, 42], {}, 100)], {}
    for group in ours.generate(PROMPTS, SAMPLING):
        outer[group.prompt.draw] = group
        assert_same(rollout(ours, inner), rollout(NativeEngine(qwen3), inner))
        assert all(part.packed is not None for part in ours.runner.decoder.parts)  # for the rest of the outer one
    assert_same(outer, expected)
    assert ours.memory is kept and ours.going_on == 0
    assert not any(part.packed for part in ours.runner.decoder.parts)


def test_rows_that_nobody_reads_do_not_count_against_the_decoder(qwen3, monkeypatch):
    """Those of a first step, some of whose rows have ended: on a GPU each way of decoding makes something else of
    them."""
    at_once = replace(SAMPLING, eos_token_ids=tuple(range(VOCAB_SIZE // 2)))
    expected = rollout(NativeEngine(prepared(qwen3)), sampling=at_once)
    own, spoiled = Decoder.__call__, []

    def decode(self, ids, positions, layout):
        logits = own(self, ids, positions, layout)
        spoiled.append(int((~layout.live).sum()))
        return torch.where(layout.live[:, None], logits, 1e3)

    monkeypatch.setattr(Decoder, "__call__", decode)
    ours = graphed_engine(qwen3, [])
    assert_same(rollout(ours, sampling=at_once), expected)
    assert spoiled[0] > 0 and ours.runner.decoder is not None


def test_steps_have_as_many_rows_whatever_came_before(qwen3):
    fresh, used = (graphed_engine(prepared(qwen3), []) for _ in range(2))
    rollout(used, PROMPTS)
    for ours in (fresh, used):
        ours.graphs.forget()
        rollout(ours, PROMPTS[:2])
    rows = [{shape.rows for shape, _ in ours.graphs.graphs} for ours in (fresh, used)]
    assert rows[0] == rows[1] and max(rows[0]) == 2 * SAMPLING.num_generations


def test_kept_memory_serves_training_and_evaluation(qwen3):
    ours = graphed_engine(prepared(qwen3), [])
    longer = replace(SAMPLING, max_completion_length=20)
    for prompts, sampling in ((PROMPTS, SAMPLING), (PROMPTS[:1], longer)):
        assert_same(rollout(ours, prompts, sampling), rollout(NativeEngine(qwen3), prompts, sampling))
    kept = ours.memory
    for prompts, sampling in ((PROMPTS, SAMPLING), (PROMPTS[:1], longer)):
        rollout(ours, prompts, sampling)
        assert ours.memory is kept


def test_kept_memory_for_both_is_no_smaller_than_each_needs(qwen3, monkeypatch):
    """Where memory is the limit each kind has its own, instead of one that is too small for both."""
    monkeypatch.setattr(engine, "groups_that_fit", lambda model, tokens, free: 120 // tokens)
    ours = graphed_engine(prepared(qwen3), [])
    longer = replace(SAMPLING, max_completion_length=20)
    sizes = []
    for prompts, sampling in ((PROMPTS, SAMPLING), (PROMPTS[:1], longer), (PROMPTS, SAMPLING), (PROMPTS, SAMPLING)):
        rollout(ours, prompts, sampling)
        sizes.append((ours.memory, ours.memory.most.groups))
    assert sizes[0][1] == sizes[2][1] > sizes[1][1] and sizes[3][0] is sizes[2][0]


def test_kept_memory_is_given_up_when_asked(qwen3):
    ours = NativeEngine(prepared(qwen3))
    ours.graphs = GraphedSteps(lambda: lambda step: step)
    assert not ours.release()  # nothing yet
    rollout(ours), rollout(ours)
    groups = ours.generate(PROMPTS, SAMPLING)
    next(groups)
    assert not ours.release()  # in use
    groups.close()
    former = weakref.ref(ours.memory)
    assert ours.release() and former() is None and not ours.graphs.graphs
    assert_same(rollout(ours), rollout(NativeEngine(qwen3)))
    assert not NativeEngine(qwen3).release()


def test_room_is_counted_in_the_dtype_of_autocast(qwen3):
    tokens = 100
    plain = groups_that_fit(qwen3, tokens, 2**30)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(groups_that_fit(qwen3, tokens, 2**30) - 2 * plain) <= 1


def test_experts_in_fp32_are_not_captured():
    captured = []
    for dtype, number in ((torch.float32, 0), (torch.bfloat16, 1)):
        ours = graphed_engine(prepared(build("qwen3_moe").to(dtype)), captured)
        rollout(ours), rollout(ours)
        assert (len(captured) > 0) == number


def test_a_first_step_that_did_not_end_is_no_warm_up():
    graphs, seen = GraphedSteps(lambda: lambda step: seen.append("captured") or step), []

    def step(shape):
        seen.append("run")
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphs.run(step, Shape(1, 1, 1, 1, 1))
    for _ in range(2):
        graphs.run(step, Shape(1, 1, 1, 1, 1))
    assert seen == ["run", "run", "captured", "run"]


def test_memory_that_runs_out_in_a_capture_is_not_the_end_of_them(qwen3, caplog):
    ours, tried = NativeEngine(prepared(qwen3)), []

    def capture(step):
        tried.append(step)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step

    ours.graphs = GraphedSteps(lambda: capture)
    with caplog.at_level(logging.WARNING, "grpo_trl"):
        for _ in range(4):
            assert_same(rollout(ours), rollout(NativeEngine(qwen3)))
    shapes = ours.graphs.graphs
    assert len(tried) == len(shapes) > 2 == len(ours.graphs.without_room) and ours.graphs.possible
    assert caplog.text.count("no memory for their graphs") == 1


def test_the_former_memory_is_gone_before_the_next_is_sized(qwen3, monkeypatch):
    """Graphs keep the steps that they were captured from, and those their rollout."""
    ours = NativeEngine(prepared(qwen3))
    ours.graphs = GraphedSteps(lambda: lambda step: step)
    rollout(ours), rollout(ours)
    assert ours.graphs.captured
    former, alive = weakref.ref(ours.memory), []
    size = engine.groups_that_fit
    monkeypatch.setattr(engine, "groups_that_fit", lambda *args: alive.append(former() is not None) or size(*args))
    longer = replace(SAMPLING, max_completion_length=20)
    assert_same(rollout(ours, sampling=longer), rollout(NativeEngine(qwen3), sampling=longer))
    assert alive[:2] == [True, False]  # asked whether it is large enough, then how large the next may be


def test_histories_are_not_captured(qwen3):
    captured = []
    sampling = replace(SAMPLING, repetition_penalty=1.3)
    ours = graphed_engine(prepared(qwen3), captured)
    assert_same(rollout(ours, sampling=sampling), rollout(NativeEngine(qwen3), sampling=sampling))
    assert not captured


def test_buckets():
    most = Shape(rows=24, groups=3, columns=8, prompt_length=100, length=300)
    assert bucket(Shape(5, 2, 4, 30, 7), most) == Shape(8, 2, 8, 100, 128)
    assert bucket(Shape(17, 3, 8, 30, 129), most) == Shape(24, 3, 8, 100, 256)
    assert bucket(Shape(1, 1, 1, 1, 290), most) == Shape(1, 1, 8, 100, 300)
    assert bucket(Shape(5, 2, 4, 30, 7), most, by_length=False) == Shape(8, 2, 8, 100, 300)


def test_graphs_that_are_forgotten_leave_nothing_to_the_next():
    graphs = GraphedSteps(lambda: lambda step: step)
    former = graphs.capture  # with the memory of the graphs
    graphs.without_room.add("a step")
    graphs.forget()
    assert graphs.capture is not former and not graphs.without_room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompt_attention_without_the_cpu_kernel(dtype):
    query, keys, values = (torch.randn(2, 2, n, 8, dtype=dtype) for n in (3, 5, 5))
    bias = torch.zeros(2, 1, 3, 5)
    bias[1, ..., 3:] = -torch.inf
    inputs = (query, keys, values, bias, 0.3)
    for ours, expected in zip(products_and_lse(*inputs), attention_and_lse(*inputs), strict=True):
        torch.testing.assert_close(ours, expected, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


def test_16_bit_copies_are_what_autocast_makes(autocast, monkeypatch):
    model = prepared(lora(build("qwen3")))
    own = dict(model.named_parameters())
    with autocast():
        expected = rollout(NativeEngine(model))
        monkeypatch.setattr(engine, "LOW_PRECISION_ON", {"cpu"})
        ours = NativeEngine(model)
        assert_same(rollout(ours), expected, atol=0)
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert ours.weights is None
    weights = LowPrecisionWeights(model, torch.bfloat16)
    with pytest.raises(RuntimeError, match="inside"), weights.active():
        dtypes = {type(m).__name__: m.weight.dtype for m in model.modules() if hasattr(m, "weight")}
        assert dtypes["Linear"] == torch.bfloat16
        assert dtypes["Embedding"] == dtypes["Qwen3RMSNorm"] == torch.float32
        raise RuntimeError("inside")
    assert all(own[name] is parameter for name, parameter in model.named_parameters())


def test_own_weights_are_back_when_a_signal_comes_while_they_are_put_back(qwen3, monkeypatch):
    own, weights = dict(qwen3.named_parameters()), LowPrecisionWeights(qwen3, torch.bfloat16)
    use, calls = weights._use, []

    def interrupted(given):
        calls.append(given)
        use(given)
        if len(calls) == 2:
            weights.layers[-1].weight = weights.copies[-1]  # as if it had not got there
            raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_use", interrupted)
    with pytest.raises(KeyboardInterrupt), weights.active():
        pass
    assert len(calls) == 3
    assert all(own[name] is parameter for name, parameter in qwen3.named_parameters())


def test_16_bit_copies_follow_the_weights(qwen3):
    weights = LowPrecisionWeights(qwen3, torch.bfloat16)
    with torch.no_grad():
        qwen3.lm_head.weight.mul_(2)
    addresses = [copy.data_ptr() for copy in weights.copies]
    weights.refresh()
    assert [copy.data_ptr() for copy in weights.copies] == addresses
    for layer, copy in zip(weights.layers, weights.copies, strict=True):
        assert torch.equal(copy, layer.weight.bfloat16())


def test_what_is_in_16_bit_or_does_more_than_a_linear_layer_gets_no_copy():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).bfloat16(), Doubled(8, 8))
    assert LowPrecisionWeights(model, torch.bfloat16).layers == [model[0]]


def test_16_bit_copies_are_where_their_weights_are():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, device="meta"), torch.nn.Linear(8, 8))
    devices = [copy.device.type for copy in LowPrecisionWeights(model, torch.bfloat16).copies]
    assert devices == ["cpu", "meta", "cpu"]


def test_16_bit_copies_of_neighbours_are_one_matrix(qwen3):
    weights = LowPrecisionWeights(qwen3, torch.bfloat16)
    attention, mlp, x = qwen3.model.layers[1].self_attn, qwen3.model.layers[1].mlp, torch.randn(3, 32).bfloat16()
    for modules in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        assert joined([module.weight for module in modules]) is None  # of parameters, each is by itself
        with weights.active():
            together = joined([module.weight for module in modules])
            assert torch.equal(together, torch.cat([module.weight for module in modules]))
            assert together.data_ptr() == modules[0].weight.data_ptr()
            assert joined([module.weight for module in reversed(modules)]) is None
    with weights.active():
        assert joined([mlp.up_proj.weight, mlp.down_proj.weight]) is None  # which read other inputs
        assert joined([x[:1], x[2:]]) is None and joined([x[:1].float(), x[1:]]) is None
        assert joined([x[:1], x.clone()[1:]]) is None  # of another memory
        assert joined([part.view(8, 4).t() for part in x.flatten()[:64].split(32)]) is None  # columns lie together
    assert torch.equal(joined([x[:1], x[1:]]), x)


def test_a_single_token(qwen3):
    sampling = replace(SAMPLING, max_completion_length=1, num_generations=1)
    groups = rollout(NativeEngine(prepared(qwen3)), sampling=sampling)
    assert all(len(ids) == 1 for group in groups.values() for ids in group.completion_ids)
    assert_same(groups, rollout(HFGenerateEngine(qwen3), sampling=sampling))


def test_gaps_are_closed_by_the_last():
    items = list("abcdef")
    assert close_gaps(items, [1, 3, 5]) == ([4], [1])
    assert items == ["a", "e", "c"]
    assert close_gaps(items, [0, 1, 2]) == ([], []) and items == []


def test_eos_of_the_generation_config_ends_a_greedy_completion(qwen3):
    sampling = replace(SAMPLING, eos_token_ids=(IM_END,), temperature=0.0, num_generations=1)
    assert_same(
        rollout(NativeEngine(prepared(qwen3)), sampling=sampling),
        rollout(HFGenerateEngine(causal_lm(qwen3)), sampling=sampling),
    )
