"""What a family of models offers to the verbs.

A family is one object: the config and module of its velocity network and, where it draws from
text, a TextToImage: the published networks with their name tables, prompts and latent codec.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twinflow_jax.models.names import NameTable


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a published pipeline.

    folder: where the pipeline keeps it. classes: names in its config.json that are this network;
    none where no pipeline has it, which then is as its default config says, with a run's weights.
    config: a dataclass with `from_published(config.json) -> Config`. module: Config -> Flax
    module. example: Config -> abstract inputs which its parameters are initialised with.
    table: Config -> the name table between its published tensors and its parameters. stem: of
    the names of its weight files.
    """

    folder: str
    classes: tuple[str, ...]
    config: Any
    module: Callable[[Any], nn.Module]
    example: Callable[[Any], tuple]
    table: Callable[[Any], NameTable]
    stem: str = "diffusion_pytorch_model"

    @property
    def published(self) -> bool:
        """Whether folders of published checkpoints hold it."""
        return bool(self.classes)

    def accepts(self, class_name: str) -> bool:
        """Whether a config.json of that class is this network, perhaps in a trainer's wrapper."""
        return class_name in self.classes or class_name.removesuffix("Wrapper") in self.classes

    def init(self, config, key: jax.Array):
        """Random parameters."""
        example = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), self.example(config))
        return nn.meta.unbox(self.module(config).init(key, *example).get("params", {}))

    def abstract(self, config):
        """`(shapes and dtypes, logical axes)` of the parameters, without computing any.

        The axes of a leaf without names are None.
        """
        module = self.module(config)
        made = jax.eval_shape(module.init, jax.random.key(0), *self.example(config))
        boxed = made.get("params", {})  # an autoencoder without any: pixels
        return nn.meta.unbox(boxed), logical_axes(boxed)


def logical_axes(boxed):
    """The names of each leaf's axes, for `parallel` to lay them out; () where there are none."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    names = lambda leaf: tuple(leaf.names) if is_box(leaf) else ()
    return jax.tree.map(names, boxed, is_leaf=is_box)


def transformer_inputs(config) -> tuple:
    """(x_t, t, r, cond), abstract, of the smallest image and prompt."""
    x = jax.ShapeDtypeStruct((1, config.patch, config.patch, config.latent_channels), "float32")
    time = jax.ShapeDtypeStruct((1,), "float32")
    tokens = jax.ShapeDtypeStruct((1, 1, config.text_width), "float32")
    return x, time, time, {"tokens": tokens, "mask": jax.ShapeDtypeStruct((1, 1), "bool")}


def text_inputs(config) -> tuple:
    """(ids, mask), abstract, of a prompt of one token."""
    return jax.ShapeDtypeStruct((1, 1), "int32"), jax.ShapeDtypeStruct((1, 1), "bool")


def image_inputs(config) -> tuple:
    """(images,), abstract: one that makes a single latent position."""
    return (jax.ShapeDtypeStruct((1, config.downscale, config.downscale, 3), "float32"),)


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """From a prompt to an image, in parts that are loaded one after the other.

    networks: "transformer", "text_encoder" and "vae" (the names are the same in all families),
    the last with the methods `encode`, from images (B, H, W, 3) in [-1, 1] to normalised latents
    (B, h, w, c), and `decode`, back.
    null_prompt: stands for no prompt in training. negative_prompt, base_steps, base_guidance: of
    the base model's own sampling. no_guidance: the guidance that is none, 1 or, where its pipeline
    counts what goes beyond that, 0. shifted_twice: how its pipeline uses a scheduler with static
    shifting (`sampling.schedules.static_shift`).
    export_note: what somebody who loads an export elsewhere must know about r. tiny: published
    configs of networks of a few megabytes, which with random weights try everything.
    """

    networks: dict[str, Network]
    null_prompt: str
    negative_prompt: str
    base_steps: int
    base_guidance: float
    export_note: str
    tiny: dict[str, dict[str, Any]]
    save_tiny_tokenizer: Callable[[str], None]
    load_tokenizer: Callable[[str], Any]
    tokenize: Callable[..., tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]]
    """(tokenizer, prompts, tokens=None, negative=False) -> ids and mask; tokens: that each prompt
    is padded or cut to; negative: of negative prompts, which may be empty."""
    embed: Callable[..., tuple[Float[Array, "B L D"], Bool[Array, "B L"]]]
    """(config, params, ids, mask) -> tokens and their mask, as the transformer takes them."""
    base_guide: Callable[..., Float[Array, "B h w c"]] | None = None
    """(velocity with the prompt, without, scale) -> the base model's guided velocity, where it is
    not plain guidance; scale: 1 for none."""
    no_guidance: float = 1.0
    shifted_twice: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """config, module: of the velocity network, called with (x_t, t, r, cond)."""

    config: Any
    module: Callable[[Any], nn.Module]
    text_to_image: TextToImage | None = None
