"""CPU kernels for the sums, as operations in two forms."""

from jaxbn._kernels.sums import Chosen as Chosen
from jaxbn._kernels.sums import central_sums as central_sums
from jaxbn._kernels.sums import choose as choose
from jaxbn._kernels.sums import cotangent_sums as cotangent_sums
from jaxbn._kernels.sums import first_pass as first_pass
from jaxbn._kernels.sums import for_dtypes as for_dtypes
from jaxbn._kernels.sums import input_cotangent as input_cotangent
from jaxbn._kernels.sums import require_implementation as require_implementation
from jaxbn._kernels.sums import unless_for_accelerators as unless_for_accelerators
