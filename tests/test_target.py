"""The target: a share or a number."""

import pytest

from rbpfx import Target, TargetError


@pytest.mark.parametrize(("macs", "share"), [(0.3, 0.3), (1, 1), (1.0, 1), (250, 0.25), (2000, 2)])
def test_share(macs: float, share: float) -> None:
    assert Target(macs=macs).macs_share(1000) == share


@pytest.mark.parametrize("macs", [0, -0.5, float("nan")])
def test_not_positive(macs: float) -> None:
    with pytest.raises(TargetError, match="must be positive, for example"):
        Target(macs=macs)
