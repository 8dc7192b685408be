"""Prompts as networks take them: embeddings, in memory and in files."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from twinflow_jax.checkpoints import tensors
from twinflow_jax.errors import UserError

REFERENCE = "reference_"  # and a number: of files' tensors


def pad_and_join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (rows, length, ...) in one, with zeros after what is shorter than the longest."""
    longest = max(part.shape[1] for part in parts)
    pad = lambda a: np.pad(a, [(0, 0), (0, longest - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    return np.concatenate([pad(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Prompts as the transformer takes them; valid tokens first, then padding. references: latents
    of the pictures that they are about, in one shape each."""

    tokens: Float[np.ndarray, "N L D"]
    mask: Bool[np.ndarray, "N L"]
    references: tuple[Float[np.ndarray, "N _ _ c"], ...] = ()

    @classmethod
    def join(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Several in one, padded to the longest."""
        references = zip(*(part.references for part in parts), strict=True)
        return cls(
            pad_and_join([part.tokens for part in parts]),
            pad_and_join([part.mask for part in parts]),
            tuple(map(np.concatenate, references)),
        )

    def __getitem__(self, index) -> "Embeddings":
        references = tuple(latents[index] for latents in self.references)
        return Embeddings(self.tokens[index], self.mask[index], references)

    def rows(self, index) -> dict[str, Any]:
        """The condition of some rows."""
        some = self[index]
        cond = {"tokens": some.tokens, "mask": some.mask}
        return cond | ({"references": some.references} if some.references else {})

    def fingerprint(self, index: int) -> str:
        """Of one row's valid tokens and references: another one for others."""
        digest = hashlib.sha256(self.tokens[index][self.mask[index]].tobytes())
        for latents in self.references:
            digest.update(latents[index].tobytes())
        return digest.hexdigest()[:12]

    def save(self, file: epath.PathLike, prompts: Sequence[str]) -> None:
        """Writes a safetensors file with `tokens`, `mask`, `reference_0` ... and the prompts' UTF-8
        as `prompts`."""
        text = np.frombuffer(json.dumps(list(prompts)).encode(), np.uint8)
        arrays = {"tokens": self.tokens, "mask": self.mask, "prompts": text}
        shown = {f"{REFERENCE}{i}": latents for i, latents in enumerate(self.references)}
        tensors.save(epath.Path(file), arrays | shown)

    @classmethod
    def read(cls, file: epath.PathLike, width: int) -> tuple[list[str], "Embeddings"]:
        """The prompts and embeddings that `save` wrote, for a transformer of that text width.

        Raises:
          UserError: no such file, or not one of these.
        """
        found = {k: t.read() for k, t in tensors.read_header(epath.Path(file)).items()}
        try:
            tokens, mask = found["tokens"].astype(np.float32), found["mask"].astype(bool)
            prompts = [str(prompt) for prompt in json.loads(found["prompts"].tobytes())]
            "".join(prompts).encode()  # JSON may name what is no character
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file} holds no embeddings: write one with --save-embeddings") from (
                error
            )
        if tokens.shape != (*mask.shape, width) or len(prompts) != len(tokens) or not prompts:
            raise UserError(
                f"{file} holds tokens of shape {tokens.shape} and a mask of {mask.shape} for "
                f"{len(prompts)} prompts; the transformer takes (prompts, length, {width})"
            )
        shown = sum(name.startswith(REFERENCE) for name in found)
        return prompts, cls(tokens, mask, tuple(found[f"{REFERENCE}{i}"] for i in range(shown)))


def same_length(*parts: Embeddings) -> list[Embeddings]:
    """Each as it is, padded to the longest of them."""
    joined, ends = Embeddings.join(parts), np.cumsum([0, *(len(part.tokens) for part in parts)])
    return [joined[start:end] for start, end in itertools.pairwise(ends)]
