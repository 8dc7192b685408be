"""Name tables: which tensor of a published checkpoint is which leaf of ours, and back.

One table per network serves import, export and comparison. A Rule names one leaf; "{}" in its
key stands for the layer number where the leaf stacks layers along its first axis.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

# How ours is laid out from theirs, by name: the axes of theirs (without its trailing axes of
# length 1, of which the second number says how many there are) in the order of ours.
LAYOUTS: dict[str, tuple[tuple[int, ...] | None, int]] = {
    "same": (None, 0),
    "linear": ((1, 0), 0),  # (out, in) -> (in, out)
    "conv": ((2, 3, 1, 0), 0),  # OIHW -> HWIO; depthwise (C, 1, H, W) -> (H, W, 1, C)
    "conv3d": ((2, 3, 4, 1, 0), 0),  # OIDHW -> DHWIO
    "pointwise": ((1, 0), 2),  # a 1x1 convolution (out, in, 1, 1) -> (in, out)
    "channel_2": ((0,), 2),  # (C, 1, 1) -> (C,)
    "channel_3": ((0,), 3),  # (C, 1, 1, 1) -> (C,)
}


# Prefixes that trainers write before a published transformer's keys.
TRAINERS = ("transformer.", "module.", "base_model.model.transformer.", "extended_weights.")
KNOWS_R = "r"  # the group of the tensors that a base model lacks to know its target time


@dataclasses.dataclass(frozen=True)
class Rule:
    """key: in the published checkpoint. path: of our leaf, parts joined by "/".

    layout: one of LAYOUTS. layers: that the leaf stacks, where the key has "{}"; first: the number
    of the first one. Where the tensor is missing (a network that is to grow a part which its
    checkpoint does not have yet), copy_of: the key of another rule, whose tensor stands in; normal:
    the standard deviation of random values, 0 for zeros. group: of tensors that are missing
    together or not at all. pairs: the width of heads, along our last axis, whose adjacent channels
    theirs pairs for rotation; ours pairs their two halves.
    """

    key: str
    path: str
    layout: str = "same"
    layers: int = 0
    copy_of: str = ""
    normal: float | None = None
    group: str = ""
    pairs: int = 0
    first: int = 0

    @property
    def optional(self) -> bool:
        """Whether its tensor may be missing."""
        return bool(self.copy_of) or self.normal is not None

    @property
    def stacked(self) -> bool:
        return self.layers > 0

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our layout of one published tensor (of one layer, where the leaf is stacked)."""
        axes, ones = LAYOUTS[self.layout]
        tensor = tensor.reshape(tensor.shape[: tensor.ndim - ones])
        tensor = tensor if axes is None else tensor.transpose(axes)
        return _swapped(tensor, self.pairs // 2, 2) if self.pairs else tensor

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `ours`."""
        axes, ones = LAYOUTS[self.layout]
        array = _swapped(array, 2, self.pairs // 2) if self.pairs else array
        array = array if axes is None else array.transpose(np.argsort(axes))
        return array.reshape(array.shape + (1,) * ones)

    def theirs_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the published tensor, from that of our leaf."""
        axes, ones = LAYOUTS[self.layout]
        shape = tuple(shape[1:] if self.stacked else shape)
        if axes is not None:
            shape = tuple(shape[i] for i in np.argsort(axes))
        return shape + (1,) * ones


def _swapped(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The last axis, groups of (rows, columns), with both exchanged."""
    groups = array.reshape(*array.shape[:-1], -1, rows, columns)
    return np.ascontiguousarray(groups.swapaxes(-1, -2)).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class NameTable:
    """rules: one per leaf.

    prefixes: what may stand before every key, dropped on import. renames: other spellings of
    keys, as (pattern, replacement) of `re.sub`, towards the published one. carried: patterns of
    keys that the network does not compute with, kept as they are for export.
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    carried: tuple[str, ...] = ()

    def published(self, key: str) -> str:
        """The published spelling of a key."""
        shorter = True
        while shorter:  # prefixes may be nested
            shorter = next((p for p in self.prefixes if key.startswith(p)), "")
            key = key[len(shorter) :]
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_carried(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.carried)

    def keys(self, rule: Rule) -> list[str]:
        """The keys behind one leaf: one per layer where it is stacked."""
        if not rule.stacked:
            return [rule.key]
        numbers = range(rule.first, rule.first + rule.layers)
        return [rule.key.replace("{}", str(layer)) for layer in numbers]

    def shapes(self, leaves: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Every published key with its shape, from the shapes of our leaves by path."""
        return {
            key: rule.theirs_shape(leaves[rule.path])
            for rule in self.rules
            for key in self.keys(rule)
        }

    def group(self, name: str) -> set[str]:
        """The keys that may be missing, all or none of them."""
        rules = (rule for rule in self.rules if rule.optional and rule.group == name)
        return {key for rule in rules for key in self.keys(rule)}

    def added(self, given: Collection[str]) -> tuple[str, ...]:
        """The keys of the groups of which none is among those given."""
        groups = (self.group(name) for name in {rule.group for rule in self.rules})
        return tuple(sorted(key for keys in groups if keys.isdisjoint(given) for key in keys))


def stack(
    prefix: str, pairs: Iterable[tuple[str, str, str]], into: str, layers: int, first: int = 0
) -> tuple[Rule, ...]:
    """Rules of `prefix.{}.KEY -> into/PATH` from (KEY, PATH, layout) of one layer."""
    return tuple(
        Rule(f"{prefix}.{{}}.{key}", f"{into}/{path}", how, layers, first=first)
        for key, path, how in pairs
    )


def linear(key: str, path: str, bias: bool = True) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of a dense layer's kernel and bias."""
    kernel = ((f"{key}.weight", f"{path}/kernel", "linear"),)
    return kernel + (((f"{key}.bias", f"{path}/bias", "same"),) if bias else ())


def norm(key: str, path: str) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of a norm's scale and bias."""
    return (f"{key}.weight", f"{path}/scale", "same"), (f"{key}.bias", f"{path}/bias", "same")


def spelled(
    module: nn.Module, inputs: tuple, layout: Callable[[str, int], str]
) -> tuple[Rule, ...]:
    """Rules of a network whose leaves spell the published keys themselves.

    Its tree follows the published one, numbers being joined to the name before them by "_".
    inputs: abstract, to initialise it with. layout: (path, ndim) of a leaf -> one of LAYOUTS.
    """
    leaves = flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])

    def key(path: str) -> str:
        dotted = re.sub(r"_(\d+)(?=[_/])", r".\1", path).replace("/", ".")
        return re.sub(r"(kernel|scale)$", "weight", dotted)

    return tuple(Rule(key(path), path, layout(path, leaf.ndim)) for path, leaf in leaves.items())


def flatten(tree: dict) -> dict:
    """`{"a/b": leaf}` of nested dicts."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")
