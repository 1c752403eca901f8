"""The callbacks: what they log, and that steps without them do nothing for them."""

import csv

import keras
import numpy as np
import pytest
import replay
import zoo
from keras import ops

import keras_slsam
from keras_slsam import observers
from keras_slsam.callbacks import ArmLogger
from keras_slsam.callbacks import SharpnessLogger
from keras_slsam.callbacks import TrajectoryLogger

ROWS, BATCH = 24, 4
STEPS = ROWS // BATCH
# Each arm is active in another share of six steps, one never.
MASKS = np.array([[1, 1, 0, 0]] * 2 + [[1, 0, 0, 0]] * 3 + [[0, 1, 1, 0]], bool)
COMPILED = [{}]
if keras.config.backend() != "torch":  # which executes one step at a time
    COMPILED.append({"steps_per_execution": 3})


def data():
    x = np.random.default_rng(0).normal(size=(ROWS, zoo.WIDTH)).astype("float32")
    return x, np.tanh(x[:, :2])


def make(optimizer, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((zoo.WIDTH,)),
            keras.layers.Dense(8, activation="tanh", name="body"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer, "mse", **kwargs)
    return model


def fit(model, *callbacks, **kwargs):
    given = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(*data(), callbacks=list(callbacks), **given).history


def replayed(**kwargs):
    return keras_slsam.SLSAM("sgd", sampler=replay.Replay(MASKS), **kwargs)


def weights_of(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def close(value, expected, tolerance=1e-4):
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=1e-6)


class Recorder(keras.callbacks.Callback):
    """Reads the optimizer after each step."""

    def __init__(self):
        super().__init__()
        self.norms = []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        optimizer._collect_state()
        self.norms.append(ops.convert_to_numpy(optimizer.gradient_norms))


# SharpnessLogger


def rise(model, x, y, rho):
    """Returns how much the loss rises, with the gradient of a step of plain SGD."""
    variables, before = model.trainable_variables, weights_of(model)
    loss = model.evaluate(x, y, verbose=0, batch_size=ROWS)
    other = make(keras.optimizers.SGD(1.0))
    other.set_weights(model.get_weights())
    other.train_on_batch(x, y)
    gradient = [w - after for w, after in zip(before, weights_of(other))]
    length = np.sqrt(sum(np.sum(g**2) for g in gradient))
    for variable, w, g in zip(variables, before, gradient):
        variable.assign(w + rho * g / length)
    try:
        return model.evaluate(x, y, verbose=0, batch_size=ROWS) - loss
    finally:
        for variable, w in zip(variables, before):
            variable.assign(w)


def test_sharpness_is_the_rise_of_the_loss():
    x, y = data()
    model = make(keras_slsam.SAM("sgd", rho=0.3))
    expected = rise(model, x, y, 0.3)
    model.optimizer.base_optimizer.learning_rate = 0.0
    history = fit(model, SharpnessLogger(), batch_size=ROWS)
    assert expected > 0.1
    close(history["sharpness"], [expected])
    # The mean over batches, weighted by their rows.
    parts = [slice(0, 20), slice(20, 24)]
    expected = [rise(model, x[rows], y[rows], 0.3) for rows in parts]
    model.optimizer.base_optimizer.learning_rate = 0.0
    history = fit(model, SharpnessLogger(), batch_size=20)
    close(history["sharpness"], [np.average(expected, weights=[20, 4])])


@pytest.mark.parametrize("kwargs", COMPILED)
def test_sharpness_is_logged_only_while_asked_for(kwargs, monkeypatch):
    model = make(keras_slsam.SAM("sgd", rho=0.3), **kwargs)
    validation = {"validation_data": data()}
    assert set(fit(model, **validation)) == {"loss", "val_loss"}
    logger = SharpnessLogger()
    history = fit(model, logger, epochs=2, **validation)
    assert set(history) == {"loss", "val_loss", "sharpness"}
    first, second = history["sharpness"]
    assert first != second  # a new mean in each epoch
    monkeypatch.setattr(observers, "Reading", None)  # calling it would fail
    assert set(fit(model)) == {"loss"}
    assert set(model.evaluate(*data(), verbose=0, return_dict=True)) == {"loss"}


def test_fit_with_the_same_logger_is_traced_once():
    model = make(keras_slsam.SAM("sgd", rho=0.3))
    logger, functions = SharpnessLogger(), []
    for callbacks in ([], [logger], [], [logger]):
        fit(model, *callbacks)
        functions.append(model.train_function)
    assert functions[0] is functions[2] is not functions[1] is functions[3]


def test_logs_are_as_before_after_an_interrupted_fit():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = make(keras_slsam.SAM("sgd"))
    logger = SharpnessLogger()
    with pytest.raises(KeyboardInterrupt):
        fit(model, logger, Interrupt())
    assert set(fit(model)) == {"loss"}
    assert set(fit(model, logger)) == {"loss", "sharpness"}


def off_from_2(step):
    return ops.where(step < 2, 0.3, 0.0)


def test_steps_without_ascent_or_with_a_bad_gradient_do_not_count():
    x, y = data()
    model = make(keras_slsam.SAM(keras.optimizers.SGD(0.0), rho=0.3))
    (expected,) = fit(model, SharpnessLogger(), batch_size=12)["sharpness"]
    x = np.concatenate([x, np.full_like(x[:12], np.inf)])
    y = np.concatenate([y, y[:12]])
    given = {"batch_size": 12, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, callbacks=[SharpnessLogger()], **given).history
    close(history["sharpness"], [expected])
    assert int(model.optimizer.skipped_steps) == 1
    model = make(keras_slsam.SAM(keras.optimizers.SGD(0.0), rho=off_from_2))
    history = model.fit(
        *map(np.concatenate, zip(data(), data())),
        callbacks=[SharpnessLogger()],
        **given,
    ).history
    close(history["sharpness"], [expected])


def test_validation_sharpness_is_measured_with_any_optimizer():
    x, y = data()
    for optimizer in ("sgd", keras_slsam.S2SAM("sgd"), keras_slsam.SAM("sgd")):
        model = make(optimizer)
        logger = SharpnessLogger((x, y), rho=0.3)
        stopping = keras.callbacks.EarlyStopping("val_sharpness", mode="min")
        (found,) = fit(model, logger, stopping)["val_sharpness"]
        after = make(keras_slsam.SAM("sgd", rho=0.3))
        after.set_weights(model.get_weights())
        close(found, rise(after, x, y, 0.3), 1e-3)


def test_there_must_be_something_to_log():
    single = (
        "sgd",
        keras_slsam.S2SAM("sgd"),
        keras_slsam.SAM("sgd", ascent_fraction=0.5),
    )
    for optimizer in single:
        with pytest.raises(ValueError, match="two passes.*`validation_data`"):
            fit(make(optimizer), SharpnessLogger())


# ArmLogger


@pytest.mark.parametrize("kwargs", COMPILED)
def test_records_of_epochs(kwargs):
    model, logger = make(replayed(), **kwargs), ArmLogger()
    before = weights_of(model)
    fit(model, logger, validation_data=data())
    moved = weights_of(model)
    fit(model, logger, epochs=2, initial_epoch=1)
    first, second = logger.records
    assert [r["epoch"] for r in logger.records] == [0, 1]
    assert [r["step"] for r in logger.records] == [STEPS, 2 * STEPS]
    close(first["active"], MASKS.mean(axis=0))
    close(second["active"], MASKS.mean(axis=0))
    assert first["probability"] is None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            np.linalg.norm(after - w) / np.linalg.norm(w)
            for w, after in zip(before, moved)
        ]
    close(first["update_ratio"][[0, 1, 2]], ratios[:3])
    assert np.isinf(ratios[1]) and ratios[2] > 0
    recorder, model = Recorder(), make(replayed())
    fit(model, recorder)
    sums, counts = np.sum(recorder.norms, axis=0), MASKS.sum(axis=0)
    close(first["gradient_norm"][:3], sums[:3] / counts[:3])
    assert np.isnan(first["gradient_norm"][3])
    assert logger.names == ["body/kernel", "body/bias", "head/kernel", "head/bias"]


def test_records_within_an_epoch():
    model, logger = make(replayed(arms="layer")), ArmLogger(every=4)
    # Two arms: the masks' first two columns.
    model.optimizer.sampler.masks = MASKS[:, :2].tolist()
    fit(model, logger, epochs=2)
    steps = [4, 6, 10, 12]
    assert [r["step"] for r in logger.records] == steps
    drawn = np.concatenate([MASKS[:, :2]] * 2)
    for record, low, high in zip(logger.records, [0, *steps], steps):
        close(record["active"], drawn[low:high].mean(axis=0))
    assert logger.names == ["body", "head"]


def test_probabilities_are_recorded():
    model, logger = make(keras_slsam.SLSAM("sgd", always_active="head")), ArmLogger()
    fit(model, logger)
    (record,) = logger.records
    close(record["probability"], ops.convert_to_numpy(model.optimizer.probabilities))
    close(record["probability"][2:], 1.0)


def test_nothing_is_read_between_steps(monkeypatch):
    model, logger = make(keras_slsam.SLSAM("sgd")), ArmLogger()
    fit(model, logger)
    read, calls = ops.convert_to_numpy, []

    class Count(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            monkeypatch.setattr(ops, "convert_to_numpy", calls.append)

        def on_train_batch_end(self, batch, logs=None):
            monkeypatch.setattr(ops, "convert_to_numpy", read)

    class Last(Count):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)

    fit(model, Count(), logger, Last())
    assert not calls and len(logger.records) == 2


def test_skipped_steps_are_not_active():
    x, y = data()
    x = np.concatenate([x, np.full_like(x, np.inf)])
    model, logger = make(keras_slsam.SAM("sgd")), ArmLogger()
    y = np.concatenate([y, y])
    model.fit(x, y, BATCH, shuffle=False, verbose=0, callbacks=[logger])
    (record,) = logger.records
    close(record["active"], 0.5)
    assert np.all(np.isfinite(record["gradient_norm"]))


def test_csv(tmp_path):
    model, logger = make(replayed()), ArmLogger(tmp_path / "arms.csv")
    fit(model, logger, epochs=2)
    with open(tmp_path / "arms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == 2 * logger.names
    for row, (record, arm) in zip(
        rows, [(r, a) for r in logger.records for a in range(4)]
    ):
        assert (int(row["epoch"]), int(row["step"])) == (
            record["epoch"],
            record["step"],
        )
        assert row["probability"] == ""
        for name in ("active", "gradient_norm", "update_ratio"):
            close(float(row[name]), record[name][arm])


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    model, logger = make(replayed()), ArmLogger(log_dir=tmp_path)
    fit(model, logger, epochs=2)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for arm, name in enumerate(logger.names):
        found = events.Scalars(f"active/{name}")
        assert [event.step for event in found] == [STEPS, 2 * STEPS]
        close([event.value for event in found], MASKS.mean(axis=0)[arm])
    image = events.Images("arms")[-1]
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 100


def test_wrong_arguments():
    for every in (0, 1.5, "step", True):
        with pytest.raises(ValueError, match=f"`every`.*Received: every={every!r}"):
            ArmLogger(every=every)
    for name, value in {"rho": 0.0, "steps": 0}.items():
        with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}={value!r}"):
            SharpnessLogger(data(), **{name: value})
    with pytest.raises(ValueError, match="which has arms"):
        fit(make("sgd"), ArmLogger())


def test_both_with_mixed_precision_and_an_unbuilt_model():
    layer = keras.layers.Dense(2, name="head", dtype="mixed_float16")
    model = keras_slsam.sharpness_aware(keras.Sequential([layer]))
    scaled = keras.optimizers.LossScaleOptimizer(
        keras_slsam.SAM("sgd", rho=0.3), initial_scale=8.0
    )
    model.compile(scaled, "mse")
    logger = ArmLogger()
    history = fit(model, SharpnessLogger(), logger)
    assert history["sharpness"][0] > 0
    close(logger.records[0]["active"], 1.0)
    assert len(logger.names) == 2


def test_a_logger_goes_on_after_a_new_compile():
    model, logger, sharpness = make(replayed()), ArmLogger(), SharpnessLogger(data())
    fit(model, logger, sharpness)
    model.layers[0].trainable = False
    model.compile(keras_slsam.SAM("sgd"), "mse")
    fit(model, logger, sharpness)
    close(logger.records[-1]["active"], [1.0, 1.0])
    model.compile("sgd", "mse")
    assert set(fit(model, sharpness)) == {"loss", "val_sharpness"}
    assert not observers.of(model)


def test_an_epoch_without_an_ascent_has_no_sharpness():
    model = make(keras_slsam.SAM("sgd", rho=0.0))
    assert np.isnan(fit(model, SharpnessLogger())["sharpness"])


def test_a_model_with_its_own_train_step():
    class Own(keras.Sequential):
        def train_step(self, *args):
            if keras.config.backend() == "jax":
                return keras_slsam.stateless_step(self, self.optimizer, *args)
            return keras_slsam.step(self, self.optimizer, *args)

    model = Own([keras.Input((zoo.WIDTH,)), keras.layers.Dense(2)])
    model.compile(keras_slsam.SAM("sgd", rho=0.3), "mse", jit_compile=False)
    fit(model)
    logger = ArmLogger()
    assert fit(model, SharpnessLogger(), logger)["sharpness"][0] > 0
    close(logger.records[0]["active"], 1.0)


def test_old_train_functions_are_not_kept():
    model = make(keras_slsam.SAM("sgd"))
    for _ in range(4):
        fit(model, SharpnessLogger())
    assert len(model.train_function.versions) <= 4


@pytest.mark.parametrize("kwargs", COMPILED)
def test_a_trajectory_counts_steps(kwargs):
    way = TrajectoryLogger(every=3)
    fit(make(keras_slsam.SAM("sgd"), **kwargs), way, epochs=2)
    assert way.steps == [0, 3, 6, 9, 12]
