"""The feature network against the PyTorch package whose weights it takes."""

import jax
import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet

from tests.models.oracles import QUICK, params_of, relative_error
from twinflow_jax.models import efficientnet

SIZE = (75, 50)  # odd on the way: shows on which side strides are padded


def oracle() -> EfficientNet:
    """Random weights, and statistics that are not those of a new network."""
    torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))
    module = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE).eval()
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_var", "running_mean")) or "_bn" in name and tensor.ndim:
            tensor.uniform_(0.5, 1.5)
    return module


def test_features_are_those_of_the_published_network():
    """And all its tensors are used or carried."""
    module, config = oracle(), efficientnet.Config()
    network = efficientnet.EfficientNet(config)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    expected = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    params = params_of(module, efficientnet.table(config), expected)
    run = jax.jit(lambda x: network.apply({"params": params}, x), compiler_options=QUICK)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3))
    ours = np.asarray(run((pixels / 127.5 - 1).astype(np.float32)))
    scaled = torch.tensor((pixels - 127) / 128, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = module.extract_features(scaled).mean((2, 3)).numpy()
    assert ours.std() > 0.01
    assert relative_error(ours, theirs) < 1e-5
