import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedType
from peft import (
    AdaLoraConfig,
    C3AConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from trl.trainer.utils import disable_dropout_in_model

from grpo_trl import GRPOConfig
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import (
    evaluation_mode,
    freeze_adapter,
    load_policy,
    load_reference_model,
    make_reference,
    per_token_logps,
    prepare,
)
from grpo_trl.policy.reference import AdapterReference, FrozenReference, Passes, needs_frozen_adapter
from grpo_trl.rewards.loading import load_rewards
from grpo_trl.token_limit import TokenLimit
from tests.tiny import IM_END, PAD, save, tiny_model, tiny_reward_model, tiny_tokenizer

CPU = {"": torch.device("cpu")}


@pytest.fixture
def config(tmp_path):
    def make(**options):
        fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
        return GRPOConfig(str(tmp_path / "out"), **(fixed | options))

    return make


@pytest.fixture
def batch():
    groups = [
        Group(Prompt([10, 11, 12], {}, draw=0), [[20, 21, IM_END], [30, 31, 32, 33]], [True, False]),
        Group(Prompt([40], {}, draw=1), [[50, IM_END], [IM_END]], [True, True]),
    ]
    return RolloutBatch.from_groups(groups, pad_token_id=PAD)


def logps(model, batch, temperature=1.0):
    with torch.no_grad():
        return per_token_logps(model, batch, temperature=temperature)[0] * batch.completion_mask


def reference_logps(reference, batch, temperature=1.0):
    result = reference.per_token_logps(batch, temperature)
    assert not result.requires_grad and result.dtype == torch.float32
    return result * batch.completion_mask


def accelerator():
    return Accelerator(cpu=True)


def make(model, policy, adapter=None):
    return make_reference(model, lambda: policy, accelerator(), adapter=adapter, rows_per_pass=4)


def lora_model(trained: bool, **options):
    """A tiny Qwen3 with an adapter: as initialised (no effect), or with weights as after some training."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=not trained, **options)
    return get_peft_model(tiny_model("qwen3"), lora)


def change(model, names=""):
    """Moves the trainable weights, as an optimizer step does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and names in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


# ---- A model of its own ----


def test_copy_of_the_starting_policy_is_frozen(config, qwen3, batch):
    qwen3.train()
    start = logps(qwen3, batch)
    model = load_reference_model(qwen3, None, config(), CPU)
    reference = make(model, qwen3)
    assert isinstance(reference, FrozenReference) and reference.own_device is None  # it shares the policy's
    assert model is not qwen3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(reference_logps(reference, batch), start)  # KL is exactly 0 at step one
    change(qwen3)
    assert not torch.equal(logps(qwen3, batch), start)
    assert torch.equal(reference_logps(reference, batch), start)
    assert qwen3.training and all(parameter.requires_grad for parameter in qwen3.parameters())


def test_reference_is_deterministic_when_the_policy_has_dropout(config, batch):
    policy = tiny_model("qwen3", attention_dropout=0.5).train()
    reference = make(load_reference_model(policy, None, config(), CPU), policy)
    assert not torch.equal(logps(policy, batch), logps(policy, batch))
    assert torch.equal(reference_logps(reference, batch), reference_logps(reference, batch))


def test_policy_from_a_path_is_loaded_again(config, model_dir, batch):
    args = config()
    policy = load_policy(model_dir, args)
    model = load_reference_model(policy, model_dir, args, CPU)
    assert {parameter.device for parameter in model.parameters()} == {CPU[""]}
    assert torch.equal(reference_logps(make(model, policy), batch), logps(policy, batch))
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert not shared


@pytest.fixture
def second_fsdp_rank(monkeypatch):
    """What transformers looks at where only the first rank of a machine is to hold the weights that it loads."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr("transformers.distributed.fsdp._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.is_local_dist_rank_0", lambda: False)


def test_under_fsdp_the_reference_is_whole_on_each_rank(config, qwen3, model_dir, second_fsdp_rank):
    model = load_reference_model(qwen3, model_dir, config(), CPU)
    for name, weight in load_file(f"{model_dir}/model.safetensors").items():
        assert torch.equal(model.get_parameter(name), weight) and weight.any()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.mark.parametrize("how", ["zeros", "meta"])  # before transformers 5.23, and since
@pytest.mark.parametrize("what", ["policy", "reward model"])
def test_a_model_that_fsdp_left_empty_is_refused(config, monkeypatch, what, how):
    args, model = config(), tiny_model("qwen3") if what == "policy" else tiny_reward_model()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    load = {
        "policy": lambda: load_reference_model(model, None, args, CPU),
        "reward model": lambda: load_rewards([model], tiny_tokenizer(), args, CPU),
    }[what]
    assert load()
    if how == "zeros":
        model.get_input_embeddings().weight.data.zero_()
    else:
        model.to("meta")
    with pytest.raises(ValueError, match=rf"The {what}.* has no weights on this rank.*Pass the model's path"):
        load()


@pytest.mark.parametrize("part", ["lm_head", "model.layers"])
def test_parts_may_be_offloaded(qwen3, batch, part):
    expected = reference_logps(make(qwen3, qwen3), batch)
    cpu_offload(qwen3.get_submodule(part), execution_device=torch.device("cpu"))
    assert torch.equal(reference_logps(make(qwen3, qwen3), batch), expected)


def test_the_reference_is_where_ref_device_says_whatever_the_policy_is_loaded_with(config, qwen3, model_dir):
    args = config(model_init_kwargs={"device_map": {"": "meta"}})
    assert {p.device for p in load_reference_model(qwen3, model_dir, args, CPU).parameters()} == {CPU[""]}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_any_path_can_be_the_reference(config, tmp_path, batch, adapter):
    other = tiny_model("qwen3", seed=5)
    path = save(other, tiny_tokenizer(), tmp_path / "other")
    policy = lora_model(trained=True) if adapter else tiny_model("qwen3")
    model = load_reference_model(policy, None, config(ref_model_name_or_path=path), CPU)
    assert torch.equal(reference_logps(make(model, policy), batch), logps(other, batch))


def test_model_init_kwargs_reach_the_reference(config, model_dir):
    args = config(model_init_kwargs={"dtype": "bfloat16"})
    model = load_reference_model(load_policy(model_dir, args), model_dir, args, CPU)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_no_reference_is_loaded_without_kl(config, model_dir, adapter):
    policy = lora_model(trained=False) if adapter else tiny_model("qwen3")
    assert load_reference_model(policy, model_dir, config(beta=0.0), CPU) is None
    assert (load_reference_model(policy, model_dir, config(beta=0.1), CPU) is None) == adapter


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_temperature_reaches_the_reference(config, qwen3, batch, temperature):
    frozen = make(load_reference_model(qwen3, None, config(), CPU), qwen3)
    base = make(None, lora_model(trained=True))
    for reference in (frozen, base):
        assert torch.equal(reference_logps(reference, batch, temperature), logps(qwen3, batch, temperature))


# ---- The policy itself, with another adapter or none ----


@pytest.mark.parametrize("trained", [False, True])
def test_adapter_off_is_the_base_model(config, batch, trained):
    policy = lora_model(trained)
    base = logps(tiny_model("qwen3"), batch)
    reference = make(load_reference_model(policy, "unused", config(), CPU), policy)
    assert isinstance(reference, AdapterReference)
    assert torch.equal(reference_logps(reference, batch), base)
    assert torch.equal(logps(policy, batch), base) == (not trained)  # a new adapter starts at KL 0
    change(policy)
    assert torch.equal(reference_logps(reference, batch), base)
    assert not torch.allclose(logps(policy, batch), base)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and lm_head"])
def test_trained_adapter_is_its_own_reference(batch, options):
    policy = lora_model(trained=True, **options)
    change(policy, "modules_to_save")
    start = logps(policy, batch)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    adapter = freeze_adapter(policy)
    # before the optimizer is made, which takes what is trainable
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
    reference = make(None, policy, adapter)
    assert torch.equal(reference_logps(reference, batch), start)  # KL is exactly 0 at step one
    assert torch.equal(logps(policy, batch), start)
    assert not torch.allclose(start, logps(tiny_model("qwen3"), batch))  # the base is another model

    policy.train()
    for _ in range(2):  # a rollout, an update, and the next
        loss = per_token_logps(policy, batch)[0].sum() + reference.per_token_logps(batch, 1.0).sum()
        loss.backward()
        assert policy.active_adapter == "default"
        assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
        with_gradient = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
        assert with_gradient == trainable
        change(policy)
        assert torch.equal(reference_logps(reference, batch), start)
        assert not torch.allclose(logps(policy, batch), start)


def test_an_adapter_that_begins_as_something_is_its_own_reference(config):
    changing, prefix = (
        ({"init_lora_weights": name} for name in ("pissa", "olora")),
        PrefixTuningConfig(num_virtual_tokens=2),
    )
    assert needs_frozen_adapter(config(beta=0.1), IA3Config(init_ia3_weights=False), is_new=True)
    for options in changing:
        assert needs_frozen_adapter(config(beta=0.1), LoraConfig(**options), is_new=True)
    assert needs_frozen_adapter(config(beta=0.1), prefix, is_new=True)
    assert needs_frozen_adapter(config(beta=0.1), LoraConfig(), is_new=False)
    assert needs_frozen_adapter(config(beta=0.1), VBLoRAConfig(), is_new=True)
    assert needs_frozen_adapter(config(beta=0.1), C3AConfig(init_weights="gaussian"), is_new=True)
    for nothing in (LoraConfig(), LoraConfig(init_lora_weights="gaussian"), IA3Config(), LoHaConfig()):
        assert not needs_frozen_adapter(config(beta=0.1), nothing, is_new=True)
    assert not needs_frozen_adapter(config(beta=0.0), prefix, is_new=True)
    assert not needs_frozen_adapter(config(beta=0.1, ref_model_name_or_path="x"), prefix, is_new=False)


def test_pissa_takes_its_part_from_the_base_once(batch):
    policy = get_peft_model(tiny_model("qwen3"), LoraConfig(r=4, init_lora_weights="pissa"))
    start = logps(policy, batch)
    reference = make(None, policy, freeze_adapter(policy))
    assert torch.equal(logps(policy, batch), start) and torch.equal(reference_logps(reference, batch), start)
    change(policy)
    assert torch.equal(reference_logps(reference, batch), start)


def test_a_frozen_prefix_is_not_trained():
    policy = get_peft_model(tiny_model("qwen3"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapter = freeze_adapter(policy)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"] and adapter in policy.prompt_encoder


def test_an_adalora_that_was_trained_is_its_own_reference(batch):
    adapter = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(tiny_model("qwen3"), adapter)
    start = logps(policy, batch)
    reference = make(None, policy, freeze_adapter(policy))
    change(policy)
    assert torch.equal(reference_logps(reference, batch), start)


def test_several_active_adapters_are_refused():
    policy = lora_model(trained=True)
    policy.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="active adapters default, other, of which the reference could copy one"):
        freeze_adapter(policy)


def test_continued_adapter_from_disk(tmp_path, batch):
    lora_model(trained=True).save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(tiny_model("qwen3"), tmp_path / "adapter", is_trainable=True)
    start = logps(policy, batch)
    assert torch.equal(start, logps(lora_model(trained=True), batch))
    reference = make(None, policy, freeze_adapter(policy))
    change(policy)
    assert torch.equal(reference_logps(reference, batch), start)


@pytest.mark.parametrize("trained", [False, True])
def test_reference_leaves_modes_as_they_were(batch, trained):
    policy = lora_model(trained, lora_dropout=0.5).train()
    policy.lm_head.eval()
    reference = make(None, policy, freeze_adapter(policy) if trained else None)
    before = [module.training for module in policy.modules()]
    assert torch.equal(reference_logps(reference, batch), reference_logps(reference, batch))
    assert [module.training for module in policy.modules()] == before


# ---- Dropout ----


def test_dropout_turned_off_makes_the_first_ratio_one(config, batch):
    def ratio(policy):
        policy.train()
        with evaluation_mode(policy):
            old = logps(policy, batch)
        return (logps(policy, batch) - old).exp()

    lora = partial(LoraConfig, r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
    args = config()
    with_dropout = load_policy(tiny_model("qwen3"), args, peft_config=lora())
    assert (ratio(with_dropout) - 1).abs().max() > 1e-3
    without = load_policy(tiny_model("qwen3"), args, peft_config=lora())
    assert args.disable_dropout  # what GRPOTrainer asks before it does this:
    disable_dropout_in_model(without)
    assert torch.equal(ratio(without), torch.ones(4, 4))


# ---- How much at a time ----


def lengths_batch(*groups):
    """Groups of (prompt tokens, completions of so many tokens each)."""
    return RolloutBatch.from_groups(
        [
            Group(Prompt([9] * prompt, {}, draw), [[8] * length for length in lengths], [True] * len(lengths))
            for draw, (prompt, *lengths) in enumerate(groups)
        ],
        pad_token_id=PAD,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (None, [slice(0, 2), slice(2, 6)]),  # streams of 14, 6 and 5 tokens: the first is the largest micro-batch
        (99, [slice(0, 2), slice(2, 6)]),
        (8, [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 6)]),
    ],
)
def test_packed_passes_have_the_tokens_of_the_largest_micro_batch(qwen3, tokens, expected):
    prepare(qwen3)
    batch = lengths_batch((3, 6, 6), (3, 2, 2), (4, 1, 1))
    assert Passes(2, TokenLimit("it")).cut(qwen3, batch, tokens) == expected
    assert Passes(2, TokenLimit("it", fixed=True)).cut(qwen3, batch, tokens) == [
        slice(0, 2), slice(2, 4), slice(4, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(None, [[0, 2], [3, 1, 4], [5]]), (99, [[0, 2], [3, 1, 4], [5]]), (9, [[0], [2], [3], [1], [4, 5]])],
)
def test_padded_passes_are_sorted_by_length(qwen3, tokens, expected):
    # 9, 4, 7, 5, 4 and 3 tokens; micro-batches of 2 x (3 + 6), 2 x (3 + 4) and 2 x (2 + 2)
    batch = lengths_batch((3, 6, 1), (3, 4, 2), (2, 2, 1))
    assert Passes(2, TokenLimit("it")).cut(qwen3, batch, tokens) == expected


@pytest.mark.parametrize(
    ("kind", "own_model", "fixed"), [("FSDP", False, True), ("FSDP", True, False), ("MULTI_GPU", False, False)]
)
def test_passes_of_a_sharded_reference_are_never_cut_smaller(qwen3, kind, own_model, fixed):
    state = SimpleNamespace(deepspeed_plugin=None)
    ranks = SimpleNamespace(state=state, distributed_type=DistributedType[kind], device=CPU[""])
    reference = make_reference(qwen3 if own_model else None, lambda: qwen3, ranks, rows_per_pass=2)
    assert reference.passes.limit.fixed is fixed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [None, 8, 1])
def test_passes_of_any_size_give_the_same_log_probabilities_in_the_same_order(qwen3, packed, tokens):
    if packed:
        prepare(qwen3)
    batch = lengths_batch((3, 6, 1), (3, 4, 2), (2, 2, 5))
    batch.completion_ids = torch.arange(batch.completion_ids.numel()).view_as(batch.completion_ids) % 90 + 10
    reference = FrozenReference(qwen3, Passes(2, TokenLimit("it", tokens)))
    torch.testing.assert_close(reference.per_token_logps(batch, 0.7), logps(qwen3, batch, 0.7), rtol=0, atol=1e-5)


def test_the_revision_is_that_of_the_policys_repository(tmp_path, monkeypatch, qwen3):
    asked = []
    monkeypatch.setattr(
        "grpo_trl.policy.reference.create_model_from_path",
        lambda path, _, **options: asked.append((path, options)) or qwen3,
    )
    options = {"use_cpu": True, "beta": 0.1, "model_init_kwargs": {"revision": "v1", "dtype": "float32"}}
    for other in ({}, {"ref_model_name_or_path": "b"}, {"ref_model_name_or_path": "a"}):
        load_reference_model(qwen3, "a", GRPOConfig(str(tmp_path), **options, **other), {"": "cpu"})
    own = {"ref_model_name_or_path": "b", "ref_model_init_kwargs": {"revision": "v2", "dtype": "bfloat16"}}
    load_reference_model(qwen3, "a", GRPOConfig(str(tmp_path), **options, **own), {"": "cpu"})
    found = [(path, options.get("revision"), options["dtype"]) for path, options in asked]
    assert found == [("a", "v1", "float32"), ("b", None, "float32"), ("a", "v1", "float32"), ("b", "v2", "bfloat16")]
