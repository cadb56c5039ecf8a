"""Encoder-decoders: padded, sampled by `model.generate`, with the numbers of each row alone."""

from dataclasses import replace

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModelForSeq2SeqLM, PrefixTuningConfig

from grpo_trl import GRPOTrainer
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.memory.models import PolicySpec, policy_of
from grpo_trl.policy import load_policy, per_token_logps, prepare
from grpo_trl.prompts import ending
from grpo_trl.rollouts import SamplingParams, make_engine
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from tests.test_trainer import config, dataset, logged, reward_vowels
from tests.tiny import ENDOFTEXT, IM_END, PAD, SEP, VOCAB_SIZE, save, tiny_encoder_decoder, tiny_model, tiny_tokenizer

KINDS = ["t5", "bart"]  # relative positions; absolute ones, counted from the first column
GROUPS = [
    Group(Prompt([10, 11, 12, 13, 14], {}, 0), [[20, 21, 22], [23]], [True, True]),
    Group(Prompt([30], {}, 1), [[31], [32, PAD, 33, 34]], [True, False]),
]
SAMPLING = SamplingParams(
    num_generations=3,
    max_completion_length=8,
    eos_token_ids=tuple(range(1, VOCAB_SIZE, 8)),  # so that lengths vary
    pad_token_id=PAD,
    seed=7,
)


def batch_of(groups):
    return RolloutBatch.from_groups(groups, pad_token_id=PAD)


def trainer(path, model, **options):
    tokenizer = tiny_tokenizer(chat=False, pair=True)  # [CLS] a [SEP]
    return GRPOTrainer(model, reward_vowels, config(path, **options), dataset(), processing_class=tokenizer)


def alone(model, prompt, completion, temperature=1.0):
    """By the bare ids: no padding, no mask, nothing shared."""
    config = model.generation_config
    start = [token for token in (config.decoder_start_token_id, config.forced_bos_token_id) if token is not None]
    decoded = torch.tensor([[*start, *completion[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0, len(start) - 1 :]
    logits = logits / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("forced", [None, 77])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_those_of_each_row_alone(kind, forced):
    models = [tiny_encoder_decoder(kind) for _ in range(2)]
    for model in models:
        model.generation_config.forced_bos_token_id = forced
    assert prepare(models[0]).startswith("it is an encoder-decoder")
    logps, entropies = per_token_logps(models[0], batch_of(GROUPS), temperature=0.7, with_entropy=True)
    rows = [(group.prompt.ids, ids) for group in GROUPS for ids in group.completion_ids]
    expected = [alone(models[1], *row, temperature=0.7) for row in rows]
    for row, one in zip(logps, expected, strict=True):
        torch.testing.assert_close(row[: len(one)], one, rtol=1e-5, atol=1e-5)
        assert not row[len(one) :].any()
    assert entropies.shape == (4, 4) and bool((entropies[:, 0] > 0).all())
    logps.square().sum().backward()
    torch.cat(expected).square().sum().backward()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in models
    )
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_batch_of_empty_completions_has_no_log_probabilities():
    groups = [Group(Prompt([10, 11], {}, 0), [[], []], [False, False])]
    logps, _ = per_token_logps(tiny_encoder_decoder("t5"), batch_of(groups))
    assert logps.shape == (2, 1) and not logps.any()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_does_not_depend_on_the_other_prompts_and_gives_the_updates_log_probabilities(kind):
    model = tiny_encoder_decoder(kind)
    engine = make_engine("native", model)
    assert isinstance(engine, HFGenerateEngine)
    prompts = [Prompt([10, 11, 12, 13, 14], {}, 0), Prompt([200], {}, 1)]
    sampling = replace(SAMPLING, repetition_penalty=1.3)
    together = list(engine.generate(prompts, SAMPLING))
    for penalised in (SAMPLING, sampling):
        found = list(engine.generate(prompts, penalised))
        for group in found:
            (single,) = engine.generate([group.prompt], penalised)
            assert single.completion_ids == group.completion_ids
    batch = batch_of(together)
    assert len(set(batch.completion_mask.sum(1).tolist())) > 1
    with torch.no_grad():
        logps, _ = per_token_logps(model, batch)
    torch.testing.assert_close(batch.sampling_per_token_logps, logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("forced", [None, 77])  # of mBART: the language
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(kind, forced):
    model = tiny_encoder_decoder(kind)
    model.generation_config.forced_bos_token_id = forced
    sampling = replace(SAMPLING, num_generations=1, temperature=0.0, eos_token_ids=(ENDOFTEXT,))
    (group,) = make_engine("hf_generate", model).generate([Prompt([10, 11, 12], {}, 0)], sampling)
    model.generation_config.forced_eos_token_id = None
    length = 8 + (forced is not None)
    expected = model.generate(torch.tensor([[10, 11, 12]]), max_new_tokens=length, do_sample=False)[0, 1:].tolist()
    assert group.completion_ids == [expected if forced is None else expected[1:]]
    with torch.no_grad():
        logps, _ = per_token_logps(model, batch_of([group]))
    greedy = batch_of([group]).sampling_per_token_logps
    torch.testing.assert_close(greedy, logps, rtol=0, atol=1e-4)


def test_a_run_says_so_and_its_prompts_end_as_the_tokenizer_ends_texts(tmp_path, caplog):
    result = trainer(tmp_path, tiny_encoder_decoder("t5"), beta=0.01, max_steps=2)
    (sentence,) = [record.message for record in caplog.records if "padded rows" in record.message]
    assert sentence.endswith("it is an encoder-decoder, whose prompts and completions are read by different layers.")
    ids = result.encode({"prompt": "ab[SEP]"}, 0).ids
    assert ids == result.encode({"prompt": "ab"}, 0).ids and ids[-1] == SEP and ids.count(SEP) == 1
    result.train()
    assert logged(result, "sampling/logp_gap")[0] < 1e-4
    assert logged(result, "kl")[0] == 0 < logged(result, "kl")[1]
    assert all(norm > 0 for norm in logged(result, "grad_norm"))


def test_a_decoders_prompt_does_not_end_so(tmp_path):
    assert ending(tiny_tokenizer(bos=True)) == []
    assert trainer(tmp_path, tiny_model("qwen3")).encode({"prompt": "ab"}, 0).ids[-1] != SEP


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21.2"),
    reason="adapters of encoder-decoders need PEFT 0.21.2 (transformers 5)",
)
def test_an_adapter_folder_is_loaded_with_its_base(tmp_path):
    base = save(tiny_encoder_decoder("t5"), tiny_tokenizer(), tmp_path / "base")
    given = LoraConfig(task_type="CAUSAL_LM")  # what TRL's command line says
    made = load_policy(base, config(tmp_path), peft_config=given)
    assert given.task_type == "CAUSAL_LM"
    made.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(str(tmp_path / "adapter"), config(tmp_path))
    assert isinstance(loaded, PeftModelForSeq2SeqLM)
    assert any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["vllm", "transformers_cb"])
def test_engines_that_go_on_from_prompts_are_refused(name, monkeypatch):
    monkeypatch.setattr("grpo_trl.rollouts.engine.check_vllm", lambda: None)  # which is not installed
    with pytest.raises(ValueError, match=rf"rollout_engine='{name}' goes on from prompts, and T5For.* is an encoder"):
        make_engine(name, tiny_encoder_decoder("t5"))


def test_a_model_without_a_first_token_is_refused():
    model = tiny_encoder_decoder("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration has no decoder_start_token_id; set"):
        per_token_logps(model, batch_of(GROUPS))


def test_positions_are_those_of_the_longer_side():
    engine = make_engine("hf_generate", tiny_encoder_decoder("bart", max_position_embeddings=8))
    prompt = [Prompt([10] * 8, {}, 0)]
    (group,) = engine.generate(prompt, replace(SAMPLING, eos_token_ids=(IM_END,)))
    assert max(map(len, group.completion_ids)) == 8
    with pytest.raises(ValueError, match="max_completion_length=9 need more than the 8 positions"):
        list(engine.generate(prompt, replace(SAMPLING, max_completion_length=9)))
    engine.model.generation_config.forced_bos_token_id = 77
    with pytest.raises(ValueError, match="need more than the 8 positions"):
        list(engine.generate(prompt, SAMPLING))


def test_a_prefix_is_refused(tmp_path):
    prefix = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="Prefix tuning of an encoder-decoder is not supported"):
        load_policy(tiny_encoder_decoder("t5"), config(tmp_path), peft_config=prefix)


def test_it_is_not_planned(tmp_path):
    path = save(tiny_encoder_decoder("t5"), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"is an encoder-decoder, which is not planned\. `grpo-trl check` runs it"):
        policy_of(PolicySpec(path), config(tmp_path))
