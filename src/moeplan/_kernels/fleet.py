"""What a gateway's fleet keeps of each group's live requests, updated in one pass over the experts."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Float32Array, FloatArray

__all__ = ["enter", "enter_reference"]

#: Smaller chances are none: far from float32's denormal numbers, which are slow.
TINY = np.float32(1e-30)


@compiled
def enter(
    chance: Float32Array,
    leaving: bool,
    weights: tuple[float, float, float],
    mean: Float32Array,
    missed: FloatArray,
    profile: Float32Array,
    blend: Float32Array,
) -> None:
    """A request joins or leaves a group; arrays [N], one entry for each layer and expert, changed in place.

    `missed` is float64: a product over many live requests would become denormal, slow and wrong, in float32.

    Args:
        chance: of the request, to read each expert in a step; below 1.
        weights: of the request in `mean` and in `profile` (0 where it leaves), and of the profile in `blend`.
        mean: of all requests. missed, profile: of the group, chance that no live request reads the expert, and mean
            chance of its recent ones. blend: missed / (1 + weight x profile).
    """
    in_mean, in_profile, weight = np.float32(weights[0]), np.float32(weights[1]), np.float32(weights[2])
    one = np.float32(1.0)
    for i in range(chance.size):
        p = chance[i]
        mean[i] += in_mean * (p - mean[i])
        profile[i] += in_profile * (p - profile[i])
        missed[i] = missed[i] / (one - p) if leaving else missed[i] * (one - p)
        seen = np.float32(missed[i]) / (one + weight * profile[i])
        blend[i] = seen if seen > TINY else np.float32(0.0)


def enter_reference(
    chance: Float32Array,
    leaving: bool,
    weights: tuple[float, float, float],
    mean: Float32Array,
    missed: FloatArray,
    profile: Float32Array,
    blend: Float32Array,
) -> None:
    """`enter` in plain NumPy."""
    mean += np.float32(weights[0]) * (chance - mean)
    profile += np.float32(weights[1]) * (chance - profile)
    missed *= 1 / (1 - chance) if leaving else 1 - chance
    blend[:] = missed / (1 + np.float32(weights[2]) * profile)
    blend[blend <= TINY] = 0.0
