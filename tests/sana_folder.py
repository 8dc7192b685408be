"""A small SANA pipeline with random weights, written by diffusers itself."""

import pathlib

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tests.qwen_folder import randomise
from twinflow_jax.models.sana import tiny


def without_class(config: dict) -> dict:
    return {k: v for k, v in config.items() if k not in ("_class_name", "architectures")}


def write(folder: pathlib.Path, seed: int = 0) -> SanaPipeline:
    """Writes `folder/pipeline`; returns the pipeline that is in it."""
    tiny.save_tokenizer(folder / "tokenizer_source")
    vae = without_class(tiny.CONFIGS["vae"]) | {"decoder_layers_per_block": [2] * 6}
    text = Gemma2Config(**without_class(tiny.CONFIGS["text_encoder"]), attn_implementation="eager")
    pipeline = SanaPipeline(
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_source"),
        randomise(Gemma2Model(text), seed + 1), randomise(AutoencoderDC(**vae), seed + 2),
        randomise(SanaTransformer2DModel(**without_class(tiny.CONFIGS["transformer"])), seed + 3),
        DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
