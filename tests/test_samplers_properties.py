"""Properties of samplers for any norms, tested with hypothesis.

Each backend is compared with the same reference, NumPy in float64, so all three agree.
"""

import functools

import hypothesis
import keras
import numpy as np
import pytest
from conftest import CompileStep
from hypothesis import strategies as st
from keras import ops
from test_samplers import numpy
from test_samplers import reference_bandit
from test_samplers import reference_threefry

from keras_slsam import samplers

ALL = keras.config.backend() == "torch"  # other backends compile for each size
# Each run has the same examples. There is no deadline, because the first example of
# each size compiles.
examples = hypothesis.settings(
    max_examples=50 if ALL else 15, derandomize=True, deadline=None, database=None
)
CASES = [(1, 0.3), (9, 0.3), (9, 1.0), (10_000, 0.02)]
if ALL:
    CASES += [(1, 1.0), (2, 0.5)]
FEW_ARMS = [case for case in CASES if case[0] < 10]
LEARNERS = [samplers.Bandit, samplers.Proportional]


class Run:
    """A sampler whose update and draw are compiled, as in a step of `fit`."""

    def __init__(self, cls, num_arms, fraction):
        kwargs = {"min_probability": 0.01} if cls is samplers.Proportional else {}
        self.sampler = cls(fraction, seed=3, **kwargs)
        self.sampler.build(num_arms)
        self.num_arms, self.budget = num_arms, fraction * num_arms
        self.lowest = getattr(self.sampler, "min_probability", None)
        self.start = [numpy(v).copy() for v in self.sampler.variables]
        compile_step = CompileStep()
        variables = self.sampler.variables
        self._update = compile_step(self.sampler.update, variables)
        self._draw = compile_step(self.sampler.draw, variables)

    def reset(self):
        for variable, value in zip(self.sampler.variables, self.start):
            variable.assign(value)

    def update(self, active, norms):
        """Returns the probabilities after a step with these norms."""
        norms = np.where(active, norms, 0).astype("float32")
        self._update(ops.convert_to_tensor(active), ops.convert_to_tensor(norms))
        return self.probabilities()

    def probabilities(self):
        return numpy(self.sampler.probabilities).copy()

    def state(self):
        return [numpy(v).copy() for v in self.sampler.variables]

    def draw(self, probabilities, number):
        self.sampler.probabilities.assign(probabilities)
        self.sampler._seed_state.assign([3, number])
        return numpy(self._draw())


make_run = functools.cache(Run)


def run_of(cls, case):
    run = make_run(cls, *case)
    run.reset()
    return run


def arrays(num_arms, entries):
    """Generates arrays of `entries`. Large arrays repeat a few entries in any order."""
    if num_arms < 10:
        return st.lists(entries, min_size=num_arms, max_size=num_arms).map(np.array)
    few = st.lists(entries, min_size=1, max_size=20)
    seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
    return st.builds(lambda rng, few: rng.choice(few, num_arms), seeds, few)


def powers_of_ten(low, high):
    return st.floats(low, high).map(lambda exponent: float(np.float32(10.0**exponent)))


NORMS = st.one_of(
    powers_of_ten(-30, 30),
    powers_of_ten(-1, 1),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30, 3e38]),
)
# Norms of similar size, scaled by any size, so that few are negligible.
ALIKE = st.one_of(powers_of_ten(-1, 1), powers_of_ten(-3, 1), st.just(0.0))
SIZES = st.sampled_from([1e-30, 1.0, 1e30])
PROBABILITIES = st.one_of(powers_of_ten(-8, 0), st.sampled_from([1e-8, 1.0]))


def masks(num_arms):
    return arrays(num_arms, st.booleans())


def steps(num_arms, norms=NORMS):
    """Generates several steps, each with a mask and the norms of all arms."""
    step = st.tuples(masks(num_arms), arrays(num_arms, norms))
    return st.lists(step, min_size=1, max_size=4)


def project(weights, budget):
    """Finds p, proportional to the weights but at most 1, by bisection.

    Returns:
        p, whose sum is the budget, and whether weights are negligible, so that the sum
        may be smaller.
    """
    low, high = budget / weights.sum(), 1.0 / weights[weights > 0].min()
    for _ in range(60):
        factor = np.sqrt(low * high)
        if np.minimum(factor * weights, 1.0).sum() < budget:
            low = factor
        else:
            high = factor
    p = np.minimum(high * weights, 1.0)
    rest = weights[p < 1].sum() if (p < 1).any() else weights.min()
    return p, rest < 1.01e-5 or p.sum() < budget * (1 - 1e-6)


@examples
@hypothesis.given(data=st.data())
def test_projection_is_proportional_and_capped(data):
    """Without an update from norms, the bandit only projects."""
    run = run_of(samplers.Bandit, data.draw(st.sampled_from(CASES)))
    weights = data.draw(arrays(run.num_arms, PROBABILITIES)).astype("float32")
    run.sampler.probabilities.assign(weights)
    p = run.update(np.zeros(run.num_arms, bool), np.zeros(run.num_arms))
    assert (p >= np.float32(1e-8)).all() and (p <= 1).all()
    order = np.argsort(weights)
    assert (np.diff(p[order]) >= -1e-6 * p[order][1:]).all()
    expected, vanished = project(weights.astype("float64"), run.budget)
    if not vanished:
        np.testing.assert_allclose(p, np.maximum(expected, 1e-8), rtol=1e-4)
    else:
        assert p.sum() <= run.budget * (1 + 1e-5) + 1e-8 * run.num_arms


@pytest.mark.parametrize("cls", LEARNERS)
@examples
@hypothesis.given(data=st.data())
def test_sum_and_bounds_hold_after_any_norms(cls, data):
    run = run_of(cls, data.draw(st.sampled_from(CASES)))
    for active, norms in data.draw(steps(run.num_arms)):
        p = run.update(active, norms)
        assert np.isfinite(p).all()
        assert (p >= np.float32(run.lowest)).all() and (p <= 1).all()
        most = run.budget + run.lowest * run.num_arms * (cls is samplers.Bandit)
        assert p.sum(dtype="float64") <= most * (1 + 1e-4)
    assert all(np.isfinite(value).all() for value in run.state())
    assert run.draw(p, number=0).any()


@examples
@hypothesis.given(data=st.data())
def test_bandit_matches_the_paper(data):
    run = run_of(samplers.Bandit, data.draw(st.sampled_from(FEW_ARMS)))
    for active, n in data.draw(steps(run.num_arms, ALIKE)):
        before = run.probabilities()
        n = n.astype("float32")
        if active.any():
            # Rounding errors grow with the exponent.
            exponent = 1e-3 * (n[active] / before[active]).max() ** 2 / before.min()
            hypothesis.assume(exponent < 1e4)
            expected = reference_bandit(before, active, n, run.sampler.active_fraction)
        else:
            expected = before
        p = run.update(active, n)
        np.testing.assert_allclose(p, expected, rtol=2e-2, atol=1e-6)


@examples
@hypothesis.given(data=st.data())
def test_proportional_follows_the_means(data):
    run = run_of(samplers.Proportional, data.draw(st.sampled_from(CASES)))
    means, counts = np.zeros(run.num_arms), np.zeros(run.num_arms)
    size = data.draw(SIZES)
    for active, norms in data.draw(steps(run.num_arms, ALIKE)):
        norms = (size * norms).astype("float32").astype("float64")
        p = run.update(active, norms)
        counts += active
        newest = np.maximum(1 / np.maximum(counts, 1), 1 - run.sampler.momentum)
        means = np.where(active, means + newest * (norms - means), means)
    seen = counts > 0
    if 2 * seen.sum() < run.num_arms or not means.any():
        expected = np.full(run.num_arms, run.budget / run.num_arms)
        np.testing.assert_allclose(p, expected, rtol=1e-5)
        return
    weights = np.where(seen, means / means.max(), 1.0)
    order = np.argsort(weights)
    assert (np.diff(p[order]) >= -1e-5 * p[order][1:]).all()
    q, vanished = project(weights, run.budget)
    if not vanished:
        low, share = run.lowest, run.sampler.active_fraction
        np.testing.assert_allclose(p, low + (1 - low / share) * q, rtol=1e-4)
        np.testing.assert_allclose(p.sum(dtype="float64"), run.budget, rtol=1e-4)


@examples
@hypothesis.given(data=st.data(), scale=st.sampled_from([2.0**-90, 2.0**-9, 2.0**90]))
def test_proportional_does_not_depend_on_the_scale(data, scale):
    run = run_of(samplers.Proportional, data.draw(st.sampled_from(CASES)))
    found = []
    given = data.draw(steps(run.num_arms, powers_of_ten(-3, 3)))
    for factor in (1.0, scale):
        run.reset()
        for active, norms in given:
            p = run.update(active, factor * norms)
        found.append(p)
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("cls", LEARNERS)
@examples
@hypothesis.given(data=st.data())
def test_arms_with_norms_that_are_not_finite_count_as_inactive(cls, data):
    """The step equals one in which the arms with these norms are inactive."""
    run = run_of(cls, data.draw(st.sampled_from(CASES)))
    diverged = st.sampled_from([np.nan, np.inf, -np.inf])
    given = data.draw(steps(run.num_arms, st.one_of(NORMS, diverged)))
    for active, norms in given:
        run.update(active, norms)
    found = run.state()
    run.reset()
    for active, norms in given:
        run.update(active & np.isfinite(norms), norms)
    for one, other in zip(found, run.state()):
        np.testing.assert_array_equal(one, other)


def reference_draw(p, number):
    """Returns the mask in float64, and whether it depends on rounding."""
    index = np.arange(len(p) + 1, dtype="uint64")
    high, low = reference_threefry((3, 0), (number, index))
    unit = (high * 2.0**32 + low) / 2.0**64
    p = p.astype("float64")
    with np.errstate(divide="ignore"):
        reached = -np.expm1(np.cumsum(np.log1p(-p)))
    wanted = unit[-1] * reached[-1]
    first = np.searchsorted(reached, wanted)
    mask = (index[:-1] > first) & (unit[:-1] < p)
    mask[first] = True
    # In float32, sums of 10,000 terms differ by this much between backends.
    close = np.abs(reached - wanted) < 1e-3 * wanted
    return mask, close.any() or (np.abs(unit[:-1] - p) < 1e-6 * p).any()


@examples
@hypothesis.given(data=st.data(), number=st.integers(0, 2**31 - 2))
def test_draws_match_the_reference_and_are_never_empty(data, number):
    run = run_of(samplers.Uniform, data.draw(st.sampled_from(CASES)))
    p = data.draw(arrays(run.num_arms, PROBABILITIES)).astype("float32")
    mask = run.draw(p, number)
    assert mask.any()
    assert mask[p == 1].all()
    expected, close = reference_draw(p, number)
    if not close:
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("cls", LEARNERS)
def test_an_arm_with_zero_gradients_can_still_be_drawn(cls):
    run = run_of(cls, (9, 0.3))
    norms = np.where(np.arange(9) == 4, 0.0, 3.0)
    p = run.probabilities()
    for number in range(100):
        mask = run.draw(p, number)
        p = run.update(mask, norms)
        assert mask.any()
        np.testing.assert_allclose(p.sum(), run.budget, rtol=1e-5)
    assert np.float32(run.lowest) <= p[4] < p[np.arange(9) != 4].min()
