"""Dense SAM as tutorials write it: a custom `train_step`, one file per backend.

It has shortcomings that `keras_slsam` avoids. It ignores sample weights and loss
scaling. On TensorFlow and PyTorch the two passes have different dropout masks, the
statistics of BatchNorm are updated twice per step, and the weights stay perturbed if an
exception is raised.
"""
