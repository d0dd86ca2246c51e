"""What a test does when the service that it needs is missing."""

from __future__ import annotations

import os

import pytest


def require(missing: str | None) -> None:
    """Go on if nothing is ``missing``; else skip the test, or fail it where CI=true: there everything must be."""
    if missing is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)
