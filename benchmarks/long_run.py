"""The command `long`: what becomes of a step after many thousands of them.

A small model with dropout and BatchNorm. Memory and step times of the first thousand
steps beside those of the last, how often a step was traced, and how often each arm was
drawn in the last half.
"""

import argparse
import gc
import statistics
import sys

import keras
import numpy as np

import keras_slsam
from benchmarks import resident_set
from benchmarks import step_time
from keras_slsam import samplers

THOUSAND = 1000
WIDTH, BATCH = 16, 8


class _Counted:
    """A sampler that counts how often it drew each arm."""

    def build(self, num_arms):
        super().build(num_arms)
        self.counts = keras.Variable(
            np.zeros(num_arms), dtype="int32", trainable=False, name="counts"
        )

    def draw(self):
        mask = super().draw()
        self.counts.assign_add(keras.ops.cast(mask, "int32"))
        return mask


class _Bandit(_Counted, samplers.Bandit):
    pass


class _Proportional(_Counted, samplers.Proportional):
    pass


METHODS = {
    "SAM": lambda base, args: keras_slsam.SAM(base),
    "SL-SAM bandit": lambda base, args: keras_slsam.SLSAM(
        base, sampler=_Bandit(args.active_fraction, seed=args.seed)
    ),
    "SL-SAM proportional": lambda base, args: keras_slsam.SLSAM(
        base, sampler=_Proportional(args.active_fraction, seed=args.seed)
    ),
    "SL+S2 bandit": lambda base, args: keras_slsam.SLSAM(
        base, sampler=_Bandit(args.active_fraction, seed=args.seed), single_step=True
    ),
}


def measure(args: argparse.Namespace) -> dict:
    """Trains with each method for `args.steps` steps, see `_of_method`."""
    return {"methods": {name: _of_method(name, args) for name in METHODS}}


def _of_method(name, args):
    keras.utils.set_random_seed(args.seed)
    layers = keras.layers
    model = keras.Sequential([keras.Input((WIDTH,))])
    for _ in range(2):
        model.add(layers.Dense(WIDTH, activation="relu"))
        model.add(layers.BatchNormalization())
        model.add(layers.Dropout(0.1))
    model.add(layers.Dense(1))
    model = keras_slsam.sharpness_aware(model)
    optimizer = METHODS[name](keras.optimizers.AdamW(1e-3), args)
    compiles = {"auto": "auto", "yes": True, "no": False}[args.jit_compile]
    model.compile(optimizer, "mse", jit_compile=compiles)
    traces = step_time.TraceLog(model)
    x = np.random.default_rng(args.seed).normal(size=(THOUSAND * BATCH, WIDTH))
    y = np.sin(x[:, :1])
    rows, drawn = [], []
    for thousand in range(max(args.steps // THOUSAND, 2)):
        log = step_time.StepLog()
        step_time.fit(model, x, y, BATCH, log)
        gc.collect()
        seconds = statistics.median(log.seconds[1:])
        rows.append([seconds, resident_set.now(), _num_tensors()])
        if name != "SAM":
            drawn.append(keras.ops.convert_to_numpy(optimizer.sampler.counts))
        print(f"{name}: {thousand + 1},000 steps", file=sys.stderr, flush=True)
    seconds, resident, tensors = zip(*rows)
    return {
        "seconds": seconds,
        "resident": resident,
        "tensors": tensors,
        "traces": len(traces.seconds),
        "drawn": drawn and (drawn[-1] - drawn[len(drawn) // 2 - 1]).tolist(),
    }


def _num_tensors():
    """Tensors that are alive; `None` on TensorFlow, which hides those of a graph."""
    if keras.config.backend() == "jax":
        import jax

        return len(jax.live_arrays())
    if keras.config.backend() == "torch":
        import torch

        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return None


def lines(result: dict) -> list[str]:
    """The result as text."""
    text = ["first and last thousand    ms a step   resident MB    tensors  traces"]
    for name, row in result["methods"].items():
        pairs = [f"{row[key][i]}" for key in ("tensors",) for i in (0, -1)]
        first, last = (1000 * row["seconds"][i] for i in (0, -1))
        resident = [(row["resident"][i] or 0) / 1e6 for i in (0, -1)]
        text.append(
            f"{name:<22} {first:>7.3f} {last:>7.3f} {resident[0]:>8.1f} "
            f"{resident[1]:>8.1f} {' '.join(pairs):>12} {row['traces']:>6}"
        )
        if row["drawn"]:
            text.append(f"{'':<22} drawn, last half: {min(row['drawn'])} at least")
    return text
