"""Tokenizers and models small enough to be built on the spot, shared by the tests.

The tokenizer is byte-level without merges: one token per byte, so that every text round-trips and lengths can be
worked out by hand. Models have seeded fp32 weights of a spread (0.2, not 0.02) at which the next-token distribution is
far from uniform: greedy tokens do not depend on rounding, and a KL or a gradient is not lost in noise.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, ENDOFTEXT, IM_START, IM_END, BOS, CLS, SEP = range(7)  # token ids; pad is 0, so that `if pad_token_id` would fail
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>", "[CLS]", "[SEP]"]
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
MAX_POSITIONS = 1024

CHAT_TEMPLATE = (
    "{{ bos_token if bos_token }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def tiny_tokenizer(
    chat: bool = True, bos: bool = False, pad_is_eos: bool = False, pair: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `VOCAB_SIZE` tokens, padding on the left.

    chat: ChatML template as Qwen3's (honours `enable_thinking`, `add_generation_prompt`), EOS `<|im_end|>`; otherwise
    no template and EOS `<|endoftext|>`. bos: the tokenizer prepends `<|bos|>`, and so does the template, as Llama's
    do. pad_is_eos: no pad token of its own. pair: `[CLS] a [SEP] b [SEP]` with token type ids and padding on the
    right, as DeBERTa's (EOS then is `[SEP]`, without `chat`); not together with `bos`.
    """
    if pair and bos:
        raise ValueError("pair=True puts [CLS] first; use bos=False.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
        )
    elif pair:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    eos_token = "<|im_end|>" if chat else "[SEP]" if pair else "<|endoftext|>"
    named = {"bos_token": "<|bos|>"} if bos else {"cls_token": "[CLS]", "sep_token": "[SEP]"} if pair else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=eos_token if pad_is_eos else "<|pad|>",
        padding_side="right" if pair else "left",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if pair
        else ["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_model(kind: str = "qwen3", vocab_size: int = VOCAB_SIZE, seed: int = 0, **config) -> PreTrainedModel:
    """A causal LM of two layers and hidden size 32 in fp32, eval mode; the same weights for the same arguments.

    kind: any `model_type` of a decoder, such as qwen3, llama, gemma (full attention), gemma2 and gemma3_text (sliding
    windows), gpt2 (learned positions). config: overrides of the model's configuration. The generation config ends a
    completion at `<|im_end|>` and at `<|endoftext|>`, as Qwen3's does.
    """
    model = _build(AutoModelForCausalLM, kind, seed, vocab_size=vocab_size, eos_token_id=IM_END, **config)
    model.generation_config.eos_token_id = [IM_END, ENDOFTEXT]
    model.generation_config.pad_token_id = PAD
    return model


def tiny_encoder_decoder(kind: str = "t5", seed: int = 0, **config) -> PreTrainedModel:
    """A `t5` or `bart` of two layers on each side, built as `tiny_model` is. Completions begin after the pad token."""
    sizes = {"d_model": 32, "vocab_size": VOCAB_SIZE, "decoder_start_token_id": PAD, "eos_token_id": ENDOFTEXT}
    return _build(AutoModelForSeq2SeqLM, kind, seed, **(sizes | config))


def tiny_reward_model(
    kind: str = "deberta-v2", vocab_size: int = VOCAB_SIZE, seed: int = 0, **config
) -> PreTrainedModel:
    """A sequence classifier with one label (`num_labels=...` overrides it), built as `tiny_model` is.

    kind: `deberta-v2` (an encoder; read by `tiny_tokenizer(chat=False, pair=True)`) or a decoder such as `qwen3`.
    """
    config.setdefault("num_labels", 1)
    return _build(AutoModelForSequenceClassification, kind, seed, vocab_size=vocab_size, **config)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path) -> str:
    """Writes both as `from_pretrained` reads them; returns the folder as a string."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": ENDOFTEXT,
}
GATED_DECODER = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
SIZES_OF_KIND = {
    "t5": {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "init_std": 0.2,
        "dropout": 0.0,
    },
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gemma2": GATED_DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": GATED_DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    # what microsoft/deberta-v3-* set
    "deberta-v2": {
        "intermediate_size": 64,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 32,
        "pooler_hidden_size": 32,
    },
}


def _build(auto_class, kind: str, seed: int, **config) -> PreTrainedModel:
    sizes = SIZES | SIZES_OF_KIND.get(kind, GATED_DECODER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(AutoConfig.for_model(kind, **(sizes | config)), dtype=torch.float32)
    return model.eval()
