import json
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo_trl.policy import attention, varlen
from grpo_trl.policy.attention import GroupLayout, branchwise_attention, merged_attention, no_mask, use_group_attention
from grpo_trl.policy.varlen import varlen_attention
from tests.tiny import save, tiny_model, tiny_tokenizer

# a prompt of one token shares nothing; a completion may be empty
SHARED, BRANCHES = [3, 0, 7, 2], [[2, 1, 5], [4, 1], [1, 0, 3], [0]]
NUM_TOKENS = sum(SHARED) + sum(map(sum, BRANCHES))


def queries_keys_values(heads=4, key_heads=2, size=16, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(1, NUM_TOKENS, heads, size), *[(1, NUM_TOKENS, key_heads, size)] * 2]
    # as transformers hands them over: heads first, but laid out token by token
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def visible():
    """(N, N): which tokens each token sees, written down from what a group is."""
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    start, branch = 0, sum(SHARED)
    for shared, lengths in zip(SHARED, BRANCHES, strict=True):
        prompt = range(start, start + shared)
        for token in prompt:
            mask[token, start : token + 1] = True
        for length in lengths:
            for token in range(branch, branch + length):
                mask[token, prompt] = True
                mask[token, branch : token + 1] = True
            branch += length
        start += shared
    return mask


def dense(query, key, value, layout, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=visible(), scale=scaling)


def pairs(query_offsets, key_offsets, max_query, max_key):
    """Slices of the queries and keys that belong together."""
    assert max_query == query_offsets.diff().max() and max_key == key_offsets.diff().max()
    slices = ([slice(*ends) for ends in pairwise(offsets.tolist())] for offsets in (query_offsets, key_offsets))
    return zip(*slices, strict=True)


def scores_of(query, key, causal, scaling):
    """(N, H, D), (M, Hk, D) -> (N, H, M)"""
    scores = torch.einsum("nhd,mhd->nhm", query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1))
    seen = torch.ones(len(query), len(key), dtype=torch.bool)
    assert not causal or len(query) == len(key)
    return (scores * scaling).masked_fill(~(seen.tril() if causal else seen)[:, None], -torch.inf)


def reference_flash(query, key, value, query_offsets, key_offsets, *args, scale):
    """What the kernel of variable length computes, on any device."""
    *longest, dropout, causal, _ = args
    assert dropout == 0
    out, lse = torch.zeros_like(query), query.new_full(query.shape[1::-1], torch.inf)
    for here, there in pairs(query_offsets, key_offsets, *longest):
        if there.start == there.stop:
            continue
        scores = scores_of(query[here], key[there], causal, scale)
        values = value[there].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        out[here] = torch.einsum("nhm,mhd->nhd", scores.softmax(-1), values)
        lse[:, here] = scores.logsumexp(-1).T
    return out, lse.to(torch.promote_types(lse.dtype, torch.float32)), None, None, None


def reference_flash_backward(grad, query, key, value, out, lse, query_offsets, key_offsets, *args, scale):
    """As FlashAttention does it (arXiv 2205.14135, algorithm 4), from the output and its log-sum-exp."""
    assert lse.is_contiguous()
    *longest, dropout, causal, _, _ = args
    assert dropout == 0
    repeats = query.shape[1] // key.shape[1]
    of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
    for here, there in pairs(query_offsets, key_offsets, *longest):
        keys, values = (x[there].repeat_interleave(repeats, dim=1) for x in (key, value))
        probs = (scores_of(query[here], key[there], causal, scale) - lse[:, here].T[..., None]).exp()
        delta = (grad[here] * out[here]).sum(-1, keepdim=True)
        of_scores = probs * (torch.einsum("nhd,mhd->nhm", grad[here], values) - delta) * scale
        of_query[here] = torch.einsum("nhm,mhd->nhd", of_scores, keys)
        for total, part in (
            (of_key, torch.einsum("nhm,nhd->mhd", of_scores, query[here])),
            (of_value, torch.einsum("nhm,nhd->mhd", probs, grad[here])),
        ):
            total[there] = part.unflatten(1, (-1, repeats)).sum(2)
    return of_query, of_key, of_value


def varlen_on_cpu(query, key, value, layout, scaling):
    return varlen_attention(query, key, value, layout.varlen_index, scaling)


@pytest.fixture
def kernel_on_cpu(monkeypatch):
    monkeypatch.setattr(varlen, "_flash", reference_flash)
    monkeypatch.setattr(varlen, "_flash_backward", reference_flash_backward)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("implementation", [branchwise_attention, merged_attention, varlen_on_cpu])
def test_values_and_gradients_are_those_of_a_dense_mask(implementation, key_heads, kernel_on_cpu):
    inputs = queries_keys_values(key_heads=key_heads)
    layout = GroupLayout(SHARED, BRANCHES)
    out, expected = (
        function(*(x.transpose(1, 2) for x in inputs), layout, 0.3) for function in (implementation, dense)
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, weights)
    for gradient, of_dense in zip(gradients, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(gradient, of_dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shared", "branches"), [([5], [[]]), ([5, 2], [[], []]), ([0], [[1]]), ([1], [[1]])])
def test_prompts_alone_and_single_tokens(shared, branches):
    layout = GroupLayout(shared, branches)
    n = sum(shared) + sum(map(sum, branches))
    query, key, value = (torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        merged_attention(query, key, value, layout, 1.0), branchwise_attention(query, key, value, layout, 1.0)
    )


@pytest.mark.parametrize("implementation", [merged_attention, varlen_on_cpu])
def test_16_bit_on_the_cpu(implementation, kernel_on_cpu):
    inputs = [x.detach().bfloat16().transpose(1, 2) for x in queries_keys_values()]
    layout = GroupLayout(SHARED, BRANCHES)
    out = implementation(*inputs, layout, 0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(*(x.float() for x in inputs), layout, 0.3), rtol=0.02, atol=0.02)


def test_merged_attention_keeps_no_copy_of_the_keys():
    inputs = [x.transpose(1, 2) for x in queries_keys_values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        merged_attention(*inputs, GroupLayout(SHARED, BRANCHES), 0.3)
    query, key, value = (x.numel() for x in inputs)
    assert sorted(saved) == sorted([query, key, value, query, query // 16])  # with the output and a number per query


def test_dropout_goes_to_sdpa():
    layout, inputs = GroupLayout(SHARED, BRANCHES), [x.transpose(1, 2) for x in queries_keys_values()]
    without = layout.attend(None, *inputs, scaling=0.3)
    torch.manual_seed(0)
    with_dropout = layout.attend(None, *inputs, scaling=0.3, dropout=0.5)
    assert not torch.allclose(without, with_dropout)
    torch.manual_seed(0)
    expected = branchwise_attention(*inputs, layout, 0.3, dropout=0.5).transpose(1, 2)
    assert torch.equal(with_dropout, expected)


# ---- Kernels of variable length ----


def test_varlen_index_by_hand():
    # a shared part of 2 and its branches of 1 and 2; a branch of 2 that shares nothing
    index = GroupLayout([2, 0], [[1, 2], [2]]).varlen_index
    assert [x.tolist() for x in index.causal[:2]] == [[0, 2, 3, 5, 7]] * 2 and index.causal[2:] == (2, 2)
    assert [x.tolist() for x in index.crossing[:2]] == [[0, 3, 5], [0, 2, 2]] and index.crossing[2:] == (3, 2)
    assert {x.dtype for part in (index.causal, index.crossing) for x in part[:2]} == {torch.int32}
    assert (index.num_shared, index.all_share) == (2, False)
    assert [x.tolist() for x in index.repeated.sequences[:2]] == [[0, 1, 3, 5], [0, 2, 4, 4]]
    assert index.repeated.places.tolist() == [0, 1, 0, 1]
    assert index.repeated.sum(torch.arange(8.0).view(4, 1, 2)).tolist() == [[[4, 6]], [[8, 10]]]
    assert index.to(torch.device("cpu")) is index


def test_a_varlen_index_moves_as_a_whole():
    index = GroupLayout(SHARED, BRANCHES).varlen_index
    copied = index.crossing.to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(copied[:2], index.crossing[:2], strict=True))
    index.to(torch.device("meta"))
    moved = (*index.causal[:2], *index.crossing[:2], *index.repeated.sequences[:2], index.repeated.places)
    assert {x.device.type for x in moved} == {"meta"}


@pytest.mark.parametrize(("shared", "branches"), [([5], [[]]), ([0], [[1]]), ([0, 0], [[2, 1], [3]])])
def test_nothing_crosses(shared, branches, kernel_on_cpu):
    layout = GroupLayout(shared, branches)
    assert layout.varlen_index.crossing is None
    n = sum(shared) + sum(map(sum, branches))
    inputs = [torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(varlen_on_cpu(*inputs, layout, 1.0), branchwise_attention(*inputs, layout, 1.0))


def test_kernels_of_variable_length_are_given_no_copy_of_the_keys(kernel_on_cpu):
    inputs = [x.transpose(1, 2) for x in queries_keys_values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        varlen_on_cpu(*inputs, GroupLayout(SHARED, BRANCHES), 0.3)
    query, key, value = (x.numel() for x in inputs)
    assert sorted(saved) == sorted([query, key, value, query, query // 16])


def test_this_torch_has_the_kernels_as_they_are_called():
    """By their schemas: names of what is given by name, and the number of the rest."""
    for kernel, given in ((varlen._flash, 10), (varlen._flash_backward, 14)):
        arguments = kernel.default._schema.arguments
        assert len([a for a in arguments if not a.kwarg_only]) == given
        assert "scale" in {a.name for a in arguments if a.kwarg_only}


# ---- In a model ----


def test_other_calls_of_the_model_are_undisturbed():
    plain, ours = tiny_model("qwen3"), tiny_model("qwen3")
    use_group_attention(ours)
    ids, mask = torch.arange(10, 34).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    assert torch.equal(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    assert torch.equal(ours(ids).logits, plain(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


def test_between_forward_and_backward_of_a_packed_call(qwen3):
    use_group_attention(qwen3)
    qwen3.gradient_checkpointing_enable({"use_reentrant": False})
    qwen3.train()
    layout, ids = GroupLayout([3], [[2, 2]]), torch.arange(10, 17)[None]
    inputs = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 3, 4]]), "attention_mask": no_mask(ids.device)}

    def gradient(between):
        qwen3.zero_grad()
        loss = qwen3(ids, **inputs, layout=layout, use_cache=False).logits.logsumexp(-1).sum()
        between()
        loss.backward()
        return qwen3.model.embed_tokens.weight.grad.clone()

    def generate():
        with torch.no_grad():
            qwen3(ids)
            qwen3.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)

    assert torch.equal(gradient(generate), gradient(lambda: None))


def test_what_is_saved_does_not_name_it(tmp_path, qwen3):
    use_group_attention(qwen3)
    folder = save(qwen3, tiny_tokenizer(), tmp_path)
    assert attention.GROUP_ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert type(qwen3).from_pretrained(folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "expected"),
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((9, 0), torch.float16, 256, True),
        ((7, 5), torch.bfloat16, 64, False),  # whose bf16 is emulated
        ((9, 0), torch.bfloat16, 100, False),
        ((9, 0), torch.bfloat16, 264, False),
        ((9, 0), torch.float32, 64, False),
    ],
)
def test_where_kernels_of_variable_length_run(capability, dtype, size, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    varlen.varlen_fits.cache_clear()
    assert varlen.varlen_fits(torch.device("cuda"), dtype, size) == expected
    assert not varlen.varlen_fits(torch.device("cpu"), dtype, size)
    varlen.varlen_fits.cache_clear()
