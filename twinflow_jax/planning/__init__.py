"""What a compiled TPU program costs, without the TPU: its devices, its work, its seconds."""
