"""Turns a skip of a `parity`, `static` or `train` test into a failure when SANA_JAX_NO_SKIP=1.

A developer without torch, the CUDA plugin or tensorboardX sees those tests skipped.  `.ci/run` installs
them all, so there a skip means that something silently stopped being tested.

`tests/conftest.py` makes the hooks known with

    from tests.no_skip import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401
"""

import os

import pytest

MARKS = ("parity", "static", "train")


def _forbidden():
    return os.environ.get("SANA_JAX_NO_SKIP") == "1"


def _fail(report, what):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{what} was skipped although SANA_JAX_NO_SKIP=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marks = [mark for mark in MARKS if item.get_closest_marker(mark)]
    if _forbidden() and marks and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report, f"a {marks[0]} test")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A module that skips itself at import hides its marks, so any such skip counts."""
    report = yield
    if _forbidden() and report.skipped:
        _fail(report, "a whole module")
    return report
