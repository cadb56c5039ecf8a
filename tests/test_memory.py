"""The memory plan: exact where bytes are known, and the same code as the run where they are counted."""

import json
import shutil
from collections import Counter

import pytest
import torch
import yaml
from peft import BOFTConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DebertaV2ForSequenceClassification
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from grpo_trl import GRPOConfig, GRPOTrainer, cli
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.memory import PolicySpec, Run, advice_lines, parse_size, plan_run, plan_table, ranked_changes
from grpo_trl.memory.dry_run import FakeModel, countable_experts, rollout_bytes, update_bytes
from grpo_trl.memory.models import policy_of, quantized_bytes, reference_options
from grpo_trl.memory.optimizer import optimizer_bytes, step_bytes
from grpo_trl.memory.plan import DevicePlan, Plan, _split
from grpo_trl.memory.tracker import LiveBytes
from grpo_trl.policy import prepare
from grpo_trl.rewards import RewardModel
from grpo_trl.rollouts import SamplingParams, make_engine
from tests.conftest import ROOT
from tests.policy.test_packed import KINDS
from tests.test_trainer import trainer
from tests.tiny import tiny_model, tiny_reward_model, tiny_tokenizer

ADAPTER = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.fixture
def run(model_dir, tmp_path):
    def make(peft_config=None, rewards=(), path=model_dir, **changes):
        options = {
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "per_device_train_batch_size": 8,
            "max_prompt_length": 32,
            "max_completion_length": 64,
            "gradient_checkpointing": False,
        }
        args = GRPOConfig(str(tmp_path / "out"), **(options | changes))
        return Run(PolicySpec(path, peft_config=peft_config), rewards, args)

    return make


def items(run):
    return plan_run(run, 2**30).devices["cpu"].items


def trained_bytes(model):
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


# ---- what is known exactly ----


def test_full_training_holds_weights_gradients_two_moments_and_a_reference(run, qwen3):
    own = sum(p.nbytes for p in qwen3.parameters()) + sum(b.nbytes for b in qwen3.buffers())
    found = items(run())
    assert found["parameters"] == found["frozen models"] == own
    optimizer = torch.optim.AdamW(qwen3.train().parameters())
    qwen3(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    assert found["gradients"] == sum(p.grad.nbytes for p in qwen3.parameters())
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["optimizer"] == sum(m.nbytes for m in moments)


def test_decoding_copies_the_linear_layers_where_it_does(run, qwen3):
    norms = [p for name, p in qwen3.named_parameters() if "q_norm" in name or "k_norm" in name]
    linear = [m.weight for m in qwen3.modules() if type(m) is torch.nn.Linear]
    assert items(run())["weights for decoding"] == sum(p.nbytes for p in (*linear, *norms))
    assert items(run(bf16=True))["weights for decoding"] == 0
    assert items(run(rollout_engine="hf_generate"))["weights for decoding"] == 0
    kept = sum(p.nbytes for p in (qwen3.lm_head.weight, *norms))  # layers with an adapter are run as they are
    assert items(run(ADAPTER))["weights for decoding"] == kept


def test_an_adapter_is_trained_alone_and_is_its_own_reference(run, qwen3):
    model = get_peft_model(qwen3, ADAPTER)
    found = items(run(ADAPTER))
    assert found["gradients"] == trained_bytes(model) < found["parameters"] / 2
    assert found["optimizer"] == 2 * trained_bytes(model)
    assert found["frozen models"] == 0
    assert found["parameters"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def test_a_saved_adapter_is_trained_further(run, model_dir, tmp_path):
    fresh = items(run(ADAPTER, beta=0.0))
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(base, ADAPTER).save_pretrained(path := str(tmp_path / "adapter"))
    assert items(run(path=path, beta=0.0)) == fresh


def test_without_kl_term_there_is_no_reference(run):
    assert items(run(beta=0.0))["frozen models"] == 0
    assert items(run(beta=0.0, num_iterations=1))["scoring"] == 0  # on-policy: no pass at all
    assert items(run(beta=0.0, num_iterations=4))["scoring"] > 0


def test_dtype_of_the_policy_and_of_its_reference(run):
    half, full = items(run(model_init_kwargs={"dtype": "bfloat16"})), items(run())
    assert half["gradients"] * 2 == full["gradients"] and half["optimizer"] * 2 == full["optimizer"]
    assert half["frozen models"] < full["frozen models"] * 0.51


def test_reward_model_keeps_its_own_dtype_and_is_on_its_device(run, tmp_path):
    model = tiny_reward_model("qwen3")
    model.save_pretrained(path := str(tmp_path / "reward"))
    found = items(run(beta=0.0, num_iterations=1, rewards=(path, "accuracy")))
    assert found["frozen models"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert found["reward passes"] > 0 and found["scoring"] == 0  # beside sampling
    after = items(run(beta=0.0, num_iterations=1, rewards=(path,), reward_overlap=False))
    assert after["scoring"] == found["reward passes"]


def test_a_reward_model_that_does_not_run_without_numbers_is_named(run, reward_model_dir, monkeypatch):
    def forward(self, input_ids, **kwargs):
        return self._forward(input_ids[:, : int(input_ids.sum())], **kwargs)

    kind = DebertaV2ForSequenceClassification
    monkeypatch.setattr(kind, "_forward", kind.forward, raising=False)
    monkeypatch.setattr(kind, "forward", forward)
    plan = plan_run(run(beta=0.0, rewards=(reward_model_dir,)), 2**30)
    assert plan.devices["cpu"].items["reward passes"] == 0 < plan.devices["cpu"].items["frozen models"]
    assert len(plan.assumptions) == 1
    assert f"DebertaV2ForSequenceClassification ({reward_model_dir})" in plan.assumptions[0]
    assert "does not run without numbers" in plan.assumptions[0]


def test_a_policy_that_was_quantised_before(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_trl.policy.loading.is_quantized", lambda model: False)  # which the CPU refuses
    shutil.copytree(model_dir, path := tmp_path / "quantised")
    config = json.loads((path / "config.json").read_text())

    def planned(**quantization):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        return plan_run(run(ADAPTER, path=str(path)), 2**30)

    full, small = plan_run(run(ADAPTER), 2**30), planned(quant_method="bitsandbytes", load_in_4bit=True)
    sizes = [plan.devices["cpu"].items["parameters"] for plan in (full, small)]
    assert sizes[1] < sizes[0] * 0.8
    monkeypatch.undo()
    with pytest.raises(ValueError, match="quantised weights cannot be trained on the CPU"):
        planned(quant_method="bitsandbytes", load_in_4bit=True)
    assert any("quantised by gptq" in text for text in planned(quant_method="gptq", bits=4).assumptions)


@pytest.mark.parametrize("config", [BOFTConfig, PrefixTuningConfig])
def test_adapters_that_do_not_run_without_numbers_are_named(run, config):
    options = {"num_virtual_tokens": 2} if config is PrefixTuningConfig else {"target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match=r"cannot be planned: its code does not run without numbers"):
        plan_run(run(config(task_type="CAUSAL_LM", **options)), 2**30)


def test_a_policy_that_does_not_run_without_numbers_is_named(run, monkeypatch):
    def looks(self, *args, **kwargs):
        raise RuntimeError("item() of a fake tensor")

    monkeypatch.setattr(Qwen3Model, "forward", looks)
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM .* cannot be planned: .*grpo-trl check"):
        plan_run(run(), 2**30)


def test_the_policys_revision_is_not_that_of_another_reference(run):
    args = run(model_init_kwargs={"revision": "v2"}).args
    assert reference_options(args, "policy")["revision"] == "v2"
    args.ref_model_name_or_path = "other"
    assert "revision" not in reference_options(args, "policy")


def test_a_reference_has_its_own_dtype(run):
    full, half = items(run()), items(run(ref_model_init_kwargs={"dtype": "bfloat16"}))
    assert half["frozen models"] < full["frozen models"] * 0.51 and half["parameters"] == full["parameters"]


def test_rollouts_with_generation_kwargs_are_those_of_generate(run):
    found = [items(run(**options)) for options in ({"rollout_engine": "hf_generate"},
             {"generation_kwargs": {"no_repeat_ngram_size": 3}}, {})]  # fmt: skip
    assert found[0] == found[1] != found[2]


def test_what_is_not_quantised_of_a_policy_has_the_dtype_that_it_is_loaded_in(run, qwen3, monkeypatch):
    quantised = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
    dtypes = ("float32", "bfloat16")
    runs = [run(ADAPTER, model_init_kwargs=quantised | {"dtype": dtype}, cuda_graphs=False) for dtype in dtypes]
    monkeypatch.setattr(GRPOConfig, "device", torch.device("cuda:0"))
    found = [plan_run(planned, 2**30).devices["cuda:0"].items for planned in runs]
    full, half = (items["parameters"] - items["gradients"] for items in found)
    rest = [qwen3.lm_head.weight, *(p for p in qwen3.parameters() if p is not qwen3.lm_head.weight and p.dim() == 1)]
    halved = sum(p.nbytes for p in (*rest, qwen3.model.embed_tokens.weight)) // 2
    assert full - half == pytest.approx(halved, rel=0.01)


def test_a_reward_model_has_its_dtype_by_its_former_name_too_and_its_adapter(run, reward_model_dir, tmp_path):
    def frozen(path=reward_model_dir, **options):
        return items(run(beta=0.0, rewards=(path,), reward_model_init_kwargs=options or None))["frozen models"]

    assert frozen(torch_dtype="bfloat16") == frozen(dtype="bfloat16") < frozen()
    base = DebertaV2ForSequenceClassification.from_pretrained(reward_model_dir)
    adapter = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    own = RewardModel(str(tmp_path / "adapter"), tiny_tokenizer(chat=False, pair=True)).model
    assert frozen(str(tmp_path / "adapter")) == sum(x.nbytes for x in (*own.parameters(), *own.buffers()))


def test_a_frozen_model_in_4_bit_has_small_linear_layers(run, reward_model_dir):
    options = {"quantization_config": {"load_in_4bit": True}}
    full, small = (items(run(rewards=(reward_model_dir,), reward_model_init_kwargs=o)) for o in (None, options))
    assert full["frozen models"] * 0.5 < small["frozen models"] < full["frozen models"]


@pytest.mark.parametrize(("nested", "expected"), [(False, 4096 // 2 + 4 * 64), (True, 4096 // 2 + 64 + 4)])
def test_bytes_of_4_bit_weights(nested, expected):
    assert (
        quantized_bytes(4096, 64, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested)) == expected
    )


def test_bytes_of_8_bit_weights():
    assert quantized_bytes(4096, 64, BitsAndBytesConfig(load_in_8bit=True)) == 4096 + 4 * 64


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch_fused", (800, 400)), ("sgd", (0, 0)), ("adamw_8bit", (200, 200)), ("lomo", (800, 400)),
        ("adagrad", (400, 200)), ("rmsprop", (400, 200)), ("paged_adamw_32bit", (800, 800)),
        ("lion_32bit", (400, 400)),
    ],
)  # fmt: skip
def test_optimizer_states(optim, expected):
    found = [
        optimizer_bytes(optim, [nn.Parameter(torch.zeros(100, dtype=d))]) for d in (torch.float32, torch.bfloat16)
    ]
    assert tuple(found) == expected


def test_what_a_step_of_the_optimizer_takes():
    trained = [nn.Parameter(torch.zeros(size)) for size in (100, 50)]
    assert [step_bytes("adamw_torch", trained, device) for device in ("cuda", "cpu")] == [600, 400]
    assert step_bytes("adamw_torch_fused", trained, "cuda") == step_bytes("adamw_torch", [], "cpu") == 0


def test_an_optimizer_that_is_not_known_and_a_missing_prompt_length_are_said(run):
    said = " ".join(plan_run(run(optim="ademamix", max_prompt_length=None), 2**30).assumptions)
    assert "AdamW" in said and "512 tokens" in said
    said = plan_run(run(optim="sgd", optim_args="momentum=0.9"), 2**30).assumptions
    assert said == ["for optim=sgd without its optim_args"]
    assert plan_run(run(), 2**30).assumptions == []


# ---- what is counted by dry runs ----


def test_live_bytes_follow_lifetimes():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert memory.live == 8000
        del a
        assert memory.live == 4000
        del b
        assert memory.live == 4000  # the view holds it
        del view
    assert memory.live == 0 and memory.peak == 8000


def test_gradients_of_several_uses_are_added_in_place():
    weight = nn.Parameter(torch.zeros(1000))
    with LiveBytes([weight]) as memory:
        sum((weight * 2).sum() for _ in range(3)).backward()
    assert memory.live == weight.grad.nbytes
    assert memory.peak < 2 * weight.nbytes + 100  # the sum, and what is added to it


def test_other_sums_are_counted():
    with LiveBytes([x := torch.zeros(1000)]) as memory, torch.no_grad():
        y = x + x
    assert memory.live == y.nbytes == 4000


def test_what_kernels_allocate_inside_is_counted_at_the_peak():
    x = torch.zeros(10, 100)
    for kernel, inside in ((lambda: x.logsumexp(-1), x.nbytes), (lambda: x.cumsum(0, dtype=torch.float64), 8000)):
        with LiveBytes([x]) as memory:
            kept, out = torch.zeros(250), kernel()
        assert memory.peak == memory.live + inside == kept.nbytes + out.nbytes + inside


def test_cache_is_what_the_native_engine_allocates(run, qwen3, monkeypatch):
    prepare(qwen3)
    engine = make_engine("native", qwen3)
    seen = []
    real = type(engine)._memory
    monkeypatch.setattr(
        type(engine), "_memory", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1]
    )
    prompts = [Prompt([5] * 32, {}, draw) for draw in range(2)]
    list(engine.generate(prompts, SamplingParams(4, 64, (1,), 0, seed=0)))
    planned, work = rollout_bytes(FakeModel(policy_of(run().policy, run().args)), run().args, 32, 2)
    assert planned == sum(tensor.nbytes for tensor in seen[0].tensors())
    assert work > 0


def test_memory_decides_how_many_groups_are_decoded(run):
    roomy, tight = (
        items(run(steps_per_generation=8)),
        plan_run(run(steps_per_generation=8), 700_000).devices["cpu"].items,
    )
    assert tight["key-value cache"] < roomy["key-value cache"] / 4
    assert items(run(steps_per_generation=8, max_concurrent_rows=8))["key-value cache"] < roomy["key-value cache"] / 4


def test_vllm_takes_its_share_of_the_device_or_nothing(run):
    beside = items(run(use_vllm=True))
    assert beside["kept cache"] == int(0.3 * 2**30) and "decoding" not in beside
    sleeping = items(run(use_vllm=True, vllm_enable_sleep_mode=True))
    assert sleeping["key-value cache"] == int(0.3 * 2**30) and "kept cache" not in sleeping
    assert not {"kept cache", "key-value cache", "decoding"} & items(run(use_vllm=True, vllm_mode="server")).keys()


@pytest.mark.parametrize(
    "peft_config", [None, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])], ids=["full", "lora"]
)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "mixtral"])
def test_update_counts_what_a_real_update_allocates(run, kind, peft_config, tmp_path):
    """The same passes on real tensors, under the same counter, hold the same bytes."""
    from grpo_trl.policy import per_token_logps

    model = tiny_model(kind, **KINDS.get(kind, {}))
    model.save_pretrained(path := str(tmp_path / kind))
    if peft_config:
        model = get_peft_model(model, peft_config)
    prepare(model)
    groups = [Group(Prompt([1] * 32, {}, n), [[1] * 64] * 4, [True] * 4) for n in range(2)]
    batch = RolloutBatch.from_groups(groups, pad_token_id=0)
    model.train()
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
        logps, _ = per_token_logps(model, batch, with_entropy=True)
        logps.sum().backward()
    made = run(path=path, peft_config=peft_config)
    with countable_experts():
        planned = update_bytes(FakeModel(policy_of(made.policy, made.args)), made.args, 32)
    assert planned == pytest.approx(memory.peak, rel=0.02)
    found = plan_run(made, 2**30).devices["cpu"].items
    assert found["gradients"] + found["activations"] == planned


@pytest.mark.parametrize(
    "saves", [{"gradient_checkpointing": True}, {"max_tokens_per_microbatch": 100}, {"max_completion_length": 32}]
)
def test_what_lowers_activations(run, saves):
    assert items(run(**saves))["activations"] < 0.8 * items(run())["activations"]


def test_accumulated_gradients_stay_while_others_are_made(run):
    one, two = items(run()), items(run(gradient_accumulation_steps=2))
    assert one["activations"] < two["activations"] <= one["activations"] + one["gradients"]


@pytest.mark.parametrize(("kind", "max_prompt_length"), [("qwen3", 32), ("qwen3", 400), ("gemma2", 400)])
def test_generate_is_planned_with_its_pass_over_the_prompts(run, tmp_path, kind, max_prompt_length):
    """A real rollout under the same counter holds about the same bytes at its peak, in prefill or in the last step."""
    model = tiny_model(kind, max_position_embeddings=512)
    model.save_pretrained(path := str(tmp_path / kind))
    made = run(path=path, rollout_engine="hf_generate", max_prompt_length=max_prompt_length)
    prepare(model)
    engine = make_engine("hf_generate", model)
    prompts = [Prompt([5] * (max_prompt_length - draw), {}, draw) for draw in range(2)]  # else no mask is made
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
        list(engine.generate(prompts, SamplingParams(4, 64, (), 0, seed=0)))
    planned = items(made)
    assert planned["key-value cache"] + planned["decoding"] == pytest.approx(memory.peak, rel=0.25)


def test_models_that_must_be_padded_are_planned_so(run, tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path / "gemma2")
    plan = plan_run(run(path=str(tmp_path / "gemma2")), 2**30)
    assert "padded" in plan.assumptions[0]
    assert plan.devices["cpu"].items["key-value cache"] > items(run())["key-value cache"]


# ---- what a run holds ----


def test_a_run_holds_only_its_state_and_its_batch_between_phases(run, tmp_path):
    """Keys and values are gone before an update, activations and gradients before a rollout."""
    held: dict[str, list[int]] = {"rollout": [], "update": []}

    class Watched(GRPOTrainer):
        def collect(self, prompts):
            held["rollout"].append(memory.live)
            batch = super().collect(prompts)
            held["update"].append(memory.live)
            return batch

    options = {"per_device_train_batch_size": 8, "max_completion_length": 64, "num_iterations": 2, "max_steps": 6}
    training = trainer(tmp_path, cls=Watched, **options)
    with LiveBytes([*training.model.parameters(), *training.model.buffers()]) as memory:
        training.train()
    planned, moments = items(run()), 2 * trained_bytes(training.model)
    (first, *later), (batch, *new_batches) = held["rollout"], held["update"]
    assert first < planned["gradients"] / 10 and batch < planned["key-value cache"]
    for before, after in zip(later, new_batches, strict=True):
        assert moments < before < moments + 1.2 * batch < moments + planned["gradients"] + batch / 2
        assert after - before < planned["key-value cache"] / 2  # the new batch takes the place of the old one


# ---- phases, advice, command ----


def test_phases_are_sums_of_their_parts(run):
    (device,) = plan_run(run(), 2**30).devices.values()
    resident = device.items["parameters"] + device.items["optimizer"] + device.items["frozen models"]
    assert device.phases == {
        "rollout": resident + sum(device.items[x] for x in ("key-value cache", "weights for decoding", "decoding")),
        "scoring": resident + device.items["scoring"],
        "update": resident + device.items["gradients"] + device.items["activations"],
    }
    assert device.peak == device.phases["update"] and device.strain < 1


@pytest.mark.parametrize(("on_gpu", "fits"), [(100, True), (150, False)])
def test_the_fullest_device_is_not_the_one_that_holds_most(on_gpu, fits):
    gpu, cpu = DevicePlan(100, 100, Counter(parameters=on_gpu)), DevicePlan(1000, 1000, Counter(parameters=200))
    plan = Plan({"cuda:0": gpu, "cpu": cpu}, [])
    assert plan.fullest is gpu and plan.fits is fits


def test_a_weight_is_where_the_longest_name_of_its_parts_is():
    sizes = {"layers.1.weight": 1, "layers.10.weight": 10, "lm_head.weight": 100}
    assert _split(sizes, {"layers.1": 0, "": "cpu", "lm_head": "disk"}) == {"cuda:0": 1, "cpu": 10}


def test_changes_are_ranked_by_what_they_save(run):
    long = run(max_completion_length=256, num_generations=8)
    plan = plan_run(long, 2**24)
    ranked = ranked_changes(long, plan, 2**24)
    changes = [advice.change for advice in ranked]
    assert {"gradient_checkpointing: true", "max_tokens_per_microbatch: 1040"} <= set(changes[:3])
    strains = [advice.plan.fullest.strain for advice in ranked]
    assert strains == sorted(strains) and strains[-1] < plan.fullest.strain
    lines = advice_lines(plan, ranked)
    assert [line.split(". ")[1].split(": ")[0] for line in lines[1:]] == [text.split(": ")[0] for text in changes]


def test_a_change_that_is_named_saves_what_it_says(run):
    plan = plan_run(run(max_completion_length=256), 2**24)
    best = ranked_changes(run(max_completion_length=256), plan, 2**24)[0]
    name, value = best.change.split(": ")
    again = plan_run(run(max_completion_length=256, **{name: yaml.safe_load(value)}), 2**24)
    assert again.devices["cpu"].items == best.plan.devices["cpu"].items


def test_a_change_that_a_trainer_would_refuse_is_not_named(run, tmp_path):
    tiny_model(hidden_size=256, intermediate_size=512).save_pretrained(path := str(tmp_path / "wide"))

    def changes(**options):
        planned = run(path=path, max_completion_length=256, num_generations=8, **options)
        return [advice.change.split(":")[0] for advice in ranked_changes(planned, plan_run(planned, 2**24), 2**24)]

    assert {"use_peft", "max_tokens_per_microbatch"} <= set(changes())
    assert "use_peft" not in changes(sync_ref_model=True)
    assert "max_tokens_per_microbatch" not in changes(top_entropy_quantile=0.2)


def test_advice_is_left_out_where_the_model_does_not_allow_it(run, tmp_path):
    tiny_model("mamba", num_hidden_layers=1).save_pretrained(path := str(tmp_path / "mamba"))
    planned = run(path=path, max_prompt_length=8, max_completion_length=8)
    plan = plan_run(planned, 2**24)
    changes = [advice.change.split(":")[0] for advice in ranked_changes(planned, plan, 2**24)]
    assert changes and "use_peft" not in changes  # whose layers no adapter for all linear ones fits


def test_a_map_that_does_not_fit_the_reference_is_refused(run):
    with pytest.raises(ValueError, match=r"the map {'foo': 'cpu'} does not fit Qwen3ForCausalLM: it has no 'foo'"):
        plan_run(run(ref_device={"foo": "cpu"}), 2**30)


def test_no_advice_where_nothing_is_left_to_change(run):
    bare = run(ADAPTER, beta=0.0, gradient_checkpointing=True, per_device_train_batch_size=2, num_generations=2,
               max_tokens_per_microbatch=96)  # fmt: skip
    plan = plan_run(bare, 2**24)
    assert ranked_changes(bare, plan, 2**24) == []
    assert "No single change" in advice_lines(plan, [])[0]


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 gb", 1_500_000_000), ("512MiB", 2**29)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.fixture
def recipe(tmp_path, model_dir):
    entry = {"path": "none.jsonl", "type": "jsonl", "input": "question", "output": "answer"}
    fields = {
        "model_name_or_path": model_dir,
        "train_datasets": [entry],
        "reward_funcs": ["accuracy"],
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return ["plan", "--config", str(path)]


def test_command_shows_table_and_advice_without_data_or_weights(recipe, capsys):
    cli.main([*recipe, "--memory", "1GiB", "--no_gradient_checkpointing"])
    out = capsys.readouterr().out
    for text in (
        "cpu",
        "parameters",
        "frozen models",
        "peak of update",
        "1.00 GiB",
        "yes",
        "What helps most, one change at a time:\n1. ",
    ):
        assert text in out
    assert "Assumed: prompts of 512 tokens" in out


def test_command_ends_with_code_1_where_it_does_not_fit(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*recipe, "--memory", "1MiB"])
    assert exit_.value.code == 1 and "no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "lots"], "--memory 'lots' is no size; give a number with a unit, e.g. 24GiB"),
        (["--memory", "24"], "--memory '24' is no size"),
        (["--memory", "0GiB"], "is no size"),
        (["--ref_device", "cuda:9"], "'cuda:9' does not exist"),
        (["--model_name_or_path", "models/of/mine"], "no such folder"),
        (["--load_in_4bit"], "cannot be trained on the CPU"),
        (["--model_init_kwargs", '{"dtype": "fp32"}'], "dtype='fp32' is unknown; use auto, float32"),
        # what a trainer would refuse too
        (["--reward_funcs", "accuracyy"], "'accuracyy' is unknown"),
        (["--reward_weights", "1", "2"], "reward_weights has 2 values for 1 reward functions"),
        (["--use_peft", "--sync_ref_model"], "a policy with an adapter is its own reference"),
        (["--rollout_engine", "warp"], "rollout_engine='warp' is unknown"),
        (["--dynamic_sampling_filter", "a.b"], "dynamic_sampling_filter='a.b' leads to nothing"),
    ],
)
def test_command_refuses(recipe, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*recipe, *options])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_command_refuses_models_that_a_trainer_refuses(recipe, capsys, model_dir, reward_model_dir, tmp_path):
    adapter, two_labels = str(tmp_path / "adapter"), str(tmp_path / "two")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), ADAPTER).save_pretrained(adapter)
    shutil.copytree(reward_model_dir, two_labels)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | labels))
    for options, message in (
        (["--model_name_or_path", adapter, "--use_peft"], "has an adapter already, beside which peft_config"),
        (["--reward_funcs", two_labels], "has 2 labels; expected one"),
        (["--model_name_or_path", reward_model_dir], "which cannot generate text"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*recipe, *options])
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_table_has_a_column_for_each_device(run):
    assert [column.header for column in plan_table(plan_run(run(), 2**30)).columns] == ["", "cpu"]


def test_comparison_that_is_committed_is_within_15_percent():
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text())["measurements"]
    assert set(rows) == {"full", "lora", "reward_model"}
    for row in rows.values():
        assert row["planned"] >= 2**30 and 0.85 <= row["planned"] / row["measured"] <= 1.15
