"""SL-SAM: SAM on a sparse, drawn set of layers."""

from collections.abc import Callable
from collections.abc import Hashable

import keras

from keras_slsam import samplers
from keras_slsam.optimizers.sharpness_aware import SharpnessAware

_SAMPLERS = {
    "bandit": samplers.Bandit,
    "proportional": samplers.Proportional,
    "uniform": samplers.Uniform,
    "all": samplers.All,
}


@keras.saving.register_keras_serializable("keras_slsam")
class SLSAM(SharpnessAware):
    """Sparse-layer SAM: SAM in which only some arms take part in a step.

    An *arm* is a variable, a layer or a block. Each step draws the active arms,
    computes their gradients only, perturbs them only, and updates them only: an
    inactive variable keeps its value, its moments and its step count, and gets no
    weight decay. The gradients of the inactive arms are not computed. The sampler
    learns from the gradient norms which arms to draw more often.

    With `single_step=True` (SL-SAM with S2-SAM) one forward and one backward pass
    are enough: an active variable is perturbed along the gradient that was last
    applied to it, normalised over the active variables that have one, and a
    variable that is active for the first time is not perturbed; the sampler is
    fed with the norms of the gradients of this one pass. That the two methods
    combine is the papers', this rule is ours.

    As only a share of the variables moves in a step, the learning rate should be
    higher than the base optimizer's own.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: What `keras.optimizers.get` takes, see `keras_slsam.SAM`.
        rho: Float >= 0, the radius of the perturbation.
        active_fraction: Float in (0, 1], the expected share of active arms. 0.2
            unless given; not with a `Sampler` object, which brings its own.
        sampler: `"bandit"` (the paper's), `"proportional"`, `"uniform"`, `"all"`,
            or a `keras_slsam.samplers.Sampler`.
        arms: What is switched on or off together: `"variable"` (the authors'
            code), `"layer"` (the variables of one Keras layer), `"block"` (those
            of a top-level layer of the model, like a transformer block), or a
            function from a `keras.Variable` to a hashable key. A function is saved by
            its name: see `keras.saving.register_keras_serializable`.
        single_step: bool, whether to combine with S2-SAM.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        seed: int, or `None` for a fresh one. The same seed draws the same arms on
            every backend. Not with a `Sampler` object, which brings its own.
        name: String, the optimizer's name.
        ascent_fraction: Float in (0, 1], the share of a batch's rows, the first ones,
            from which the first pass computes the perturbation. Below 1 loss, metrics
            and BatchNormalization are those of the second pass, which sees the whole
            batch at the perturbed weights, and a step costs less: at 0.25,
            1.25 (2 + a) instead of 2 (2 + a).

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> optimizer = keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)
    >>> len(optimizer.arms)
    2

    Reference:
        Cheng et al., arXiv 2602.09395 (SL-SAM); Ji et al., NeurIPS 2024 (S2-SAM).
    """

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str | dict | None = None,
        rho: float = 0.01,
        active_fraction: float | None = None,
        sampler: str | samplers.Sampler = "bandit",
        arms: str | Callable[[keras.Variable], Hashable] = "variable",
        single_step: bool = False,
        adaptive: bool = False,
        seed: int | None = None,
        name: str = "slsam",
        *,
        ascent_fraction: float = 1.0,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=_get_sampler(sampler, active_fraction, seed),
            arms=arms,
            single_step=single_step,
            ascent_fraction=ascent_fraction,
            name=name,
        )
        self.active_fraction = (
            None if active_fraction is None else float(active_fraction)
        )
        self.seed = None if seed is None else int(seed)
        self._sampler_name = sampler if isinstance(sampler, str) else None

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "active_fraction": self.active_fraction,
            "sampler": self._sampler_name or serialize(self.sampler),
            "arms": serialize(self._grouping),
            "single_step": self.single_step,
            "ascent_fraction": self.ascent_fraction,
            "seed": self.seed,
        }


def _get_sampler(sampler, active_fraction, seed):
    if isinstance(sampler, samplers.Sampler):
        given = {"active_fraction": active_fraction, "seed": seed}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(
                    f"Argument `{argument}` of `SLSAM` goes to the sampler that "
                    "`SLSAM` makes; a `Sampler` object brings its own. "
                    f"Received: {argument}={value!r}, sampler={sampler!r}. Give "
                    f"`{argument}` to the sampler."
                )
        return sampler
    if not isinstance(sampler, str) or sampler not in _SAMPLERS:
        raise ValueError(
            f"Argument `sampler` of `SLSAM` must be one of {sorted(_SAMPLERS)} or a "
            f"`keras_slsam.samplers.Sampler`. Received: sampler={sampler!r}"
        )
    fraction = 0.2 if active_fraction is None else active_fraction
    if sampler == "all":
        # The dense limit: its arguments are checked like the others'.
        samplers.Uniform(fraction, seed)
        return samplers.All()
    return _SAMPLERS[sampler](fraction, seed=seed)
