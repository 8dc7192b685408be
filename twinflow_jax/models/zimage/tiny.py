"""The family in small: configs in the published form; its tokenizer is Qwen-Image's small one.

With random weights they make a pipeline of a few megabytes, which goes through the same code as
the real one: for tests, and for trying a run without a download.
"""

CONFIGS = {
    "transformer": {
        "_class_name": "ZImageTransformer2DModel", "dim": 96, "n_heads": 3, "n_kv_heads": 3,
        "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 64, "axes_dims": [8, 12, 12],
        "axes_lens": [1024, 512, 512],
    },
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 96, "vocab_size": 400, "rope_theta": 1e6,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 32, 64],
        "layers_per_block": 1, "latent_channels": 16, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}
