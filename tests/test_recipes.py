import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE_CONFIGS = ROOT / "accelerate_configs"

DISTRIBUTED_TYPES = {
    "single_gpu": DistributedType.NO,
    "two_gpus": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "zero1": DistributedType.DEEPSPEED,
    "zero2": DistributedType.DEEPSPEED,
    "zero2_offload": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
    "cpu_two_ranks": DistributedType.MULTI_GPU,
}


def accelerate_config(name):
    return load_config_from_file(str(ACCELERATE_CONFIGS / f"{name}.yaml"))


def test_every_accelerate_config_is_listed_here():
    assert {path.stem for path in ACCELERATE_CONFIGS.iterdir()} == set(DISTRIBUTED_TYPES)


@pytest.mark.parametrize("name", DISTRIBUTED_TYPES)
def test_accelerate_config_is_read_and_names_its_type(name):
    config = accelerate_config(name)  # raises on a key that accelerate does not know
    assert config.distributed_type == DISTRIBUTED_TYPES[name]
    assert config.mixed_precision == "no"  # else it would stand in for a recipe's `bf16: false`
    if config.distributed_type == DistributedType.NO:
        assert config.num_processes == 1
    else:
        assert config.num_processes > 1
        # any free port; over several machines the one at which they meet
        assert config.main_process_port == (29500 if config.num_machines > 1 else 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage(stage):
    config = accelerate_config(f"zero{stage}").deepspeed_config
    assert config["zero_stage"] == stage
    assert config["zero3_init_flag"] is (stage == 3)
    assert config.get("zero3_save_16bit_model", False) is (stage == 3)


def test_fsdp_version():
    assert accelerate_config("fsdp2").fsdp_config["fsdp_version"] == 2


# As a recipe does it: `use_cpu: true` in the arguments. Without it each of the two processes is a world of its own.
LAUNCHED = """
import sys
import torch
from accelerate import Accelerator, DistributedType
from transformers import TrainingArguments

args = TrainingArguments(output_dir=sys.argv[1], use_cpu=True)
accelerator = Accelerator()
assert args.world_size == accelerator.num_processes == 2, (args.world_size, accelerator.num_processes)
assert accelerator.distributed_type == DistributedType.MULTI_CPU, accelerator.distributed_type
assert torch.distributed.get_backend() == "gloo", torch.distributed.get_backend()
ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
if accelerator.is_main_process:
    open(sys.argv[1] + "/ranks.txt", "w").write(str(ranks))
accelerator.end_training()
"""


def test_cpu_two_ranks_starts_two_processes_over_gloo(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ACCELERATE_CONFIGS / "cpu_two_ranks.yaml"), str(script), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "ranks.txt").read_text() == "[0, 1]"
