"""Reward functions that tests send to other processes: importable, and light to import."""

import asyncio
import os
import subprocess
import sys
import time


def tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def generator(completion_ids, **kwargs):
    for ids in completion_ids:
        if len(ids) > 3:
            raise ArithmeticError("too long")
        yield float(len(ids))


def prints(completions, **kwargs):
    print("scored", len(completions))
    return [0.0] * len(completions)


def process_id(prompts, **kwargs):
    return [float(os.getpid())] * len(prompts)


def process_ids(prompts, **kwargs):
    """Of this process and of one that it starts."""
    return [float(os.getpid()), float(subprocess.Popen(["sleep", "60"]).pid)]


def heavy_modules(prompts, **kwargs):
    """How many heavy libraries the process has imported."""
    return [float(sum(name in sys.modules for name in ("torch", "transformers", "trl")))] * len(prompts)


def sleeps_on_slow(prompts, completions, **kwargs):
    if "slow" in completions:
        time.sleep(60)
    return [1.0] * len(prompts)


def starts_a_process_and_sleeps(prompts, log_file, **kwargs):
    child = subprocess.Popen(["sleep", "60"])
    with open(log_file[0], "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def dies_on_die(prompts, completions, **kwargs):
    for completion in completions:
        if completion.startswith("die"):
            os._exit(int(completion[3:]))
    return [1.0] * len(prompts)


def raises_on_bad(prompts, completions, **kwargs):
    if "bad" in completions:
        raise KeyError("no such key")
    return [1.0] * len(prompts)


class Quota(Exception):
    """One that pickle writes and cannot read again."""

    def __init__(self, used, limit):
        super().__init__(f"{used} of {limit} requests")


def raises_quota(prompts, **kwargs):
    raise Quota(9, 8)


def loops_for_ever(prompts, **kwargs):
    while True:
        pass


def verdict(gold, answer):
    return gold == answer


def exits(prompts, **kwargs):
    sys.exit(2)


def raises_on_two(prompts, **kwargs):
    if len(prompts) > 1:
        raise ArithmeticError("only together")
    return [1.0] * len(prompts)


def logs(prompts, completions, trainer_state, log_extra=None, log_metric=None, **kwargs):
    log_extra("upper", [completion.upper() for completion in completions])
    log_metric(name="step", value=trainer_state.global_step)
    return [0.5] * len(prompts)


def meet(folder, name, other):
    """Returns when `other` is in the folder too."""
    open(os.path.join(folder, name), "w").close()
    while not os.path.exists(os.path.join(folder, other)):
        time.sleep(0.01)


def meets_second(prompts, folder, **kwargs):
    meet(folder[0], "first", "second")
    return [1.0] * len(prompts)


def meets_first(prompts, folder, **kwargs):
    meet(folder[0], "second", "first")
    return [2.0] * len(prompts)


def logs_known(prompts, trainer_state, **kwargs):
    history = trainer_state.log_history
    return [10000.0 * len(history) + history[-1]["step"]] * len(prompts)


async def async_sleep(prompts, **kwargs):
    await asyncio.sleep(0.3)
    return [1.0] * len(prompts)


async def async_forever(prompts, **kwargs):
    await asyncio.sleep(60)


async def async_timeout_of_its_own(prompts, **kwargs):
    raise TimeoutError("the judge did not answer")


class AsyncJudge:
    async def __call__(self, prompts, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(prompts)


NOT_A_FUNCTION = 3
