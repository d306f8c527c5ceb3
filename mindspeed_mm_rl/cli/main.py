"""`mm-rl`: the command that the launch scripts call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mindspeed_mm_rl.platforms import signals

_USER_ERROR = 2
_CONFIG = Annotated[Path, typer.Option(help="YAML with the sections megatron_training, actor_config, rl_config, generate_config, eval.")]
_OVERRIDES = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them.", metavar="[a.b=c]...")]
_JSON = Annotated[bool, typer.Option("--json", help="For scripts.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def mm_rl() -> None:
    """RL post-training for language and vision-language models on Ray, megatron-core and vLLM."""
    # New files are 640 and folders 750, in every process of the run and for libraries that write on their own; a stricter umask stays.
    os.umask(os.umask(0o077) | 0o027)


@app.command()
def train(
    config: _CONFIG,
    overrides: _OVERRIDES = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop before training.")] = False,
    debug: _DEBUG = False,
) -> None:
    """Train by the algorithm that megatron_training.stage names.

    Exit codes: 2 for what the user has to mend, 1 for a run that could not go on, 130 and 143 after Ctrl-C and SIGTERM.
    """
    with _told(debug):
        # Inside: importing takes seconds, in which somebody may press Ctrl-C.
        from mindspeed_mm_rl.cli.train import train_from

        train_from(config, overrides or [], dry_run)


@app.command()
def evaluate(config: _CONFIG, overrides: _OVERRIDES = None, debug: _DEBUG = False) -> None:
    """Measure the accuracy of actor_config.load on eval.data_path, without training. Exit codes as for train."""
    with _told(debug):
        from mindspeed_mm_rl.cli.evaluate import evaluate_from

        evaluate_from(config, overrides or [])


@app.command()
def preprocess(
    config: Annotated[Path, typer.Option(help="YAML with the keys input, output_prefix, handler_name, map_keys, and more.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, any number of them.", metavar="[a.b=c]...")] = None,
    debug: _DEBUG = False,
) -> None:
    """Make a text data set into the columns that training reads. Exit code 2 for what the user has to mend."""
    with _told(debug):
        from mindspeed_mm_rl.data.preprocess.command import run

        run(config, overrides or [])


@app.command(name="env")
def environment(as_json: _JSON = False) -> None:
    """Versions and devices, the combinations that are supported, what is wrong and how to mend it. Exit code 2 when something is."""
    with _told(debug=False):
        from mindspeed_mm_rl.cli.environment import show_environment

        is_well = show_environment(as_json)
    if not is_well:
        raise typer.Exit(_USER_ERROR)


@app.command()
def patches(as_json: _JSON = False) -> None:
    """The fixes to versions of other packages in patches/, and which of them apply here."""
    with _told(debug=False):
        from mindspeed_mm_rl.cli.patches import show_patches

        show_patches(as_json)


@app.command(context_settings={"ignore_unknown_options": True})
def node(
    command: Annotated[list[str], typer.Argument(help="What the head runs, with RAY_ADDRESS set, when all machines are there.")],
    debug: _DEBUG = False,
) -> None:
    """Do this machine's part in a run on NNODES machines, as the launch scripts do. Exit code: that of the run, on every machine."""
    with _told(debug):
        from mindspeed_mm_rl.cli.node import run_node

        exit_code = run_node(command)
    raise typer.Exit(exit_code)


@contextmanager
def _told(debug: bool) -> Iterator[None]:
    """An error becomes a line on stderr and an exit code."""
    try:
        yield
    except ImportError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}; `mm-rl env` says what is wrong with this installation", file=sys.stderr)
        raise typer.Exit(_USER_ERROR) from error
    except (ValueError, RuntimeError, OSError, signals.StoppedBySignal) as error:
        if debug:
            raise
        code = getattr(error, "exit_code", _USER_ERROR)
        message = f"{'' if isinstance(error, signals.StoppedBySignal) else 'error: '}{' '.join(str(error).split())}"
        print(message, file=sys.stderr)
        raise typer.Exit(code) from error


def main() -> None:
    """The process; `app` alone leaves the signals and the life of whoever calls it as they are."""
    signals.stop_on_signals()
    try:
        app()
    except SystemExit as end:
        signals.ignore_signals()
        # Threads that wait for a stuck disk are waited for at the end of the interpreter.
        signals.end_soon("a thread that waits for something does not end", end.code if isinstance(end.code, int) else _USER_ERROR)
        raise


if __name__ == "__main__":
    main()
