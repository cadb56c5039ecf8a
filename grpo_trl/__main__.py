"""`python -m grpo_trl`: the command `grpo-trl`."""

from .cli import main

if __name__ == "__main__":
    main()
