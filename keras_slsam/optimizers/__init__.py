"""The public optimizers. Each chooses the active arms and the direction of the ascent.

| optimizer | active arms | the ascent follows |
| --- | --- | --- |
| `SAM` | all | this batch's gradient |
| `S2SAM` | all | the last step's gradient |
| `SLSAM` | drawn by a sampler | this batch's gradient |
| `SLSAM(single_step=True)` | drawn by a sampler | the gradient last applied |
| `RST` | all | this batch's gradient, or none, at random |
"""

from keras_slsam.optimizers.rst import RST
from keras_slsam.optimizers.s2sam import S2SAM
from keras_slsam.optimizers.sam import SAM
from keras_slsam.optimizers.sharpness_aware import SharpnessAware
from keras_slsam.optimizers.slsam import SLSAM

__all__ = ["RST", "S2SAM", "SAM", "SLSAM", "SharpnessAware"]
