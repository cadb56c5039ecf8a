"""Every engine of `accelerate_configs/` trains, on two gloo ranks, what one process trains. The configs are the
committed ones with another number of processes; models, sampling and communication are real."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parents[1]
IN_CI = {("zero3", False), ("fsdp2", True)}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# config -> what accelerate says it is, the wrapper of the policy, the stage of ZeRO, the optimizer, and whether a rank
# holds about half of the weights
ENGINES = {
    "multi_gpu": ("MULTI_CPU", "DistributedDataParallel", None, "AdamW", False),
    "multi_node": ("MULTI_CPU", "DistributedDataParallel", None, "AdamW", False),
    "zero1": ("DEEPSPEED", "DeepSpeedEngine", 1, "AdamW", False),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine", 2, "AdamW", False),
    "zero2_offload": ("DEEPSPEED", "DeepSpeedEngine", 2, "DeepSpeedCPUAdam", False),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine", 3, "AdamW", True),
    "fsdp2": ("FSDP", "FSDP", None, "AdamW", True),
}
SYNCED_REFERENCE = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
UNEVEN = {
    "dynamic_sampling": True,
    "dynamic_sampling_filter": "tests.train_on_engine.uneven",
    "dynamic_sampling_max_rounds": 1,
    "num_iterations": 1,
    "max_steps": 4,
    "max_concurrent_rows": 4,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A tiny policy and a tiny reward model."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(tiny.tiny_model("qwen3"), tiny.tiny_tokenizer(), folder / "policy")
    tiny.save(tiny.tiny_reward_model(), tiny.tiny_tokenizer(chat=False, pair=True), folder / "reward")
    return folder


@pytest.fixture(scope="session")
def single(models, tmp_path_factory):
    """Runs on one process, each made once."""
    runs = {}

    def get(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in runs:
            runs[key] = train(tmp_path_factory.mktemp("one"), models, None, **options)
        return runs[key]

    return get


@pytest.fixture(scope="session")
def build_op():
    """Builds an operation of DeepSpeed, once on a machine, outside of the time that a run may take."""
    pytest.importorskip("deepspeed")

    @functools.cache
    def build(builder: str) -> None:
        code = f"from deepspeed.ops import op_builder; op_builder.{builder}().load(verbose=False)"
        execute([sys.executable, "-c", code], timeout=550)

    return build


def execute(*commands: list[str], timeout: float) -> None:
    """Runs them side by side to their end; fails with what they said if one fails or hangs, and leaves none behind."""
    environment = {**os.environ, **path(), **ENVIRONMENT}
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment)
            for command in commands
        ]
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.terminate()  # a launcher takes its ranks with it
                process.wait(60)
            said.seek(0)
            output = said.read()
            print(output[-8000:])  # shown with a failure
    assert set(codes) == {0}, output[-3000:]


def path() -> dict[str, str]:
    """With ninja of this environment, which builds DeepSpeed's operations."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def launch(output: Path, models: Path, config: str | None, changes: dict | None = None, **options) -> None:
    """Runs `tests/train_on_engine.py`: on one process, or on two ranks under a config with `changes` in it."""
    options = {"lora": False, "shard_cpu_ranks": config == "fsdp2"} | options
    world_size = 1 if config is None else 2
    worker = ["tests/train_on_engine.py", str(output), str(models), str(world_size), json.dumps(options)]
    if config is None:
        execute([sys.executable, *worker], timeout=240)
        return
    settings = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text())
    for section, values in (changes or {}).items():
        settings[section] |= values
    settings["num_processes"] = world_size
    if settings["distributed_type"] != "DEEPSPEED":  # which finds out by itself
        settings["use_cpu"] = True
    (output / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(output / "accelerate.yaml")]
    if settings["num_machines"] == 1:
        execute([*command, *worker], timeout=240)
        return
    # a launcher for each machine, as they would be started; here both machines are this one
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
    execute(*([*command, str(rank), *worker] for rank in range(settings["num_machines"])), timeout=240)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(output: Path, models: Path, config: str | None, **options) -> dict:
    """What a run leaves, see `launch`."""
    launch(output, models, config, **options)
    world_size = 1 if config is None else 2
    ranks = [json.loads(file.read_text()) for file in sorted(output.glob("rank_*.json"))]
    assert [rank["world_size"] for rank in ranks] == [world_size] * world_size
    name = "adapter_model.safetensors" if options.get("lora") else "model.safetensors"
    return {
        "ranks": ranks,
        "sampled": {draw: ids for rank in ranks for draw, ids in rank["sampled"].items()},
        "log": json.loads((output / "log.json").read_text()),
        "weights": load_file(output / "final" / name),
        "checkpoint": load_file(output / "checkpoint-2" / name),
    }


def assert_same(one: dict, two: dict) -> None:
    """The same completions, each sampled on one rank; equal logs, final weights and weights of the checkpoint."""
    assert not set.intersection(*(set(rank["sampled"]) for rank in two["ranks"]))
    assert one["sampled"] == two["sampled"]
    assert len({str(ids) for groups in one["sampled"].values() for ids in groups}) > len(one["sampled"])
    for first, second in zip(one["log"], two["log"], strict=True):
        # DeepSpeed's engine steps inside its backward pass, where nothing can be skipped
        assert first.keys() - {"nonfinite/skipped_updates"} <= second.keys()
        for name in first.keys() & second.keys():
            # times differ, and total_flos counts padding, which depends on the rows of a micro-batch
            if not any(part in name for part in ("runtime", "seconds", "per_second", "step_time", "total_flos")):
                assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), name
    for kind in ("checkpoint", "weights"):
        assert one[kind].keys() == two[kind].keys()
        for name, weight in one[kind].items():
            message = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(two[kind][name], weight, rtol=1e-5, atol=1e-5, msg=message)


def assert_engine(config: str, one: dict, two: dict) -> None:
    """Both ranks ran under the engine that was asked for, on the native rollouts and the packed learner."""
    kind, wrapper, stage, optimizer, shards = ENGINES[config]
    total = one["ranks"][0]["held"]
    for rank in two["ranks"]:
        assert rank["backend"] == "gloo"
        assert (rank["engine"], rank["zero_stage"], rank["optimizer"]) == (kind, stage, optimizer)
        assert rank["wrapper"].startswith(wrapper)
        assert rank["packed"] and rank["short_decoder"]
        assert rank["held"] == pytest.approx(total / 2 if shards else total, rel=0.05)
        if rank["held_of_reference"] is not None:  # sharded under ZeRO-3, copied to every rank under the others
            assert rank["held_of_reference"] == pytest.approx(total / 2 if stage == 3 else total, rel=0.05)


def builders(config: str) -> list[str]:
    """What DeepSpeed builds for a config on CPU ranks."""
    if not config.startswith("zero"):
        return []
    return ["ShareMemCommBuilder", *(["CPUAdamBuilder"] if config.endswith("offload") else [])]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of which 1100 s are for building DeepSpeed's operations, once on a machine
@pytest.mark.parametrize(
    ("config", "lora"),
    [
        pytest.param(config, lora, marks=pytest.mark.ci if (config, lora) in IN_CI else ())
        for config in ENGINES
        for lora in (False, True)
    ],
)
def test_engine_trains_what_one_process_trains(config, lora, models, single, build_op, tmp_path):
    for builder in builders(config):
        build_op(builder)
    options = {"lora": True} if lora else SYNCED_REFERENCE
    one, two = single(**options), train(tmp_path, models, config, **options)
    assert_engine(config, one, two)
    assert_same(one, two)
    assert one["log"][2]["kl"] > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_uneven_ranks_do_not_hang_and_an_update_is_skipped(config, models, single, build_op, tmp_path):
    for builder in builders(config):
        build_op(builder)
    one, two = single(**UNEVEN), train(tmp_path, models, config, **UNEVEN)
    assert_engine(config, one, two)
    assert_same(one, two)
    skipped = [entry["dynamic_sampling/skipped_updates"] for entry in one["log"][:4]]
    assert 0 < sum(skipped) < 4, skipped


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_a_sharded_head_is_called_as_often_on_each_rank(config, models, single, build_op, tmp_path):
    """In parts of at most 39 positions: one for some groups, two for others."""
    for builder in builders(config):
        build_op(builder)
    one, two = single(**SYNCED_REFERENCE), train(tmp_path, models, config, **SYNCED_REFERENCE, chunk=39)
    assert_same(one, two)
    lengths = [sum(map(len, ids)) for ids in two["sampled"].values()]
    assert min(lengths) <= 39 < max(lengths)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_zero3_samples_with_its_weights_in_shards(models, single, build_op, tmp_path):
    for builder in builders("zero3"):
        build_op(builder)
    options = SYNCED_REFERENCE | {"ds3_gather_for_generation": False}
    one = single(**SYNCED_REFERENCE, rollout_engine="hf_generate")
    two = train(tmp_path, models, "zero3", **options)
    assert [rank["rollouts"] for rank in two["ranks"]] == ["HFGenerateEngine"] * 2
    assert_same(one, two)


# config -> what leaves its checkpoints in shards, and the command that makes one folder of weights of them
SHARDED = {
    "zero3": (
        {"deepspeed_config": {"zero3_save_16bit_model": False}},
        ["{checkpoint}/zero_to_fp32.py", "{checkpoint}", "{merged}", "--safe_serialization"],
    ),
    "fsdp2": (
        {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
        ["-m", "accelerate.commands.merge", "{checkpoint}/pytorch_model_fsdp_0", "{merged}"],
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", SHARDED)
def test_a_sharded_checkpoint_is_consolidated_by_one_command(config, models, single, build_op, tmp_path):
    for builder in builders(config):
        build_op(builder)
    changes, command = SHARDED[config]
    launch(tmp_path, models, config, changes, **SYNCED_REFERENCE)
    checkpoint, merged = tmp_path / "checkpoint-2", tmp_path / "merged"
    assert not (checkpoint / "model.safetensors").exists()
    execute([sys.executable, *(word.format(checkpoint=checkpoint, merged=merged) for word in command)], timeout=120)
    weights, expected = load_file(merged / "model.safetensors"), single(**SYNCED_REFERENCE)["checkpoint"]
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", ["multi_gpu", "zero2", "zero3", "fsdp2"])
def test_a_resumed_run_is_the_run(config, models, build_op, tmp_path):
    """Cut in the middle of a rollout's updates; the reference follows the policy."""
    for builder in builders(config):
        build_op(builder)
    options = SYNCED_REFERENCE | {"max_steps": 4, "save_steps": 3}
    launch(tmp_path, models, config, **options)
    straight = load_file(tmp_path / "final" / "model.safetensors")
    for path in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / path)
    launch(tmp_path, models, config, **options, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
