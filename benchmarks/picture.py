"""The picture of docs/benchmarks.md: step times against AdamW's."""

import pathlib

from benchmarks import tables
from benchmarks.methods import METHODS


def draw(timed: list[dict], costs: list[dict], file: pathlib.Path) -> None:
    """Draws measured ratios as bars, with their spread, and predicted ones as marks.

    Args:
        timed: Results of the command `time`.
        costs: Results of the command `cost`.
        file: Where to write it; the ending says in which format.
    """
    import matplotlib

    matplotlib.use("Agg")
    # The same results make the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(tables.setting(r["flags"]) for r in timed))
    figure, axes = plt.subplots(
        len(settings), 1, figsize=(8, 3.2 * len(settings)), squeeze=False
    )
    for name, (axis,) in zip(settings, axes):
        shown = [r for r in timed if tables.setting(r["flags"]) == name]
        found = {name for result in shown for name in result["result"]["methods"]}
        methods = [name for name in METHODS if name in found - {"AdamW"}]
        width = 0.8 / len(shown)
        for i, result in enumerate(shown):
            ratios = [result["result"]["ratios"].get(f"{m} / AdamW") for m in methods]
            known = [(k, ratio) for k, ratio in enumerate(ratios) if ratio]
            places = [k + (i - (len(shown) - 1) / 2) * width for k, _ in known]
            axis.bar(
                places,
                [ratio["of_means"] for _, ratio in known],
                width,
                yerr=[ratio["standard_error"] or 0.0 for _, ratio in known],
                label=tables.BACKENDS[result["backend"]],
            )
            expected = _predicted(result, costs)
            marks = [(p, expected.get(methods[k])) for p, (k, _) in zip(places, known)]
            marks = [(place, value) for place, value in marks if value is not None]
            if marks:
                label = None if i else "predicted"
                axis.plot(*zip(*marks), "k_", markersize=12, label=label)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(methods)), methods, fontsize=8)
        axis.set_ylabel("step time / AdamW's")
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, metadata=metadata)
    plt.close(figure)


def _predicted(result, costs):
    """Predicted ratios to AdamW, by method, of the same setting and backend."""
    rows = (tables.counterpart(result, costs) or {}).get("predictions", {})
    if "AdamW" not in rows:
        return {}
    base = rows["AdamW"]["seconds"]
    return {name: row["seconds"] / base for name, row in rows.items()}
