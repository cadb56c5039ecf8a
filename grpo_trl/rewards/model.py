"""A sequence-classification reward model as a reward function."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from ..placement import DeviceMap, freeze, input_device, place
from .text import completion_text, message_text

INPUT_FORMATS = ("auto", "pair", "chat", "text")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
_UNLIMITED = 10**6  # a tokenizer that knows no limit says 1e30


class RewardModel:
    """Scores completions by the one logit of a sequence classifier, in its own dtype, on its own device(s).

    Args:
        model: Hub id, path or instance. An instance is moved, set to eval mode and frozen.
        processing_class: fast tokenizer; default: the model's own.
        device_map: a device ("cuda:1") or an accelerate device map; default: CPU for a path, unmoved for an instance.
        dtype: default: the checkpoint's, the instance's.
        batch_size: rows per forward pass.
        max_length: tokens per row; default: what tokenizer and model allow.
        input_format:
            "chat": prompt and completion through the chat template, exactly one BOS;
            "pair": the tokenizer's text pair (question, answer), as OpenAssistant's reward-model-deberta-v3-large-v2
            reads it; question: the plain prompt, or the system text and the last user message, one empty line between;
            "text": prompt directly followed by completion (messages: their texts, one empty line between);
            "auto": "chat" if the tokenizer has a chat template, else "pair".
        model_init_kwargs: further arguments of `from_pretrained` (`revision`, `quantization_config`, ...).

    A row over `max_length` loses tokens from the left of its prompt (BOS and separators stay); the answer is cut, from
    its left too, only where it does not fit alone. `num_truncated` counts the last call's; `log_metric` gets their
    share as `rewards/<name>/truncated`.

    Raises:
        ValueError: more than one label, a checkpoint without a reward head, no tokenizer, no pad token.
    """

    in_process = True  # never sent to another process

    def __init__(
        self,
        model: str | PreTrainedModel,
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
        path = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            init_kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
            loaded = _load(model, device_map=_as_device_map(device_map), dtype=dtype, **init_kwargs)
        else:
            _check_one_label(model.config, path or type(model).__name__)
            loaded = _move(model, _as_device_map(device_map), dtype)
        if processing_class is None:
            if not path:
                raise ValueError("A reward model built in memory has no tokenizer of its own; pass processing_class.")
            processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.model: Any = freeze(loaded)
        self.tokenizer: Any = _with_pad_token(processing_class, path)
        # decoders find a row's last token by it; the tokenizer pads with it
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.batch_size = batch_size
        self.max_length = max_length or _longest_input(self.model, self.tokenizer)
        self.input_format = input_format if input_format != "auto" else _native_format(self.tokenizer)
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = path.rstrip("/").split("/")[-1] if path else type(model).__name__
        self.num_truncated = 0

    def __call__(
        self, prompts: list[Any], completions: list[Any], log_metric: Any = None, **kwargs: Any
    ) -> list[float]:
        """One score per row, in the order of the rows."""
        encodings = [self._encode(*row) for row in zip(prompts, completions, strict=True)]
        rows = [truncate_left(encoding, self.max_length, self.tokenizer.bos_token_id) for encoding in encodings]
        self.num_truncated = sum(
            len(row["input_ids"]) < len(encoding["input_ids"]) for row, encoding in zip(rows, encodings, strict=True)
        )
        if log_metric is not None:
            log_metric(f"rewards/{self.__name__}/truncated", self.num_truncated / max(1, len(rows)))
        # longest first: rows of like length share a batch, and an out-of-memory error comes at once
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, score in zip(chosen, self._forward([rows[index] for index in chosen]), strict=True):
                scores[index] = score
        return scores

    def _encode(self, prompt: Any, completion: Any) -> BatchEncoding:
        if self.input_format == "chat":
            text = self.tokenizer.apply_chat_template(
                _messages(prompt, "user") + _messages(completion, "assistant"),
                tokenize=False,
                **self.chat_template_kwargs,
            )
            return encode_with_one_bos(self.tokenizer, str(text))
        # a limit is applied afterwards (truncate_left), so the tokenizer need not warn about it
        if self.input_format == "pair":
            return self.tokenizer(_question(prompt), completion_text(completion), verbose=False)
        return self.tokenizer(_plain_text(prompt, completion), verbose=False)

    def _forward(self, rows: list[dict[str, list[int]]]) -> list[float]:
        batch = self.tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
        device = input_device(self.model)
        # the trainer's autocast must not reach a model with a dtype of its own
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            logits = self.model(**batch.to(device)).logits
        return logits[:, 0].float().tolist()


def truncate_left(encoding: BatchEncoding, max_length: int, bos_token_id: int | None = None) -> dict[str, list[int]]:
    """Drops tokens from the left of the first text, then of the second, until the row fits. Special tokens that the
    tokenizer added and a leading BOS stay."""
    ids = encoding["input_ids"]
    owners = encoding.sequence_ids(0)  # None: added by the tokenizer; 0, 1: first or second text
    excess = len(ids) - max_length
    removable = [index for owner in (0, 1) for index, of in enumerate(owners) if of == owner]
    if ids and ids[0] == bos_token_id:
        removable = [index for index in removable if index != 0]
    dropped = set(removable[: max(0, excess)])
    return {key: [v for index, v in enumerate(values) if index not in dropped] for key, values in encoding.items()}


def encode_with_one_bos(tokenizer: Any, text: str) -> BatchEncoding:
    """Tokenises templated text, which holds its special tokens already: one BOS if template or tokenizer has one."""
    bos = tokenizer.bos_token
    if bos:
        bare = text
        while bare.startswith(bos):
            bare = bare[len(bos) :]
        tokenizer_adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        text = bos + bare if tokenizer_adds_bos or bare != text else text
    return tokenizer(text, add_special_tokens=False, verbose=False)


def _load(path: str, **kwargs: Any) -> PreTrainedModel:
    config_kwargs = {key: value for key, value in kwargs.items() if key not in ("device_map", "dtype")}
    _check_one_label(AutoConfig.from_pretrained(path, **config_kwargs), path)
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{path} lacks the weights {', '.join(sorted(info['missing_keys']))}, so its scores would be random. "
            "Give a trained sequence-classification reward model (trl.RewardTrainer trains one)."
        )
    return model


def _check_one_label(config: Any, name: str) -> None:
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
    return min(tokenizer.model_max_length, positions, _UNLIMITED)


def _native_format(tokenizer: Any) -> str:
    return "chat" if tokenizer.chat_template else "pair"


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _question(prompt: Any) -> str:
    """The plain prompt, or system text and last user message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    by_role = {role: [m for m in prompt if m["role"] == role] for role in ("system", "user")}
    chosen = by_role["system"] + by_role["user"][-1:]
    return "\n\n".join(message_text(message["content"]) for message in chosen)


def _plain_text(prompt: Any, completion: Any) -> str:
    if isinstance(prompt, str):
        return prompt + completion_text(completion)
    messages = _messages(prompt, "user") + _messages(completion, "assistant")
    return "\n\n".join(message_text(message["content"]) for message in messages)
