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

from checkpoint.convert import hf_to_mm, hf_to_mm_dcp, mm_to_hf, mm_to_hf_dcp, resplit
from checkpoint.inspection import inspect
from checkpoint.verification import verify

CONVERTERS = ("Qwen2_5_VLConverter",)
COMMANDS = {
    "hf_to_mm": hf_to_mm,
    "mm_to_hf": mm_to_hf,
    "resplit": resplit,
    "hf_to_mm_dcp": hf_to_mm_dcp,
    "mm_to_hf_dcp": mm_to_hf_dcp,
    "inspect": inspect,
    "verify": verify,
}
_FOLDERS = {"inspect": ("--cfg.path",), "verify": ("--cfg.first", "--cfg.second")}
"""What stands behind these without a name."""
_SWITCHES = {"--orm": "--cfg.orm=true", "--moe-tp-extend-ep": "--cfg.format.moe_tp_extend_ep=true"}
_NOT_OFFERED = ("lora_hf_to_mm", "lora_mm_to_hf", "hf_to_mm_ldt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when verify finds a difference; 2 with one sentence on standard error and nothing left on disk."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = auto_cli(COMMANDS, args=_named(_spelled_out(_without_converter(given))), as_positional=False, prog="mm-convert")
    except (ValueError, OSError) as error:
        print(f"mm-convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mm-convert: stopped; nothing was written", file=sys.stderr)
        return 130
    return status or 0


def _without_converter(arguments: list[str]) -> list[str]:
    """The converter's name is optional: config.json says which model it is."""
    if arguments and arguments[0] not in COMMANDS and arguments[0].endswith("Converter"):
        if arguments[0] not in CONVERTERS:
            nearest = difflib.get_close_matches(arguments[0], CONVERTERS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown converter {arguments[0]!r}; the nearest one is {nearest} (it may also be left out)")
        arguments = arguments[1:]
    if arguments and arguments[0] in _NOT_OFFERED:
        raise ValueError(f"{arguments[0]} is not offered; the commands are {', '.join(COMMANDS)}")
    return arguments


def _spelled_out(arguments: list[str]) -> list[str]:
    """Some switches stand alone, as MindSpeed-LLM's converter takes them."""
    return [_SWITCHES.get(argument, argument) for argument in arguments]


def _named(arguments: list[str]) -> list[str]:
    """The folders of inspect and verify stand alone: mm-convert verify A B."""
    names = iter(_FOLDERS.get(arguments[0], ()) if arguments else ())
    named, previous = arguments[:1], ""
    for argument in arguments[1:]:
        is_folder = not argument.startswith("-") and (not previous.startswith("--") or "=" in previous)
        name = next(names, None) if is_folder else None
        named += [argument] if name is None else [name, argument]
        previous = argument
    return named


if __name__ == "__main__":
    sys.exit(main())
