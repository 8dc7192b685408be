"""MaxDiffusion's training of Flux-dev: README.md "Flux Training" and configs/base_flux_dev.yml.

All 12B parameters in bfloat16 with Adam's moments in bfloat16, 1024x1024 pixels, 512 text tokens,
two rows a chip, weights over fsdp.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from published.common import OPTIONS, attention, rms, rotated
from twinflow_jax.parallel.mesh import MeshConfig, make_mesh

WIDTH, HEADS, HEAD = 3072, 24, 128
DOUBLE, SINGLE = 19, 38
SIDE, TEXT = 64, 512  # image tokens of a side, text tokens
CHANNELS, TEXT_WIDTH, POOLED, WAVES = 64, 4096, 768, 256
AXES = (16, 56, 56)
ROWS = 2  # a chip


@dataclasses.dataclass(frozen=True)
class Flux:
    """published: seconds of a step."""

    published: float

    attended = 1.0
    # Its README sets none for Flux; these it sets for Wan on the same chips.
    options = OPTIONS | {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    optimizer = optax.adamw(1e-5, weight_decay=0.0)

    def mesh(self, devices):
        return make_mesh(MeshConfig(fsdp=len(devices)), devices)

    def parameters(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype, P]]:
        """Of each weight, with its layout: of a kernel the stream's side over fsdp."""
        found = {}

        def linear(name, given, out, layers=0, into=True):
            stack, none = ((layers,), (None,)) if layers else ((), ())
            spec = ("fsdp", None) if into else (None, "fsdp")
            found[name] = (*stack, given, out), jnp.bfloat16, P(*none, *spec)
            found[f"{name}/bias"] = (*stack, out), jnp.bfloat16, P()

        linear("image_in", CHANNELS, WIDTH, into=False)
        linear("text_in", TEXT_WIDTH, WIDTH, into=False)
        for name, given in (("time", WAVES), ("guidance", WAVES), ("pooled", POOLED)):
            linear(f"{name}/0", given, WIDTH, into=False)
            linear(f"{name}/1", WIDTH, WIDTH)
        for side in ("image", "text"):
            linear(f"double/{side}/modulation", WIDTH, 6 * WIDTH, DOUBLE)
            linear(f"double/{side}/qkv", WIDTH, 3 * WIDTH, DOUBLE)
            linear(f"double/{side}/out", WIDTH, WIDTH, DOUBLE, into=False)
            linear(f"double/{side}/up", WIDTH, 4 * WIDTH, DOUBLE)
            linear(f"double/{side}/down", 4 * WIDTH, WIDTH, DOUBLE, into=False)
        linear("single/modulation", WIDTH, 3 * WIDTH, SINGLE)
        linear("single/qkv", WIDTH, 3 * WIDTH, SINGLE)
        linear("single/up", WIDTH, 4 * WIDTH, SINGLE)
        linear("single/down", 5 * WIDTH, WIDTH, SINGLE, into=False)
        linear("final_modulation", WIDTH, 2 * WIDTH)
        linear("final", WIDTH, CHANNELS)
        for name, layers in (("double/image", DOUBLE), ("double/text", DOUBLE), ("single", SINGLE)):
            for norm in ("query_norm", "key_norm"):
                found[f"{name}/{norm}"] = (layers, HEAD), jnp.bfloat16, P()
        return found

    def batch(self, chips: int) -> dict[str, tuple[tuple[int, ...], jnp.dtype, P]]:
        rows = ROWS * chips
        shapes = {
            "latents": (rows, SIDE * SIDE, CHANNELS), "noise": (rows, SIDE * SIDE, CHANNELS),
            "text": (rows, TEXT, TEXT_WIDTH), "pooled": (rows, POOLED), "t": (rows,),
        }
        return {name: (shape, jnp.bfloat16, P("fsdp")) for name, shape in shapes.items()}

    def loss(self, mesh) -> Callable:
        """`(params, batch) -> loss`, of the velocity."""
        tokens = TEXT + SIDE * SIDE
        attend = attention(mesh, masks.FullMask((tokens, tokens)), block=1536)
        return functools.partial(_loss, attend, NamedSharding(mesh, P("fsdp")))


def _part(params: dict, name: str) -> dict:
    return {k.removeprefix(f"{name}/"): v for k, v in params.items() if k.startswith(f"{name}/")}


def _linear(x, params, name):
    return x @ params[name] + params[f"{name}/bias"]


def _modulated(x, scale, shift):
    """Layer norm without parameters, in float32, then the modulation."""
    x = x.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x * (1 + scale) + shift).astype(jnp.bfloat16)


def _angles():
    """(tokens, HEAD / 2): text at zero, then the image's rows and columns."""
    rows, columns = jnp.divmod(jnp.arange(SIDE * SIDE), SIDE)
    places = jnp.stack([0 * rows, rows, columns], -1)
    places = jnp.concatenate([jnp.zeros((TEXT, 3), places.dtype), places])
    waves = [1e4 ** -(jnp.arange(0, width, 2) / width) for width in AXES]
    return jnp.concatenate([places[:, i : i + 1] * wave for i, wave in enumerate(waves)], -1)


def _heads(x, params):
    """Query, key and value of a stream, (rows, tokens, HEADS, HEAD); x: their projection."""
    query, key, value = jnp.split(x.reshape(*x.shape[:2], 3 * HEADS, HEAD), 3, axis=2)
    return rms(query, params["query_norm"]), rms(key, params["key_norm"]), value


def _attended(attend, angle, query, key, value):
    first = lambda a: a.transpose(0, 2, 1, 3)
    query, key = rotated(query / HEAD**0.5, angle), rotated(key, angle)
    found = first(attend(first(query), first(key), first(value)))
    return found.reshape(*found.shape[:2], WIDTH)


def _loss(attend, over, params, batch):
    held = lambda x: jax.lax.with_sharding_constraint(x, over)
    silu, angle = jax.nn.silu, _angles()

    def embedded(x, name):
        return _linear(silu(_linear(x, params, f"{name}/0")), params, f"{name}/1")

    def waves(t):
        angles = t[:, None] * 1000 * 1e4 ** -(jnp.arange(WAVES // 2) / (WAVES // 2))
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(jnp.bfloat16)

    def terms(weights, name, count):
        return jnp.split(_linear(silu(context), weights, name)[:, None], count, axis=-1)

    def double(streams, weights):
        image, text = map(held, streams)
        parts, given = {}, {"text": text, "image": image}
        for side, x in given.items():
            w = _part(weights, side)
            shift, scale, gate, *mlp = terms(w, "modulation", 6)
            qkv = checkpoint_name(_linear(_modulated(x, scale, shift), w, "qkv"), "qkv")
            parts[side] = w, gate, mlp, _heads(qkv, w)
        joint = zip(*(heads for *_, heads in parts.values()), strict=True)
        seen = _attended(attend, angle, *(jnp.concatenate(both, 1) for both in joint))
        seen = {"text": seen[:, :TEXT], "image": seen[:, TEXT:]}
        out = {}
        for side, (w, gate, (shift, scale, last), _) in parts.items():
            x = given[side] + gate * _linear(seen[side], w, "out")
            hidden = jax.nn.gelu(_linear(_modulated(x, scale, shift), w, "up"))
            out[side] = x + last * _linear(hidden, w, "down")
        return (out["image"], out["text"]), None

    @functools.partial(jax.checkpoint, prevent_cse=True)
    def mlp(x, seen, weights):
        hidden = jax.nn.gelu(_linear(x, weights, "up"))
        return _linear(jnp.concatenate([seen, hidden], -1), weights, "down")

    def single(x, weights):
        x = held(x)
        shift, scale, gate = terms(weights, "modulation", 3)
        given = _modulated(x, scale, shift)
        qkv = checkpoint_name(_linear(given, weights, "qkv"), "qkv")
        seen = _attended(attend, angle, *_heads(qkv, weights))
        return x + gate * mlp(given, checkpoint_name(seen, "seen"), weights), None

    noise, latents = batch["noise"], batch["latents"]
    t = batch["t"][:, None, None]
    image = _linear((1 - t) * latents + t * noise, params, "image_in")
    text = _linear(batch["text"], params, "text_in")
    context = embedded(waves(batch["t"]), "time") + embedded(batch["pooled"], "pooled")
    context = context + embedded(waves(0 * batch["t"] + 3.5), "guidance")
    saved = jax.checkpoint_policies
    layer = jax.checkpoint(double, policy=saved.save_any_names_but_these("qkv"))
    (image, text), _ = jax.lax.scan(layer, (image, text), _part(params, "double"))
    layer = jax.checkpoint(single, policy=saved.save_only_these_names("seen", "qkv"))
    x, _ = jax.lax.scan(layer, jnp.concatenate([text, image], 1), _part(params, "single"))
    scale, shift = terms(params, "final_modulation", 2)
    out = _linear(_modulated(x[:, TEXT:], scale, shift), params, "final")
    return jnp.square((noise - latents - out).astype(jnp.float32)).mean()


WORKLOADS = {"MaxDiffusion Flux-dev, v5p-8": ("v5p:2x2x1", Flux(1.769))}
