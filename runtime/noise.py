"""Standard normal noise equal to that of torch's CPU generator, without torch.

torch fills a tensor of 16 or more values from MT19937: 24 random bits a value, then Box-Muller over blocks of 16, whose
first eight values give the radii and whose last eight the angles. Agrees to 2.4e-7. Of a seed it heeds the low 32 bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError

BLOCK = 16
#: What torch's generators take; MT19937 is seeded with the low 32 bits, so that -1 is 2^32 - 1.
SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1
LOW_BITS = 2**32 - 1


def generator_seed(seed: int) -> int:
    """What torch's CPU generator makes of `seed`: 0 to 2^32-1.

    Raises:
        RequestError: torch takes no such seed.
    """
    if not SMALLEST_SEED <= seed <= LARGEST_SEED:
        raise RequestError(
            f"seed is {seed if abs(seed) < 10**40 else 'too large'}; expected -2^63 to 2^64-1, as torch takes them"
        )
    return seed & LOW_BITS


class TorchNoise:
    """What a torch CPU generator with this seed draws, one tensor after the other.

    Raises:
        RequestError: torch takes no such seed.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.MT19937()
        # init_genrand, as torch seeds it
        self._generator.state = np.random.RandomState(generator_seed(seed)).get_state(legacy=False)  # type: ignore[assignment]

    def draw(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """What the next `torch.randn(shape, generator=...)` gives, float32.

        Raises:
            RequestError: the shape holds fewer than 16 values.
        """
        count = math.prod(shape)
        if count < BLOCK:
            raise RequestError(f"noise of shape {shape} has fewer than {BLOCK} values; torch draws those differently")
        values = _uniform(self._generator, count)
        whole = count - count % BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole < count:  # torch draws the last 16 values anew
            values[-BLOCK:] = _box_muller(_uniform(self._generator, BLOCK))
        return values.reshape(shape)


def _uniform(generator: np.random.MT19937, count: int) -> npt.NDArray[np.float32]:
    bits = generator.random_raw(count) & np.uint64(0xFFFFFF)
    return (bits.astype(np.float32) * np.float32(2**-24)).astype(np.float32)


def _box_muller(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    blocks = values.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).astype(np.float32)
