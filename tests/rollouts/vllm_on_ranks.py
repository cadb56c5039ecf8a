"""`tests/train_on_ranks.py` where vLLM is the stand-in; a server is at the URL that the options name."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.rollouts.vllm_stand_in import installed, weights_without_cuda
from tests.train_on_ranks import main

if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        installed(Path(folder)),
        pytest.MonkeyPatch.context() as patch,
    ):
        weights_without_cuda(patch)
        main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
