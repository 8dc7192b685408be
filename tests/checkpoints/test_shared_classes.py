"""Folders whose networks several families share: the whole decides, and never a list's order."""

import dataclasses
import json

import pytest
from etils import epath

from twinflow_jax import models
from twinflow_jax.checkpoints import published
from twinflow_jax.errors import UserError

SANA = models.FAMILIES["sana"]
FOLDERS = ("transformer", "text_encoder", "vae")


@pytest.fixture(params=["first", "last"])
def families(request, monkeypatch):
    """SANA's transformer and autoencoder with another text encoder, before and after SANA."""
    text = SANA.text_to_image
    other = dataclasses.replace(text.networks["text_encoder"], classes=("InternVLChatModel",))
    other = dataclasses.replace(text, networks=text.networks | {"text_encoder": other})
    shared = {"shared": dataclasses.replace(SANA, text_to_image=other)}
    known = shared | models.FAMILIES if request.param == "first" else models.FAMILIES | shared
    monkeypatch.setattr(models, "FAMILIES", known)


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path)


def write(path, *folders: str, **configs: dict) -> None:
    for name in folders:
        config = configs.get(name, SANA.text_to_image.tiny[name])
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / name / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("families")
def test_the_text_encoder_decides_a_whole_folder(folder):
    write(folder / "sana", *FOLDERS)
    write(folder / "shared", *FOLDERS, text_encoder={"architectures": ["InternVLChatModel"]})
    write(folder / "tie", "transformer", "text_encoder",
          text_encoder={"architectures": ["InternVLChatModel"]})
    for name, family in (("sana", "sana"), ("shared", "shared"), ("tie", "shared")):
        found, places = published._networks(folder / name, None)
        assert found == family
        assert places == {name: folder / places[name].parent / name for name in FOLDERS}


@pytest.mark.usefixtures("families")
def test_what_several_share_has_to_be_named(folder):
    write(folder, "transformer", "vae")
    for path, names in ((folder, FOLDERS), (folder / "vae", ("vae",))):
        with pytest.raises(UserError, match="holds what .*sana.* share: say which with --family"):
            published._networks(path, None)
        for family in ("sana", "shared"):
            found, places = published._networks(path, family)
            assert found == family and tuple(places) == names
    write(folder / "other", "text_encoder")
    with pytest.raises(UserError, match="of class 'Gemma2Model'; known are .*InternVLChatModel"):
        published._networks(folder / "other" / "text_encoder", "shared")
    with pytest.raises(UserError, match="'dit' is no family that draws from text"):
        published._networks(folder, "dit")
