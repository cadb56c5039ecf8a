"""RMS norms with a backward pass of their own: the numbers of the layers' own, for less memory."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from grpo_trl.memory.tracker import LiveBytes
from grpo_trl.policy import prepare
from grpo_trl.policy.norms import rms_norm, short_rms_norm, use_short_norms
from tests.policy.test_packed import build, lora

EPSILON = 1e-5


def norm(size=24):
    module = LlamaRMSNorm(size, EPSILON)
    nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 5, 4, 24), (1, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_values_and_gradients(shape, scale):
    module, grad = norm(), torch.randn(shape)
    inputs = [(scale * torch.randn(shape)).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    expected, ours = (
        module(inputs[0]),
        short_rms_norm(inputs[1], weight := module.weight.detach().clone().requires_grad_(), EPSILON),
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(rms_norm(inputs[1], weight, EPSILON), expected)
    expected.backward(grad)
    ours.backward(grad)
    for found, wanted in ((inputs[1].grad, inputs[0].grad), (weight.grad, module.weight.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_gradients_to_fp64():
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: short_rms_norm(*inputs, EPSILON), (x.requires_grad_(), weight.requires_grad_())
    )


def test_inputs_that_do_not_lie_in_order():
    module, x = norm(), torch.randn(24, 7).t()
    results = []
    for function in (module, lambda y: short_rms_norm(y, module.weight, EPSILON)):
        y = x.detach().requires_grad_()
        function(y).t().cumsum(0).sum().backward()
        results.append(y.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("which", ["input", "weight"])
def test_only_what_is_trained_gets_a_gradient(which):
    x, weight = torch.randn(4, 24, requires_grad=which == "input"), torch.randn(24, requires_grad=which == "weight")
    short_rms_norm(x, weight, EPSILON).sum().backward()
    assert (x.grad is not None) == (which == "input") and (weight.grad is not None) == (which == "weight")


def test_nothing_but_the_input_is_kept():
    module, x = norm(512), torch.randn(256, 512, requires_grad=True)
    kept = {}
    for name, function in (("own", module), ("short", lambda y: short_rms_norm(y, module.weight, EPSILON))):
        with LiveBytes([x, module.weight]) as memory:
            out = function(x)
            kept[name] = memory.live - out.nbytes
            del out
    assert kept["short"] < 0.01 * x.nbytes < x.nbytes <= kept["own"]


def shortened(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module) and "norm" in name}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "olmo2"])
def test_prepared_models_use_them(kind):
    model = build(kind)
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    assert norms and not shortened(model)
    prepare(model)
    assert shortened(model) == norms
    again = copy.deepcopy(model)
    again.model.norm.weight.data.zero_()
    assert float(again.model.norm(torch.randn(2, 32)).abs().max()) == 0  # a copy's norm reads its own weight
    assert float(model.model.norm(torch.randn(2, 32)).abs().max()) > 0


def test_below_an_adapter():
    model = lora(build("qwen3"))
    prepare(model)
    assert len(shortened(model)) == 1 + 4 * model.config.num_hidden_layers


def test_other_norms_stay():
    gemma, gpt2 = build("gemma"), build("gpt2")  # 1 + weight; a layer norm
    gated = Qwen3NextRMSNormGated(24, eps=EPSILON)  # takes a second input
    for model in (gemma, gpt2, gated):
        use_short_norms(model)
        assert not shortened(model) and "forward" not in vars(model)


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1


def test_a_norm_that_only_looks_like_one_stays():
    model = nn.Sequential(norm(), Shifted(24, EPSILON), norm())
    with torch.device("meta"):
        model.append(LlamaRMSNorm(24, EPSILON))
    model.append(norm())
    model[-1].weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it on every rank
    model[-1].weight.ds_shape = torch.Size([24])
    use_short_norms(model)
    assert ["forward" in vars(module) for module in model] == [True, False, True, True, True]


def test_a_forward_that_was_replaced_stays():
    module = norm()
    module.forward = own = lambda hidden_states: hidden_states
    use_short_norms(module)
    assert module.forward is own


def test_a_weight_of_two_dimensions_and_none_stay():
    """One per head, say, whose gradient the short way does not make."""
    heads, bare = norm(), nn.Module()
    heads.weight, bare.variance_epsilon = nn.Parameter(torch.randn(4, 24)), EPSILON
    for module in (heads, bare):
        use_short_norms(module)
        assert "forward" not in vars(module)


def test_in_16_bit_the_layers_own_is_run():
    module, x = norm(), torch.randn(4, 24)
    plain = copy.deepcopy(module)
    use_short_norms(module)
    assert torch.equal(module(x.bfloat16()), plain(x.bfloat16()))
    module.bfloat16(), plain.bfloat16()
    assert torch.equal(module(x.bfloat16()), plain(x.bfloat16()))
    module(x.requires_grad_()).sum().backward()  # which the short way's kernel refuses
    assert x.grad is not None


def test_on_another_device_the_layers_own_is_run(monkeypatch):
    module = norm()
    use_short_norms(module.to("meta"))
    monkeypatch.setattr("grpo_trl.policy.norms.short_rms_norm", lambda *args: pytest.fail("on another device"))
    assert module(torch.randn(4, 24, device="meta")).device.type == "meta"


def test_for_decoding_in_16_bit_the_numbers_are_the_layers_own():
    module, x = norm().bfloat16(), (3e-3 * torch.randn(400, 24)).bfloat16()  # so small that epsilon counts
    assert torch.equal(rms_norm(x, module.weight, EPSILON), module(x))


def test_a_gradient_of_the_gradient_is_refused():
    x = torch.randn(4, 24, requires_grad=True)
    loss = short_rms_norm(x, torch.ones(24), EPSILON).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
