"""The rules of the tree that a reader relies on: see CONTRIBUTING.md."""

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastpeft

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
MEANINGLESS_STEMS = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)|_part_?\d+$")

# Each layer may import itself and those before it; layers of one line know nothing of each other.
LAYERS = (
    {"kernels", "reference"},
    {"backend"},
    {"ops"},
    {"layers"},
    {"checkpoint"},
    {"methods"},
    {"tuner"},
    {"model"},
    {"integrations"},
    {"training"},
    {"demo", "serving"},
    {"cli"},
)
LEVEL = {layer: level for level, layers in enumerate(LAYERS) for layer in layers}
SOLE_IMPORTER_OF_KERNELS = "ops"
ENTRY_POINTS = {"__init__", "__main__"}  # import from any layer


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the project, the symlinked kernels/ once."""
    folders = ("fastpeft", "kernels", "benchmarks", "tests", ".ci")
    return sorted(
        path
        for folder in folders
        for path in (root / folder).rglob("*.py")
        if (root / "fastpeft" / "kernels") not in path.parents and "__pycache__" not in path.parts
    )


def relative(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()


def layer_of(parts: tuple[str, ...]) -> str | None:
    """The layer of a module path, ("fastpeft", "ops", "lora") or ("kernels", "lora"); None outside the package.

    A public name, ("fastpeft", "PeftModel"), belongs to the layer that defines it.
    """
    if parts[0] == "kernels":
        return "kernels"
    if parts[0] != "fastpeft" or len(parts) < 2:
        return None
    if parts[1] in fastpeft.__all__:
        defined_in = getattr(getattr(fastpeft, parts[1]), "__module__", "")
        return layer_of(tuple(defined_in.split(".")))
    return parts[1]


def imports_of(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """(line, module path, at the top of the module) of every import, inside functions too; relative ones resolved.

    `from fastpeft import model` counts as fastpeft.model. Imports that only a type checker runs are left out.
    """
    type_checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        top = id(node) not in inside_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split(".")), top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield node.lineno, (*module, alias.name), top
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            yield node.lineno, tuple(str(named).split(".")), top


def direction_violations(name: str, source: str) -> list[str]:
    """Imports of the file `name` ("fastpeft/ops/lora.py") that point to a later layer, or sideways, or to tests."""
    parts = tuple(name.removesuffix(".py").split("/"))
    if parts[-1] in ENTRY_POINTS and len(parts) == 2:
        return []
    here = layer_of(parts)
    found = []
    for line, module, top in imports_of(ast.parse(source), package=parts[:-1]):
        if module[0] in ("tests", "benchmarks"):
            found.append(f"{name}:{line}: the package imports {'.'.join(module)}")
            continue
        if module[0] == "kernels":
            found.append(f"{name}:{line}: import fastpeft.kernels, not kernels")
            continue
        there = layer_of(module)
        if there not in LEVEL or here not in LEVEL or there == here:
            continue
        if LEVEL[there] >= LEVEL[here]:
            found.append(f"{name}:{line}: {here} imports {there}, which comes after it")
        if there == "kernels" and (here != SOLE_IMPORTER_OF_KERNELS or top):
            found.append(f"{name}:{line}: fastpeft.kernels may be imported by ops only, inside functions")
    return found


def broad_handlers(name: str, source: str) -> list[str]:
    """Handlers that hide every error: `except:`, `except Exception`, `except BaseException`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught):
                found.append(f"{name}:{node.lineno}: catches everything")
    return found


def too_long(name: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{name}: {lines} lines > {MAX_LINES}; split it by meaning"] if lines > MAX_LINES else []


def meaningless_name(name: str) -> list[str]:
    parts = Path(name).with_suffix("").parts
    return [f"{name}: {part!r} names no concept" for part in parts if MEANINGLESS_STEMS.search(part)]


def package_files() -> list[Path]:
    return [path for path in source_files() if relative(path).startswith(("fastpeft/", "kernels/"))]


def test_there_are_files_to_check():
    assert {"fastpeft/__init__.py", "tests/test_structure.py"} <= {relative(path) for path in source_files()}


def test_imports_point_one_way():
    violations = [v for path in package_files() for v in direction_violations(relative(path), path.read_text())]
    assert not violations, "\n" + "\n".join(violations)


def test_every_layer_has_its_place():
    known = set(LEVEL) | ENTRY_POINTS
    strangers = {path.stem for path in (ROOT / "fastpeft").iterdir() if path.suffix == ".py" or path.is_dir()} - known
    assert strangers <= {"__pycache__"}, f"modules without a place in LAYERS: {strangers}"


def test_files_are_short():
    violations = [v for path in source_files() for v in too_long(relative(path), path.read_text())]
    assert not violations, "\n" + "\n".join(violations)


def test_files_are_named_after_concepts():
    violations = [v for path in source_files() for v in meaningless_name(relative(path))]
    assert not violations, "\n" + "\n".join(violations)


def test_no_handler_catches_everything():
    violations = [v for path in source_files() for v in broad_handlers(relative(path), path.read_text())]
    assert not violations, "\n" + "\n".join(violations)


def test_kernels_is_a_namespace_folder():
    """kernels/__init__.py broke `import transformers` wherever the repository's root was on sys.path."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert (ROOT / "fastpeft" / "kernels").resolve() == ROOT / "kernels"


def test_public_names_have_docstrings():
    missing = []
    for name in fastpeft.__all__:
        value = getattr(fastpeft, name)
        described = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
        if described and not (value.__doc__ or "").strip():
            missing.append(name)
        if inspect.isclass(value) and value.__doc__ and value.__doc__.startswith(f"{name}("):
            missing.append(f"{name} (only what @dataclass generates)")
    assert not missing, f"public names without a docstring: {missing}"


def test_modules_have_docstrings():
    silent = [
        relative(path)
        for path in package_files()
        if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"modules without a docstring: {silent}"


def test_no_compiled_or_large_file_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    binary = [
        name for name in listed.stdout.splitlines() if name.endswith((".pyc", ".so", ".cubin", ".safetensors", ".bin"))
    ]
    assert not binary, f"built files are tracked: {binary}"


# ---- the checks themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("fastpeft/ops/lora.py", "from fastpeft.layers.lora import LoRALinear", "ops imports layers"),
        ("fastpeft/ops/lora.py", "def f():\n    import fastpeft.model", "ops imports model"),
        ("fastpeft/ops/lora.py", "def f():\n    from ..layers import lora", "ops imports layers"),
        ("fastpeft/ops/lora.py", "from fastpeft import model", "ops imports model"),
        ("fastpeft/ops/lora.py", "from fastpeft import PeftModel", "ops imports model"),
        ("fastpeft/ops/lora.py", "import importlib\nimportlib.import_module('fastpeft.cli')", "ops imports cli"),
        ("fastpeft/ops/lora.py", "from fastpeft.kernels import lora", "inside functions"),
        ("fastpeft/layers/lora.py", "def f():\n    from fastpeft.kernels import lora", "ops only"),
        ("fastpeft/reference/lora.py", "def f():\n    import fastpeft.kernels.lora", "reference imports kernels"),
        ("kernels/lora.py", "from fastpeft.reference import lora", "kernels imports reference"),
        ("kernels/lora.py", "from fastpeft.backend import resolve", "kernels imports backend"),
        ("kernels/lora.py", "import kernels.tiling", "not kernels"),
        ("fastpeft/model.py", "from tests.tolerance import EPS32", "the package imports tests"),
    ],
)
def test_a_planted_import_is_found(name, source, message):
    assert any(message in violation for violation in direction_violations(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fastpeft/ops/lora.py", "def f():\n    from fastpeft.kernels import lora"),
        ("fastpeft/ops/lora.py", "import torch\nfrom fastpeft.backend import resolve\nfrom fastpeft.ops import shapes"),
        ("fastpeft/model.py", "from .checkpoint import read_adapter"),
        ("kernels/lora.py", "from fastpeft.kernels.tiling import choose"),
        ("fastpeft/__init__.py", "from fastpeft import cli"),
    ],
)
def test_right_imports_pass(name, source):
    assert direction_violations(name, source) == []


def test_planted_faults_of_form_are_found():
    assert too_long("a.py", "x = 1\n" * 401)
    assert not too_long("a.py", "x = 1\n" * 400)
    for name in ("fastpeft/utils.py", "tests/test_helpers.py", "fastpeft/common/lora.py", "kernels/lora_part2.py"):
        assert meaningless_name(name), name
    assert not meaningless_name("fastpeft/ops/lora.py")
    for handler in ("except:", "except Exception:", "except (ValueError, Exception) as error:"):
        assert broad_handlers("a.py", f"try:\n    pass\n{handler}\n    pass"), handler
    assert not broad_handlers("a.py", "try:\n    pass\nexcept (ValueError, OSError):\n    pass")
