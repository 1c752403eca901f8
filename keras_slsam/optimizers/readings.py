"""What can be read from an optimizer after a step."""

import keras
from keras import ops


class Readings(keras.optimizers.Optimizer):
    """A mixin: the arms, and what happened to them in the last step."""

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
        """Float tensor of shape `(num_arms,)`, the gradient norms of the last step.

        They are the norms of the pass that gives the loss, 0 where inactive. A skipped
        step does not change them.
        """
        self._check_built()
        return ops.copy(self._selection.norms)

    @property
    def probabilities(self):
        """Tensor of shape `(num_arms,)`, probabilities in the next draw, or `None`.

        The probability of an arm that is always active is 1.
        """
        probabilities = self.sampler.probabilities
        if probabilities is None or not self.built:
            return None
        return self._selection.of_all_arms(ops.copy(probabilities), 1.0)

    @property
    def skipped_steps(self):
        """The number of steps that were skipped because a gradient was not finite.

        A skipped step does not change weights, moments, `iterations` or what the
        sampler has learned. In a window of accumulated gradients, only the micro-batch
        is skipped, and the window waits for another one. Norms are summed in float32,
        so a norm above 1.8e19 counts as not finite.
        """
        self._check_built()
        return self._base_step.skipped_steps

    def _check_built(self):
        if not self.built:
            raise ValueError(
                f"`{type(self).__name__}` has no arms before it is built for the "
                "model's weights. Take a step, or call "
                "`optimizer.build(model.trainable_variables)`."
            )
