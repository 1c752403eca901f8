"""The colours of methods and backends: the same one in every picture.

They are those of Okabe and Ito, which people with any kind of colour blindness can tell
apart. No method has the colour of a backend.
"""

import re

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#999999"

# The first entry with which a name begins, without capitals and other signs.
_COLORS = {
    "jax": GREEN,
    "tensorflow": PURPLE,
    "torch": YELLOW,
    "pytorch": YELLOW,
    "adamw": BLACK,
    "slsams2": ORANGE,
    "sls2": ORANGE,
    "slsam": VERMILLION,
    "sam": BLUE,
    "asam": BLUE,
    "s2sam": SKY,
    "as2sam": SKY,
}


def color_of(name: str) -> str:
    """Returns the colour of a method or a backend in every picture.

    Args:
        name: String such as `"SL-SAM"`, `"slsam-bandit"`, `"AdamW, EMA"`, `"jax"`.
            Capitals, spaces and signs do not matter, nor does what follows the name.

    Returns:
        String, a colour as `"#RRGGBB"`. Grey for all other names.

    Example:

    >>> from keras_slsam.analysis import plots
    >>> plots.color_of("SL-SAM + S2-SAM"), plots.color_of("sl+s2")
    ('#E69F00', '#E69F00')
    """
    plain = re.sub("[^a-z0-9]", "", name.lower())
    return next((c for key, c in _COLORS.items() if plain.startswith(key)), GREY)
