"""Reward functions that fail in the middle of a real run. What each error says in full: tests/rewards/."""

import json
import math
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from grpo_trl.rewards.isolation import RewardTimeoutError
from tests.test_trainer import logged, trainer, weights


def lengths(completions):
    return [float(len(text)) for text in completions]


def hangs_at_the_second_step(completions, trainer_state, **kwargs):
    if trainer_state.global_step:
        time.sleep(600)
    return lengths(completions)


BAD = {
    "raises": (None, RuntimeError, r"Reward function 'fails' failed on row 0: KeyError: 'lost'"),
    "nan": ([math.nan] * 8, ValueError, r"'fails' returned nan for row 0; expected a finite number"),
    "inf": ([1.0] * 7 + [math.inf], ValueError, r"'fails' returned inf for row 7; expected a finite number"),
    "none": ("None", ValueError, r"'fails' returned None \(NoneType\); expected a list of 8"),
    "text": (["good"] * 8, ValueError, r"'fails' returned 'good' \(str\) for row 0; expected a number"),
    "count": ([1.0] * 7, ValueError, r"'fails' returned 7 rewards, but 8 were expected"),
    "generator": ("generator", RuntimeError, r"Reward function 'fails' failed on row 0: ZeroDivisionError"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_ends_the_run_and_names_function_and_row(tmp_path, what):
    output, error, message = BAD[what]

    def fails(completions, trainer_state, **kwargs):
        if trainer_state.global_step < 1:
            return lengths(completions)
        if what == "raises":
            raise KeyError("lost")
        if what == "generator":
            return (1 / 0 for _ in completions)
        return None if output == "None" else output

    run = trainer(tmp_path, rewards=fails, num_iterations=1)
    with pytest.raises(error, match=message):
        run.train()
    assert run.state.global_step == 1


def test_a_function_that_hangs_is_killed_at_its_time_out(tmp_path):
    run = trainer(tmp_path, rewards=hangs_at_the_second_step, num_iterations=1, reward_timeout=3.0)
    start = time.monotonic()
    with pytest.raises(RewardTimeoutError, match=r"'hangs_at_the_second_step' took longer than its time-out of 3 s"):
        run.train()
    assert time.monotonic() - start < 60 and run.state.global_step == 1


def test_rewards_that_never_apply_are_a_run_without_policy_gradient(tmp_path):
    def never(completions, **kwargs):
        return [None] * len(completions)

    run = trainer(tmp_path, rewards=never, num_iterations=1, beta=0.0, max_steps=2)
    before = weights(run)
    run.train()
    assert logged(run, "grad_norm") == [0.0, 0.0] and not logged(run, "reward")
    assert all(torch.equal(before[name], weight) for name, weight in weights(run).items())


class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps([len(text) for text in texts]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing on the console."""


def test_a_reward_server_that_goes_away_ends_the_run_with_its_error(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = []

    def judged(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 2 and not asked:
            server.shutdown()
            server.server_close()
            asked.append(trainer_state.global_step)
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}", data=json.dumps(completions).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    run = trainer(tmp_path, rewards=judged, num_iterations=1, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match=r"Reward function 'judged' failed on row 0: URLError: .*refused"):
        run.train()
    assert asked == [2] and run.state.global_step == 2
    assert (tmp_path / "checkpoint-2").is_dir()  # to go on from, once the server is back
