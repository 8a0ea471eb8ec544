"""Six corruptions of gray images, each at five strengths."""

import numpy as np
from scipy import ndimage

# The levels at strengths 0 to 5. At 0, nothing changes.
LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (0, 0.4, 0.6, 0.8, 1.0, 1.2),
    "contrast": (1, 0.7, 0.5, 0.3, 0.2, 0.1),
    "rotation": (0, 12, 24, 36, 48, 60),
    "inversion": (0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "occlusion": (0, 2, 3, 4, 5, 6),
}
UNITS = {
    "noise": "standard deviation, white = 1",
    "blur": "standard deviation, pixels",
    "contrast": "contrast, original = 1",
    "rotation": "degrees",
    "inversion": "share of the negative",
    "occlusion": "side of the square, pixels",
}
STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, name: str, strength: int, seed: int) -> np.ndarray:
    """Corrupted images, for images of shape (n, height, width) with values in 0 ... 1.

    The noise and the random places are the same at every strength.
    """
    if strength == 0:
        return images.astype(np.float32)
    rng = np.random.default_rng((seed, list(LEVELS).index(name)))
    corrupted = CORRUPTIONS[name](images, LEVELS[name][strength], rng)
    return np.clip(corrupted, 0, 1).astype(np.float32)


def noise(images: np.ndarray, deviation: float, rng: np.random.Generator):
    return images + deviation * rng.standard_normal(images.shape)


def blur(images: np.ndarray, deviation: float, rng: np.random.Generator):
    return ndimage.gaussian_filter(images, (0, deviation, deviation))


def contrast(images: np.ndarray, left: float, rng: np.random.Generator):
    """Moves pixels towards the mean of their image."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + left * (images - mean)


def rotation(images: np.ndarray, degrees: float, rng: np.random.Generator):
    """Rotates counterclockwise, with linear interpolation and black corners."""
    return ndimage.rotate(images, degrees, axes=(2, 1), reshape=False, order=1)


def inversion(images: np.ndarray, share: float, rng: np.random.Generator):
    """Mixes images with their negatives: at 0.5 no contrast, above it inverted."""
    return (1 - share) * images + share * (1 - images)


def occlusion(images: np.ndarray, side: float, rng: np.random.Generator):
    """Puts a gray square at a random place inside each image."""
    n, *shape = images.shape
    inside = []
    for size in shape:
        # A larger square covers the smaller one, so that more strength hides more.
        start = np.floor(rng.random((n, 1)) * (size - side + 1))
        inside.append((np.arange(size) >= start) & (np.arange(size) < start + side))
    rows, columns = inside
    return np.where(rows[:, :, None] & columns[:, None, :], 0.5, images)


CORRUPTIONS = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "rotation": rotation,
    "inversion": inversion,
    "occlusion": occlusion,
}
