"""nova.conf: a CacheConfig from Nova's options, for virt drivers that have them already. The extra ``[oslo]``.

    from oslo_config import cfg

    config = config_from_oslo(cfg.CONF)

The only importer of oslo.config. ``python -m nova_imagecache.oslo --config-file /etc/nova/nova.conf`` prints the same
configuration as TOML, for the command line.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from oslo_config import cfg
except ImportError as err:
    raise ImportError(f"{err}: pip install 'nova-imagecache[oslo]'", name=err.name) from err

from nova_imagecache import _plugins, _users
from nova_imagecache._config import CacheConfig
from nova_imagecache._nova_config import OPTIONS, Translation, Value, translate
from nova_imagecache._nova_options import label
from nova_imagecache.backends import BackendPaths
from nova_imagecache.exceptions import BackendNotFoundError, ConfigError, ImageCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nova_imagecache._nova_options import NovaOption

_log = logging.getLogger(__name__)

_CLASSES: dict[str, Callable[..., cfg.Opt]] = {
    "str": cfg.StrOpt,
    "int": cfg.IntOpt,
    "float": cfg.FloatOpt,
    "bool": cfg.BoolOpt,
    "list": cfg.ListOpt,
    "multi": cfg.MultiStrOpt,
}
_READ = ("mapped", "refused", "own")


def list_opts() -> list[tuple[str | None, list[cfg.Opt]]]:
    """The options that a cache is made from, by group (None: ``[DEFAULT]``), as oslo-config-generator wants them:
    Nova's by their own names and defaults, and the group ``nova_imagecache`` for what Nova has no option for."""
    groups: dict[str, list[cfg.Opt]] = {}
    for row in OPTIONS:
        if row.use in _READ:
            groups.setdefault(row.group, []).append(_opt(row))
    return [(None if group == "DEFAULT" else group, opts) for group, opts in groups.items()]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register what ``list_opts`` lists. An option that somebody else has registered stays as it is, and is read.

    Not needed for ``config_from_oslo``; for programs that want to set or read these options themselves. In a process
    with Nova call it after Nova has registered its own.
    """
    for group, opts in list_opts():
        for opt in opts:
            try:
                conf.register_opt(opt, group=group)
            except cfg.DuplicateOptError:
                _log.debug("[%s] %s is registered by somebody else", group or "DEFAULT", opt.name)


def config_from_oslo(conf: cfg.ConfigOpts) -> CacheConfig:
    """The configuration that Nova's options ask for; docs/reference/nova-options.md says how each is understood.

    Nothing is registered with ``conf``. What it has registered is read from it, by whoever and however defined; the
    rest is read from its files and from the environment. What is set and has no effect is logged as a warning.

    Raises:
        ConfigError: with all problems at once: values that cannot be, options that contradict each other or ask for
            what is not done here, and what backend and source say of theirs. Each names the option in nova.conf, and
            what to do.
        BackendError, SourceError: a plug-in that is there cannot be loaded.
    """
    found = _translated(conf)
    for remark in found.remarks:
        _log.warning("%s", remark)
    return _judged(found)


def explain(conf: cfg.ConfigOpts) -> tuple[str, ...]:
    """What is set in ``conf`` and has no effect, or stands under an old name; a sentence each.

    Raises:
        ConfigError: the files of ``conf`` cannot be read any more.
    """
    return tuple(_translated(conf).remarks)


def _translated(conf: cfg.ConfigOpts) -> Translation:
    unreadable: dict[str, str] = {}
    rest = _rest(conf)
    found = translate({row.key: _value(row, conf, rest, unreadable) for row in OPTIONS})
    found.unreadable = unreadable
    found.remarks[:0] = _old_names(rest)
    return found


def _old_names(rest: cfg.ConfigOpts) -> Iterator[str]:
    for row in OPTIONS:
        if row.old is not None:
            group, _, name = row.old.partition(".")
            if _lookup(rest, _group(group), name).given:
                yield f"{label(row.old)} is an old name; write {row.label}"


def _judged(found: Translation) -> CacheConfig:
    """The configuration, if nobody who is to work with it has something against it."""
    problems = list(found.problems)
    config = None
    try:
        config = CacheConfig.from_mapping(found.settings)
        _users.configured(config)
    except ConfigError as err:
        problems += [found.renamed(problem) for problem in err.problems]
    problems += _plugins_problems(found)
    # what cannot be read stands for its default, and more is not to be said of it
    more = [problem for problem in problems if not problem.startswith(tuple(found.unreadable))]
    problems = [*found.unreadable.values(), *more]
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _plugins_problems(found: Translation) -> list[str]:
    """What the plug-ins say of their options: constructing them does no I/O."""
    nowhere = BackendPaths(root=Path("/"), disks_dir=Path("/"))
    settings = found.settings
    problems = []
    for name, load in (
        ("backend", lambda options: _plugins.load_backend(settings["backend"], options, nowhere).close()),
        ("source", lambda options: _plugins.load_source(settings["source"], options)),
    ):
        try:
            load(settings[f"{name}_options"])
        except ConfigError as err:
            problems += [found.renamed(problem, f"{name}_options.") for problem in err.problems]
        except BackendNotFoundError as err:
            problems.append(found.renamed(f"{name}: {err}"))
    return problems


# --- reading oslo.config ---------------------------------------------------------------------------------------------


def _opt(row: NovaOption) -> cfg.Opt:
    # a plug-in's options may hold a token, and services log what is registered
    rest: dict[str, Any] = {"secret": row.name.endswith("_options")}
    if row.choices:
        rest["choices"] = list(row.choices)
    if row.minimum is not None:
        rest["min"] = row.minimum
    if row.sample is not None:
        rest["sample_default"] = row.sample
    if row.old is not None:
        group, name = row.old.split(".")
        rest["deprecated_opts"] = [cfg.DeprecatedOpt(name, group=group)]
    if row.going is not None:
        rest |= {"deprecated_for_removal": True, "deprecated_reason": f"Nova deprecates it; write {row.going}."}
    words = row.here.replace("`", "")
    intro = "Becomes" if row.use == "own" else "In nova_imagecache:"
    return _CLASSES[row.kind](row.name, default=row.default, help=f"{intro} {words}.", **rest)


def _rest(conf: cfg.ConfigOpts) -> cfg.ConfigOpts:
    """Another reader of the same files, for what ``conf`` has not registered: registering with ``conf`` would be in the
    way of those who register the same names later, with other words of help."""
    rest = cfg.ConfigOpts()
    for row in OPTIONS:
        rest.register_opt(_opt(row), group=_group(row.group))
        if row.old is not None:
            group, name = row.old.split(".")
            rest.register_opt(cfg.StrOpt(name), group=_group(group))
    # a ConfigOpts that was never called has no files
    files, directories = getattr(conf, "config_file", None), getattr(conf, "config_dir", None)
    try:
        rest([], prog="nova_imagecache", default_config_files=files or [], default_config_dirs=directories or [])
    except cfg.Error as err:
        raise ConfigError([f"{err}; restore the file, or read the configuration anew"]) from err
    return rest


def _value(row: NovaOption, conf: cfg.ConfigOpts, rest: cfg.ConfigOpts, problems: dict[str, str]) -> Value:
    try:
        value = _lookup(*_home(row, conf, rest), row.name)
    except (cfg.Error, ValueError) as err:
        if row.use in _READ:
            # the reason follows the option's name and a long word for its place
            why = str(err).rpartition(" is not valid: ")[2]
            problems[row.label] = f"{row.label}: {why}; {row.advice}"
        return Value(row.default, given=False)
    return Value(row.default, given=False) if value.value is None else value


def _home(row: NovaOption, conf: cfg.ConfigOpts, rest: cfg.ConfigOpts) -> tuple[cfg.ConfigOpts, str | None]:
    """Who reads an option, and in which group: oslo.config tells a group "DEFAULT" from no group."""
    if row.group == "DEFAULT" and row.name in conf:
        return conf, None
    if row.group in conf and row.name in conf[row.group]:
        return conf, row.group
    return rest, _group(row.group)


def _lookup(conf: cfg.ConfigOpts, group: str | None, name: str) -> Value:
    place = conf.get_location(name, group)
    given = place is not None and place.location not in (cfg.Locations.opt_default, cfg.Locations.set_default)
    return Value(conf[name] if group is None else conf[group][name], given=given)


def _group(name: str) -> str | None:
    return None if name == "DEFAULT" else name


# --- the same, as TOML -----------------------------------------------------------------------------------------------


def _toml(config: CacheConfig) -> str:
    lines, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, dict):
            tables += ["", f"[{field.name}]", *(f"{name} = {_literal(one)}" for name, one in value.items())]
        elif value not in (None, ()):
            lines.append(f"{field.name} = {_literal(value)}")
    return "\n".join([*lines, *tables])


def _literal(value: Any) -> str:
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
        return str(int(seconds) if seconds.is_integer() else seconds)
    if isinstance(value, dict):
        inside = ", ".join(f"{json.dumps(name)} = {_literal(one)}" for name, one in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    # JSON's texts, numbers and truth are TOML's too
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; prints nova.conf as a configuration of the command ``nova-imagecache``."""
    conf = cfg.ConfigOpts()
    try:
        conf(argv, project="nova", prog="python -m nova_imagecache.oslo", description="nova.conf as TOML.")
        found = _translated(conf)
        config = _judged(found)
    except ConfigError as err:
        sys.stderr.writelines(f"{problem}\n" for problem in err.problems)
        return 2
    except (cfg.Error, ImageCacheError) as err:
        sys.stderr.write(f"{err}\n")
        return 2
    sys.stdout.writelines(f"# {remark}\n" for remark in found.remarks)
    sys.stdout.write(f"{_toml(config)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
