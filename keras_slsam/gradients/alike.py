"""What the processes of a training must have in common before their first step."""

import hashlib
import json
import math
import warnings

import keras

# The fact of a process that cannot take a step: the message of its error.
FAILED = "the error"


def facts(framework, model, optimizer, weights=None):
    """Returns versions, arguments and trained weights, which decide what a step does.

    Args:
        framework: Module of the backend.
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built for it.
        weights: See `Backend.start`. If given, the arguments are left out, because some
            of them, like `rho`, are in variables, which may have lost their values.

    Returns:
        Dict from the name of each fact to a string.
    """
    found = _versions(framework) | {"the optimizer": type(optimizer).__name__}
    if weights is None:
        found |= _of_arguments(optimizer)
    return found | _of_layout(optimizer) | _of_weights(model, weights)


def _versions(framework):
    import keras_slsam  # which is being imported when this module is

    packages = keras, keras_slsam, framework
    return {package.__name__: package.__version__ for package in packages}


def _of_arguments(optimizer):
    name = "what Keras can save of the optimizer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Keras, about lambdas
        try:
            saved = keras.saving.serialize_keras_object(optimizer.get_config())
        except Exception as error:  # a step does not need to be saved
            return {name: f"nothing ({type(error).__name__})"}
    return {name: "its arguments"} | _flat("", saved)


def _flat(path, value):
    """Returns a dict from the path of each part of a value to its text."""
    parts = value if isinstance(value, dict) else {}
    if isinstance(value, (list, tuple)) and any(
        isinstance(part, (dict, list, tuple)) for part in value
    ):
        parts = dict(enumerate(value))
    if parts.get("class_name") == "__lambda__":  # saved with the path of its file
        return {f"`{path}`": "a lambda"}
    if not parts:
        return {f"`{path}`": repr(value)}
    found = {}
    for key, part in parts.items():
        if key != "name":  # names that Keras gives depend on earlier optimizers
            found |= _flat(f"{path}.{key}" if path else key, part)
    return found


def _of_layout(optimizer):
    """Returns what arguments led to, because some of them cannot be compared."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scaler
    sizes = [math.prod(variable.shape) for variable in optimizer.variables]
    layout = {key: str(value) for key, value in inner._layout().items()}
    return {
        "the base optimizer": layout["base_optimizer"],
        "the sampler": layout["sampler"],
        "the ascent": layout["ascent"],
        "the arm of each weight": _short(layout["arms"]),
        "the list of arms that are always active": _short(layout["always_active"]),
        "the state of the optimizer": f"{len(sizes)} variables, {sum(sizes)} values",
    }


def _short(text):
    return text if len(text) < 80 else f"of sha256 {_digest(text.encode())}"


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:8]


def _of_weights(model, values):
    found, variables = {}, model.trainable_variables
    if values is None:
        values = [variable.value for variable in variables]
    for i, (variable, value) in enumerate(zip(variables, values)):
        value = keras.ops.convert_to_numpy(value)
        digest = _digest(value.tobytes())
        described = f"{value.shape} {variable.dtype}, sha256 {digest}"
        # Not its path, since names that Keras gives depend on earlier models.
        found[f"`trainable_variables[{i}]`"] = described
    return found


def compare(find, gather):
    """Checks that all processes find the same facts, and exchanges them as numbers.

    Args:
        find: Function that returns a dict of strings. If it raises an error in one
            process, this is the error in all.
        gather: Function from a list of int to an array with a row for each process, the
            lists of all. They have the same length.

    Raises:
        ValueError: see `check`.
    """
    own = list(json.dumps(facts_or_error(find)).encode())
    sizes = gather([len(own)]).ravel().tolist()
    rows = gather(own + [0] * (max(sizes) - len(own)))
    every = [bytes(row[:size].tolist()) for row, size in zip(rows, sizes)]
    check([json.loads(found) for found in every])


def facts_or_error(find):
    """Returns the facts, or the error, so that the other processes do not wait."""
    try:
        return find()
    except Exception as error:
        return {FAILED: f"{type(error).__name__}: {error}"}


def check(every):
    """Checks that all processes found the same facts.

    Args:
        every: List of dicts, one per process.

    Raises:
        ValueError: naming what differs, and in which process, or with the error of a
            process that cannot take a step.
    """
    failed = {n: found[FAILED] for n, found in enumerate(every) if FAILED in found}
    if failed:
        # The same error in several processes is told once.
        errors = {error: rank for rank, error in reversed(failed.items())}
        raise ValueError(
            " ".join(f"In process {rank}: {error}" for error, rank in errors.items())
        )
    first, lines = every[0], []
    for rank, found in enumerate(every):
        for name in dict.fromkeys([*first, *found]):
            one, other = found.get(name), first.get(name)
            if one != other:
                lines.append(f"{name} is {one} in process {rank}, {other} in process 0")
    if lines:
        raise ValueError(
            "All processes must start with the same versions, arguments and weights. "
            f"Received: {'; '.join(lines[:3])}"
            + (f"; and {len(lines) - 3} more differences" if lines[3:] else "")
            + ". Install the same versions, and pass the same arguments. Call "
            "`keras.utils.set_random_seed(seed)` with the same seed before you create "
            "the model, or load the same file in each process."
        )
