"""The rooms of the package: imports go down only, and what each room may not know."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ist_jax"
# From the top floor down; a name is a module or a subpackage. Imports go from earlier lines to later ones.
FLOORS = (
    ("main", "plan", "compare", "evaluate", "report.__main__", "data.prepare"),  # the commands
    ("train", "cli"),
    ("runtime",),
    ("report",),
    ("costs", "workdir"),
    ("config",),
    ("methods",),
    ("tasks",),
    ("exchange",),
    ("data",),
    ("models",),
    ("masking", "deals"),
    ("partition",),
    ("extension", "key", "errors", "streams"),
)
MOST_PARAMETERS = 7


def modules():
    return {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}


MODULES = modules()
NAMES = set(MODULES.values()) | {name.removesuffix(".__init__") for name in MODULES.values()}


def floor_of(name):
    for number, rooms in enumerate(FLOORS):
        if name in rooms or name.split(".")[0] in rooms:
            return number
    raise AssertionError(f"{name} has no floor: put it into FLOORS")


def imports(path):
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ist_jax":
            base = node.module.removeprefix("ist_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in NAMES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("ist_jax.") for a in node.names if a.name.startswith("ist_jax."))


EDGES = {(name, other) for path, name in MODULES.items() for other in imports(path) if other}


def test_every_import_goes_down():
    assert len(EDGES) > 100
    up = [
        (a, b)
        for a, b in EDGES
        if floor_of(a) > floor_of(b) or (floor_of(a) == floor_of(b) == 0)  # nothing imports a command
    ]
    assert up == []


def test_no_circle_of_modules():
    graph = {name: {b for a, b in EDGES if a == name} for name in MODULES.values()}
    done, path = set(), []

    def visit(name):
        name = f"{name}.__init__" if f"{name}.__init__" in graph else name
        assert name not in path, f"circle: {[*path, name]}"
        if name not in done:
            path.append(name)
            for other in graph[name]:
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_what_it_means_knows_no_config_no_files_and_no_report():
    for a, b in EDGES:
        if a.split(".")[0] in ("masking", "partition", "exchange", "methods"):
            assert b.split(".")[0] not in ("config", "workdir", "report", "costs", "runtime"), (a, b)


def test_a_config_is_seen_by_the_setup_and_above_it_alone():
    allowed = {"runtime.setup", "config", "cli", "train", "main", "plan", "compare", "evaluate"}
    for path, name in MODULES.items():
        if name not in allowed:
            assert "ml_collections" not in path.read_text(), name


def test_pmap_stands_in_one_file():
    assert [name for path, name in MODULES.items() if "jax.pmap(" in path.read_text()] == ["runtime.devices"]


@pytest.mark.parametrize("path", sorted(MODULES), ids=lambda path: MODULES[path])
def test_no_function_has_more_than_seven_parameters(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            assert len(own) <= MOST_PARAMETERS, f"{node.name}({', '.join(own)})"
