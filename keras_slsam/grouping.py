"""Which variables make an arm, to be switched on or off together."""


def group(variables, grouping):
    """The arm of each variable.

    Args:
        variables: List of `keras.Variable`s, the model's trainable ones.
        grouping: `"variable"`, `"layer"`, `"block"` or a function from a variable
            to a hashable key; variables of the same key make an arm.

    Returns:
        List of int, one per variable; arms are numbered in the order in which they
        first appear.

    Raises:
        ValueError: if the function returns something that is no key of a dict.
    """
    if isinstance(grouping, str):
        keys = _GROUPINGS[grouping](variables)
    else:
        keys = [grouping(variable) for variable in variables]
    numbers = {}
    arms = []
    for variable, key in zip(variables, keys):
        try:
            is_key = hash(key) is not None and key == key  # nan is not
        except TypeError:
            is_key = False
        if not is_key:
            raise ValueError(
                "The function given as `arms` must return something hashable that "
                f"equals itself, like a string. Received: {key!r} for the variable "
                f"{variable.path!r}"
            )
        arms.append(numbers.setdefault(key, len(numbers)))
    return arms


def validate(grouping):
    """Checks the argument `arms`.

    Raises:
        ValueError: if `grouping` is neither the name of a grouping nor callable.
    """
    known = isinstance(grouping, str) and grouping in _GROUPINGS
    if not known and not callable(grouping):
        raise ValueError(
            f"Argument `arms` must be one of {sorted(_GROUPINGS)} or a function from "
            f"a `keras.Variable` to a hashable key. Received: arms={grouping!r}"
        )


def _by_variable(variables):
    return range(len(variables))


def _by_layer(variables):
    return _runs(_layer_paths(variables), variables)


def _by_block(variables):
    # In a subclassed model all paths begin with the model's own name, which says
    # nothing: the block is the first part in which the paths of layers differ. A
    # weight of the model itself has a shorter path, and is a block of its own.
    paths = _layer_paths(variables)
    depth = 0
    while any(len(path) > depth + 1 for path in paths) and (
        len({path[depth] for path in paths if len(path) > depth}) == 1
    ):
        depth += 1
    return _runs([path[: depth + 1] for path in paths], variables)


def _layer_paths(variables):
    return [tuple(variable.path.split("/")[:-1]) for variable in variables]


def _runs(paths, variables):
    """Numbers the layers, of which a model lists the variables one after the other.

    A model inside a model leaves no trace in the paths, so two towers with the same
    names of layers differ in their places only: a path that comes again is another
    layer's. A variable without a path, like those of a `TorchModuleWrapper`, is alone.
    """
    numbers = []
    number, before, names = -1, None, []
    for path, variable in zip(paths, variables):
        again = variable.path in names and variable.path != names[-1]
        if path != before or not path or again:
            number, before, names = number + 1, path, []
        names.append(variable.path)
        numbers.append(number)
    return numbers


_GROUPINGS = {"variable": _by_variable, "layer": _by_layer, "block": _by_block}
