"""Where the tests of the benchmarks find data that the repository does not hold."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("RBPFX_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: name their folder in RBPFX_DATA")
    return folder


@pytest.fixture
def data_file(data_dir: Path, request: pytest.FixtureRequest) -> Path:
    """The folder with the data sets, if it has the file named by the (indirect) parameter."""
    if not (data_dir / request.param).exists():
        pytest.skip(f"{data_dir} has no {request.param}")
    return data_dir
