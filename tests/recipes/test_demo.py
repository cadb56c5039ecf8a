"""The demo: its task by hand-worked examples, its settings parsed, and (slow) what it must reach."""

import random
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"
sys.path.append(str(DEMO))  # the scripts import each other as they do when run

import arithmetic  # noqa: E402
import demo  # noqa: E402
import learned_reward  # noqa: E402
import warm_start  # noqa: E402

YAMLS = ("demo.yaml", "demo_seed_style.yaml", "learned_reward.yaml")


def reply(text):
    return [{"role": "assistant", "content": text}]


def config(name, *argv):
    return demo.parse_config(["--config", str(DEMO / name), *argv])


@pytest.mark.parametrize(
    ("pair", "carry", "expected"),
    [
        ((37, 48), None, "<think>7+8=15,1+3+4=8</think><answer>85</answer>"),
        ((37, 48), 0, "<think>7+8=15,0+3+4=7</think><answer>75</answer>"),
        ((31, 48), None, "<think>1+8=9,0+3+4=7</think><answer>79</answer>"),
        ((31, 48), 1, "<think>1+8=9,1+3+4=8</think><answer>89</answer>"),
        ((99, 95), None, "<think>9+5=14,1+9+9=19</think><answer>194</answer>"),
        ((10, 10), None, "<think>0+0=0,0+1+1=2</think><answer>20</answer>"),
    ],
)
def test_solution(pair, carry, expected):
    assert arithmetic.solution(*pair, carry=carry) == expected


def test_every_solution_is_right_and_is_wrong_without_its_carry():
    train, held_out = arithmetic.splits()
    for a, b in train + held_out:
        right = arithmetic.correct_answer([reply(arithmetic.solution(a, b))], [str(a + b)])
        forgotten = arithmetic.correct_answer([reply(arithmetic.solution(a, b, carry=0))], [str(a + b)])
        assert right == [1.0]
        assert forgotten == [float(a % 10 + b % 10 < 10)]


def test_reward_wants_the_tag_the_number_and_the_end():
    texts = [
        "<think></think><answer>85</answer>",
        "85",
        "<answer>85</answer>1",
        "<answer>185</answer>",
        "<answer>85",
        "",
    ]
    rewards = arithmetic.correct_answer([reply(text) for text in texts], ["85"] * 6, prompts=None)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_held_out_questions_are_not_trained_on():
    train, held_out = arithmetic.splits()
    assert len(train) == 7600
    assert len(held_out) == 500
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == {(a, b) for a in range(10, 100) for b in range(10, 100)}
    assert arithmetic.splits() == (train, held_out)


def test_demonstrations_forget_the_carry_as_often_as_told():
    train, _ = arithmetic.splits()
    rows = arithmetic.demonstrations(train, 0.8, seed=0)
    forgotten = carries = 0
    for (a, b), row in zip(train, rows, strict=True):
        text = row["completion"][0]["content"]
        assert text in (arithmetic.solution(a, b), arithmetic.solution(a, b, carry=0))
        carries += arithmetic.carry_of(a, b)
        forgotten += text != arithmetic.solution(a, b)
    assert forgotten / carries == pytest.approx(0.8, abs=0.02)  # 3.5 standard deviations of 3400 draws
    assert rows[:50] == arithmetic.demonstrations(train, 0.8, seed=0)[:50]
    assert rows[:50] != arithmetic.demonstrations(train, 0.8, seed=1)[:50]


def test_mistakes_are_never_the_solution_and_half_are_about_the_carry():
    chance = random.Random(0)
    tokenizer = arithmetic.build_tokenizer()
    pairs = arithmetic.splits()[0][:2000]
    wrong_carries = 0
    for a, b in pairs:
        text = arithmetic.mistake(a, b, chance)
        assert text != arithmetic.solution(a, b)
        assert len(tokenizer(text)["input_ids"]) <= 24  # as long as a completion may be
        wrong_carries += text == arithmetic.solution(a, b, carry=1 - arithmetic.carry_of(a, b))
    assert wrong_carries / 2000 == pytest.approx(0.5, abs=0.05)  # four standard deviations


def test_preferences_are_a_right_and_a_wrong_solution():
    pairs = [(37, 48), (31, 48)]
    for (a, b), row in zip(pairs, arithmetic.preferences(pairs, seed=0), strict=True):
        assert row["prompt"] == arithmetic.question(a, b)
        assert row["chosen"] == reply(arithmetic.solution(a, b))
        assert row["rejected"] != row["chosen"]


def test_tokenizer_round_trip(tmp_path):
    built = arithmetic.build_tokenizer()
    built.save_pretrained(tmp_path)
    for tokenizer in (built, type(built).from_pretrained(tmp_path)):
        text = arithmetic.solution(37, 48)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 20  # one per digit, sign and tag
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        prompt = tokenizer.apply_chat_template(arithmetic.question(37, 48), tokenize=False, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nWhat is 37 + 48?<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert tokenizer.unk_token_id not in prompt_ids
        assert tokenizer.decode(prompt_ids) == prompt


def test_longest_solution_and_its_eos_fit():
    tokenizer = arithmetic.build_tokenizer()
    longest = max(len(tokenizer(arithmetic.solution(a, b))["input_ids"]) for a, b in [(99, 99), (95, 95), (90, 90)])
    assert longest + 1 <= min(config(name).max_completion_length for name in YAMLS)


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_is_parsed_and_can_be_overridden(name, tmp_path):
    args = config(name, "--seed", "7", "--output_dir", str(tmp_path), "--learning_rate", "2e-5")
    assert (args.seed, args.output_dir, args.learning_rate) == (7, str(tmp_path), 2e-5)
    assert args.eval_temperature == 0
    assert config(name).output_dir == f"outputs/{name.removesuffix('.yaml')}"


def test_styles():
    plain, seed_style = config("demo.yaml"), config("demo_seed_style.yaml")
    names = ("num_iterations", "num_generations", "beta", "scale_rewards")
    assert [getattr(plain, name) for name in names] == [1, 8, 0.0, "group"]
    assert [getattr(seed_style, name) for name in names] == [4, 4, 0.01, "batch_relative"]
    assert demo.parse_config(["--seed", "3"]).scale_rewards == "group"  # without --config: demo.yaml


def test_a_seed_makes_the_models():
    tokenizer = arithmetic.build_tokenizer()
    for build in (warm_start.build_policy, learned_reward.build_reward_model):
        first, again, other = (dict(build(tokenizer, seed).named_parameters()) for seed in (0, 0, 1))
        assert all((first[name] == again[name]).all() for name in first)
        assert any((first[name] != other[name]).any() for name in first)


def check(result, args):
    assert result.before.accuracy >= 0.4  # right sometimes: it adds, and forgets the carry
    assert result.before.carry_accuracy <= 0.2
    assert result.gain >= 25, (args.seed, result)
    assert (Path(args.output_dir) / "training_metrics.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)  # beside another test on as many cores
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param("demo.yaml", 0, marks=pytest.mark.ci),
        *(("demo.yaml", seed) for seed in (1, 2)),
        *(("demo_seed_style.yaml", seed) for seed in (0, 1, 2)),
    ],
)
def test_demo_gains_25_points(name, seed, tmp_path, capsys):
    args = config(name, "--seed", str(seed), "--output_dir", str(tmp_path))
    result = demo.run(args)
    check(result, args)
    demo.report(result, args)
    shown = capsys.readouterr().out
    assert f"{result.before.accuracy:.1%}" in shown
    assert "forgetting the carry" in shown


@pytest.mark.slow
def test_learned_reward_gains_25_points(tmp_path):
    args = config("learned_reward.yaml", "--output_dir", str(tmp_path))
    result, reward_accuracy, _ = learned_reward.run_with_learned_reward(args)
    assert reward_accuracy >= 0.8  # about 1 on wrong carries and on garbled text, 0.7 on single digits
    check(result, args)
