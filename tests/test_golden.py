"""The methods give the trajectories of their authors' code, in float64."""

import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_slsam
from keras_slsam import samplers

GOLDEN = pathlib.Path(__file__).parent / "golden"


class ReplayedBandit(samplers.Bandit):
    """A bandit with given draws, because they depend on the authors' generator."""

    def __init__(self, masks, active_fraction):
        super().__init__(active_fraction, seed=0)
        self.masks = masks

    def build(self, num_arms):
        super().build(num_arms)
        self.row = keras.Variable(0, dtype="int32", trainable=False)

    def draw(self):
        mask = ops.take(ops.convert_to_tensor(self.masks), self.row, axis=0)
        self.row.assign_add(1)
        return mask


def base_optimizer(golden):
    # NumPy scalars, because Keras' optimizers on TensorFlow round a Python float to
    # float32 when they cast it, even to float64.
    learning_rate = golden["meta_lr"][()]
    if "base_momentum" in golden:
        return keras.optimizers.SGD(learning_rate, momentum=golden["base_momentum"][()])
    beta_1, beta_2 = golden["base_betas"]
    return keras.optimizers.AdamW(
        learning_rate,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=golden["base_eps"][()],
        weight_decay=golden["base_weight_decay"][()],
    )


def optimizer(name, golden):
    base, rho = base_optimizer(golden), float(golden["meta_rho"])
    if name.startswith("slsam"):
        sampler = ReplayedBandit(golden["mask"], float(golden["meta_s"]))
        return keras_slsam.SLSAM(base, rho=rho, sampler=sampler)
    if name.startswith("s2sam"):
        return keras_slsam.S2SAM(base, rho=rho)
    return keras_slsam.SAM(base, rho=rho)


def multilayer_perceptron(golden):
    widths = [int(width) for width in golden["meta_dims"]]
    model = keras.Sequential([keras.Input((widths[0],))])
    for width in widths[1:-1]:
        model.add(keras.layers.Dense(width, activation="tanh"))
    model.add(keras.layers.Dense(widths[-1]))
    model.set_weights([golden[f"init_{i}"] for i in range(len(model.weights))])
    return keras_slsam.sharpness_aware(model)


@pytest.mark.parametrize(
    "name",
    ["sam_sgd", "sam_adamw", "s2sam_sgd", "s2sam_adamw", "slsam_sgd", "slsam_adamw"],
)
def test_trajectory_matches_the_authors_code(name, float64):
    golden = np.load(GOLDEN / f"{name}.npz")
    model = multilayer_perceptron(golden)
    model.compile(
        optimizer=optimizer(name, golden),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    batch = int(golden["meta_batch"])
    for t in range(len(golden["loss"])):
        if "prob" in golden:
            np.testing.assert_allclose(
                ops.convert_to_numpy(model.optimizer.probabilities),
                golden["prob"][t],
                rtol=0,
                atol=1e-9,
            )
        start = (t * batch) % len(golden["x"])
        rows = slice(start, start + batch)
        model.reset_metrics()
        loss = model.train_on_batch(golden["x"][rows], golden["y"][rows])
        np.testing.assert_allclose(loss, golden["loss"][t], rtol=0, atol=1e-9)
        for i, weight in enumerate(model.get_weights()):
            np.testing.assert_allclose(
                weight, golden[f"params_{i}"][t], rtol=0, atol=1e-9
            )
        if "norms" in golden:
            np.testing.assert_array_equal(
                ops.convert_to_numpy(model.optimizer.active), golden["mask"][t]
            )
            np.testing.assert_allclose(
                ops.convert_to_numpy(model.optimizer.gradient_norms),
                golden["norms"][t],
                rtol=0,
                atol=1e-9,
            )


@pytest.mark.parametrize("name", ["bandit_small", "bandit_large", "bandit_capped"])
def test_bandit_update_matches_the_authors_code(name, float64, compile_step):
    golden = np.load(GOLDEN / f"{name}.npz")
    sampler = samplers.Bandit(float(golden["s"]), seed=0)
    sampler.build(golden["before"].shape[1])
    update = compile_step(sampler.update, sampler.variables)
    for before, mask, norms, after in zip(
        golden["before"], golden["mask"], golden["norms"], golden["after"]
    ):
        sampler.probabilities.assign(before)
        update(ops.convert_to_tensor(mask), ops.convert_to_tensor(norms))
        np.testing.assert_allclose(
            ops.convert_to_numpy(sampler.probabilities), after, rtol=1e-7
        )
