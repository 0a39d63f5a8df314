"""Fixtures of every test and Hypothesis profiles.

pytest                                  20 random examples per test, other ones each time
CI=1 pytest                             40, the same each time
HYPOTHESIS_PROFILE=thorough pytest      800 random examples
HYPOTHESIS_PROFILE=brief pytest         5 fixed examples
"""

import builtins
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Programs for subprocesses; they need triton.
collect_ignore_glob = ["triton/triton_*.py", "triton/conv_lstm_interpreted.py"]

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=20, print_blob=True, **COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=800, print_blob=True, **COMMON)
settings.register_profile("brief", max_examples=5, derandomize=True, database=None, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """NaN in uninitialized memory (integers: maximum, scratch: 0xFF) exposes unwritten outputs."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_last_answer():
    """Doctests leave results in ``builtins._``; tyro fails on unhashable ones."""
    yield
    vars(builtins).pop("_", None)


@pytest.fixture
def same_threads():
    """``--threads`` is process-wide."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def terminal_signals():
    """Signals act as in a terminal: a background job of a shell has some ignored."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def compiler():
    """torch.compile and opcheck load for seconds at their first use."""
    import torch.testing._internal.optests

    x = torch.ones(2, requires_grad=True)
    torch.compile(lambda x: x * 2, backend="aot_eager", dynamic=True)(x).sum().backward()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """TRITON_INTERPRET=1 would interpret GPU tests on the CPU."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is set, perhaps by a collected module: only a process of its own may")
