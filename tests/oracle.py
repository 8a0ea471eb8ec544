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
