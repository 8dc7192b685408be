"""Low-rank adapters (LoRA, arXiv 2106.09685): a projection x W becomes x W + (x a) b.

They are leaves beside the kernels that they adapt, `lora_a` (..., in, rank) and `lora_b` (...,
rank, out), in float32 and with scale 1 (alpha = rank). `a` starts normal with standard deviation
1 / rank, as peft's "gaussian", and `b` at zero: a network with fresh adapters is its base. Where a
network is initialised inside `added`, its modules make them; where parameters hold them, modules
use them.
"""

import contextvars
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax import keys
from twinflow_jax.errors import UserError, few
from twinflow_jax.keys import option
from twinflow_jax.models.axes import init_of
from twinflow_jax.models.context import setting
from twinflow_jax.models.names import NameTable

LEAVES = r"(.*/)?lora_[ab]"  # paths of adapters
SPLIT = "adapter"  # the logical axis of what `a` takes and `b` gives, whatever the kernel's are

_chosen = contextvars.ContextVar("adapted projections")


@dataclasses.dataclass(frozen=True)
class Adapter(keys.Part):
    """Which weights train where the network itself stays as it is."""

    section: ClassVar[str] = "adapter"

    rank: int = option(0, "of the adapters that train; 0: none, the network itself does", least=0)
    targets: tuple[str, ...] = option(
        ("all",), "projections that have one: ends of their published names (of our paths, where "
        "a family has none), or a preset: all, or one of the family's",
    )
    whole: tuple[str, ...] = option(
        (), "weights that train whole beside them: patterns of our paths"
    )

    def __post_init__(self):
        super().__post_init__()
        for pattern in self.whole:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"adapter.whole has {pattern!r}, no pattern ({error})") from error

    @property
    def frozen(self) -> str:
        """A pattern of the paths that do not train."""
        return f"(?!({'|'.join((LEAVES, *self.whole))})$).*"


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is an adapter's."""
    return re.fullmatch(LEAVES, path) is not None


def ranks_of(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Of the projections that have an adapter among leaves by path, for `added`."""
    return {
        path.removesuffix("/lora_a"): leaf.shape[-1]
        for path, leaf in leaves.items() if path.endswith("/lora_a")
    }


def added(paths: Mapping[str, int]):
    """Networks that are initialised inside have adapters of these ranks beside the kernels of the
    modules at these paths."""
    return setting(_chosen, paths)


def low_rank(
    module: nn.Module, x: Float[Array, "..."], shape: tuple[int, ...], dtype: Any,
    contracted: int = 1, stacked: bool = False,
) -> Float[Array, "... out"] | None:
    """What a projection's adapter adds to its output, the axes of which are one here; None where
    it has no adapter.

    shape: of its kernel, whose first `contracted` axes are the last of x. stacked: whether the
    kernel has one more before them, of layers, and so has what is returned.
    """
    if module.is_initializing():
        rank = _chosen.get({}).get("/".join(module.path), 0)
    elif module.has_variable("params", "lora_a"):
        rank = module.get_variable("params", "lora_a").shape[-1]
    else:
        rank = 0
    if not rank:
        return None
    layers, shape = shape[:stacked], shape[stacked:]
    into, out = math.prod(shape[:contracted]), math.prod(shape[contracted:])
    normal = nn.initializers.normal(1 / rank)
    none = (None,) * len(layers)
    a = module.param("lora_a", init_of(normal, *none, SPLIT, None), (*layers, into, rank))
    b = module.param(
        "lora_b", init_of(nn.initializers.zeros, *none, None, SPLIT), (*layers, rank, out)
    )
    a, b = (jnp.expand_dims(leaf, 1) if stacked else leaf for leaf in (a, b))
    x = x.reshape(*x.shape[: x.ndim - contracted], into)
    return (x.astype(dtype) @ a.astype(dtype)) @ b.astype(dtype)


def adapted(
    module: nn.Module, y: Float[Array, "..."], x: Float[Array, "..."], shape: tuple[int, ...],
    contracted: int = 1, stacked: bool = False,
) -> Float[Array, "..."]:
    """y, a projection's output, with what its adapter adds: arguments as `low_rank`'s."""
    more = low_rank(module, x, shape, y.dtype, contracted, stacked)
    return y if more is None else y + more.reshape(y.shape)


def names_of(table: NameTable) -> dict[str, str]:
    """Projections by path: the published name of each, "{}" standing for the layer."""
    return {
        rule.path.removesuffix("/kernel"): rule.key.removesuffix(".weight")
        for rule in table.rules
        if rule.layout in ("linear", "pointwise") and rule.path.endswith("/kernel")
    }


def paths_of(leaves: Collection[str]) -> dict[str, str]:
    """Layers with a kernel of a network that nothing publishes, each named by its path. leaves:
    paths of its parameters."""
    kernels = (path.removesuffix("/kernel") for path in leaves if path.endswith("/kernel"))
    return {path: path for path in kernels}


def chosen(
    targets: tuple[str, ...], names: Mapping[str, str], presets: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """The paths of the projections that targets stand for, as peft reads them: a name, or its end
    after a dot. names: by path, from `names_of` or `paths_of`.

    Raises:
      UserError: targets that match nothing, all of them, each with names that are like it.
    """
    wanted = [name for target in targets for name in presets.get(target, (target,))]
    found, lacking = [], []
    for target in wanted:
        fits = [
            path for path, name in names.items()
            if target == "all" or f".{name}".replace("/", ".").endswith(f".{target}")
        ]
        found += fits
        if not fits:
            ends = {name.rpartition("{}.")[2] for name in names.values()}
            near = difflib.get_close_matches(target, ends, 3, 0.0)
            lacking.append(f"{target} (near: {', '.join(near)})")
    if lacking:
        known = ", ".join(("all", *presets))
        raise UserError(
            f"adapter.targets has what no projection is called: {few(lacking)}; presets: {known}"
        )
    return sorted(set(found))


def check_made(
    adapter: Adapter, paths: Collection[str], leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Refuses projections that cannot have an adapter, and patterns of weights that are not there.

    leaves: of a network initialised with adapters at these paths.
    Raises:
      UserError: names them.
    """
    matches = lambda pattern: any(re.fullmatch(pattern, path) for path in leaves)
    if unmatched := [pattern for pattern in adapter.whole if not matches(pattern)]:
        raise UserError(f"adapter.whole has patterns of no weights: {few(unmatched)}")
    if missing := [path for path in paths if f"{path}/lora_a" not in leaves]:
        raise UserError(f"adapter.targets has projections that take no adapter: {few(missing)}")
