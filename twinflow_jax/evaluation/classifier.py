"""Training the judge's classifier once per dataset, and keeping it."""

import hashlib
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import traverse_util

from twinflow_jax.data import Dataset, batches
from twinflow_jax.models.classifier import Classifier

STEPS, BATCH, RATE, SHIFT = 1500, 128, 3e-3, 2


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
    digest = hashlib.sha256(dataset.train.x.tobytes())
    digest.update(dataset.train.label.tobytes())
    digest.update(repr((STEPS, BATCH, RATE, SHIFT, network.fingerprint())).encode())
    file = cache_folder() / f"classifier-{dataset.name}-{digest.hexdigest()[:12]}.safetensors"
    try:
        flat = safetensors.numpy.load_file(file)
        return network, traverse_util.unflatten_dict(flat, sep="/")
    except (OSError, safetensors.SafetensorError):
        pass
    params = train(network, dataset)
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(safetensors.numpy.save(flat))
        os.replace(temporary.name, file)
    except OSError:
        pass  # a cache that cannot be written only costs time
    return network, params


def train(network: Classifier, dataset: Dataset):
    """Parameters after STEPS steps of Adam on randomly shifted real training images."""
    schedule = optax.cosine_decay_schedule(RATE, STEPS)
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
    stream = batches(dataset.train, BATCH, seed=0)
    for _ in range(STEPS):
        batch = next(stream)
        shift = tuple(random.integers(-reach, reach + 1, 2))
        x = jnp.roll(batch["x"], shift, axis=(1, 2))
        params, opt_state = step(params, opt_state, x, batch["label"])
    return params
