"""`mm-rl`: the command that the launch scripts call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def mm_rl() -> None:
    """RL post-training for language and vision-language models on Ray, megatron-core and vLLM."""


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML with the sections megatron_training, actor_config, rl_config, generate_config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them.", metavar="[a.b=c]...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop before training.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train by GRPO or DAPO."""
    from mindspeed_mm_rl.cli.train import train_from

    try:
        train_from(config, overrides or [], dry_run)
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
