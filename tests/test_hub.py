"""`push_to_hub` against a stand-in of the Hub on this machine, which keeps what it is sent."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load

ROOT = Path(__file__).resolve().parent.parent

PUSHING = """
import sys

from datasets import Dataset

from grpo_trl import GRPOConfig, GRPOTrainer
from tests import tiny


def digits(completions, **kwargs):
    return [float(sum(character.isdigit() for character in text)) for text in completions]


args = GRPOConfig(
    output_dir=sys.argv[1],
    use_cpu=True,
    max_steps=1,
    num_iterations=1,
    per_device_train_batch_size=4,
    max_completion_length=4,
    gradient_checkpointing=False,
    report_to="none",
    logging_steps=1,
    save_strategy=sys.argv[2],
    save_steps=1,
    save_epochs=False,
    push_to_hub=True,
    hub_model_id="tester/tiny-grpo",
    hub_token="hf_token_of_mine",
)
trainer = GRPOTrainer(
    tiny.tiny_model(),
    digits,
    args,
    Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
    processing_class=tiny.tiny_tokenizer(chat=False),
)
trainer.train()
print("pushed", trainer.push_to_hub(dataset_name="tester/sums").oid)
"""


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it creates a model repository and commits small files to it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            request = json.loads(body)
            self.reply({"url": f"{self.server.url}/{request['organization']}/{request['name']}"})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.reply({"errors": [], "warnings": []})
        elif self.path == "/api/models/tester/tiny-grpo/preupload/main":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.reply({"files": modes})
        elif self.path == "/api/models/tester/tiny-grpo/commit/main":
            lines = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.commits.append({line["path"]: base64.b64decode(line["content"]) for line in lines})
            url = f"{self.server.url}/tester/tiny-grpo/commit/abc123"
            self.reply({"commitUrl": url, "commitOid": "abc123", "success": True})
        else:
            self.send_error(404, self.path)

    def do_GET(self):
        self.send_error(404, self.path)  # huggingface_hub asks for optional things, and does without

    def reply(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Requests are kept, not printed."""


PUSH = [
    ("/api/repos/create", "Bearer hf_token_of_mine"),
    ("/api/validate-yaml", "Bearer hf_token_of_mine"),
    ("/api/models/tester/tiny-grpo/preupload/main", "Bearer hf_token_of_mine"),
    ("/api/models/tester/tiny-grpo/commit/main", "Bearer hf_token_of_mine"),
]


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests, server.commits = f"http://127.0.0.1:{server.server_port}", [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_push_to_hub_uploads_the_model_and_its_card(tmp_path, hub, save_strategy):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PUSHING, str(tmp_path / "out"), save_strategy]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "pushed abc123" in run.stdout
    # with a checkpoint, that is pushed first
    assert hub.requests == (PUSH if save_strategy == "no" else [*PUSH, *PUSH[1:]])
    for files in hub.commits:
        assert {"model.safetensors", "config.json", "tokenizer.json", "training_args.bin", "README.md"} <= set(files)
        assert b"| digits | 1 |" in files["README.md"]
        assert not [name for name, content in files.items() if b"hf_token" in content]
    assert "lm_head.weight" in load(files["model.safetensors"])
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["tester/sums"]
    assert {"grpo_trl", "grpo"} <= set(card.data.tags)
    assert "# tiny-grpo" in card.text
    assert "shao2024deepseekmath" in card.text
