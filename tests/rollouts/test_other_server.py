"""The engine for another server that docs/rollouts.md shows, against a server with its two endpoints."""

import re
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from grpo_trl import ENGINES
from tests.conftest import ROOT
from tests.rollouts.vllm_server import Server, complete
from tests.test_trainer import logged, trainer
from tests.tiny import tiny_model


class SGLang(Server):
    """`/generate` and `/update_weights_from_disk` of SGLang, over a real model."""

    def answer(self, path, body):
        self.calls.append(path)
        if path == "/update_weights_from_disk":
            self.model = AutoModelForCausalLM.from_pretrained(body["model_path"])
            return 200, {"success": True, "message": ""}
        assert path == "/generate" and body["return_logprob"]
        given = body["sampling_params"]
        params = {
            "n": given["n"], "temperature": given["temperature"], "max_tokens": given["max_new_tokens"], "top_k": 0,
            "stop_token_ids": given["stop_token_ids"], "seed": len(self.calls),
        }  # fmt: skip
        rows = complete(self.model, body["input_ids"], params)
        found = [[[logp, token, None] for token, logp in zip(ids, logps, strict=True)] for ids, logps in rows]
        answers = [{"meta_info": {"output_token_logprobs": row}} for row in found]
        return 200, answers if given["n"] > 1 else answers[0]


@pytest.fixture
def code() -> str:
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*class SGLangEngine.*?)```", (ROOT / "docs/rollouts.md").read_text(), re.S
    )
    return block


def test_it_takes_40_lines(code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_a_run_with_it(tmp_path, code, monkeypatch):
    server = SGLang(tiny_model("qwen3", seed=1))
    try:
        scope = {}
        exec(code, scope)
        monkeypatch.setattr(scope["SGLangEngine"], "url", server.url)
        run = trainer(
            tmp_path, rollout_engine="sglang", sampler_correction="token_truncate", max_steps=3, num_iterations=1
        )
        run.train()
        prompts = [run.encode(row, draw) for draw, row in enumerate(run.train_dataset)]
        groups = list(run.engine.generate(prompts, replace(run.sampling, max_completion_length=3)))
        (single,) = run.engine.generate(prompts[:1], replace(run.sampling, num_generations=1))
    finally:
        ENGINES.pop("sglang", None)
        server.close()
    gaps = logged(run, "sampling/logp_gap")
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert server.calls.count("/update_weights_from_disk") == 3
    assert [group.prompt for group in groups] == prompts and len(single) == 1
    for group in groups:
        assert len(group) == run.args.num_generations
        assert all(len(ids) <= 3 for ids in group.completion_ids)
