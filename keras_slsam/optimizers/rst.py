"""RST: SAM in randomly chosen steps."""

import keras
from keras import ops

from keras_slsam import samplers
from keras_slsam import threefry
from keras_slsam.gradients import backend
from keras_slsam.optimizers import settings
from keras_slsam.optimizers.sharpness_aware import SharpnessAware


@keras.saving.register_keras_serializable("keras_slsam")
class RST(SharpnessAware):
    """Randomized sharpness-aware training: SAM in a share of the steps.

    Each step is a SAM step with probability `probability`, and otherwise a plain step
    of the base optimizer. Use it as a baseline for `SLSAM`.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts, see
            `keras_slsam.SAM`.
        rho: Float >= 0, the radius of the perturbation.
        probability: Float in [0, 1], the probability of a SAM step.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        seed: int, or `None` for a fresh seed. The same seed chooses the same steps on
            every backend.
        name: String, the optimizer's name.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> optimizer = keras_slsam.RST("adamw", probability=0.5, seed=0)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)

    Reference:
        Zhao et al., "Randomized sharpness-aware training for boosting
        computational efficiency in deep learning", arXiv 2203.09962.
    """

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str | dict | None = None,
        rho: float = 0.05,
        probability: float = 0.5,
        adaptive: bool = False,
        seed: int | None = None,
        name: str = "rst",
    ) -> None:
        probability = settings.checked_probability(probability)
        first_seed = threefry.make_seed(seed, "RST")
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=samplers.All(),
            name=name,
        )
        self._probability = settings.add(self, "probability", probability)
        self.seed = None if seed is None else int(seed)
        self._seed_state = self.add_variable((2,), dtype="int32", name="seed_state")
        self._seed_state.assign([first_seed, 0])

    @property
    def probability(self):
        """The probability of a SAM step, a scalar `keras.Variable`.

        You can set it between two steps, like the learning rate.
        """
        return self._probability

    @probability.setter
    def probability(self, probability):
        self._probability.assign(settings.checked_probability(probability))

    def _draw_ascent(self):
        (unit,) = ops.unstack(threefry.draw(self._seed_state, 1))
        perturbed = unit < backend.read(self._probability)
        return ops.logical_and(perturbed, backend.read(self._rho) > 0)

    def get_config(self):
        return {
            **super().get_config(),
            "probability": settings.as_float(self._probability),
            "seed": self.seed,
        }
