"""Saves the state of an optimizer as one list, with a layout to check it by."""

import copy
import json
import warnings

import keras
import numpy as np
from keras import ops

_WAY_OUT = (
    "Create the optimizer with the arguments of the saved one. To start with a fresh "
    "state, load only the weights with `model.load_weights(path, skip_mismatch=True)`, "
    "or the model without its optimizer with `load_model(path, compile=False)`, and "
    "compile with a new optimizer."
)

# The arguments that may be objects or functions.
_OBJECTS = {
    *("active_fraction", "always_active", "arms", "ascent", "base_optimizer"),
    *("probability", "rho", "sampler"),
}


class Stateful(keras.optimizers.Optimizer):
    """A mixin: saves the arguments, and all state with a layout to check it by.

    All of `variables` is saved, with a layout. An optimizer only accepts state that was
    saved with the same layout.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._restored = None  # what was loaded before `build`, and its layout

    def _layout(self):
        """Returns a dict of what saved state and this optimizer must have in common.

        An entry is `None` if it is not known before `build`.
        """
        raise NotImplementedError

    def set_weights(self, weights):
        """Sets all state. Before `build`, the state is kept until then.

        Args:
            weights: List of arrays, one for each of `variables`.

        Raises:
            ValueError: if they do not fit.
        """
        self._restore(weights)

    def save_own_variables(self, store):
        """Writes all state and its layout to `store`."""
        if self.built:
            values, layout = self.variables, self._layout()
        elif self._restored is not None:
            values, layout = self._restored
        else:
            return
        for i, value in enumerate(values):
            store[str(i)] = ops.convert_to_numpy(value)
        store["layout"] = np.frombuffer(json.dumps(layout).encode(), "uint8")

    def load_own_variables(self, store):
        """Sets all state from `store`. Before `build`, the state is kept until then.

        Raises:
            ValueError: if it does not fit, or if it belongs to another method, sampler
                or base optimizer, or to other arms.
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
                f"The state given to `{type(self).__name__}` was not saved by it, but "
                "by another optimizer, such as the `LossScaleOptimizer` that `compile` "
                f"adds under `mixed_float16`. Received: {len(keys)} values. {_WAY_OUT}"
            )
        else:
            # The store is empty, or a Keras optimizer wrote it and this one is not
            # built yet, as when training continues from a file of weights. Keras gives
            # the same warning.
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}, because it "
                f"has {len(self.variables)} variables whereas the saved optimizer has "
                f"{len(keys)} variables.",
                stacklevel=2,
            )

    def _take_over_restored(self):
        """Sets the state that was loaded before `build`."""
        if self._restored is None:
            return
        try:
            self._restore(*self._restored)
        except ValueError:
            self.built = False  # so the next step is refused too
            raise
        self._restored = None

    def _restore(self, values, layout=None):
        self._check_layout(layout, self._layout())
        self._processes = 1  # other processes may have loaded something else
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
                f"The state of `{type(self).__name__}` is {len(variables)} values "
                "with the shapes of `optimizer.variables`. "
                f"Received: {'; '.join([f'{len(values)} values', *unlike])}. {_WAY_OUT}"
            )
        for variable, value in zip(variables, values):
            variable.assign(value)

    def _check_layout(self, saved, own):
        """Refuses state that was saved by a different optimizer.

        Args:
            saved: What `_layout` returned when the state was saved, or `None` if
                unknown.
            own: What it returns now.
        """
        if saved is None:
            return
        # What older files do not have. Their state for a single step had another form.
        before = "an older LastApplied" if saved.get("single_step") else "Ascent"
        saved = {"always_active": [], "ascent": before, **saved}
        unlike = [
            f"{key}={saved.get(key)!r}, not {value!r}"
            for key, value in own.items()
            if value is not None and value != saved.get(key)
        ]
        if unlike:
            raise ValueError(
                f"The state given to `{type(self).__name__}` was saved by an optimizer "
                f"with other arguments. Received: {'; '.join(unlike)}. {_WAY_OUT}"
            )

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates an optimizer from the dict that `get_config` returned."""
        config = copy.deepcopy(config)  # Keras changes it
        for argument in _OBJECTS:
            if isinstance(config.get(argument), dict):
                config[argument] = cls._deserialize(
                    argument, config[argument], custom_objects
                )
        return cls(**config)

    @classmethod
    def _deserialize(cls, argument, config, custom_objects):
        # On PyTorch, Keras' optimizers have their own classes, which other backends
        # cannot load. `keras.optimizers.deserialize` finds optimizers by name.
        deserialize = (
            keras.optimizers.deserialize
            if argument == "base_optimizer"
            else keras.saving.deserialize_keras_object
        )
        try:
            return deserialize(config, custom_objects=custom_objects)
        except TypeError as error:  # Keras would hide its message
            raise ValueError(
                f"Argument `{argument}` of `{cls.__name__}` cannot be created as it "
                f"was saved. {error}. If it was not found, you can pass it when you "
                "load: `custom_objects={name: object}`."
            ) from error
