"""The base class of callbacks that observe the steps."""

import keras

from keras_slsam import loss_scale
from keras_slsam import observers


class Observing(keras.callbacks.Callback):
    """A callback that attaches an observer to the model while it trains."""

    def __init__(self):
        super().__init__()
        self._observer = self._observed = None

    @property
    def _optimizer(self):
        return loss_scale.split(self.model.optimizer)[1]

    def _observe(self, kind, name):
        """Attaches an observer until the end of the training.

        Args:
            kind: Subclass of `Observer`.
            name: String, its name.
        """
        # The same object in each `fit`, so that the step is compiled once for it.
        if self._observed is not self._optimizer:
            self._observer, self._observed = kind(name=name), self._optimizer
        observers.attach(self.model, self._observer)
        observers.build(self.model, self._optimizer)
        # A model with a `train_step` of its own has Keras' function, which is traced.
        has_versions = hasattr(self.model.train_function, "versions")
        self.model.make_train_function(force=None if has_versions else True)

    def _pause(self):
        """Detaches the observer, and returns whether it was attached."""
        attached = self._observer in observers.of(self.model)
        if attached:
            observers.detach(self.model, self._observer)
        return attached

    def on_train_end(self, logs=None):
        self._pause()

    # An evaluation during training would reset the observer, and log it as `val_...`.

    def on_test_begin(self, logs=None):
        self._paused = self._pause()

    def on_test_end(self, logs=None):
        if self._paused:
            observers.attach(self.model, self._observer)
