"""The base of all our optimizers: a wrapper around a Keras optimizer."""

import copy
import json
import math
import numbers
import warnings

import keras
import numpy as np
from keras import ops

from keras_slsam import arms as arms_module
from keras_slsam import atomic
from keras_slsam import base_step
from keras_slsam import gradients as backend
from keras_slsam import perturbation
from keras_slsam import samplers

# What an optimizer is made with, and keeps.
_FIXED = {
    *("active_fraction", "adaptive", "base_optimizer", "sampler", "seed"),
    "single_step",
}

# Attributes of the base optimizer on which the variables that it makes depend.
_MAKE_STATE = {"gradient_accumulation_steps", "use_ema"}

_WAY_OUT = (
    "Make the optimizer as it was when its state was saved. To begin with a fresh one, "
    "leave the state out, with `model.load_weights(path, skip_mismatch=True)`, and "
    "compile with a new optimizer."
)


class _OfBase:
    """An attribute of a Keras optimizer that is the base optimizer's."""

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return self
        return getattr(optimizer.base_optimizer, self._name)

    def __set__(self, optimizer, value):
        # Keras' constructor sets its own defaults, before there is a base optimizer.
        if "base_optimizer" not in vars(optimizer):
            return
        if (
            self._name in _MAKE_STATE
            and optimizer.built
            and value != getattr(optimizer, self._name)
        ):
            raise ValueError(
                f"`{self._name}` of `{type(optimizer).__name__}` cannot be changed "
                "any more: the optimizer has made its state with it. "
                f"Received: {self._name}={value!r}. Give it to a new base optimizer, "
                "and call `model.compile` with it."
            )
        setattr(optimizer.base_optimizer, self._name, value)


class SharpnessAware(keras.optimizers.Optimizer):
    """Base class of `SAM`, `S2SAM`, `SLSAM` and `RST`.

    Wraps `base_optimizer`, which makes the step, and holds what a step of ours
    needs besides: which arms are active and whence the ascent comes. The step
    itself is `keras_slsam.step`; it needs the model, which Keras does not hand to
    an optimizer, so the model needs a train step of ours.

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
        name: String, the optimizer's name.

    Raises:
        ValueError: if an argument is out of its range, or the base optimizer
            cannot be used.
    """

    # What Keras' trainers, callbacks and savers read from an optimizer, or set on it.
    # `optimizers` is that of a `MultiOptimizer`; the others have none.
    clipnorm = _OfBase()
    clipvalue = _OfBase()
    ema_momentum = _OfBase()
    ema_overwrite_frequency = _OfBase()
    global_clipnorm = _OfBase()
    gradient_accumulation_steps = _OfBase()
    iterations = _OfBase()
    learning_rate = _OfBase()
    optimizers = _OfBase()
    use_ema = _OfBase()
    weight_decay = _OfBase()
    _accumulated_gradients = _OfBase()
    _iterations = _OfBase()
    _learning_rate = _OfBase()
    _model_variables_moving_average = _OfBase()

    def __init__(
        self,
        base_optimizer,
        rho,
        adaptive,
        sampler,
        arms="variable",
        single_step=False,
        name=None,
    ):
        owner = type(self).__name__
        rho = _checked_rho(owner, rho)
        switches = {"adaptive": adaptive, "single_step": single_step}
        for argument, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(
                    f"Argument `{argument}` of `{owner}` must be True or False. "
                    f"Received: {argument}={value!r}"
                )
        if isinstance(base_optimizer, SharpnessAware):
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}` is one of ours already; "
                "perturbations do not nest. Give it a Keras optimizer, like "
                '`keras.optimizers.AdamW(2e-5)` or "adamw". '
                f"Received: base_optimizer={base_optimizer!r}"
            )
        base_optimizer = base_step.get(owner, base_optimizer)
        arms_module.validate(arms)
        # The learning rate that counts is the base optimizer's.
        super().__init__(learning_rate=0.0, name=name)
        self.base_optimizer = base_optimizer
        self._rho = self._add_setting("rho", rho)
        self.ascends = rho > 0
        self.adaptive = adaptive
        self.sampler = sampler
        self.single_step = single_step
        self._grouping = arms
        self._restored = None  # what was loaded before `build`, which takes it over
        self._all_active = type(sampler) is samplers.All
        accumulates = bool(base_optimizer.gradient_accumulation_steps)
        if not self._all_active or (single_step and accumulates):
            base_step.check_can_skip_arms(owner, base_optimizer)

    def __setattr__(self, name, value):
        if name in _FIXED and name in vars(self):
            owner = type(self).__name__
            raise ValueError(
                f"`{name}` of `{owner}` cannot be replaced: arms, state and compiled "
                f"steps are made with it. Received: {name}={value!r}. Make a new "
                f"`{owner}`, and call `model.compile` with it."
            )
        super().__setattr__(name, value)

    def _add_setting(self, name, value):
        """A variable for a number that may be set between two steps."""
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        variable = self.add_variable((), dtype=dtype, name=name)
        variable.assign(value)
        return variable

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
        # First what may be refused: a failed call leaves everything as it was.
        arms = arms_module.group(variables, self._grouping)
        num_arms = max(arms) + 1
        if num_arms == 1 and not self._all_active:
            warnings.warn(
                f"`{owner}` found a single arm, which is active in every step: nothing "
                f"is saved. Received: arms={self._grouping!r}.",
                stacklevel=2,
            )
        restored, layout = self._restored or (None, None)
        self._check_layout(layout, arms)
        # Not Keras' `build`, which would make the base optimizer's averages and sums
        # of gradients a second time.
        self._trainable_variables.extend(variables)
        self.built = True
        self.base_optimizer.build(variables)
        self.arm_of = arms
        self._members = [
            [i for i, arm in enumerate(arms) if arm == number]
            for number in range(num_arms)
        ]
        with keras.name_scope(self.name):
            self.sampler.build(num_arms)
        self.sampler._in_use = True
        dtype = keras.backend.result_type("float32", *(v.dtype for v in variables))
        self._active = self.add_variable((num_arms,), dtype="bool", name="active")
        self._norms = self.add_variable((num_arms,), dtype=dtype, name="norms")
        self._skipped_steps = self.add_variable((), dtype="int", name="skipped_steps")
        self._base_step = base_step.BaseStep(
            self.base_optimizer,
            variables,
            self._members,
            all_active=self._all_active,
            remember=self.single_step,
            owner=self,
        )
        # From here on the sampler's state is ours, for everything that saves it. Keras
        # has no public name for that, and a `LossScaleOptimizer` around this one
        # switches the tracking of attributes off.
        for variable in self.sampler.variables:
            self._track_variable(variable)
        if restored is not None:
            try:
                self._restore(restored)
            except ValueError:
                self.built = False  # another step is refused as well
                raise
            self._restored = None

    @property
    def variables(self):
        """List of all state: ours, with the sampler's, and the base optimizer's."""
        return self._variables + self.base_optimizer.variables

    def __dir__(self):
        # Keras' savers look here for what has state of its own to save. The base
        # optimizer's is among `variables`.
        hidden = {"base_optimizer", "optimizers"}
        return [name for name in super().__dir__() if name not in hidden]

    def set_weights(self, weights):
        """Sets all state. Before `build` it is kept for `build`.

        Args:
            weights: List of arrays, one for each of `variables`.

        Raises:
            ValueError: if they do not fit.
        """
        self._restore(weights)

    def save_own_variables(self, store):
        """Writes all state to `store`, and what it is the state of."""
        if self.built:
            values, layout = self.variables, self._layout(self.arm_of)
        elif self._restored is not None:
            values, layout = self._restored
        else:
            return
        for i, value in enumerate(values):
            store[str(i)] = ops.convert_to_numpy(value)
        store["layout"] = np.frombuffer(json.dumps(layout).encode(), "uint8")

    def load_own_variables(self, store):
        """Sets all state from `store`. Before `build` it is kept for `build`.

        Raises:
            ValueError: if it does not fit, or is that of another method, sampler or
                base optimizer, or of other arms.
        """
        keys = set(store.keys())
        if "layout" in keys:
            layout = json.loads(np.array(store["layout"]).tobytes())
            names = [str(i) for i in range(len(keys) - 1)]
            if keys != {"layout", *names}:
                raise ValueError(
                    f"The state given to `{type(self).__name__}` is not complete. "
                    f"Received: {sorted(keys)}. {_WAY_OUT}"
                )
            self._restore([store[name] for name in names], layout)
        elif keys and self.built:
            raise ValueError(
                f"The state given to `{type(self).__name__}` was not saved by it. "
                f"Received: {len(keys)} values. {_WAY_OUT}"
            )
        else:
            # There is none, or that of a Keras optimizer before ours has begun, as
            # where training goes on from a file of weights. Keras warns with the same.
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}, because it "
                f"has {len(self.variables)} variables whereas the saved optimizer has "
                f"{len(keys)} variables.",
                stacklevel=2,
            )

    def _restore(self, values, layout=None):
        self._check_layout(layout, self.arm_of if self.built else None)
        if not self.built:
            self._restored = [ops.convert_to_numpy(v) for v in values], layout
            return
        variables = self.variables
        unlike = [
            f"{variable.path} {tuple(np.shape(value))}, not {tuple(variable.shape)}"
            for variable, value in zip(variables, values)
            if tuple(np.shape(value)) != tuple(variable.shape)
        ]
        if unlike or len(values) != len(variables):
            raise ValueError(
                f"The state of `{type(self).__name__}` is {len(variables)} values, "
                "with the shapes of `optimizer.variables`. "
                f"Received: {'; '.join([f'{len(values)} values', *unlike])}. {_WAY_OUT}"
            )
        for variable, value in zip(variables, values):
            variable.assign(value)

    def _check_layout(self, saved, arm_of):
        """Refuses state that was saved by an optimizer unlike this one.

        Args:
            saved: What `_layout` returned there, or `None` where it is not known.
            arm_of: List of int, or `None` before `build`.
        """
        unlike = [
            f"{key}={saved.get(key)!r}, not {own!r}"
            for key, own in self._layout(arm_of).items()
            if saved is not None and own is not None and own != saved.get(key)
        ]
        if unlike:
            raise ValueError(
                f"The state given to `{type(self).__name__}` was saved by an optimizer "
                f"with other arguments. Received: {'; '.join(unlike)}. {_WAY_OUT}"
            )

    def _layout(self, arm_of):
        """What saved state must have in common with this optimizer."""
        return {
            "method": type(self).__name__,
            "base_optimizer": type(self.base_optimizer).__name__,
            "sampler": type(self.sampler).__name__,
            "single_step": self.single_step,
            "arms": arm_of,
        }

    @property
    def arms(self):
        """List of lists of `keras.Variable`s, the variables of each arm."""
        self._check_built()
        return [
            [self._trainable_variables[i] for i in indices] for indices in self._members
        ]

    @property
    def active(self):
        """Boolean tensor of shape `(num_arms,)`, the mask of the last step."""
        self._check_built()
        return ops.copy(self._active)

    @property
    def gradient_norms(self):
        """Float tensor of shape `(num_arms,)`, norms of the last step's arms.

        They are those of the first pass's gradients, 0 where inactive. A step that is
        left out leaves them as they were.
        """
        self._check_built()
        return ops.copy(self._norms)

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
        rho = _checked_rho(type(self).__name__, rho)
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
        return self._skipped_steps

    def _check_built(self):
        if not self.built:
            raise ValueError(
                f"`{type(self).__name__}` has no arms before it knows the model's "
                "weights. Train a step, or call "
                "`optimizer.build(model.trainable_variables)`."
            )

    @property
    def loss_scale_factor(self):
        """`None`: a `LossScaleOptimizer` around this one scales the loss."""
        return self.base_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        if factor is not None:
            raise ValueError(
                f"Attribute `loss_scale_factor` of `{type(self).__name__}` must be "
                "None: the perturbation needs the true gradients. "
                f"Received: loss_scale_factor={factor!r}. Put a "
                "`keras.optimizers.LossScaleOptimizer` around the optimizer."
            )

    def previous_gradients(self):
        """The ascent of `single_step`: the gradient last applied to each variable.

        Returns:
            Tuple of a list of tensors, 0 where there was none, and a float scalar,
            the squared norm of those of the active arms.
        """
        gradients, squares = self._base_step.applied()
        active = backend.read(self._active)
        return gradients, ops.sum(ops.where(active, squares, 0.0))

    def check_variables(self, variables):
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

    def window(self):
        """Where this step is in a window of accumulated gradients.

        Returns:
            Tuple `(first, last)`, whether it is its first and its last step: bools, or
            scalar boolean tensors inside a traced step. Without accumulation each
            step is a window.
        """
        return self._base_step.window()

    def draw_active(self, first):
        """Draws the step's active arms.

        Args:
            first: What `window` returned: in a window the arms stay.

        Returns:
            List with one entry an arm: bools, or scalar boolean tensors inside a
            traced step.

        Raises:
            ValueError: if the sampler's mask has another shape, or is seen to have
                no active arm.
        """
        atomic.assign_if(first, self._draw)
        if self._all_active:
            return [True] * len(self._members)
        active = backend.concrete(backend.read(self._active))
        if not any(on is not False for on in active):
            raise ValueError(
                "`draw()` of a sampler must return at least one active arm. "
                f"Received: none of {self.sampler!r}"
            )
        return active

    def _draw(self):
        mask = self.sampler.draw()
        shape, expected = tuple(np.shape(mask)), (len(self._members),)
        if not _is_mask(mask) or (None not in shape and shape != expected):
            raise ValueError(
                "`draw()` of a sampler must return a boolean tensor of shape "
                f"(num_arms,), here {expected}. Received: {mask!r} of "
                f"{self.sampler!r}"
            )
        self._active.assign(ops.cast(mask, "bool"))

    def draw_perturbed(self):
        """Whether this step has an ascent: a bool or a scalar boolean tensor."""
        if self.ascends:
            # No condition, which would cost time: where `rho` was loaded as 0 since,
            # the second pass is at w and gives the same gradients.
            return True
        (perturbed,) = backend.concrete(ops.reshape(backend.read(self._rho) > 0, (1,)))
        return perturbed

    def perturb(self, weights, directions, squared_norm, active):
        """The weights of the second pass, `w + e` on the active arms.

        Args:
            weights: List of tensors, one a variable.
            directions: List of tensors, the gradients to go up along.
            squared_norm: Float scalar, the squared norm of all active directions.
            active: What `draw_active` returned.

        Returns:
            List of tensors.
        """
        if self.adaptive:
            squared_norm = sum(
                perturbation.squared_norms(
                    directions, self._members, active, self._norms.dtype, weights
                )
            )
        return perturbation.perturb(
            weights,
            directions,
            squared_norm,
            self._members,
            active,
            backend.read(self._rho),
            self.adaptive,
        )

    def unscale(self, gradients, active, scale):
        """Gradients of the loss from those of the loss times `scale`, if not `None`."""
        if scale is None:
            return gradients
        return perturbation.unscale(gradients, self._members, active, scale)

    def squared_norms(self, directions, active):
        """Squared norms of the arms' gradients, see `perturbation.squared_norms`."""
        return perturbation.squared_norms(
            directions, self._members, active, self._norms.dtype
        )

    def descend(self, gradients, squares, active, last, finite):
        """The base optimizer's step with `gradients`, on the active arms only.

        Args:
            gradients: List of tensors, one a variable.
            squares: List of float scalars, the squared norms of the arms' gradients.
            active: What `draw_active` returned.
            last: What `window` returned.
            finite: Whether all gradients are finite: else the step is left out, and
                counted.
        """
        self._base_step(gradients, squares, active, last, finite)
        if finite is not True:
            skipped = ops.cast(ops.logical_not(finite), self._skipped_steps.dtype)
            self._skipped_steps.assign_add(skipped)

    def counted(self, finite):
        """Context in which this step is counted already, see `BaseStep.counted`."""
        return self._base_step.counted(finite)

    def learn(self, squares, last):
        """Records the arms' norms and lets the sampler learn from them.

        In a window of accumulated gradients the norms are root mean squares, and the
        sampler learns from them once.

        Args:
            squares: List of float scalars, the arms' squared gradient norms.
            last: What `window` returned.
        """
        squares = ops.stack(squares)
        if self.base_optimizer.gradient_accumulation_steps:
            position = ops.cast(self._base_step.position(), squares.dtype)
            # Norms of the window before, which may not be finite, do not count.
            before = ops.where(position > 0, ops.square(self._norms) * position, 0.0)
            squares = (before + squares) / (position + 1)
        norms = ops.sqrt(squares)
        self._norms.assign(norms)
        atomic.assign_if(
            last,
            lambda: self.sampler.update(backend.read(self._active), norms),
        )

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

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the base optimizer's weight decay."""
        self.base_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        """Sets the final weights, like the base optimizer's moving average."""
        self.base_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        """Returns the arguments of the constructor as a dict."""
        return {
            "name": self.name,
            "base_optimizer": keras.saving.serialize_keras_object(self.base_optimizer),
            "rho": as_float(self._rho),
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


def _is_mask(x):
    """Whether `x` is an array or tensor of bools or ints."""
    if not hasattr(x, "dtype"):
        return False
    dtype = keras.backend.standardize_dtype(x.dtype)
    return dtype == "bool" or keras.backend.is_int_dtype(dtype)


def as_float(variable):
    """The value of a scalar variable, in few digits: 0.05, not 0.0500000007."""
    return float(str(ops.convert_to_numpy(variable)[()]))


def as_number(value):
    """A scalar tensor or variable as a Python number, anything else as it is."""
    if isinstance(value, keras.Variable) or ops.is_tensor(value):
        value = ops.convert_to_numpy(value)
        return value.item() if value.ndim == 0 else value
    return value


def _checked_rho(owner, rho):
    number = as_number(rho)
    if (
        isinstance(number, bool)
        or not isinstance(number, numbers.Real)
        or not (number >= 0 and math.isfinite(number))
    ):
        raise ValueError(
            f"Argument `rho` of `{owner}` is the radius of the perturbation and "
            f"must be a finite number >= 0. Received: rho={rho!r}"
        )
    return float(number)
