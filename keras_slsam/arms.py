"""Arms: which variables are switched on or off together."""


def group(variables, grouping):
    """The arm of each variable.

    Args:
        variables: List of `keras.Variable`s, the model's trainable ones.
        grouping: `"variable"`, `"layer"`, `"block"` or a function from a variable
            to a hashable key; variables of the same key make an arm.

    Returns:
        List of int, one a variable; arms are numbered in the order in which they
        first appear.

    Raises:
        ValueError: if the function returns something that is not hashable.
    """
    key = _GROUPINGS[grouping](variables) if isinstance(grouping, str) else grouping
    numbers = {}
    arms = []
    for variable in variables:
        name = key(variable)
        try:
            arms.append(numbers.setdefault(name, len(numbers)))
        except TypeError:
            raise ValueError(
                "The function given as `arms` must return something hashable, like "
                f"a string. Received: {name!r} for the variable {variable.path!r}"
            ) from None
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
    return id


def _by_layer(variables):
    return lambda variable: variable.path.rpartition("/")[0]


def _by_block(variables):
    # In a subclassed model all paths begin with the model's own name, which says
    # nothing: the block is the first part in which the paths of layers differ.
    paths = [variable.path.split("/")[:-1] for variable in variables]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and (
        len({path[depth] for path in paths}) == 1
    ):
        depth += 1
    return lambda variable: tuple(variable.path.split("/")[:-1][: depth + 1])


_GROUPINGS = {"variable": _by_variable, "layer": _by_layer, "block": _by_block}
