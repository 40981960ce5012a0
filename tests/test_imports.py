"""The shape of the package, read from its syntax trees: who may import whom, and where, and what no
assert may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import ruvon

ROOT = Path(ruvon.__file__).parent
LEAVES = {"config", "deltas", "errors", "grammars", "locate", "telemetry"}
LAYERS = (
    "kernels",
    "models",
    "engine",
    "server",
    "router",
)  # each may use itself, those before, and leaves
FRONT = {
    "", "__main__", "async_llm", "bench", "cli", "completion", "doctor", "llm", "verify"
}  # fmt: skip  # may use everything

OPTIONAL = {
    "huggingface_hub", "llguidance", "llvmlite", "numba", "opentelemetry", "ray", "tqdm",
    "transformers", "triton", "uvloop",
}  # fmt: skip
"""Heavy, or absent on some machines: may be imported inside a function by whoever needs them."""

DEFERRED = {
    "__init__": "`ruvon --help` does not wait for torch",
    "cli": "a command imports what it runs: `ruvon --help` does not wait for torch",
    "engine/backends": "a table of kernels brings its compiler along, so only the chosen one does",
    "kernels/cpu/compiled": "kernels that are on disk already need no numba",
    "router/worker": "a replica's cores are set before torch counts them",
    "engine/ranks/rank": "sums over GPUs need triton as well",
    "engine/runners": "a GPU's runner needs triton, which is not on every platform",
}
"""File or folder → why its functions may import our own modules."""


LOOKS = {"all", "any", "enumerate", "isinstance", "len", "list", "round_up", "sorted"}
"""Calls that change nothing."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
NODES = {name: [*ast.walk(tree)] for name, tree in TREES.items()}


def module_of(name: str) -> str:
    """``engine/loop`` → ``ruvon.engine.loop``; packages drop their ``__init__``."""
    return ".".join(["ruvon", *(p for p in name.split("/") if p != "__init__")])


MODULES = {module_of(name) for name in TREES}


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [module for module in inner if module in MODULES]
        return found if len(found) == len(inner) else [*found, node.module]
    return []


@cache
def imports_of(name: str) -> set[str]:
    return {module for node in NODES[name] for module in imported(node)}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", TREES)
def test_imports_go_one_way(name: str) -> None:
    room = room_of(module_of(name))
    own = {module for module in imports_of(name) if module.split(".")[0] == "ruvon"}
    rooms = {room_of(module) for module in own if module in MODULES or room_of(module)}
    if room in FRONT:
        return
    allowed = LEAVES if room in LEAVES else {*LEAVES, *LAYERS[: LAYERS.index(room) + 1]}
    assert rooms <= allowed | {""}, f"{name} imports {sorted(rooms - allowed)}"
    fronts = {n.name for node in from_front(name) for n in node.names}
    assert fronts <= {"__version__"}, "the package's front door is for others"


def from_front(name: str) -> list[ast.ImportFrom]:
    """The statements ``from ruvon import ...``."""
    statements = [node for node in NODES[name] if isinstance(node, ast.ImportFrom)]
    return [node for node in statements if node.module == "ruvon"]


def test_no_cycles() -> None:
    graph = {module_of(name): imports_of(name) & MODULES for name in TREES}
    graph["ruvon"] = set()  # its imports wait until a name is asked for
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", TREES)
def test_functions_import_nothing_but_what_is_heavy(name: str) -> None:
    if name in DEFERRED or name.split("/")[0] in DEFERRED:
        return
    functions = [n for n in NODES[name] if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {m for f in functions for node in ast.walk(f) for m in imported(node)}
    assert {module.split(".")[0] for module in inside} <= OPTIONAL


@pytest.mark.parametrize("name", TREES)
def test_public_names_are_sorted(name: str) -> None:
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            # as ruff sorts them: constants, classes, then the rest
            assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


COUNTING = {"telemetry/collectors", "telemetry/metrics"}


@pytest.mark.parametrize("name", [n for n in TREES if room_of(module_of(n)) in LEAVES])
def test_leaves_need_nothing_heavy(name: str) -> None:
    packages = {module.split(".")[0] for module in imports_of(name)}
    assert "torch" not in packages
    assert ("prometheus_client" in packages) == (name in COUNTING)


UNNEEDED = {
    "huggingface_hub", "numba", "scipy", "sympy", "torch._dynamo", "torch._inductor",
    "transformers", "triton",
}  # fmt: skip
"""Of a server on a CPU whose model is on its disk and whose kernels are compiled already."""


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (["ruvon.cli.models", "ruvon.config", "ruvon.telemetry"], {"numpy", "torch"}),
        (["ruvon.engine.types"], {"numpy", "torch"}),
        (["ruvon.router.run"], {"numpy", "torch"}),
        (["ruvon.server.app", "ruvon.engine.cpu_sampler", "ruvon.kernels.cpu"], UNNEEDED),
    ],
)
def test_starting_imports_no_more_than_it_needs(modules: list[str], heavy: set[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy.intersection(run.stdout.split())


def printed(code: str) -> list[str]:
    """What code prints, word by word, in a process that has imported nothing else."""
    code = f"import gc, sys\nfrom ruvon.server.imports import *\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_what_is_imported_beside_torch_waits_for_no_library() -> None:
    """The system maps one at a time."""
    native = (
        "[m for m, it in sys.modules.items() if f'{getattr(it, \"__file__\", 0)}'[-3:] == '.so']"
    )
    before = printed(f"import_all(NATIVE); print(*{native})")
    assert set(before) > {"numpy._core._multiarray_umath", "uvloop.loop"}
    behind = printed(
        f"import_all(NATIVE); import_all(PURE); print(*{native}, 'torch' in sys.modules)"
    )
    assert set(behind) - set(before) == {"False"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it has another name")
def test_torch_is_mapped_before_it_is_imported() -> None:
    maps = "open('/proc/self/maps').read()"
    before = f"map_torch(); print('libtorch_cpu' in {maps}, 'torch' in sys.modules)"
    after = "import torch; print(torch.ones(3).sum().item(), torch.version.cuda is None)"
    mapped, imported, total, for_cpus = printed(f"{before}; {after}")
    assert (imported, total, mapped) == ("False", "3.0", for_cpus)


def test_no_collection_looks_through_what_was_imported() -> None:
    code = "with importing(): made = [[] for _ in range(100_000)]\n"
    found = printed(code + "print(gc.isenabled(), sum(gc.get_count()) < 1000)")
    assert found == ["True", "True"]


LOOP = {f"engine/{name}" for name in ("loop", "observer", "stream", "admission", "gate")}


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith("engine/") and n not in LOOP])
def test_only_the_loop_says_async(name: str) -> None:
    assert not any(isinstance(n, ast.AsyncFunctionDef | ast.Await) for n in NODES[name])
    assert "asyncio" not in imports_of(name)


def test_no_assert_does_anything() -> None:
    """``python -O`` leaves them out."""
    nodes = chain.from_iterable(NODES.values())
    for node in (node for node in nodes if isinstance(node, ast.Assert)):
        inside = list(ast.walk(node.test))
        calls = {ast.unparse(each.func) for each in inside if isinstance(each, ast.Call)}
        assert calls <= LOOKS, ast.unparse(node)
        assert not any(isinstance(each, ast.NamedExpr) for each in inside), ast.unparse(node)
