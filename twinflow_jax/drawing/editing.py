"""Instructions about pictures, as a network that edits takes them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from twinflow_jax import images
from twinflow_jax.drawing import codec, text
from twinflow_jax.drawing.conditions import Embeddings, same_length
from twinflow_jax.drawing.pipeline import Pipeline
from twinflow_jax.errors import UserError, reason
from twinflow_jax.models.family import Editing


@dataclasses.dataclass(frozen=True)
class Edit:
    """An instruction and the PIL pictures that it is about. where: of a file's edit its line, which
    stands before what is said of it."""

    instruction: str
    pictures: tuple[Image.Image, ...]
    where: str = ""


def opened(form: Editing, instruction: str, files: Sequence[str], where: str = "") -> Edit:
    """An edit of pictures in files.

    Raises:
      UserError: no picture or too many, or one that cannot be read or edited; names its file.
    """
    named = [(file, epath.Path(file).read_bytes) for file in files]
    try:
        return dataclasses.replace(decoded(form, instruction, named), where=where)
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def decoded(
    form: Editing, instruction: str, named: Sequence[tuple[str, Callable[[], bytes]]]
) -> Edit:
    """As `opened`, of pictures' names, each with what reads its file."""
    if not 1 <= len(named) <= form.most:
        raise UserError(
            f"{instruction!r} is about {len(named)} pictures: this network takes 1"
            + (f" to {form.most}" if form.most > 1 else "")
        )
    found = []
    for name, read in named:
        try:
            found.append(form.upright(images.opened(read())))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except Exception as error:  # Pillow raises many kinds
            why = getattr(error, "strerror", None) or reason(error)
            raise UserError(f"{name} cannot be read as a picture ({why})") from error
    return Edit(instruction, tuple(found))


def area_of(pipeline: Pipeline) -> int:
    """Pixels of a result, and of each picture beside it: as a run, its adapters or its export were
    trained, or as published."""
    if pipeline.trained is None and not pipeline.few and not pipeline.checkpoint.sized:
        return pipeline.family.editing.area
    height, width = pipeline.config("transformer").sample_shape[:2]
    return height * width * pipeline.config("vae").downscale ** 2


def conditions(
    pipeline: Pipeline, edits: Iterable[Edit], negative: str | None = None
) -> Iterator[tuple[Embeddings, Embeddings | None]]:
    """Of each edit, one row: its instruction and, where there is one, the negative prompt, both
    with its pictures; of one length.

    Raises:
      UserError: an instruction that is empty or too long.
    """
    form, [name] = pipeline.family.editing, pipeline.family.encoders
    tokenize, area = tokenizing(pipeline, negative), area_of(pipeline)
    with text.encoder(pipeline) as encode, codec.encoder(pipeline) as encode_picture:
        for edit in tqdm(edits, unit="edit", desc="encoding", disable=not pipeline.progress):
            said = tokenize(edit)
            shown = (form.encoded(picture, area) for picture in edit.pictures)
            references = tuple(
                encode_picture(one[None].astype(np.float32) / 127.5 - 1, 1).astype(np.float32)
                for one in shown
            )
            cond, *null = (
                dataclasses.replace(part, references=references)
                for part in same_length(*(encode({name: one}) for one in said))
            )
            yield cond, null[0] if null else None


def check(pipeline: Pipeline, edits: Iterable[Edit], negative: str | None = None) -> None:
    """Raises UserError for an instruction that `conditions` would come to only later."""
    tokenize = tokenizing(pipeline, negative)
    for edit in edits:
        tokenize(edit)


def tokenizing(pipeline: Pipeline, negative: str | None) -> Callable[[Edit], list[tuple]]:
    """What gives an edit's instruction and, where there is one, the negative prompt, as the text
    encoder takes them; raises as `conditions`, and names the edit."""
    form, [name] = pipeline.family.editing, pipeline.family.encoders
    config, tokenizer = pipeline.config(name), text.tokenizers(pipeline)[name]
    processor = pipeline.checkpoint.processor

    def tokenize(edit: Edit) -> list[tuple]:
        seen = [form.seen(config, processor, picture) for picture in edit.pictures]
        try:
            said = [form.tokenize(tokenizer, config, [edit.instruction], seen)]
            if negative is not None:
                said.append(form.tokenize(tokenizer, config, [negative], seen, negative=True))
        except UserError as error:
            raise UserError(f"{edit.where}{error}") from error
        return said

    return tokenize


@dataclasses.dataclass(frozen=True)
class Told:
    """Instructions about the same pictures as embedded tokens. shown: those of the pictures, which
    come first and are the same for all: the text encoder is causal. tokens: of each instruction
    those after them; null: of the instruction that stands for none."""

    shown: Float[np.ndarray, "_ D"]
    tokens: list[Float[np.ndarray, "_ D"]]
    null: Float[np.ndarray, "_ D"]


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Instructions through a pipeline's text encoder. embed: what `text.encoder` gives."""

    pipeline: Pipeline
    embed: Callable

    @functools.cached_property
    def _tokenizers(self):
        return text.tokenizers(self.pipeline)

    def __call__(
        self, edits: Sequence[tuple[Sequence[str], Sequence[UInt8[np.ndarray, "_ _ 3"]]]]
    ) -> list[Told | UserError]:
        """Of each edit, instructions with pictures as the autoencoder takes them; the error of one
        that is too long.

        An instruction is padded for itself and goes with others of its shapes, so that it does
        not matter which these are.
        """
        form, [name] = self.pipeline.family.editing, self.pipeline.family.encoders
        config, processor = self.pipeline.config(name), self.pipeline.checkpoint.processor
        rows, groups, shown, found = {}, {}, {}, {}
        for number, (instructions, pictures) in enumerate(edits):
            images = map(Image.fromarray, pictures)
            seen = [form.seen(config, processor, image) for image in images]
            told = (*instructions, self.pipeline.family.null_prompt)
            try:
                tokenized = [
                    form.tokenize(self._tokenizers[name], config, [one], seen) for one in told
                ]
            except UserError as error:
                found[number] = error
                continue
            shown[number] = form.shown(config, tokenized[0][0][0], seen)
            for place, row in enumerate(tokenized):
                rows[number, place] = row
                shapes = tuple(array.shape for array in jax.tree.leaves(row))
                groups.setdefault(shapes, []).append((number, place))
        tokens = {}
        for _, group in sorted(groups.items()):
            whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *map(rows.get, group))
            embedded = self.embed({name: whole})
            valid = (t[m] for t, m in zip(embedded.tokens, embedded.mask, strict=True))
            tokens |= dict(zip(group, valid, strict=True))
        for number, count in shown.items():
            of_one = [tokens[number, place] for place in range(len(edits[number][0]) + 1)]
            *mine, null = (one[count:] for one in of_one)
            found[number] = Told(of_one[0][:count], mine, null)
        return [found[number] for number in range(len(edits))]
