"""A rank's state on disk: what comes back is what was saved, and reading it runs no code."""

import json
import math

import pytest
import torch
from safetensors import SafetensorError, safe_open

from grpo_trl import GRPOConfig, checkpoint
from grpo_trl.batch import Group, Prompt, RolloutBatch
from tests.tiny import tiny_model


def batch(draw=0):
    """Two completions with every kind of field that a collected batch has: ids, masks, fp32 numbers."""
    group = Group(Prompt([5, 6], {"prompt": "?"}, draw), [[7, 8, 2], [9]], [True, False], [[-1.5, -0.1, -3], [-2]])
    rows = RolloutBatch.from_groups([group], pad_token_id=0)
    rows.advantages = torch.tensor([0.1 + draw, -1 / 3])
    rows.old_per_token_logps = -rows.completion_ids / 3
    rows.token_weights = torch.rand(3, 2).T  # not contiguous
    return rows


def state(buffer=None, **numbers):
    loader = {"position": 6, "collection": None if buffer is None else 3, "buffer": buffer or {}}
    return {"loader": loader, "metrics": {"sums": {"reward": [0.1 + 0.2, 4.0]}, "extremes": {}}, **numbers}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    rows = batch()
    saved = state(rows.tensors(), num_tokens=12345678901)
    checkpoint.save(str(tmp_path), 0, saved)
    assert saved["loader"]["buffer"].keys() == rows.tensors().keys()  # the caller's state is left as it was

    loaded = checkpoint.load(str(tmp_path), 0)
    tensors = loaded["loader"].pop("buffer")
    assert tensors.keys() == rows.tensors().keys()
    for name, tensor in rows.tensors().items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name  # bit for bit
    assert loaded == {
        "loader": {"position": 6, "collection": 3},
        "metrics": {"sums": {"reward": [0.1 + 0.2, 4.0]}, "extremes": {}},  # floats survive to the last digit
        "num_tokens": 12345678901,
    }
    RolloutBatch(**tensors)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_dtypes_survive(tmp_path, dtype):
    tensor = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(dtype)
    checkpoint.save(str(tmp_path), 0, state({"tensor": tensor}))
    loaded = checkpoint.load(str(tmp_path), 0)["loader"]["buffer"]["tensor"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert loaded.device.type == "cpu"


def test_views_of_one_tensor_are_saved_as_they_are_seen(tmp_path):
    # a buffer whose fields are slices of something larger
    whole = torch.arange(12.0).view(3, 4)
    checkpoint.save(str(tmp_path), 0, state({"left": whole[:, :2], "right": whole[:, 2:]}))
    loaded = checkpoint.load(str(tmp_path), 0)["loader"]["buffer"]
    assert loaded["left"].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert loaded["right"].tolist() == [[2, 3], [6, 7], [10, 11]]


def test_no_buffer_between_two_collections(tmp_path):
    checkpoint.save(str(tmp_path), 0, state())
    assert checkpoint.load(str(tmp_path), 0)["loader"] == {"position": 6, "collection": None, "buffer": {}}


def test_numbers_that_are_not_finite_survive(tmp_path):
    checkpoint.save(str(tmp_path), 0, state(reward=math.nan, worst=-math.inf))
    loaded = checkpoint.load(str(tmp_path), 0)
    assert math.isnan(loaded["reward"]) and loaded["worst"] == -math.inf


def test_saving_again_replaces_what_was_there(tmp_path):
    checkpoint.save(str(tmp_path), 0, state(batch().tensors(), num_tokens=1))
    checkpoint.save(str(tmp_path), 0, state(num_tokens=2))
    loaded = checkpoint.load(str(tmp_path), 0)
    assert loaded["loader"]["buffer"] == {} and loaded["num_tokens"] == 2


def test_ranks_are_separate(tmp_path):
    folder = tmp_path / "checkpoint-3"  # any rank may be the first to write
    for rank in (1, 0):
        checkpoint.save(str(folder), rank, state(batch(draw=rank).tensors(), num_tokens=100 + rank))
    assert len(files(folder)) == 4
    for rank in (0, 1):
        loaded = checkpoint.load(str(folder), rank)
        assert loaded["num_tokens"] == 100 + rank
        assert torch.equal(loaded["loader"]["buffer"]["advantages"], batch(draw=rank).advantages)


def test_loading_executes_no_code(tmp_path):
    checkpoint.save(str(tmp_path), 0, state(batch().tensors(), num_tokens=1))
    kinds = {path.suffix: path for path in tmp_path.iterdir()}
    assert kinds.keys() == {".json", ".safetensors"}
    # each file in full is what its name says: no pickle hides in either
    numbers = json.loads(kinds[".json"].read_bytes().decode("ascii"))
    assert "buffer" not in numbers["loader"]
    content = kinds[".safetensors"].read_bytes()
    header = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + header])
    assert 8 + header + max(entry["data_offsets"][1] for entry in entries.values()) == len(content)
    with safe_open(kinds[".safetensors"], "pt") as tensors:
        assert set(tensors.keys()) == batch().tensors().keys()


def test_a_state_that_needs_code_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(str(tmp_path), 0, state(callback=test_round_trip))


def test_a_pickle_in_place_of_a_file_is_refused(tmp_path):
    for suffix, error in ((".json", ValueError), (".safetensors", SafetensorError)):
        checkpoint.save(str(tmp_path), 0, state(batch().tensors()))
        (path,) = tmp_path.glob(f"*{suffix}")
        torch.save({"position": Trap(tmp_path / "executed")}, path)
        with pytest.raises(error):
            checkpoint.load(str(tmp_path), 0)
    assert not (tmp_path / "executed").exists()
    with open(path, "rb") as file:  # the trap does work where pickles are read
        torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_checkpoint_without_our_state_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_only_model=True, or with fewer ranks") as error:
        checkpoint.load(str(tmp_path), 0)
    assert str(tmp_path) in str(error.value) and "model=" in str(error.value)


def test_a_rank_that_was_not_there_says_so(tmp_path):
    checkpoint.save(str(tmp_path), 0, state(batch().tensors()))
    with pytest.raises(FileNotFoundError, match=r"rollout_state_1\.json is missing"):
        checkpoint.load(str(tmp_path), 1)


def test_a_missing_buffer_is_not_taken_for_an_empty_one(tmp_path):
    checkpoint.save(str(tmp_path), 0, state(batch().tensors()))
    (tmp_path / "rollout_buffer_0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="rollout_buffer_0"):
        checkpoint.load(str(tmp_path), 0)


def test_a_write_that_failed_leaves_no_state_that_loads(tmp_path):
    # numbers are written last: without them nothing is there
    with pytest.raises(TypeError):
        checkpoint.save(str(tmp_path), 0, state(batch().tensors(), broken=object()))
    assert not any(name.endswith(".json") for name in files(tmp_path))
    with pytest.raises(FileNotFoundError):
        checkpoint.load(str(tmp_path), 0)


@pytest.mark.parametrize(("name", "value"), [("num_iterations", 2), ("max_grad_norm", 0.5), ("learning_rate", 1e-3)])
def test_a_setting_that_changed_is_named_with_what_becomes_of_it(tmp_path, name, value):
    then, now = (
        checkpoint.config_values(GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", **options))
        for options in ({}, {name: value})
    )
    (phrase,) = (text for text in checkpoint.changed_config(then, now) if text.startswith(f"{name}: "))
    assert ("without effect" in phrase) == (name == "learning_rate")


# ---- Reference ----


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_that_changed_comes_back(tmp_path, tied):
    changed = tiny_model("qwen3", seed=1, tie_word_embeddings=tied)
    checkpoint.save_reference(str(tmp_path), changed, write=True)
    with safe_open(tmp_path / checkpoint.REFERENCE_NAME, "pt") as tensors:
        written = {"lm_head.weight", "model.embed_tokens.weight"}.intersection(tensors.keys())
    assert len(written) == (1 if tied else 2)
    model = tiny_model("qwen3", seed=2, tie_word_embeddings=tied)
    embeddings = model.get_input_embeddings().weight
    checkpoint.load_reference(str(tmp_path), model)
    for name, weight in changed.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.get_input_embeddings().weight is embeddings  # in place: whoever holds the model sees it
    assert (model.get_output_embeddings().weight is embeddings) == tied


def test_a_missing_reference_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="reference"):
        checkpoint.load_reference(str(tmp_path), tiny_model("qwen3"))
