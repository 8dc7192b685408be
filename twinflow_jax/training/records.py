"""Training from what twinflow encode wrote: the folders of a config as streams of rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from twinflow_jax import data
from twinflow_jax.data.records import NULL, PROMPTS, Example, Records, open_records
from twinflow_jax.drawing import Embeddings
from twinflow_jax.errors import UserError
from twinflow_jax.models import Shape, shape_of
from twinflow_jax.models.settings import Settings
from twinflow_jax.parallel import hosts

SHOWN = 8  # captions that previews draw where the config has no prompts

Rows = tuple[Records, str, Int[np.ndarray, "N"]]  # of a folder and split, those with these numbers


def open_folders(
    paths: Sequence[str], settings: Settings, image_free: bool, pairs: bool = False
) -> list[Records]:
    """Folders of records, made alike and fit for the network.

    image_free: whether prompts without pictures can be trained on. pairs: whether the noise of each
    picture is learned from.
    Raises:
      UserError: none or unfinished ones, records of another family or of pictures that the
        network does not take; names both sides. Or hosts that see other records than the first.
    """
    folders = [open_records(path) for path in paths]
    first = folders[0].manifest
    for folder in folders:
        if folder.manifest.family != settings.name:
            raise UserError(
                f"the records in {folder.folder} are for {folder.manifest.family!r}, but model is "
                f"{settings.name!r}: encode them with that model's pipeline"
            )
        check_same(folder, first, "text_encoder", str(folders[0].folder))
        if folder.manifest.channels and first.channels:
            check_same(folder, first, "autoencoder", str(folders[0].folder))
        for split in folder.splits:
            check_split(folder, split, settings, image_free)
        if pairs and not folder.manifest.pairs:
            raise UserError(
                f"the objective learns from pairs, and {folder.folder} keeps no noise beside its "
                "pictures: draw them with `twinflow encode --generate --pairs`"
            )
    # Each host reads its own copy, or one that another has written again meanwhile.
    hosts.agree({"data.records": digest(folders).encode()})
    return folders


def digest(folders: Sequence[Records]) -> str:
    """Of what the folders hold: another one where they were encoded from something else."""
    contents = [(f.manifest.told(), f.splits, f.report) for f in folders]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def check_same(folder: Records, other, field: str, where: str) -> None:
    """Refuses records made with another network than `other`, a manifest, says of `where`."""
    mine, theirs = getattr(folder.manifest, field), getattr(other, field)
    if mine != theirs:
        raise UserError(
            f"the records in {folder.folder} were made with the {field.replace('_', ' ')} "
            f"{mine or 'pixels'}, but {where} has {theirs or 'pixels'}: encode one of them again"
        )


def check_split(folder: Records, split: str, settings: Settings, image_free: bool) -> None:
    """Refuses a size of pictures that the network does not take."""
    if split == PROMPTS:
        if not image_free:
            raise UserError(
                f"the records in {folder.folder} are prompts without pictures, which only "
                "objective presets image_free, vsd, dmd2 and sid train on, without "
                "train.flow_matching_steps"
            )
        return
    shape, taken = folder.sample_shape(split), settings.sample_shape
    any_size = settings.any_size
    fits = shape == taken if not any_size else all(
        one[2] == taken[2] and one[0] % settings.patch == one[1] % settings.patch == 0
        for one in (shape, *folder.reference_shapes(split))
    )
    if not fits:
        sizes = f"any size divisible by {settings.patch}" if any_size else "that size alone"
        raise UserError(
            f"{folder.folder} holds samples of {shape} (pictures of {split}), but "
            f"model.sample_shape is {taken}, and this network takes {sizes}"
        )


def by_shape(
    folders: Sequence[Records], settings: Settings, lengths: Sequence[int]
) -> dict[Shape, list[Rows]]:
    """The rows of each shape; prompts alone take the network's own. lengths: of text, in order."""
    shapes = {}
    for folder in folders:
        for split in folder.splits:
            for text, rows in by_length(folder, split, lengths):
                shape = shape_of(settings, text)
                if split != PROMPTS:
                    references = folder.reference_shapes(split)
                    shape = Shape(folder.sample_shape(split), text, references)
                shapes.setdefault(shape, []).append((folder, split, rows))
    return dict(sorted(shapes.items()))


def by_length(
    folder: Records, split: str, lengths: Sequence[int]
) -> Iterator[tuple[int, Int[np.ndarray, "N"]]]:
    """The rows of a split that go with each length of text, where there are any: all captions of a
    row fit it and no lesser one. The last takes those that fit none, whose ends are cut."""
    one = len(lengths) == 1  # for which nothing has to be read
    longest = np.zeros(folder.splits[split], int) if one else folder.longest(split)
    places = np.searchsorted(lengths[:-1], longest)
    for place, length in enumerate(lengths):
        rows = np.flatnonzero(places == place)
        if len(rows):
            yield length, rows


def streams(
    folders: Sequence[Records], weights: Sequence[float], settings: Settings,
    lengths: Sequence[int], pairs: bool = False,
) -> dict[Shape, tuple[data.Stream, ...]]:
    """The rows of each shape, as the network of `settings` takes them.

    weights: each folder's share of all rows (none: that of its records); within a folder every
    record counts alike. lengths: as `by_shape` says. pairs: with the noise of each row.
    """
    each = dict(zip(folders, weights or map(len, folders), strict=True))

    def stream(shape: Shape, folder: Records, split: str, rows) -> data.Stream:
        share = each[folder] * len(rows) / len(folder)

        def read(numbers, seeds):
            return batch(folder, split, rows[numbers], seeds, shape, settings, pairs)

        return data.Stream(len(rows), read, share)

    return {
        shape: tuple(stream(shape, *rows) for rows in places)
        for shape, places in by_shape(folders, settings, lengths).items()
    }


def batch(
    folder: Records, split: str, rows, seeds, shape: Shape, settings: Settings, pairs: bool = False
):
    """Rows {"x", "cond"} of one split; of several captions each epoch draws one. Of edits "null"
    too, each row's own, since the instruction that stands for none is about its pictures. pairs:
    "noise" too, which each sample was drawn from."""
    tokens = shape.text
    x, said, unsaid = np.zeros((len(rows), *shape.sample), np.float32), [], []
    references = tuple(np.zeros((len(rows), *one), np.float32) for one in shape.references)
    noise = {"noise": np.zeros_like(x)} if pairs else {}
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        example = folder.read(split, int(row))
        if example.sample is not None:
            x[i] = example.sample
        if pairs:
            noise["noise"][i] = example.noise
        several = len(example.tokens) > 1
        pick = np.random.default_rng(seed).integers(len(example.tokens)) if several else 0
        said.append(whole(example, example.tokens[pick]))
        if example.edit is not None:
            unsaid.append(whole(example, example.edit.null))
            if len(unsaid[-1]) > tokens:
                raise UserError(
                    f"data.text_tokens is {tokens}, but the pictures of record {example.id} in "
                    f"{folder.folder} and the instruction that stands for none have "
                    f"{len(unsaid[-1])} tokens: give more"
                )
            for array, latents in zip(references, example.edit.references, strict=True):
                array[i] = latents
    cond = padded(said, settings, tokens)
    if not references:
        return noise | {"x": x, "cond": cond}
    about = {"references": references}
    return {"x": x, "cond": cond | about, "null": padded(unsaid, settings, tokens) | about}


def whole(example: Example, tokens: Float[np.ndarray, "_ D"]) -> Float[np.ndarray, "_ D"]:
    """The tokens of a caption, after those of the pictures that it is about."""
    return tokens if example.edit is None else np.concatenate([example.edit.shown, tokens])


def padded(texts: Sequence[Float[np.ndarray, "_ D"]], settings: Settings, tokens: int):
    """{"tokens", "mask"} of texts, each padded or cut to so many."""
    text = np.zeros((len(texts), tokens, settings.text_width), settings.dtype)
    mask = np.zeros((len(texts), tokens), bool)
    for i, valid in enumerate(texts):
        valid = valid[:tokens]
        text[i, : len(valid)], mask[i, : len(valid)] = valid, True
    return {"tokens": text, "mask": mask}


def first_captions(folder: Records) -> tuple[tuple[str, ...], Embeddings]:
    """The captions of records spread over the largest split, and their embeddings."""
    split = max(folder.splits, key=folder.splits.get)
    count = folder.splits[split]
    found = [folder.read(split, row) for row in range(0, count, max(count // SHOWN, 1))][:SHOWN]
    parts = []
    for example in found:
        tokens = whole(example, example.tokens[0])
        references = () if example.edit is None else example.edit.references
        parts.append(Embeddings(
            tokens[None], np.ones((1, len(tokens)), bool),
            tuple(latents[None].astype(np.float32) for latents in references),
        ))
    return tuple(example.captions[0] for example in found), Embeddings.join(parts)


def null(folder: Records) -> Embeddings:
    """What stands for no prompt."""
    return Embeddings.read(folder.folder / NULL, folder.manifest.text_width)[1]
