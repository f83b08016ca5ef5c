"""House rules about rooms: no circles, few modules, a true docstring, light imports; one meaning for a class name.

A room is a folder of modules in one of the four packages. The direction of imports is in test_imports.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

PACKAGES = ("data_prep", "hpc_models", "launch", "analysis")
MOST_MODULES, MOST_WORDS, MOST_PARAMETERS, MOST_SKIPS = 14, 25, 8, 20
HEAVY = ("numpy", "torch", "pandas", "h5py", "cv2", "openslide", "matplotlib")
KERNELS = "data_prep.edges.kernels"

# Temporary: what breaks these rules today. Each list shall become empty, and then it goes.


def listed(faults: Iterable[str]) -> str:
    """One fault a line, since pytest cuts long lists."""
    return "\n" + "\n".join(faults)


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file; a package or room goes by the name of its folder."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def rooms() -> dict[str, list[str]]:
    """Room -> its modules, without its `__init__`; rooms of rooms are rooms too."""
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        if folder not in PACKAGES:
            found[folder] += [module] if path.name != "__init__.py" else []
    return dict(found)


def imported(module: str) -> set[str]:
    """The modules that a module imports: at its top, in functions, for types, or by a name in a string."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports here are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else str(node.module) for name in full}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found.add(node.value)
    return (found & modules().keys()) - {module}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def room_of(module: str) -> str:
    """The folder of a package that holds a module at any depth; a module beside these folders is its own room."""
    top = ".".join(module.split(".")[:2])
    return top if top in rooms() else module


def test_circles_are_found():
    """The rule's own tool, on graphs that are seen through at a glance."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"]]
    assert circles({"a": {"b", "x"}, "b": {"c"}, "c": {"a"}, "x": {"y"}, "y": {"x"}}) == [["x", "y"], ["a", "b", "c"]]


def test_no_circle_between_modules():
    assert circles({module: imported(module) for module in modules()}) == []


def test_no_circle_between_rooms():
    graph: dict[str, set[str]] = defaultdict(set)
    why = []
    for module in modules():
        for other in imported(module):
            here, there = room_of(module), room_of(other)
            if here != there and here.split(".")[0] == there.split(".")[0]:
                graph[here].add(there)
                why.append((here, there, f"{module} imports {other}"))
    found = circles(graph)
    assert not found, listed(text for here, there, text in why for group in found if {here, there} <= set(group))


def test_no_room_is_full():
    assert {room: len(names) for room, names in rooms().items() if len(names) > MOST_MODULES} == {}


# -- docstrings of rooms --------------------------------------------------------------------------------------------


def top_level_names(module: str) -> set[str]:
    """What a module defines or imports at its top."""
    found: set[str] = set()
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_there(name: str, room: str) -> bool:
    """Does a dotted name in a room's docstring name a module or something in one?"""
    for full in (f"{room}.{name}", name):
        module, _, last = full.rpartition(".")
        if full in modules() or (module in modules() and last in top_level_names(module)):
            return True
    return any(name in top_level_names(module) for module in rooms()[room])


def faults_of_docstring(room: str) -> Iterator[str]:
    text = ast.get_docstring(tree_of(room)) or ""
    first, _, rest = text.partition("\n")
    if not re.fullmatch(r"[^.]+(\.[^ .][^.]*)*\.", first) or len(first.split()) > MOST_WORDS:
        yield f"{room}: its docstring begins with one sentence of at most {MOST_WORDS} words, on one line"
    used = re.search(r"Others use (.*?)\.(\s|$)", rest, flags=re.S)
    if used is None:
        yield f"{room}: its docstring says `Others use ...`"
        return
    for name in re.findall(r"`([^`]+)`", used[1]):
        if not is_there(name, room):
            yield f"{room}: nothing in it is called `{name}`"


def test_every_room_says_what_it_is_for_and_what_others_use():
    assert [room for room in rooms() if room not in modules()] == [], "rooms without an __init__"
    faults = [fault for room in rooms() for fault in faults_of_docstring(room)]
    assert not faults, listed(faults)


def test_importing_a_room_loads_nothing_heavy():
    code = (
        "import importlib, sys\n"
        "seen = set()\n"
        "for room in sys.argv[1:]:\n"
        "    importlib.import_module(room)\n"
        f"    new = {set(HEAVY)!r} & sys.modules.keys() - seen\n"
        "    seen |= new\n"
        "    print(end=''.join(f'{room} loads {name}\\n' for name in sorted(new)))\n"
    )
    names = list(rooms())
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# -- names and sizes ------------------------------------------------------------------------------------------------


def test_one_class_name_means_one_thing():
    where: dict[str, list[str]] = defaultdict(list)
    for module in modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(module)
    clashes = {name: places for name, places in where.items() if len(places) > 1}
    assert not clashes, listed(f"{name}: {', '.join(places)}" for name, places in sorted(clashes.items()))


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(within: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
    """All functions of a module with their full names, those of classes and of other functions too."""
    for node in ast.iter_child_nodes(within):
        own = f"{name}.{node.name}" if isinstance(node, Function | ast.ClassDef) else name
        if isinstance(node, Function):
            yield own, node
        yield from functions(node, own)


def parameters(function: Function) -> list[str]:
    """Names of the parameters of a function, `self` and `cls` left out."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [one.arg for one in every if one is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_functions_have_few_parameters():
    """Kernels are free: compiled code is handed the arrays that it fills."""
    counts = {
        name: len(parameters(function))
        for module in modules()
        if not module.startswith(f"{KERNELS}.")
        for name, function in functions(tree_of(module), module)
    }
    long = {name: n for name, n in counts.items() if n > MOST_PARAMETERS}
    assert not long, listed(f"{name} has {n} parameters" for name, n in long.items())


# -- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_mirror_rooms(package: str):
    top = ROOT / "tests" / package
    folders = {path.parent for path in top.rglob("*.py")} - {top}
    names = {".".join(folder.relative_to(ROOT / "tests").parts) for folder in folders}
    assert names <= rooms().keys(), "folders of tests that are no room"


def test_no_test_imports_a_test():
    """What tests share lies in tests/helpers, where it has a name."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [name for name in names if re.search(r"(^|\.)(test_\w+|bench_\w+|conftest)(\.|$)", name)]
            found += [f"{path.relative_to(ROOT)}:{node.lineno} imports {name}" for name in wrong]
    assert not found, listed(found)


def test_the_formatter_is_seldom_told_to_skip():
    mark = "# fmt: " + "skip"  # in two parts, so that this file does not count
    folders = (*PACKAGES, "tests")
    counts = {
        str(path.relative_to(ROOT)): text.count(mark)
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if mark in (text := path.read_text())
    }
    assert sum(counts.values()) <= MOST_SKIPS, counts
