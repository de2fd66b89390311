"""What a user installs has the kernels in it, and the checkout's top-level kernels/ folder does not break transformers."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
NOT_SOURCE = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache", ".venv")


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command, offline; its standard output, or the test's failure with what it printed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tracks_project() -> bool:
    """True if git knows this project's files, not only some repository around them."""
    command = ["git", "ls-files", "pyproject.toml"]
    return bool(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: building writes into the source tree."""
    copy = tmp_path_factory.mktemp("source") / "fastpeft"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel built from the checkout, and the wheel built from the unpacked sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    wheels = {}
    for name, tree in (("wheel", source), ("wheel of sdist", unpacked)):
        folder = out / name.replace(" ", "-")
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), cwd=tree)
        (wheels[name],) = folder.glob("*.whl")
    return {"sdist": sdist, **wheels}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wheel", "wheel of sdist"])
def test_wheel_holds_the_kernels_inside_the_package_and_nothing_beside_it(distributions, name):
    with zipfile.ZipFile(distributions[name]) as wheel:
        names = wheel.namelist()
    inside = sorted(n.removeprefix("fastpeft/kernels/") for n in names if n.startswith("fastpeft/kernels/"))
    assert inside == KERNELS
    assert "fastpeft/py.typed" in names
    strangers = {n.split("/")[0] for n in names if not n.startswith("fastpeft/") and ".dist-info/" not in n}
    assert not strangers, f"installed beside the package: {strangers}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wheel", "wheel of sdist"])
def test_installed_package_imports_with_its_kernels(distributions, name, tmp_path):
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", str(target), str(distributions[name]), cwd=tmp_path)
    modules = [f"fastpeft.kernels.{Path(name).stem}" for name in KERNELS]
    code = (
        "import importlib, fastpeft\n"
        f"modules = [importlib.import_module(name) for name in {modules}]\n"
        "print(*(module.__file__ for module in [fastpeft, *modules]), sep='\\n')\n"
        "print(*(getattr(fastpeft, name) for name in fastpeft.__all__))\n"
    )
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()[: 1 + len(modules)]
    assert files, "no kernel was imported"
    assert all(file.startswith(str(target)) for file in files), files


@pytest.mark.slow
def test_transformers_imports_with_the_checkout_on_the_path():
    """`kernels` is also a Hugging Face package, which transformers and bitsandbytes import where they find one.

    A regular package of that name in the root of the checkout broke them; a namespace folder loses against the real one.
    """
    if not KERNELS:
        pytest.fail("kernels/ is empty: nothing to clash with")
    code = (
        "from transformers import LlamaForCausalLM\n"
        "import bitsandbytes, fastpeft, kernels\n"
        "print(getattr(kernels, '__file__', None))\n"
    )
    file = run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]
    assert not file.startswith(str(ROOT)), f"import kernels finds {file}"


def test_kernels_is_a_relative_symlink_in_git():
    link = ROOT / "fastpeft" / "kernels"
    assert stat.S_ISLNK(link.lstat().st_mode), "fastpeft/kernels: expected a symlink; is core.symlinks off?"
    assert os.readlink(link) == "../kernels"
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "fastpeft/kernels"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not tracks_project():
        pytest.skip("not a git checkout of this project")
    assert listed.stdout.startswith("120000 "), f"git holds {listed.stdout!r}, expected mode 120000 (symlink)"
