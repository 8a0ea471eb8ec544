"""Other libraries' call signatures on jaxbn's verbs."""

from jaxbn.interop import tf_nn as tf_nn
