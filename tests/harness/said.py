"""What a test has to say when it passed: printed at the end of the run, also where other processes run the tests."""

from __future__ import annotations

from typing import Any

SAID = "said"
"""The name of the property (``record_property``) whose value is printed."""


def tell(terminal: Any) -> None:
    """Print what passed tests said: pytest's ``pytest_terminal_summary``."""
    reports = terminal.stats.get("passed", []) + terminal.stats.get("failed", [])
    said = [str(value) for report in reports for name, value in report.user_properties if name == SAID]
    if said:
        terminal.section("what tests say")
        for line in said:
            terminal.line(line)
