"""Applies the base optimizer's step to the active arms only.

An inactive variable keeps its value, moments and step count, and gets no weight decay,
as if the step had not taken place. `Optimizer.apply` would count, decay and average all
variables alike. So its parts are called here for one arm at a time. Keras has no public
names for them.
"""

import contextlib

import keras
from keras import ops

from keras_slsam import ascents
from keras_slsam.gradients import backend


class BaseStep:
    """Updates the active arms with a base optimizer.

    With `gradient_accumulation_steps`, the gradients of a window of steps are summed,
    and the last step of the window applies their mean.

    Args:
        base_optimizer: `keras.optimizers.Optimizer`, built.
        variables: List of `keras.Variable`s for which it was built.
        num_arms: int, the number of arms.
        all_active: bool, whether all arms are active in every step.
        ascent: `Ascent` that learns from the gradients that are applied, or `None`.
        owner: `keras.optimizers.Optimizer`, which creates and holds the state.

    Attributes:
        skipped_steps: `keras.Variable`, the number of skipped steps.
    """

    def __init__(self, base_optimizer, variables, num_arms, all_active, ascent, owner):
        self._base = base_optimizer
        self._variables = variables
        self._all_active = all_active
        self.skipped_steps = owner.add_variable((), dtype="int", name="skipped_steps")

        def add(name, dtype, initializer="zeros"):
            return owner.add_variable((num_arms,), initializer, dtype, name=name)

        self._ascent = ascent
        if not all_active:
            self._own_iterations = add(
                "own_iterations", base_optimizer._iterations.dtype
            )
            if isinstance(base_optimizer, keras.optimizers.Nadam):
                self._own_products = add("own_products", variables[0].dtype, "ones")

    def __call__(self, gradients, arms, last, finite):
        """Updates the active arms, or accumulates their gradients.

        Args:
            gradients: List of tensors, one per variable. Ignored where inactive.
            arms: `ActiveArms`.
            last: Whether this is the last step of a window, see `window`.
            finite: Whether all gradients are finite. If not, the step is skipped and
                counted in `skipped_steps`.
        """
        base = self._base
        steps = base.gradient_accumulation_steps
        if finite is not True:
            skipped = ops.cast(ops.logical_not(finite), self.skipped_steps.dtype)
            self.skipped_steps.assign_add(skipped)
        if self._all_active and not (steps and self._ascent):
            backend.select(finite, lambda: self._apply(gradients))
            return
        # A skipped step is a step without active arms.
        arms = arms.where(finite)
        counts = []
        if steps:
            self._accumulate(gradients, arms)
            last = backend.both(last, finite)
            backend.when(last, lambda: self._apply_mean(arms))
        else:
            counts = self._update(gradients, arms)
        if base.use_ema:
            backend.when(finite, self._average)
        self._constrain(arms)
        for variable, value in counts:
            variable.assign(value)
        backend.when(finite, lambda: base._iterations.assign_add(1))

    def _apply(self, gradients):
        ascents.learn(self._ascent, gradients, range(len(gradients)))
        backend.apply(self._base, gradients, self._variables)

    def _constrain(self, arms):
        # As in Keras, constraints come last, and apply in each step of a window.
        def project(arm):
            for variable in constrained[arm]:
                variable.assign(variable.constraint(variable))

        constrained = {}
        for arm, indices in enumerate(arms.members):
            variables = [self._variables[i] for i in indices]
            variables = [v for v in variables if v.constraint is not None]
            if variables:
                constrained[arm] = variables
        arms.when(project, constrained)

    @contextlib.contextmanager
    def counted(self, finite):
        """Context in which `iterations` counts this step already, as metrics expect.

        Keras computes metrics after the update. Here they come before it, so that a
        metric that raises leaves the weights unchanged.
        """
        count = self._base._iterations
        before = ops.copy(count)
        count.assign_add(ops.cast(finite, count.dtype))
        try:
            yield
        finally:
            count.assign(before)

    def position(self):
        """Returns the number of earlier steps in this window, an int tensor.

        Returns `None` without `gradient_accumulation_steps`.
        """
        steps = self._base.gradient_accumulation_steps
        return self._base._iterations % steps if steps else None

    def window(self):
        """Returns whether this step is the first, and the last, of a window.

        Returns:
            Tuple of two bools, or scalar boolean tensors inside a traced step.
        """
        position = self.position()
        if position is None:
            return True, True
        last = self._base.gradient_accumulation_steps - 1
        return tuple(backend.concrete(ops.stack([position == 0, position == last])))

    def _accumulate(self, gradients, arms):
        sums = self._base._accumulated_gradients

        def add(arm):
            for i in arms.members[arm]:
                one = ops.ones((), sums[i].dtype)
                total = backend.add(backend.read(sums[i]), gradients[i], one)
                sums[i].assign(total)

        arms.when(add)

    def _apply_mean(self, arms):
        sums = self._base._accumulated_gradients
        share = 1.0 / self._base.gradient_accumulation_steps
        totals = [backend.read(total) for total in sums]
        means = arms.map(lambda i, total: total * share, totals)
        for variable, value in self._update(means, arms):
            variable.assign(value)

        def reset(arm):
            for i in arms.members[arm]:
                sums[i].assign(ops.zeros_like(backend.read(sums[i])))

        arms.when(reset)

    def _update(self, gradients, arms):
        """Updates the active arms.

        Returns:
            List of `(variable, value)`, to be assigned after everything that may raise.
        """
        base = self._base
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        clipped = base._clip_gradients([gradients[i] for i in present])
        clipped = dict(zip(present, clipped))
        own_counts, counts_after = self._own_counts(arms.mask)
        with _fixed_learning_rate(base) as learning_rate:

            def update_variables(indices):
                variables = [self._variables[i] for i in indices]
                decayed = [v for v in variables if base._use_weight_decay(v)]
                if decayed:
                    base._apply_weight_decay(decayed)
                base._backend_update_step(
                    [clipped[i] for i in indices], variables, learning_rate
                )

            def update(arm):
                ascents.learn(self._ascent, gradients, arms.members[arm])
                for count, own, _ in own_counts:
                    count.assign(own[arm])
                try:
                    update_variables(arms.members[arm])
                finally:
                    for count, _, everyone in own_counts:
                        count.assign(everyone)

            if self._all_active:  # in one update: Nadam counts updates
                everything = range(len(self._variables))

                def update_all():
                    ascents.learn(self._ascent, gradients, everything)
                    update_variables(everything)

                backend.when(arms.active[0], update_all)
            else:
                arms.when(update)
        return counts_after

    def _own_counts(self, mask):
        """Returns the base optimizer's counters, which each arm advances separately.

        Returns:
            Two lists: `(variable of the base optimizer, its values for each arm, its
            value for the whole model)`, and `(own variable, its value after the step)`.
        """
        if self._all_active:
            return [], []
        base, own = self._base, self._own_iterations
        # `_iterations` counts the steps of each window; an own count counts windows.
        steps = base.gradient_accumulation_steps or 1
        whole = base._iterations
        counts = [(whole, ops.copy(own) * steps, ops.copy(whole))]
        after = [(own, own + ops.cast(mask, own.dtype))]
        if isinstance(base, keras.optimizers.Nadam):
            # Nadam keeps the running product of its momentum schedule, mu_1 ... mu_t.
            before = backend.read(self._own_products)
            step = ops.cast(own + 1, before.dtype)
            decay = ops.power(ops.cast(0.96, before.dtype), step)
            product = before * base.beta_1 * (1.0 - 0.5 * decay)
            counts.append(
                (base._u_product, ops.copy(before), ops.copy(base._u_product))
            )
            after.append((self._own_products, ops.where(mask, product, before)))
        return counts, after

    def _average(self):
        # The moving average covers all variables, in every step.
        base, variables = self._base, self._variables
        base._update_model_variables_moving_average(variables)
        if base.ema_overwrite_frequency:
            due = (base.iterations + 1) % base.ema_overwrite_frequency == 0
            backend.when(
                due,
                lambda: base._overwrite_model_variables_with_average_value(variables),
            )


@contextlib.contextmanager
def _fixed_learning_rate(optimizer):
    """Context that fixes the learning rate at its value for the global step.

    A schedule reads the optimizer's `iterations`, which hold an arm's own count while
    that arm is updated.
    """
    learning_rate = ops.convert_to_tensor(optimizer.learning_rate)
    schedule = optimizer._learning_rate
    if isinstance(schedule, keras.Variable):
        yield learning_rate
        return
    optimizer.learning_rate = lambda: learning_rate
    try:
        yield learning_rate
    finally:
        optimizer.learning_rate = schedule
