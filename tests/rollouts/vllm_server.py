"""A server that speaks the endpoints of `vllm serve` which TRL's client uses, and answers with a real model.

What is not vLLM's own here is said where it is: sampling is a plain loop, and weights come over gloo instead of NCCL.
"""

import copy
import json
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed import ProcessGroupGloo, TCPStore

HOST = "127.0.0.1"


@torch.no_grad()
def complete(model: nn.Module, prompt: list[int], params: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """n completions and the log-probabilities of their tokens under what is sampled, as vLLM's processed_logprobs.
    Completion i has the seed + i, as in vLLM."""
    return [_complete_one(model, prompt, params, params["seed"] + i) for i in range(params["n"])]


def _complete_one(model: Any, prompt: list[int], params: dict[str, Any], seed: int) -> tuple[list[int], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    logps: list[float] = []
    while len(ids) < params["max_tokens"] and not (ids and ids[-1] in params["stop_token_ids"]):
        scores = model(torch.tensor([prompt + ids])).logits[0, -1].float() / (params["temperature"] or 1.0)
        if params["top_k"] > 0:
            scores[scores < scores.topk(params["top_k"]).values[-1]] = -torch.inf
        scores = scores.log_softmax(-1)
        token = scores.exp().multinomial(1, generator=generator) if params["temperature"] else scores.argmax(-1, True)
        ids.append(int(token))
        logps.append(float(scores[token]))
    return ids, logps


class Group:
    """Rank 0 (the trainer) sends bytes, rank 1 (the server) receives them."""

    def __init__(self, address: str, port: int, rank: int, world_size: int):
        self.store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=30))
        self.gloo: Any = ProcessGroupGloo(self.store, rank, world_size, timedelta(seconds=30))
        self.group = self  # where TRL finds what it closes
        self.socket = None

    def broadcast(self, data: torch.Tensor) -> torch.Tensor:
        self.gloo.broadcast(data, 0).wait()
        return data


class Server:
    """Listens on `url` until `close`. `requests` keeps the bodies of completions, `calls` the paths of all requests.

    Args:
        model: what answers; weights that are sent are copied into it.
        version, logprobs_mode, max_model_len, transfer, max_lora_rank: as `vllm serve` was started. Without a rank it
            has no LoRA.
        port: 0: any.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        version: str = "0.31.0",
        logprobs_mode: str = "processed_logprobs",
        max_model_len: int = 4096,
        transfer: bool = True,
        max_lora_rank: int | None = None,
        port: int = 0,
    ):
        self.model, self.version = model, version
        self.config = {
            "model_config": {"logprobs_mode": logprobs_mode, "max_model_len": max_model_len},
            "weight_transfer_config": {"backend": "nccl"} if transfer else None,
            "lora_config": None if max_lora_rank is None else {"max_lora_rank": max_lora_rank},
        }
        self.adapters: dict[str, nn.Module] = {}
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.failures = 0  # so many requests are answered with 503
        self.updating = False
        self.group: Group | None = None
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer((HOST, port), type("Handler", (_Handler,), {"server_of_model": self}))
        self.url = f"http://{HOST}:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status, and what is sent: JSON, or text."""
        self.calls.append(path)
        if self.failures:
            self.failures -= 1
            return 503, {"error": "overloaded"}
        constant = {
            "/health": {},
            "/version": {"version": self.version},
            "/v1/models": {"data": [{"id": "policy"}]},
            "/server_info": {
                "vllm_config": self.config,
                "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.config["lora_config"] is not None},
            },
            "/get_world_size": {"world_size": 1},
            "/reset_prefix_cache": {"success": True},
        }
        if path in constant:
            return 200, constant[path]
        answers = {
            "/v1/completions": self._completions,
            "/init_weight_transfer_engine": self._init_transfer,
            "/start_weight_update": self._start_update,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish_update,
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
        }
        return answers[path](body) if path in answers else (404, {"detail": "Not Found"})

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append(body)
        model = self.adapters.get(body["model"], self.model if body["model"] == "policy" else None)
        if model is None:
            return 404, {"error": f"The model `{body['model']}` does not exist."}
        with self.lock:
            rows = [(prompt, *row) for prompt in body["prompt"] for row in complete(model, prompt, body)]
        return 200, {"choices": [_choice(*row) for row in rows]}

    def _init_transfer(self, body: dict[str, Any]) -> tuple[int, Any]:
        info = body["init_info"]
        self.group = Group(info["master_address"], info["master_port"], info["rank_offset"], info["world_size"])
        return 200, {"message": "Weight transfer initialized"}

    def _start_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.updating = True
        return 200, {"message": "Weight update started"}

    def _update(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert self.updating and self.group is not None
        info = body["update_info"]
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            target = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(target.view(torch.uint8).flatten())
            load_weights(self.model, [(name, target)])
        return 200, {"message": "Weights updated"}

    def _finish_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.updating = False
        return 200, {"message": "Weight update finished"}

    def _load_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["lora_name"] in self.adapters:
            return 400, {"error": f"The lora adapter '{body['lora_name']}' has already been loaded."}
        adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"])
        config: Any = adapted.peft_config["default"]
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):  # vLLM knows no scaling but this one
                layer.scaling["default"] = config.lora_alpha / config.r
        self.adapters[body["lora_name"]] = adapted
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def _unload_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": f"The lora adapter '{body['lora_name']}' cannot be found."}
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."


@torch.no_grad()
def load_weights(model: nn.Module, weights: Any) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in weights:
        parameters[name].copy_(weight)


def _choice(prompt: list[int], ids: list[int], logps: list[float]) -> dict[str, Any]:
    tokens = [f"token_id:{token}" for token in ids]
    tops = [{token: logp} for token, logp in zip(tokens, logps, strict=True)]
    return {
        "prompt_token_ids": prompt,
        "token_ids": ids,
        "logprobs": {"tokens": tokens, "token_logprobs": logps, "top_logprobs": tops},
    }


class _Handler(BaseHTTPRequestHandler):
    server_of_model: Server

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._answer(json.loads(self.rfile.read(length) or b"{}"))

    def _answer(self, body: dict[str, Any]) -> None:
        status, content = self.server_of_model.answer(urlparse(self.path).path, body)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
