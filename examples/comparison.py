"""Reads the runs of `compare_methods.py`, and makes the table and the picture."""

import csv
import itertools
import json
import types

import matplotlib.figure
import numpy as np

from keras_slsam.analysis import plots

MARKERS = "osD^vP*X"
SETTINGS = ("backend", "method", "learning_rate", "rho", "active_fraction")


def read(file, experiment):
    """Returns the record of a run, which must belong to the experiment."""
    record = json.loads(file.read_text())
    if record["experiment"] != experiment:
        raise SystemExit(
            f"{file.parent} holds another experiment: {record['experiment']}. The "
            f"flags ask for {experiment}. Give another --folder."
        )
    return record


def read_all(folder, experiment):
    """Returns the complete runs: a dict from settings to lists of records.

    Runs with the same settings are cut to the length of the shortest one.

    Args:
        folder: Path.
        experiment: Dict, the settings that all runs in the folder must share.
    """
    groups = {}
    for file in sorted(folder.glob("*.json")):
        record = read(file, experiment)
        if not record["complete"]:
            print(f"{file.stem} is not complete, so it is left out")
            continue
        key = tuple(record[name] for name in SETTINGS)
        groups.setdefault(key, []).append(record)
    for records in groups.values():
        count = min(len(record["points"]) for record in records)
        for record in records:
            record["points"] = record["points"][:count]
    return groups


def write_csv(groups, file):
    """Writes a row per evaluation; the last one of a run has what was measured then."""
    rows = []
    for record in itertools.chain.from_iterable(groups.values()):
        run = {name: record[name] for name in (*SETTINGS, "seed")}
        rows += [{**run, **point} for point in record["points"]]
        for row in rows:
            row.pop("active", None)  # a list
        rows[-1].update(record.get("robustness", {}))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def spread(values):
    """Returns the mean, and the standard error over the seeds."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{np.mean(values):.3f}" + (f" ± {error:.3f}" if error is not None else "")


def at_loss(points, loss):
    """Returns the accuracy when the training loss first falls to `loss`.

    It is interpolated between the evaluations before and after. NaN, if the training
    loss does not fall to it.
    """
    for i, point in enumerate(points):
        if point["training_loss"] <= loss:
            both = points[max(i - 1, 0) : i + 1][::-1]  # with increasing losses
            losses = [point["training_loss"] for point in both]
            return np.interp(loss, losses, [point["accuracy"] for point in both])
    return np.nan


def results(record, seconds, loss):
    """Returns what the table says of a run: a dict of numbers.

    Args:
        record: The run.
        seconds: Float, the time of the shortest run.
        loss: Float, a training loss that all runs reach.
    """
    points = record["points"]
    times, scores = ([point[k] for point in points] for k in ("seconds", "accuracy"))
    found = {
        "at the end": scores[-1],
        "at equal time": np.interp(seconds, times, scores),
    }
    if np.isfinite(equal := at_loss(points, loss)):
        found["at equal training loss"] = equal
    if "validation" in points[0]:
        in_time = [point for point in points if point["seconds"] <= seconds]
        for name, some in (("", points), (" at equal time", in_time or points[:1])):
            best = max(some, key=lambda point: point["validation"])
            found[f"best by validation{name}"] = best["accuracy"]
            if "matthews" in best:
                found[f"Matthews by validation{name}"] = best["matthews"]
        found["memorised"] = points[-1]["memorised"]
    found["training loss"] = points[-1]["training_loss"]
    found.update(record.get("robustness", {}))
    found["s/step"] = times[-1] / points[-1]["step"]
    return found


def write_page(groups, file, picture):
    """Writes, and prints, a table of the means over the seeds and their errors.

    Args:
        groups: What `read_all` returned.
        file: Path of the page, in Markdown.
        picture: Path of the picture that it shows.
    """
    shortest, reached = {}, {}
    for record in itertools.chain.from_iterable(groups.values()):
        backend, points = record["backend"], record["points"]
        seconds = points[-1]["seconds"]
        shortest[backend] = min(seconds, shortest.get(backend, np.inf))
        losses = np.array([point["training_loss"] for point in points])
        lowest = losses[np.isfinite(losses)].min(initial=np.inf)
        if np.isfinite(lowest):
            reached[backend] = max(lowest, reached.get(backend, -np.inf))
    rows = []
    for key, records in groups.items():
        settings = dict(zip(SETTINGS, key))
        backend = settings["backend"]
        limits = shortest[backend], reached.get(backend, np.nan)
        found = [results(record, *limits) for record in records]
        measured = set.intersection(*map(set, found))  # in each of the runs
        names = [name for name in found[0] if name in measured]
        means = {name: spread([each[name] for each in found]) for name in names}
        steps = records[0]["points"][-1]["step"]
        rows.append({**settings, "seeds": len(records), "steps": steps, **means})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in columns] for row in rows]
    cells = [["" if cell is None else str(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    table = [columns, ["-" * width for width in widths], *cells]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in table
    ]
    equal = [f"{loss:.3f} on {backend}" for backend, loss in reached.items()]
    lines += ["", f"The equal training loss is {', '.join(equal)}."]
    page = "\n".join([*lines, "", f"![Test accuracy]({picture.name})", ""])
    file.write_text(page)
    print(page)


def label_of(key):
    """Returns the method and its settings in a picture."""
    _, method, rate, rho, fraction = key
    label = f"{method}, {rate:g}" + (f", rho {rho:g}" if rho is not None else "")
    return label + (f", {fraction}" if fraction else "")


def draw(groups, file):
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, axis in zip(panels, ("seconds", "step")):
        for key, records in groups.items():
            x, y = (
                np.array([[point[k] for point in r["points"]] for r in records])
                for k in (axis, "accuracy")
            )
            label = label_of(key)
            label += f", {key[0]}" if len({key[0] for key in groups}) > 1 else ""
            # Runs of one method have one colour, and a marker per setting.
            color = plots.color_of(key[1])
            same = [line for line in panel.lines if line.get_color() == color]
            marker = MARKERS[len(same) % len(MARKERS)]
            panel.plot(x.mean(0), y.mean(0), marker=marker, color=color, label=label)
            deviation = y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]
            low, high = y.mean(0) - deviation, y.mean(0) + deviation
            panel.fill_between(x.mean(0), low, high, color=color, alpha=0.15)
        panel.set(xlabel={"seconds": "seconds of training", "step": "steps"}[axis])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy, mean and spread over seeds")
    panels[1].legend(fontsize="small")
    figure.savefig(file)


def draw_arms(groups, file):
    """Draws the arms that were active, for the first run of each sparse method."""
    runs = {key: records[0] for key, records in groups.items() if key[-1]}
    if not runs:
        return
    figure = matplotlib.figure.Figure(
        figsize=(6.5, 4.5 * len(runs)), layout="constrained"
    )
    panels = figure.subplots(len(runs), squeeze=False)[:, 0]
    for panel, (key, record) in zip(panels, runs.items()):
        logged = types.SimpleNamespace(names=record["arms"], records=record["points"])
        plots.arm_choice(logged, ax=panel).set_title(label_of(key))
    figure.savefig(file)
