"""Arms as users choose them: always active, held, or drawn by what they are."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from replay import Replay
from zoo import EAGER

import keras_slsam
from keras_slsam import samplers


def make_model():
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(6, activation="tanh", name=f"hidden{i}") for i in range(3)]
    model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(2, name="head")])
    return keras_slsam.sharpness_aware(model)


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
    return x.astype("float32"), y.astype("float32")


def train(model, optimizer, steps, **kwargs):
    """Returns the masks of the steps. Other arguments go to `compile`."""
    model.compile(optimizer=optimizer, loss="mse", **kwargs)
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
        "sgd", sampler=Spy(0.5, seed=0), arms="layer", always_active=is_head
    )
    again = keras_slsam.SLSAM.from_config(
        keras_slsam.SLSAM("sgd", always_active=is_head).get_config()
    )
    assert again.always_active is is_head
    masks = train(model, optimizer, 4)
    assert masks[:, 3].all() and not masks[:, :3].all()
    assert seen["shapes"] == ((3,), (3,))
    assert [arm.size for arm in seen["arms"]] == [30, 42, 42]
    assert seen["arms"][0].paths == tuple(v.path for v in optimizer.arms[0])
    np.testing.assert_allclose(numpy(optimizer.probabilities), [0.5, 0.5, 0.5, 1])


def test_an_attribute_of_a_sampler_does_not_replace_its_arms():
    class Own(samplers.Uniform):
        def __init__(self, arms):
            super().__init__(0.5)
            self.arms = arms

    with pytest.raises(AttributeError, match="arms"):
        Own(3)

    class Named(samplers.Uniform):
        arms = "user's own"

    optimizer = keras_slsam.SLSAM("sgd", sampler=Named(0.5))
    optimizer.build(make_model().trainable_variables)
    assert optimizer.sampler.arms == "user's own"
    assert optimizer.probabilities.shape == (8,)


@pytest.mark.parametrize("hold", [False, True])
def test_arguments_of_a_sampler_cannot_be_set_once_it_is_built(hold):
    class Own(samplers.Proportional):
        def __init__(self, *args):
            super().__init__(*args)

    inner = sampler = Own(0.25)
    sampler.active_fraction = 0.5
    if hold:
        sampler = samplers.Hold(inner, 2)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler)
    optimizer.build(make_model().trainable_variables)
    with pytest.raises(ValueError, match="`active_fraction` of the.*0.9.*schedule"):
        inner.active_fraction = 0.9
    if hold:
        with pytest.raises(ValueError, match="`steps` of the sampler `Hold`"):
            sampler.steps = 1
    inner.note = "other attributes can be set"


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


@pytest.mark.parametrize("saved, own", [("head", "hidden0"), ("head", None)])
def test_state_with_other_arms_always_active_is_refused(saved, own):
    stores = []
    for chosen in (saved, own):
        optimizer = keras_slsam.SLSAM(
            "sgd", sampler=Replay([[1] * 6]), always_active=chosen
        )
        optimizer.build(make_model().trainable_variables)
        stores.append({})
        optimizer.save_own_variables(stores[-1])
    with pytest.raises(ValueError, match=r"saved by.*always_active=\[6, 7\]"):
        optimizer.load_own_variables(stores[0])


@pytest.mark.parametrize("chosen", ["nothing", ".", lambda v: False, lambda v: True])
def test_some_but_not_all_arms_are_always_active(chosen):
    optimizer = keras_slsam.SLSAM("sgd", always_active=chosen)
    with pytest.raises(ValueError, match="`always_active` of `SLSAM` chooses"):
        optimizer.build(make_model().trainable_variables)
    assert not optimizer.built


@pytest.mark.parametrize(
    "chosen", ["(", 3, ["head"], b"head", re.compile("head"), functools.partial(bool)]
)
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
    expected = train(make_model(), plain, 3, **EAGER)
    np.testing.assert_array_equal(masks, np.repeat(expected, 3, axis=0))
    assert inner.arms is held.sampler.arms and len(inner.arms) == 8


def test_a_mask_is_held_for_several_windows_of_accumulation():
    inner = samplers.Uniform(0.4, seed=3)
    base = keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)
    held = keras_slsam.SLSAM(base, sampler=samplers.Hold(inner, steps=2))
    masks = train(make_model(), held, 8)
    plain = keras_slsam.SLSAM("sgd", sampler=samplers.Uniform(0.4, seed=3))
    expected = train(make_model(), plain, 2, **EAGER)
    np.testing.assert_array_equal(masks, np.repeat(expected, 4, axis=0))


def test_a_held_mask_counts_steps_that_are_skipped():
    drawn = [[arm == place for arm in range(8)] for place in range(3)]
    sampler = samplers.Hold(Replay(drawn), steps=2)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler)
    model = make_model()
    masks = [train(model, optimizer, 1)[0]]
    x, y = batch()
    for skipped in (True, False, True, False):
        model.train_on_batch(x * (np.nan if skipped else 1), y)
        masks.append(numpy(optimizer.active))
    assert int(optimizer.skipped_steps) == 2
    np.testing.assert_array_equal(masks, np.repeat(drawn, 2, axis=0)[:5])


def test_a_held_sampler_learns_once_per_mask():
    sampler = samplers.Hold(samplers.Proportional(0.4, seed=0), steps=3)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler)
    masks = train(make_model(), optimizer, 6)
    expected = masks[0].astype(int) + masks[5]
    np.testing.assert_array_equal(numpy(sampler.sampler._counts), expected)


def test_a_held_mask_is_restored(tmp_path):
    inner = samplers.Proportional(0.4, seed=0)
    optimizer = keras_slsam.SLSAM("sgd", sampler=samplers.Hold(inner, steps=4))
    model = make_model()
    mask = train(model, optimizer, 2, **EAGER)[-1]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    loaded.run_eagerly = False
    for expected in (mask, mask, None):
        for each in (model, loaded):
            each.train_on_batch(*batch())
        expected = numpy(optimizer.active) if expected is None else expected
        np.testing.assert_array_equal(numpy(loaded.optimizer.active), expected)
        np.testing.assert_array_equal(numpy(optimizer.active), expected)


def test_state_of_another_held_sampler_is_refused():
    stores = {}
    for name, inner in (("one", samplers.Uniform(0.5)), ("two", samplers.Bandit(0.2))):
        held = keras_slsam.SLSAM("sgd", sampler=samplers.Hold(inner, 3))
        held.build(make_model().trainable_variables)
        held.save_own_variables(stores.setdefault(name, {}))
    with pytest.raises(ValueError, match=r"Hold\(Uniform\)"):
        held.load_own_variables(stores["one"])


def test_hold_checks_its_arguments_and_masks():
    with pytest.raises(ValueError, match="`sampler` of `Hold`"):
        samplers.Hold("uniform", 3)
    floats = keras_slsam.SLSAM("sgd", sampler=samplers.Hold(Floats(), 2))
    model = make_model()
    model.compile(optimizer=floats, loss="mse")
    with pytest.raises(ValueError, match="must return a boolean tensor.*Floats"):
        model.train_on_batch(*batch())
    sampler = samplers.Uniform(0.5)
    for steps in (0, 1.5, "2", True, float("inf")):
        with pytest.raises(ValueError, match="`steps` of `Hold`"):
            samplers.Hold(sampler, steps)
    samplers.Hold(sampler, 2)
    with pytest.raises(ValueError, match="not used elsewhere"):
        samplers.Hold(sampler, 2)


class Floats(samplers.Sampler):
    def draw(self):
        return ops.full((8,), 0.2)


@keras.saving.register_keras_serializable("test_arms")
def rising(draw):
    return ops.where(draw < 2, 0.25, 1.0)


@keras.saving.register_keras_serializable("test_arms")
def is_head(variable):
    return variable.path.endswith("head/kernel")


@pytest.mark.parametrize(
    ("name", "windows"), [("uniform", 2), ("proportional", None), ("bandit", None)]
)
def test_the_active_fraction_follows_a_schedule(name, windows):
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.SGD(0.01, gradient_accumulation_steps=windows),
        active_fraction=rising,
        sampler=name,
        seed=0,
        arms="layer",
    )
    model, sums = make_model(), []
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(4):
        for _ in range(windows or 1):
            model.train_on_batch(*batch())
        sums.append(float(ops.sum(optimizer.probabilities)))
    # Probabilities in the draws 1, 2, 3 and 4 of four arms.
    np.testing.assert_allclose(sums, [1, 4, 4, 4], rtol=1e-5)
    assert numpy(optimizer.active).all()
    again = keras_slsam.SLSAM.from_config(optimizer.get_config())
    assert again.active_fraction is rising
    sampler = type(optimizer.sampler)
    assert sampler.from_config(optimizer.sampler.get_config()).active_fraction is rising


@pytest.mark.parametrize("name", ["uniform", "proportional", "bandit"])
def test_a_share_that_cannot_be_drawn_counts_as_that_of_one_arm(name):
    def shares(draw):
        return ops.take(ops.convert_to_tensor([0.5, 0.5, 0.0, np.nan, 3.0, 0.5]), draw)

    optimizer = keras_slsam.SLSAM("sgd", active_fraction=shares, sampler=name, seed=0)
    model, sums = make_model(), []
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(5):
        model.train_on_batch(*batch())
        sums.append(float(ops.sum(optimizer.probabilities)))
    np.testing.assert_allclose(sums, [4, 1, 1, 8, 4], rtol=1e-4)


def test_a_schedule_is_checked_at_its_first_step():
    with pytest.raises(ValueError, match="fails at 0.*`active_fraction`"):
        keras_slsam.SLSAM("sgd", active_fraction=lambda draw: 2.0, sampler="uniform")
