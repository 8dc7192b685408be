"""A checkpoint of a family's small networks with random weights, as if it had been imported."""

import json
import pathlib
import tempfile

import jax
import numpy as np
from etils import epath

from twinflow_jax import files, models, seeds
from twinflow_jax.checkpoints import imported, store
from twinflow_jax.models import names


def write_random(family: str, target: epath.PathLike, seed: int) -> imported.Imported:
    """Writes it to a folder, all or nothing; leaves alone what is there already."""
    target = epath.Path(target)
    if (target / imported.RECORD).exists() and not (target / files.UNFINISHED).exists():
        return imported.open_imported(target)
    text_to_image = models.FAMILIES[family].text_to_image
    networks = {k: n for k, n in text_to_image.networks.items() if n.published}
    keys = jax.random.split(seeds.key(seed), len(networks))
    with files.whole_folder(target, 0):
        for key, (name, network) in zip(keys, networks.items(), strict=True):
            config = network.config.from_published(text_to_image.tiny[name])
            params = jax.jit(lambda key, n=network, c=config: n.init(c, key))(key)
            for path, leaf in names.flatten(params).items():
                place = imported.array_folder(target, name, path)
                store.write(store.create(place, leaf.shape, leaf.dtype), np.asarray(leaf))
        kept = target / "files"
        for encoder in text_to_image.encoders.values():
            with tempfile.TemporaryDirectory() as local:
                encoder.save_tiny_tokenizer(local)
                for file in pathlib.Path(local).iterdir():
                    files.write(kept / encoder.tokenizer / file.name, file.read_bytes())
        record = {
            "format": imported.FORMAT, "family": family, "source": f"random weights, seed {seed}",
            "files": sorted(
                f"{folder.name}/{file.name}" for folder in kept.iterdir()
                for file in folder.iterdir()
            ),
            "networks": {
                name: {"published": text_to_image.tiny[name], "carried": [], "added": []}
                for name in networks
            },
        }
        files.write(target / imported.RECORD, json.dumps(record, indent=2).encode())
    return imported.open_imported(target)
