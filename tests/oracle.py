"""What the tests compare with: batch norm in NumPy and float64, from the formulas.

Every function takes the axes that are *reduced*, as NumPy does, and keeps them with
length 1, so that nothing here shares an idea with the library's handling of axes.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray


def _wide(array):
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def moments(x, reduced, weights=None) -> Moments:
    """Mean, variance and count with the reduced axes kept; 0 where nothing counts."""
    x = _wide(x)
    w = np.broadcast_to(_wide(1.0 if weights is None else weights), x.shape)
    x = np.where(w == 0, 0, x)
    n = w.sum(reduced, keepdims=True)
    safe = np.where(n == 0, 1, n)
    mean = (w * x).sum(reduced, keepdims=True) / safe
    var = (w * np.abs(x - mean) ** 2).sum(reduced, keepdims=True) / safe
    return Moments(mean, var, n)


def normalize(x, mean, var, scale=1.0, bias=0.0, epsilon=1e-5):
    """All vectors already broadcast against x."""
    return (_wide(x) - mean) / np.sqrt(var + epsilon) * scale + bias


def vjp(x, dy, reduced, scale=1.0, weights=None, epsilon=1e-5):
    """Cotangents of x, scale and bias (JAX's convention for complex numbers).

    By the chain rule through mean and variance, one step at a time, not by the closed
    form that the library uses.
    """
    x, dy = _wide(x), _wide(dy)
    m = moments(x, reduced, weights)
    w = np.broadcast_to(_wide(1.0 if weights is None else weights), x.shape)
    safe = np.where(m.count == 0, 1, m.count)
    delta = np.where((w == 0) & ~np.isfinite(x), 0, x - m.mean)
    inv = 1 / np.sqrt(m.var + epsilon)
    g = dy * scale
    d_inv = (g * delta).real.sum(reduced, keepdims=True)
    d_var = -0.5 * inv**3 * d_inv
    d_delta = g * inv
    d_mean = -d_delta.sum(reduced, keepdims=True)
    dx = d_delta + w / safe * (d_mean + 2 * d_var * delta.conj())
    d_scale = (dy * delta * inv).sum(reduced, keepdims=True)
    return dx, d_scale, dy.sum(reduced, keepdims=True)


def groups(x, group_of, weights=None, scale=1.0, bias=0.0, epsilon=1e-5):
    """Batch norm of each group of examples (the first axis); features are the last."""
    x, group_of = _wide(x), np.asarray(group_of)
    reduced = tuple(range(x.ndim - 1))
    w = np.broadcast_to(1.0 if weights is None else weights, x.shape)
    y, found = np.empty_like(x), {}
    for group in np.unique(group_of):
        own = group_of == group
        m = found[int(group)] = moments(x[own], reduced, w[own])
        y[own] = normalize(x[own], m.mean, m.var, epsilon=epsilon)
    return y * scale + bias, found


def renorm(x, mean, std, limits, weights=None, frozen=None, epsilon=1e-5):
    """Batch renormalization before scale and bias, its moments, and r and d.

    `frozen` are r and d to take instead: no derivative passes through them.
    """
    x = _wide(x)
    m = moments(x, tuple(range(x.ndim - 1)), weights)
    sigma = np.sqrt(m.var + epsilon)
    r = np.clip(sigma / std, 1 / limits[0], limits[0])
    d = np.clip((m.mean - mean) / std, -limits[1], limits[1])
    r, d = frozen or (r, d)
    return (x - m.mean) / sigma * r + d, m, (r, d)


def exponential(batches, weights, momentum):
    """Moments of all examples of all batches, the older ones weighing less."""
    age = np.arange(len(batches))[::-1]
    w = [np.broadcast_to(w, b.shape) for b, w in zip(batches, weights, strict=True)]
    share = [part / part[..., :1].sum() for part in w]  # each batch weighs 1
    shares = np.concatenate([s * momentum**a for s, a in zip(share, age, strict=True)])
    x = np.concatenate([_wide(b) for b in batches])
    return moments(x, tuple(range(x.ndim - 1)), shares)


def leaky_relu(y, slope=0.01):
    return np.where(y >= 0, y, slope * y)


def elu(y):
    return np.where(y > 0, y, np.expm1(np.minimum(y, 0)))
