"""Which token of a row a reward model scores: the last one that the model would score in that row alone."""

import pytest
import torch

from grpo_trl.rewards import RewardModel
from tests import tiny

PROMPTS = ["How many?", "Why is the sky blue, and the sea too?", "Hm"]
COMPLETIONS = ["72", "Because of scattering.", ""]
KINDS = ["qwen3", "llama", "gpt2"]


def llama_style_tokenizer(pad_token=None):
    """Every row ends with the EOS token, as in Llama 3's template, and there may be no pad token."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.pad_token = pad_token
    return tokenizer


def score_of_last_token(model, ids) -> float:
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden)[0, -1, 0].item()


@pytest.mark.parametrize("pad_token", [None, "<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("pad_token_id", [None, -1, tiny.PAD])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_text_that_ends_with_eos_is_scored_at_its_eos(kind, pad_token_id, pad_token, batch_size):
    model = tiny.tiny_reward_model(kind)
    model.config.pad_token_id = pad_token_id
    reward = RewardModel(model, llama_style_tokenizer(pad_token), batch_size=batch_size)
    rows = [reward._encode(*row)["input_ids"] for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert [ids[-1] for ids in rows] == [tiny.IM_END] * 3
    expected = [score_of_last_token(model, ids) for ids in rows]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert model.config.pad_token_id == pad_token_id  # left as it was


def test_a_model_that_was_trained_with_eos_as_pad_token_scores_as_it_was_trained():
    """Its config says so; transformers then scores the token before EOS, in training as here."""
    model = tiny.tiny_reward_model("qwen3", pad_token_id=tiny.IM_END)
    reward = RewardModel(model, llama_style_tokenizer())
    rows = [torch.tensor([reward._encode(*row)["input_ids"]]) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits.item() for ids in rows]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_the_pad_token_is_none_that_a_row_ends_with():
    model = tiny.tiny_reward_model("qwen3", pad_token_id=None)
    tokenizer = tiny.tiny_tokenizer(chat=False)
    reward = RewardModel(model, tokenizer, input_format="text")
    # rows that end with the tokens of the lowest numbers, one of them being the tokenizer's pad token
    completions = ["<|pad|>", "a longer one <|endoftext|>", "<|im_start|>"]
    rows = [reward._encode("Hi", completion)["input_ids"] for completion in completions]
    assert [ids[-1] for ids in rows] == [0, 1, 2]
    expected = [score_of_last_token(model, ids) for ids in rows]
    assert reward(["Hi"] * 3, completions) == pytest.approx(expected, abs=1e-5)
