import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from tests import tiny

TEXT = "48/2 = <think>24</think>\n  “ü” 思\t"
KINDS = ["qwen3", "llama", "gemma", "gemma2", "gemma3_text", "gpt2"]
FORMS = [
    {},
    {"chat": False},
    {"bos": True},
    {"chat": False, "bos": True},
    {"pad_is_eos": True},
    {"chat": False, "pair": True},
]


@pytest.mark.parametrize("form", FORMS)
def test_any_text_round_trips_and_one_byte_is_one_token(form):
    tokenizer = tiny.tiny_tokenizer(**form)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer) == tiny.VOCAB_SIZE


def test_special_tokens_are_one_token_each():
    tokenizer = tiny.tiny_tokenizer()
    assert tokenizer("".join(tiny.SPECIAL_TOKENS)).input_ids == list(range(len(tiny.SPECIAL_TOKENS)))
    assert tokenizer.decode(range(len(tiny.SPECIAL_TOKENS)), skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "form, eos, pad",
    [
        ({}, tiny.IM_END, tiny.PAD),
        ({"chat": False}, tiny.ENDOFTEXT, tiny.PAD),
        ({"pad_is_eos": True}, tiny.IM_END, tiny.IM_END),
    ],
)
def test_eos_and_pad(form, eos, pad):
    tokenizer = tiny.tiny_tokenizer(**form)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (eos, pad)
    batch = tokenizer(["ab", "a"], padding=True)
    assert batch.attention_mask == [[1, 1], [0, 1]]
    assert batch.input_ids[1][0] == pad


def test_chat_template_honours_its_switches():
    tokenizer = tiny.tiny_tokenizer()
    messages = [{"role": "user", "content": "2+2"}]
    plain = "<|im_start|>user\n2+2<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == plain
    opened = plain + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == opened
    closed = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert closed == opened + "<think>\n\n</think>\n\n"


def test_bos_is_added_by_the_tokenizer_and_by_the_template():
    tokenizer = tiny.tiny_tokenizer(bos=True)
    assert tokenizer("a").input_ids[0] == tiny.BOS
    assert tokenizer("a").input_ids.count(tiny.BOS) == 1
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered.startswith("<|bos|>")
    assert tiny.BOS not in tiny.tiny_tokenizer()("a").input_ids


def test_pair_tokenizer_separates_question_and_answer():
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    batch = tokenizer("ab", "c")
    assert [batch.input_ids[i] for i in (0, 3, 5)] == [tiny.CLS, tiny.SEP, tiny.SEP]
    assert batch.token_type_ids == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_tokenizer_saved_and_loaded_is_the_same(form, tmp_path):
    tokenizer = tiny.tiny_tokenizer(**form)
    path = tiny.save(tiny.tiny_model("qwen3"), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(path)
    for arguments in [(TEXT,), (TEXT, "second")]:
        expected: BatchEncoding = tokenizer(*arguments)
        assert loaded(*arguments).data == expected.data
    assert loaded.decode(loaded(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == tokenizer.padding_side


@pytest.mark.parametrize("kind", KINDS)
def test_model_saved_and_loaded_generates_the_same(kind, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_model(kind)
    loaded = AutoModelForCausalLM.from_pretrained(tiny.save(model, tokenizer, tmp_path))
    assert loaded.generation_config.eos_token_id == [tiny.IM_END, tiny.ENDOFTEXT]
    assert loaded.generation_config.pad_token_id == tiny.PAD
    batch = tokenizer(["12+34=", "1+2="], return_tensors="pt", padding=True)
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    assert expected.shape[1] > batch.input_ids.shape[1]
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_token_is_far_from_uniform_and_far_from_certain(kind):
    logits = tiny.tiny_model(kind)(**tiny.tiny_tokenizer()("12+34=", return_tensors="pt")).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert 1.0 < entropy < 5.3  # uniform: ln 263 = 5.57


def test_weights_depend_on_the_seed_only():
    first, again, other = tiny.tiny_model(), tiny.tiny_model(), tiny.tiny_model(seed=1)
    state = torch.random.get_rng_state()
    tiny.tiny_model()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("kind", ["deberta-v2", "qwen3"])
def test_reward_model_saved_and_loaded_scores_the_same(kind, tmp_path):
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    model = tiny.tiny_reward_model(kind)
    loaded = AutoModelForSequenceClassification.from_pretrained(tiny.save(model, tokenizer, tmp_path))
    batch = tokenizer(["2+2", "3"], ["4", "5"], return_tensors="pt", padding=True)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    scores = model(**inputs).logits
    assert scores.shape == (2, 1)
    assert (scores[0] - scores[1]).abs().item() > 1e-3
    # not bit for bit: a weight mapped from a file may be aligned otherwise, which changes the order of the sums
    torch.testing.assert_close(loaded(**inputs).logits, scores, rtol=0, atol=1e-5)


def test_fixtures(qwen3, tokenizer, model_dir, reward_model_dir):
    ids = tokenizer("1+1=", return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.testing.assert_close(loaded(ids).logits, qwen3(ids).logits, rtol=0, atol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(reward_model_dir).config.num_labels == 1
