"""Training the judge's classifier once per dataset, and keeping it."""

import contextlib
import hashlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from twinflow_jax import files
from twinflow_jax.data import Dataset, Stream, batches
from twinflow_jax.models.classifier import Classifier

STEPS, BATCH, RATE, SHIFT = 1500, 128, 3e-3, 2
RECIPE = 1  # raise it when the network or its training changes otherwise


def cache_folder() -> pathlib.Path:
    """$TWINFLOW_CACHE, or the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return pathlib.Path(os.environ.get("TWINFLOW_CACHE", default / "twinflow_jax"))


def load_or_train(dataset: Dataset):
    """`(network, params)` of the classifier for a dataset's real training split.

    Kept in the cache folder under the data's and the recipe's fingerprint; an unreadable copy
    is made again. Training takes about 20 seconds on 2 cores.
    """
    network = Classifier(dataset.num_classes)
    fresh = jax.eval_shape(network.init, jax.random.key(0), dataset.train.x[:1])["params"]
    paths, structure = jax.tree_util.tree_flatten_with_path(fresh)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    shapes = {name: leaf.shape for name, (_, leaf) in zip(names, paths, strict=True)}
    digest = hashlib.sha256(dataset.train.x.tobytes())
    digest.update(dataset.train.label.tobytes())
    digest.update(repr((STEPS, BATCH, RATE, SHIFT, RECIPE, shapes)).encode())
    file = cache_folder() / f"classifier-{dataset.name}-{digest.hexdigest()[:12]}.safetensors"
    try:
        flat = safetensors.numpy.load_file(file)
        return network, jax.tree.unflatten(structure, [flat[name] for name in names])
    except (OSError, safetensors.SafetensorError):
        pass
    params = train(network, dataset)
    flat = dict(zip(names, map(np.asarray, jax.tree.leaves(params)), strict=True))
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        files.write(file, safetensors.numpy.save(flat))
    return network, params


def train(network: Classifier, dataset: Dataset):
    """Parameters after STEPS steps of Adam on randomly shifted real training images."""
    split, schedule = dataset.train, optax.cosine_decay_schedule(RATE, STEPS)
    optimizer = optax.adam(schedule)
    params = network.init(jax.random.key(0), dataset.train.x[:1])["params"]

    def loss(params, x, label):
        logits, _ = network.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def step(params, opt_state, x, label):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, x, label), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    reach = SHIFT if dataset.train.x.shape[1] > 16 else 0
    random = np.random.default_rng(0)
    read = lambda rows, seeds: {"x": split.x[rows], "label": split.label[rows]}
    stream = batches([[Stream(len(split), read)]], BATCH, seed=0)
    for _ in range(STEPS):
        _, batch = next(stream)
        shift = tuple(random.integers(-reach, reach + 1, 2))
        x = jnp.roll(batch["x"], shift, axis=(1, 2))
        params, opt_state = step(params, opt_state, x, batch["label"])
    return params
