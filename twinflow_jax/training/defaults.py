"""Every config key of a training run, with its default and what it means."""

import ml_collections

from twinflow_jax import objectives


def get() -> ml_collections.ConfigDict:
    """A locked config to change in a config file (`model` and `objective` whole, by assignment)."""
    return ml_collections.ConfigDict(
        {
            "pipeline": "",  # for text: an imported checkpoint, or "random" for small networks
            "data": {
                "name": "mnist5k",
                "records": (),  # in its place: folders that tools/encode.py wrote
                "weights": (),  # each folder's share of the rows (none: by its records)
                "batch_size": 256,
                "text_tokens": 64,  # that every caption is cut or padded to, where there are any
            },
            "model": {"name": "mlp", "sample_shape": (28, 28, 1), "num_classes": 10},
            "objective": objectives.preset("released"),
            "optimizer": {
                "name": "adamw",  # or "adam", "radam"
                "learning_rate": 1e-4,
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 0.0,  # of the gradient; 0: no clipping
                "warmup": 0,  # steps of linear warm-up
                "decay_to": 1.0,  # share of the rate that a cosine ends at; 1: constant
                "moments": "float32",  # or "bfloat16", for half their memory
            },
            "mesh": {  # how devices share the work (parallel.MeshConfig); 0: what is left
                "data": 0, "fsdp": 0, "tensor": 1, "context": 0,
                "strategy": "partitioner",  # or "gather_layers", "gather_once"
            },
            "train": {
                "steps": 1000,
                "seed": 42,
                "weights": "float32",  # that are trained; "bfloat16" is rounded stochastically
                "micro_steps": 1,  # parts of a batch whose gradients add up to one update
                "ema_decay": 0.99,  # of the weights that are sampled; 0: sample the raw ones
                "unconditional": "empty",  # in guidance: "empty" condition, or "permuted" rows
                "condition_dropout": 0.0,  # share of rows trained without their condition
                "flow_matching_steps": 0,  # first steps that only learn velocities
                "init_from": "",  # a run whose weights to start from
                "log_every": 50,
                "sample_every": 500,
                "checkpoint_every": 500,
                "keep": 3,  # checkpoints
            },
            "sample": {
                "steps": (1, 2, 4),  # of the pictures and metrics made while training
                "columns": 8,  # pictures per class or prompt
                "prompts": (),  # what to draw from text (none: the data's captions)
                "score_count": 1000,  # samples behind each metric; 0: pictures only
            },
        }
    ).lock()
