"""Batch norms as pairs of pure functions, `Layer(init, apply)`."""

from jaxbn.layers._layer import Layer as Layer
from jaxbn.layers._standard import standard as standard
