"""The command `cost`: what layers cost, and what follows for each method.

Every distinct layer call of the model is timed alone: the call, the call with the
gradients of its inputs, and the call with the gradient of each of its weights; the
differences are the backward passes. The model is timed in one piece as well. Ascent and
update are timed for all weights of a kind of layer together, and shared out by size.
`cost_model` predicts from that.
"""

import argparse
import collections
import statistics
import sys
import time

import keras
import numpy as np

from benchmarks import cost_model
from benchmarks import layer_calls
from benchmarks import masks
from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from keras_slsam import arms

NOISE = keras.layers.Dropout.__name__


def measure(args: argparse.Namespace) -> dict:
    """Times the parts of a step, and predicts what each method's step costs.

    Returns:
        Dict: `layers` has a row of seconds for each kind of layer, `total` their sum,
        `model` the seconds of the model's forward pass and gradients in one piece,
        `predictions` a row for each method.
    """
    model = models.make(args)
    x, _ = models.data(args, args.batch)
    x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    recorded = layer_calls.record(model, x)
    of_weights = _time_weights(recorded, args)
    of_calls = _time_calls(recorded, args)
    weights = [id(variable) for variable in model.trainable_variables]
    calls, layers = _assemble(recorded, of_calls, of_weights, weights)
    total = {
        name: sum(row[name] for row in layers.values())
        for name in cost_model.Costs._fields
    }
    whole = _time_model(layer_calls.of_model(model, x), args)
    return {
        "layers": layers,
        "total": total,
        "model": whole,
        "predictions": _predict(model, calls, cost_model.of_step(total, whole), args),
    }


def _time_calls(recorded, args):
    """Seconds of each distinct call: `{signature: (forward, to inputs, [weights])}`."""
    distinct = {call.signature: call for call in recorded}
    found = {}
    for number, (signature, call) in enumerate(distinct.items(), 1):
        progress = f"layer {number} of {len(distinct)}: {call.kind}"
        print(progress, file=sys.stderr, flush=True)
        inputs = range(call.num_inputs)
        wanted = [(), inputs] if inputs else [()]
        wanted += [(call.num_inputs + i,) for i in range(len(call.weights))]
        forward, *backward = _time(call, wanted, args)
        backward = [max(seconds - forward, 0.0) for seconds in backward]
        to_inputs = backward.pop(0) if inputs else 0.0
        found[signature] = forward, to_inputs, backward
    return found


def _time_model(call, args):
    first = call.num_inputs
    weights = range(first, first + len(call.weights))
    forward, gradients = _time(call, [(), weights], args)
    return {"forward": forward, "forward_and_gradients": gradients}


def _time(call, wanted, args):
    """Seconds of a call with each of several sets of gradients."""
    arguments = call.arguments()
    result = call.run(arguments)
    ones = keras.ops.ones(result.shape, result.dtype)
    jit_compile = args.jit_compile == "yes"
    runners = [
        probes.runner(call.run, arguments, indices, ones, jit_compile)
        for indices in wanted
    ]
    return _medians(runners, jit_compile, args)


def _time_weights(recorded, args):
    """Seconds of ascent and update for all weights of each kind of layer."""
    variables = collections.defaultdict(dict)
    for call in recorded:
        variables[call.kind].update((id(v), v) for v in call.weights)
    rng = np.random.default_rng(args.seed)
    jit_compile = args.jit_compile == "yes"
    found = {}
    for kind, members in variables.items():
        if not members:
            found[kind] = 0.0, 0.0
            continue
        members = list(members.values())
        gradients = [
            keras.ops.convert_to_tensor(rng.normal(size=v.shape).astype(v.dtype))
            for v in members
        ]
        values = [keras.ops.copy(v) for v in members]
        optimizer = keras.optimizers.AdamW(1e-5)
        optimizer.build(members)
        runners = [
            probes.runner(_ascend, [*values, *gradients], jit_compile=jit_compile),
            probes.update_runner(optimizer, members, gradients, jit_compile),
        ]
        found[kind] = tuple(_medians(runners, jit_compile, args))
    return found


def _ascend(arguments):
    """The weights moved up along the gradients, by a norm over all."""
    half = len(arguments) // 2
    weights, gradients = arguments[:half], arguments[half:]
    norm = keras.ops.sqrt(sum(keras.ops.sum(keras.ops.square(g)) for g in gradients))
    scale = 0.05 / (norm + 1e-12)
    return [weight + scale * gradient for weight, gradient in zip(weights, gradients)]


def _medians(runners, jit_compile, args):
    """The median seconds of each of several functions, which take turns.

    Those of a function that does nothing are taken off: a model calls its layers
    without the way in and out of a compiled program.
    """
    one = keras.ops.ones(())
    nothing = probes.runner(
        lambda arguments: arguments[0], [one], jit_compile=jit_compile
    )
    runners = [nothing, *runners]
    for run in runners:
        run()  # traces and compiles
    seconds = [[] for _ in runners]
    for _ in range(args.rounds * args.steps):
        for run, found in zip(runners, seconds):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    overhead, *medians = [statistics.median(found) for found in seconds]
    return [max(median - overhead, 0.0) for median in medians]


def _assemble(recorded, of_calls, of_weights, weights):
    """The calls with their costs, and the sum over each kind of layer."""
    sizes = collections.Counter()
    seen = {}
    for call in recorded:
        for variable in call.weights:
            if seen.setdefault(id(variable), call) is call:
                sizes[call.kind] += int(np.prod(variable.shape))
    calls, layers = [], {}
    for call in recorded:
        forward, to_inputs, to_weights = of_calls[call.signature]
        ascent, update = of_weights[call.kind]
        shares = {
            weights.index(id(v)): int(np.prod(v.shape)) / sizes[call.kind]
            for v in call.weights
            if seen[id(v)] is call
        }
        calls.append(
            cost_model.Call(
                forward,
                0.0 if call.kind == NOISE else forward,
                to_inputs,
                {
                    weights.index(id(v)): seconds
                    for v, seconds in zip(call.weights, to_weights)
                },
                {i: share * (ascent + update) for i, share in shares.items()},
            )
        )
        row = layers.setdefault(
            call.kind,
            {
                "calls": 0,
                "forward": 0.0,
                "to_inputs": 0.0,
                "to_weights": 0.0,
                "ascent": ascent,
                "update": update,
            },
        )
        row["calls"] += 1
        row["forward"] += forward
        row["to_inputs"] += to_inputs
        row["to_weights"] += sum(to_weights)
    return calls, layers


def _predict(model, calls, costs, args):
    """A row for each method: seconds, the rule's count, and what is active."""
    rows = {}
    variables = model.trainable_variables
    for name in args.methods:
        grouping = methods.METHODS[name].arms
        arm_of, drawn = [0] * len(variables), np.ones((1, 1), bool)
        if grouping is not None:
            arm_of = arms.group(variables, grouping)
            drawn = masks.of_timed_steps(max(arm_of) + 1, args)
        active_share, lowest = float(drawn.mean()), cost_model.lowest_active(drawn)
        shares = cost_model.shares(calls, arm_of, drawn)
        rows[name] = {
            "seconds": cost_model.predict(name, costs, shares),
            "rule": cost_model.rule(name, active_share, lowest),
            "active_share": active_share,
            "lowest_active": lowest,
            "shares": shares._asdict(),
        }
    return rows


def lines(result: dict) -> list[str]:
    """The result as text."""
    columns = cost_model.Costs._fields
    head = "".join(f"{name:>12}" for name in columns)
    text = [f"{'milliseconds':<26}calls{head}"]
    for kind, row in [*result["layers"].items(), ("total", result["total"])]:
        cells = "".join(f"{1000 * row[name]:>12.2f}" for name in columns)
        text.append(f"{kind:<26}{row.get('calls', ''):>5}{cells}")
    whole = {name: 1000 * seconds for name, seconds in result["model"].items()}
    text.append(
        f"the model in one piece: forward {whole['forward']:.2f}, with all gradients "
        f"{whole['forward_and_gradients']:.2f}"
    )
    text += ["", "                predicted, ms      by 1:1:1   share of active arms"]
    for name, row in result["predictions"].items():
        text.append(
            f"{name:<14} {1000 * row['seconds']:>14.2f} {row['rule']:>13.2f} "
            f"{row['active_share']:>22.3f}"
        )
    return text
