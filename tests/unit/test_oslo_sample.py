"""What the bridge prints: oslo-config-generator's sample, nova.conf as TOML, and the reference page."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from oslo_config import cfg

from nova_imagecache import CacheConfig, ConfigError
from nova_imagecache._nova_config import OPTIONS
from nova_imagecache._nova_options import NovaOption, label
from nova_imagecache.oslo import config_from_oslo, explain, main
from unit.novaconf import Read, read

__all__ = ["read"]  # a fixture


def test_the_generator_prints_a_sample_that_means_the_defaults(tmp_path: Path) -> None:
    """oslo-config-generator finds the options by the entry point; its sample, uncommented, changes nothing."""
    sample = tmp_path / "sample.conf"
    script = "from oslo_config.generator import main; main()"
    arguments = ["--namespace", "nova_imagecache", "--output-file", str(sample)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=60)
    lines = sample.read_text().splitlines()
    group, listed, written = "DEFAULT", set(), []
    for before, line in itertools.pairwise(lines):
        if line.startswith("["):
            group = line.strip("[]")
            written.append(line)
        elif option := re.match(r"#(\w+) =", line):
            assert before.startswith("# "), f"{line} is not documented"
            listed.add(f"{group}.{option[1]}")
            if "<" not in line:  # no default, or one that differs from host to host
                written.append(line.removeprefix("#"))
    assert listed == {row.key for row in OPTIONS if row.use in ("mapped", "refused", "own")}
    uncommented = tmp_path / "uncommented.conf"
    uncommented.write_text("\n".join(["[DEFAULT]", *written]))
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[str(uncommented)])
    config = config_from_oslo(conf)
    # written down, Nova's two interfaces are a choice of the first
    assert config.source_options == {"retries": 3, "interface": "internal"}
    assert dataclasses.replace(config, source_options={"retries": 3}) == config_from_oslo(cfg.ConfigOpts())


def test_nova_conf_as_toml_is_the_same_configuration(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command line is given is what the driver has; what has no effect stands above it."""
    text = """
[DEFAULT]
timeout_nbd = 20
state_path = /srv/n"o"va
[nova_imagecache]
max_bytes = 20G
lock_timeout = 90s
disk_dirs = /srv/a,/srv/b
backend = rbd
backend_options = features = ["layering", "exclusive-lock"]
source_options = endpoints = ["http://a:9292"]
source_options = insecure = true
"""
    conf = read(text)
    assert main(["--config-file", str(tmp_path / "nova.conf")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# [DEFAULT] timeout_nbd has no effect: ")
    assert CacheConfig.from_mapping(tomllib.loads(printed)) == config_from_oslo(conf)


def test_toml_of_a_wrong_nova_conf_is_its_problems(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, one a line, and exit code 2; a file that is not there, too."""
    read("[libvirt]\nimages_type = lvm\n[nova_imagecache]\nmax_bytes = x\n")
    assert main(["--config-file", str(tmp_path / "nova.conf")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.partition("]")[0] for line in printed.err.splitlines()] == ["[libvirt", "[nova_imagecache"]
    assert main(["--config-file", str(tmp_path / "none.conf")]) == 2
    assert "none.conf" in capsys.readouterr().err


def test_without_oslo_config_the_import_says_what_to_install() -> None:
    """The extra's name is in the error."""
    script = "import sys; sys.modules['oslo_config'] = None; import nova_imagecache.oslo"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "pip install 'nova-imagecache[oslo]'" in done.stderr


# --- the reference page


PAGE = Path(__file__).resolve().parents[2] / "docs/reference/nova-options.md"


def row_of(row: NovaOption) -> str:
    """The row of the reference's table."""
    value = row.sample if row.sample is not None else row.default
    text = ", ".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value
    return f"| `{row.name}` | {'' if text in (None, '') else f'`{text}`'} | {row.use} | {row.here} |"


def test_the_reference_has_a_row_for_every_option_and_no_other() -> None:
    """Group by group; default, use and meaning are the code's, word for word."""
    found: dict[str, list[str]] = {}
    group = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            group = line.strip("# `[]")
        elif line.startswith("| `") and line.count(" | ") == 3:
            found.setdefault(group, []).append(line)
    wanted: dict[str, list[str]] = {}
    for row in OPTIONS:
        wanted.setdefault(row.group, []).append(row_of(row))
    assert found == wanted


def test_the_reference_names_what_to_write_for_old_names_and_for_those_that_go() -> None:
    """Both tables are complete."""
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\[", line) and line.count(" | ") == 1]
    old = [f"| `{label(row.old)}` | `{row.label}` |" for row in OPTIONS if row.old is not None]
    going = [f"| `{row.label}` | {row.going} |" for row in OPTIONS if row.going is not None]
    assert rows == old + going


def said(conf: cfg.ConfigOpts) -> tuple[str, ...]:
    try:
        config_from_oslo(conf)
    except ConfigError as err:
        return err.problems
    return explain(conf)


def test_every_example_on_the_page_is_answered_with_the_words_beneath_it(read: Read) -> None:
    """Each nova.conf that cannot be, or has no effect, brings exactly the sentences that the page shows."""
    block = r"((?:(?!```).)*)```"
    examples = re.findall(rf"^```ini\n{block}\n```text\n{block}", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 7
    for text, answer in examples:
        conf = read(text)
        assert answer.splitlines() == list(said(conf))
