"""All checks, in one environment that has the three backends (CPU builds).

nox -s tests                    everything, as in continuous integration
nox -s tests -- -k sampler      only pytest with these arguments, on each backend
KERAS_BACKEND=jax nox -s tests -- -k sampler    the same on one backend
nox -s lint                     ruff and mypy
nox -s docs                     the documentation site, in site/
nox -s minima                   tests with the oldest versions in pyproject.toml

`tests` installs the newest releases, and also tries pre-releases of Keras and JAX.
A failure with these is only a warning, in the last line.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import tempfile

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

BACKENDS = ("jax", "tensorflow", "torch")
# Most time of a short process is that of importing, so what Python compiles is kept.
COMPILED = {"PYTHONDONTWRITEBYTECODE": None}
# PyTorch's threads spin while they wait, which slows down other processes on the same
# cores. XLA takes longer to compile a small model than to train it, so LLVM does not
# optimise, and XLA has its older emitters of fusions, which compile twice as fast, and
# does not split a program into parts, since each part costs time.
SETTINGS = {
    **COMPILED,
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Preparing the graph of a small model takes longer with oneDNN.
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
    # Many tests compile the same programs, so JAX keeps them.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
ROOT = pathlib.Path(__file__).parent
# Tests for the oldest versions: the trajectories, the executed work, the state, `fit`.
OF_MINIMA = (
    *("fit", "golden", "gradients", "optimizers", "private_names", "saving", "work"),
)
# Tests of names that the next versions of other packages may change.
OF_NEXT = ("tests/test_private_names.py",)
# Arguments of Keras' tests. `fewest` is the number of tests that must take our step. On
# PyTorch, which traces and compiles nothing, all variants of a test run. JAX and
# TensorFlow leave out callbacks, which our own tests have on each backend. TensorFlow
# traces longest. It also leaves out single optimizers, but not the tests that run with
# TensorFlow only.
KERAS_TESTS = {
    "jax": (
        *("--variants=2", "--fewest=149"),
        *("keras/src/models", "keras/src/optimizers"),
        *("keras/src/saving", "keras/src/trainers"),
    ),
    "tensorflow": (
        *("--variants=2", "--fewest=115"),
        *("keras/src/models", "keras/src/saving", "keras/src/trainers"),
        "keras/src/optimizers/loss_scale_optimizer_test.py",
        "keras/src/optimizers/multi_optimizer_test.py",
        "keras/src/optimizers/optimizer_sparse_test.py",
        "keras/src/optimizers/optimizer_test.py",
        "keras/src/optimizers/schedules",
        "keras/src/optimizers/adam_test.py::AdamTest::test_clipnorm_indexed_slices",
        "keras/src/callbacks/swap_ema_weights_test.py::SwapEMAWeightsTest::"
        "test_swap_ema_weights_with_tf_distribute",
        "keras/src/callbacks/tensorboard_test.py::TestTensorBoardV2::"
        "test_TensorBoard_auto_trace",
        # The variant with 3 steps per execution runs. Larger graphs take long.
        *(
            "--deselect=keras/src/trainers/trainer_test.py::TestTrainer::"
            f"test_steps_per_execution_unrolled_steps_steps_count_{count}"
            for count in (8, 32)
        ),
    ),
    "torch": ("--fewest=253",),
}


@nox.session
def tests(session):
    needs = ["-r", "requirements-cpu.txt", "-e"]
    needs += [".[jax,tensorflow,torch,analysis,examples,test,docs]"]
    with tempfile.TemporaryDirectory() as cache:
        environments = [environment(backend, cache) for backend in backends()]
        if session.posargs:
            install(session, *needs)
            run_tests(session, environments)
        else:
            run_everything(session, needs, environments)


def run_everything(session, needs, environments):
    # Our tests leave cores idle now and then, so the rest runs beside them in a thread.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as beside:
        running = [beside.submit(run_quickstart, session)]
        install(session, *needs)
        check(session)
        build_site(session)
        running += [
            beside.submit(run_keras_suite, session, env) for env in environments
        ]
        running.append(beside.submit(run_with_next_versions, session, environments))
        try:
            run_tests(session, environments)
        except BaseException:
            beside.shutdown(cancel_futures=True)
            raise
        for each in running:
            session.log(each.result())


def run_tests(session, environments):
    arguments = "--numprocesses=2", "--dist=worksteal", "--durations=10"
    for env in environments:
        session.run("pytest", *arguments, *session.posargs, env=env)


@nox.session
def minima(session):
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    needs = project["dependencies"] + [n for name in BACKENDS for n in extras[name]]
    oldest = [need.replace(">=", "==") for need in needs]
    install(session, "-r", "requirements-cpu.txt", *oldest, "flax", "pytest")
    files = [f"tests/test_{name}.py" for name in OF_MINIMA]
    for backend in backends():
        session.run("pytest", *files, *session.posargs, env=environment(backend))


@nox.session
def lint(session):
    session.install("ruff", "mypy", "keras", "numpy")
    check(session)


@nox.session
def docs(session):
    # The package is read, not imported.
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    install(session, *project["optional-dependencies"]["docs"])
    build_site(session)


def install(session, *needs):
    """Installs the requirements, unless the same ones were installed last."""
    declared = [ROOT / name for name in ("pyproject.toml", "requirements-cpu.txt")]
    asked = repr([needs, *(file.read_bytes() for file in declared)])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    stamp = pathlib.Path(session.virtualenv.location) / "installed"
    if stamp.exists() and stamp.read_text("utf-8") == digest:
        return
    # Python compiles only the modules that it imports, which are few.
    session.install("--no-compile", *needs)
    # `run_install`, so that `nox --no-install` skips this line like the one above.
    write = f"import pathlib; pathlib.Path({str(stamp)!r}).write_text({digest!r})"
    session.run_install("python", "-c", write)


def backends():
    """Returns the names of all backends, or only KERAS_BACKEND."""
    chosen = os.environ.get("KERAS_BACKEND")
    return (chosen,) if chosen else BACKENDS


def environment(backend, cache=None):
    """Returns the environment of the tests on a backend.

    Args:
        backend: String.
        cache: String, the folder of programs that JAX compiled, or `None`.
    """
    return {**SETTINGS, "JAX_COMPILATION_CACHE_DIR": cache, "KERAS_BACKEND": backend}


def run_keras_suite(session, env):
    """Runs Keras' own tests with our step. Returns their output."""
    chosen = "--optimizer=both", *KERAS_TESTS[env["KERAS_BACKEND"]]
    return session.run("python", "tests/keras_suite", *chosen, silent=True, env=env)


def run_with_next_versions(session, environments):
    """Tests with pre-releases of Keras and JAX. Returns what to log."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        into = ("--quiet", "--pre", "--no-deps", "--no-compile", "--target", folder)
        try:
            installed = session.run_install(
                "pip", "install", *into, "keras", "jax", "jaxlib"
            )
        except nox.command.CommandFailed:
            return "The next versions of Keras and JAX could not be installed."
        if not installed:
            return "Nothing was installed."
        for env in environments:
            try:
                env = {**env, "PYTHONPATH": folder}
                session.run("pytest", *OF_NEXT, silent=True, env=env)
            except nox.command.CommandFailed:
                failed.append(env["KERAS_BACKEND"])
    if failed:
        return f"WARNING: failed with the next Keras and JAX on {', '.join(failed)}."
    return "The next versions of Keras and JAX passed."


def check(session):
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    # The README's test command must be the one of continuous integration.
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    if f"command='{readme_command('nox -s tests')}'" not in script:
        session.error(".ci/run does not run the README's test command.")


def build_site(session):
    """Builds the documentation. Any warning is an error: see mkdocs.yml."""
    session.run("mkdocs", "build", env={"NO_MKDOCS_2_WARNING": "1"})


def run_quickstart(session):
    """Runs the README's command in a copy. Returns its output.

    The command trains only SL-SAM on few texts. XLA has its defaults here, with which
    each method takes long to compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*"))
        command = readme_command("examples/quickstart.py")
        command += " --limit=160 --methods slsam"
        return session.run(
            "bash",
            "-c",
            f"cd {copy} && {command}",
            external=True,
            silent=True,
            env={**COMPILED, "PIP_NO_COMPILE": "1", "KERAS_BACKEND": None},
        )


def readme_command(end):
    """Returns the only command in the README that ends with `end`."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = readme.split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    (command,) = [line for line in lines if line.endswith(end)]
    return command
