"""Lets the tests import the package and the benchmarks from a checkout that is not installed.

The package's annotations are checked at every call in the processes of the tests themselves, and
in a program that they start where it imports this.
"""

import logging
import os
import pathlib
import re
import signal
import sys
import tempfile

import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# One compilation cache for the whole test run, also for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "twinflow_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TWINFLOW_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])

# Before anything of the package is imported. An int is a float, as in Python's type system.
jaxtyping.install_import_hook(
    "twinflow_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

from twinflow_jax import errors  # noqa: E402 - after the hook

# A verb that is interrupted in a test must not end the tests.
errors.end = sys.exit

# A shell starts background jobs with SIGINT ignored, which what is tested would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Of JAX's own, for keys, the noise of previews and scalars, beside those of jax.lax.
OPERATIONS = {
    "_broadcast_arrays", "_normal", "_threefry_fold_in", "_threefry_seed", "_threefry_split",
    "stage", "unstack",
}


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The programs that are compiled ahead of their first call, as far as the test has come."""
    import jax  # once it is known what the environment is

    programs, compile_one = [], jax.stages.Lowered.compile

    def count(lowered, *args, **options):
        programs.append(lowered)
        return compile_one(lowered, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", count)
    return programs


@pytest.fixture
def lowered(caplog):
    """What is compiled while a function runs, by name and shapes, without single operations."""
    import jax  # once it is known what the environment is

    logger = "jax._src.interpreters.pxla"
    caplog.set_level(logging.DEBUG, logger)

    def during(function, *arguments, **options) -> set[str]:
        caplog.clear()
        function(*arguments, **options)
        found = (record.getMessage() for record in caplog.records if record.name == logger)
        found = (re.match(r"Compiling jit\((.*?)\) .*types (.*)\. Arg", line) for line in found)
        own = lambda name: name not in OPERATIONS and not hasattr(jax.lax, name)
        return {match[0] for match in found if match and own(match[1])}

    return during


@pytest.fixture
def hub(monkeypatch):
    """An empty hub, which this process and those that it starts take for the Hugging Face hub."""
    import warnings

    from huggingface_hub import constants

    from tests.hub import Hub

    hub = Hub()
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with warnings.catch_warnings():  # of its library's own, which users do not see
        warnings.filterwarnings("ignore", "Use 'content=")
        yield hub
    hub.close()


SERVERS = []  # one a process: tensorstore asks once where it is


@pytest.fixture
def bucket(monkeypatch):
    """An empty one, which this process and those that it starts take for Cloud Storage."""
    from tests.bucket import Bucket  # of tests that ask for one

    if not SERVERS:
        SERVERS.append(Bucket())
    [server] = SERVERS
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.blobs.clear()
    server.refuse = lambda method, address: 0
