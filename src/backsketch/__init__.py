"""backsketch: unbiased, cheaper backward passes for PyTorch models.

A tour::

    import backsketch as bs

    report = bs.sketch_(model, bs.Int8())             # in place; the optimizer, the loop, the
    print(report)                                    # checkpoints: nothing else changes

    loss_fn(model(x), y).backward()                  # unbiased gradients, at a fraction of the work

    with bs.exact(model):                            # exact gradients inside the block
        ...
    bs.restore_(model)                               # exactly as before

    bs.sketch_(model, {"head": None, "blocks.*": bs.Int8(sketch=bs.Rows(keep=0.5))})   # the first match wins
    bs.sketch_(model, bs.Quantized(bits=4))          # memory: inputs, activations, norms in 4 bits
    print(bs.saved_bytes(model, x))                  # what is kept for the backward, by module
    bs.testing.check_unbiased(model, x)              # see for yourself
    print(bs.variance(model, batches, loss_fn))      # what each site adds to the gradient's variance
"""

from backsketch import ops as ops
from backsketch import testing as testing
from backsketch import theory as theory
from backsketch.convert import restore_ as restore_
from backsketch.convert import sketch_ as sketch_
from backsketch.estimators import Columns as Columns
from backsketch.estimators import Elements as Elements
from backsketch.estimators import Estimator as Estimator
from backsketch.estimators import Exact as Exact
from backsketch.estimators import Float8 as Float8
from backsketch.estimators import Int8 as Int8
from backsketch.estimators import LowRank as LowRank
from backsketch.estimators import Projection as Projection
from backsketch.estimators import Quantized as Quantized
from backsketch.estimators import Rows as Rows
from backsketch.estimators import Split as Split
from backsketch.estimators import StoredRows as StoredRows
from backsketch.estimators import parse as parse
from backsketch.memory import SavedBytes as SavedBytes
from backsketch.memory import peak_bytes as peak_bytes
from backsketch.memory import saved_bytes as saved_bytes
from backsketch.nn import exact as exact
from backsketch.planning import Auto as Auto
from backsketch.planning import Controller as Controller
from backsketch.planning import Ledger as Ledger
from backsketch.planning import Plan as Plan
from backsketch.planning import Profile as Profile
from backsketch.planning import SpeedGuard as SpeedGuard
from backsketch.planning import profile as profile
from backsketch.planning import variance as variance
from backsketch.regions import Mask as Mask
from backsketch.regions import Region as Region
from backsketch.report import Report as Report
from backsketch.sampling import get_rng_state as get_rng_state
from backsketch.sampling import seed as seed
from backsketch.sampling import set_rng_state as set_rng_state

__version__ = "0.1.0"
