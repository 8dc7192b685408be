"""What a family of models offers to the verbs.

A family is one object: the config and module of its velocity network and, where it draws from
text, a TextToImage: the published networks with their name tables, prompts and latent codec.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from twinflow_jax import contracts
from twinflow_jax.arrays import AnyArray, Images, Latents
from twinflow_jax.errors import reason
from twinflow_jax.models import adapters, names
from twinflow_jax.models.conditioning import TimeConditioning
from twinflow_jax.models.names import NameTable
from twinflow_jax.models.settings import Settings, TextSettings


class NetworkConfig(Protocol):
    """Of a network: a frozen dataclass with defaults, which are a published network's.

    dtype: of computation, "float32" or "bfloat16".
    """

    dtype: str


class PublishedConfig(NetworkConfig, Protocol):
    """Of a network that pipelines hold."""

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> "PublishedConfig":
        """From the contents of its folder's config.json.

        Raises:
          UserError: another class, or values that mean something that is not computed; all of
            them in one message.
        """


class TransformerConfig(NetworkConfig, Protocol):
    """Of a velocity network under text, a `settings.TextSettings` besides. latent_channels: of
    the autoencoder. text_width: of the tokens that the text encoders make together."""

    latent_channels: int
    text_width: int


class CodecConfig(NetworkConfig, Protocol):
    """Of an autoencoder. downscale: pixels of a latent along each side."""

    downscale: int
    latent_channels: int


class Codec(Protocol):
    """What an autoencoder's module does."""

    def encode(self, images: Images) -> Latents:
        """Normalised latents of images in [-1, 1]."""

    def decode(self, latents: Latents) -> Images:
        """Images within [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a published pipeline.

    folder: where the pipeline keeps it. classes: names in its config.json that are this network;
    none where no pipeline has it, which then is as its default config says, with a run's weights.
    config: a NetworkConfig, or a PublishedConfig where there are classes. module: Config -> Flax
    module. example: Config -> abstract inputs which its parameters are initialised with. table:
    Config -> the name table between its published tensors and its parameters. stem: of the names
    of its weight files. found: what its tensors say of it and config.json does not, (config, the
    keys that a folder lacks) -> config. optional: whether a pipeline may do without it, which its
    model_index.json then says (null); a text encoder is then not given to `tokenize` and `embed`.
    """

    folder: str
    classes: tuple[str, ...]
    config: type
    module: Callable[[Any], nn.Module]
    example: Callable[[Any], tuple]
    table: Callable[[Any], NameTable] = lambda config: NameTable(())
    stem: str = "diffusion_pytorch_model"
    found: Callable[[Any, Collection[str]], Any] = lambda config, lacking: config
    optional: bool = False

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextNetwork(Network):
    """A text encoder, with the tokenizer beside it.

    load_tokenizer: of a local folder. save_tiny_tokenizer: writes a small one to a folder.
    """

    load_tokenizer: Callable[[str], Any]
    save_tiny_tokenizer: Callable[[str], None]
    stem: str = "model"

    @property
    def tokenizer(self) -> str:
        """Where the pipeline keeps it."""
        return self.folder.replace("text_encoder", "tokenizer")


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


Prompts = dict[str, tuple[Int[AnyArray, "B _"], Bool[AnyArray, "B _"], *tuple[Any, ...]]]
"""Ids and their mask, of the same prompts, by text encoder; each has its own length. After them
whatever else an encoder takes, with rows first."""


def lengths(prompts: Prompts) -> tuple[int, ...]:
    """Of the rows of each text encoder."""
    return tuple(arrays[0].shape[1] for _, arrays in sorted(prompts.items()))


def of_one_encoder(tokenize: Callable, embed: Callable) -> dict[str, Callable]:
    """`tokenize` and `embed` of a family whose only text encoder is "text_encoder".

    From `(tokenizer, prompts, tokens, negative) -> ids, mask` and from
    `(config, params, ids, mask) -> tokens, mask`.
    """
    name = "text_encoder"

    def tokenize_by_name(tokenizers, prompts, tokens: int | None = None, negative: bool = False):
        return {name: tokenize(tokenizers[name], prompts, tokens, negative)}

    def embed_by_name(configs, params, prompts):
        return embed(configs[name], params[name], *prompts[name])

    return {"tokenize": tokenize_by_name, "embed": embed_by_name}


@runtime_checkable
class Tokenize(Protocol):
    def __call__(
        self, tokenizers: Mapping[str, Any], prompts: Sequence[str], tokens: int | None = None,
        negative: bool = False,
    ) -> Prompts:
        """tokenizers: by encoder. tokens: that each prompt is padded or cut to, the family's own
        length by default. negative: of negative prompts, which may be empty."""


@runtime_checkable
class Embed(Protocol):
    def __call__(
        self, configs: Mapping[str, Any], params: Mapping[str, Any], prompts: Prompts
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B L"]]:
        """Tokens and their mask, valid ones first, as the transformer takes them; configs, params:
        by encoder. A vector beside them (a pooled state) is a token as well: the first one, with
        zeros up to the others' width."""


@runtime_checkable
class Editing(Protocol):
    """How a family that edits pictures shows them to its networks. most: pictures that an
    instruction may be about. area: pixels of the result and of each of them, as published."""

    most: int
    area: int

    def upright(self, picture: Any) -> Any:
        """A PIL picture as it is meant to be seen, in RGB.

        Raises:
          UserError: none of its size can be edited.
        """

    def size(self, pictures: Sequence[Any], area: int) -> tuple[int, int]:
        """(width, height) of the result, of about so many pixels."""

    def decides(self, pictures: Sequence[Any]) -> Any:
        """The one whose size the result has."""

    def encoded(self, picture: Any, area: int) -> UInt8[np.ndarray, "H W 3"]:
        """As the autoencoder takes it, of about so many pixels; of one size where the results have
        one."""

    def seen(
        self, config, processor: dict[str, Any], picture: Any
    ) -> Float[np.ndarray, "H W 3"]:
        """As the text encoder takes it. processor: the published preprocessor_config.json."""

    def tokenize(
        self, tokenizer, config, prompts: Sequence[str],
        seen: Sequence[Float[np.ndarray, "_ _ 3"]], tokens: int | None = None,
        negative: bool = False,
    ) -> tuple:
        """Instructions about the same pictures, as the text encoder takes them after its
        parameters: arrays with rows first. config: of the text encoder."""

    def shown(
        self, config, ids: Int[np.ndarray, "L"], seen: Sequence[Float[np.ndarray, "_ _ 3"]]
    ) -> int:
        """How many of a row's embedded tokens come before its instruction, whatever that is."""


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """From a prompt to an image, in parts that are loaded one after the other.

    networks: "transformer" (of a TransformerConfig), "vae" (a Codec of a CodecConfig) and text
    encoders ("text_encoder", "text_encoder_2"; the names are the same in all families).
    null_prompt: stands for no prompt in training. negative_prompt, base_steps, base_guidance: of
    the base model's own sampling. no_guidance: the guidance that is none, 1 or, where its pipeline
    counts what goes beyond that, 0. shifted_twice: how its pipeline uses a scheduler with static
    shifting (`sampling.schedules.static_shift`). distilled: what scheduler_config.json says of
    those of its checkpoints alone whose velocities are guided already, which are sampled in
    distilled_steps without guidance.
    export_note: `note` of a second embedder. tiny: published configs of networks of a few
    megabytes, which with random weights try everything.
    """

    networks: dict[str, Network]
    null_prompt: str
    negative_prompt: str
    base_steps: int
    base_guidance: float
    export_note: str
    tiny: dict[str, dict[str, Any]]
    tokenize: Tokenize
    embed: Embed
    base_guide: Callable[..., Float[Array, "B h w c"]] | None = None
    """(velocity with the prompt, without, scale) -> the base model's guided velocity, where it is
    not plain guidance; scale: 1 for none."""
    no_guidance: float = 1.0
    shifted_twice: bool = False
    distilled: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distilled_steps: int = 0
    editing: Editing | None = None
    """Of a family whose prompts are about pictures."""
    pipelines: tuple[str, ...] = ()
    """Classes in model_index.json that only this family's folders have, where others' networks are
    of the same classes."""

    def note(self, times: TimeConditioning) -> str:
        """What somebody who loads an export elsewhere must know about r."""
        return times.note or self.export_note

    def without(self, absent: Collection[str]) -> "TextToImage":
        """The family of a pipeline that does without some networks."""
        networks = {name: n for name, n in self.networks.items() if name not in absent}
        return dataclasses.replace(self, networks=networks)

    @property
    def encoders(self) -> dict[str, TextNetwork]:
        """Those of the networks that encode text."""
        return {k: n for k, n in self.networks.items() if isinstance(n, TextNetwork)}

    def text_width(self, configs: Mapping[str, Any]) -> int:
        """Of the tokens that text encoders with these configs, by name, make together."""
        params = {name: n.abstract(configs[name])[0] for name, n in self.encoders.items()}
        prompts = {name: n.example(configs[name]) for name, n in self.encoders.items()}
        embed = functools.partial(self.embed, configs)
        return jax.eval_shape(embed, params, prompts)[0].shape[-1]


@dataclasses.dataclass(frozen=True)
class Family:
    """config, module: of the velocity network, which is called with (x_t, t, r, cond).

    fixed: patterns of the paths of its parameters that are never trained, such as a published table
    of positions. adapted: lists of its projections that have adapters, by the name of the list.
    adapter_forms: of files of adapters, in which other tools load this family's; () for all.
    """

    config: type[Settings]
    module: Callable[[Any], nn.Module]
    text_to_image: TextToImage | None = None
    fixed: tuple[str, ...] = ()
    adapted: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    adapter_forms: tuple[str, ...] = ()

    def projections(self, config: Settings) -> dict[str, str]:
        """Published names of projections by path; none where nothing publishes the network."""
        if self.text_to_image is None:
            return {}
        return adapters.names_of(self.text_to_image.networks["transformer"].table(config))


def check_family(name: str, family: Family) -> list[str]:
    """What a family lacks of its contract, one line each. Traces networks, the small ones of
    `tiny` where there are; computes nothing."""
    kind = Settings if family.text_to_image is None else TextSettings
    if not issubclass(family.config, kind):
        return [f"config derives from no {kind.__name__}"]
    config, problems = family.config(), []
    if config.name != name:
        problems.append(f"config's name is {config.name!r}, not {name!r}")
    if not config.sample_shape:
        return [*problems, "config has no sample_shape"]
    if family.text_to_image:
        return problems + _check_text(family)
    x = jax.ShapeDtypeStruct((1, *config.sample_shape), "float32")
    label = {"label": jax.ShapeDtypeStruct((1,), "int32")} if config.num_classes else {}
    time = jax.ShapeDtypeStruct((1,), "float32")
    inputs = x, time, time, label
    return problems + _tried("module", _check_velocity, family.module, config, inputs)


def _tried(member: str, check: Callable[..., list[str]], *given) -> list[str]:
    """What a check finds, or which member it cannot be made of."""
    try:
        return [f"{member}: {problem}" for problem in check(*given)]
    except Exception as error:  # of whatever kind: of one who is adding a family
        return [f"{member}: {type(error).__name__}: {reason(error)}"]


def _check_text(family: Family) -> list[str]:
    text = family.text_to_image
    lacking = [name for name in ("transformer", "vae") if name not in text.networks]
    problems = [f"has no network {name!r}" for name in lacking]
    if not text.encoders:
        problems.append("has no TextNetwork")
    for member, contract in (("tokenize", Tokenize), ("embed", Embed)):
        problems += _tried(member, contracts.missing, getattr(text, member), contract)
    if text.editing is not None:
        problems += _tried("editing", contracts.missing, text.editing, Editing)
    for name, network in text.networks.items():
        problems += _tried(name, _check_network, name, network, text.tiny.get(name))
    if problems:
        return problems
    transformer = text.networks["transformer"]
    if (family.config, family.module) != (transformer.config, transformer.module):
        problems.append("config and module are not those of its transformer")
    return problems + _tried("embed", _check_embed, text)


def _check_network(name: str, network: Network, tiny: dict[str, Any] | None) -> list[str]:
    kinds = {"transformer": TransformerConfig, "vae": CodecConfig}
    found = contracts.missing(network.config, kinds.get(name, NetworkConfig))
    if name == "vae":
        found += contracts.missing(network.module, Codec)
    if network.published:
        found += contracts.missing(network.config, PublishedConfig)
        if not tiny:
            found.append("has no config in tiny")
    if found:
        return found
    config = network.config.from_published(tiny) if tiny else network.config()
    if name == "transformer":
        found += _check_velocity(network.module, config, network.example(config))
    return found + (_check_table(network, config) if network.published else [])


def _check_embed(text: TextToImage) -> list[str]:
    """Whether the small networks' tokens are as wide as the small transformer takes them."""
    small = lambda name: text.networks[name].config.from_published(text.tiny[name])
    width = text.text_width({name: small(name) for name in text.encoders})
    published = text.networks["transformer"].published
    wanted = small("transformer").text_width if published else width
    return [f"tokens are {width} wide, the transformer takes {wanted}"] if width != wanted else []


def _check_table(network: Network, config) -> list[str]:
    """Whether its rules are of its parameters, and of all of them."""
    leaves = names.flatten(network.abstract(config)[0])
    paths = [rule.path for rule in network.table(config).rules]
    return [
        *(f"no rule is of parameter {path}" for path in leaves if path not in paths),
        *(f"a rule is of {path}, which is no parameter" for path in paths if path not in leaves),
    ]


def _check_velocity(module: Callable, config, inputs: tuple) -> list[str]:
    made = jax.eval_shape(module(config).init_with_output, jax.random.key(0), *inputs)[0]
    found, wanted = (f"{a.dtype} {a.shape}" for a in (made, inputs[0]))
    return [] if found == wanted else [f"the velocity is {found}, of samples {wanted}"]
