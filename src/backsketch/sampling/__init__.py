"""Inclusion probabilities, fixed-size designs, and the only randomness of the library.

Every random number comes from one private counter: the opaque operator ``next_seed`` turns
``(seed, rank, counter)`` into a 64-bit seed, and everything else (:func:`draw`, :func:`uniform_like`,
:func:`signs`) is a *pure function* of that seed. A compiler may therefore move, repeat or merge the
pure part freely; only ``next_seed`` is stateful, it is opaque, and it takes tensor arguments so that
it stays in the graph, forward or backward, where it was written. Plain ``torch.rand`` inside an
``autograd.Function`` does not have this property: the min-cut partitioner redraws it in the backward
pass and silently pairs row i of one operand with row j of another.

The user's global random stream is never read or advanced.
"""

from backsketch.sampling.design import DESIGNS as DESIGNS
from backsketch.sampling.design import ROW_DESIGNS as ROW_DESIGNS
from backsketch.sampling.design import inclusion_probabilities as inclusion_probabilities
from backsketch.sampling.design import is_readable as is_readable
from backsketch.sampling.design import num_kept as num_kept
from backsketch.sampling.design import num_live_kept as num_live_kept
from backsketch.sampling.operators import Sample as Sample
from backsketch.sampling.operators import draw as draw
from backsketch.sampling.operators import draw_live as draw_live
from backsketch.sampling.operators import key_of as key_of
from backsketch.sampling.operators import next_seed as next_seed
from backsketch.sampling.operators import operator as operator
from backsketch.sampling.operators import row_norms as row_norms
from backsketch.sampling.operators import signs as signs
from backsketch.sampling.operators import uniform_like as uniform_like
from backsketch.sampling.stream import Keys as Keys
from backsketch.sampling.stream import get_rng_state as get_rng_state
from backsketch.sampling.stream import keyed as keyed
from backsketch.sampling.stream import seed as seed
from backsketch.sampling.stream import set_rng_state as set_rng_state
