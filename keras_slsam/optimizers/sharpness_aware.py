"""The base of all our optimizers: a wrapper around a Keras optimizer."""

import copy
import numbers
import warnings

import keras
from keras import ops

from keras_slsam import grouping
from keras_slsam import samplers
from keras_slsam.base_step import BaseStep
from keras_slsam.gradients import backend
from keras_slsam.optimizers import settings
from keras_slsam.optimizers.base_optimizer import check_can_skip_arms
from keras_slsam.optimizers.base_optimizer import get_base_optimizer
from keras_slsam.optimizers.saving import Stateful
from keras_slsam.optimizers.wrapper import Wrapper
from keras_slsam.selection import Selection

# What an optimizer is made with, and keeps.
_FIXED = {
    *("active_fraction", "adaptive", "ascent_fraction", "base_optimizer", "sampler"),
    *("seed", "single_step"),
}


class SharpnessAware(Stateful, Wrapper):
    """Base class of `SAM`, `S2SAM`, `SLSAM` and `RST`.

    Wraps `base_optimizer`, which makes the update, and holds the rest of what a step
    needs: which arms are active, and what the ascent is along. The step itself is
    `keras_slsam.step`. It needs the model, which Keras does not hand to an optimizer,
    so the model needs the matching train step.

    Learning rate, schedule, `iterations`, clipping, weight decay, EMA and
    constraints are the base optimizer's. With arms switched off, clipping by a
    global norm is over the active variables, schedules and EMA follow the global
    steps, and moments, step counts and weight decay a variable's own updates.

    Attributes:
        ascends: bool, whether `rho` was set to more than 0. A step that was compiled
            then has both passes, without a condition.

    Args:
        base_optimizer: What `keras.optimizers.get` takes.
        rho: Float >= 0, the radius of the perturbation.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        sampler: `keras_slsam.samplers.Sampler`, draws the active arms.
        arms: `"variable"`, `"layer"`, `"block"`, or a function from a variable to
            a hashable key.
        single_step: bool, whether the ascent is along the gradient of the last
            step, so that one pass is enough.
        ascent_fraction: Float in (0, 1], the share of a batch's rows that the ascent's
            gradient is computed from.
        name: String, the optimizer's name.

    Raises:
        ValueError: if an argument is out of its range, or the base optimizer
            cannot be used.
    """

    def __init__(
        self,
        base_optimizer,
        rho,
        adaptive,
        sampler,
        arms="variable",
        single_step=False,
        ascent_fraction=1.0,
        name=None,
    ):
        owner = type(self).__name__
        rho = settings.checked_rho(owner, rho)
        ascent_fraction = settings.checked_fraction(owner, ascent_fraction)
        if single_step and ascent_fraction < 1:
            raise ValueError(
                f"Argument `ascent_fraction` of `{owner}` must be 1 with "
                "`single_step=True`: the ascent then takes no pass of its own. "
                f"Received: ascent_fraction={ascent_fraction!r}"
            )
        switches = {"adaptive": adaptive, "single_step": single_step}
        for argument, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(
                    f"Argument `{argument}` of `{owner}` must be True or False. "
                    f"Received: {argument}={value!r}"
                )
        if isinstance(base_optimizer, SharpnessAware):
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}` is a `keras_slsam` optimizer "
                "already; perturbations do not nest. Give it a Keras optimizer, like "
                '`keras.optimizers.AdamW(2e-5)` or "adamw". '
                f"Received: base_optimizer={base_optimizer!r}"
            )
        base_optimizer = get_base_optimizer(owner, base_optimizer)
        grouping.validate(arms)
        super().__init__(base_optimizer, name)
        self._rho = settings.add(self, "rho", rho)
        self.ascends = rho > 0
        self.adaptive = adaptive
        self.sampler = sampler
        self.single_step = single_step
        self.ascent_fraction = ascent_fraction
        self._grouping = arms
        self._all_active = type(sampler) is samplers.All
        accumulates = bool(base_optimizer.gradient_accumulation_steps)
        if not self._all_active or (single_step and accumulates):
            check_can_skip_arms(owner, base_optimizer)

    def __setattr__(self, name, value):
        if name in _FIXED and name in vars(self):
            owner = type(self).__name__
            raise ValueError(
                f"`{name}` of `{owner}` cannot be replaced: arms, state and compiled "
                f"steps are made with it. Received: {name}={value!r}. Make a new "
                f"`{owner}`, and call `model.compile` with it."
            )
        super().__setattr__(name, value)

    def build(self, variables):
        """Makes the state: the sampler's, the base optimizer's and ours.

        State that was loaded before is put into it.

        Args:
            variables: List of `keras.Variable`s, the model's trainable ones. Without
                any, as Keras' reader of `.h5` files has them, nothing is built yet.

        Raises:
            ValueError: if `base_optimizer` or the sampler belongs to others already,
                if `arms` returns something unhashable, or if loaded state does not
                fit.
        """
        if self.built or not variables:
            return
        owner = type(self).__name__
        if self.base_optimizer.built:
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}` has been built for other "
                f"variables already. Received: {self.base_optimizer.name!r}. Make a "
                "new one for each model and each `compile`."
            )
        if any(getattr(v, "overwrite_with_gradient", False) for v in variables):
            raise ValueError(
                f"`{owner}` does not support float8 training: its scales are not "
                "weights that can be perturbed. Use another dtype policy."
            )
        if getattr(self.sampler, "_in_use", False):
            raise ValueError(
                f"Argument `sampler` of `{owner}` belongs to another optimizer. "
                f"Received: {self.sampler!r}. Make a new one for each optimizer."
            )
        low = self.sampler.min_probability
        if not isinstance(low, numbers.Real) or not 0 <= low <= 1:
            raise ValueError(
                f"`min_probability` of the sampler of `{owner}` must be a number in "
                f"[0, 1], 0 if it is not known. Received: {low!r} of {self.sampler!r}"
            )
        # First what may be refused: a failed call leaves everything as it was.
        arms = grouping.group(variables, self._grouping)
        num_arms = max(arms) + 1
        if num_arms == 1 and not self._all_active:
            warnings.warn(
                f"`{owner}` found a single arm, which is active in every step: nothing "
                f"is saved. Received: arms={self._grouping!r}.",
                stacklevel=2,
            )
        if self._restored is not None:
            self._check_layout(self._restored[1], {**self._layout(), "arms": arms})
        # Not Keras' `build`, which would make the base optimizer's averages and sums
        # of gradients a second time.
        self._trainable_variables.extend(variables)
        self.built = True
        self.base_optimizer.build(variables)
        with keras.name_scope(self.name):
            self.sampler.build(num_arms)
        self.sampler._in_use = True
        members = [
            [i for i, arm in enumerate(arms) if arm == number]
            for number in range(num_arms)
        ]
        dtype = keras.backend.result_type("float32", *(v.dtype for v in variables))
        self._selection = Selection(
            self.sampler, arms, members, self._all_active, dtype, owner=self
        )
        self._base_step = BaseStep(
            self.base_optimizer,
            variables,
            num_arms,
            dtype,
            all_active=self._all_active,
            remember=self.single_step,
            owner=self,
        )
        # The sampler's state is saved with the optimizer's. Keras has no public name
        # for that, and a `LossScaleOptimizer` around this one switches the tracking of
        # attributes off.
        for variable in self.sampler.variables:
            self._track_variable(variable)
        self._take_over_restored()

    def _layout(self):
        return {
            "method": type(self).__name__,
            "base_optimizer": type(self.base_optimizer).__name__,
            "sampler": type(self.sampler).__name__,
            "single_step": self.single_step,
            "arms": self._selection.arm_of if self.built else None,
        }

    @property
    def arms(self):
        """List of lists of `keras.Variable`s, the variables of each arm."""
        self._check_built()
        variables = self._trainable_variables
        return [[variables[i] for i in arm] for arm in self._selection.members]

    @property
    def active(self):
        """Boolean tensor of shape `(num_arms,)`, the mask of the last step."""
        self._check_built()
        return ops.copy(self._selection.active)

    @property
    def gradient_norms(self):
        """Float tensor of shape `(num_arms,)`, norms of the last step's arms.

        They are those of the first pass's gradients, 0 where inactive. A step that is
        left out leaves them as they were.
        """
        self._check_built()
        return ops.copy(self._selection.norms)

    @property
    def probabilities(self):
        """Tensor of shape `(num_arms,)` for the next draw, or `None`."""
        probabilities = self.sampler.probabilities
        return None if probabilities is None else ops.copy(probabilities)

    @property
    def rho(self):
        """The radius of the perturbation, a scalar `keras.Variable`.

        It may be set between two steps, like the learning rate. With 0 a step is the
        base optimizer's, and has no second pass. Where 0 is set during a `fit` that
        began with more, the second pass is still computed, at the weights themselves.
        """
        return self._rho

    @rho.setter
    def rho(self, rho):
        rho = settings.checked_rho(type(self).__name__, rho)
        self._rho.assign(rho)
        self.ascends = rho > 0

    @property
    def skipped_steps(self):
        """The number of steps left out since their gradients were not finite.

        Such a step leaves weights, moments, `iterations` and the sampler as they
        were. In a window of accumulated gradients it is the micro-batch that is left
        out, and the window waits for another. Norms are summed in float32, so a norm
        above 1.8e19 counts as not finite.
        """
        self._check_built()
        return self._base_step.skipped_steps

    def _check_built(self):
        if not self.built:
            raise ValueError(
                f"`{type(self).__name__}` has no arms before it knows the model's "
                "weights. Train a step, or call "
                "`optimizer.build(model.trainable_variables)`."
            )

    def _check_variables(self, variables):
        """Checks that the optimizer was built for just these variables.

        Args:
            variables: List of `keras.Variable`s, the model's trainable ones.

        Raises:
            ValueError: if they are others.
        """
        built_for = self._trainable_variables
        if [id(v) for v in variables] != [id(v) for v in built_for]:
            raise ValueError(
                f"`{type(self).__name__}` was built for other trainable weights than "
                f"the model has now ({len(built_for)} then, {len(variables)} now). "
                "After a change of `layer.trainable`, call `model.compile` again with "
                "a new optimizer."
            )

    def _direction(self, arms):
        """Along what the ascent is, where that is known before the first pass.

        Args:
            arms: `ActiveArms`.

        Returns:
            `None` for the gradient of this batch, which takes a pass of its own. Else a
            tuple of a list of tensors, one per variable, and a float scalar, the
            squared norm of those of the active arms.
        """
        return self._base_step.applied(arms) if self.single_step else None

    def _draw_ascent(self):
        """Whether this step has an ascent: a bool or a scalar boolean tensor."""
        if self.ascends:
            # No condition, which would cost time: where `rho` was loaded as 0 since,
            # the second pass is at w and gives the same gradients.
            return True
        (perturbed,) = backend.concrete(ops.reshape(backend.read(self._rho) > 0, (1,)))
        return perturbed

    def apply(self, grads, trainable_variables=None):
        """Refuses: gradients alone do not make a sharpness-aware step.

        Raises:
            ValueError: always. Keras calls this on a model without our train step.
        """
        name = type(self).__name__
        raise ValueError(
            f"`{name}` needs its own train step: it evaluates the model at perturbed "
            "weights, which an optimizer cannot do with gradients alone. Add it with "
            "`model = keras_slsam.sharpness_aware(model)` before `model.compile`, or "
            "derive the model's class from `keras_slsam.SAMTrainStep`. In a training "
            "loop of your own, call `keras_slsam.step(model, optimizer, data)`."
        )

    def get_config(self):
        """Returns the arguments of the constructor as a dict."""
        return {
            "name": self.name,
            "base_optimizer": keras.saving.serialize_keras_object(self.base_optimizer),
            "rho": settings.as_float(self._rho),
            "adaptive": self.adaptive,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer from the dict that `get_config` returned."""
        config = copy.deepcopy(config)  # Keras changes it
        for argument in ("base_optimizer", "sampler", "arms"):
            if isinstance(config.get(argument), dict):
                config[argument] = cls._deserialize(
                    argument, config[argument], custom_objects
                )
        return cls(**config)

    @classmethod
    def _deserialize(cls, argument, config, custom_objects):
        # On PyTorch Keras' optimizers have classes of their own, which other backends
        # cannot use: `keras.optimizers` finds them by their names.
        deserialize = (
            keras.optimizers.deserialize
            if argument == "base_optimizer"
            else keras.saving.deserialize_keras_object
        )
        try:
            return deserialize(config, custom_objects=custom_objects)
        except TypeError as error:  # of which Keras would hide the message
            raise ValueError(
                f"Argument `{argument}` of `{cls.__name__}` was saved by name and "
                f"cannot be found. {error}. Or name it when you load: `custom_objects="
                "{name: object}`."
            ) from error
