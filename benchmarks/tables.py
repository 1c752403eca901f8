"""The tables of docs/benchmarks.md, in Markdown, from results."""

import statistics

from benchmarks import cost_model
from benchmarks import scale
from benchmarks.step_time import BASES

MODELS = {
    "minilm": "MiniLM",
    "bert": "BERT-like encoder",
    "efficientnet": "EfficientNet-lite0",
    "dense": "Dense layers",
}
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


def machines(results: list[dict]) -> str:
    """What was measured, where and how: a row for each result."""
    rows = []
    for result in results:
        machine = result["machine"]
        cores = f"{machine['processor']}, {machine['cpus']} CPUs"
        versions = (f"{name} {number}" for name, number in result["versions"].items())
        rows.append(
            [
                f"`KERAS_BACKEND={result['backend']} {result['line']}`",
                f"{cores}, on {machine['device']}",
                ", ".join(versions),
            ]
        )
    return _table(["command", "machine", "versions"], rows)


def times(results: list[dict]) -> str:
    """The step times: a table for each setting, a row for each backend and method."""
    head = [
        "backend",
        "method",
        "s a step",
        "quartiles",
        "× AdamW",
        "× tutorial SAM",
        "× SAM",
        "of medians",
        "active",
        "GFLOP",
        "first call, s",
        "trace, s",
        "compile, s",
        "traces",
    ]

    def rows(result):
        measured = result["result"]
        for name, row in measured["methods"].items():
            yield [
                BACKENDS[result["backend"]],
                name,
                _number(row["mean"], 4),
                f"{row['lower_quartile']:.4f} to {row['upper_quartile']:.4f}",
                *(_ratio(measured["ratios"].get(f"{name} / {b}")) for b in BASES),
                " ".join(
                    _number(ratio and ratio["of_medians"], 2)
                    for ratio in (
                        measured["ratios"].get(f"{name} / {b}") for b in BASES
                    )
                ),
                _number(row["active_share"], 2),
                _flops(row["flops"]),
                *(_number(row[part], 1) for part in ("first_call", "trace", "compile")),
                _number(row["traces"], 0),
            ]

    return _by_setting(results, head, rows)


def memory(results: list[dict]) -> str:
    """The memory: a table for each setting, a row for each backend and method."""
    head = [
        "backend",
        "method",
        "resident at most",
        "above the built model",
        "first step above it",
        "in use at most",
        "mean step",
        "planned, temporary",
        "planned, in all",
    ]

    def rows(result):
        for name, row in result["result"]["methods"].items():
            resident, live, plan = row["resident"], row["live"], row["planned"]
            built = resident["built"]
            above = [None, None]
            if built is not None:
                above = [resident[k] - built for k in ("later_steps", "first_step")]
            total = plan and (
                plan["arguments"] + plan["outputs"] - plan["alias"] + plan["temporary"]
            )
            values = [
                resident["later_steps"],
                *above,
                live and max(live),
                live and statistics.fmean(live),
                plan and plan["temporary"],
                total,
            ]
            megabytes = [_number(v and v / 1e6, 1) for v in values]
            yield [BACKENDS[result["backend"]], name, *megabytes]

    return "Megabytes.\n\n" + _by_setting(results, head, rows)


def costs(results: list[dict], timed: list[dict]) -> str:
    """What layers cost, and the predictions beside what `timed` results measured."""
    head = ["backend", "layer", "calls", *(f"{n}, ms" for n in _parts())]

    def layers(result):
        found = result["result"]
        rows = [*found["layers"].items(), ("in all", found["total"])]
        for kind, row in rows:
            cells = [_number(1000 * row[name], 2) for name in cost_model.Costs._fields]
            calls = _number(row.get("calls"), 0)
            yield [BACKENDS[result["backend"]], kind, calls, *cells]
        to_weights = cost_model.of_step(found["total"], found["model"]).to_weights
        seconds = (
            found["model"]["forward"],
            found["total"]["to_inputs"],
            to_weights,
            None,
            None,
        )
        cells = [_number(value and 1000 * value, 2) for value in seconds]
        yield [BACKENDS[result["backend"]], "model in one piece", "-", *cells]

    head_of_predictions = [
        "backend",
        "method",
        "active",
        "predicted, s",
        "measured, s",
        "predicted × AdamW",
        "measured × AdamW",
        "by 1:1:1",
    ]

    def predictions(result):
        rows = result["result"]["predictions"]
        measured = counterpart(result, timed) or {"ratios": {}, "methods": {}}
        base = rows.get("AdamW")
        for name, row in rows.items():
            yield [
                BACKENDS[result["backend"]],
                name,
                _number(row["active_share"], 2),
                _number(row["seconds"], 2),
                _number(measured["methods"].get(name, {}).get("mean"), 2),
                _number(base and row["seconds"] / base["seconds"], 2),
                _ratio(measured["ratios"].get(f"{name} / AdamW")),
                _number(row["rule"] / 3, 2),
            ]

    return "\n\n".join(
        [
            _by_setting(results, head, layers),
            _by_setting(results, head_of_predictions, predictions),
        ]
    )


def scales(results: list[dict]) -> str:
    """What becomes of a sparse step with depth: a row for each backend and depth."""
    head = [
        "backend",
        "layers",
        "arms",
        "SL-SAM / SAM",
        "conditions",
        "trace, s",
        "compile, s",
        "first call of SAM, s",
        "resident, MB",
        "of SAM, MB",
    ]
    rows, notes = [], []
    for result in results:
        backend = BACKENDS[result["backend"]]
        for row in result["result"]["rows"]:
            sparse, dense = row["times"]["SL-SAM"], row["times"]["SAM"]
            resident = [
                row["memory"][name]["resident"]["later_steps"]
                for name in ("SL-SAM", "SAM")
            ]
            rows.append(
                [
                    backend,
                    str(row["layers"]),
                    str(row["arms"]),
                    _ratio(row["ratio"]),
                    _number(row["conditions"], 0),
                    _number(sparse["trace"], 1),
                    _number(sparse["compile"], 1),
                    _number(dense["first_call"], 1),
                    *(_number(v and v / 1e6, 0) for v in resident),
                ]
            )
        notes += [f"- {backend}: {line}" for line in scale.growth(result["result"])]
    return "\n\n".join([_table(head, rows), *(["\n".join(notes)] if notes else [])])


def setting(flags: dict) -> str:
    """A model and its sizes, in words."""
    layers = f", {flags['layers']} x {flags['width']}" if flags["layers"] else ""
    length = f" x {flags['length']}" if flags["length"] else ""
    compiled = {"auto": "", "yes": ", XLA", "no": ", not compiled"}[
        flags["jit_compile"]
    ]
    return (
        f"{MODELS[flags['model']]}{layers}, batch {flags['batch']}{length}, "
        f"active fraction {flags['active_fraction']}{compiled}"
    )


def counterpart(result: dict, others: list[dict]) -> dict | None:
    """The first of others with the same backend, model, sizes and masks."""

    def key(one):
        flags = one["flags"]
        masks = (flags[name] for name in ("rounds", "steps", "seed", "jit_compile"))
        return one["backend"], setting(flags), *masks

    for other in others:
        if key(other) == key(result):
            return other["result"]
    return None


def _parts():
    return (name.replace("_", " ") for name in cost_model.Costs._fields)


def _by_setting(results, head, rows):
    """A table for each model with its sizes; the backends stand below each other."""
    tables = {}
    for result in results:
        tables.setdefault(setting(result["flags"]), []).extend(rows(result))
    return "\n\n".join(
        f"{name}:\n\n{_table(head, found)}" for name, found in tables.items()
    )


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(ratio):
    if ratio is None:
        return "-"
    error = ratio["standard_error"]
    spread = "" if error is None else f" ± {error:.3f}"
    return f"{ratio['of_means']:.3f}{spread}"


def _flops(counted):
    if not counted:
        return "-"
    return f"{sum(step['flops'] for step in counted) / len(counted) / 1e9:.2f}"
