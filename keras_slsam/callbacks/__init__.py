"""Callbacks that show what a sharpness-aware training does."""

from keras_slsam.callbacks.arm_logger import ArmLogger
from keras_slsam.callbacks.sharpness_logger import SharpnessLogger
from keras_slsam.callbacks.trajectory import TrajectoryLogger

__all__ = ["ArmLogger", "SharpnessLogger", "TrajectoryLogger"]
