"""Statistics over a data set: recalibration, adaptation to a domain, and drift."""

from jaxbn.population._adapt import adapt as adapt
from jaxbn.population._collect import collect as collect
from jaxbn.population._drift import Drift as Drift
from jaxbn.population._drift import drift as drift
from jaxbn.population._recalibrate import recalibrate as recalibrate
from jaxbn.population._summary import summary as summary
