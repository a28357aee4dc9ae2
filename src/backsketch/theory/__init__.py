"""The closed forms: pure functions of tensors and numbers, no ``torch.nn``."""

from backsketch.theory import variance as variance
from backsketch.theory.variance import horvitz_thompson as horvitz_thompson
from backsketch.theory.variance import joint_inclusion_systematic as joint_inclusion_systematic
from backsketch.theory.variance import low_rank as low_rank
from backsketch.theory.variance import minimal_sampling as minimal_sampling
from backsketch.theory.variance import systematic as systematic
