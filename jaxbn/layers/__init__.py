"""Batch norms as pure functions, `Layer(init, apply, ...)`."""

from jaxbn.layers._conditional import conditional as conditional
from jaxbn.layers._domain import domain as domain
from jaxbn.layers._ghost import ghost as ghost
from jaxbn.layers._in_place import in_place as in_place
from jaxbn.layers._layer import Layer as Layer
from jaxbn.layers._renorm import RenormStats as RenormStats
from jaxbn.layers._renorm import renorm as renorm
from jaxbn.layers._standard import standard as standard
from jaxbn.layers._streaming import streaming as streaming
