"""Measures of sharpness: how the loss changes around the weights of a trained model.

The eigenvalues, the density and the plots need the extra
`pip install keras-slsam[analysis]`.
"""

from keras_slsam.analysis import plots
from keras_slsam.analysis.estimate import Estimate
from keras_slsam.analysis.landscape import Line
from keras_slsam.analysis.landscape import Plane
from keras_slsam.analysis.landscape import loss_along_line
from keras_slsam.analysis.landscape import loss_plane
from keras_slsam.analysis.sharpness import accuracy_under_noise
from keras_slsam.analysis.sharpness import average_case_sharpness
from keras_slsam.analysis.sharpness import worst_case_sharpness
from keras_slsam.analysis.spectrum import Eigenvalues
from keras_slsam.analysis.spectrum import SpectralDensity
from keras_slsam.analysis.spectrum import Trace
from keras_slsam.analysis.spectrum import hessian_eigenvalues
from keras_slsam.analysis.spectrum import hessian_trace
from keras_slsam.analysis.spectrum import spectral_density

__all__ = [
    "Eigenvalues",
    "Estimate",
    "Line",
    "Plane",
    "SpectralDensity",
    "Trace",
    "accuracy_under_noise",
    "average_case_sharpness",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_along_line",
    "loss_plane",
    "plots",
    "spectral_density",
    "worst_case_sharpness",
]
