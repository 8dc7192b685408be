"""A small Qwen-Image pipeline with random weights, written by diffusers itself."""

import pathlib

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from twinflow_jax.models.qwen_image.tiny import save_tokenizer

SCHEDULER = {
    "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
    "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values for what is initialised to 0 or 1 too; scaled so that signals survive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "gamma" not in name:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    return module.eval()


def build(seed: int = 0, layers: int = 2, tokenizer_folder: str = "") -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        num_layers=layers, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=64,
        in_channels=64, out_channels=16, axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 400,
                "rope_theta": 1e6,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                "out_hidden_size": 64, "fullatt_block_indexes": [0],
            },
        )
    )
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER), randomise(vae, seed + 1),
        randomise(text, seed + 2), Qwen2TokenizerFast.from_pretrained(tokenizer_folder),
        randomise(transformer, seed + 3),
    )


def write(folder: pathlib.Path, seed: int = 0, layers: int = 2) -> QwenImagePipeline:
    """Writes the folder; returns the pipeline that is in it."""
    save_tokenizer(folder / "tokenizer_source")
    pipeline = build(seed, layers, str(folder / "tokenizer_source"))
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
