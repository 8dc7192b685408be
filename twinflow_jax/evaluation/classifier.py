"""Training the judge's classifier once per dataset, and keeping it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from twinflow_jax import cache
from twinflow_jax.data import Dataset, Stream, batches
from twinflow_jax.models import names
from twinflow_jax.models.classifier import Classifier

STEPS, BATCH, RATE, SHIFT = 1500, 128, 3e-3, 2
RECIPE = 1  # raise it when the network or its training changes otherwise


def load_or_train(dataset: Dataset):
    """`(network, params)` of the classifier for a dataset's real training split.

    Kept in the cache under the data and the recipe. Training takes about 20 seconds on 2 cores.
    """
    network = Classifier(dataset.num_classes)
    fresh = jax.eval_shape(network.init, jax.random.key(0), dataset.train.x[:1])["params"]
    shapes = {path: leaf.shape for path, leaf in sorted(names.flatten(fresh).items())}
    recipe = repr((STEPS, BATCH, RATE, SHIFT, RECIPE, shapes)).encode()

    def make():
        return names.flatten(jax.tree.map(np.asarray, train(network, dataset)))

    key = dataset.train.x.tobytes(), dataset.train.label.tobytes(), recipe
    flat = cache.kept(f"classifier-{dataset.name}", key, make)
    return network, names.unflatten(flat)


def train(network: Classifier, dataset: Dataset):
    """Parameters after STEPS steps of Adam on randomly shifted real training images."""
    split, schedule = dataset.train, optax.cosine_decay_schedule(RATE, STEPS)
    optimizer = optax.adam(schedule)
    params = network.init(jax.random.key(0), jnp.asarray(dataset.train.x[:1]))["params"]

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
    steps = tqdm(range(STEPS), "training the classifier that judges", leave=False, disable=None)
    for _ in steps:
        _, batch = next(stream)
        shift = tuple(random.integers(-reach, reach + 1, 2))
        x = jnp.roll(batch["x"], shift, axis=(1, 2))
        params, opt_state = step(params, opt_state, x, batch["label"])
    return params
