"""The floor plan: the shape of everything that flows through the package.

    images -> patches -> latents -> contexts -> predictions -> losses

b images (and s shifted ones) of c channels, h x w pixels; a grid of gy x gx patches, p pixels a side; d features; a
contexts of each patch (1, or as many as directions); n predictions, one for each (direction, step, context patch) whose
target lies inside the grid. The test suite checks these shapes at every call (jaxtyping); in use they cost nothing.
"""

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "b c h w"]  # standardised: of mean about 0 and variance about 1
Shifted = Float[Tensor, "s c h w"]  # transformed copies of some of them
Patches = Float[Tensor, "b gy gx c p p"]
Latents = Float[Tensor, "b gy gx d"]  # what a patch looks like
Contexts = Float[Tensor, "a b gy gx d"]  # what is known when standing at a patch
Frames = Float[Tensor, "windows 4"]  # top, left of each window in its image, and height, width of that image: pixels
Places = Float[Tensor, "windows gy gx 2"]  # y, x of each centre, as fractions of the height and width of its image
Sources = Int[Tensor, " n"]  # whose context each prediction is made from
Targets = Int[Tensor, " n"]  # which latent (flattened b, gy, gx) it is about
Losses = Float[Tensor, " n"]  # InfoNCE of each prediction
AnomalyMap = Float[Tensor, "h w"]
