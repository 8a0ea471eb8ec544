"""Networks to measure whole, with any norm: `norm()` makes a layer.

Each is its paper's, a convolution's stride where the paper has it, and has fields by
which it can be made small. `norm` is called without arguments; the layer is called with
x, or with x and a mask in `UNet`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CLASSES = 1000


class Net(nn.Module):
    """What all of them have."""

    norm: Callable[[], Callable]
    dtype: Any = jnp.float32

    def conv(self, x, features: int, size: int = 3, strides: int = 1, groups: int = 1):
        """A convolution without bias."""
        options = {"use_bias": False, "dtype": self.dtype}
        return nn.Conv(
            features, (size, size), strides, feature_group_count=groups, **options
        )(x)

    def layer(self, x, *given: int, act: Callable = lambda y: y, **options: int):
        """A convolution, its norm, and an activation."""
        return act(self.norm()(self.conv(x, *given, **options)))

    def scores(self, x: jax.Array) -> jax.Array:
        """Of the classes, from images of features."""
        return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2)))


class ResNet(Net):
    """ResNet-50 (He et al. 2015), a stage's stride on its 3 × 3 convolution."""

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of the classes."""
        x = self.layer(x, self.width, 7, 2, act=nn.relu)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                strides = 2 if stage and not block else 1
                x = self.bottleneck(x, self.width * 2**stage, strides)
        return self.scores(x)

    def bottleneck(self, x: jax.Array, features: int, strides: int) -> jax.Array:
        """Three convolutions and a shortcut."""
        y = self.layer(x, features, 1, act=nn.relu)
        y = self.layer(y, features, 3, strides, act=nn.relu)
        y = self.layer(y, 4 * features, 1)
        if x.shape != y.shape:
            x = self.layer(x, 4 * features, 1, strides)
        return nn.relu(x + y)


class MobileNet(Net):
    """MobileNetV2 (Sandler et al. 2018): depthwise convolutions and relu6."""

    # Expansion, features, blocks and first stride of each stage.
    stages: Sequence[tuple[int, int, int, int]] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    ends: tuple[int, int] = (32, 1280)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of the classes."""
        x = self.layer(x, self.ends[0], 3, 2, act=nn.relu6)
        for expansion, features, count, strides in self.stages:
            for block in range(count):
                x = self.inverted(x, expansion, features, 1 if block else strides)
        return self.scores(self.layer(x, self.ends[1], 1, act=nn.relu6))

    def inverted(self, x, expansion: int, features: int, strides: int) -> jax.Array:
        """Wider, a convolution of each channel, narrower."""
        y, wide = x, x.shape[-1] * expansion
        if expansion > 1:
            y = self.layer(y, wide, 1, act=nn.relu6)
        y = self.layer(y, wide, 3, strides, act=nn.relu6, groups=wide)
        y = self.layer(y, features, 1)
        return x + y if x.shape == y.shape else y


class EfficientNet(Net):
    """EfficientNet-B0 (Tan and Le 2019): silu, squeeze and excite."""

    # Expansion, features, blocks, first stride and size of the kernel of each stage.
    stages: Sequence[tuple[int, int, int, int, int]] = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    ends: tuple[int, int] = (32, 1280)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of the classes."""
        x = self.layer(x, self.ends[0], 3, 2, act=nn.silu)
        for expansion, features, count, strides, size in self.stages:
            for block in range(count):
                first = 1 if block else strides
                x = self.inverted(x, expansion, features, first, size)
        return self.scores(self.layer(x, self.ends[1], 1, act=nn.silu))

    def inverted(self, x, expansion: int, features: int, strides: int, size: int):
        """As MobileNet's, with channels weighed by their mean over the image."""
        y, wide = x, x.shape[-1] * expansion
        if expansion > 1:
            y = self.layer(y, wide, 1, act=nn.silu)
        y = self.layer(y, wide, size, strides, act=nn.silu, groups=wide)
        squeezed = nn.Dense(max(x.shape[-1] // 4, 1), dtype=self.dtype)(y.mean((1, 2)))
        excited = nn.Dense(wide, dtype=self.dtype)(nn.silu(squeezed))
        y = self.layer(y * nn.sigmoid(excited)[:, None, None], features, 1)
        return x + y if x.shape == y.shape else y


class DenseNet(Net):
    """DenseNet-121 (Huang et al. 2016): the norm stands before its convolution."""

    blocks: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of the classes."""
        x = self.layer(x, 2 * self.growth, 7, 2, act=nn.relu)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for block, count in enumerate(self.blocks):
            if block:
                x = self.conv(self.active(x), x.shape[-1] // 2, 1)
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(count):
                y = self.conv(self.active(x), 4 * self.growth, 1)
                y = self.conv(self.active(y), self.growth, 3)
                x = jnp.concatenate([x, y], -1)
        return self.scores(self.active(x))

    def active(self, x: jax.Array) -> jax.Array:
        """The norm and a relu."""
        return nn.relu(self.norm()(x))


class Critic(Net):
    """A value of states and actions, by five layers, as in reinforcement learning."""

    width: int = 1024
    depth: int = 5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """A value for each row."""
        for _ in range(self.depth):
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(self.norm()(x))
        return nn.Dense(1, dtype=self.dtype)(x)


class UNet(Net):
    """U-Net (Ronneberger et al. 2015) on padded images: a mask for every layer."""

    width: int = 64
    depth: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """A score of each pixel."""
        known = []
        for level in range(self.depth):
            x = self.two_layers(x, mask, self.width * 2**level)
            known.append((x, mask))
            x, mask = nn.max_pool(x, (2, 2), (2, 2)), mask[:, ::2, ::2]
        x = self.two_layers(x, mask, self.width * 2**self.depth)
        for level, (skip, mask) in reversed(list(enumerate(known))):
            wide = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "nearest")
            up = self.conv(wide, skip.shape[-1], 2)
            x = jnp.concatenate([skip, up], -1)
            x = self.two_layers(x, mask, self.width * 2**level)
        return self.conv(x, 1, 1)

    def two_layers(self, x: jax.Array, mask: jax.Array, features: int) -> jax.Array:
        """Two convolutions, their norms and relus; padding is 0 behind each."""
        for _ in range(2):
            y = self.norm()(self.conv(x, features, 3), mask=mask)
            x = jnp.where(mask, nn.relu(y), 0)
        return x


NETWORKS: dict[str, type[Net]] = {
    "ResNet-50": ResNet,
    "MobileNetV2": MobileNet,
    "EfficientNet-B0": EfficientNet,
    "DenseNet-121": DenseNet,
    "critic": Critic,
    "U-Net": UNet,
}
