"""Pytest plugin that runs Keras' tests with our step, and checks the result of each.

Each test must pass, or be listed in `listed.txt` with the reason why it cannot. It is
an error if a listed test passes, or does not exist (without `--variants`), and if Keras
skips a test for a reason that is not in the list.
"""

import collections
import functools
import gc
import importlib
import inspect
import os
import pathlib
import sys
import types

import pytest

BACKEND = os.environ["KERAS_BACKEND"]
OPTIMIZERS = ("sam", "slsam")
# With `--optimizer=both`, a folder of tests has one of them, because tracing and
# compilation take long.
STEPS = ("optimizers", "trainers")  # the other folders have callbacks, models and files
OF_STEPS, OF_OTHERS = ("sam", "slsam") if BACKEND == "torch" else ("slsam", "sam")
# Tests whose variants differ in what our step does: in the updates of sparse gradients.
ALL_VARIANTS = {"test_sparse_correctness"}
TAKE_STEPS = {"apply", "apply_gradients", "fit", "stateless_apply", "train_on_batch"}


def make(name, base):
    import keras_slsam

    if name == "sam":
        return keras_slsam.SAM(base, rho=0)
    return keras_slsam.SLSAM(
        base, rho=0, sampler="uniform", active_fraction=1.0, seed=0
    )


def optimizer_of(test, config):
    """Returns the name of the optimizer that wraps those of a test."""
    if config.option.optimizer != "both":
        return config.option.optimizer
    return OF_STEPS if test.split("/")[2] in STEPS else OF_OTHERS


def read_list(kind):
    """Returns the tests, or reasons to skip, that are listed for this backend.

    Args:
        kind: String, one of `OPTIMIZERS`, or "skip".

    Returns:
        Dict from an entry to its reason.
    """
    entries, reason = {}, None
    for line in pathlib.Path(__file__).with_name("listed.txt").open(encoding="utf-8"):
        if line.startswith(" "):
            if reason is not None:
                entries[line.strip()] = reason
        elif line.strip() and not line.startswith("#"):
            backends, kinds, reason = (part.strip() for part in line.split("|"))
            if BACKEND not in backends.split() or kind not in kinds.split():
                reason = None
    return entries


def pytest_addoption(parser):
    parser.addoption(
        "--optimizer",
        choices=[*OPTIMIZERS, "both", "none"],
        required=True,
        help="the optimizer that wraps the optimizers of the tests",
    )
    parser.addoption(
        "--variants",
        type=int,
        help="the number of variants of a parameterized test that run, at most; "
        "default: all",
    )
    parser.addoption(
        "--fewest",
        type=int,
        default=0,
        help="the number of tests that must take our step, at least",
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Account(config))
    if config.getoption("numprocesses", None):
        return  # the workers run the tests
    gc.set_threshold(100_000, 50, 100)  # as in tests/conftest.py
    # From the configuration of Keras' tests, which is not in its wheel.
    os.environ.setdefault("JAX_DEFAULT_DTYPE_BITS", "32")
    importlib.import_module("torch")  # importing it after TensorFlow crashes
    import keras

    sys.modules["conftest"] = types.SimpleNamespace(
        skip_if_backend=lambda backend, reason: pytest.mark.skipif(
            keras.config.backend() == backend, reason=reason
        )
    )
    if config.option.optimizer != "none":
        from routing import Routing

        routing = Routing()
        routing.install()
        config.pluginmanager.register(Steps(routing, config))


def pytest_ignore_collect(collection_path):
    """Leaves out files without steps, some of which need packages that we lack."""
    if collection_path.name.endswith("_test.py"):
        text = collection_path.read_text(encoding="utf-8")
        return None if any(f"{name}(" in text for name in TAKE_STEPS) else True
    return None


def names_used(item):
    """Returns the names in a test, and in the code of its file that it uses."""
    own = {
        name: value
        for name, value in vars(item.module).items()
        if getattr(value, "__module__", None) == item.module.__name__
    }
    names, found = set(), [inspect.unwrap(item.function), vars(item.cls).get("setUp")]
    while found:
        code = found.pop()
        if isinstance(code, type):
            found += vars(code).values()
        code = getattr(code, "__code__", code)
        if isinstance(code, types.CodeType):
            found += code.co_consts
            for name in {*code.co_names} - names:
                names.add(name)
                found += [getattr(item.cls, name, None), own.get(name)]
    return names


def pytest_collection_modifyitems(config, items):
    """Leaves out tests that name no method that takes a step, and many variants."""
    listed = {kind: read_list(kind) for kind in OPTIMIZERS}

    def reason(item):
        return listed.get(optimizer_of(item.nodeid, config), {}).get(item.nodeid)

    most, kept, variants = config.option.variants, [], collections.Counter()
    for item in items:
        name = inspect.unwrap(item.function).__name__
        # A variant may have the name of a method that it calls.
        if TAKE_STEPS & (names_used(item) | {*item.name.split("_")}):
            passes = reason(item) is None
            if not most or name in ALL_VARIANTS or variants[item.cls, name] < most:
                kept.append(item)
                variants[item.cls, name] += passes
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        if item.get_closest_marker("multi_device"):
            item.add_marker(pytest.mark.skip("needs several devices"))
        if why := reason(item):
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))


class Steps:
    """Counts our steps in each test."""

    def __init__(self, routing, config):
        self._routing, self._config = routing, config

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        kind = optimizer_of(item.nodeid, self._config)
        self._routing.start(
            functools.partial(make, kind), of_optimizers="/optimizers/" in item.nodeid
        )
        try:
            return (yield)
        finally:
            item.user_properties.append(("steps", self._routing.steps))


class Account:
    """Records the outcome of each test, and the errors in the list."""

    def __init__(self, config):
        self._config = config
        self._outcomes = {}
        self._skips = {}
        self._stepped = set()
        self._errors = []

    def pytest_runtest_logreport(self, report):
        outcome = "listed" if hasattr(report, "wasxfail") else report.outcome
        if outcome != "passed" or report.when == "call":
            self._outcomes.setdefault(report.nodeid, outcome)
        if outcome == "skipped":
            self._skips[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
        if dict(report.user_properties).get("steps"):
            self._stepped.add(report.nodeid)

    def pytest_sessionfinish(self, session):
        option = self._config.option
        if option.optimizer == "none" or option.collectonly:
            return
        seen = self._outcomes.get
        skips = read_list("skip")
        for test, reason in self._skips.items():
            if reason not in skips:
                self._errors.append(f"skipped for an unlisted reason: {test}: {reason}")
        if (
            option.keyword
            or option.markexpr
            or session.shouldfail
            or session.shouldstop
        ):
            return
        # With `--variants`, what is listed may be left out.
        fine = {"listed", "failed", *([None] if option.variants else [])}
        for kind in OPTIMIZERS:
            for test in filter(self._is_chosen, read_list(kind)):
                if optimizer_of(test, self._config) == kind and seen(test) not in fine:
                    self._errors.append(f"listed, but {seen(test, 'missing')}: {test}")
        if len(self._stepped) < option.fewest:
            self._errors.append(f"fewer than {option.fewest} tests took our step")
        if self._errors and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _is_chosen(self, test):
        return any(
            f"{test}/".startswith((f"{argument}/", f"{argument}::"))
            or test.startswith(f"{argument.rstrip('/')}/")
            for argument in self._config.args
        )

    def pytest_terminal_summary(self, terminalreporter):
        count = collections.Counter(self._outcomes.values())
        stepped = [t for t in self._stepped if self._outcomes[t] == "passed"]
        for error in self._errors:
            terminalreporter.write_line(f"ERROR {error}", red=True)
        terminalreporter.write_line(
            f"Keras' tests on {BACKEND} with {self._config.option.optimizer}: "
            f"{count['passed']} passed, {len(stepped)} of them took our step; "
            f"{count['listed']} listed; {count['skipped']} skipped by Keras; "
            f"{count['failed']} failed."
        )
