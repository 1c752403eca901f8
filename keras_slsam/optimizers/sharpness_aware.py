"""The base class of the optimizers: wraps a Keras optimizer, and holds the state."""

import contextlib
import functools
import math
import numbers
import warnings
import weakref

import keras

from keras_slsam import ascents
from keras_slsam import grouping
from keras_slsam import samplers
from keras_slsam.base_step import BaseStep
from keras_slsam.gradients import backend
from keras_slsam.optimizers import settings
from keras_slsam.optimizers.base_optimizer import check_can_skip_arms
from keras_slsam.optimizers.base_optimizer import get_base_optimizer
from keras_slsam.optimizers.readings import Readings
from keras_slsam.optimizers.saving import Stateful
from keras_slsam.optimizers.wrapper import Wrapper
from keras_slsam.selection import Selection

# Attributes that cannot be replaced.
_FIXED = {
    *("active_fraction", "adaptive", "always_active", "ascent", "ascent_fraction"),
    *("base_optimizer", "sampler", "seed", "single_step"),
}


class SharpnessAware(Readings, Stateful, Wrapper):
    """Base class of `SAM`, `S2SAM`, `SLSAM` and `RST`.

    Wraps `base_optimizer`, which applies the update, and holds what else a step needs:
    which arms are active, and which direction the ascent follows. The step itself is
    `keras_slsam.step`. It needs the model, which Keras does not pass to an optimizer,
    so the model needs the matching train step.

    Learning rate, schedule, `iterations`, clipping, weight decay, EMA and constraints
    belong to the base optimizer. If arms are inactive, clipping by a global norm is
    over the active variables. Schedules and EMA follow the global steps. Moments, step
    counts and weight decay follow a variable's own updates.

    Args:
        base_optimizer: Anything that `keras.optimizers.get` accepts.
        rho: Float >= 0, or a schedule, the radius of the perturbation.
        adaptive: bool, whether the perturbation is scaled by the weights (ASAM).
        sampler: `keras_slsam.samplers.Sampler`, draws the active arms.
        arms: `"variable"`, `"layer"`, `"block"`, or a function from a variable to a
            hashable key.
        always_active: Regular expression or function of a variable that chooses arms
            that are not drawn but always active, or `None`.
        single_step: bool, whether the ascent is `LastApplied`, so that one pass is
            enough.
        ascent: `keras_slsam.ascents.Ascent`, or `None` to leave it to `single_step`.
        ascent_fraction: Float in [1e-6, 1], the share of a batch's rows that the first
            pass sees.
        name: String, the optimizer's name.

    Raises:
        ValueError: if an argument is out of its range, or the base optimizer cannot be
            used.
    """

    def __init__(
        self,
        base_optimizer,
        rho,
        adaptive,
        sampler,
        arms="variable",
        always_active=None,
        single_step=False,
        ascent=None,
        ascent_fraction=1.0,
        name=None,
    ):
        owner = type(self).__name__
        ascent_fraction = settings.check_fraction(owner, ascent_fraction)
        switches = {"adaptive": adaptive, "single_step": single_step}
        for argument, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(
                    f"Argument `{argument}` of `{owner}` must be True or False. "
                    f"Received: {argument}={value!r}"
                )
        ascent = ascents.get(owner, ascent, single_step)
        if ascent_fraction < 1 and not ascent.needs_gradient:
            chosen = "single_step=True" if single_step else f"ascent={ascent!r}"
            raise ValueError(
                f"Argument `ascent_fraction` of `{owner}` must be 1 with `{chosen}`: "
                "the ascent then takes no pass of its own. "
                f"Received: ascent_fraction={ascent_fraction!r}"
            )
        if isinstance(base_optimizer, SharpnessAware):
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}` is a `keras_slsam` optimizer "
                "already, and perturbations do not nest. Pass a Keras optimizer, such "
                'as `keras.optimizers.AdamW(2e-5)` or "adamw". '
                f"Received: base_optimizer={base_optimizer!r}"
            )
        base_optimizer = get_base_optimizer(owner, base_optimizer)
        grouping.validate(arms)
        grouping.validate_always_active(owner, always_active)
        super().__init__(base_optimizer, name)
        check = functools.partial(settings.check_rho, owner)
        self._rho = settings.Setting(self, "rho", rho, check)
        self._trained_model = None  # a weak reference, once there is one
        self._processes = 1  # that are known to have the same state
        self.adaptive = adaptive
        self.sampler = sampler
        self.single_step = single_step
        self.ascent = ascent
        learns_from_applied = ascents.learns(ascent) and not ascent.needs_gradient
        self._learner = ascent if learns_from_applied else None
        self.ascent_fraction = ascent_fraction
        self._grouping = arms
        self.always_active = always_active
        self._all_active = type(sampler) is samplers.All
        if self._all_active and always_active is not None:
            raise ValueError(
                f"Argument `always_active` of `{owner}` is not allowed with a sampler "
                "that activates all arms. "
                f"Received: always_active={always_active!r}, sampler={sampler!r}. "
                "Leave it out."
            )
        accumulates = bool(base_optimizer.gradient_accumulation_steps)
        if not self._all_active or (self._learner and accumulates):
            check_can_skip_arms(owner, base_optimizer)

    def __setattr__(self, name, value):
        if name in _FIXED and name in vars(self):
            owner = type(self).__name__
            raise ValueError(
                f"`{name}` of `{owner}` cannot be replaced, because arms, state and "
                f"compiled steps depend on it. Received: {name}={value!r}. Create a "
                f"new `{owner}`, and call `model.compile` with it."
            )
        super().__setattr__(name, value)

    def build(self, variables):
        """Creates the state of the sampler, the base optimizer and this optimizer.

        If state was loaded before, it is set.

        Args:
            variables: List of `keras.Variable`s, the model's trainable ones. With an
                empty list, which Keras passes when it reads an `.h5` file, nothing is
                built.

        Raises:
            ValueError: if `base_optimizer`, the sampler or the ascent is in use
                already, if `arms` returns an unhashable key, if `always_active`
                chooses no arm or all, if a weight is trained in float8, or if loaded
                state does not fit.
        """
        if self.built or not variables:
            return
        owner = type(self).__name__
        if self.base_optimizer.built:
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}` has been built for other "
                "variables already, or for these in a step that failed. "
                f"Received: {self.base_optimizer.name!r}. Create a new one for each "
                "model and each `compile`."
            )
        if any(getattr(v, "overwrite_with_gradient", False) for v in variables):
            raise ValueError(
                f"`{owner}` does not support float8 training, because its scales are "
                "not weights that can be perturbed. Use another dtype policy."
            )
        if self.sampler._in_use:
            raise ValueError(
                f"Argument `sampler` of `{owner}` is used by a `samplers.Hold` or by "
                f"another optimizer. Received: {self.sampler!r}. Create a new one for "
                "each optimizer."
            )
        if self.ascent._in_use:
            raise ValueError(
                f"Argument `ascent` of `{owner}` is used by another optimizer. "
                f"Received: {self.ascent!r}. Create a new one for each optimizer."
            )
        low = self.sampler.min_probability
        if not isinstance(low, numbers.Real) or not 0 <= low <= 1:
            raise ValueError(
                f"`min_probability` of the sampler of `{owner}` must be a number in "
                f"[0, 1], 0 if it is unknown. Received: {low!r} from {self.sampler!r}"
            )
        # All checks come first, so that a refused call changes nothing.
        arms = grouping.group(variables, self._grouping)
        always = grouping.find_always_active(owner, variables, arms, self.always_active)
        num_arms = max(arms) + 1
        if num_arms - len(always) == 1 and not self._all_active:
            warnings.warn(
                f"`{owner}` found a single arm to draw, which is active in every step, "
                f"so no work is saved. Received: arms={self._grouping!r}.",
                stacklevel=2,
            )
        if self._restored is not None:
            layout = {**self._layout(), "arms": arms, "always_active": always}
            self._check_layout(self._restored[1], layout)
        members = [
            [i for i, arm in enumerate(arms) if arm == number]
            for number in range(num_arms)
        ]
        self.sampler._arms = [
            samplers.Arm(
                tuple(variables[i].path for i in indices),
                sum(math.prod(variables[i].shape) for i in indices),
            )
            for arm, indices in enumerate(members)
            if arm not in always
        ]
        with keras.name_scope(self.name):
            self.sampler.build(len(self.sampler._arms))
        self.sampler._in_use = self.sampler._is_fixed = True
        # Keras' `build` would create the base optimizer's averages and sums of
        # gradients a second time.
        self._trainable_variables.extend(variables)
        self.base_optimizer.build(variables)
        dtype = keras.backend.result_type("float32", *(v.dtype for v in variables))
        self._selection = Selection(
            self.sampler,
            arms,
            members,
            self._all_active,
            always,
            dtype,
            owner=self,
        )
        ascents.build(self.ascent, self, variables)
        self.ascent._in_use = True
        self._base_step = BaseStep(
            self.base_optimizer,
            variables,
            num_arms,
            all_active=self._all_active,
            ascent=self._learner,
            owner=self,
        )
        self.built = True  # no step must be taken with a part of the state
        # Save the sampler's state with the optimizer's. Keras has no public name for
        # this, and a `LossScaleOptimizer` around this optimizer turns off the tracking
        # of attributes.
        for variable in self.sampler.variables:
            self._track_variable(variable)
        self._take_over_restored()

    def _layout(self):
        return {
            "method": type(self).__name__,
            "base_optimizer": type(self.base_optimizer).__name__,
            "sampler": self.sampler._kind,
            "ascent": type(self.ascent).__name__,
            "arms": self._selection.arm_of if self.built else None,
            "always_active": self._selection.always_active if self.built else None,
        }

    @property
    def rho(self):
        """The radius of the perturbation, a scalar `keras.Variable`.

        It can be set between two steps, as in `optimizer.rho = 0.1`, unless it follows
        a schedule. With 0 a step is a step of the base optimizer, without a second
        pass.
        """
        return self._rho.variable

    @rho.setter
    def rho(self, rho):
        self._collect_state()
        with self._changed_rho():
            self._rho.set(rho)

    @property
    def _always_ascends(self):
        # On JAX a condition around the second pass of `SAM` takes 4 % of a step, so
        # there is none where `rho` is a number and was always above 0.
        return self._rho.lowest > 0

    def _restore(self, values, layout=None):
        with self._changed_rho():
            super()._restore(values, layout)

    @contextlib.contextmanager
    def _changed_rho(self):
        """Context that may set `rho` to 0, which a compiled step must then allow."""
        before = self._always_ascends
        yield
        self._rho.read_number()
        model = self._trained_model and self._trained_model()
        if model is not None and before and not self._always_ascends:
            # The function that was compiled has the second pass without a condition.
            model.make_train_function(force=True)

    @property
    def _two_passes(self):
        """Whether both passes of a step see the whole batch."""
        return self.ascent.needs_gradient and self.ascent_fraction == 1

    def _prepare_fit(self, model):
        """Gets to know the model that is trained, and state that was loaded."""
        self._trained_model = weakref.ref(model)
        self._rho.read_number()
        if self.built:
            self._check_variables(model.trainable_variables)

    def _collect_state(self):
        """Brings the variables of the model in training up to date, and returns it."""
        model = self._trained_model and self._trained_model()
        if model is not None:
            backend.collect_state(model)
        return model

    def _check_variables(self, variables):
        """Checks that the optimizer was built for exactly these variables.

        Args:
            variables: List of `keras.Variable`s, the model's trainable ones.

        Raises:
            ValueError: if it was built for others.
        """
        built_for = self._trainable_variables
        if [id(v) for v in variables] != [id(v) for v in built_for]:
            raise ValueError(
                f"`{type(self).__name__}` was built for other trainable weights than "
                f"the model has now ({len(built_for)} then, {len(variables)} now). "
                "After a change of `layer.trainable`, call `model.compile` again with "
                "a new optimizer."
            )

    def _draw_ascent(self):
        """Whether this step has an ascent, and its radius.

        Returns:
            Tuple of True or a scalar boolean tensor, and a scalar tensor.
        """
        self._rho.follow(self._iterations)
        rho = backend.read(self.rho)
        return True if self._always_ascends else rho > 0, rho

    def apply(self, grads, trainable_variables=None):
        """Raises an error: gradients alone do not make a sharpness-aware step.

        Raises:
            ValueError: always. Keras calls this on a model without the matching train
                step.
        """
        name = type(self).__name__
        raise ValueError(
            f"`{name}` needs its own train step, because it evaluates the model at "
            "perturbed weights. Add the step with "
            "`model = keras_slsam.sharpness_aware(model)` before `model.compile`, or "
            "derive the model's class from `keras_slsam.SAMTrainStep`. In a custom "
            "training loop, call `keras_slsam.step(model, optimizer, data)`."
        )

    def get_config(self):
        """Returns the arguments of the constructor as a dict."""
        return {
            "name": self.name,
            "base_optimizer": keras.saving.serialize_keras_object(self.base_optimizer),
            "rho": self._rho.get_config(),
            "adaptive": self.adaptive,
        }
