"""The gate of tests/no_skip.py, on a test run of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFTEST = """
from tests.no_skip import pytest_make_collect_report, pytest_runtest_makereport

def pytest_configure(config):
    for mark in ("parity", "static", "train"):
        config.addinivalue_line("markers", mark)
"""
SKIP = "import pytest\n@pytest.mark.{mark}\ndef test_a(): pytest.skip('no torch')\n"
SKIPIF = SKIP.replace("def", "@pytest.mark.skipif('1', reason='')\ndef")
MODULE = "import pytest\npytest.importorskip('no_such_package')\n"
XFAIL = "import pytest\n@pytest.mark.{mark}\ndef test_a(): pytest.xfail('known')\n"


@pytest.mark.parametrize(
    "source, forbidden, passes",
    [
        (SKIP.format(mark="parity"), "1", False),
        (SKIPIF.format(mark="static"), "1", False),
        (SKIP.format(mark="train"), "1", False),
        (MODULE, "1", False),
        (SKIP.format(mark="parity"), "", True),
        (MODULE + "def test_a(): ...\n", "", True),
        (SKIP.format(mark="usefixtures()"), "1", True),  # other tests may skip
        (XFAIL.format(mark="parity"), "1", True),
    ],
)
def test_gate(tmp_path, source, forbidden, passes):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SANA_JAX_NO_SKIP": forbidden},
        capture_output=True,
        text=True,
    )
    ran = done.returncode in (0, 5)  # 5: the only module was skipped whole
    assert ran == passes, done.stdout
    assert ("SANA_JAX_NO_SKIP" in done.stdout) != passes
