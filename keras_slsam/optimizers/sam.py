"""SAM: sharpness-aware minimization with all arms, the dense baseline."""

import keras

from keras_slsam import arguments
from keras_slsam import ascents
from keras_slsam import samplers
from keras_slsam.optimizers.sharpness_aware import SharpnessAware


@keras.saving.register_keras_serializable("keras_slsam")
class SAM(SharpnessAware):
    """Sharpness-aware minimization around any Keras optimizer.

    Perturbs the weights uphill by `rho` along the gradient, computes the gradient
    there, and passes it to `base_optimizer`, which applies it to the original weights.
    A step costs two forward and two backward passes. `S2SAM` and `SLSAM` cost less.

    Do not use it if the labels are clean and training is short: at equal time the base
    optimizer alone is then at least as good. For a pretrained image network a moving
    average of the weights did as well, at half of the cost. With wrong labels, a
    network from scratch and a tuned `rho` it memorises far fewer of them, see
    docs/choosing.md.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts: the optimizer that
            applies the gradient. Set learning rate, schedule, weight decay, clipping,
            EMA and gradient accumulation as its arguments.
        rho: Float >= 0, the radius of the perturbation, or a schedule: a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function from the
            number of the step to a scalar tensor. You can set `optimizer.rho` between
            two steps unless it follows a schedule. In a step where it is 0 only one
            pass is executed.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM, arXiv
            2102.11600). ASAM needs a `rho` about ten times larger.
        name: String, the optimizer's name.
        ascent_fraction: Float in [1e-6, 1], the share of a batch's first rows,
            from which the first pass computes the perturbation. Below 1 loss, metrics
            and BatchNormalization are those of the second pass, which sees the whole
            batch at the perturbed weights, and a step costs less: at 0.25,
            1.25 times the passes of the base optimizer.
        ascent: `keras_slsam.ascents.Ascent`, the direction of the perturbation. By
            default the gradient of the batch.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> optimizer = keras_slsam.SAM(keras.optimizers.AdamW(1e-3), rho=0.05)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)

    Reference:
        Foret et al., "Sharpness-aware minimization for efficiently improving
        generalization", arXiv 2010.01412, algorithm 1.
    """

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str | dict | None = None,
        rho: arguments.Number = 0.05,
        adaptive: bool = False,
        name: str = "sam",
        *,
        ascent_fraction: float = 1.0,
        ascent: ascents.Ascent | None = None,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=samplers.All(),
            ascent=ascent,
            ascent_fraction=ascent_fraction,
            name=name,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "ascent_fraction": self.ascent_fraction,
            "ascent": keras.saving.serialize_keras_object(self.ascent),
        }
