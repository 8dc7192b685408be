"""A small Stable Diffusion 3.5 pipeline with random weights, written by diffusers itself."""

import pathlib

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.qwen_folder import randomise
from tests.sana_folder import without_class
from twinflow_jax.models.sd35 import tiny

SHIFT = 3.0  # of the published scheduler, whose config says nothing else


def write(
    folder: pathlib.Path, seed: int = 0, t5: bool = True, **transformer
) -> StableDiffusion3Pipeline:
    """Writes `folder/pipeline`; returns the pipeline that is in it. transformer: config besides."""
    places = [folder / f"source{end}" for end in ("", "_2", "_3")]
    tiny.save_clip_tokenizer(places[0])
    tiny.save_second_tokenizer(places[1])
    tiny.save_t5_tokenizer(places[2])
    config = without_class(tiny.CONFIGS["transformer"]) | transformer
    clips = [
        randomise(CLIPTextModelWithProjection(CLIPTextConfig(**tiny.CONFIGS[name])), seed + i)
        for i, name in enumerate(("text_encoder", "text_encoder_2"))
    ]
    pipeline = StableDiffusion3Pipeline(
        transformer=randomise(SD3Transformer2DModel(**config), seed + 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=randomise(AutoencoderKL(**without_class(tiny.CONFIGS["vae"])), seed + 3),
        text_encoder=clips[0], tokenizer=CLIPTokenizer.from_pretrained(places[0]),
        text_encoder_2=clips[1], tokenizer_2=CLIPTokenizer.from_pretrained(places[1]),
        text_encoder_3=randomise(
            T5EncoderModel(T5Config(**tiny.CONFIGS["text_encoder_3"])), seed + 4
        ) if t5 else None,
        tokenizer_3=PreTrainedTokenizerFast.from_pretrained(places[2]) if t5 else None,
    )
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
