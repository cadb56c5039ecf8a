import re

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import disable_dropout, per_token_logps, prepare
from grpo_trl.policy.support import dynamic_rope_begins, obstacle, padding_gap
from grpo_trl.rollouts.native.engine import key_value_bytes
from tests.test_trainer import trainer
from tests.tiny import VOCAB_SIZE, tiny_model

GROUPS = [
    Group(Prompt([10, 11, 12, 13], {}, 0), [[20, 21, 22], [23]], [True, True]),
    Group(Prompt([30], {}, 1), [[31], [32, 33]], [True, True]),
]


def logps_of(model):
    with torch.no_grad():
        return per_token_logps(model, RolloutBatch.from_groups(GROUPS, pad_token_id=0))[0]


# what cannot be run on streams of groups, and why
FALLBACKS = {
    "gemma2": "layers of the kind sliding_attention",
    "gemma3_text": "layers of the kind sliding_attention",
    "mistral": "sliding window",
    "mamba": "layers of the kind linear_attention",
    "qwen3_next": "layers of the kind linear_attention",
    "bloom": "attention cannot be exchanged",
    "deepseek_v3": "its values have another size than its keys",
    "diffllama": "its layers attend more than once",
    "doge": "its masks are learned",
    "bart": "other ways than through attention",  # no configuration says so: found by trying
}
OWN = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mistral": {"sliding_window": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FALLBACKS)
def test_a_model_that_cannot_be_packed_is_padded(kind):
    plain, model = (tiny_model(kind, **OWN.get(kind, {})) for _ in range(2))
    reason = prepare(model)
    assert FALLBACKS[kind] in reason
    assert model.evaluation == "padded"
    torch.testing.assert_close(logps_of(model), logps_of(plain), rtol=1e-5, atol=1e-5)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "mamba", "qwen3_moe"])
def test_padding_changes_nothing_in_most_models(kind):
    model = tiny_model(kind)
    assert padding_gap(model) is None
    prepare(model)
    assert padding_gap(model) is None


def test_a_model_that_cannot_be_read_so_is_left_as_it_is(qwen3):
    class NeedsMask(type(qwen3)):
        def forward(self, input_ids, attention_mask, position_ids, **kwargs):
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)

    qwen3.__class__ = NeedsMask
    assert padding_gap(qwen3) is None


def test_a_model_that_padding_changes_is_named(tmp_path, caplog):
    """BART's decoder counts positions from the left, the padding too."""
    trainer(tmp_path, tiny_model("bart"), gradient_checkpointing=False)
    assert re.search(r"In BartForCausalLM padding or explicit positions change log-probabilities, by \d", caplog.text)


def test_a_model_whose_tokens_see_those_after_them_is_refused(tmp_path):
    assert padding_gap(tiny_model("bert", is_decoder=True)) is None
    with pytest.raises(
        ValueError, match=r"A token of BertLMHeadModel sees those after it .*where its config has is_decoder"
    ):
        trainer(tmp_path, tiny_model("bert"))


def test_a_model_without_gradient_checkpointing(tmp_path):
    model = tiny_model("ctrl")
    with pytest.raises(ValueError, match=r"CTRLLMHeadModel does not support gradient checkpointing, .*set gradient"):
        trainer(tmp_path, model, gradient_checkpointing=True)
    assert trainer(tmp_path, model, gradient_checkpointing=False)


def test_routers_are_without_noise():
    model = tiny_model("mixtral", router_jitter_noise=0.5, sliding_window=None).train()
    assert not torch.equal(logps_of(model), logps_of(model))
    disable_dropout(model)
    assert torch.equal(logps_of(model), logps_of(model))


OF_GEMMA_4 = {
    "vocab_size_per_layer_input": VOCAB_SIZE, "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
}  # fmt: skip


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
def test_layers_that_are_configured_one_by_one():
    model = tiny_model("gemma4_text", **OF_GEMMA_4)
    expected = logps_of(model)
    assert any(text in prepare(model) for text in ("configured one by one", "of the kind sliding_attention"))
    assert model.evaluation == "padded"
    torch.testing.assert_close(logps_of(model), expected, rtol=1e-5, atol=1e-5)
    keys = sum(
        layer.self_attn.k_proj.out_features for layer in model.model.layers if hasattr(layer.self_attn, "k_proj")
    )
    if getattr(model.config, "is_heterogeneous", False):
        assert key_value_bytes(model, 3) == 2 * 3 * keys * 4


def test_a_model_that_is_its_own_base_gives_logits():
    model = tiny_model(
        "llama4_text", intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=64, head_dim=8
    )
    expected = logps_of(model)
    assert "head cannot be run on chosen positions (AttributeError" in prepare(model)
    assert model.evaluation == "logits" and torch.equal(logps_of(model), expected)


def test_layers_that_attend_more_than_once_are_found_by_trying(monkeypatch):
    monkeypatch.setattr("grpo_trl.policy.support.obstacle", lambda model: None)
    model = tiny_model("diffllama")
    assert "attend more than once, and decoding keeps the keys of one" in prepare(model)
    assert model.evaluation == "padded" and model.config._attn_implementation == "sdpa"


def test_a_window_that_is_switched_off_is_none():
    assert prepare(tiny_model("mistral", sliding_window=None)) is None
    assert prepare(tiny_model("qwen2", sliding_window=4, use_sliding_window=False)) is None
    moe = tiny_model("qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=32)
    assert moe.config.sliding_window == 0 and prepare(moe) is None


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row(rope_type):
    extra = {"dynamic": {"factor": 2.0}, "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}[rope_type]
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **extra}
    model = tiny_model("llama", rope_parameters=parameters)
    assert f"({rope_type} RoPE) depend on the longest row" in prepare(model)
    assert dynamic_rope_begins(model.config) == 64 and dynamic_rope_begins(tiny_model("llama").config) is None


def test_a_run_that_goes_beyond_where_positions_depend_on_the_longest_row(tmp_path, caplog):
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    for longest in (48, 49):
        caplog.clear()
        model = tiny_model("llama", rope_parameters=parameters)
        trainer(tmp_path, model, max_prompt_length=longest, max_completion_length=16)
        assert ("Beyond 64 tokens the positions" in caplog.text) is (longest == 49)


def test_eager_attention_that_was_asked_for_stays(qwen3):
    qwen3.set_attn_implementation("eager")
    assert "'eager' was asked for" in prepare(qwen3)
    assert qwen3.config._attn_implementation == "eager"


def test_adapters():
    assert prepare(get_peft_model(tiny_model("qwen3"), LoraConfig())) is None
    prefix = get_peft_model(tiny_model("qwen3"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert "adds tokens to the prompt" in obstacle(prefix)


def test_a_head_with_more_to_it_gives_logits(qwen3):
    class Doubled(type(qwen3)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    qwen3.__class__ = Doubled
    expected = logps_of(qwen3)
    assert "head cannot be run on chosen positions (log-probabilities differ by" in prepare(qwen3)
    assert qwen3.evaluation == "logits"
    assert torch.equal(logps_of(qwen3), expected)


def test_a_second_time_changes_nothing(qwen3):
    assert prepare(qwen3) is None
    forward = qwen3.forward
    assert prepare(qwen3) is None
    assert qwen3.forward == forward


def test_modes_and_gradients_are_left_alone(qwen3):
    qwen3.train()
    qwen3.lm_head.eval()
    prepare(qwen3)
    assert qwen3.training and not qwen3.lm_head.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in qwen3.parameters())


def test_under_fsdp_the_first_rank_decides(qwen3, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    own = []

    def broadcast(found):
        own.extend(found)
        found[0] = None if len(own) == 1 else "rank 0 said so"

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert "(rank 0 said so)" in prepare(qwen3) and qwen3.evaluation == "padded"
    assert own == [None, None]  # this rank had nothing against either


def test_weights_that_are_not_there_cannot_be_tried():
    with torch.device("meta"):
        model = tiny_model("qwen3")
    assert prepare(model) is None
    assert model.evaluation == "packed"
