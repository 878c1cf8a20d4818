"""The architecture, read from the sources: imports point one way, and files are short and say what they hold."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_jax

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("vlm_jax", "experiments", "tools") for path in (ROOT / package).rglob("*.py"))
LINES = 400


def name_of(path: Path) -> str:
    """The module that a file is: `vlm_jax.nn.attention`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """What a file imports, anywhere in it: modules where the name is one of ours, else what stands after `from`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def reached(name: str) -> set[str]:
    """What importing a module of ours imports, directly and through others of ours."""
    found, waiting = set(), {name}
    while waiting:
        found |= waiting
        waiting = {imported for each in waiting for imported in IMPORTS.get(each, ())} - found
    return found


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


FOUNDATION = ("vlm_jax.contract", "vlm_jax.errors", "vlm_jax.inputs", "vlm_jax.sharding", "vlm_jax.trees")


@pytest.mark.parametrize(
    ("package", "ours", "others"),
    [
        ("vlm_jax.errors", (), ()),
        ("vlm_jax.trees", (), ("jax",)),
        ("vlm_jax.inputs", ("vlm_jax.errors",), ("jax", "numpy")),
        ("vlm_jax.contract", ("vlm_jax.errors", "vlm_jax.inputs"), ("jax", "numpy")),
        ("vlm_jax.sharding", FOUNDATION, ("jax", "jaxtyping", "numpy")),
        ("vlm_jax.objectives", ("vlm_jax.objectives",), ("jax", "jaxtyping")),
        ("vlm_jax.sampling", ("vlm_jax.sampling", "vlm_jax.errors"), ("jax", "jaxtyping")),
        ("vlm_jax.nn", ("vlm_jax.nn", *FOUNDATION), ("jax", "jaxtyping", "flax")),
    ],
)
def test_the_lower_layers_import_nothing_else(package: str, ours: tuple[str, ...], others: tuple[str, ...]):
    assert inside(package, tuple(MODULES))
    allowed = (*ours, *others, *sys.stdlib_module_names)
    found = {(name, imported) for name in MODULES if inside(name, (package,)) for imported in IMPORTS[name]}
    assert {pair for pair in found if not inside(pair[1], allowed)} == set()


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("vlm_jax.models", ("vlm_jax.train", "vlm_jax.data", "vlm_jax.evals")),
        ("vlm_jax.data", ("jax", "flax", "optax", "vlm_jax.nn", "vlm_jax.models", "vlm_jax.train", "vlm_jax.evals")),
        ("vlm_jax", ("experiments", "tools")),
        ("experiments", ("tools",)),
    ],
)
def test_the_upper_layers_keep_off(importer: str, forbidden: tuple[str, ...]):
    assert inside(importer, tuple(MODULES))
    found = {(name, imported) for name in MODULES if inside(name, (importer,)) for imported in IMPORTS[name]}
    assert {pair for pair in found if inside(pair[1], forbidden)} == set()


@pytest.mark.parametrize("importer", ["vlm_jax.train", "vlm_jax.evals"])
def test_what_serves_every_family_reaches_none_not_even_through_others(importer: str):
    found = {(name, imported) for name in MODULES if inside(name, (importer,)) for imported in reached(name)}
    assert {pair for pair in found if inside(pair[1], ("vlm_jax.nn", "vlm_jax.models", "flax"))} == set()


def test_a_way_through_others_is_found():
    """As the way on which training once reached the families: through the experiment."""
    assert "vlm_jax.models" not in IMPORTS["tools.evaluate"] and "vlm_jax.models" in reached("tools.evaluate")


def test_only_networks_import_flax():
    users = {name for name, found in IMPORTS.items() if any(inside(imported, ("flax",)) for imported in found)}
    assert users
    assert {name for name in users if not inside(name, ("vlm_jax.nn", "vlm_jax.models"))} == set()


def test_the_contract_loads_jax_and_nothing_of_ours_that_is_heavy():
    loaded = "import sys, vlm_jax.contract; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tokenizers", "msgspec", "tyro", "PIL"}
    assert "jax" in found.split()
    assert heavy.intersection(found.split()) == set()


def test_what_the_package_promises_is_there():
    assert {name for name in vlm_jax.__all__ if not hasattr(vlm_jax, name)} == set()
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = vlm_jax.laod


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {imported for imported in found if imported in MODULES} for name, found in IMPORTS.items()}
    assert sum(map(len, graph.values())) > len(graph) / 2
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_states_its_subject_and_stays_short(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) <= LINES
    assert not source.strip() or ast.get_docstring(ast.parse(source))
