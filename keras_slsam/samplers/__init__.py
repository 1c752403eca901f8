"""Samplers: the rules for drawing the active arms of a step.

An *arm* is a group of variables that is active or inactive as a whole. A sampler draws
the mask of a step, and learns from the gradient norms that it finds. The budget is
`active_fraction`, the expected share of active arms.
"""

from keras_slsam.samplers.bandit import Bandit
from keras_slsam.samplers.dense import All
from keras_slsam.samplers.hold import Hold
from keras_slsam.samplers.proportional import Proportional
from keras_slsam.samplers.sampler import Arm
from keras_slsam.samplers.sampler import Sampler
from keras_slsam.samplers.uniform import Uniform

__all__ = ["All", "Arm", "Bandit", "Hold", "Proportional", "Sampler", "Uniform"]
