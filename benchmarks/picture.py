"""The picture of docs/benchmarks.md: step times divided by AdamW's."""

import pathlib

from benchmarks.methods import METHODS
from benchmarks.models import MODELS

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
COLORS = {"jax": "tab:blue", "tensorflow": "tab:orange", "torch": "tab:green"}


def setting(flags: dict) -> str:
    """Returns the model with its sizes, and other flags that distinguish results."""
    parts = []
    if "model" in flags:
        layers = f", {flags['layers']} x {flags['width']}" if flags["layers"] else ""
        length = f" x {flags['length']}" if flags["length"] else ""
        title = MODELS[flags["model"]].title
        parts += [f"{title}{layers}", f"batch {flags['batch']}{length}"]
    parts.append(f"active fraction {flags['active_fraction']}")
    parts += {"auto": [], "yes": ["XLA"], "no": ["not compiled"]}[flags["jit_compile"]]
    parts += ["each method in a separate process"] if flags.get("alone") else []
    return ", ".join(parts)


def draw(timed: list[dict], file: pathlib.Path) -> None:
    """Draws the ratios in results of `time`, with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    # The same results must give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(setting(result["flags"]) for result in timed))
    figure, axes = plt.subplots(
        len(settings), figsize=(8, 3.2 * len(settings)), squeeze=False
    )
    for name, (axis,) in zip(settings, axes):
        shown = [result for result in timed if setting(result["flags"]) == name]
        found = {method for result in shown for method in result["result"]["methods"]}
        methods = [method for method in METHODS if method in found - {"AdamW"}]
        width = 0.8 / len(shown)
        for i, result in enumerate(shown):
            ratios = [result["result"]["ratios"].get(f"{m} / AdamW") for m in methods]
            known = [(k, ratio) for k, ratio in enumerate(ratios) if ratio]
            axis.bar(
                [k + (i - (len(shown) - 1) / 2) * width for k, _ in known],
                [ratio["of_means"] for _, ratio in known],
                width,
                yerr=[ratio["standard_error"] or 0.0 for _, ratio in known],
                label=BACKENDS[result["backend"]],
                color=COLORS[result["backend"]],
            )
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(methods)), methods, fontsize=8)
        axis.set_ylabel("step time / AdamW's")
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
