"""Wraps a Keras optimizer, and forwards attributes to it."""

import keras

# Attributes that determine which variables the base optimizer creates.
_MAKE_STATE = {"gradient_accumulation_steps", "use_ema"}


class _OfBase:
    """An attribute that is forwarded to the base optimizer."""

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return self
        return getattr(optimizer.base_optimizer, self._name)

    def __set__(self, optimizer, value):
        # Ignore the defaults that Keras' constructor sets, before `base_optimizer`
        # exists.
        if "base_optimizer" not in vars(optimizer):
            return
        if (
            self._name in _MAKE_STATE
            and optimizer.built
            and value != getattr(optimizer, self._name)
        ):
            raise ValueError(
                f"`{self._name}` of `{type(optimizer).__name__}` cannot be changed "
                "after the optimizer was built, because its state depends on it. "
                f"Received: {self._name}={value!r}. Pass it to a new base optimizer, "
                "and call `model.compile` with a new optimizer."
            )
        setattr(optimizer.base_optimizer, self._name, value)


class Wrapper(keras.optimizers.Optimizer):
    """Base class of optimizers that leave the update to `base_optimizer`.

    Attributes that Keras' trainers, callbacks and savers read or set on an optimizer
    are forwarded to the base optimizer.

    Args:
        base_optimizer: `keras.optimizers.Optimizer`.
        name: String, the optimizer's name.
    """

    # Only a `MultiOptimizer` has `optimizers`.
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

    def __init__(self, base_optimizer, name):
        # Not used: the learning rate is the base optimizer's.
        super().__init__(learning_rate=0.0, name=name)
        self.base_optimizer = base_optimizer

    @property
    def variables(self):
        """List of all variables, of this optimizer and of the base optimizer."""
        return self._variables + self.base_optimizer.variables

    def __dir__(self):
        # Keras' savers look here for objects whose state they save. The base
        # optimizer's state is already in `variables`.
        hidden = {"base_optimizer", "optimizers"}
        return [name for name in super().__dir__() if name not in hidden]

    @property
    def loss_scale_factor(self):
        """`None`: a `LossScaleOptimizer` around this one scales the loss."""
        return self.base_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        if factor is not None:
            raise ValueError(
                f"Attribute `loss_scale_factor` of `{type(self).__name__}` must be "
                "None, because the perturbation needs unscaled gradients. "
                f"Received: loss_scale_factor={factor!r}. Put a "
                "`keras.optimizers.LossScaleOptimizer` around the optimizer."
            )

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the base optimizer's weight decay."""
        self.base_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        """Sets the final weights, such as the base optimizer's moving average."""
        self.base_optimizer.finalize_variable_values(var_list)
