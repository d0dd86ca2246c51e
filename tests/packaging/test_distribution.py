"""What is released is what was tested: sdist and wheel are built, installed into empty environments, and used there."""

from __future__ import annotations

import ast
import configparser
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

from harness.built import PROJECT, REPO, Built, Environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VERSION = PROJECT["project"]["version"]
DIST_INFO = f"nova_imagecache-{VERSION}.dist-info/"


def content(wheel: Path) -> dict[str, str]:
    """The digest of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


# --- the archives


def test_the_wheel_holds_the_library_and_nothing_else(built: Built) -> None:
    """Every module and py.typed; no tests, no examples, nothing compiled or cached."""
    assert built.wheel.name == f"nova_imagecache-{VERSION}-py3-none-any.whl"
    package = REPO / "src/nova_imagecache"
    modules = {str(path.relative_to(REPO / "src")) for path in package.rglob("*.py")}
    names = set(content(built.wheel))
    assert {name for name in names if not name.startswith(DIST_INFO)} == {*modules, "nova_imagecache/py.typed"}
    described = {name.removeprefix(DIST_INFO) for name in names if name.startswith(DIST_INFO)}
    assert described == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_the_metadata_are_what_the_project_says(built: Built) -> None:
    """Name, licence and its text, Python, dependencies with their extras, and the entry points."""
    project = PROJECT["project"]
    with zipfile.ZipFile(built.wheel) as archive:
        said = HeaderParser().parsestr(archive.read(f"{DIST_INFO}METADATA").decode())
        licence = archive.read(f"{DIST_INFO}licenses/LICENSE")
        entry_points = configparser.ConfigParser(delimiters=("=",))
        entry_points.read_string(archive.read(f"{DIST_INFO}entry_points.txt").decode())
    assert (said["Name"], said["Version"]) == ("nova-imagecache", VERSION)
    assert (said["License-Expression"], said["License-File"]) == ("Apache-2.0", "LICENSE")
    assert licence == (REPO / "LICENSE").read_bytes()
    assert said["Requires-Python"] == project["requires-python"]
    assert said["Description-Content-Type"] == "text/markdown"
    assert set(said.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    plain = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(plain) == len(project["dependencies"])
    assert {group: dict(entry_points[group]) for group in entry_points.sections()} == {
        "console_scripts": project["scripts"],
        **project["entry-points"],
    }


def test_what_is_imported_is_declared(built: Built) -> None:
    """Every import of a third party's module, wherever it stands, has its distribution among the dependencies."""
    names = set()
    for path in (REPO / "src/nova_imagecache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    # Ceph's modules come with its packages, not from PyPI; authors of plug-ins have pytest
    names -= {*sys.stdlib_module_names, "nova_imagecache", "rados", "rbd", "pytest"}
    assert {"glanceclient", "filelock", "oslo_config"} <= names
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in lines}
    brought = metadata.packages_distributions()
    for name in names:
        by = {re.sub(r"[-_.]+", "-", distribution).lower() for distribution in brought.get(name, [name])}
        assert by & declared, f"{name} comes with {', '.join(by)}, which is not declared"


def test_the_sdist_holds_what_a_packager_needs(built: Built) -> None:
    """The tests, their harness, the documentation and the tools; no environment, no cache, no work of a machine."""
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    for name in ("LICENSE", "README.md", "pyproject.toml", "Makefile", ".importlinter", "tools/setup.sh"):
        assert name in names
    for directory in ("src", "tests", "docs", "examples", "changelog.d"):
        for path in (REPO / directory).rglob("*"):
            name = str(path.relative_to(REPO))
            if path.is_file() and not any(part in name for part in ("__pycache__", ".egg-info", "_build", "_cache/")):
                assert name in names
    junk = (".venv", ".work", ".git/", "__pycache__", "_cache/", ".pyc", ".hypothesis", ".coverage")
    assert [name for name in names if any(part in f"/{name}" for part in junk)] == []


def test_the_sdist_alone_makes_the_same_wheel(built: Built) -> None:
    """File by file, so that nothing in the working tree slipped in or was left out."""
    assert content(built.rebuilt) == content(built.wheel)


# --- installed, with nothing but what it needs


def test_every_module_imports_without_a_warning(core: Environment, tmp_path: Path) -> None:
    """With the declared dependencies alone; modules of extras say which extra they need."""
    script = """
import importlib, pkgutil, sys
import nova_imagecache
print(nova_imagecache.__file__, nova_imagecache.__version__)
missing = {}
for module in pkgutil.walk_packages(nova_imagecache.__path__, "nova_imagecache."):
    if module.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as err:
        missing[module.name] = str(err)
print(missing)
"""
    where, missing = core.run("python", "-I", "-W", "error", "-c", script, cwd=tmp_path).stdout.splitlines()
    assert (
        where == f"{core.path}/lib/python3.{sys.version_info.minor}/site-packages/nova_imagecache/__init__.py {VERSION}"
    )
    for name, why in eval(missing).items():
        assert name == "nova_imagecache.oslo" or name.startswith(
            ("nova_imagecache.cli.", "nova_imagecache.testing.")
        ), why


def test_importing_the_library_is_quiet(core: Environment, tmp_path: Path) -> None:
    """Not a word, with every warning an error."""
    done = core.run("python", "-W", "error", "-c", "import nova_imagecache", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_command_without_its_extra_says_what_to_install(core: Environment, tmp_path: Path) -> None:
    """One line, no traceback."""
    done = core.run("nova-imagecache", "list", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'nova-imagecache[cli]'" in done.stderr


def test_an_image_becomes_a_root_disk(core: Environment, tmp_path: Path) -> None:
    """By the installed library, from a directory, on both file backends; plug-ins are found by their entry points.

    The image is a compressed qcow2: reading it and summing its base takes what the library depends on.
    """
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "raw").write_bytes(b"guest" * 100_000)
    for kind in ("zlib", "zstd"):
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"compression_type={kind}", "raw"]
        subprocess.run([*argv, str(images / f"{kind}.img")], check=True, cwd=tmp_path, timeout=60)
        (images / f"{kind}.json").write_text('{"disk_format": "qcow2"}')
    script = """
import json, sys
from pathlib import Path
from nova_imagecache import CacheConfig, ImageCache, available_backends, available_sources
here = Path.cwd()
images = here / "images"
made = {}
for backend in ("file", "qcow2"):
    config = CacheConfig(root=here / backend, backend=backend, source="directory", allow_unverified=True,
                         source_options={"path": str(images)}, max_idle=0)
    with ImageCache.from_config(config) as cache:
        made[backend] = []
        for image in ("zlib", "zstd"):
            disk = cache.create_root_disk(image, f"vm-{image}", size=1 << 20)
            made[backend] += [disk.format, disk.virtual_size, cache.verify_base(image).image_id]
            cache.remove_root_disk(f"vm-{image}")
        made[backend].append(sorted(cache.cleanup().removed))
print(json.dumps([available_backends(), available_sources(), made]))
"""
    answer = json.loads(core.run("python", "-I", "-W", "error", "-c", script, cwd=tmp_path).stdout)
    assert answer == [
        ["file", "qcow2", "rbd"],
        ["directory", "glance"],
        {
            "file": ["raw", 1 << 20, "zlib", "raw", 1 << 20, "zstd", ["zlib", "zstd"]],
            "qcow2": ["qcow2", 1 << 20, "zlib", "qcow2", 1 << 20, "zstd", ["zlib", "zstd"]],
        },
    ]


# --- installed, with the extras


def test_the_command_line_does_its_work_without_a_warning(full: Environment, tmp_path: Path) -> None:
    """Help, version, and the way of an image to a disk and out again; every warning is an error."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "img.img").write_bytes(b"guest" * 100_000)
    (images / "img.json").write_text('{"disk_format": "raw"}')
    config = tmp_path / "config.toml"
    config.write_text(
        f'root = "{tmp_path}/cache"\nsource = "directory"\nallow_unverified = true\n'
        f'max_idle = 0\n[source_options]\npath = "{images}"\n'
    )

    def command(*arguments: str) -> str:
        argv = ("python", "-W", "error", "-m", "nova_imagecache", "--config", str(config), *arguments)
        return full.run(*argv, cwd=tmp_path).stdout

    assert full.run("nova-imagecache", "--version", cwd=tmp_path).stdout == f"nova-imagecache {VERSION}\n"
    for name in ("ensure", "create-disk", "cleanup", "list", "verify", "usage"):
        assert name in command("--help")
    assert [row["name"] for row in json.loads(command("backends", "-f", "json"))]
    assert json.loads(command("create-disk", "img", "vm", "-f", "json"))["format"] == "qcow2"
    (row,) = json.loads(command("list", "-f", "json"))
    assert (row["image_id"], row["users"]) == ("img", 1)
    command("check", "-f", "json")
    command("remove-disk", "vm")
    assert "img" in command("cleanup", "-f", "json")
    assert json.loads(command("list", "-f", "json")) == []


def test_the_sample_of_nova_options_is_printed(full: Environment, tmp_path: Path) -> None:
    """oslo-config-generator finds the installed entry point."""
    sample = full.run("oslo-config-generator", "--namespace", "nova_imagecache", cwd=tmp_path).stdout
    assert "#images_type = default" in sample
    assert "[nova_imagecache]" in sample


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_find_the_types_of_the_installed_wheel(full: Environment, tmp_path: Path, checker: str) -> None:
    """py.typed does its work: away from the sources, every call still has its type."""
    shutil.copy(REPO / "tests/typing/public_api.py", tmp_path)
    if checker == "mypy":
        argv = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(full.python), "public_api.py"]
    else:
        shutil.copy(REPO / "tests/typing/pyrightconfig.json", tmp_path)
        program = Path(sys.executable).parent / "basedpyright"
        argv = [str(program), "--project", str(tmp_path), "--pythonpath", str(full.python), "public_api.py"]
    done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
