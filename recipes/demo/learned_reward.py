"""The demo with a learned reward: a tiny DeBERTa learns from pairs which solution is right, GRPO follows its scores.

    python recipes/demo/learned_reward.py --seed 1

The true answers are only watched: `correct_answer` has weight 0.
"""

import sys
from pathlib import Path

import datasets
from arithmetic import build_tokenizer, preferences
from demo import parse_config, report, run
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast, set_seed
from trl import RewardConfig, RewardTrainer
