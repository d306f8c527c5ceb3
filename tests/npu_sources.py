"""What this package uses of packages that need an NPU, found in its own code, and what those packages have, read from their files.

Nothing of theirs is imported: Python is parsed, and torch_npu's operators are declared by strings in its library.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

PACKAGES = ("torch_npu", "mindspeed", "vllm_ascend")
COMES_WITH = {"torch_npu.npu.ipc_collect": "torch_npu.multiprocessing"}
"""Names that came in the same version as a module, and are used where that is found."""
_OPERATOR = re.compile(rb"(?<=\0)(?:_?npu_)\w+(?:\.\w+)?\([^\0]*\) -> [^\0]+(?=\0)")


@dataclass(frozen=True)
class Use:
    """Example: Use("platforms/npu.py:9", "torch_npu", "npu_swiglu", positional=1, keywords=("dim",))."""

    place: str
    module: str
    name: str
    """"" where the module alone is imported."""
    positional: int | None = None
    """None where nothing is called."""
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.place}: {self.module}{'.' if self.name else ''}{self.name}"


def uses(folder: Path) -> list[Use]:
    """Of every Python file below: imports, attributes of imported modules, and how their functions are called."""
    found = [use for path in sorted(folder.rglob("*.py")) for use in _of_file(path, str(path.relative_to(folder)))]
    return [use for use in found if use.module.split(".")[0] in PACKAGES]


def _of_file(path: Path, name: str) -> Iterator[Use]:
    tree = ast.parse(path.read_text())
    modules, taken = _modules(tree), _taken(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        place = f"{name}:{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else name
        if isinstance(node, ast.Import):
            yield from (Use(place, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (Use(place, node.module, alias.name) for alias in node.names)
        elif (module := _imported(node)) is not None:
            yield Use(place, module, "")
        elif isinstance(node, ast.Attribute) and (owner := _owner(node.value, modules)) is not None:
            yield Use(place, owner, node.attr, *_arguments(calls.get(id(node))))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from (Use(place, module, name, *_arguments(node)) for module, name in taken.get(node.func.id, ()))


def _arguments(call: ast.Call | None) -> tuple[int | None, tuple[str, ...]]:
    return (len(call.args), tuple(keyword.arg for keyword in call.keywords if keyword.arg)) if call else (None, ())


def _taken(tree: ast.Module) -> dict[str, list[tuple[str, str]]]:
    """Name in the file -> (module, name) that it may be: two branches may take it from two modules."""
    names: dict[str, list[tuple[str, str]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names.setdefault(alias.asname or alias.name, []).append((node.module, alias.name))
    return names


def _modules(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> module."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (module := _imported(node.value)):
            names[node.targets[0].id] = module
    return names


def _imported(node: ast.AST) -> str | None:
    """Module of importlib.import_module("module")."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "import_module":
        return None
    return node.args[0].value if isinstance(node.args[0], ast.Constant) else None


def _owner(node: ast.expr, modules: dict[str, str]) -> str | None:
    """Module that an attribute is taken of. torch.npu is torch_npu's, and what the platforms call their runtime is it or torch.cuda."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "npu"):
        return "torch_npu.npu"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_runtime":
        return "torch_npu.npu"
    return _imported(node)


def optional(folder: Path) -> set[str]:
    """Modules that the package looks for with find_spec before it uses them."""
    nodes = (node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    calls = (
        node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "find_spec"
    )
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def options(folder: Path) -> set[str]:
    """Command line arguments that the package gives to MindSpeed."""
    tree = ast.parse((folder / "platforms" / "npu.py").read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and str(node.value).startswith("--")}


def declared_options(package: Path) -> set[str]:
    return {option for path in package.rglob("*.py") for option in re.findall(r"""['"](--[a-z0-9-]+)['"]""", path.read_text())}


def problem(use: Use, sources: Path, looked_for: Collection[str] = ()) -> str | None:
    """Why the use can't work with these sources; None where nothing speaks against it, or where what it needs is looked for first."""
    for module in looked_for:
        needed = COMES_WITH.get(f"{use.module}.{use.name}", use.module)
        if f"{needed}.".startswith(f"{module}.") and _file(sources, module) is None:
            return None
    file = _file(sources, use.module)
    if file is None:
        return f"{use}: there is no module {use.module}"
    if not use.name:
        return None
    operators = _operators(sources) if use.module == "torch_npu" else {}
    if use.name in operators:
        return (
            None if any(_fits(use, schema) for schema in operators[use.name]) else f"{use} is declared {' or '.join(operators[use.name])}"
        )
    names = bound_names(file)
    if use.name in names or _file(sources, f"{use.module}.{use.name}") is not None:
        function = _definition(file, use.name)
        return None if function is None or use.positional is None else _misfit(use, function)
    return f"{use}: {file.relative_to(sources)} has no such name"


def _file(sources: Path, module: str) -> Path | None:
    base = sources.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


@lru_cache(maxsize=1)
def _operators(sources: Path) -> dict[str, list[str]]:
    """Name -> declarations of its overloads."""
    found: dict[str, list[str]] = {}
    for text in sorted({match.decode() for match in _OPERATOR.findall((sources / "torch_npu/lib/libtorch_npu.so").read_bytes())}):
        found.setdefault(re.split(r"[.(]", text)[0], []).append(text)
    return found


def _fits(use: Use, declaration: str) -> bool:
    if use.positional is None:
        return True
    arguments = torch._C.parse_schema(declaration).arguments
    by_place = [argument.name for argument in arguments if not argument.kwarg_only]
    given = {*by_place[: use.positional], *use.keywords}
    needed = {argument.name for argument in arguments if not argument.has_default_value()}
    return use.positional <= len(by_place) and needed <= given <= {argument.name for argument in arguments}


@lru_cache(maxsize=64)
def bound_names(file: Path) -> dict[str, ast.stmt]:
    """Names of a module, of whatever kind, and the statements that bind them."""
    names: dict[str, ast.stmt] = {}
    for node in _statements(ast.parse(file.read_text()).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            other = _neighbour(file, node)
            names |= bound_names(other) if other else {}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= dict.fromkeys((alias.asname or alias.name.split(".")[0] for alias in node.names), node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= dict.fromkeys((name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)), node)
    return names


def _neighbour(file: Path, node: ast.ImportFrom) -> Path | None:
    other = file.parent / f"{node.module}.py"
    return other if node.level == 1 and other.is_file() else None


def _definition(file: Path, name: str) -> ast.FunctionDef | None:
    """Of a function, or of how a class is made, also where it comes from a neighbour of the file; None where it is anything else."""
    node = bound_names(file).get(name)
    if isinstance(node, ast.ImportFrom):
        other = _neighbour(file, node)
        return _definition(other, next((alias.name for alias in node.names if alias.asname == name), name)) if other else None
    if isinstance(node, ast.ClassDef):
        return next((made for made in node.body if isinstance(made, ast.FunctionDef) and made.name == "__init__"), None)
    return node if isinstance(node, ast.FunctionDef) else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """With those below `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(vars(node).get(part, []))
            for handler in vars(node).get("handlers", []):
                yield from _statements(handler.body)


def _misfit(use: Use, function: ast.FunctionDef) -> str | None:
    arguments = function.args
    by_place = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args) if argument.arg != "self"]
    known = {*by_place, *(argument.arg for argument in arguments.kwonlyargs)}
    given = {*by_place[: use.positional], *use.keywords}
    needed = set(by_place[: len(by_place) - len(arguments.defaults)])
    too_many = use.positional > len(by_place) and arguments.vararg is None
    unknown = given - known if arguments.kwarg is None else set()
    return f"{use} is declared ({ast.unparse(arguments)})" if too_many or unknown or needed - given else None
