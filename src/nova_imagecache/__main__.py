"""``python -m nova_imagecache`` is the command line ``nova-imagecache``."""

from __future__ import annotations

import sys

from nova_imagecache.cli import main

sys.exit(main())
