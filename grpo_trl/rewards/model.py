"""A sequence-classification reward model as a reward function."""

import os
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import get_config_model_id

from ..placement import DeviceMap, check_map, freeze, input_device, place
from ..token_limit import TokenLimit, token_batches
from .model_inputs import INPUT_FORMATS, chat_text, encode_pair, encode_text, encode_with_one_bos, truncate_left

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
_UNLIMITED = 10**6  # a tokenizer that knows no limit says 1e30


class RewardModel:
    """Scores completions by the one logit of a sequence classifier, in its own dtype, on its own device(s).

    Args:
        model: Hub id, path (of a whole model or of a PEFT adapter) or instance. An instance is moved, set to eval mode
            and frozen.
        processing_class: fast tokenizer; default: the model's own.
        device_map: a device ("cuda:1") or an accelerate device map; default: CPU for a path, unmoved for an instance.
        dtype: default: the checkpoint's, the instance's.
        batch_size: a forward pass has at most the tokens of so many rows of the call's longest, padding included; more
            of the shorter ones. Out of memory halves it for good.
        max_length: tokens per row; default: what tokenizer and model allow.
        input_format:
            "chat": prompt and completion through the chat template, exactly one BOS;
            "pair": the tokenizer's text pair (question, answer), as OpenAssistant's reward-model-deberta-v3-large-v2
            reads it; question: the plain prompt, or the system text and the last user message, one empty line between;
            "text": prompt directly followed by completion (messages: their texts, one empty line between);
            "auto": "chat" if the tokenizer has a chat template, else "pair".
            A prompt that was put through a chat template before is text in each of them, and an assistant message that
            a prompt ends with is the beginning of the answer.
        model_init_kwargs: further arguments of `from_pretrained` (`revision`, `quantization_config`, ...).

    Each row is scored as the model scores it alone, where no padding is needed.
    A row over `max_length` loses tokens from the left of its prompt (BOS and separators stay); the answer is cut, from
    its left too, only where it does not fit alone. `num_truncated` counts the last call's; `log_metric` gets their
    share as `rewards/<name>/truncated`.

    Raises:
        ValueError: "chat" without a chat template, more than one label, a checkpoint without a reward head, no
            tokenizer or a slow one, neither a pad nor an EOS token.
    """

    in_process = True  # never sent to another process

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        device_map: str | torch.device | DeviceMap | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        input_format: str = "auto",
        trust_remote_code: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        if input_format not in INPUT_FORMATS:
            raise ValueError(f"input_format={input_format!r} is unknown; use one of {', '.join(INPUT_FORMATS)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 row per forward pass.")
        path = model if isinstance(model, str) else get_config_model_id(model.config)  # pyright: ignore[reportArgumentType]
        if isinstance(model, str):
            init_kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
            loaded = _load(model, device_map=_as_device_map(device_map), dtype=dtype, **init_kwargs)
            if isinstance(device_map, dict):
                check_map(loaded, device_map)
        else:
            check_one_label(model.config, path or type(model).__name__)
            loaded = _move(model, _as_device_map(device_map), dtype)
        if processing_class is None:
            if not path:
                raise ValueError("A reward model built in memory has no tokenizer of its own; pass processing_class.")
            source = {name: value for name, value in (model_init_kwargs or {}).items() if name == "revision"}
            processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **source)
        self.model: Any = freeze(loaded)
        self.tokenizer: Any = _with_pad_token(processing_class, path)
        self.batch_size = batch_size
        self.max_length = max_length or _longest_input(self.model, self.tokenizer)
        self.input_format = input_format if input_format != "auto" else _native_format(self.tokenizer)
        if self.input_format == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                f"input_format='chat' (reward_input_format) needs a chat template, and the tokenizer of reward model "
                f"{path} has none; use 'auto' or 'pair', or set tokenizer.chat_template."
            )
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = path.rstrip("/").split("/")[-1] if path else type(model).__name__
        self.limit = TokenLimit(f"reward model {self.__name__}")
        self.num_truncated = 0

    def __call__(
        self, /, prompts: list[Any], completions: list[Any], log_metric: Any = None, **kwargs: Any
    ) -> list[float]:
        """One score per row, in the order of the rows."""
        encodings = [self._encode(*row) for row in zip(prompts, completions, strict=True)]
        rows = [truncate_left(encoding, self.max_length, self.tokenizer.bos_token_id) for encoding in encodings]
        self.num_truncated = sum(
            len(row["input_ids"]) < len(encoding["input_ids"]) for row, encoding in zip(rows, encodings, strict=True)
        )
        if log_metric is not None:
            log_metric(f"rewards/{self.__name__}/truncated", self.num_truncated / max(1, len(rows)))
        lengths = [(len(row["input_ids"]),) for row in rows]
        most = self.batch_size * max(lengths, default=(0,))[0]

        def passes(tokens: int | None) -> list[list[int]]:
            return token_batches(lengths, most if tokens is None else min(most, tokens))

        def score() -> list[float]:
            scores = [0.0] * len(rows)
            for chosen in passes(self.limit.tokens):
                for index, value in zip(chosen, self._forward([rows[index] for index in chosen]), strict=True):
                    scores[index] = value
            return scores

        return self.limit.run(score, passes)

    def _encode(self, prompt: Any, completion: Any) -> BatchEncoding:
        if self.input_format == "chat":
            text = chat_text(self.tokenizer, prompt, completion, self.chat_template_kwargs)
            return encode_with_one_bos(self.tokenizer, text)
        encode = encode_pair if self.input_format == "pair" else encode_text
        return encode(self.tokenizer, prompt, completion)

    def _forward(self, rows: list[dict[str, list[int]]]) -> list[float]:
        batch = self.tokenizer.pad(
            rows, padding=True, padding_side="right", return_attention_mask=True, return_tensors="pt"
        )
        config = self.model.config.get_text_config()
        own, pad_token_id = config.pad_token_id, _pad_token(config.pad_token_id, rows)
        batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, pad_token_id)
        device = input_device(self.model)
        config.pad_token_id = pad_token_id
        try:
            # the trainer's autocast must not reach a model with a dtype of its own
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                logits = self.model(**batch.to(device)).logits
        finally:
            config.pad_token_id = own
        return logits[:, 0].float().tolist()


def _pad_token(own: int | None, rows: list[dict[str, list[int]]]) -> int:
    """The pad token of the model's config, by which decoders find a row's last token (the last that is another); where
    there is none, a token that no row ends with. Not the tokenizer's, which is often its EOS: of a row that ends with
    EOS, the token before it would be scored."""
    if own is not None and own >= 0:
        return own
    ends = {row["input_ids"][-1] for row in rows}
    return next(token for token in range(len(ends) + 1) if token not in ends)


def base_model(path: str) -> str:
    """The path or id itself, or that of the model that a PEFT adapter was trained on."""
    adapter = find_adapter_config_file(path)
    if adapter is None or os.path.isfile(os.path.join(os.path.dirname(adapter), "config.json")):
        return path
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {path} does not name its base model; set base_model_name_or_path in {adapter}.")
    return base


def _load(path: str, **kwargs: Any) -> PreTrainedModel:
    base = base_model(path)
    is_adapter = base != path
    if is_adapter:
        kwargs["num_labels"] = 1  # the base is often a causal LM, whose config does not know of labels
    else:
        config_kwargs = {key: value for key, value in kwargs.items() if key not in ("device_map", "dtype")}
        check_one_label(AutoConfig.from_pretrained(path, **config_kwargs), path)
    model, info = AutoModelForSequenceClassification.from_pretrained(base, output_loading_info=True, **kwargs)
    missing = info["missing_keys"]
    if is_adapter:
        missing = _load_adapter(model, path, missing)
    if missing:
        raise ValueError(
            f"{path} lacks the weights {', '.join(sorted(missing))}, so its scores would be random. "
            "Give a trained sequence-classification reward model (trl.RewardTrainer trains one)."
        )
    return model


def _load_adapter(model: Any, path: str, missing: set[str]) -> set[str]:
    """Adds the adapter to its base. Returns the weights that neither of them has: PEFT saves the head with the adapter
    (`modules_to_save`), since the base may have none."""
    info = model.load_adapter(path)
    saved = tuple(f"{name}." for config in model.peft_config.values() for name in config.modules_to_save or ())
    return {key for key in missing if not key.startswith(saved)} | info.missing_keys


def check_one_label(config: Any, name: str) -> None:
    """Raises a ValueError unless a classifier has one label, which is its score."""
    if config.num_labels != 1:
        raise ValueError(
            f"Reward model {name} has {config.num_labels} labels; expected one (a scalar reward). Use a reward model "
            "with num_labels=1, or write a reward function that turns the labels' scores into one number."
        )


def _as_device_map(device: str | torch.device | DeviceMap | None) -> Any:
    """One device as a device map; accelerate's own words ("auto", "balanced", ...) and maps stay."""
    is_device = isinstance(device, torch.device) or (isinstance(device, str) and device not in _SPREAD)
    return {"": device} if is_device else device


def _move(model: Any, device_map: Any, dtype: str | torch.dtype | None) -> Any:
    if isinstance(device_map, str):
        raise ValueError(f"device_map={device_map!r} works with a path; give an instance a device such as 'cuda:1'.")
    if dtype is not None:
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model if device_map is None else place(model, device_map)


def _with_pad_token(tokenizer: Any, path: str) -> Any:
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of reward model {path} is a slow one; a fast tokenizer is needed to truncate."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of reward model {path} has no pad and no EOS token; set pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _longest_input(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNLIMITED
    tables = (table for name, table in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    if padding is not None:  # RoBERTa, whose positions begin after that of the padding
        positions -= padding + 1
    return min(tokenizer.model_max_length, positions, _UNLIMITED)


def _native_format(tokenizer: Any) -> str:
    return "chat" if tokenizer.chat_template else "pair"
