"""What every test runs under: poisoned memory, a fixed seed, and Hypothesis profiles.

pytest                                  random examples, each test a few dozen
CI=1 pytest                             the same examples every time
HYPOTHESIS_PROFILE=thorough pytest      twenty times as many
HYPOTHESIS_PROFILE=brief pytest         a handful, the same every time: where every example compiles kernels of its own
"""

import builtins
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Programs that tests start in a process of their own; they need triton to be imported.
collect_ignore_glob = ["triton/triton_*.py", "triton/conv_lstm_interpreted.py"]

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=40, print_blob=True, **COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=800, print_blob=True, **COMMON)
settings.register_profile("brief", max_examples=5, derandomize=True, database=None, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what torch.empty and its kin return with NaN (integers with their largest value, scratch with 0xFF): an
    output that a kernel does not write, or scratch that it reads before writing, shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_last_answer():
    """A doctest leaves its last result in ``builtins._``, where tyro trips over one that cannot be hashed."""
    yield
    vars(builtins).pop("_", None)


@pytest.fixture
def same_threads():
    """The command line's ``--threads`` sets PyTorch's for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiler():
    """What torch.compile and opcheck load at their first use takes seconds: of this fixture, not of a test."""
    import torch.testing._internal.optests

    x = torch.ones(2, requires_grad=True)
    torch.compile(lambda x: x * 2, backend="aot_eager", dynamic=True)(x).sum().backward()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """Under TRITON_INTERPRET=1 a GPU's Triton tests would interpret the kernels on the CPU, and prove nothing of it."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is set, perhaps by a collected module: only a process of its own may")
