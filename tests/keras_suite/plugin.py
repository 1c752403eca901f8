"""Pytest plugin that runs Keras' tests with our step, and checks the result of each.

Each test must pass, or be listed in `listed.txt` with the reason why it cannot. It is
an error if a listed test passes or does not exist, and if Keras skips a test for a
reason that is not in the list.
"""

import collections
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
TAKE_STEPS = {"apply", "apply_gradients", "fit", "stateless_apply", "train_on_batch"}


def make(name, base):
    import keras_slsam

    if name == "sam":
        return keras_slsam.SAM(base, rho=0)
    return keras_slsam.SLSAM(
        base, rho=0, sampler="uniform", active_fraction=1.0, seed=0
    )


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
        choices=[*OPTIMIZERS, "none"],
        required=True,
        help="the optimizer that wraps the optimizers of the tests",
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
    if BACKEND == "tensorflow":
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

        routing = Routing(lambda base: make(config.option.optimizer, base))
        routing.install()
        config.pluginmanager.register(Steps(routing))


def pytest_ignore_collect(collection_path):
    """Leaves out files without steps, some of which need packages that we lack."""
    if collection_path.name.endswith("_test.py"):
        text = collection_path.read_text(encoding="utf-8")
        return None if any(f"{name}(" in text for name in TAKE_STEPS) else True
    return None


def names_used(item):
    """Returns the names in a test, and in the code of its file that it uses."""
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
                found += [getattr(item.cls, name, None), vars(item.module).get(name)]
    return names


def pytest_collection_modifyitems(config, items):
    """Leaves out tests that cannot take a step, because they name no such method."""
    without = [item for item in items if not TAKE_STEPS & names_used(item)]
    items[:] = [item for item in items if item not in without]
    config.hook.pytest_deselected(items=without)
    listed = read_list(config.option.optimizer)
    for item in items:
        if item.get_closest_marker("multi_device"):
            item.add_marker(pytest.mark.skip("needs several devices"))
        if item.nodeid in listed:
            item.add_marker(pytest.mark.xfail(reason=listed[item.nodeid], strict=True))


class Steps:
    """Counts our steps in each test."""

    def __init__(self, routing):
        self._routing = routing

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self._routing.start(of_optimizers="/optimizers/" in item.nodeid)
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
        listed, skips = read_list(option.optimizer), read_list("skip")
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
        for test in filter(self._is_chosen, listed):
            if seen(test) not in ("listed", "failed"):
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
