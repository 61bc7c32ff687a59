"""pytest -p tests.failures_at_once: prints each failure when it happens, so that a run that is cut off has said why."""

from __future__ import annotations

import pytest
from _pytest.terminal import TerminalReporter


class FailuresAtOnce:
    def __init__(self, reporter: TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._say(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._say(report, "collection")

    def _say(self, report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
        if report.failed:
            self._reporter.ensure_newline()
            self._reporter.write_line(f"{report.nodeid} ({when})\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # a worker of xdist has none, and sends its reports to the process that has
        config.pluginmanager.register(FailuresAtOnce(reporter))
