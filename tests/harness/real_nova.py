"""A program of its own: Nova's option definitions, from its wheel, registered as Nova does, and the bridge over them.

    python real_nova.py WHEEL NOVA_CONF

Prints JSON. Of Nova only the modules that define the options in question are imported: all of ``nova.conf`` needs what
the rest of Nova needs.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from typing import Any

from oslo_config import cfg

from nova_imagecache import _nova_options
from nova_imagecache.oslo import config_from_oslo, explain, register_opts

MODULES = ("paths", "netconf", "compute", "imagecache", "libvirt", "glance", "workarounds", "ephemeral_storage")


def nova(wheel: str) -> cfg.ConfigOpts:
    """What Nova's own modules have registered."""
    sys.path.insert(0, wheel)
    for name in ("nova", "nova.conf"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    conf = cfg.ConfigOpts()
    for name in MODULES:
        importlib.import_module(f"nova.conf.{name}").register_opts(conf)
    return conf


def facts(opt: cfg.Opt) -> dict[str, Any]:
    """What the bridge's table says of an option, as Nova defines it."""
    return {
        "default": opt.default,
        "kind": type(opt).__name__,
        "choices": list(getattr(opt.type, "choices", None) or ()),
        "minimum": getattr(opt.type, "min", None),
        "old": [f"{old.group or ''}.{old.name or opt.name}" for old in opt.deprecated_opts],
        "going": bool(opt.deprecated_for_removal),
    }


def definition(conf: cfg.ConfigOpts, row: _nova_options.NovaOption) -> cfg.Opt | None:
    """Nova's definition of an option, found as oslo.config finds it."""
    opts = conf._opts if row.group == "DEFAULT" else conf._groups[row.group]._opts
    return opts[row.name]["opt"] if row.name in opts else None


def main(wheel: str, path: str) -> None:
    """Everything that the test looks at."""
    conf = nova(wheel)
    defined = {row.key: definition(conf, row) for row in _nova_options.NOVA_OPTIONS}
    conf([], project="nova", default_config_files=[path])
    config = config_from_oslo(conf)
    before = conf.libvirt.images_type
    # a second definition of each name, with other words of help
    register_opts(conf)
    assert conf.libvirt.images_type == before
    answer = {
        "options": {key: None if opt is None else facts(opt) for key, opt in defined.items()},
        "config": {name: str(getattr(config, name)) for name in ("root", "disks_dir", "backend", "max_idle")},
        "backend_options": config.backend_options,
        "source_options": config.source_options,
        "remarks": explain(conf),
        "again": config_from_oslo(conf) == config,
    }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
