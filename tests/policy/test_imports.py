"""House rules about imports, held by the syntax tree and by real imports in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

FOLDERS = ("data_prep", "hpc_models", "launch", "analysis")
MAY_IMPORT = {
    "data_prep": {"data_prep"},
    "hpc_models": {"hpc_models"},
    "launch": {"launch", "data_prep", "hpc_models"},
    # The driver of command lines and the atomic writer lie at the bottom of the chain, since all packages use them.
    "analysis": {"analysis", "launch", "data_prep.system"},
}
# Packages that a folder must not touch anywhere, not even inside a function.
FORBIDDEN = {
    "data_prep": {"torch", "monai", "deepspeed"},
    "hpc_models": {"mpi4py", "h5py", "openslide", "tifffile", "submitit", "deepspeed", "cv2"},
    "launch": set(),
    "analysis": {"torch", "mpi4py", "openslide", "deepspeed"},
}
TORCH_FREE = [
    "launch.config.config",
    "launch.experiments.demo",
    "launch.records.record",
    "launch.engines.ranks",
    "launch.__main__",
    "hpc_models.registry",
    "hpc_models.segmentation.settings",
    "hpc_models.classification.settings",
    "launch.jobs.render",
    "launch.jobs.submit",
    "launch.jobs.sweep",
    "launch.jobs.body_steps",
    "launch.config.sites",
    "launch.preflight.nodes",
    "launch.plan.bench",
    "launch.plan.cost",
    "launch.plan.inventory",
    "launch.predict.export_weights",
    "launch.data.augment",
    "launch.score.receptive_field",
    "launch.score.rescore",
    "launch.train.run",
    "analysis.runs.records",
    "analysis.comparison.table",
    "data_prep.build.run",
    "data_prep.system.progress",
]


def sources() -> list[Path]:
    return [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], base]).strip(".")
            found.append((base, node))
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    folder = path.relative_to(ROOT).parts[0]
    for name, node in imports(path):
        top = name.split(".")[0]
        if top in FOLDERS:
            allowed = top in MAY_IMPORT[folder] or ".".join(name.split(".")[:2]) in MAY_IMPORT[folder]
            assert allowed, f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        assert top not in FORBIDDEN[folder], f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        assert top != "tests"


def test_every_folder_is_covered():
    assert {p.relative_to(ROOT).parts[0] for p in sources()} == set(FOLDERS)


def test_mpi_is_imported_only_inside_functions():
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(n.split(".")[0] == "mpi4py" for n in names), f"{path}:{node.lineno}: importing MPI starts it"


def pulled_in(code: str) -> str:
    """Which heavy packages are there after the code."""
    heavy = ("torch", "deepspeed", "mpi4py", "openslide", "matplotlib.pyplot", "monai")
    code = f"{code}; import sys; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_login_node_modules_import_without_heavy_packages(module: str):
    found = pulled_in(f"import {module}")
    if module.startswith("data_prep"):  # these read slides, so OpenSlide is theirs; the rest is not
        found = found.replace("openslide", "").strip()
    assert found == "", f"{module} pulls in {found}"


@pytest.mark.parametrize("package", ["data_prep", "launch", "analysis"])
def test_all_commands_import_without_heavy_packages(package: str):
    assert pulled_in(f"from {package}.__main__ import COMMAND_LINE; COMMAND_LINE.parser()") == ""


@pytest.mark.parametrize("package", ["data_prep", "launch", "analysis"])
def test_one_command_loads_no_other(package: str):
    """Each command's parser, made alone: of the room, only modules that it imports itself are there."""
    code = (
        f"import sys; from {package}.__main__ import COMMAND_LINE as line\n"
        "for name, module in line.commands.items():\n"
        "    line.main([name, '--help'])\n"
        f"    print(module, *[m for m in sys.modules if m.startswith('{package}.commands.')], file=sys.stderr)\n"
        f"    [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('{package}.commands.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines():
        module, *loaded = line.split()
        path = ROOT / package / "commands" / f"{module}.py"
        own = {name for name, _ in imports(path)} | {f"{package}.commands.{module}"}
        assert set(loaded) <= own
