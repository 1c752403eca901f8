"""The masks that the steps of a run draw: the same flags, the same masks."""

import argparse

import keras
import numpy as np

from keras_slsam import samplers


def of_timed_steps(num_arms: int, args: argparse.Namespace) -> np.ndarray:
    """The masks of the steps whose time counts, drawn again.

    Returns:
        Boolean array of shape `(rounds * steps, num_arms)`.
    """
    sampler = samplers.Uniform(args.active_fraction, seed=args.seed)
    sampler.build(num_arms)
    turn = args.steps + 1  # the first of each turn does not count, nor the first turn
    draws = [
        keras.ops.convert_to_numpy(sampler.draw())
        for _ in range(turn * (args.rounds + 1))
    ]
    return np.stack([draw for i, draw in enumerate(draws) if i >= turn and i % turn])
