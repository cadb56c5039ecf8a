"""What JSON does not know of a value."""

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """For `json.dumps(default=...)`: numbers of numpy and torch as Python's, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def with_text_keys(value: Any) -> Any:
    """With keys of text: JSON knows few others, and no order of several kinds."""
    if isinstance(value, Mapping):
        return {str(key): with_text_keys(inner) for key, inner in value.items()}
    return [with_text_keys(inner) for inner in value] if isinstance(value, list | tuple) else value
