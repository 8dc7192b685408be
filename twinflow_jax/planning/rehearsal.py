"""Every program that a run's verbs would compile on devices that nobody has yet.

The verbs' own code is run, with a pipeline that notes down what it should compute
(`planning/recorder.py`). So there is no second list of programs.
"""

import contextlib
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image

from twinflow_jax import data, models, parallel
from twinflow_jax.checkpoints import imported
from twinflow_jax.config import RANDOM, Run
from twinflow_jax.drawing import Embeddings, by_class, codec, denoising, editing, text
from twinflow_jax.encoding.encode import batch_of
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation import captioned, features, held_out
from twinflow_jax.models import attention, efficientnet, names
from twinflow_jax.models.adapters import ranks_of
from twinflow_jax.models.family import Prompts
from twinflow_jax.parallel import flags
from twinflow_jax.planning import cost, hlo, plan
from twinflow_jax.planning.compiling import compiled
from twinflow_jax.planning.recorder import Blank, Program, Recorder, by
from twinflow_jax.planning.topology import GIB
from twinflow_jax.sampling import any_step, batched, few_step, schedules
from twinflow_jax.training import inputs, records, setup, state
from twinflow_jax.training.preview import Preview

Shapes = Sequence[models.Shape]


@dataclasses.dataclass(frozen=True)
class Row:
    """A program as it was compiled. peak: bytes with its arguments; refused: by how much the
    compiler's memory is exceeded, "" where it is not."""

    program: Program
    peak: int
    code: int
    seconds: float
    compile_seconds: float
    refused: str = ""


def programs(
    run: Run, devices: list, shapes: Shapes, verbs: Sequence[str]
) -> Iterator[list[Program]]:
    """Those of each verb, in VERBS: in the order in which it comes to them.

    shapes: of rows. Raises UserError for a run that cannot be trained there.
    """
    with tempfile.TemporaryDirectory() as folder:
        blank = _blank(run, epath.Path(folder)) if run.family.text_to_image else None
        model = models.build(run.model, adapter=run.adapter)
        ranks = ranks_of(names.flatten(model.abstract_params())) if run.adapter.rank else {}
        host = tuple(parallel.own_devices(devices, devices[0].process_index))
        # Only training pads texts to several lengths.
        pictures = list({(one.sample, one.references): one for one in shapes}.values())
        for verb in verbs:
            if verb == "train":
                dtype = run.model.dtype
            else:
                dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
            pipeline = None if blank is None else Recorder(
                blank, dtype, settings=run.model, ranks=ranks, progress=False, few=True,
                of_host=host, verb=verb,
            )
            if verb == "train":
                yield _training(run, devices, shapes, pipeline)
            elif pipeline is None:
                if verb != "encode":
                    yield _of_classes(run, verb, host[0])
            else:
                with warnings.catch_warnings():  # of texts that are cut
                    warnings.simplefilter("ignore")
                    PLAYS[verb](run, pictures, pipeline)
                yield pipeline.programs


def shapes(run: Run) -> list[models.Shape]:
    """Of the rows that a run trains on: its records', where they are here."""
    lengths = run.data.text_lengths
    return list(plan.shares(run)) or [models.shape_of(run.model, text) for text in lengths]


def edits(run: Run) -> bool:
    """Whether its network edits pictures; what draws those to be scored is sampling."""
    return bool(run.shape.references)


def _blank(run: Run, folder: epath.Path) -> Blank:
    """The run's pipeline, where it is here; otherwise its family's published networks (random:
    the small ones), with small tokenizers."""
    real = None
    if run.pipeline != RANDOM and imported.is_imported(run.pipeline):
        real = imported.open_imported(run.pipeline)
    family = real.text_to_image if real else run.family.text_to_image
    configs = {}
    for name, network in family.networks.items():
        small = run.pipeline == RANDOM and network.published
        configs[name] = real.config(name) if real else (
            network.config.from_published(family.tiny[name]) if small else network.config()
        )
    for encoder in family.encoders.values():
        encoder.save_tiny_tokenizer(folder / "files" / encoder.tokenizer)
    return Blank(folder, {"family": run.model.name}, configs, real)


def _training(run: Run, devices: list, shapes: Shapes, pipeline: Recorder | None) -> list[Program]:
    prepared, kind = setup.prepare(run, devices), devices[0].device_kind
    where = {"lowering_platforms": (devices[0].platform,)}
    whole = prepared.abstract_state()
    size, weights = parallel.on_device(whole), state.sampling_params(whole)
    helps = plan.levers(run.mesh.strategy, run.model.remat, 1.0)
    several = len(run.data.text_lengths) > 1
    of_text = lambda shape: f", {shape.text} tokens" if several else ""
    found = [
        Program(
            "train", f"{phase} step, {by(shape.sample)}{of_text(shape)}", functools.partial(
                prepared.lower, phase, shape, **where
            ), parallel.on_device(prepared.abstract_batch(shape)), helps, flags.options(kind),
        )  # beside the next batch
        for phase, shape in prepared.ahead(shapes)
    ]
    known = _inputs(run, pipeline)

    def first() -> jax.stages.Lowered:
        with attention.compiled_for(devices[0].platform):
            if run.train.init_from:
                return prepared.started().trace(whole.params).lower(**where)
            return prepared.initial().trace().lower(**where)

    then = [Program("train", "first state", first, 0, "more chips")]
    preview = Preview(prepared, known, "")
    then += [
        Program(
            "train", f"pictures {grid.nfe} NFE, {by(preview.shape)}", functools.partial(
                preview.lower, grid, weights, **where
            ), size - parallel.on_device(weights), "smaller sample.columns, or more chips",
        )
        for grid in preview.grids
    ]
    if pipeline is None:
        return found + then
    before = len(pipeline.programs)
    beside = dataclasses.replace(pipeline, held=size)
    inputs.decoder(beside)(np.zeros((1, *run.model.sample_shape), np.float32))
    return found + pipeline.programs[:before] + then + pipeline.programs[before:]


def _inputs(run: Run, pipeline: Recorder | None) -> inputs.Inputs:
    """What training prepares; of records, which need not be here, without rows."""
    prompts, tokens = run.sample.prompts, run.shape.text
    source = None if run.data.records else data.load(run.data.name)
    if pipeline is None:
        return inputs.of_classes(run.model, source, scored=run.sample.score_count > 0)
    if source is not None and edits(run):
        return inputs.of_edits(pipeline, source, tokens)
    if source is not None:
        return inputs.of_captions(pipeline, source, tokens, prompts)
    model = models.build(run.model)
    null = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), model.abstract_null(run.shape))
    shown = jax.tree.map(lambda array: np.repeat(array, records.SHOWN, 0), null)
    if prompts:
        embeddings = text.embed(pipeline, prompts, tokens)
        shown = inputs.conditions(embeddings, tokens, run.model.dtype)
    names = prompts or ("",) * records.SHOWN
    return inputs.Inputs(model, (), lambda _: null, shown, names, inputs.decoder(pipeline), None)


def _sampling(run: Run, shapes: Shapes, pipeline: Recorder) -> None:
    """In the run's few steps, and as the base model does. With edits, of which each shape has its
    programs, the networks that draw stay."""
    rows = parallel.row_parts(pipeline.mesh())
    for shape in shapes:
        few, cond, null = _conditions(run, shape, pipeline)
        with contextlib.ExitStack() as stay:
            for name in ("transformer", "vae") if shape.references else ():
                stay.enter_context(pipeline.loaded(name, "sample"))
            for n in run.sample.steps:
                _draw(pipeline, denoising.FewStep(few_step(n)), few, shape.sample, rows, None)
            _draw_as_base(pipeline, cond, shape.sample, rows, null)
            list(codec.decode(pipeline, np.zeros((1, *shape.sample), np.float32)))


def _conditions(
    run: Run, shape: models.Shape, pipeline: Recorder
) -> tuple[Embeddings, Embeddings, Embeddings]:
    """What is drawn in few steps, and as the base model does: with and without the condition."""
    family, prompts = pipeline.family, run.sample.prompts or ("a picture",)
    if shape.references:
        about = editing.Edit(family.null_prompt, _pictures(pipeline, shape))
        [(few, _)] = editing.conditions(pipeline, [about])
        return few, *next(editing.conditions(pipeline, [about], family.negative_prompt))
    both = text.embed(pipeline, prompts, negative=family.negative_prompt)
    return text.embed(pipeline, prompts), both[:-1], both[-1:]


def _pictures(pipeline: Recorder, shape: models.Shape) -> tuple[Image.Image, ...]:
    """Blank sources of edits of a shape."""
    scale = pipeline.config("vae").downscale
    sizes = ((width * scale, height * scale) for height, width, _ in shape.references)
    return tuple(Image.new("RGB", size) for size in sizes)


def _encoding(run: Run, shapes: Shapes, pipeline: Recorder) -> None:
    """Captions of every length that the family pads to, and pictures of every size."""
    downscale = pipeline.config("vae").downscale
    with text.encoder(pipeline, text.BATCH) as embed, codec.encoder(pipeline) as encode:
        for ids in _texts(pipeline, shapes):
            embed(ids)
        for latents in dict.fromkeys(one for s in shapes for one in (s.sample, *s.references)):
            height, width = (side * downscale for side in latents[:2])
            batch = batch_of(codec.BATCH, (width, height))
            encode(np.zeros((batch, height, width, 3), np.float32), batch)
    if edits(run):  # each row has its own for none, and none is drawn
        return
    text.null(pipeline)
    # With --generate the base model draws, beside nothing.
    cond = text.embed(pipeline, ["a picture"], negative=pipeline.family.negative_prompt)
    rows = parallel.row_parts(pipeline.mesh())
    _draw_as_base(pipeline, cond[:1], run.model.sample_shape, rows, cond[1:])


def _texts(pipeline: Recorder, shapes: Shapes) -> Iterator[Prompts]:
    """Captions, or instructions about the sources of each shape, from short to long."""
    family, tokenizers = pipeline.family, text.tokenizers(pipeline)
    for said in ("word " * words for words in (1, 50, 100, 200, 400, 1000)):
        if family.editing is None:
            yield family.tokenize(tokenizers, [said])
            continue
        [(name, tokenizer)], form = tokenizers.items(), family.editing
        config, processor = pipeline.config(name), pipeline.checkpoint.processor
        for shape in shapes:
            seen = [form.seen(config, processor, one) for one in _pictures(pipeline, shape)]
            with contextlib.suppress(UserError):  # longer than one may be
                yield {name: form.tokenize(tokenizer, config, [said], seen)}


def _evaluating(run: Run, shapes: Shapes, pipeline: Recorder) -> None:
    """Drawing while the transformer stays, decoding beside it, and what looks at the pictures."""
    tokens, downscale = run.shape.text, pipeline.config("vae").downscale
    width = pipeline.config("transformer").text_width
    cond = Embeddings(np.zeros((1, tokens, width), np.float32), np.ones((1, tokens), bool))
    shape, steps = run.model.sample_shape, run.sample.steps
    with pipeline.loaded("transformer", "evaluate"):
        for n in steps:
            _draw(pipeline, denoising.FewStep(few_step(n)), cond, shape, held_out.BATCH, cond)
        list(codec.decode(pipeline, np.zeros((1, *shape), np.float32)))
        held = sum(pipeline._loaded.values())
    one = jax.sharding.SingleDeviceSharding(pipeline.of_host[0])
    seen = lambda rows: jax.ShapeDtypeStruct(
        (rows, *(side * downscale for side in shape[:2]), 3), np.float32, sharding=one
    )
    init = efficientnet.EfficientNet().init
    params = pipeline.put(jax.eval_shape(init, jax.random.key(0), seen(1))["params"], one)
    network, where = features.Network(params, b""), (pipeline.of_host[0].platform,)
    pipeline.programs.extend(
        Program("evaluate", name, lambda f=function, a=arguments: f.trace(*a).lower(
            lowering_platforms=where
        ), held, "smaller pictures")
        for name, function, arguments in (
            ("features", network.program, (params, seen(features.BATCH))),
            ("small copies", captioned.shrink, (seen(features.BATCH),)),
        )
    )


def _draw(pipeline, sampler, cond: Embeddings, shape, rows: int, null: Embeddings | None) -> None:
    owners, numbers = np.zeros(rows, int), np.arange(rows)
    list(denoising.denoise(pipeline, sampler, cond, owners, numbers, shape, 0, rows, null))


def _draw_as_base(pipeline, cond: Embeddings, shape, rows: int, null: Embeddings) -> None:
    family = pipeline.family
    with contextlib.suppress(UserError):  # a checkpoint without a scheduler
        schedule = schedules.static_shift(family.base_steps)
        if real := pipeline.checkpoint.real:
            own = dataclasses.replace(pipeline, checkpoint=real)
            schedule = denoising.schedule(own, family.base_steps, shape)
        base = denoising.base(pipeline, schedule, family.base_guidance)
        _draw(pipeline, base, cond, shape, rows, null)


def _of_classes(run: Run, verb: str, device) -> list[Program]:
    """Samples of classes, drawn on one device."""
    model, where = models.build(run.model), (device.platform,)
    count = max(run.model.num_classes, 1) * by_class.COUNT if verb == "sample" else batched.BATCH
    rows = min(count, batched.BATCH)
    keys, labels = jax.random.split(jax.random.key(0), rows), np.zeros(rows, np.int32)
    on_it = jax.sharding.SingleDeviceSharding(device)
    params, noise, cond, keys = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_it),
        (model.abstract_params(), *jax.eval_shape(lambda: (
            jax.numpy.zeros((rows, *model.sample_shape)), model.cond(labels), keys
        ))),
    )

    def lower(grid) -> jax.stages.Lowered:
        with attention.compiled_for(device.platform):
            traced = any_step.sample.trace(model.apply, params, noise, cond, grid, keys)
            return traced.lower(lowering_platforms=where)

    return [
        Program(verb, f"samples {n} NFE, {by(noise.shape)}", functools.partial(
            lower, few_step(n)
        ), 0, "fewer samples")
        for n in run.sample.steps
    ]


PLAYS = {"sample": _sampling, "encode": _encoding, "evaluate": _evaluating}
VERBS = ("train", *PLAYS)


HEADER = (
    f"{'verb':<9} {'program':<40}{'GiB':>8}{'beside':>8}{'seconds':>9}{'compiled in':>13}"
)


def rows(programs: Sequence[Program], devices: list) -> Iterator[Row]:
    """What the compiler says of each."""
    for one in programs:
        made = compiled(one.lower, one.options, devices, f"{one.verb}: {one.name}")
        seconds = 0.0
        if not made.refused:
            seconds = cost.predict(hlo.parse(made.text), devices).overlapped
        yield Row(one, made.peak, made.code, seconds, made.seconds, made.refused)


def line(row: Row) -> str:
    """One program, under HEADER."""
    one = row.program
    start = f"{one.verb:<9} {one.name:<40}"
    if row.refused:
        return f"{start}  {row.refused}; what would help: {one.lever}"
    return (
        f"{start}{row.peak / GIB:>8.2f}{one.beside / GIB:>8.2f}{row.seconds:>9.3f}"
        f"{row.compile_seconds:>13.0f}"
    )


def peak(rows: Sequence[Row], room: int) -> tuple[str, bool]:
    """Where a verb takes most, the code of all its programs being there, and whether it fits in
    all. room: bytes of a device."""
    code, need = sum(row.code for row in rows), lambda row: row.peak + row.program.beside
    most = max(rows, key=need)
    taken, one = need(most) + code, most.program
    said = (
        f"{one.verb:<9} takes most in {one.name}: {taken / GIB:.2f} of {room / GIB:.2f} GiB, with "
        f"what lies beside it and {code / GIB:.2f} of code"
    )
    if taken > room:
        said += f"; what would help: {one.lever}"
    refused = ", ".join(row.program.name for row in rows if row.refused)
    if refused:
        said += f"; not counted, since it does not fit: {refused}"
    return said, taken <= room and not refused
