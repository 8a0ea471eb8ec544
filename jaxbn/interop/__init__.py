"""Other libraries' call signatures on jaxbn's verbs, and what they need to know."""

from jaxbn.interop import optax as optax
from jaxbn.interop import tf_nn as tf_nn
