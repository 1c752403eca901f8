"""Groups variables into arms, and finds the arms that are always active."""

import re

from keras_slsam import arguments


def group(variables, grouping):
    """Returns the arm of each variable.

    Args:
        variables: List of `keras.Variable`s, the model's trainable ones.
        grouping: `"variable"`, `"layer"`, `"block"` or a function from a variable to a
            hashable key. Variables with the same key form an arm.

    Returns:
        List of int, one per variable. Arms are numbered in order of first appearance.

    Raises:
        ValueError: if the function returns something that cannot be a key of a dict.
    """
    if isinstance(grouping, str):
        keys = _GROUPINGS[grouping](variables)
    else:
        keys = [grouping(variable) for variable in variables]
    numbers = {}
    arms = []
    for variable, key in zip(variables, keys):
        try:
            is_key = hash(key) is not None and key == key  # False for nan
        except TypeError:
            is_key = False
        if not is_key:
            raise ValueError(
                "The function passed as `arms` must return a hashable key that equals "
                f"itself, such as a string. Received: {key!r} for the variable "
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


def find_always_active(owner, variables, arms, chosen):
    """Returns the arms that have a chosen variable.

    Args:
        owner: String, the class that has the argument `always_active`.
        variables: List of `keras.Variable`s, the model's trainable ones.
        arms: List of int, the arm of each variable.
        chosen: A regular expression that is searched for in the path of a variable, a
            function from a variable to a bool, or `None` for no arm.

    Returns:
        List of int, in ascending order.

    Raises:
        ValueError: if no variable is chosen, or if no arm is left to draw.
    """
    if chosen is None:
        return []
    if isinstance(chosen, str):
        pattern = re.compile(chosen)
        flags = [pattern.search(variable.path) for variable in variables]
    else:
        flags = [chosen(variable) for variable in variables]
    found = {arm for arm, flag in zip(arms, flags) if flag}
    if not found:
        paths = ", ".join(repr(variable.path) for variable in variables)
        raise ValueError(
            f"Argument `always_active` of `{owner}` chooses no trainable variable. "
            f"Received: always_active={chosen!r}. The variables are: {paths}"
        )
    if found == set(arms):
        raise ValueError(
            f"Argument `always_active` of `{owner}` chooses a variable of every arm, "
            f"so no arm is left to draw. Received: always_active={chosen!r}. Choose "
            "fewer variables, or use `keras_slsam.SAM`."
        )
    return sorted(found)


def validate_always_active(owner, chosen):
    """Checks the argument `always_active`.

    Raises:
        ValueError: if it is neither `None`, nor a regular expression, nor callable.
    """
    if isinstance(chosen, str):
        try:
            re.compile(chosen)
            return
        except re.error as error:
            why = f" is no regular expression: {error}"
    elif chosen is None or (callable(chosen) and arguments.can_be_saved(chosen)):
        return
    else:
        why = ""
    raise ValueError(
        f"Argument `always_active` of `{owner}` must be a regular expression, such as "
        '"logits", or a function from a `keras.Variable` to a bool. '
        f"Received: always_active={chosen!r}{why}"
    )


def _by_variable(variables):
    return range(len(variables))


def _by_layer(variables):
    return _runs(_layer_paths(variables), variables)


def _by_block(variables):
    # All paths of a subclassed model begin with its name. So the block is the first
    # part in which the paths of layers differ. A weight of the model itself has a
    # shorter path, and is a block of its own.
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
    """Numbers the layers, given the variables in the order of the model.

    A model lists the variables of a layer one after the other. Paths do not name nested
    models, so two towers may have the same paths: a path that appears again belongs to
    another layer. A variable without a path, such as a weight of a
    `TorchModuleWrapper`, gets a number of its own.
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
