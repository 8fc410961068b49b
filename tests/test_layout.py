"""The layout is kept by tests: import direction, budgets, names, optional libraries.

Each rule takes a path and source text and returns what it objects to, so that it is also shown a file that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "generative_recommenders"
LAYERS = (
    ("ops",),
    ("nn", "batch", "data", "distributed", "errors", "config", "config_registry", "config_syntax", "config_types"),
    ("encoders", "similarity", "losses", "indexing"),
    ("generative", "ranking", "retrieval", "tokenizers"),
    ("training", "evaluation", "serving", "grid"),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Commands at the root of the repository may import everything.
TOP_RANK = len(LAYERS)
# The lowest layer has an order of its own: data knows batches, and nothing there knows the configuration's users.
REFUSED_PAIRS = {("data", "nn"), ("data", "distributed"), ("batch", "data"), ("batch", "nn"), ("nn", "data")}
KERNELS = {"kernels.py", "backward_kernels.py"}
OPTIONAL = {"fbgemm_gpu", "torchrec", "triton"}
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_FUNCTION_LINES = 80
MAX_LINES = 400
MAX_KERNEL_LINES = 700

Rule = Callable[[PurePosixPath, str], list[str]]


def sources(*patterns: str) -> Iterator[tuple[PurePosixPath, str]]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8")


def is_library(path: PurePosixPath) -> bool:
    return path.parts[0] in (PACKAGE, "ops")


def part_of(module: str) -> str | None:
    """The name in `LAYERS` of a dotted module, None for another project's."""
    names = module.split(".")
    if names[0] == "ops":
        return "ops"
    return names[1] if names[0] == PACKAGE and len(names) > 1 else None


def module_of(path: PurePosixPath) -> str:
    names = path.with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name (of `from module import name`) of all imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def import_direction(path: PurePosixPath, text: str) -> list[str]:
    importer = part_of(module_of(path))
    rank = TOP_RANK if importer is None else RANKS.get(importer, -1)
    if rank < 0:
        return [f"{path}: {importer} has no layer"]
    found = []
    for line, module, name in imported(ast.parse(text)):
        target = part_of(f"{module}.{name}" if module == PACKAGE else module)
        if target is None:
            continue
        if RANKS.get(target, TOP_RANK) > rank or (importer, target) in REFUSED_PAIRS:
            found.append(f"{path}:{line}: {importer} imports {target}")
    return found


def optional_libraries_stay_optional(path: PurePosixPath, text: str) -> list[str]:
    """Unconditional is an import that is a statement of the module itself, outside `try`, `if` and functions."""
    allowed = {"triton"} if path.name in KERNELS else set()
    return [
        f"{path}:{node.lineno}: imports {module} unconditionally"
        for node in ast.parse(text).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for _, module, _ in imported(node)
        if module.split(".")[0] in OPTIONAL - allowed
    ]


def lines_of_a_file(path: PurePosixPath, text: str) -> list[str]:
    limit = MAX_KERNEL_LINES if path.name in KERNELS or path.suffix != ".py" else MAX_LINES
    count = len(text.splitlines())
    return [f"{path}: {count} lines, expected under {limit}"] if count >= limit else []


def lines_of_a_function(path: PurePosixPath, text: str) -> list[str]:
    """The docstring is not counted: that of an op states shapes, dtypes, formula and source."""
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = ((node.name, node.lineno, _lines(node) - _docstring_lines(node)) for node in functions)
    return [f"{path}:{line}: {name} has {n} lines" for name, line, n in lengths if n >= MAX_FUNCTION_LINES]


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return _lines(node.body[0]) if ast.get_docstring(node) is not None else 0


def names_say_what_is_inside(path: PurePosixPath, text: str) -> list[str]:
    return [f"{path}: say what is inside"] if NAMELESS & set(path.with_suffix("").parts) else []


def no_print(path: PurePosixPath, text: str) -> list[str]:
    calls = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return [f"{path}:{n.lineno}: print" for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def private_names_stay_private(path: PurePosixPath, text: str) -> list[str]:
    return [
        f"{path}:{line}: imports {name} of {module}"
        for line, module, name in imported(ast.parse(text))
        if name and name.startswith("_") and not name.startswith("__")
    ]


def module_docstring(path: PurePosixPath, text: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(text)) else [f"{path}: no module docstring"]


PYTHON = ("*.py", f"{PACKAGE}/**/*.py", "ops/**/*.py", "benchmarks/**/*.py")
NATIVE = ("ops/**/*.cpp", "ops/**/*.h", "ops/**/*.cu")
EVERYWHERE = (
    import_direction,
    lines_of_a_file,
    lines_of_a_function,
    names_say_what_is_inside,
    private_names_stay_private,
    module_docstring,
)
IN_THE_LIBRARY = (optional_libraries_stay_optional, no_print)


@pytest.mark.parametrize("rule", EVERYWHERE + IN_THE_LIBRARY, ids=lambda rule: rule.__name__)
def test_python_files_keep_the_rule(rule: Rule) -> None:
    files = [(path, text) for path, text in sources(*PYTHON) if rule in EVERYWHERE or is_library(path)]
    assert len(files) > 40
    assert [objection for path, text in files for objection in rule(path, text)] == []


def test_native_files_keep_their_budget() -> None:
    files = list(sources(*NATIVE))
    assert files
    assert [objection for path, text in files for objection in lines_of_a_file(path, text)] == []


def test_no_module_imports_itself_through_others() -> None:
    texts = dict(sources(*PYTHON))
    modules = {module_of(path) for path in texts}
    graph = {}
    for path, text in texts.items():
        # Imports inside functions run later and cannot close a circle at import time.
        statements = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        targets = {
            target
            for node in statements
            for _, module, name in imported(node)
            for target in (module, f"{module}.{name}")
            if target in modules
        }
        # A package's __init__ may take names from its own modules, which then name the package to reach each other.
        graph[module_of(path)] = targets - {module_of(path)}
    for module, targets in graph.items():
        packages = {target for target in targets if module.startswith(f"{target}.")}
        targets -= packages
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BROKEN: list[tuple[Rule, str, str, str]] = [
    (import_direction, "ops/topk/cpu.py", "from generative_recommenders.batch import jagged", "ops imports batch"),
    (import_direction, f"{PACKAGE}/nn/mlp.py", f"from {PACKAGE}.encoders import hstu", "nn imports encoders"),
    (
        import_direction,
        f"{PACKAGE}/losses/bce.py",
        f"def f():\n    import {PACKAGE}.training.loop",
        "losses imports training",
    ),
    (import_direction, f"{PACKAGE}/encoders/hstu.py", f"from {PACKAGE} import retrieval", "encoders imports retrieval"),
    (import_direction, f"{PACKAGE}/data/collate.py", f"import {PACKAGE}.nn.mlp", "data imports nn"),
    (import_direction, f"{PACKAGE}/stuff/a.py", "", "stuff has no layer"),
    (optional_libraries_stay_optional, f"{PACKAGE}/nn/embeddings.py", "import torchrec.modules", "imports torchrec"),
    (optional_libraries_stay_optional, "ops/topk/cpu.py", "from triton import language", "imports triton"),
    (optional_libraries_stay_optional, "ops/topk/kernels.py", "import fbgemm_gpu", "imports fbgemm_gpu"),
    (lines_of_a_file, "ops/topk/cpu.py", "x = 1\n" * MAX_LINES, "400 lines"),
    (lines_of_a_file, "ops/topk/kernels.py", "x = 1\n" * MAX_KERNEL_LINES, "700 lines"),
    (lines_of_a_file, "ops/topk/cpu.cpp", "int x;\n" * MAX_KERNEL_LINES, "700 lines"),
    (lines_of_a_function, "ops/topk/cpu.py", LONG_FUNCTION, "f has 81 lines"),
    (names_say_what_is_inside, f"{PACKAGE}/utils.py", "", "say what is inside"),
    (names_say_what_is_inside, f"{PACKAGE}/common/text.py", "", "say what is inside"),
    (no_print, "ops/topk/cpu.py", "def f():\n    print(1)", "cpu.py:2: print"),
    (private_names_stay_private, f"{PACKAGE}/nn/mlp.py", f"from {PACKAGE}.batch import _legend", "imports _legend"),
    (module_docstring, "ops/topk/cpu.py", "x = 1", "no module docstring"),
]


@pytest.mark.parametrize(("rule", "path", "text", "objection"), BROKEN)
def test_rule_objects_to_a_file_that_breaks_it(rule: Rule, path: str, text: str, objection: str) -> None:
    assert any(objection in line for line in rule(PurePosixPath(path), text))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (import_direction, "main.py", f"from {PACKAGE}.training import loop"),
        (
            import_direction,
            f"{PACKAGE}/data/collate.py",
            f"from {PACKAGE}.batch import SequenceBatch\nimport ops.random",
        ),
        (import_direction, f"{PACKAGE}/training/loop.py", f"import torch\nimport {PACKAGE}.evaluation.metrics"),
        (optional_libraries_stay_optional, "ops/topk/kernels.py", "import triton"),
        (
            optional_libraries_stay_optional,
            f"{PACKAGE}/nn/x.py",
            "try:\n    import torchrec\nexcept ImportError:\n    pass",
        ),
        (optional_libraries_stay_optional, f"{PACKAGE}/nn/x.py", "def f():\n    import fbgemm_gpu"),
        (lines_of_a_file, "ops/topk/kernels.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_rule_accepts_a_file_that_keeps_it(rule: Rule, path: str, text: str) -> None:
    assert rule(PurePosixPath(path), text) == []
