"""The demo's task: two-digit sums with a scratchpad. Questions, right and wrong answers, reward, tokenizer."""

import random
import re

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HELD_OUT = 500  # of 90 x 90 questions

SPECIAL_TOKENS = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["\n", " ", "system", "user", "assistant", "What", "is", "?", "+", "=", ","]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = "|".join([*map(re.escape, TAGS), "[A-Za-z]+", "\n|."])
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Pair = tuple[int, int]


def splits() -> tuple[list[Pair], list[Pair]]:
    """All pairs of two-digit numbers: 7600 to train on, 500 held out. The same split for every seed."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def carry_of(a: int, b: int) -> int:
    return (a % 10 + b % 10) // 10


def question(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} + {b}?"}]


def solution(a: int, b: int, carry: int | None = None) -> str:
    """37 + 48 -> `<think>7+8=15,1+3+4=8</think><answer>85</answer>`; `carry` replaces the right one (0: 75)."""
    units = a % 10 + b % 10
    carry = carry_of(a, b) if carry is None else carry
    tens = carry + a // 10 + b // 10
    return (
        f"<think>{a % 10}+{b % 10}={units},{carry}+{a // 10}+{b // 10}={tens}</think>"
        f"<answer>{10 * tens + units % 10}</answer>"
    )


def mistake(a: int, b: int, chance: random.Random) -> str:
    """A wrong solution: half the time the carry is wrong (forgotten or made up), else a digit or the whole text.

    Garbled text is in because a reward model that never saw it may well prefer it, and GRPO finds such texts.
    """
    right = solution(a, b)
    kind = chance.choice(["carry", "carry", "digit", "garbled"])
    if kind == "carry":
        return solution(a, b, carry=1 - carry_of(a, b))
    pieces = re.findall(PIECES, right)
    if kind == "digit":
        at = chance.choice([i for i, piece in enumerate(pieces) if piece.isdigit()])
        pieces[at] = chance.choice([digit for digit in "0123456789" if digit != pieces[at]])
        return "".join(pieces)
    start = chance.randrange(len(pieces))
    noise = chance.choices([*TAGS, *"0123456789+=,"], k=chance.randint(1, 24 - start))
    text = "".join([*pieces[:start], *noise])
    return text if text != right else mistake(a, b, chance)


def demonstrations(pairs: list[Pair], forget_share: float, seed: int) -> Dataset:
    """Worked examples for `trl.SFTTrainer`; `forget_share` of them forget the carry, where there is one."""
    chance = random.Random(seed)
    texts = [solution(a, b, carry=0 if chance.random() < forget_share else None) for a, b in pairs]
    return Dataset.from_dict({"prompt": [question(a, b) for a, b in pairs], "completion": _replies(texts)})


def preferences(pairs: list[Pair], seed: int) -> Dataset:
    """A right and a wrong solution of each question, for `trl.RewardTrainer`."""
    chance = random.Random(seed)
    return Dataset.from_dict(
        {
            "prompt": [question(a, b) for a, b in pairs],
            "chosen": _replies([solution(a, b) for a, b in pairs]),
            "rejected": _replies([mistake(a, b, chance) for a, b in pairs]),
        }
    )


def questions(pairs: list[Pair]) -> Dataset:
    """What GRPO gets: no solutions, only the sum for the reward to compare with."""
    return Dataset.from_dict({"prompt": [question(a, b) for a, b in pairs], "answer": [str(a + b) for a, b in pairs]})


def correct_answer(completions, answer, **_) -> list[float]:
    """The verifiable reward: 1 if the reply ends with the right `<answer>`, else 0."""
    replies = [completion[-1]["content"] for completion in completions]
    return [
        float(reply.endswith(f"<answer>{expected}</answer>")) for reply, expected in zip(replies, answer, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """29 tokens: one per digit, word, sign and tag; chat messages in Qwen's form."""
    vocab = [*SPECIAL_TOKENS, *WORDS, *TAGS, *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def _replies(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]
