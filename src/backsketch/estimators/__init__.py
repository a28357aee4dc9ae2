"""The estimators: each file holds one frozen dataclass, its mathematics and its proof of unbiasedness."""

from backsketch.estimators.base import Estimator as Estimator
from backsketch.estimators.base import Sketch as Sketch
from backsketch.estimators.bilinear import Bilinear as Bilinear
from backsketch.estimators.columns import Columns as Columns
from backsketch.estimators.elements import Elements as Elements
from backsketch.estimators.exact import Exact as Exact
from backsketch.estimators.float8 import Float8 as Float8
from backsketch.estimators.int8 import Int8 as Int8
from backsketch.estimators.low_rank import LowRank as LowRank
from backsketch.estimators.projection import Projection as Projection
from backsketch.estimators.quantized import Quantized as Quantized
from backsketch.estimators.rows import Rows as Rows
from backsketch.estimators.spec import parse as parse
from backsketch.estimators.split import Split as Split
from backsketch.estimators.stored_rows import StoredRows as StoredRows
