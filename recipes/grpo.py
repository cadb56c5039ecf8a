"""GRPO as a recipe says.

    python recipes/grpo.py --config recipes/qwen3_0.6b_gsm8k/grpo.yaml [--learning_rate 2e-6 ...]
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/grpo.py --config ...

Any field of docs/configuration.md can be given on the command line. The same as `grpo-trl train`.
"""

import sys

from grpo_trl.cli import train

if __name__ == "__main__":
    train(sys.argv[1:])
