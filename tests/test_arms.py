"""Arms as users choose them: always active, held, or drawn by what they are."""

import keras
import numpy as np
import pytest
import zoo  # noqa: F401
from keras import layers
from keras import ops
from replay import Replay

import keras_slsam
from keras_slsam import samplers

BACKEND = keras.config.backend()


def make_model():
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(6, activation="tanh", name=f"hidden{i}") for i in range(3)]
    model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(2, name="head")])
    return keras_slsam.sharpness_aware(model)


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
    return x.astype("float32"), y.astype("float32")


def train(model, optimizer, steps):
    """Returns the masks of the steps."""
    model.compile(optimizer=optimizer, loss="mse")
    masks = []
    for _ in range(steps):
        model.train_on_batch(*batch())
        masks.append(ops.convert_to_numpy(optimizer.active))
    return np.stack(masks)


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("single_step", [False, True])
def test_always_active_equals_the_same_masks_from_a_sampler(single_step):
    drawn = np.array([[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]], bool)
    whole = np.concatenate([drawn, np.ones((3, 2), bool)], axis=1)
    results = []
    for masks, chosen in ((drawn, "head"), (whole, None)):
        model = make_model()
        optimizer = keras_slsam.SLSAM(
            keras.optimizers.AdamW(1e-2),
            rho=0.1,
            sampler=Replay(masks.tolist()),
            single_step=single_step,
            always_active=chosen,
        )
        np.testing.assert_array_equal(train(model, optimizer, 3), whole)
        results.append(model.get_weights())
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_the_sampler_knows_only_the_arms_that_it_draws():
    seen = {}

    class Spy(samplers.Uniform):
        def build(self, num_arms):
            seen["arms"] = self.arms
            super().build(num_arms)

        def update(self, active, norms):
            seen["shapes"] = tuple(active.shape), tuple(norms.shape)

    model = make_model()
    optimizer = keras_slsam.SLSAM(
        "sgd",
        sampler=Spy(0.5, seed=0),
        arms="layer",
        always_active=lambda variable: variable.path.endswith("head/kernel"),
    )
    masks = train(model, optimizer, 4)
    assert masks[:, 3].all() and not masks[:, :3].all()
    assert seen["shapes"] == ((3,), (3,))
    assert [arm.size for arm in seen["arms"]] == [30, 42, 42]
    assert seen["arms"][0].paths == tuple(v.path for v in optimizer.arms[0])
    np.testing.assert_allclose(numpy(optimizer.probabilities), [0.5, 0.5, 0.5, 1])


def test_always_active_is_saved(tmp_path):
    model = make_model()
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(1e-2), sampler="proportional", always_active="head"
    )
    train(model, optimizer, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    for each in (model, loaded):
        each.train_on_batch(*batch())
    for one, other in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(one, other)
    other = keras_slsam.SLSAM(
        keras.optimizers.AdamW(1e-2), sampler="proportional", always_active="hidden0"
    )
    model = make_model()
    model.compile(optimizer=other, loss="mse")
    other.build(model.trainable_variables)
    store = {}
    optimizer.save_own_variables(store)
    with pytest.raises(ValueError, match="always_active=.*saved|saved.*always_active="):
        other.load_own_variables(store)


@pytest.mark.parametrize("chosen", ["nothing", ".", lambda v: False, lambda v: True])
def test_some_but_not_all_arms_are_always_active(chosen):
    optimizer = keras_slsam.SLSAM("sgd", always_active=chosen)
    with pytest.raises(ValueError, match="`always_active` of `SLSAM` chooses"):
        optimizer.build(make_model().trainable_variables)
    assert not optimizer.built


@pytest.mark.parametrize("chosen", ["(", 3, ["head"]])
def test_a_wrong_choice_is_refused_at_once(chosen):
    with pytest.raises(ValueError, match="`always_active` of `SLSAM` must be"):
        keras_slsam.SLSAM("sgd", always_active=chosen)


def test_always_active_with_all_arms_is_refused():
    with pytest.raises(ValueError, match="`always_active` of `SLSAM` is not allowed"):
        keras_slsam.SLSAM("sgd", sampler="all", always_active="head")


def test_a_mask_is_held_for_several_steps():
    inner = samplers.Uniform(0.4, seed=3)
    held = keras_slsam.SLSAM("sgd", sampler=samplers.Hold(inner, steps=3))
    masks = train(make_model(), held, 9)
    plain = keras_slsam.SLSAM("sgd", sampler=samplers.Uniform(0.4, seed=3))
    expected = train(make_model(), plain, 3)
    np.testing.assert_array_equal(masks, np.repeat(expected, 3, axis=0))


def test_a_held_sampler_learns_in_each_step_and_is_saved():
    sampler = samplers.Hold(samplers.Proportional(0.4, seed=0), steps=4)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler)
    train(make_model(), optimizer, 4)
    counts = numpy(sampler.sampler._counts)
    np.testing.assert_array_equal(counts, 4 * numpy(optimizer.active))
    config = keras_slsam.SLSAM.from_config(optimizer.get_config()).sampler
    assert (config.steps, config.sampler.active_fraction) == (4, 0.4)
    # Its state is in a single list, so that a mask in progress is restored.
    names = {variable.name for variable in optimizer.variables}
    assert {"mask", "count", "probabilities", "seed_state"} <= names


def test_hold_checks_its_arguments():
    with pytest.raises(ValueError, match="`sampler` of `Hold`"):
        samplers.Hold("uniform", 3)
    sampler = samplers.Uniform(0.5)
    for steps in (0, 1.5, "2", True):
        with pytest.raises(ValueError, match="`steps` of `Hold`"):
            samplers.Hold(sampler, steps)
    samplers.Hold(sampler, 2)
    with pytest.raises(ValueError, match="not used elsewhere"):
        samplers.Hold(sampler, 2)


@keras.saving.register_keras_serializable("test_arms")
def rising(draw):
    return ops.where(draw < 2, 0.25, 1.0)


@pytest.mark.parametrize("name", ["uniform", "proportional", "bandit"])
def test_the_active_fraction_follows_a_schedule(name):
    optimizer = keras_slsam.SLSAM(
        "sgd", active_fraction=rising, sampler=name, seed=0, arms="layer"
    )
    model, sums = make_model(), []
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(4):
        model.train_on_batch(*batch())
        sums.append(float(ops.sum(optimizer.probabilities)))
    # Probabilities in the draws 1, 2, 3 and 4 of four arms.
    np.testing.assert_allclose(sums, [1, 4, 4, 4], rtol=1e-5)
    assert numpy(optimizer.active).all()
    again = keras_slsam.SLSAM.from_config(optimizer.get_config())
    assert again.active_fraction is rising
    sampler = type(optimizer.sampler)
    assert sampler.from_config(optimizer.sampler.get_config()).active_fraction is rising


def test_a_schedule_is_checked_at_its_first_step():
    with pytest.raises(ValueError, match="fails at step 0.*`active_fraction`"):
        keras_slsam.SLSAM("sgd", active_fraction=lambda draw: 2.0, sampler="uniform")
