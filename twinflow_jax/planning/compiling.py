"""Programs as the TPU's compiler makes them. What it said once is kept: it takes minutes to say."""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import time
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from twinflow_jax import cache
from twinflow_jax.errors import UserError, reason


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. text: its optimised HLO; the others: bytes of a device,
    peak with its arguments, and host those on the host. refused: how much more memory than there is
    it would take; "" where it fits, and then there is the rest. seconds: that compiling took."""

    seconds: float
    refused: str = ""
    text: str = ""
    peak: int = 0
    code: int = 0
    host: int = 0


def compiled(
    lower: Callable[[], jax.stages.Lowered], options: dict[str, str], devices: Sequence, where: str
) -> Compiled:
    """A program compiled for its devices, or as it was before, by the same compiler.

    where: of errors.
    Raises:
      UserError: the compiler refuses it for another reason than memory.
    """
    lowered = lower()
    # In one order, whoever asks: where each stands in a mesh follows from them.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    targets = [f"{device.device_kind} {device!r}" for device in ordered]
    said = [jax.__version__, _compiler(), json.dumps(options, sort_keys=True), *targets]
    key = [lowered.as_text().encode(), *(part.encode() for part in said)]
    found = cache.kept("program", key, lambda: _packed(_compile(lowered, options, where)))
    return _unpacked(found)


def _compile(lowered: jax.stages.Lowered, options: dict[str, str], where: str) -> Compiled:
    begin = time.perf_counter()
    try:
        made = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"{where}: the compiler refused: {reason(error)}") from error
        return Compiled(time.perf_counter() - begin, refused=_exceeded(str(error)))
    memory, seconds = made.memory_analysis(), time.perf_counter() - begin
    return Compiled(
        seconds, "", made.as_text(), memory.peak_memory_in_bytes,
        memory.generated_code_size_in_bytes, memory.host_temp_size_in_bytes,
    )


def _exceeded(message: str) -> str:
    """By how much a program exceeds the memory, as the compiler says it."""
    number = r"([\d.]+\w)"
    says = f"Used {number} of {number} hbm. Exceeded hbm capacity by {number}"
    used = re.search(says, message)
    return f"needs {used[1]} of {used[2]}, {used[3]} too much" if used else "does not fit"


def _compiler() -> str:
    """Which one: libtpu's version; none where nothing but the CPU's is there."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("libtpu")
    return ""


def _packed(made: Compiled) -> dict[str, np.ndarray]:
    content = zlib.compress(json.dumps(dataclasses.asdict(made)).encode())
    return {"program": np.frombuffer(content, np.uint8)}


def _unpacked(found: dict[str, np.ndarray]) -> Compiled:
    return Compiled(**json.loads(zlib.decompress(found["program"].tobytes())))
