"""GRPO as a recipe says.

    python recipes/grpo.py --config recipes/qwen3_0.6b_gsm8k/grpo.yaml [--learning_rate 2e-6 ...]
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/grpo.py --config ...

Any field of docs/configuration.md can be given on the command line. The same as `grpo-trl train`. Without arguments it
repeats the run whose `recipe.yaml` lies beside it, as in the folder of an epoch.
"""

import sys
from pathlib import Path

from grpo_trl.commands import train

if __name__ == "__main__":
    beside = Path(__file__).with_name("recipe.yaml")
    train(sys.argv[1:] or (["--config", str(beside)] if beside.is_file() else []))
