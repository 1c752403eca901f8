"""SL-SAM: SAM on the layers that are drawn in each step."""

from collections.abc import Callable
from collections.abc import Hashable

import keras

from keras_slsam import arguments
from keras_slsam import ascents
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
    """Sparse-layer SAM: SAM on only some arms in each step.

    An *arm* is a variable, a layer or a block. Each step draws the active arms, and
    computes gradients for, perturbs and updates only these. The gradients of inactive
    arms are not computed. An inactive variable keeps its value, moments and step count,
    and gets no weight decay. The sampler learns from the gradient norms which arms to
    draw more often.

    With `single_step=True` (SL-SAM with S2-SAM), one forward and one backward pass are
    enough. An active variable is perturbed along the gradient that was last applied to
    it, normalised over the active variables that have one. A variable that is active
    for the first time is not perturbed. The sampler learns from the gradient norms of
    this one pass. The papers say that the two methods combine. This rule for combining
    them is specific to this package.

    Only a share of the variables changes in a step, so tune the learning rate again.
    Sweep from a quarter of the base optimizer's to four times it, see docs/choosing.md.

    Do not use it for models with steps of a few milliseconds, where drawing and
    skipping take longer than the work that they save, nor if the loss must fall as fast
    per step as with the base optimizer. With clean labels and short training, or on
    text, it was no better than the base optimizer. For a pretrained image network with
    wrong labels a moving average of the weights did better, at less cost. The defaults
    (`rho=0.01`, `"bandit"`) are the paper's: a larger `rho` and `"proportional"` did
    better. See docs/choosing.md.

    The model needs the matching train step: `keras_slsam.sharpness_aware(model)`.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts, see
            `keras_slsam.SAM`.
        rho: Float >= 0, or a schedule, the radius of the perturbation, see
            `keras_slsam.SAM`.
        active_fraction: Float in (0, 1], the expected share of active arms, by default
            0.2, or a `LearningRateSchedule` or a function from the number of the draw.
            Not allowed with a `Sampler` object, which has its own.
        sampler: `"bandit"` (the paper's), `"proportional"`, `"uniform"`, `"all"`, or a
            `keras_slsam.samplers.Sampler`.
        arms: How variables are grouped into arms: `"variable"` (as in the authors'
            code), `"layer"` (the variables of one Keras layer), `"block"` (the
            variables of a top-level layer of the model, such as a transformer block),
            or a function from a `keras.Variable` to a hashable key. A function is saved
            by its name, see `keras.saving.register_keras_serializable`.
        single_step: bool, whether to combine with S2-SAM.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        seed: int, or `None` for a fresh seed. The same seed draws the same arms on
            every backend. Not allowed with a `Sampler` object, which has its own.
        name: String, the optimizer's name.
        ascent_fraction: Float in [1e-6, 1], the share of a batch's first rows,
            from which the first pass computes the perturbation. Below 1 loss, metrics
            and BatchNormalization are those of the second pass, which sees the whole
            batch at the perturbed weights, and a step costs less: at 0.25,
            0.625 of what it costs otherwise.
        always_active: Which arms are active in every step, for example a new head: a
            regular expression that is searched for in `variable.path`, or a function
            from a `keras.Variable` to a bool. An arm with a chosen variable is not
            drawn, and `active_fraction` is the share of the others. `"head"` also
            chooses all of `multi_head_attention`, and `"(^|/)head/"` does not. By
            default `None`.
        ascent: `keras_slsam.ascents.Ascent`, the direction of the perturbation. By
            default the gradient of the batch. Leave it out with `single_step`.

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
        rho: arguments.Number = 0.01,
        active_fraction: arguments.Number | None = None,
        sampler: str | samplers.Sampler = "bandit",
        arms: str | Callable[[keras.Variable], Hashable] = "variable",
        single_step: bool = False,
        adaptive: bool = False,
        seed: int | None = None,
        name: str = "slsam",
        *,
        ascent_fraction: float = 1.0,
        always_active: str | Callable[[keras.Variable], bool] | None = None,
        ascent: ascents.Ascent | None = None,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            adaptive=adaptive,
            sampler=_get_sampler(sampler, active_fraction, seed),
            arms=arms,
            always_active=always_active,
            single_step=single_step,
            ascent=ascent,
            ascent_fraction=ascent_fraction,
            name=name,
        )
        if not (active_fraction is None or callable(active_fraction)):
            active_fraction = float(active_fraction)
        self.active_fraction = active_fraction
        self.seed = None if seed is None else int(seed)
        self._sampler_name = sampler if isinstance(sampler, str) else None

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "active_fraction": serialize(self.active_fraction),
            "sampler": self._sampler_name or serialize(self.sampler),
            "arms": serialize(self._grouping),
            "always_active": serialize(self.always_active),
            "single_step": self.single_step,
            "ascent_fraction": self.ascent_fraction,
            "ascent": None if self.single_step else serialize(self.ascent),
            "seed": self.seed,
        }


def _get_sampler(sampler, active_fraction, seed):
    if isinstance(sampler, samplers.Sampler):
        given = {"active_fraction": active_fraction, "seed": seed}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(
                    f"Argument `{argument}` of `SLSAM` is not allowed with a "
                    "`Sampler` object, which has its own. "
                    f"Received: {argument}={value!r}, sampler={sampler!r}. Pass "
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
        # `All` takes no arguments, but they are checked as for the others.
        samplers.Uniform(fraction, seed)
        return samplers.All()
    return _SAMPLERS[sampler](fraction, seed=seed)
