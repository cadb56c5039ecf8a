import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_trl import GRPOConfig
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import freeze_adapter, load_policy, per_token_logps
from grpo_trl.policy.loading import _add_adapter, is_quantized, policy_device_map
from tests.tiny import IM_END, PAD, save, tiny_model, tiny_tokenizer


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


@pytest.fixture
def config(tmp_path):
    def make(**options):
        fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
        return GRPOConfig(str(tmp_path / "out"), **(fixed | options))

    return make


def batch():
    group = Group(Prompt([10, 11, 12], {}, draw=0), [[20, 21, IM_END], [30, 31]], [True, False])
    return RolloutBatch.from_groups([group], pad_token_id=PAD)


def test_path_is_loaded_on_one_device(config, model_dir):
    args = config()
    model = load_policy(model_dir, args)
    assert args.device.type == "cpu"
    assert policy_device_map(args) == {"": args.device}  # never "auto"
    assert getattr(model, "hf_device_map", {"": args.device}) == {"": args.device}
    assert {parameter.device for parameter in model.parameters()} == {args.device}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, weight in tiny_model("qwen3").state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_instance_is_taken_as_it_is(config, qwen3):
    weights = {name: weight.clone() for name, weight in qwen3.state_dict().items()}
    assert load_policy(qwen3, config()) is qwen3
    assert all(torch.equal(qwen3.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_model_init_kwargs(config, model_dir, dtype):
    model = load_policy(model_dir, config(model_init_kwargs={"dtype": dtype, "attn_implementation": "eager"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_the_base_of_an_adapter_is_in_fp32_whatever_its_file_is(config, tmp_path):
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    for options, dtype in (({}, torch.float32), ({"model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16)):
        model = load_policy(str(tmp_path / "adapter"), config(**options))
        assert isinstance(model, PeftModel)
        assert {p.dtype for name, p in model.named_parameters() if "lora" not in name} == {dtype}


def test_model_init_kwargs_may_choose_the_devices(config, model_dir):
    model = load_policy(model_dir, config(model_init_kwargs={"device_map": None}))
    assert model.device.type == "cpu"


def test_adapter_is_added_to_a_path_and_to_an_instance(config, model_dir, qwen3):
    for source in (model_dir, qwen3):
        model = load_policy(source, config(), peft_config=lora())
        assert isinstance(model, PeftModel)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trainable) == 2 * 2 * 2  # two layers, two projections, A and B
        assert all("lora_" in name for name in trainable)


def test_adapter_on_an_adapter_is_refused(config, qwen3):
    with pytest.raises(ValueError, match=r"already has an adapter\. Leave peft_config out .* merge it first"):
        load_policy(get_peft_model(qwen3, lora()), config(), peft_config=lora())


def test_model_with_nothing_to_train_is_refused(config, qwen3, tmp_path):
    get_peft_model(qwen3, lora()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model("qwen3"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        load_policy(frozen, config())


def test_quantised_weights_are_recognised(qwen3):
    assert not is_quantized(qwen3)
    qwen3.is_loaded_in_4bit = True
    assert is_quantized(get_peft_model(qwen3, lora()))


def gradients(model):
    model.train()
    logps, _ = per_token_logps(model, batch())
    logps.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("starts_with_adapter", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapter_gets_gradients_through_checkpointing(config, use_reentrant, starts_with_adapter):
    def policy(checkpointing):
        torch.manual_seed(0)
        model = tiny_model("qwen3")
        adapter = lora(init_lora_weights=False)  # B is not 0, so that A has a gradient too
        args = config(gradient_checkpointing=checkpointing)
        if starts_with_adapter:
            model = load_policy(get_peft_model(model, adapter), args)
        else:
            model = load_policy(model, args, peft_config=adapter)
        if checkpointing:  # as transformers.Trainer does at the start of training
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        return model

    expected, actual = gradients(policy(False)), gradients(policy(True))
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture
def quantized_path(tmp_path):
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 128}  # blocks of 64 weights
    return save(tiny_model("qwen3", **sizes), tiny_tokenizer(), tmp_path / "model")


def test_a_quantised_policy_on_the_cpu_is_refused(config, quantized_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match="cannot be trained on the CPU"):
        load_policy(quantized_path, config(), quantization_config=quantization, peft_config=lora())


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_on_a_quantised_base_are_bf16_and_learn(config, quantized_path, use_dora):
    """QLoRA: the base stays in 4 bit, the adapters get gradients (one pass, before any in evaluation mode)."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(quantized_path, quantization_config=quantization)
    model = _add_adapter(base, config(), lora(use_dora=use_dora)).train()
    assert is_quantized(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    magnitudes = {name: trainable.pop(name) for name in [*trainable] if "magnitude" in name}
    assert trainable and all("lora" in name and p.dtype == torch.bfloat16 for name, p in trainable.items())
    assert bool(magnitudes) == use_dora and all(p.dtype == torch.float32 for p in magnitudes.values())
    with torch.autocast("cpu", torch.bfloat16):
        per_token_logps(model, batch())[0].sum().backward()
    assert all(p.grad is not None and (p.grad.norm() > 0) == ("lora_B" in name) for name, p in trainable.items())


def test_what_an_instance_leaves_without_effect_is_said(config, qwen3, caplog):
    args = config(model_init_kwargs={"dtype": "bfloat16"})
    assert load_policy(qwen3, args, quantization_config=BitsAndBytesConfig(load_in_8bit=True)) is qwen3
    assert "model_init_kwargs and quantization_config without effect" in caplog.text
    caplog.clear()
    load_policy(qwen3, config())
    assert not caplog.records


def test_a_quantization_config_twice(config, model_dir):
    args = config(model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(ValueError, match=r"to the trainer and in model_init_kwargs; leave out one"):
        load_policy(model_dir, args, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_peft_config_that_is_none_is_refused_before_anything_is_loaded(config):
    with pytest.raises(TypeError, match=r"must be a peft\.PeftConfig .*got dict"):
        load_policy("nowhere/at-all", config(), peft_config={"r": 8})


def test_a_prefix_with_gradient_checkpointing_is_refused(config, qwen3):
    tuning = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="set gradient_checkpointing=False"):
        load_policy(qwen3, config(gradient_checkpointing=True), peft_config=tuning)
    assert load_policy(qwen3, config(), peft_config=tuning).active_peft_config is tuning


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_would_move_the_reference_are_refused(config, bias):
    with pytest.raises(
        ValueError, match=rf"bias='{bias}' trains biases of the base model.*would move with the policy"
    ):
        load_policy(tiny_model("qwen2"), config(), peft_config=lora(bias=bias))
    for options in ({"beta": 0.0}, {"ref_model_name_or_path": "some/model"}):
        policy = load_policy(tiny_model("qwen2"), config(**options), peft_config=lora(bias=bias))
        assert any(name.endswith("q_proj.base_layer.bias") for name, p in policy.named_parameters() if p.requires_grad)


def test_biases_that_the_model_does_not_have_move_nothing(config, qwen3, tmp_path):
    policy = load_policy(qwen3, config(), peft_config=lora(bias="all"))
    policy.save_pretrained(tmp_path / "adapter")
    assert freeze_adapter(policy) in policy.peft_config  # of which PEFT would allow one with a bias


def test_an_adapter_that_acts_on_a_part_of_a_row_is_refused(config, qwen3):
    with pytest.raises(ValueError, match=r"aLoRA \(alora_invocation_tokens\) acts on a part of each row"):
        load_policy(qwen3, config(), peft_config=lora(alora_invocation_tokens=[5]))


def test_an_adapter_of_transformers_is_refused(config, qwen3):
    qwen3._hf_peft_config_loaded = True  # as `add_adapter` does, where PEFT is new enough for it
    with pytest.raises(ValueError, match=r"adapter of transformers' own.*pass the base model with peft_config"):
        load_policy(qwen3, config())


def test_what_of_adalora_has_no_effect_is_said(config, qwen3, caplog):
    load_policy(qwen3, config(), peft_config=AdaLoraConfig(total_step=9, target_modules=["q_proj"]))
    assert "AdaLoRA's rank stays at init_r" in caplog.text


@pytest.mark.parametrize("as_instance", [False, True])
def test_adapters_that_add_tokens_are_refused(config, qwen3, as_instance):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, options = (get_peft_model(qwen3, tuning), {}) if as_instance else (qwen3, {"peft_config": tuning})
    with pytest.raises(ValueError, match=r"PromptTuningConfig adds tokens to the prompt.*use LoRA"):
        load_policy(model, config(), **options)
