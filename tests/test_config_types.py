"""Every value has the type of its field, said at once when a config is built."""

import dataclasses
import math
import re

import pytest

from grpo_trl import GRPOConfig


@pytest.fixture
def config(tmp_path):
    return lambda **options: GRPOConfig(str(tmp_path), **{"use_cpu": True, "report_to": "none"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": "4"}, "num_generations='4' (str): expected a whole number."),
        ({"num_generations": 4.0}, "num_generations=4.0 (float): expected a whole number."),
        ({"max_completion_length": True}, "max_completion_length=True (bool): expected a whole number."),
        ({"learning_rate": "1e-6"}, "learning_rate='1e-6' (str): expected a number."),
        ({"learning_rate": math.nan}, "learning_rate=nan: expected a finite number"),
        ({"temperature": math.inf}, "temperature=inf: expected a finite number"),
        ({"top_k": 10**30}, "top_k=1000000000000000000000000000000: expected a finite number of at most 64 bits."),
        ({"dynamic_sampling": "yes"}, "dynamic_sampling='yes' (str): expected True or False."),
        ({"variant": ["grpo"]}, "variant=['grpo'] (list): expected text."),
        (
            {"eval_strategy": False},
            "eval_strategy=False (bool): expected one of no, steps, epoch (in YAML no needs quo",
        ),
        ({"optim": "adamw_touch"}, "optim='adamw_touch' (str): expected one of adamw_torch"),
        ({"lr_scheduler_type": "flat"}, "lr_scheduler_type='flat' (str): expected one of linear"),
        (
            {"reward_weights": [1.0, "2"]},
            "reward_weights=[1.0, '2'] (list): expected a list (a number each) or nothing",
        ),
        ({"reward_weights": [math.nan]}, "reward_weights=[nan]: expected a finite number"),
        ({"ref_device": 3}, "ref_device=3 (int): expected a mapping or text or nothing (None)."),
        (
            {"generation_kwargs": {"temperature": "hot"}},
            "generation_kwargs: temperature='hot' (str): expected a number.",
        ),
        (
            {"generation_kwargs": {"min_new_tokens": "a"}},
            "generation_kwargs min_new_tokens='a': expected a whole number",
        ),
        (
            {"generation_kwargs": {"bad_words_ids": [3]}},
            "generation_kwargs bad_words_ids=[3]: expected a list of lists",
        ),
        ({"dataloader_num_workers": None}, "dataloader_num_workers=None (NoneType): expected a whole number."),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 is out of range: expected in [0, 1)."),
        ({"seed": -1}, "seed=-1 is out of range: expected in [0, 4294967295], because numpy"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 is out of range: expected more than 0."),
        ({"save_steps": 0}, "save_steps=0 is out of range: expected more than 0 (below 1: a share of all steps)."),
        ({"num_iterations": None}, "num_iterations=None is out of range: expected at least 1."),
        ({"accelerator_config": "no.json"}, "accelerator_config='no.json' cannot be used: [Errno 2] No such file"),
        ({"accelerator_config": {"warp": 1}}, "accelerator_config={'warp': 1} cannot be used: "),
        ({"optim_args": "momentum"}, "optim_args='momentum' cannot be read; expected key=value,key=value."),
        ({"optim_args": "a=b=c"}, "optim_args='a=b=c' cannot be read; expected key=value,key=value."),
        ({"accelerator_config": "nowhere"}, "accelerator_config='nowhere' cannot be used: [Errno 2] No such file"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw'"),
        (
            {"lr_scheduler_kwargs": {"warp": 1}},
            "lr_scheduler_kwargs={'warp': 1} are not what lr_scheduler_type='linear'",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_kwargs=None are not what lr_scheduler_type='warm",
        ),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16 can be True"),
    ],
)  # fmt: skip
def test_what_is_refused(config, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        config(**options)
    assert str(error.value).count("\n- ") == 1  # and nothing else is blamed


def test_all_at_once_with_what_transformers_finds(config):
    with pytest.raises(ValueError) as error:
        config(
            num_generations="4", temperature=-1.0, seed=-1, optim="x", logging_steps=1.5, label_smoothing_factor=0.5
        )
    named = ("num_generations='4'", "seed=-1", "optim='x'", "logging_steps", "label_smoothing_factor")
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1, "learning_rate": 0, "adam_beta1": 0, "max_grad_norm": math.inf, "repetition_penalty": 2},
        {"scale_rewards": True, "report_to": ["none"], "reward_weights": [1, 2.0], "debug": "underflow_overflow"},
        {"eval_strategy": "no", "save_strategy": "best", "lr_scheduler_type": "constant", "optim_args": "a=1, b=2"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
    ],
)
def test_what_is_accepted(config, options):
    args = config(**options)
    assert dataclasses.replace(args).to_dict() == args.to_dict()  # and so is what is made of it
