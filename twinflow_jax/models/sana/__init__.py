"""SANA: its three networks, its prompts and its codec, as one family."""
