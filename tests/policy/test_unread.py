"""The last layer's MLP sees scored tokens only. That the numbers stay: test_packed.py."""

import copy
import pickle

import pytest
import torch

from grpo_trl.batch import Group, Prompt
from grpo_trl.policy import per_token_logps, prepare
from tests.policy.test_packed import batch_of, build, lora, ragged_groups
from tests.tiny import tiny_model

IDS = torch.arange(10, 34).view(2, 12)


@pytest.fixture
def batch():
    return batch_of(ragged_groups(4))


def seen_by_mlps(model, call):
    """Tokens in each forward of each layer's MLP."""
    seen = [[] for _ in model.base_model.layers]
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda _, args, out, counts=counts: counts.append(out.shape[-2]))
        for layer, counts in zip(model.base_model.layers, seen, strict=True)
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen


def shared_and_scored(batch):
    prompts = batch.prompt_mask.sum(1).tolist()
    shared = sum({group: length - 1 for group, length in zip(batch.group_ids.tolist(), prompts, strict=True)}.values())
    return shared, int(batch.completion_mask.sum())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_last_layer_leaves_out_prompts(kind, reentrant, batch):
    model = build("qwen3")
    outer = lora(model) if kind == "lora" else model
    prepare(outer)
    outer.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    shared, scored = shared_and_scored(batch)

    def update():
        per_token_logps(outer, batch)[0].sum().backward()

    *others, last = seen_by_mlps(model, update)
    times = 1 if reentrant is None else 2
    assert shared and others == [[shared + scored] * times] * len(others) and last == [scored] * times


def test_where_nothing_is_scored_the_layer_still_gets_tokens():
    model = tiny_model("llama")
    prepare(model)
    empty = batch_of([Group(Prompt([11, 12, 13], {}, 0), [[], []], [False, False])])
    *_, last = seen_by_mlps(model, lambda: per_token_logps(model, empty))
    assert last == [3]


def test_other_calls_are_undisturbed(batch):
    plain, ours = tiny_model("llama"), tiny_model("llama")
    prepare(ours)
    per_token_logps(ours, batch)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    *_, last = seen_by_mlps(ours, lambda: ours(IDS))
    assert last == [IDS.shape[1]]


def test_another_attention_afterwards_sees_all_tokens(batch):
    plain, ours = tiny_model("llama"), tiny_model("llama")
    prepare(ours)
    per_token_logps(ours, batch)
    ours.set_attn_implementation("sdpa")
    ids = torch.arange(10, 10 + 2 * shared_and_scored(batch)[0]).view(1, -1)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits)


def test_after_an_exception_between_attention_and_mlp(batch, monkeypatch):
    model = tiny_model("llama")
    prepare(model)
    ids = torch.arange(10, 10 + 2 * shared_and_scored(batch)[0]).view(1, -1)  # more than are left out
    expected = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[-1].post_attention_layernorm, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            per_token_logps(model, batch)
    assert torch.equal(model(ids).logits, expected)


def test_copies_call_their_own(batch):
    model = tiny_model("llama")
    prepare(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[-1].mlp.down_proj.weight.zero_()
    expected = per_token_logps(model, batch)[0]
    assert not torch.allclose(per_token_logps(twin, batch)[0], expected)
    assert torch.equal(per_token_logps(model, batch)[0], expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits)


def test_nothing_is_saved_twice():
    plain, ours = tiny_model("llama"), tiny_model("llama")
    prepare(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_other_layers_stay(kind):
    model = build(kind)
    assert prepare(model) is None
    assert not any(hasattr(module, "_unread") for module in model.modules())
