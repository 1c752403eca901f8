"""The loss of a batch as a pure function of the weights."""

import keras
from keras import ops

# Metrics read the mask that Keras attaches to a tensor. It has no public name, and
# copies of a tensor lose it.
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask

from keras_slsam import batch
from keras_slsam.gradients import backend


class Loss:
    """A pure function from the weights to the loss of a batch.

    Each call starts from the state before the step, so both passes see the same dropout
    masks. Changes of state are returned as values.

    Args:
        model: `keras.Model`.
        variables: List of its trainable `keras.Variable`s.
        x, y, sample_weight: The batch.
        scale: Float scalar by which the loss is multiplied, or `None`.
        training: bool, whether layers such as Dropout are in training mode.
        outputs: Function from the model's outputs to what the loss sees in their place,
            or `None` for the outputs themselves.

    Attributes:
        model: The model.
        variables: The variables.
        state: List of the model's other `keras.Variable`s.
    """

    def __init__(
        self,
        model,
        variables,
        x,
        y,
        sample_weight,
        scale=None,
        *,
        training=True,
        outputs=None,
    ):
        self.model = model
        self.variables = variables
        self._data = x, y, sample_weight
        self._scale = scale
        self._training, self._transform = training, outputs
        self._given, self._record_own = backend.own_parameters(model, variables)
        self.state = model.non_trainable_variables + model.metrics_variables
        self._state = [(v, backend.read(v)) for v in self.state]
        self._generators = []  # once they are read, of all losses of this step
        self._assigned = None

    def part(self, fraction):
        """Returns the loss of the first rows, with the same random numbers."""
        rows = batch.first_rows(self._data, fraction)
        part = Loss(
            self.model,
            self.variables,
            *rows,
            self._scale,
            training=self._training,
            outputs=self._transform,
        )
        part._generators = self._generators
        return part

    def __call__(self, weights, differentiate=None):
        """Computes the loss at `weights`.

        Args:
            weights: List of tensors, one per trainable variable.
            differentiate: Function that is called with the loss while layers still read
                `weights`, because layers that recompute read them in the backward pass.

        Returns:
            `(scaled loss, (loss, tensors, masks, values))`: the tensors in the model's
            outputs, their masks, and the values that were assigned to variables.
        """
        model, (x, y, sample_weight) = self.model, self._data
        # On PyTorch, Keras multiplies sample weights by masks in place.
        sample_weight = keras.tree.map_structure(_copy, sample_weight)
        mapping = list(zip(self.variables, weights)) + self._state
        # Generators of Python, NumPy and PyTorch are no variables, which a scope could
        # give their old values.
        if self._generators:
            self._generators[0].rewind()
        else:
            self._generators.append(backend.generators(model))
        with self._given(weights), _Scope(mapping) as scope:
            y_pred = call(model, x, self._training)
            if self._transform is not None:
                y_pred = self._transform(y_pred)
            # Calls a `compute_loss` of any signature. Keras has no public name for it.
            loss = model._compute_loss(
                x, y, y_pred, sample_weight, training=self._training
            )
            scaled = loss if self._scale is None else ops.multiply(loss, self._scale)
            assigned = list(scope.assigned.values())
            values = [scope.get_current_value(v) for v in assigned]
            if differentiate is not None:
                differentiate(scaled)
        if self._assigned is None:
            self._assigned = assigned
            self._check_assigned()
            self._outputs = keras.tree.map_structure(_unless_tensor, y_pred)
        tensors = [t for t in keras.tree.flatten(y_pred) if ops.is_tensor(t)]
        masks = [get_keras_mask(t) for t in tensors]
        return scaled, (loss, tensors, masks, values)

    def _check_assigned(self):
        trained = {id(v) for v in self.variables}
        for variable in self._assigned:
            if id(variable) in trained:
                raise ValueError(
                    f"A layer assigns to the trainable weight {variable.path!r} when "
                    "it is called, as `SpectralNormalization` does. It would assign a "
                    "perturbed value. Remove the layer, or set `trainable = False` on "
                    "it."
                )

    def record_metrics(self, outputs):
        """Assigns the metrics as the first call left them.

        Args:
            outputs: What the first call returned after the scaled loss.

        Returns:
            `(loss, y_pred)`, with the masks that Keras attached to the outputs.
        """
        loss, tensors, masks, values = outputs
        self._assign(values, self.model.metrics_variables)
        for tensor, mask in zip(tensors, masks):
            if mask is not None:
                set_keras_mask(tensor, mask)
        tensors = iter(tensors)
        y_pred = keras.tree.map_structure(
            lambda output: next(tensors) if output is _TENSOR else output, self._outputs
        )
        return loss, y_pred

    def record_state(self, outputs):
        """Assigns the model's state and seed generators as the first call left them.

        Args:
            outputs: What the first call returned after the scaled loss.
        """
        *_, values = outputs
        metrics = {id(v) for v in self.model.metrics_variables}
        self._assign(values, [v for v in self._assigned if id(v) not in metrics])
        self._record_own()

    def _assign(self, values, variables):
        chosen = {id(v) for v in variables}
        for variable, value in zip(self._assigned, values):
            if id(variable) in chosen:
                variable.assign(value)


class _Scope(backend.Scope):  # type: ignore[name-defined]
    """A scope that records which variables were assigned.

    They may include variables outside the model, such as a shared seed generator.
    Assigned values are constants for the gradient.
    """

    def __init__(self, state_mapping):
        super().__init__(state_mapping, collect_losses=True)
        self.assigned = {}

    def add_update(self, update):
        variable, value = update
        value = ops.stop_gradient(value)
        self.assigned[id(variable)] = variable
        super().add_update((variable, value))


def call(model, x, training=True):
    """Calls the model on a batch as Keras' train and test steps do."""
    return model(x, training=training) if model._call_has_training_arg else model(x)


# Placeholder for a tensor in the outputs, which may also hold other objects.
_TENSOR = object()


def _unless_tensor(output):
    return _TENSOR if ops.is_tensor(output) else output


def _copy(tensor):
    return None if tensor is None else ops.copy(tensor)
