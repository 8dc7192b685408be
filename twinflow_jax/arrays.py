"""The axes and the arrays of this domain, as annotations name them.

    B               rows of a batch, one sample each; inside a map over devices, this one's rows
    N, M            rows of a whole set, on the host
    *shape          the axes of one sample, whatever it is: an image, a latent, a point
    H W C           height, width and channels of an image, or of a network's map of one
    h w c           the same of a smaller map: an image's latents, what a layer makes
    S, T            places in a sequence: an image's, or an image's and a text's together
    L               tokens of a text, padding included
    K               vectors of a row, one beside the other: modulations
    D, E            features of a place, of a row, of a head
    heads, ...      a word is what it says

A number is that size, `{...}` an argument's, `_` any. Within one call an axis has one size,
so that arrays of a list which differ along an axis call it `_`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray  # of a device, or a constant of the program

# Of a batch, on devices.
Samples = Float[Array, "B *shape"]  # data, noise, or points between them
Velocities = Float[Array, "B *shape"]
Times = Float[Array, "B"]
Losses = Float[Array, "B"]  # one a row
Scalar = Float[Array, ""]
Images = Float[Array, "B H W 3"]  # in [-1, 1]
Latents = Float[Array, "B h w c"]
Maps = Float[Array, "B H W C"]
TextTokens = Float[Array, "B L D"]
TextIds = Int[Array, "B L"]
TextMask = Bool[Array, "B L"]  # those that are no padding
Lengths = Int[Array, "B"]

# Of a set, on the host.
HostImages = Float[np.ndarray, "N H W 3"]
HostLatents = Float[np.ndarray, "N h w c"]
Features = Float[np.ndarray, "N D"]
Labels = Int[np.ndarray, "N"]  # a number of something else for each
Numbers = Sequence[int] | Labels  # the same, as users give them

Apply = Callable[[Any, Samples, Times, Times, Any], Velocities]
"""A network: `(params, x_t, t, r, cond) -> velocity`."""
