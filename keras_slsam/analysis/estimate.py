"""A mean over random samples, with its standard error."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over random samples.

    Attributes:
        mean: Float.
        error: Float, the standard error of the mean, nan for one sample.
        samples: int, the number of samples.

    Example:

    >>> from keras_slsam import analysis
    >>> analysis.Estimate.of([1.0, 2.0, 3.0])
    Estimate(mean=2.0, error=0.577..., samples=3)
    """

    mean: float
    error: float
    samples: int

    @classmethod
    def of(cls, values, **more):
        """Returns the estimate from samples, a sequence of floats."""
        values = np.asarray(values, "float64")
        count = len(values)
        error = values.std(ddof=1) / count**0.5 if count > 1 else np.nan
        return cls(float(values.mean()), float(error), count, **more)
