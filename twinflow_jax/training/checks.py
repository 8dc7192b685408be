"""What a run cannot be trained on or start from, refused before anything is written."""

import dataclasses
import warnings
from collections.abc import Iterable

import jax

from twinflow_jax import checkpoints, data, models, parallel
from twinflow_jax.checkpoints import adapter_files, imported
from twinflow_jax.config import RANDOM, Run
from twinflow_jax.data.records import Records
from twinflow_jax.errors import UserError, few
from twinflow_jax.models import names
from twinflow_jax.models.adapters import ranks_of
from twinflow_jax.models.family import TextToImage
from twinflow_jax.models.settings import Settings
from twinflow_jax.training import inputs, records
from twinflow_jax.training.setup import Setup


def check_fit(run: Run, source: data.Dataset | list[Records]) -> None:
    """Refuses data of less than a batch, a network that does not take it, or a pipeline that
    does not fit it.

    source: a named dataset, or folders of records.
    Raises:
      UserError: says what differs.
    """
    settings, rows = run.model, run.data.batch_size
    text = run.family.text_to_image
    if text is not None and text.editing and run.sample.prompts:
        raise UserError(
            f"sample.prompts is set, but model {settings.name!r} edits pictures: leave it out, and "
            "previews show edits of the data"
        )
    total = len(source.learned) if isinstance(source, data.Dataset) else sum(map(len, source))
    if total < rows:
        raise UserError(
            f"data has {total} rows to train on, too few for a batch of {rows}: "
            "give more, or a smaller data.batch_size"
        )
    if text is not None:
        check_pipeline(run.pipeline, text, settings)
        if run.data.records:
            check_encoders(run.pipeline, source)
            if text.editing is None:  # the shortest text holds what stands for none
                inputs.conditions(records.null(source[0]), run.data.text_lengths[0], settings.dtype)
            tell_small(run, source)
        return
    if run.pipeline or run.data.records:
        key = "pipeline" if run.pipeline else "data.records"
        raise UserError(f"{key} is set, but model {settings.name!r} draws no text")
    shape = source.learned.x.shape[1:]
    named = repr(source.name) if source.pairs is None else run.data.pairs
    if settings.sample_shape != shape:
        raise UserError(
            f"model.sample_shape is {settings.sample_shape}, but data {named} has "
            f"images of {shape}"
        )
    highest = int(source.learned.label.max())
    if source.pairs is not None and not 0 <= highest < max(settings.num_classes, 1):
        raise UserError(
            f"data.pairs {named} has pictures of class {highest}, but model.num_classes is "
            f"{settings.num_classes}: draw them with the run that this one starts from"
        )
    if settings.num_classes not in (0, source.num_classes):
        raise UserError(
            f"model.num_classes is {settings.num_classes}, but data {source.name!r} has "
            f"{source.num_classes} classes (0 for none)"
        )


SMALLER = (
    "`python -m twinflow_jax.plan` says what it takes; model.remat=full, "
    "mesh.strategy=gather_layers, train.micro_steps, a smaller network or more devices help"
)


def check_memory(prepared: Setup) -> None:
    """Refuses a run whose state and batch alone fill the devices: a CPU would hang instead.

    Raises:
      UserError: says what there is and what it takes.
    """
    needed = parallel.on_device((prepared.abstract_state(), prepared.abstract_batch()))
    device = jax.local_devices()[0]
    room = parallel.room(device)
    if room and needed > room:
        raise UserError(
            f"training takes {needed / 1e9:.1f} GB on each device for its state and a batch alone, "
            f"and {device.device_kind} has {room / 1e9:.1f} GB: {SMALLER}"
        )


def check_length(run: Run, workdir: str) -> None:
    """Refuses another number of steps than a run was started with, where that would change what
    it has done.

    Raises:
      UserError: says what would change, and what to do.
    """
    done = checkpoints.steps_of(workdir)
    if not done:
        return
    steps, before = run.train.steps, checkpoints.read_run(workdir).train.steps
    if steps != before and run.optimizer.looks_ahead:
        raise UserError(
            f"{workdir} was started for {before} steps, at the end of which its rate comes to "
            f"optimizer.decay_to={run.optimizer.decay_to}: for {steps}, the steps that are done "
            f"would have had other rates. Give train.steps={before}, or start from its weights in "
            f"another --workdir (train.init_from={workdir})"
        )
    if steps < done[-1]:
        raise UserError(
            f"{workdir} has done {done[-1]} steps: train.steps is {steps}; give that many or more"
        )


def check_start(run: Run) -> None:
    """Refuses to start from what is no run, or from another network.

    Raises:
      UserError: says what is missing or differs.
    """
    source = run.train.init_from
    if not source:
        return
    if imported.is_imported(source):
        checkpoint = imported.open_imported(source)
        if (key := run.objective.guided) and checkpoint.is_distilled:
            warnings.warn(
                f"train.init_from {source} is a distilled model, whose velocities are guided "
                f"already: {key} guides them again; set it to none",
                stacklevel=2,
            )
        checkpoint.recorded("transformer")  # or says that there is none
        network = checkpoint.config("transformer")
        if differing := other_fields(network, run.model):
            raise UserError(
                f"train.init_from {source} is another network ({few(differing)}): choose another, "
                "or give this one its values"
            )
        theirs, ours = network.time_conditioning, run.model.time_conditioning
        if checkpoint.knows_r and ours != theirs:
            raise UserError(
                f"train.init_from {source} was trained with model.time_conditioning {theirs!r}, "
                f"here it is {ours!r}: take that, or the model that it was trained from"
            )
        return
    if adapter_files.is_imported(source):
        adapter = adapter_files.open_imported(source)[1]
        theirs = ranks_of(checkpoints.open_start(source))
        model = models.build(run.model, adapter=run.adapter)
        ours = ranks_of(names.flatten(model.abstract_params()))
        differing = [
            f"{path} has rank {rank} there, {ours.get(path, 0)} here"
            for path, rank in theirs.items() if rank != ours.get(path, 0)
        ]
        if adapter.time not in ("", run.model.time_conditioning):
            differing.append(f"model.time_conditioning is {adapter.time!r} there")
        if differing:
            raise UserError(
                f"train.init_from {source} has other adapters ({few(differing)}): set the run so, "
                "or merge it (convert adapter merge) and start from that"
            )
        return
    other = checkpoints.open_weights(source)[0]
    sections = ("model", "adapter") if other.adapter.rank else ("model",)
    theirs, ours = (
        {
            f"{section}.{key}": value for section in sections
            for key, value in dataclasses.asdict(getattr(one, section)).items()
        }
        for one in (other, run)
    )
    free = {"model.remat", "model.dtype"}  # of computing, not of the weights
    conditioning = "model.time_conditioning"
    if other.only_velocities and theirs.get(conditioning) == "second_embedder":
        free.add(conditioning)  # seen at r = t alone, where it is the base of all
    if differing := differences(theirs, ours, (theirs.keys() | ours) - free):
        raise UserError(
            f"train.init_from {source} is another network ({few(differing)}): choose another, or "
            "give this one its values"
        )


def tell_small(run: Run, folders: list[Records]) -> None:
    """Says which shapes have fewer rows than a batch."""
    small = [
        f"{'x'.join(map(str, shape.sample))} with {shape.text} text tokens has {count}"
        for shape, rows in records.by_shape(folders, run.model, run.data.text_lengths).items()
        if (count := sum(len(numbers) for *_, numbers in rows)) < run.data.batch_size
    ]
    if small:
        warnings.warn(
            f"some shapes have fewer rows than a batch of {run.data.batch_size}, which shows them "
            f"more than once: {few(small)}",
            stacklevel=2,
        )


def check_encoders(pipeline: str, folders: list[Records]) -> None:
    """Refuses records made with another text encoder or autoencoder than the pipeline's."""
    if pipeline == RANDOM:
        raise UserError(
            "pipeline is random, but data.records were made with networks: set pipeline to the "
            "checkpoint that they were encoded with"
        )
    checkpoint = imported.open_imported(pipeline)
    for folder in folders:
        used = {"text_encoder": checkpoint.text_identity, "autoencoder": checkpoint.identity("vae")}
        for field, theirs in used.items():
            mine = getattr(folder.manifest, field)
            if mine and mine != theirs:
                raise UserError(
                    f"the records in {folder.folder} were made with the {field.replace('_', ' ')} "
                    f"{mine}, but pipeline {pipeline} has {theirs}: encode them with it"
                )


def check_pipeline(pipeline: str, family: TextToImage, settings: Settings) -> None:
    """Refuses a pipeline whose transformer is not the one that is trained."""
    if not pipeline:
        raise UserError(
            f"model {settings.name!r} draws from text: set pipeline to an imported checkpoint "
            "(twinflow convert), or to random for small random networks"
        )

    def theirs_of(name):
        if pipeline == RANDOM:
            return family.networks[name].config.from_published(family.tiny[name])
        return imported.open_imported(pipeline).config(name)

    network = family.networks["transformer"]
    if not network.published:  # of any size, for that text
        width = family.text_width({name: theirs_of(name) for name in family.encoders})
        if settings.text_width != width:
            raise UserError(
                f"model.text_width is {settings.text_width}, but the text encoder of pipeline "
                f"{pipeline} makes tokens of {width} channels: set it to that"
            )
        return
    if differing := other_fields(theirs_of("transformer"), settings):
        raise UserError(
            f"pipeline {pipeline} has another transformer than model ({few(differing)}): give the "
            "model its values"
        )


def other_fields(theirs: Settings, ours: Settings) -> list[str]:
    """What a published network computes otherwise than ours, whether or not its weights show it.

    How it sees its target time may differ: training begins another way.
    """
    free = {"name", "sample_shape", "dtype", "remat", "time_conditioning"}
    there, here = (
        {f"model.{key}": value for key, value in dataclasses.asdict(one).items() if key not in free}
        for one in (theirs, ours)
    )
    return differences(there, here, there)


def differences(there: dict, here: dict, keys: Iterable[str]) -> list[str]:
    """What each of the keys is in one and in the other, where that differs; the family first."""
    return [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(keys, key=lambda key: (key != "model.name", key))
        if there.get(key) != here.get(key)
    ]
