import copy
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import Trainer

from grpo_trl import GRPOConfig
from grpo_trl.assembly import _num_local_ranks
from grpo_trl.placement import (
    EFFICIENT_LOADING,
    check_map,
    freeze,
    input_device,
    is_zero3,
    place,
    resolve_device_map,
    runs_on,
    whole_models,
)
from grpo_trl.policy import load_reference_model
from grpo_trl.trainer_checks import zero3_problems
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def cuda(index):
    return torch.device("cuda", index)


@pytest.mark.parametrize(
    ("device", "policy", "num_gpus", "num_local_ranks", "expected"),
    [
        # no GPU
        ("auto", CPU, 0, 1, CPU),
        (None, CPU, 0, 1, CPU),
        ("auto", CPU, 0, 2, CPU),
        ("cpu", CPU, 0, 1, CPU),
        ("cpu:1", CPU, 0, 1, CPU),
        # one GPU: shared
        ("auto", cuda(0), 1, 1, cuda(0)),
        ("same", cuda(0), 1, 1, cuda(0)),
        ("cpu", cuda(0), 1, 1, CPU),
        ("cuda:0", cuda(0), 1, 1, cuda(0)),
        # two GPUs: one for the frozen models with one rank, shared with two
        ("auto", cuda(0), 2, 1, cuda(1)),
        (None, cuda(0), 2, 1, cuda(1)),
        ("same", cuda(0), 2, 1, cuda(0)),
        ("cuda:1", cuda(0), 2, 1, cuda(1)),
        ("auto", cuda(0), 2, 2, cuda(0)),
        ("auto", cuda(1), 2, 2, cuda(1)),
        # four GPUs
        ("auto", cuda(0), 4, 1, cuda(1)),
        ("auto", cuda(0), 4, 2, cuda(2)),
        ("auto", cuda(1), 4, 2, cuda(3)),  # each rank a spare one of its own
        ("auto", cuda(2), 4, 3, cuda(3)),
        ("auto", cuda(3), 4, 4, cuda(3)),
        ("cuda:3", cuda(0), 4, 2, cuda(3)),
        # a policy that was put on the CPU by choice keeps its frozen models there
        ("auto", CPU, 2, 1, CPU),
        ("same", CPU, 2, 1, CPU),
    ],
)
def test_table(device, policy, num_gpus, num_local_ranks, expected):
    resolved = resolve_device_map(device, policy, num_gpus=num_gpus, num_local_ranks=num_local_ranks)
    assert resolved == {"": expected}


@pytest.mark.parametrize(
    ("num_gpus", "num_local_ranks", "rank", "reference", "reward"),
    [
        (2, 1, 0, 1, 1),
        (3, 1, 0, 1, 2),  # two spare: one each
        (4, 2, 0, 2, 2),
        (4, 2, 1, 3, 3),
        (5, 2, 0, 2, 4),
        (6, 2, 1, 3, 5),
        (3, 2, 0, 2, 2),  # fewer spare than ranks: shared
        (3, 2, 1, 2, 2),
        (4, 3, 2, 3, 3),
        (6, 4, 3, 5, 5),
    ],
)
def test_each_rank_has_its_share_of_the_spare_gpus(num_gpus, num_local_ranks, rank, reference, reward):
    resolved = [
        resolve_device_map("auto", cuda(rank), num_gpus=num_gpus, num_local_ranks=num_local_ranks, number=number)
        for number in range(2)
    ]
    assert resolved == [{"": cuda(reference)}, {"": cuda(reward)}]


@pytest.mark.parametrize("rank", [0, 1])  # both say so, or one would wait for the other
@pytest.mark.parametrize("device", ["cuda:1", {"": 1}, {"model": 2, "lm_head": "cuda:1"}])
def test_a_device_that_another_rank_trains_on_is_refused(rank, device):
    with pytest.raises(ValueError, match=r"is the one that rank 1 .* trains on, and each of the 2 ranks .* from 2 on"):
        resolve_device_map(device, cuda(rank), num_gpus=4, num_local_ranks=2)
    assert resolve_device_map(device, cuda(0), num_gpus=4) is not None  # with one rank it is spare


def test_a_device_that_another_rank_trains_on_is_refused_where_none_is_spare():
    with pytest.raises(ValueError, match="'cuda:1' is the one that rank 1 "):
        resolve_device_map("cuda:1", cuda(0), num_gpus=2, num_local_ranks=2)


def test_a_rank_that_sees_its_own_gpu_only_may_name_it():
    assert resolve_device_map("cuda:0", cuda(0), num_gpus=1, num_local_ranks=2) == {"": cuda(0)}


def test_index_may_be_left_out():
    assert resolve_device_map("cuda", cuda(0), num_gpus=1) == {"": torch.device("cuda")}
    assert resolve_device_map("auto", torch.device("cuda"), num_gpus=2) == {"": cuda(1)}


def test_accelerate_map_is_taken_as_it_is():
    device_map = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": "disk", "lm_head": "cpu"}
    assert resolve_device_map(device_map, cuda(0), num_gpus=2) is device_map


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("cuda:1", 1, r"'cuda:1' does not exist: 1 GPU\(s\) are visible .* Use auto"),
        ("cuda:0", 0, r"'cuda:0' does not exist: 0 GPU\(s\) are visible"),
        ("cuda", 0, r"'cuda' does not exist"),
        ("spare", 2, r"'spare' is unknown; use auto, same, cpu, cuda:N or an accelerate map"),
        ("", 2, r"'' is unknown"),
        ({"model.layers": 0, "lm_head": 2}, 2, r"device 2 does not exist: 2 GPU"),
        ({"": "cuda:1"}, 1, r"'cuda:1' does not exist"),
        ({"": "gpu"}, 1, r"'gpu' is unknown"),
        ({"": "disk"}, 1, r"the device map {'': 'disk'} has no device; name one for each part"),
        ({}, 1, r"the device map {} has no device"),
        ("xpu:3", 1, r"device 'xpu:3' is none that this run has"),
    ],
)
def test_devices_that_do_not_exist(device, num_gpus, message):
    with pytest.raises(ValueError, match=message):
        resolve_device_map(device, CPU if num_gpus == 0 else cuda(0), num_gpus=num_gpus)


def test_place_on_one_device_adds_no_hooks(qwen3):
    ids = torch.tensor([[10, 11, 12]])
    expected = qwen3(ids).logits
    placed = place(qwen3, {"": CPU})
    assert placed is qwen3
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules())
    assert input_device(placed) == CPU
    assert torch.equal(placed(ids).logits, expected)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"modle": "cpu", "": "cpu"}, "it has no 'modle'; its parts are model, lm_head, and what is in them"),
        ({"model": "cpu", "lm_haed": "cpu"}, "it has no 'lm_haed'"),
        ({"model.layers.0": "cpu"}, "no device for 'model.embed_tokens.weight'"),
        ({"model.layers": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu"}, "no device for 'lm_head.weight'"),
    ],
)
def test_a_map_that_does_not_fit_the_model(model_dir, qwen3, device_map, message):
    with pytest.raises(ValueError, match=message):
        place(qwen3, device_map)
    args = GRPOConfig(use_cpu=True, bf16=False, report_to="none", ref_device=device_map, beta=0.1)
    with pytest.raises(ValueError, match=message):
        load_reference_model(qwen3, model_dir, args, device_map)


def test_a_part_is_not_another_whose_name_begins_alike():
    layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    with pytest.raises(ValueError, match=r"no device for '10\.weight'"):
        check_map(layers, {str(number): "cpu" for number in range(10)})


def test_place_takes_an_accelerate_map(qwen3):
    ids = torch.tensor([[10, 11, 12]])
    expected = qwen3(ids).logits
    placed = place(copy.deepcopy(qwen3), {"model": "cpu", "lm_head": "cpu"})
    assert {parameter.device for parameter in placed.parameters()} == {CPU}
    assert placed.hf_device_map == {"model": "cpu", "lm_head": "cpu"}
    assert torch.equal(placed(ids).logits, expected)


@pytest.mark.parametrize("part", ["embed_tokens", "layers", None])
def test_input_device_of_offloaded_weights(qwen3, part):
    ids = torch.tensor([[10, 11, 12]])
    expected = qwen3(ids).logits
    offloaded = qwen3 if part is None else getattr(qwen3.model, part)
    cpu_offload(offloaded, execution_device=CPU)
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    assert input_device(qwen3) == CPU
    assert torch.equal(qwen3(ids.to(input_device(qwen3))).logits, expected)


def test_freeze(qwen3):
    frozen = freeze(qwen3.train())
    assert frozen is qwen3
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("set_to", ["true", "False", None])
def test_models_are_loaded_whole_under_fsdp(tmp_path, monkeypatch, set_to):
    if set_to is None:
        monkeypatch.delenv(EFFICIENT_LOADING, raising=False)
    else:
        monkeypatch.setenv(EFFICIENT_LOADING, set_to)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(OSError, match="no such model"), whole_models(args):
        assert os.environ.get(EFFICIENT_LOADING) == (None if set_to is None else "False")
        raise OSError("no such model")
    assert os.environ.get(EFFICIENT_LOADING) == set_to


@pytest.mark.parametrize("ref_device", ["cpu", "cuda:1", {"": 1}])
def test_zero3_has_no_reference_on_a_device_of_its_own(ref_device):
    (problem,) = zero3_problems(ref_device)
    assert problem.startswith(f"ref_device={ref_device!r}: under ZeRO-3 the reference is sharded")
    assert zero3_problems("auto") == zero3_problems("same") == zero3_problems(None) == []


def test_zero2_shards_no_model():
    assert [is_zero3(SimpleNamespace(zero_stage=stage)) for stage in (2, 3)] == [False, True]


def test_two_visible_gpus_do_not_double_the_batch(tmp_path):
    # what transformers finds in a process with two visible GPUs and no launcher
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8)
    args._n_gpu = 2
    assert args.n_gpu == 1
    assert args.train_batch_size == 8
    assert args.eval_batch_size == args.per_device_eval_batch_size


def test_trainer_does_not_split_the_policy_over_two_visible_gpus(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8)
    args._n_gpu = 2
    trainer = Trainer(tiny_model("qwen3"), args)
    assert trainer._train_batch_size == 8
    assert not isinstance(trainer._wrap_model(trainer.model), nn.DataParallel)


def test_a_model_runs_on_each_device_that_holds_a_part_of_it():
    split = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    assert runs_on(split, CPU) and runs_on(split, torch.device("meta"))
    assert runs_on(nn.Linear(1, 1, device="meta"), torch.device("meta", 0))  # the first one, by number
    assert not runs_on(split, cuda(0)) and not runs_on(nn.Linear(1, 1, device="meta"), torch.device("meta", 1))


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "3"}, 8, 3),
        ({"LOCAL_SIZE": "2"}, 8, 2),  # of DeepSpeed's launcher
        ({}, 4, 4),  # two machines of four GPUs
        ({}, 1, 1),  # each rank sees its own
        ({}, 16, 8),
        ({}, 0, 1),
    ],
)
def test_ranks_of_a_machine_whose_launcher_does_not_say(variables, gpus, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert _num_local_ranks(8) == expected
