"""A short run of what ``make chaos`` does for longer."""

from __future__ import annotations

import pytest

from tests import chaos

pytestmark = [pytest.mark.postgres, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_is_lost_to_random_faults(capsys: pytest.CaptureFixture[str]) -> None:
    status = chaos.main(["--seconds", "25", "--seed", "7"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "0 losses; seed 7" in said
