"""Whole weights for a rollout. What needs ranks is in `tests/test_engines.py`."""

from types import SimpleNamespace

import pytest
import torch

from grpo_trl.rollouts import Replica, make_engine, make_replica, weights_for_generation
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from tests.tiny import tiny_model

IDS = torch.arange(10, 20)[None]


@pytest.mark.parametrize("tied", [False, True])
def test_a_replica_has_weights_for_the_time_of_a_rollout_only(tied):
    policy = tiny_model("qwen3", tie_word_embeddings=tied)
    replica = Replica(policy, torch.device("cpu"))
    assert not any(parameter.numel() for parameter in replica.model.parameters())
    for _ in range(2):
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.5)  # an update
        with replica.filled(policy) as whole, torch.no_grad():
            torch.testing.assert_close(whole(IDS).logits, policy(IDS).logits, rtol=0, atol=0)
            assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied
        assert not any(parameter.numel() for parameter in replica.model.parameters())
    assert all(parameter.numel() for parameter in policy.parameters())


def test_a_replica_stays_filled_for_the_outer_of_two_rollouts(qwen3):
    replica = Replica(qwen3, torch.device("cpu"))
    with replica.filled(qwen3) as whole, torch.no_grad():
        with replica.filled(qwen3) as inner:
            assert inner is whole
        torch.testing.assert_close(whole(IDS).logits, qwen3(IDS).logits, rtol=0, atol=0)
    assert not any(parameter.numel() for parameter in replica.model.parameters())
    abandoned = replica.filled(qwen3)
    abandoned.__enter__()
    with torch.no_grad():
        qwen3.lm_head.weight.mul_(1.5)
        with replica.filled(qwen3) as whole:
            torch.testing.assert_close(whole(IDS).logits, qwen3(IDS).logits, rtol=0, atol=0)


def accelerator(**plugins):
    """Of the plugins that an engine has."""
    state = SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None} | plugins)
    return SimpleNamespace(state=state, device=torch.device("cpu"))


def test_only_fsdp2_needs_a_replica(qwen3):
    assert make_replica(qwen3, accelerator()) is None
    assert make_replica(qwen3, accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=2))) is not None
    with pytest.raises(ValueError, match=r"fsdp_version=1: .* set fsdp_version: 2"):
        make_replica(qwen3, accelerator(fsdp_plugin=SimpleNamespace(fsdp_version=1)))


def test_nothing_can_be_sampled_before_an_engine_has_sharded_the_policy(qwen3):
    replica = Replica(qwen3, torch.device("cpu"))
    zero3 = accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    for engine, whole in ((zero3, None), (accelerator(), replica)):
        with (
            pytest.raises(RuntimeError, match="use eval_on_start instead of evaluate"),
            weights_for_generation(qwen3, engine, None, whole),
        ):
            pass


def test_weights_that_stay_in_shards_are_sampled_by_generate_and_a_sentence_says_so(qwen3, caplog):
    assert isinstance(make_engine("native", qwen3, sharded=True), HFGenerateEngine)
    assert "ds3_gather_for_generation=False leaves them in shards" in caplog.text
