"""vLLM as the sampler, tested against its contract: a server with its endpoints and a stand-in of its package (see
`vllm_server.py`, `vllm_stand_in.py`), both over real models."""

import importlib.metadata
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from grpo_trl.algorithm import policy_loss
from grpo_trl.batch import Prompt, RolloutBatch
from grpo_trl.policy import per_token_logps
from grpo_trl.rollouts import SamplingParams, make_engine, ordered_groups
from grpo_trl.rollouts.vllm import as_group
from grpo_trl.rollouts.vllm_checks import NEWEST, OLDEST, check_weights
from tests.rollouts.vllm_server import Server, complete
from tests.rollouts.vllm_stand_in import free_port, installed, weights_without_cuda
from tests.test_trainer import config, dataset, logged, trainer, weights
from tests.test_two_ranks import run as run_on_ranks
from tests.tiny import IM_END, PAD, VOCAB_SIZE, tiny_model

pytest.importorskip("requests", reason="TRL's client of vLLM needs requests, which is in the extra `dev`")

MANY_EOS = tuple(range(1, VOCAB_SIZE, 8))
SAMPLING = SamplingParams(num_generations=4, max_completion_length=6, eos_token_ids=MANY_EOS, pad_token_id=PAD, seed=7)
PROMPTS = [Prompt([10 + i, 11, 12 + i], {"prompt": f"number {i}"}, draw=i) for i in range(3)]
MERGED = {"max_lora_rank": None}  # a server without LoRA, which is sent merged weights


@pytest.fixture(scope="module", autouse=True)
def stand_in(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("vllm")), pytest.MonkeyPatch.context() as patch:
        weights_without_cuda(patch)
        yield


@pytest.fixture(autouse=True)
def no_rank_left(monkeypatch):
    """For a copy TRL names this process's rank in the environment, of which the next trainer would make a group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def serve():
    servers = []

    def start(model=None, **options) -> Server:
        servers.append(Server(tiny_model("qwen3", seed=1) if model is None else model, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses between attempts, in seconds, which are cut to a thousandth."""
    from urllib3.util.retry import Retry

    real, found = Retry.get_backoff_time, []

    def short(self):
        found.append(real(self))
        return found[-1] / 1000

    monkeypatch.setattr(Retry, "get_backoff_time", short)
    return found


def of_server(server: Server) -> dict:
    return {
        "rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url,
        "vllm_server_timeout": 0.0, "vllm_group_port": free_port(),
    }  # fmt: skip


def engine_of(path, model, server: Server, **options):
    args = config(path, **of_server(server) | options)
    return make_engine("vllm", model, args=args, accelerator=Accelerator(cpu=True))


def batch_of(groups) -> RolloutBatch:
    return RolloutBatch.from_groups(ordered_groups(PROMPTS, groups, SAMPLING.num_generations), pad_token_id=PAD)


def assert_logps_are_the_policys(model, groups, temperature=1.0):
    batch = batch_of(groups)
    logps, _ = per_token_logps(model, batch, temperature=temperature)
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(batch.sampling_per_token_logps[mask], logps[mask], rtol=0, atol=1e-4)


def adapted(model, **options):
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options)
    torch.manual_seed(0)
    return get_peft_model(model, lora)


# ---- Server: what is asked, what comes back ----


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_completions_and_their_log_probabilities_come_as_groups(tmp_path, qwen3, serve, temperature):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    engine.sync_weights(qwen3)
    groups = list(engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature)))
    assert sorted(group.prompt.draw for group in groups) == [0, 1, 2]
    for group in groups:
        assert group.prompt is PROMPTS[group.prompt.draw]
        assert len(group) == 4 and len({tuple(ids) for ids in group.completion_ids}) > 1
        for ids, terminated in zip(group.completion_ids, group.terminated, strict=True):
            assert not set(ids[:-1]) & set(MANY_EOS)
            assert terminated == (ids[-1] in MANY_EOS)
            assert terminated or len(ids) == SAMPLING.max_completion_length
    assert {flag for group in groups for flag in group.terminated} == {True, False}
    assert_logps_are_the_policys(qwen3, groups, temperature)


def test_a_request_is_one_prompt_with_all_options(tmp_path, qwen3, serve):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    sampling = replace(
        SAMPLING, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2,
        generation_kwargs={"min_tokens": 2},
    )  # fmt: skip
    list(engine.generate(PROMPTS, sampling))
    assert sorted(request["prompt"] for request in server.requests) == [[prompt.ids] for prompt in PROMPTS]
    assert len({request["seed"] for request in server.requests}) == 3
    expected = {
        "n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2,
        "max_tokens": 6, "logprobs": 0, "stop_token_ids": list(MANY_EOS), "ignore_eos": True,
    }  # fmt: skip
    for request in server.requests:
        assert request | expected == request


def test_what_is_sampled_depends_on_seed_stream_and_draw_alone(tmp_path, qwen3, serve):
    engine = engine_of(tmp_path, qwen3, serve())

    def ids(prompts=PROMPTS, **options):
        groups = engine.generate(prompts, replace(SAMPLING, **options))
        return {group.prompt.draw: group.completion_ids for group in groups}

    base = ids()
    assert ids(PROMPTS[::-1]) == base and ids(PROMPTS[:1])[0] == base[0]
    assert ids(num_generations=2)[1] == base[1][:2]
    assert ids(seed=8)[0] != base[0] and ids(stream=1)[0] != base[0]


def test_greedy_completions_are_all_the_same(tmp_path, qwen3, serve):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    engine.sync_weights(qwen3)
    sampling = replace(SAMPLING, temperature=0.0)
    expected = {g.prompt.draw: g.completion_ids for g in make_engine("native", qwen3).generate(PROMPTS, sampling)}
    assert {g.prompt.draw: g.completion_ids for g in engine.generate(PROMPTS, sampling)} == expected
    assert {request["n"] for request in server.requests} == {1}


def test_processors_of_this_process_are_refused(tmp_path, qwen3, serve):
    engine = engine_of(tmp_path, qwen3, serve())
    with pytest.raises(ValueError, match="logits_processors of this process"):
        engine.generate(PROMPTS, replace(SAMPLING, logits_processors=(lambda ids, scores: scores,)))


# ---- Server: weights ----


@torch.no_grad()
def test_the_server_has_the_policys_weights_after_a_sync(tmp_path, qwen3, serve):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    for _ in range(2):
        qwen3.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # an update
        assert not all(torch.equal(w, server.model.state_dict()[n]) for n, w in qwen3.state_dict().items())
        engine.sync_weights(qwen3)
        for name, weight in qwen3.state_dict().items():
            assert torch.equal(server.model.state_dict()[name], weight), name
        assert_logps_are_the_policys(qwen3, engine.generate(PROMPTS, SAMPLING))
    assert server.calls.count("/reset_prefix_cache") == 2
    assert not server.updating


def test_merged_adapters_are_sent_and_the_policy_stays_bit_for_bit(tmp_path, qwen3, serve):
    server, model = serve(**MERGED), adapted(qwen3, modules_to_save=["lm_head"])
    before = weights_of(model)
    engine = engine_of(tmp_path, model, server)
    engine.sync_weights(model)
    assert "/v1/load_lora_adapter" not in server.calls
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_adapters_on_parameters_of_experts_are_merged(parameters):
    from grpo_trl.rollouts.vllm_connection import merged_weights

    model = adapted(tiny_model("qwen3_moe"), target_parameters=[f"mlp.experts.{name}" for name in parameters])
    before, sent = weights_of(model), dict(merged_weights(model))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(sent[name], weight, rtol=0, atol=1e-6, msg=name)


def test_an_adapted_layer_within_a_module_with_adapted_parameters_is_merged():
    from grpo_trl.rollouts.vllm_connection import merged_weights

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2, 8, 8))
            self.down = torch.nn.Linear(8, 8, bias=False)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

    model = adapted(Model(), target_modules=["down"], target_parameters=["block.w"])
    (down,) = (layer for layer in model.modules() if type(layer) is LoraLinear)
    expected = down.base_layer.weight + down.get_delta_weight("default")
    sent = dict(merged_weights(model))
    assert sent.keys() == {"block.w", "block.down.weight"}
    assert torch.allclose(sent["block.down.weight"], expected, atol=1e-6)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_the_adapter_alone_is_sent_where_the_server_loads_them(tmp_path, qwen3, serve):
    server = serve(tiny_model("qwen3"), max_lora_rank=8, transfer=False)
    model = adapted(qwen3)
    engine = engine_of(tmp_path, model, server)
    for number in (1, 2):
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(2)
        engine.sync_weights(model)
        (name,) = server.adapters  # the former is gone
        assert name.startswith("policy_") and name.endswith(f"_{number}")
        assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))
        assert server.requests[-1]["model"] == name
    assert "/update_weights" not in server.calls
    server.adapters.clear()  # as after a restart
    engine.sync_weights(model)
    assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, {}),
        (8, {"modules_to_save": ["lm_head"]}),
        (8, {"use_dora": True}),
        (8, {"rank_pattern": {"v_proj": 4}}),
        (8, {"alpha_pattern": {"v_proj": 64}}),
        (8, {"init_lora_weights": "pissa"}),  # what the server has as base is not the base any more
    ],
)
def test_an_adapter_that_the_server_cannot_load_is_merged(tmp_path, qwen3, serve, rank, options):
    server, model = serve(max_lora_rank=rank), adapted(qwen3, **options)
    engine = engine_of(tmp_path, model, server)
    engine.sync_weights(model)
    assert "/update_weights" in server.calls and not server.adapters
    assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "changes the embedding or the head"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "changes the embedding or the head"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "leave out lora_bias and trainable"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "leave out lora_bias and trainable"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=9), "of the kind ADALORA"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "of the kind PREFIX_TUNING"),
    ],
    ids=["a saved head", "embeddings", "tokens", "a bias", "AdaLoRA", "a prefix"],
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, adapter, reason):
    model = get_peft_model(tiny_model("qwen3", tie_word_embeddings=True), adapter)
    with pytest.raises(ValueError, match=f"with this adapter merged into them: .*{reason}"):
        check_weights(model, config(tmp_path))


def test_a_run_that_finds_the_adapter_of_a_former_one_uses_its_own(tmp_path, qwen3, serve):
    server, model = serve(tiny_model("qwen3"), max_lora_rank=8), adapted(qwen3)
    engine_of(tmp_path, model, server).sync_weights(model)  # a run that died
    engine = engine_of(tmp_path, model, server)
    engine.sync_weights(model)
    assert len(server.adapters) == 2
    assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))


def test_all_ranks_ask_for_the_adapter_that_the_first_has_loaded(tmp_path, qwen3, serve, monkeypatch):
    server, model = serve(tiny_model("qwen3"), max_lora_rank=8), adapted(qwen3)
    told: list[list[str]] = []  # what accelerate sends: the first rank's to the others
    broadcast = lambda objects: told.append(objects) or told[0]  # noqa: E731
    monkeypatch.setattr("grpo_trl.rollouts.vllm_connection.broadcast_object_list", broadcast)
    first, second = engine_of(tmp_path, model, server), engine_of(tmp_path, model, server)
    monkeypatch.setattr(type(second.connection.accelerator), "is_main_process", True)
    first.sync_weights(model)
    monkeypatch.setattr(type(second.connection.accelerator), "is_main_process", False)
    second.sync_weights(model)
    assert len(told) == 2 and told[0] != told[1]
    assert [*server.adapters] == [second.client.model]
    assert_logps_are_the_policys(model, second.generate(PROMPTS, SAMPLING))


def test_an_adapter_that_is_refused_is_an_error_that_says_so(tmp_path, qwen3, serve, monkeypatch):
    server, model = serve(tiny_model("qwen3"), max_lora_rank=8), adapted(qwen3)
    monkeypatch.setattr("grpo_trl.rollouts.vllm_connection.uuid4", lambda: SimpleNamespace(hex="0123456789"))
    server.adapters["policy_01234567_1"] = server.model
    with pytest.raises(ValueError, match=r"refuses load_lora_adapter .*400, .*already been loaded.*able to read"):
        engine_of(tmp_path, model, server).sync_weights(model)


def test_quantised_weights_are_refused_unless_the_adapter_goes_alone(tmp_path, qwen3, serve):
    model = adapted(qwen3)
    qwen3.is_quantized = True
    with pytest.raises(ValueError, match=r"quantised policy; .*native for QLoRA, or a server that loads adapters"):
        engine_of(tmp_path, model, serve())
    engine = engine_of(tmp_path, model, serve(tiny_model("qwen3"), max_lora_rank=8))
    engine.sync_weights(model)
    assert_logps_are_the_policys(model, engine.generate(PROMPTS, SAMPLING))


# ---- Correction for the sampler ----


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_its_log_probabilities_correct_the_loss(tmp_path, qwen3, serve, correction):
    server = serve(tiny_model("qwen3"))
    engine = engine_of(tmp_path, qwen3, server)
    with torch.no_grad():
        server.model.lm_head.weight.mul_(1.2)  # a server that is not the policy

    def losses(groups, **bounds):
        batch = batch_of(groups)
        logps, _ = per_token_logps(qwen3, batch)
        mask = batch.loss_mask.float()
        fixed = {
            "advantages": torch.linspace(-1, 1, len(batch)), "token_weights": mask / mask.sum(),
            "loss_mask": batch.loss_mask, "sampling_per_token_logps": batch.sampling_per_token_logps,
        }  # fmt: skip
        logps = logps.detach()
        plain = policy_loss(logps, **fixed)[0]
        corrected = policy_loss(logps, sampler_correction=correction, **bounds, **fixed)[0]
        gap = torch.where(mask.bool(), logps - batch.sampling_per_token_logps, 0.0)
        ratio = (gap.sum(1, keepdim=True) if correction.startswith("sequence") else gap).exp().expand_as(mask)
        high = bounds["sampler_correction_max"]
        factor = ratio.clamp(max=high) if correction.endswith("truncate") else ratio.where(ratio <= high, 0.0)
        expected = -(fixed["advantages"][:, None] * factor * fixed["token_weights"] * mask).sum()
        assert float(corrected) == pytest.approx(float(expected), abs=1e-5)
        return float(plain), float(corrected)

    plain, corrected = losses(engine.generate(PROMPTS, SAMPLING), sampler_correction_max=1.1)
    assert abs(plain - corrected) > 1e-3
    engine.sync_weights(qwen3)  # now it is, and nothing is left to correct
    plain, corrected = losses(engine.generate(PROMPTS, SAMPLING), sampler_correction_max=1.1)
    assert corrected == pytest.approx(plain, abs=1e-5)


# ---- Runs ----


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])], ids=["all", "lora"])
def test_a_run_trains_on_what_the_server_samples(tmp_path, serve, peft):
    server = serve(tiny_model("qwen3"), max_lora_rank=None if peft is None else 8)
    run = trainer(tmp_path, max_steps=3, num_iterations=1, peft=peft, **of_server(server))
    before = weights(run)
    run.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(run).items())
    assert run.args.sampler_correction == "sequence_mask"
    # each rollout is one of the weights of its step: the sampler's log-probabilities are the policy's
    gaps = logged(run, "sampling/logp_gap")
    assert len(gaps) == 3 and max(gaps) < 1e-4
    syncs = server.calls.count("/finish_weight_update" if peft is None else "/v1/load_lora_adapter")
    assert syncs == 3
    assert {request["temperature"] for request in server.requests} == {run.args.temperature}
    assert {tuple(request["stop_token_ids"]) for request in server.requests} == {run.sampling.eos_token_ids}
    assert IM_END in run.sampling.eos_token_ids


def test_without_weights_sent_a_run_shows_the_gap(tmp_path, serve, monkeypatch):
    server = serve(tiny_model("qwen3"))
    run = trainer(tmp_path, max_steps=3, num_iterations=1, **of_server(server))
    monkeypatch.setattr(run.engine.connection, "sync_weights", lambda: None)
    run.train()
    gaps = logged(run, "sampling/logp_gap")
    assert gaps[0] < 1e-4 and gaps[2] > 1e-3


@pytest.mark.slow
@pytest.mark.ci
def test_two_ranks_sample_what_one_samples(tmp_path, serve):
    """Each rank asks for its own groups; the server's weights come from rank 0."""
    options = {"num_iterations": 1, "max_steps": 3, "optim": "sgd", "script": "tests/rollouts/vllm_on_ranks.py"}
    found = {}
    for ranks in (1, 2):
        server = serve(tiny_model("qwen3"))
        found[ranks] = run_on_ranks(tmp_path / str(ranks), ranks, 8 // ranks, **options | of_server(server))
        assert server.calls.count("/finish_weight_update") == 5  # of three rollouts and two evaluations
    assert found[1]["sampled"] == found[2]["sampled"] and len(found[1]["sampled"]) == 6
    gaps = [entry["sampling/logp_gap"] for entry in found[2]["log"] if "sampling/logp_gap" in entry]
    assert len(gaps) == 3 and max(gaps) < 1e-4


def test_evaluation_samples_from_the_same_server(tmp_path, serve):
    server = serve(tiny_model("qwen3"))
    run = trainer(
        tmp_path, max_steps=1, num_iterations=1, eval_strategy="steps", eval_steps=1, eval_temperature=0.5,
        eval_dataset=dataset(2), **of_server(server),
    )  # fmt: skip
    run.train()
    assert {request["temperature"] for request in server.requests} == {1.0, 0.5}
    for name, weight in run.model.state_dict().items():
        assert torch.equal(server.model.state_dict()[name], weight)  # sent again for the evaluation after the update


# ---- What can be wrong ----


def test_no_server_at_the_start(tmp_path, qwen3, serve):
    server = serve()
    server.close()
    with pytest.raises(ConnectionError, match=r"No vLLM server at http.* after 0.0 seconds: .*vllm serve MODEL"):
        engine_of(tmp_path, qwen3, server)


def test_something_else_at_the_servers_port(tmp_path, qwen3, serve):
    server = serve()
    server.failures = 1
    with pytest.raises(ConnectionError, match=r"after 0.0 seconds: /health answers 503\. .*raise vllm_server_timeout"):
        engine_of(tmp_path, qwen3, server)


def test_a_slash_at_the_end_of_the_url(tmp_path, qwen3, serve):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server, vllm_server_base_url=f"{server.url}/")
    assert engine.client.base_url == server.url


def test_a_server_that_is_not_up_yet_is_waited_for(tmp_path, qwen3, serve):
    port = free_port()
    late = threading.Timer(0.5, lambda: serve(port=port))
    late.start()
    args = config(
        tmp_path, rollout_engine="vllm", vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=port,
        vllm_server_timeout=30, vllm_group_port=free_port(),
    )  # fmt: skip
    start = time.monotonic()
    engine = make_engine("vllm", qwen3, args=args, accelerator=Accelerator(cpu=True))
    assert time.monotonic() - start < 20
    assert len(list(engine.generate(PROMPTS, SAMPLING))) == 3


def test_an_overloaded_server_is_asked_again_later_each_time(tmp_path, qwen3, serve, waits):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    server.failures = 3
    assert len(list(engine.generate(PROMPTS[:1], SAMPLING))) == 1
    assert len(server.requests) == 1 and server.calls.count("/v1/completions") == 4
    assert waits == [0, 4, 8]


@pytest.mark.parametrize("purpose", ["sample from", "send weights to"])
def test_a_server_that_stays_away_ends_the_run_with_the_last_checkpoint_named(tmp_path, serve, waits, purpose):
    server = serve(tiny_model("qwen3"))
    options = {"max_steps": 4, "num_iterations": 1, "save_strategy": "steps", "save_steps": 1} | of_server(server)
    run = trainer(tmp_path, **options)
    real = run.engine.generate if purpose == "sample from" else run.engine.sync_weights

    def goes_away(*args):
        if run.state.global_step == 2:
            server.close()
        return real(*args)

    setattr(run.engine, real.__name__, goes_away)
    message = rf"Could not {purpose} the vLLM server at {server.url}, after several attempts: .* go on from "
    with pytest.raises(ConnectionError, match=message) as error:
        run.train()
    assert f"{tmp_path}/checkpoint-2 (resume_from_checkpoint)" in str(error.value)
    assert set(waits) == {0, 4, 8, 16, 32}  # a minute in all

    again = serve(tiny_model("qwen3"))
    resumed = trainer(tmp_path, **options | of_server(again))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert max(logged(resumed, "sampling/logp_gap")) < 1e-4


def test_without_a_checkpoint_the_error_says_so(tmp_path, qwen3, serve, waits):
    server = serve()
    engine = engine_of(tmp_path, qwen3, server)
    server.close()
    with pytest.raises(ConnectionError, match=r"go on anew: no checkpoint in "):
        list(engine.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "0.11.0"}, rf"server at http.* is version 0\.11\.0; use {OLDEST} to {NEWEST}"),
        ({"logprobs_mode": "raw_logprobs"}, r"runs with --logprobs-mode raw_logprobs.*vllm serve MODEL"),
    ],
)
def test_a_server_that_does_not_fit(tmp_path, qwen3, serve, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(tmp_path, qwen3, serve(**options))


def test_a_server_that_would_cut_completions(tmp_path, qwen3, serve):
    server, lengths = serve(max_model_len=40), {"max_completion_length": 30, "max_prompt_length": 10}
    assert engine_of(tmp_path, qwen3, server, **lengths)
    with pytest.raises(
        ValueError, match=r"has room for 40 tokens, .* has 31, max_prompt_length 10: .*give it 41 or more"
    ):
        engine_of(tmp_path, qwen3, server, **lengths | {"max_completion_length": 31})
    with pytest.raises(ValueError, match="has room for 40 tokens"):
        engine_of(tmp_path, qwen3, server, **lengths, eval_max_completion_length=31, eval_on_start=True)
    assert engine_of(tmp_path, qwen3, server, **lengths, eval_max_completion_length=31)  # without evaluation


def test_a_copy_that_would_cut_completions(tmp_path):
    options = {"rollout_engine": "vllm", "max_completion_length": 30}
    assert config(tmp_path, vllm_max_model_length=31, **options)
    with pytest.raises(ValueError, match="vLLM's copy has room for 30 tokens"):
        config(tmp_path, vllm_max_model_length=30, **options)


@pytest.mark.parametrize("name", ["min_new_tokens", "tempperature", "use_beam_search"])
def test_options_that_vllm_does_not_know(tmp_path, qwen3, serve, name):
    with pytest.raises(ValueError, match=rf"generation_kwargs .*{name}.* are no SamplingParams of vLLM: .*{name}"):
        engine_of(tmp_path, qwen3, serve(), generation_kwargs={name: 1})


def test_fewer_completions_than_were_asked_for(tmp_path, qwen3, serve, monkeypatch):
    engine = engine_of(tmp_path, qwen3, serve())
    monkeypatch.setattr("tests.rollouts.vllm_server.complete", lambda *args: complete(*args)[:1])
    with pytest.raises(ValueError, match="draws with another number of completions"):
        batch_of(engine.generate(PROMPTS, SAMPLING))


def test_a_stop_string_ends_a_completion():
    eos, rows = MANY_EOS[0], [[9], [9, MANY_EOS[0]], [9] * SAMPLING.max_completion_length]
    assert eos != 9 and 9 not in MANY_EOS[:1]
    logps = [[[-1.0]] * len(ids) for ids in rows]

    def ended(**options):
        sampling = replace(SAMPLING, num_generations=3, eos_token_ids=(eos,), generation_kwargs=options)
        return as_group(PROMPTS[0], rows, logps, sampling).terminated

    assert ended() == [False, True, False]
    assert ended(stop=["</answer>"]) == [True, True, False]


def test_a_server_without_weight_transfer(tmp_path, qwen3, serve):
    with pytest.raises(RuntimeError, match="--weight-transfer-config"):
        engine_of(tmp_path, qwen3, serve(transfer=False))


def test_vllm_that_is_too_old_is_refused_with_the_range(tmp_path, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2" if name == "vllm" else real(name))
    with pytest.raises(ValueError, match=rf"needs vLLM {OLDEST} to {NEWEST}, and 0\.10\.2 is installed; pip install"):
        trainer(tmp_path, rollout_engine="vllm")


# ---- Colocate ----


@pytest.mark.parametrize("sleep", [False, True])
def test_a_copy_in_this_process(tmp_path, model_dir, sleep):
    run = trainer(
        tmp_path, model=model_dir, max_steps=3, num_iterations=1, rollout_engine="vllm", vllm_enable_sleep_mode=sleep,
        vllm_gpu_memory_utilization=0.2, vllm_max_model_length=64,
    )  # fmt: skip
    copy = run.engine.connection.llm
    run.train()
    assert max(logged(run, "sampling/logp_gap")) < 1e-4
    assert copy.loaded >= 3 * len(list(copy.model.parameters()))
    assert copy.awake == (set() if sleep else {"weights", "kv_cache"})
    assert copy.options["logprobs_mode"] == "processed_logprobs"
    assert (copy.options["gpu_memory_utilization"], copy.options["max_model_len"]) == (0.2, 64)
    assert copy.options["max_num_seqs"] == run.args.per_device_train_batch_size * run.args.steps_per_generation


def test_a_copy_needs_a_path(tmp_path, qwen3):
    qwen3.config._name_or_path = qwen3.name_or_path = ""
    with pytest.raises(ValueError, match="'colocate' loads the model by its path or id"):
        trainer(tmp_path, model=qwen3, rollout_engine="vllm")
