"""The bar counts what is done, and its estimate is one of the whole."""

import pytest

from teal_fast.calibration import progress as module
from teal_fast.calibration.methods import METHODS, fit_curves
from teal_fast.calibration.passes import Journal, Passes
from teal_fast.calibration.progress import SAID_AFTER, Progress
from teal_fast.files.load import load_model


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("per_unit, said", [(1, "about 2 minutes to go"), (0.5, "about 46 seconds to go")])
def test_the_estimate_is_said_once_and_soon(clock, capsys, per_unit, said):
    with Progress(100, "title") as progress:
        while clock[0] - 100 < SAID_AFTER:
            assert "to go" not in capsys.readouterr().err
            clock[0] += per_unit
            progress.add(1)
        assert said in capsys.readouterr().err and SAID_AFTER < 10
        clock[0] += 10
        progress.add(10)
    assert "to go" not in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_the_bar_ends_where_the_work_does(tiny, tmp_path, method):
    """And a run that finds all of its passes in the journal has none to do."""
    sequences = [list(range(3 + i, 20 + 2 * i)) for i in range(5)]
    for again in (False, True):
        made = Passes(load_model(tiny), sequences, 40, Journal(tmp_path / "journal", {}))
        fit_curves(made, method)
        assert made.progress.bar.n == pytest.approx(made.progress.bar.total)
        assert (made.progress.bar.n == 0) == (again and method != "blockwise")
