"""Environment and fixtures shared by all tests: tiny models built on the spot, no network, one thread."""

import gc
import os
import signal
from pathlib import Path

# before torch and the Hugging Face libraries read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import tiny

# Many threads on tiny tensors only cost time, and sums of a fixed order make runs repeat bit for bit.
torch.set_num_threads(1)

# A job that a shell starts in the background ignores Ctrl-C, and Python then has no KeyboardInterrupt to raise.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish():
    """What imports leave is no garbage. accelerate looks through all of it whenever a training starts, which would be
    half of the time of a short one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    """ChatML tokenizer; for other forms call `tests.tiny.tiny_tokenizer`."""
    return tiny.tiny_tokenizer()


@pytest.fixture
def qwen3():
    """A fresh tiny Qwen3 in eval mode; the weights are the same in every test."""
    return tiny.tiny_model("qwen3")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """A saved tiny Qwen3 with its chat tokenizer, to be read only."""
    return tiny.save(tiny.tiny_model("qwen3"), tiny.tiny_tokenizer(), tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def reward_model_dir(tmp_path_factory) -> str:
    """A saved tiny DeBERTa-v2 classifier with one label and a tokenizer of text pairs, to be read only."""
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    return tiny.save(tiny.tiny_reward_model(), tokenizer, tmp_path_factory.mktemp("tiny-deberta"))


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K's train split as JSON lines (columns `question`, `answer`)."""
    path = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not path.exists():
        pytest.skip(f"needs GSM8K's train.jsonl at {path}")
    return path
