"""`sparsegpt shrink` as it is typed: every option reaches the job, and refusals name the flags."""

import pytest

from sparsegpt.run import shrink_job
from sparsegpt.shrinking.settings import ShrinkSettings


@pytest.fixture
def told(run_cli, monkeypatch):
    """Call `sparsegpt shrink ...`; returns what the job was told instead of doing it."""

    def call(*arguments):
        found = []
        monkeypatch.setattr(shrink_job, "shrink", lambda *given, speed: found.append((*given[:2], speed)))
        outcome = run_cli("shrink", "--quiet", *arguments)
        assert outcome.code == 0, outcome.err
        [values] = found
        return values

    return call


def test_options_reach_the_job(told):
    options, settings, speed = told(
        *("--model", "demo", "--keep", "75%", "--blocks", "5", "--method", "wanda", "--depth", "similarity"),
        *("--samples", "4", "--seed", "3", "--no-speed"),
    )
    assert settings == ShrinkSettings(keep="75%", blocks="5", method="wanda", depth="similarity")
    assert (options.model, options.samples, options.seed, speed) == ("demo", 4, 3, False)
    assert str(options.out) == "pruned/demo-smaller-keep-75pct-blocks-5"
    assert options.calibration == "pydoc"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ("nothing says how small", "--keep", "--speedup")),
        (["--keep", "0"], ("above 0", "--keep")),
        (["--keep", "50%", "--channels", "50%"], ("--channels",)),
        (["--speedup", "1"], ("above 1", "--speedup")),
    ],
)
def test_refusals_name_the_flags(run_cli, arguments, fragments):
    run_cli("shrink", *arguments).refused(*fragments)
