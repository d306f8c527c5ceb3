"""The house rules that a reader relies on: imports go down the floors, files stay small, keys are a decision."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mindspeed_mm_rl.config.profiler import Integrated, ProfilerConfig
from mindspeed_mm_rl.config.schema import Config, EvalConfig, GenerateConfig, MegatronConfig, RLConfig, Section

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mindspeed_mm_rl"
FLOORS = (
    ("platforms",),
    ("types", "config", "metrics", "sinks", "report"),
    ("algorithms", "rewards", "data", "models"),
    ("engines",),
    ("weights",),
    ("workers",),
    ("trainer",),
    ("cli",),
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# The engines fill and read the carriers' memory themselves: a weight is never copied on the way.
ALLOWED_UP = {("engines", "weights.host"), ("engines", "weights.push"), ("engines", "weights.device")}
CHECKPOINT_MAY_IMPORT = ("config.composition", "config.model_file") + tuple(
    f"models.{module}"
    for module in (
        "dialects",
        "name_rules",
        "names",
        "placement",
        "rank_files",
        "saved_weights",
        "torch_files",
        "weight_files",
        "weight_layout",
        "weight_sources",
    )
)
MAY_REPLACE = {
    # Variables that say how a library stands, not what it does.
    ("mindspeed_mm_rl/engines/megatron/process_groups.py", "megatron.core.parallel_state._EMBEDDING_GLOBAL_RANKS"),
    ("mindspeed_mm_rl/engines/megatron/process_groups.py", "megatron.core.parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS"),
    ("mindspeed_mm_rl/workers/placement.py", "ray._private.worker._worker_logs_enabled"),
}
FILE_LINES, FUNCTION_LINES, ITERATION_LINES = 400, 60, 120


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert files
    return files


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name_of(path))


def package_imports(path: Path) -> Iterator[str]:
    """Modules below the package that a file imports, wherever in the file: `models.names` for mindspeed_mm_rl.models.names."""
    for node in ast.walk(tree_of(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name_of(path)}: relative import"
            names = [f"{node.module}.{alias.name}" if node.module == PACKAGE.name else node.module for alias in node.names]
        for name in names:
            if name.startswith(f"{PACKAGE.name}."):
                yield name.removeprefix(f"{PACKAGE.name}.")


def test_every_module_has_a_floor():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules - {"__init__", "__pycache__"} <= set(FLOOR_OF)


def test_imports_go_down():
    wrong = []
    for path in python_files(PACKAGE.name):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported in package_imports(path):
            above = FLOOR_OF[imported.split(".")[0]] > FLOOR_OF.get(own, len(FLOORS))
            if above and (own, imported) not in ALLOWED_UP:
                wrong.append(f"{name_of(path)} imports {imported}")
    assert not wrong


def test_the_converter_uses_the_name_table_alone():
    imports = {(name_of(path), module) for path in python_files("checkpoint") for module in package_imports(path)}
    assert not [(name, module) for name, module in imports if module not in CHECKPOINT_MAY_IMPORT]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_are_small():
    wrong = []
    for path in python_files(PACKAGE.name, "checkpoint", "patches", "examples", "tests"):
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES:
            wrong.append(f"{name_of(path)}: {lines} lines")
        limit = ITERATION_LINES if name_of(path) == f"{PACKAGE.name}/trainer/rl.py" else FUNCTION_LINES
        for function in functions(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > limit:
                wrong.append(f"{name_of(path)}: {function.name} has {length} lines")
    assert not wrong


def test_signatures_are_annotated():
    wrong = []
    for path in python_files(PACKAGE.name, "checkpoint", "patches"):
        for function in functions(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [argument.arg for argument in arguments if argument.annotation is None and argument.arg not in ("self", "cls")]
            if bare or (function.returns is None and function.name != "__init__"):
                wrong.append(f"{name_of(path)}: {function.name} {bare}")
    assert not wrong


def test_no_file_is_called_utils():
    nouns_of_nothing = ("utils", "util", "helpers", "misc")
    assert not [name_of(path) for path in python_files(PACKAGE.name, "checkpoint", "patches", "tests") if path.stem in nouns_of_nothing]


def test_no_global_and_no_swallowed_exception():
    wrong = []
    for path in python_files(PACKAGE.name, "checkpoint", "patches"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Global):
                wrong.append(f"{name_of(path)}:{node.lineno} global")
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
                if broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                    wrong.append(f"{name_of(path)}:{node.lineno} swallows {'everything' if node.type is None else node.type.id}")
    assert not wrong


def attribute_chains(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node.lineno
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + ([node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
            yield from ((name, node.lineno) for name in names)


def test_devices_are_the_platforms_business():
    devices = re.compile(r"^(torch\.(cuda|npu)|torch_npu)\b")
    files = [path for path in python_files(PACKAGE.name, "checkpoint") if "platforms" not in path.parts]
    assert not [f"{name_of(path)}:{line} {chain}" for path in files for chain, line in attribute_chains(path) if devices.match(chain)]


def imported_names(path: Path) -> dict[str, str]:
    """What each name of a file that comes from an import means: {"np": "numpy", "LLM": "vllm.LLM"}."""
    names = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names if not alias.asname}
            names |= {top: top for top in tops} | {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def replaced_attributes(path: Path) -> Iterator[str]:
    """`torch.compile` for an assignment to it, whatever `torch` is called in the file."""
    names = imported_names(path)
    for node in ast.walk(tree_of(path)):
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) else ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            chain = f"{ast.unparse(node.args[0])}.*"
        first, _, rest = chain.partition(".")
        if first in names and not names[first].startswith(PACKAGE.name):
            yield f"{names[first]}.{rest}"


def test_other_packages_are_changed_in_patches_alone():
    files = [path for path in python_files(PACKAGE.name, "checkpoint") if "platforms" not in path.parts]
    wrong = {(name_of(path), name) for path in files for name in replaced_attributes(path)} - MAY_REPLACE
    assert not wrong
    assert "torch.distributed.all_gather" in set(replaced_attributes(REPOSITORY / "patches" / "torch_uneven_collectives.py"))


def test_the_environment_is_read_in_one_place():
    uses = {(name_of(path), chain) for path in python_files(PACKAGE.name) for chain, _ in attribute_chains(path)}
    readers = {name for name, chain in uses if chain in ("os.environ", "os.getenv")}
    assert readers <= {f"{PACKAGE.name}/platforms/env.py"}


def schema_keys() -> list[str]:
    sections = {"megatron_training": MegatronConfig, "rl_config": RLConfig, "generate_config": GenerateConfig, "eval": EvalConfig}
    sections |= {"profiler_config": ProfilerConfig}
    return [key for section, model in sections.items() for key in keys_below(section, model)]


def keys_below(prefix: str, model: type[Section]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from keys_below(f"{prefix}.{name}", nested)
        else:
            yield f"{prefix}.{name}"


def test_a_new_key_is_a_decision():
    """A key that is added or removed is added or removed in schema_keys.txt too, in the same change, and shown in an example."""
    frozen = (Path(__file__).parent / "schema_keys.txt").read_text().split()
    assert sorted(schema_keys()) == frozen


def test_every_key_says_what_it_is():
    for model in (MegatronConfig, RLConfig, GenerateConfig, EvalConfig, Integrated, Config):
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert field.description or nested, f"{model.__name__}.{name}"
