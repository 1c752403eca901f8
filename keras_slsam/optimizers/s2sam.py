"""S2-SAM: SAM with a single pass per step."""

import keras

from keras_slsam import arguments
from keras_slsam import samplers
from keras_slsam.optimizers.sharpness_aware import SharpnessAware


@keras.saving.register_keras_serializable("keras_slsam")
class S2SAM(SharpnessAware):
    """Single-step SAM: as cheap as the base optimizer alone.

    Perturbs the weights along the gradient that the previous step applied, so one
    forward and one backward pass are enough. The first step is not perturbed. The
    reported loss and metrics are computed at the perturbed weights, because the step
    evaluates no others. Keeps one more tensor per weight, the last gradient.

    Do not use it with a large radius while a new head is random: the direction is that
    of another batch, and training may collapse. With clean labels and short training,
    or on text, it was no better than the base optimizer. With wrong labels the gain is
    gone after the last epoch, so keep the best one by validation data. It was better
    still with `use_ema=True`, `ema_momentum=0.95` and `ema_overwrite_frequency` set to
    the steps of an epoch in the base optimizer. See docs/choosing.md.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts, see
            `keras_slsam.SAM`.
        rho: Float >= 0, or a schedule, the radius of the perturbation, see
            `keras_slsam.SAM`.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        name: String, the optimizer's name.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> model.compile(optimizer=keras_slsam.S2SAM("sgd", rho=0.05), loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)

    Reference:
        Ji et al., "A single-step, sharpness-aware minimization is all you need to
        achieve efficient and accurate sparse training", NeurIPS 2024.
    """

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str | dict | None = None,
        rho: arguments.Number = 0.05,
        adaptive: bool = False,
        name: str = "s2sam",
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=samplers.All(),
            single_step=True,
            name=name,
        )
