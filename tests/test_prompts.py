"""Prompts -> token ids with one BOS in each form; the length limit; the order of an epoch."""

import json
import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from grpo_trl.prompts import encode_prompt, limit_prompts, truncate_prompt
from tests.tiny import BOS, IM_START, tiny_tokenizer

USER = {"role": "user", "content": "Hi"}


def encode(prompt, tokenizer, *, columns=None, **kwargs):
    return encode_prompt({"prompt": prompt, **(columns or {})}, tokenizer, **kwargs)


def text_of(ids, tokenizer):
    return tokenizer.decode(ids)


def test_a_conversation_may_end_with_any_role():
    tokenizer = tiny_tokenizer()
    for role in ("system", "developer", "ipython"):  # all answered, as in TRL
        text = text_of(encode([USER, {"role": role, "content": "Go on"}], tokenizer)[0], tokenizer)
        assert text.endswith(f"<|im_start|>{role}\nGo on<|im_end|>\n<|im_start|>assistant\n")


def test_arguments_of_tool_calls_are_those_that_were_written():
    def calling(arguments):
        return {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]}

    rows = Dataset.from_list([{"prompt": [USER, calling(a), USER]} for a in ({"city": "Rome"}, {"x": 1, "y": [2, 3]})])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | tojson }}"
    for row, written in zip(rows, ({"city": "Rome"}, {"x": 1, "y": [2, 3]}), strict=True):
        _, seen = encode(row["prompt"], tokenizer)
        assert seen[1] == calling(written)


# --- exactly one BOS


@pytest.mark.parametrize("prompt", ["Hi", "<|bos|>Hi", "<|bos|><|bos|>Hi"])
def test_text_has_one_bos(prompt):
    tokenizer = tiny_tokenizer(bos=True)
    ids, seen = encode(prompt, tokenizer)
    assert text_of(ids, tokenizer) == "<|bos|>Hi"
    assert ids.count(BOS) == 1
    assert seen == prompt  # rewards see what the user wrote


@pytest.mark.parametrize("template_has_bos", [True, False])
def test_messages_have_one_bos(template_has_bos):
    tokenizer = tiny_tokenizer(bos=True)
    if not template_has_bos:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token if bos_token }}", "")
    ids, _ = encode([USER], tokenizer)
    assert text_of(ids, tokenizer) == "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(BOS) == 1


def test_templated_text_is_the_same_as_its_messages():
    tokenizer = tiny_tokenizer(bos=True)
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|bos|>")
    assert encode(text, tokenizer)[0] == encode([USER], tokenizer)[0]
    assert len(tokenizer(text)["input_ids"]) == len(encode(text, tokenizer)[0]) + 1  # the trap: two BOS


@pytest.mark.parametrize("prompt", ["Hi", "<|bos|>Hi", "<|bos|><|endoftext|>Hi", [USER]])
def test_several_tokens_that_begin_each_text_stand_there_once(prompt):
    tokenizer = tiny_tokenizer()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> <|endoftext|> $A", special_tokens=special
    )
    ids, _ = encode(prompt, tokenizer)
    assert ids[:2] == [id_ for _, id_ in special] and set(ids[2:]).isdisjoint(ids[:2])


def test_a_vocabulary_without_letters_has_its_bos():
    letters = models.BPE({"<s>": 0, "C": 1, "N": 2}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters), bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert encode("CN", tokenizer)[0] == [0, 1, 2]


def test_tokenizer_without_bos_gets_none():
    tokenizer = tiny_tokenizer(bos=False)
    assert text_of(encode("Hi", tokenizer)[0], tokenizer) == "Hi"
    assert encode([USER], tokenizer)[0][0] == IM_START


def test_gpt2_names_a_bos_but_adds_none():
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.bos_token = "<|endoftext|>"  # bos = eos, as GPT-2's
    assert text_of(encode("Hi", tokenizer)[0], tokenizer) == "Hi"
    assert text_of(encode("<|endoftext|>Hi", tokenizer)[0], tokenizer) == "<|endoftext|>Hi"


def test_eos_is_never_added():
    tokenizer = tiny_tokenizer(chat=False, pair=True)  # its post-processor ends every text with [SEP], its EOS
    assert tokenizer("Hi")["input_ids"][-1] == tokenizer.eos_token_id
    assert text_of(encode("Hi", tokenizer)[0], tokenizer) == "[CLS]Hi"


# --- templates


def test_system_prompt_makes_text_a_conversation(tokenizer):
    ids, seen = encode("Hi", tokenizer, system_prompt="Be brief.")
    assert seen == [{"role": "system", "content": "Be brief."}, USER]
    assert text_of(ids, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_system_prompt_leaves_a_systems_own_message(tokenizer):
    own = [{"role": "system", "content": "Own."}, USER]
    later = [USER, {"role": "system", "content": "Own."}, USER]
    for messages in (own, later):
        assert encode(messages, tokenizer, system_prompt="Be brief.")[1] == messages
    assert encode([USER], tokenizer, system_prompt="Be brief.")[1][0]["content"] == "Be brief."


@pytest.mark.parametrize(("prompt_format", "seen"), [("auto", "Hi"), ("text", "Hi"), ("chat", [USER])])
def test_prompt_format(tokenizer, prompt_format, seen):
    ids, prompt = encode("Hi", tokenizer, prompt_format=prompt_format)
    assert prompt == seen
    assert text_of(ids, tokenizer) == (
        "Hi" if seen == "Hi" else "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # messages go through the template in every format
    assert encode([USER], tokenizer, prompt_format=prompt_format)[1] == [USER]


def test_text_format_refuses_a_system_prompt_for_text(tokenizer):
    with pytest.raises(ValueError, match="prompt_format='chat'"):
        encode("Hi", tokenizer, prompt_format="text", system_prompt="Be brief.")


def test_an_assistants_last_message_is_continued(tokenizer):
    ids, _ = encode([USER, {"role": "assistant", "content": "Well,"}], tokenizer)
    assert text_of(ids, tokenizer) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"


def test_chat_template_kwargs_and_those_of_a_row(tokenizer):
    closed = "<think>\n\n</think>\n\n"
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert text_of(encode([USER], tokenizer, **kwargs)[0], tokenizer).endswith(closed)
    assert not text_of(encode([USER], tokenizer)[0], tokenizer).endswith(closed)
    assert text_of(encode([USER], tokenizer, columns=kwargs)[0], tokenizer).endswith(closed)
    row = {"chat_template_kwargs": {"enable_thinking": True}}
    assert not text_of(encode([USER], tokenizer, columns=row, **kwargs)[0], tokenizer).endswith(closed)
    # None is what Arrow puts where a row has no such key, or no such column, or another row's tool has others
    tokenizer.chat_template = "{{ tools_of_mine | tojson }}"
    tools = [[{"type": "x", "properties": {name: {"type": "string"}}}] for name in "ab"]
    rows = Dataset.from_list([{"chat_template_kwargs": {"tools_of_mine": each}} for each in tools])
    texts = [text_of(encode([USER], tokenizer, columns=row)[0], tokenizer) for row in rows]
    assert texts == [json.dumps(each) for each in tools]


def test_a_row_without_chat_template_kwargs_has_those_of_all(tokenizer):
    closed = "<think>\n\n</think>\n\n"
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    for empty in (None, {"enable_thinking": None, "other": None}):
        row = {"chat_template_kwargs": empty}
        assert text_of(encode([USER], tokenizer, columns=row, **kwargs)[0], tokenizer).endswith(closed)


def test_keys_that_arrow_filled_with_none_do_not_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | join('+') }}{% endfor %}"
    rows = Dataset.from_list([{"prompt": [USER, {**USER, "name": "Ann"}]}])
    assert rows[0]["prompt"][0]["name"] is None
    ids, seen = encode_prompt(rows[0], tokenizer)
    assert text_of(ids, tokenizer) == "role+contentrole+content+name"
    assert seen == [USER, {**USER, "name": "Ann"}]


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"has no chat template.*instruct model"):
        encode([USER], tiny_tokenizer(chat=False))


def test_a_last_message_that_the_template_changes_cannot_be_continued(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match=r"chat template refuses the prompt .*\(roles: user, assistant\): "):
        encode([USER, {"role": "assistant", "content": "Well,"}], tokenizer)


def test_messages_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ValueError, match=r"refuses the prompt .*\(roles: user, user\): System role not supported\. Change"
    ):
        encode([USER, USER], tokenizer)


@pytest.mark.parametrize("prompt", ["", "  ", None, 5, [], ["Hi"], [{"role": "user"}]])
def test_what_is_no_prompt(tokenizer, prompt):
    with pytest.raises(ValueError, match="Cannot encode the prompt"):
        encode(prompt, tokenizer)


# --- length


def test_truncation_keeps_the_end_and_the_bos():
    assert truncate_prompt([9, 1, 2, 3], 4, []) == [9, 1, 2, 3]
    assert truncate_prompt([9, 1, 2, 3], 2, []) == [2, 3]
    assert truncate_prompt([9, 1, 2, 3], 2, [9]) == [9, 3]
    assert truncate_prompt([9, 1, 2, 3], 1, [9]) == [9]
    assert truncate_prompt([9, 1, 2, 3], 2, [1]) == [2, 3]  # a BOS that is not first is an ordinary token
    assert truncate_prompt([9, 8, 1, 2, 3], 3, [9, 8]) == [9, 8, 3]
    assert truncate_prompt([9, 8, 1, 2, 3], 1, [9, 8]) == [9]


ROWS = [{"prompt": "ab"}, {"prompt": "abcd"}, {"prompt": "abc"}, {"prompt": "abcdef"}]
FORMS = [Dataset.from_list(ROWS), ROWS]


def length_of(example):
    return len(example["prompt"])


@pytest.mark.parametrize("dataset", FORMS, ids=["Dataset", "list"])
def test_overlong_prompts_of_map_style_datasets(dataset, caplog):
    limited = {"max_prompt_length": 3}
    kept = limit_prompts(dataset, length_of, **limited)
    assert [kept[i]["prompt"] for i in range(len(kept))] == ["ab", "abc"]
    assert "2 of 4 prompts are longer than max_prompt_length=3 tokens and are dropped" in caplog.text

    assert limit_prompts(dataset, length_of, overlong_prompts="truncate", **limited) is dataset
    assert "2 of 4 prompts are longer than max_prompt_length=3 tokens and are truncated" in caplog.text

    with pytest.raises(
        ValueError,
        match=r"^dataset: 2 of 4 prompts are \(row 2: 4 tokens, row 4: 6 tokens\) longer than max_prompt_length=3\.",
    ):
        limit_prompts(dataset, length_of, overlong_prompts="error", **limited)
    with pytest.raises(ValueError, match=r"^dataset: all 4 prompts are longer"):
        limit_prompts(dataset, length_of, max_prompt_length=1)


def test_no_limit_and_nothing_overlong(caplog):
    caplog.set_level(logging.INFO)
    for limit in (None, 6):
        for what in ("drop", "error", "truncate"):
            assert limit_prompts(ROWS, length_of, max_prompt_length=limit, overlong_prompts=what) is ROWS
    assert caplog.text == ""


def test_overlong_prompts_of_a_stream():
    def stream():
        return IterableDataset.from_generator(lambda: iter(ROWS))

    kept = limit_prompts(stream(), length_of, max_prompt_length=3)
    assert [row["prompt"] for row in kept] == ["ab", "abc"]
    every = limit_prompts(stream(), length_of, max_prompt_length=3, overlong_prompts="truncate")
    assert len(list(every)) == 4
    strict = limit_prompts(stream(), length_of, max_prompt_length=3, overlong_prompts="error")
    with pytest.raises(ValueError, match=r"^dataset: the prompt 'abcd' is \(4 tokens\) longer"):
        list(strict)
