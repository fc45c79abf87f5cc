"""A few of the faults of `python tests/faults.py`, which tries them all, many times."""
import os
import sys
from pathlib import Path

import pytest

from faults import attempt


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the faults share: the pictures, and runs that were never interrupted."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("name, how", [
    ("kill_between_files", dict(times=1)), ("two_trainers", {}), ("bad_state", {})])
def test_nothing_is_lost(place, monkeypatch, name, how):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here), *sys.path[:1]]))
    assert attempt(name, 0, "the suite", place, **how) is None
