"""For pytest: ``-p tests.pretended_card.plugin`` pretends a T4 before anything has imported torch."""

import os

import pytest

from tests.pretended_card.build import compiler
from tests.pretended_card.pretend import install

CANNOT = "tests/pretended_card was skipped: it needs a C++ compiler (apt-get install g++)"


def pytest_configure() -> None:
    if compiler() is None:
        pytest.exit(CANNOT, returncode=0)


if compiler() is not None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what stands for its CUDA kernels
    install("t4")
