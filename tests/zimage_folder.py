"""A small Z-Image pipeline with random weights, written by diffusers itself."""

import pathlib

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.qwen_folder import randomise
from tests.sana_folder import without_class
from twinflow_jax.models.qwen_image.tiny import save_tokenizer
from twinflow_jax.models.zimage import tiny

TEMPLATE = (  # what the published one makes of a message of the user's
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' "
    "}}{%- endif %}"
)
BASE, TURBO = 6.0, 3.0  # the shifts of their schedulers


def write(folder: pathlib.Path, seed: int = 0, shift: float = BASE) -> ZImagePipeline:
    """Writes `folder/pipeline`; returns the pipeline that is in it."""
    save_tokenizer(folder / "tokenizer_source")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer_source")
    tokenizer.chat_template = TEMPLATE
    text = without_class(tiny.CONFIGS["text_encoder"]) | {"tie_word_embeddings": True}
    transformer = ZImageTransformer2DModel(**without_class(tiny.CONFIGS["transformer"]))
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        randomise(AutoencoderKL(**without_class(tiny.CONFIGS["vae"])), seed + 1),
        randomise(Qwen3ForCausalLM(Qwen3Config(**text)), seed + 2), tokenizer,
        randomise(transformer, seed + 3),
    )
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
