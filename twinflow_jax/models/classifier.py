"""A small convolutional classifier, the independent judge of generated digits."""

import flax.linen as nn
from jaxtyping import Array, Float

from twinflow_jax.arrays import Maps


class Classifier(nn.Module):
    """Images (B, H, W, C) in [-1, 1] -> (logits (B, classes), features (B, 64))."""

    num_classes: int

    @nn.compact
    def __call__(
        self, x: Maps
    ) -> tuple[Float[Array, "B {self.num_classes}"], Float[Array, "B 64"]]:
        stride = 2 if x.shape[1] > 16 else 1
        h = nn.relu(nn.Conv(24, (5, 5), strides=stride)(x))
        h = nn.relu(nn.Conv(48, (3, 3), strides=2)(h))
        features = nn.relu(nn.Dense(64)(h.reshape(h.shape[0], -1)))
        return nn.Dense(self.num_classes)(features), features
