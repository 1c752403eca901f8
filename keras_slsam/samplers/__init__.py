"""Samplers: which arms take part in a step.

An *arm* is a group of variables that is switched on or off together. A sampler
draws the mask of a step's active arms, and learns from the gradient norms that
the step found. The budget is `active_fraction`: the expected share of active
arms.
"""

from keras_slsam.samplers.all import All
from keras_slsam.samplers.bandit import Bandit
from keras_slsam.samplers.proportional import Proportional
from keras_slsam.samplers.sampler import Sampler
from keras_slsam.samplers.uniform import Uniform

__all__ = ["All", "Bandit", "Proportional", "Sampler", "Uniform"]
