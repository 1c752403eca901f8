"""What the processes of a training must have in common before their first step."""

import keras


def versions(framework):
    """Returns the versions that decide what a step does.

    Args:
        framework: Module of the backend.

    Returns:
        Dict from the name of each package to a string.
    """
    import keras_slsam  # which is being imported when this module is

    packages = keras, keras_slsam, framework
    return {package.__name__: package.__version__ for package in packages}


def check(every):
    """Checks that all processes found the same facts.

    Args:
        every: List of dicts, one per process.

    Raises:
        ValueError: naming what differs, and in which process.
    """
    first, lines = every[0], []
    for rank, found in enumerate(every):
        for name in dict.fromkeys([*first, *found]):
            one, other = found.get(name), first.get(name)
            if one != other:
                lines.append(f"{name} is {one} in process {rank}, {other} in process 0")
    failed = first.get("preparing the first step")
    if lines or failed:
        raise ValueError(
            "All processes must start with the same versions, arguments and weights. "
            f"Received: {failed or '; '.join(lines[:3])}"
            + (f"; and {len(lines) - 3} more differences" if lines[3:] else "")
            + ". Install the same versions. Call `keras.utils.set_random_seed(seed)` "
            "with the same seed before you create the model, or load the same file in "
            "each process."
        )
