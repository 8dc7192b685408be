"""What the compiler said of a program is kept, and of another one asked anew."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from twinflow_jax.errors import UserError
from twinflow_jax.planning.compiling import Compiled, compiled


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path) -> dict:
    """times: how often it was asked; says: what it raises, if anything."""
    monkeypatch.setenv("TWINFLOW_CACHE", str(tmp_path))
    seen, compile = {"times": 0, "says": ""}, jax.stages.Lowered.compile

    def counted(lowered, compiler_options=None):
        seen["times"] += 1
        if seen["says"]:
            raise jax.errors.JaxRuntimeError(seen["says"])
        return compile(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    return seen


@dataclasses.dataclass(frozen=True)
class Device:
    """As a TPU's, whose repr does not tell its generation."""

    id: int
    process_index: int = 0
    device_kind: str = dataclasses.field(default="TPU v5 lite", repr=False)


def asked(function, options=None, devices=(Device(0),)) -> Compiled:
    return compiled(lambda: jax.jit(function).lower(jnp.ones(4)), options or {}, devices, "here")


def test_a_program_is_compiled_once_for_its_devices_and_options(compiler, tmp_path):
    first = asked(jnp.sin)
    assert "sine" in first.text and first.peak > 0 and first.seconds > 0
    assert asked(jnp.sin) == first and compiler["times"] == 1
    for order in ((0, 1), (1, 0)):  # of a mesh, or of the topology
        asked(jnp.sin, devices=[Device(number) for number in order])
    asked(jnp.sin, devices=(Device(0, 0, "TPU v6 lite"),))
    asked(jnp.sin, options={"xla_flag": "true"})
    assert compiler["times"] == 4
    assert "cosine" in asked(jnp.cos).text
    for file in tmp_path.iterdir():
        file.write_bytes(b"torn")
    assert asked(jnp.sin).text == first.text and compiler["times"] == 6


def test_too_little_memory_is_an_answer_that_is_kept_and_other_refusals_are_not(compiler):
    exceeded = "Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    compiler["says"] = f"RESOURCE_EXHAUSTED: {exceeded}"
    for _ in range(2):
        assert asked(jnp.sin).refused == "needs 20.5G of 15.75G, 4.75G too much"
    assert compiler["times"] == 1
    compiler["says"] = "INTERNAL: a bug"
    for _ in range(2):
        with pytest.raises(UserError, match="here: the compiler refused: .*a bug"):
            asked(jnp.cos)
    assert compiler["times"] == 3
