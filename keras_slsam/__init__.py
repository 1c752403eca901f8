"""Sharpness-aware fine-tuning in Keras 3, at less than the usual cost."""

from keras_slsam import analysis
from keras_slsam import ascents
from keras_slsam import callbacks
from keras_slsam import samplers
from keras_slsam.fit import SAMTrainStep
from keras_slsam.fit import sharpness_aware
from keras_slsam.optimizers import RST
from keras_slsam.optimizers import S2SAM
from keras_slsam.optimizers import SAM
from keras_slsam.optimizers import SLSAM
from keras_slsam.stateless import get_state
from keras_slsam.stateless import set_state
from keras_slsam.stateless import stateless_step
from keras_slsam.training import step

__version__ = "0.1.0"

__all__ = [
    "RST",
    "S2SAM",
    "SAM",
    "SLSAM",
    "SAMTrainStep",
    "analysis",
    "ascents",
    "callbacks",
    "get_state",
    "samplers",
    "set_state",
    "sharpness_aware",
    "stateless_step",
    "step",
]
