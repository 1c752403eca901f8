"""RST: SAM in randomly chosen steps."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam import samplers
from keras_slsam import threefry
from keras_slsam.gradients import backend
from keras_slsam.optimizers import settings
from keras_slsam.optimizers.sharpness_aware import SharpnessAware


@keras.saving.register_keras_serializable("keras_slsam")
class RST(SharpnessAware):
    """Randomized sharpness-aware training: SAM in a share of the steps.

    Each step is a SAM step with probability `probability`, and otherwise a plain step
    of the base optimizer. Use it as a baseline for `SLSAM`. Do not use it if every step
    should take the same time, nor with clean labels and short training, where it was no
    better than the base optimizer at equal time. It was not measured with wrong labels.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts, see
            `keras_slsam.SAM`.
        rho: Float >= 0, or a schedule, the radius of the perturbation, see
            `keras_slsam.SAM`.
        probability: Float in [0, 1], the probability of a SAM step, or a schedule.
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
        rho: arguments.Number = 0.05,
        probability: arguments.Number = 0.5,
        adaptive: bool = False,
        seed: int | None = None,
        name: str = "rst",
    ) -> None:
        first_seed = threefry.make_seed(seed, "RST")
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=samplers.All(),
            name=name,
        )
        self._probability = settings.Setting(
            self, "probability", probability, _check_probability
        )
        self.seed = None if seed is None else int(seed)
        # TensorFlow gives all workers the same initial values.
        self._seed_state = self.add_variable(
            (2,),
            lambda shape, dtype: ops.convert_to_tensor([first_seed, 0], dtype),
            dtype="int32",
            name="seed_state",
        )

    @property
    def probability(self):
        """The probability of a SAM step, a scalar `keras.Variable`.

        You can set it between two steps, like the learning rate.
        """
        return self._probability.variable

    @probability.setter
    def probability(self, probability):
        self._collect_state()
        self._probability.set(probability)

    def _draw_ascent(self):
        ascends, rho = super()._draw_ascent()
        self._probability.follow(self._iterations)
        (unit,) = ops.unstack(threefry.draw(self._seed_state, 1))
        drawn = unit < backend.read(self.probability)
        return backend.both(ascends, drawn), rho

    def get_config(self):
        return {
            **super().get_config(),
            "probability": self._probability.get_config(),
            "seed": self.seed,
        }


def _check_probability(probability):
    return arguments.check_number(
        "RST",
        "probability",
        probability,
        "the share of SAM steps",
        lambda number: 0 <= number <= 1,
        "a number in [0, 1]",
    )
