"""Samplers: which arms take part in a step.

An *arm* is a group of variables that is switched on or off together. A sampler
draws the mask of a step's active arms, and learns from the gradient norms that
the step found. The budget is `active_fraction`: the expected share of active
arms.
"""

import numbers

import keras
from keras import ops

from keras_slsam import threefry


class Sampler:
    """Draws the arms that are active in a step. Base class of all samplers.

    A subclass makes all its `keras.Variable`s in `build`, as attributes, and
    overrides `draw`, and `update` and `get_config` where it needs to. It runs
    inside the compiled step, so it speaks `keras.ops` and changes state by
    `variable.assign` only.

    Example:

    A sampler that replays a table of masks.

    >>> import keras
    >>> from keras import ops
    >>> from keras_slsam import samplers
    >>> class Replay(samplers.Sampler):
    ...     def __init__(self, masks):
    ...         self.masks = masks
    ...     def build(self, num_arms):
    ...         self.row = keras.Variable(0, dtype="int32", trainable=False)
    ...     def draw(self):
    ...         mask = ops.take(ops.convert_to_tensor(self.masks), self.row, axis=0)
    ...         self.row.assign_add(1)
    ...         return mask
    >>> sampler = Replay([[True, False], [False, True]])
    >>> sampler.build(2)
    >>> ops.convert_to_numpy(sampler.draw()).tolist()
    [True, False]
    """

    #: Probability of each arm in the next draw, shape `(num_arms,)`, or `None`.
    probabilities = None

    #: The least probability of an arm, where arms are drawn independently, else 0. A
    #: compiled step has no conditions for work that is left out in hardly any step.
    min_probability: float = 0.0

    def build(self, num_arms: int) -> None:
        """Makes the sampler's variables.

        Args:
            num_arms: int, the number of arms.
        """

    def draw(self):
        """Draws the mask of one step.

        Returns:
            Boolean tensor of shape `(num_arms,)`, with at least one true entry.
        """
        raise NotImplementedError(
            f"A sampler must implement `draw()`. Received: {type(self).__name__}"
        )

    def update(self, active, norms):
        """Learns from a step. By default nothing.

        Args:
            active: Boolean tensor of shape `(num_arms,)`, the step's mask.
            norms: Float tensor of shape `(num_arms,)`, the norms of the first
                pass's gradients, 0 where inactive.
        """

    @property
    def variables(self) -> list[keras.Variable]:
        """List of the sampler's variables, in the order they were made.

        Those of `keras.random.SeedGenerator`s and of other samplers, and those in
        lists and dicts, are among them.
        """
        found: dict[int, keras.Variable] = {}
        for attribute in keras.tree.flatten(list(vars(self).values())):
            if isinstance(attribute, Sampler):
                found.update((id(v), v) for v in attribute.variables)
            elif isinstance(attribute, keras.random.SeedGenerator):
                found[id(attribute.state)] = attribute.state
            elif isinstance(attribute, keras.Variable):
                found[id(attribute)] = attribute
        return list(found.values())

    def get_config(self) -> dict:
        """Returns the arguments of the constructor as a dict."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Makes a sampler from the dict that `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable("keras_slsam")
class All(Sampler):
    """Every arm is active in every step: dense SAM.

    Example:

    >>> from keras import ops
    >>> from keras_slsam import samplers
    >>> sampler = samplers.All()
    >>> sampler.build(num_arms=2)
    >>> ops.convert_to_numpy(sampler.draw()).tolist()
    [True, True]
    """

    def build(self, num_arms):
        self._num_arms = num_arms

    def draw(self):
        return ops.ones((self._num_arms,), dtype="bool")


class _Independent(Sampler):
    """Arms drawn independently, each with its own probability, never all off."""

    def __init__(self, active_fraction: float, seed: int | None = None) -> None:
        name = type(self).__name__
        _check_number(name, "active_fraction", active_fraction)
        if not 0 < active_fraction <= 1:
            raise ValueError(
                f"Argument `active_fraction` of `{name}` is the expected share of "
                "active arms and must be in (0, 1]. "
                f"Received: active_fraction={active_fraction!r}"
            )
        self.active_fraction = float(active_fraction)
        self._first_seed = threefry.make_seed(seed, name)
        self.seed = None if seed is None else int(seed)

    def build(self, num_arms):
        self._num_arms = num_arms
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        self.probabilities = keras.Variable(
            ops.full((num_arms,), self.active_fraction, dtype=dtype),
            dtype=dtype,
            trainable=False,
            name="probabilities",
        )
        self._seed_state = keras.Variable(
            ops.convert_to_tensor([self._first_seed, 0], dtype="int32"),
            dtype="int32",
            trainable=False,
            name="seed_state",
        )

    def draw(self):
        # Exact and without a loop: draw the first active arm j from
        # P(first = j) = p_j * prod_{i<j} (1 - p_i), given that there is one;
        # the arms before it are off, those after it independent.
        seed, draw = self._seed_state[0], self._seed_state[1]
        p = ops.convert_to_tensor(self.probabilities)
        unit = ops.cast(threefry.uniform(seed, draw, self._num_arms + 1), p.dtype)
        # P(an arm up to j is active), by logarithms since 1 - 1e-8 is 1 in float32.
        reached = -ops.expm1(ops.cumsum(ops.log1p(-p)))
        first = ops.sum(ops.cast(reached < unit[self._num_arms] * reached[-1], "int32"))
        index = ops.arange(self._num_arms, dtype="int32")
        later = ops.logical_and(index > first, unit[: self._num_arms] < p)
        self._seed_state.assign(ops.stack([seed, draw + 1]))
        return ops.logical_or(ops.equal(index, first), later)

    def get_config(self):
        return {"active_fraction": self.active_fraction, "seed": self.seed}


@keras.saving.register_keras_serializable("keras_slsam")
class Uniform(_Independent):
    """Every arm with the same probability in every step.

    Shows what a sampler that learns adds.

    Args:
        active_fraction: Float in (0, 1], the probability of each arm.
        seed: int, or `None` for a fresh one.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Uniform(active_fraction=0.5, seed=0)
    >>> sampler.build(num_arms=4)
    >>> sampler.draw().shape[0]
    4
    """

    def __init__(self, active_fraction: float, seed: int | None = None) -> None:
        super().__init__(active_fraction, seed)
        self.min_probability = self.active_fraction


@keras.saving.register_keras_serializable("keras_slsam")
class Bandit(_Independent):
    """The multi-armed bandit of SL-SAM.

    After a step with active arms A, gradient norms n and probabilities p:

        l_i = max_{j in A} (n_j / p_j)^2 - (n_i / p_i)^2
        p_i <- p_i * exp(-learning_rate * l_i / p_i)            for i in A

    and p is projected back to `sum(p) = active_fraction * num_arms`, `p <= 1`.
    The fixed point is p proportional to n. How fast it gets there depends on the
    scale of the loss, and an arm's probability can fall so low that the arm is
    not drawn again, also with an `active_fraction` of 1: `Proportional` has neither
    trait.

    Args:
        active_fraction: Float in (0, 1], the expected share of active arms.
        learning_rate: Float > 0, the bandit's own step size (alpha).
        min_probability: Float in [1e-8, active_fraction], the least probability of
            an arm.
        seed: int, or `None` for a fresh one.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Bandit(active_fraction=0.2, seed=0)
    >>> sampler.build(num_arms=10)
    >>> round(float(sampler.probabilities[0]), 3)
    0.2

    Reference:
        Cheng et al., arXiv 2602.09395, the layer bandit of SL-SAM.
    """

    def __init__(
        self,
        active_fraction: float,
        learning_rate: float = 0.001,
        min_probability: float = 1e-8,
        seed: int | None = None,
    ) -> None:
        super().__init__(active_fraction, seed)
        _check_number("Bandit", "learning_rate", learning_rate)
        if not 0 < learning_rate < float("inf"):
            raise ValueError(
                "Argument `learning_rate` of `Bandit` must be a finite float > 0. "
                f"Received: learning_rate={learning_rate!r}"
            )
        _check_number("Bandit", "min_probability", min_probability)
        if not 1e-8 <= min_probability <= active_fraction:
            raise ValueError(
                "Argument `min_probability` of `Bandit` must be in "
                "[1e-8, active_fraction]. "
                f"Received: min_probability={min_probability!r}, "
                f"active_fraction={active_fraction!r}"
            )
        self.learning_rate = float(learning_rate)
        self.min_probability = float(min_probability)

    def update(self, active, norms):
        p = ops.convert_to_tensor(self.probabilities)
        norms, active = _finite(norms, active, p.dtype)
        # Norms relative to the largest: squares of n / p itself would overflow.
        scale = ops.max(norms)
        ratio = _relative(norms) / p
        best = ops.max(ratio)
        gap = (best - ratio) * (best + ratio) / p
        # The best arm's loss is 0 also where the scale's square overflows.
        exponent = ops.where(gap > 0, self.learning_rate * gap * scale * scale, 0.0)
        weights = ops.where(active, p * ops.exp(-exponent), p)
        budget = self.active_fraction * self._num_arms
        p = ops.clip(_project(weights, budget), self.min_probability, 1.0)
        self.probabilities.assign(p)

    def get_config(self):
        return {
            **super().get_config(),
            "learning_rate": self.learning_rate,
            "min_probability": self.min_probability,
        }


@keras.saving.register_keras_serializable("keras_slsam")
class Proportional(_Independent):
    """Probabilities proportional to the arms' mean gradient norms.

    Goes straight to the bandit's fixed point: free of the scale of the loss, and
    every arm stays in the draw. With m_i the running mean of arm i's norms over
    the steps in which it was active, and q the projection of m on
    `sum(q) = active_fraction * num_arms`, `q <= 1`:

        p = min_probability + (1 - min_probability / active_fraction) * q

    so p keeps the budget (unless fewer than `active_fraction * num_arms` arms have
    norms worth mentioning). Arms not seen yet count with the largest mean, and p
    stays uniform until half of the arms have been seen. This sampler is ours, not
    of the SL-SAM paper.

    Args:
        active_fraction: Float in (0, 1], the expected share of active arms.
        momentum: Float in [0, 1). The newest norm weighs at least
            `1 - momentum` in the mean; the first norms of an arm weigh equally.
        min_probability: Float in (0, active_fraction], the least probability of
            an arm.
        seed: int, or `None` for a fresh one.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Proportional(active_fraction=0.2, seed=0)
    >>> sampler.build(num_arms=10)
    >>> sampler.draw().shape[0]
    10
    """

    def __init__(
        self,
        active_fraction: float,
        momentum: float = 0.9,
        min_probability: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__(active_fraction, seed)
        _check_number("Proportional", "momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(
                "Argument `momentum` of `Proportional` must be in [0, 1). "
                f"Received: momentum={momentum!r}"
            )
        _check_number("Proportional", "min_probability", min_probability)
        if not 0 < min_probability <= active_fraction:
            raise ValueError(
                "Argument `min_probability` of `Proportional` must be in "
                "(0, active_fraction]: all arms together would exceed the budget "
                f"otherwise. Received: min_probability={min_probability!r}, "
                f"active_fraction={active_fraction!r}. Pass "
                "`samplers.Proportional(active_fraction, min_probability=...)` with "
                "a smaller value."
            )
        self.momentum = float(momentum)
        self.min_probability = float(min_probability)

    def build(self, num_arms):
        super().build(num_arms)
        dtype = self.probabilities.dtype
        self._means, self._counts = (
            keras.Variable(
                ops.zeros((num_arms,), dtype=dtype),
                dtype=dtype,
                trainable=False,
                name=name,
            )
            for name in ("means", "counts")
        )

    def update(self, active, norms):
        norms, active = _finite(norms, active, self.probabilities.dtype)
        counts = self._counts + ops.cast(active, norms.dtype)
        newest = ops.maximum(1.0 / ops.maximum(counts, 1.0), 1.0 - self.momentum)
        means = ops.convert_to_tensor(self._means)
        means = ops.where(active, means + newest * (norms - means), means)
        self._counts.assign(counts)
        self._means.assign(means)
        seen = counts > 0
        # Relative means: the projection then never sees a huge or a tiny sum.
        known = ops.logical_and(seen, ops.max(means) > 0)
        relative = ops.where(known, _relative(means), 1.0)
        q = _project(relative, self.active_fraction * self._num_arms)
        low, share = self.min_probability, self.active_fraction
        enough = 2 * ops.sum(ops.cast(seen, "int32")) >= self._num_arms
        p = ops.where(enough, low + (1 - low / share) * q, share)
        self.probabilities.assign(ops.clip(p, low, 1.0))

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "min_probability": self.min_probability,
        }


def _check_number(owner, name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"Argument `{name}` of `{owner}` must be a number. "
            f"Received: {name}={value!r}"
        )


def _finite(norms, active, dtype):
    """Norms of the arms to learn from: a diverged gradient teaches nothing."""
    norms = ops.cast(norms, dtype)
    active = ops.logical_and(active, ops.isfinite(norms))
    return ops.where(active, norms, 0.0), active


def _relative(values):
    """`values`, not negative, over the largest of them; 0 where that is 0."""
    largest = ops.max(values)
    # The reciprocal of a huge float32, by which XLA multiplies, would be 0.
    shrink = ops.where(largest > 1, 2.0**-64, 1.0)
    return values * shrink / ops.where(largest > 0, largest * shrink, 1.0)


def _project(weights, budget):
    """Projects `weights` on `{p : sum(p) = budget, p <= 1}`, keeping proportions.

    In descending order, while the largest remaining weight times the remaining
    budget exceeds the sum of the remaining weights, its p is 1; the rest is
    scaled to the rest of the budget. The sum counts as 1e-5 at least, as in the
    authors' code, so weights that have vanished stay so.
    """
    ascending = ops.sort(weights)
    num_arms = weights.shape[0]
    descending = ops.flip(ascending)
    # Sums of the smallest weights are added from the smallest: no cancellation.
    remaining = ops.maximum(ops.flip(ops.cumsum(ascending)), 1e-5)
    budgets = budget - ops.cast(ops.arange(num_arms), weights.dtype)
    capped = ops.cumprod(ops.cast(descending * budgets > remaining, weights.dtype))
    count = ops.sum(capped)
    # The first weight below the cap; where all are capped its share is not used.
    position = ops.minimum(ops.cast(count, "int32"), num_arms - 1)
    scaled = weights * (budget - count) / ops.take(remaining, position)
    threshold = ops.take(descending, position)
    is_capped = ops.logical_and(
        count > 0, ops.logical_or(weights > threshold, count >= num_arms)
    )
    return ops.where(is_capped, 1.0, scaled)
