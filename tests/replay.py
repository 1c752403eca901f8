"""A sampler that replays a table of masks."""

import keras
from keras import ops

from keras_slsam import samplers


@keras.saving.register_keras_serializable("tests")
class Replay(samplers.Sampler):
    def __init__(self, masks):
        self.masks = [[bool(on) for on in mask] for mask in masks]

    def build(self, num_arms):
        self.row = keras.Variable(0, dtype="int32", trainable=False)

    def draw(self):
        row = ops.mod(self.row, len(self.masks))
        mask = ops.take(ops.convert_to_tensor(self.masks), row, axis=0)
        self.row.assign_add(1)
        return mask

    def get_config(self):
        return {"masks": self.masks}
