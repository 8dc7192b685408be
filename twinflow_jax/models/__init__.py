"""Networks, all behind one contract: `apply(params, x_t, t, r, cond) -> velocity`.

A family has a Config dataclass and a Flax module; FAMILIES finds it by name, and adding one
touches its own file or folder and one line here. Flax lives only in this room.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twinflow_jax.arrays import AnyArray, Apply
from twinflow_jax.errors import UserError, few
from twinflow_jax.models import (
    adapters,
    conditioning,
    dit,
    minilm_dit,
    minilm_edit,
    mlp,
    openuni,
    qwen_image,
    sana,
    sd35,
    unet,
    zimage,
)
from twinflow_jax.models.adapters import Adapter
from twinflow_jax.models.family import Family, logical_axes
from twinflow_jax.models.names import flatten
from twinflow_jax.models.settings import Settings

FAMILIES = {
    "mlp": Family(mlp.Config, mlp.MLP),
    "unet": Family(unet.Config, unet.UNet),
    "dit": Family(dit.Config, dit.DiT),
    "qwen_image": qwen_image.FAMILY,
    "qwen_image_edit": qwen_image.EDIT,
    "qwen_image_edit_plus": qwen_image.EDIT_PLUS,
    "sana": sana.FAMILY,
    "openuni": openuni.FAMILY,
    "zimage": zimage.FAMILY,
    "sd35": sd35.FAMILY,
    "minilm_dit": minilm_dit.FAMILY,
    "minilm_edit": minilm_edit.FAMILY,
}


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Of a row: of its sample, tokens of its text and, where it is an edit, of the latents of its
    sources."""

    sample: tuple[int, ...]
    text: int
    references: tuple[tuple[int, ...], ...] = ()


def shape_of(settings: Settings, text: int) -> Shape:
    """The shape that a network is made for, with so many tokens of text: an edit has one source of
    the sample's."""
    family = FAMILIES[settings.name].text_to_image
    edits = family is not None and family.editing is not None
    return Shape(settings.sample_shape, text, (settings.sample_shape,) * edits)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions.

    apply(params, x_t (B, ...), t (B,), r (B,), cond) -> velocity of x_t's shape.
    init(key) -> params. axes() -> the logical axes of each parameter. null: the condition that
    stands for none, of one row. fixed: see `Family`.
    """

    config: Any
    init: Callable[[jax.Array], Any]
    apply: Apply
    axes: Callable[[], Any]
    null: Mapping[str, AnyArray]
    fixed: tuple[str, ...] = ()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.config.sample_shape

    @property
    def dtype(self) -> str:
        """Of computation."""
        return self.config.dtype

    def abstract_null(self, shape: Shape) -> dict[str, Any]:
        """The shapes of `null` beside rows of a shape, in the dtype of computation."""
        def abstract(name, leaf):
            of_text = name in ("tokens", "mask")
            size = (1, shape.text, *leaf.shape[2:]) if of_text else leaf.shape
            dtype = jnp.dtype(self.dtype) if name == "tokens" else leaf.dtype
            return jax.ShapeDtypeStruct(size, dtype)

        found = {
            name: abstract(name, leaf) for name, leaf in self.null.items() if name != "references"
        }
        latents = tuple(jax.ShapeDtypeStruct((1, *one), jnp.float32) for one in shape.references)
        return found | ({"references": latents} if latents else {})

    def cond(self, labels) -> dict[str, jax.Array]:
        """The condition for class labels (B,); {} for a network without classes."""
        return {"label": jnp.asarray(labels, jnp.int32)} if self.config.num_classes else {}

    def abstract_params(self):
        """Shapes and dtypes of the parameters, without computing any."""
        return jax.eval_shape(self.init, jax.random.key(0))


def config_of(name: Any) -> type[Settings]:
    """The Config class of a family.

    Raises:
      UserError: no such family.
    """
    if name not in list(FAMILIES):  # what a config gives may have no hash
        raise UserError(f"model.name is {name!r}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[name].config


def may_be_new(path: str) -> bool:
    """Whether weights to start from may lack a parameter, which is then as it is drawn: with it
    the network is the same, until it trains."""
    gated = (times.second for times in conditioning.TIMES.values() if times.last)
    zero = tuple(f"{name}/" for name in (*gated, conditioning.TWIN))
    return adapters.is_adapter(path) or path.startswith(zero)


def create(fields: Mapping[str, Any], null: Mapping[str, AnyArray] | None = None) -> Model:
    """The network that a config's `model` fields describe, as `build` makes it.

    Raises:
      UserError: unknown family or field, or a sample shape that the network cannot take.
    """
    return build(config_of(fields.get("name")).of(fields), null)


def build(
    settings: Settings, null: dict[str, jax.Array] | None = None, adapter: Adapter | None = None
) -> Model:
    """The network of a family's Config.

    null: the condition that stands for none, of one row (default: the class after the last one,
    or a text of no tokens). adapter: what trains in the network's place; its `init` then gives
    the network with fresh adapters.
    Raises:
      UserError: an adapter whose targets the network does not have.
    """
    family = FAMILIES[settings.name]
    module = family.module(settings)
    if null is None and family.text_to_image:
        abstract = family.text_to_image.networks["transformer"].example(settings)[-1]
        null = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    elif null is None and settings.num_classes:
        null = {"label": jnp.full((1,), settings.num_classes, jnp.int32)}

    def boxed(key: jax.Array, adapted: tuple[str, ...] = ()):
        x = jnp.zeros((1, *settings.sample_shape), jnp.float32)
        times = jnp.zeros((1,), jnp.float32)
        with adapters.added(dict.fromkeys(adapted, adapter.rank if adapter else 0)):
            return module.init(key, x, times, times, null or {})["params"]

    fixed = family.fixed
    if adapter and adapter.rank:
        leaves = lambda *given: flatten(nn.meta.unbox(jax.eval_shape(
            functools.partial(boxed, adapted=given), jax.random.key(0)
        )))
        projections = family.projections(settings)
        if not projections:  # but convolutions, which take no adapter
            kernels = adapters.paths_of(leaves())
            takes = leaves(*kernels)
            projections = {p: name for p, name in kernels.items() if f"{p}/lora_a" in takes}
        names = {
            path: name for path, name in projections.items()
            if re.fullmatch(adapter.frozen, f"{path}/kernel")
        }
        paths = tuple(adapters.chosen(adapter.targets, names, family.adapted))
        made = leaves(*paths)
        adapters.check_made(adapter, paths, made)
        still = [path for path in made if may_be_new(path) and re.fullmatch(adapter.frozen, path)]
        if still:
            raise UserError(
                f"adapter.whole leaves {few(still, 1)} at zero, by which model {settings.name!r} "
                f"sees its times: add '{still[0].split('/')[0]}/.*'"
            )
        boxed, fixed = functools.partial(boxed, adapted=paths), (adapter.frozen,)

    def apply(params, x_t, t, r, cond):
        return module.apply({"params": params}, x_t, t, r, cond)

    return Model(
        settings, init=lambda key: nn.meta.unbox(boxed(key)), apply=apply,
        axes=lambda: logical_axes(jax.eval_shape(boxed, jax.random.key(0))), null=null or {},
        fixed=fixed,
    )
