"""Instructions about pictures, as a network that edits takes them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from etils import epath
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
    """An instruction and the PIL pictures that it is about."""

    instruction: str
    pictures: tuple[Image.Image, ...]


def opened(form: Editing, instruction: str, files: Sequence[str]) -> Edit:
    """An edit of pictures in files.

    Raises:
      UserError: no picture or too many, or one that cannot be read or edited; names its file.
    """
    return decoded(form, instruction, [(file, epath.Path(file).read_bytes) for file in files])


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


def conditions(
    pipeline: Pipeline, edits: Iterable[Edit], negative: str | None = None
) -> Iterator[tuple[Embeddings, Embeddings | None]]:
    """Of each edit, one row: its instruction and, where there is one, the negative prompt, both
    with its pictures; of one length.

    Raises:
      UserError: an instruction that is empty or too long.
    """
    form, [name] = pipeline.family.editing, pipeline.family.encoders
    config, tokenizer = pipeline.config(name), text.tokenizers(pipeline)[name]
    processor = pipeline.checkpoint.processor
    with text.encoder(pipeline) as encode, codec.encoder(pipeline) as encode_picture:
        for edit in tqdm(edits, unit="edit", desc="encoding", disable=not pipeline.progress):
            seen = [form.seen(config, processor, picture) for picture in edit.pictures]
            said = [form.tokenize(tokenizer, config, [edit.instruction], seen)]
            if negative is not None:
                said.append(form.tokenize(tokenizer, config, [negative], seen, negative=True))
            shown = (form.encoded(picture) for picture in edit.pictures)
            references = tuple(
                encode_picture(one[None].astype(np.float32) / 127.5 - 1, 1).astype(np.float32)
                for one in shown
            )
            cond, *null = (
                dataclasses.replace(part, references=references)
                for part in same_length(*(encode({name: one}) for one in said))
            )
            yield cond, null[0] if null else None
