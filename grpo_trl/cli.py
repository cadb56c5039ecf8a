"""`grpo-trl train --config recipe.yaml [--field value ...]`: from a recipe to a trained model, with `plan` to the
memory that it takes, and with `check` to a self-test."""

import argparse
import sys
from collections.abc import Sequence

# A new subcommand is one entry, and the function of its name in `commands`, which takes the arguments that remain.
COMMANDS = {
    "train": "train as a recipe says: grpo-trl train --config recipe.yaml [--field value ...]",
    "plan": "say what memory that takes, and whether it fits: grpo-trl plan --config recipe.yaml [--memory 24GiB]",
    "check": "try model, data and rewards in a few minutes: grpo-trl check --config recipe.yaml [--model path]",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `grpo-trl` command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "grpo-trl",
        usage="grpo-trl COMMAND [arguments]",
        epilog="\n".join(f"{name}: {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="`grpo-trl COMMAND --help` lists its arguments")
    command = parser.parse_args(argv[:1]).command
    from . import commands  # only now: the libraries behind them take seconds to import

    getattr(commands, command)(argv[1:])


if __name__ == "__main__":
    main()
