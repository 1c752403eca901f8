"""Samplers have exact draws and safe updates, the same on every backend."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_slsam
from keras_slsam import samplers
from keras_slsam import threefry


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def sampler_with(probabilities, cls=samplers.Bandit, seed=0):
    sampler = cls(float(np.mean(probabilities)), seed=seed)
    sampler.build(len(probabilities))
    sampler.probabilities.assign(probabilities)
    return sampler


def reference_threefry(key, counter):
    """Threefry 2x32-20 with Python's integers."""
    bits = 0xFFFFFFFF
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x0, x1 = (counter[0] + schedule[0]) & bits, (counter[1] + schedule[1]) & bits
    for block in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x0 = (x0 + x1) & bits
            x1 = ((x1 << r) | (x1 >> (32 - r))) & bits
            x1 ^= x0
        x0 = (x0 + schedule[(block + 1) % 3]) & bits
        x1 = (x1 + schedule[(block + 2) % 3] + block + 1) & bits
    return x0, x1


def test_reference_threefry_gives_the_published_vectors():
    # Known answers from the Random123 library.
    assert reference_threefry((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    full = 0xFFFFFFFF
    assert reference_threefry((full, full), (full, full)) == (0x1CB996FC, 0xBB002BE7)
    key, counter = (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)
    assert reference_threefry(key, counter) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**31 - 1])
def test_uniform_numbers_equal_the_reference_threefry(seed):
    for draw in (0, 7, 2**31 - 1):
        got = numpy(
            threefry.uniform(
                ops.convert_to_tensor(seed, dtype="int32"),
                ops.convert_to_tensor(draw, dtype="int32"),
                5,
            )
        )
        words = [reference_threefry((seed % 2**32, 0), (draw, i)) for i in range(5)]
        expected = [(high * 2**32 + low) / 2**64 for high, low in words]
        np.testing.assert_allclose(got, expected, rtol=2e-7)


def test_a_large_seed_wraps_and_others_are_refused():
    assert threefry.make_seed(2**32 + 3, "x") == 3
    assert threefry.make_seed(2**31, "x") == -(2**31)
    for seed in ("a", 1.5, True):
        with pytest.raises(ValueError, match="seed"):
            samplers.Uniform(0.5, seed=seed)


def test_fresh_seeds_follow_set_random_seed():
    draws = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        sampler = samplers.Uniform(0.5)
        sampler.build(40)
        draws.append(numpy(sampler.draw()).tolist())
    assert draws[0] == draws[1] != draws[2]


EXPECTED_MASKS = [
    "011001",
    "011101",
    "111000",
    "000100",
    "111100",
    "001000",
    "001001",
    "011000",
]


def test_a_seed_draws_these_masks_on_every_backend():
    sampler = sampler_with(np.float32([0.1, 0.5, 0.9, 0.3, 1e-8, 0.2]), seed=123)
    drawn = ["".join(str(int(on)) for on in numpy(sampler.draw())) for _ in range(8)]
    assert drawn == EXPECTED_MASKS


def test_draws_have_the_exact_conditional_distribution(compile_step):
    p = np.float32([0.05, 0.3, 0.02, 0.1])
    sampler = sampler_with(p)
    draw = compile_step(sampler.draw, sampler.variables)
    draws = np.stack([numpy(draw()) for _ in range(2000)])
    assert draws.any(axis=1).all()
    codes, counts = np.unique(draws @ [1, 2, 4, 8], return_counts=True)
    share = np.zeros(16)
    share[codes] = counts / len(draws)
    masks = (np.arange(16)[:, None] >> np.arange(4)) & 1
    expected = np.prod(np.where(masks, p, 1 - p), axis=1)
    expected[0] = 0
    expected /= expected.sum()
    error = np.sqrt(expected * (1 - expected) / len(draws))
    assert (np.abs(share - expected) < 4.5 * error + 1e-9).all()


def test_draws_with_tiny_probabilities_are_never_empty(compile_step):
    sampler = sampler_with(np.full(5, 1e-8, "float32"), samplers.Uniform)
    draw = compile_step(sampler.draw, sampler.variables)
    draws = np.stack([numpy(draw()) for _ in range(500)])
    assert (draws.sum(axis=1) == 1).all()
    assert (draws.mean(axis=0) > 0.12).all()


def test_probability_one_is_always_drawn(compile_step):
    sampler = sampler_with(np.float32([1e-8, 1.0, 1e-8, 1.0]))
    draw = compile_step(sampler.draw, sampler.variables)
    for _ in range(50):
        mask = numpy(draw())
        assert mask[1] and mask[3]


def reference_bandit(p, mask, norms, share, learning_rate=0.001):
    """The paper's update, in float64 with loops."""
    p, norms = p.astype("float64"), norms.astype("float64")
    ratio = norms[mask] / p[mask]
    loss = ratio.max() ** 2 - ratio**2
    w = p.copy()
    with np.errstate(under="ignore"):
        w[mask] = p[mask] * np.exp(-learning_rate * loss / p[mask])
    budget, order, result = share * len(p), list(np.argsort(-w)), np.zeros(len(p))
    while order and w[order[0]] * budget > max(w[order].sum(), 1e-5):
        result[order.pop(0)] = 1.0
        budget -= 1
    if order:
        result[order] = w[order] * budget / max(w[order].sum(), 1e-5)
    return np.clip(result, 1e-8, 1.0)


def test_bandit_is_finite_and_correct_in_float32_at_any_scale(compile_step):
    share, num_arms = 0.3, 12
    sampler = samplers.Bandit(share, seed=0)
    sampler.build(num_arms)
    update = compile_step(sampler.update, sampler.variables)
    for scale in (0.0, 1e-30, 1e-3, 1.0, 1e3, 1e12, 1e30, 3e38):
        rng = np.random.default_rng(0)
        for _ in range(20):
            before = np.clip(10.0 ** rng.uniform(-8, 0, num_arms), 1e-8, 1).astype("f4")
            mask = rng.random(num_arms) < 0.4
            mask[0] = True
            norms = (scale * rng.random(num_arms) * mask).astype("f4")
            sampler.probabilities.assign(before)
            update(ops.convert_to_tensor(mask), ops.convert_to_tensor(norms))
            after = numpy(sampler.probabilities)
            assert np.isfinite(after).all() and (after >= 1e-8 * 0.999).all(), scale
            assert (after <= 1).all(), scale
            if scale <= 1e12:
                expected = reference_bandit(before, mask, norms, share)
                np.testing.assert_allclose(
                    after, expected, rtol=2e-2, atol=1e-6, err_msg=f"{scale}"
                )


def compile_learn(sampler, compile_step):
    """Compiles a draw and an update with the norms of all arms."""

    def learn(norms):
        mask = sampler.draw()
        sampler.update(mask, ops.where(mask, norms, 0.0))
        return mask

    return compile_step(learn, sampler.variables)


def test_bandit_moves_towards_the_norms(compile_step):
    sampler = samplers.Bandit(0.25, seed=0)
    sampler.build(8)
    norms = np.linspace(0.1, 3.0, 8).astype("float32")
    learn, given = compile_learn(sampler, compile_step), ops.convert_to_tensor(norms)
    for _ in range(1000):
        learn(given)
    p = numpy(sampler.probabilities)
    np.testing.assert_allclose(p.sum(), 2.0, rtol=1e-4)
    assert np.corrcoef(p, norms)[0, 1] > 0.9


def test_proportional_finds_the_norms_and_keeps_the_budget(compile_step):
    sampler = samplers.Proportional(0.25, seed=0)
    sampler.build(8)
    norms = np.linspace(0.1, 3.0, 8).astype("float32")
    learn, given = compile_learn(sampler, compile_step), ops.convert_to_tensor(norms)
    seen = np.zeros(8, bool)
    for _ in range(60):
        seen |= numpy(learn(given))
        p = numpy(sampler.probabilities)
        np.testing.assert_allclose(p.sum(), 2.0, rtol=1e-5)
        if seen.sum() < 4:
            np.testing.assert_allclose(p, 0.25, rtol=1e-6)
    q = norms / norms.sum() * 2.0
    np.testing.assert_allclose(p, 0.05 + (1 - 0.05 / 0.25) * q, rtol=1e-5)


def test_proportional_does_not_depend_on_the_scale(compile_step):
    sampler = samplers.Proportional(0.4, seed=0)
    sampler.build(5)
    learn = compile_learn(sampler, compile_step)
    start = [numpy(v).copy() for v in sampler.variables]
    results = []
    for scale in (1.0, 1e-30, 1e30, 3e38):
        for variable, value in zip(sampler.variables, start):
            variable.assign(value)
        norms = (scale * np.float64([0.1, 0.2, 0.3, 0.4, 1.0])).astype("float32")
        for _ in range(30):
            learn(ops.convert_to_tensor(norms))
        results.append(numpy(sampler.probabilities).copy())
    for found in results[1:]:
        np.testing.assert_allclose(found, results[0], rtol=1e-5)


@pytest.mark.parametrize("cls", [samplers.Bandit, samplers.Proportional])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_probabilities_stay_finite_if_a_norm_is_not(cls, bad):
    sampler = cls(0.5, seed=0)
    sampler.build(4)
    mask = ops.convert_to_tensor([True, True, False, True])
    sampler.update(mask, ops.convert_to_tensor(np.float32([bad, 1.0, 0.0, 2.0])))
    p = numpy(sampler.probabilities)
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p.sum(), 2.0, rtol=1e-5)


def test_zero_norms_leave_the_proportional_sampler_uniform():
    sampler = samplers.Proportional(0.5, seed=0)
    sampler.build(4)
    sampler.update(ops.ones((4,), "bool"), ops.zeros((4,)))
    np.testing.assert_allclose(numpy(sampler.probabilities), 0.5, rtol=1e-6)


def test_sampler_variables_include_generators_lists_and_samplers():
    class Own(samplers.Sampler):
        def build(self, num_arms):
            self.generator = keras.random.SeedGenerator(3)
            self.rows = {"a": [keras.Variable([1.0]), keras.Variable([2.0])]}
            self.inner = samplers.Uniform(0.5, seed=0)
            self.inner.build(num_arms)
            self.probabilities = self.inner.probabilities  # the same variable

    sampler = Own()
    assert sampler.variables == []
    sampler.build(2)
    expected = [sampler.generator.state, *sampler.rows["a"], *sampler.inner.variables]
    assert [id(v) for v in sampler.variables] == [id(v) for v in expected]


def test_a_seed_generator_advances_between_steps():
    class Own(samplers.Sampler):
        def __init__(self):
            self.generator = keras.random.SeedGenerator(3)

        def build(self, num_arms):
            self.num_arms = num_arms

        def draw(self):
            unit = keras.random.uniform((self.num_arms,), seed=self.generator)
            return ops.greater_equal(unit, ops.median(unit))

    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(2)]
    )
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM("sgd", sampler=Own())
    model.compile(optimizer=optimizer, loss="mse")
    masks = set()
    for _ in range(4):
        model.train_on_batch(np.ones((2, 2)), np.ones((2, 2)))
        masks.add(tuple(numpy(optimizer.active).tolist()))
    assert len(masks) > 1


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numpy_numbers_are_accepted(number):
    sampler = samplers.Bandit(number(0.5), learning_rate=number(0.1), seed=np.int64(3))
    assert sampler.get_config()["active_fraction"] == 0.5
    assert type(sampler.get_config()["seed"]) is int
    assert keras_slsam.SAM("sgd", rho=number(0.5)).rho == 0.5
    assert keras_slsam.RST("sgd", probability=number(0.5)).probability == 0.5


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.Bandit(0.3, learning_rate=0.01, min_probability=1e-6, seed=4),
        samplers.Proportional(0.3, momentum=0.5, min_probability=0.1, seed=4),
        samplers.Uniform(0.3, seed=4),
        samplers.All(),
    ],
)
def test_config_round_trip(sampler):
    config = keras.saving.serialize_keras_object(sampler)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(sampler)
    assert again.get_config() == sampler.get_config()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: samplers.Uniform(0.0), "active_fraction"),
        (lambda: samplers.Uniform(1.1), "active_fraction"),
        (lambda: samplers.Uniform(float("nan")), "active_fraction"),
        (lambda: samplers.Uniform("half"), "active_fraction"),
        (lambda: samplers.Uniform(True), "active_fraction"),
        (lambda: samplers.Bandit(0.2, learning_rate=0), "learning_rate"),
        (lambda: samplers.Bandit(0.2, learning_rate=float("inf")), "learning_rate"),
        (lambda: samplers.Bandit(0.2, min_probability=0), "min_probability"),
        (lambda: samplers.Bandit(0.2, min_probability=1e-60), "min_probability"),
        (lambda: samplers.Bandit(0.2, min_probability=0.5), "min_probability"),
        (lambda: samplers.Proportional(0.2, momentum=1.0), "momentum"),
        (lambda: samplers.Proportional(0.02), "min_probability"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        make()


def test_samplers_report_their_minimum_probability():
    assert samplers.Uniform(0.3).min_probability == 0.3
    assert samplers.Proportional(0.3).min_probability == 0.05
    assert samplers.Bandit(0.3).min_probability == 1e-8
    assert samplers.Sampler().min_probability == 0.0
