"""mm-convert [Qwen2_5_VLConverter] hf_to_mm|mm_to_hf [--orm] --cfg....   (also: python checkpoint/convert_cli.py ...)"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Run as a script, Python looks for packages beside this file; they lie one folder up.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jsonargparse import auto_cli

from checkpoint.convert import hf_to_mm, mm_to_hf

CONVERTERS = ("Qwen2_5_VLConverter",)
COMMANDS = {"hf_to_mm": hf_to_mm, "mm_to_hf": mm_to_hf}
_KNOWN_ELSEWHERE = ("resplit", "lora_hf_to_mm", "lora_mm_to_hf", "hf_to_mm_dcp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one sentence on standard error and nothing left on disk."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        auto_cli(COMMANDS, args=_spelled_out(_without_converter(given)), as_positional=False, prog="mm-convert")
    except (ValueError, OSError) as error:
        print(f"mm-convert: {error}", file=sys.stderr)
        return 2
    return 0


def _without_converter(arguments: list[str]) -> list[str]:
    """The converter's name is optional: config.json says which model it is."""
    if arguments and arguments[0] not in COMMANDS and arguments[0].endswith("Converter"):
        if arguments[0] not in CONVERTERS:
            nearest = difflib.get_close_matches(arguments[0], CONVERTERS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown converter {arguments[0]!r}; the nearest one is {nearest} (it may also be left out)")
        arguments = arguments[1:]
    if arguments and arguments[0] in _KNOWN_ELSEWHERE:
        raise ValueError(f"{arguments[0]} is not offered at tp 1, pp 1, where nothing is split; the commands are {', '.join(COMMANDS)}")
    return arguments


def _spelled_out(arguments: list[str]) -> list[str]:
    """--orm alone is how MindSpeed-LLM's converter takes it."""
    return ["--cfg.orm=true" if argument == "--orm" else argument for argument in arguments]


if __name__ == "__main__":
    sys.exit(main())
