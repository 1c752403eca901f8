"""All checks, in one environment that has the three backends (CPU builds).

nox -s tests                    everything, as continuous integration runs it
nox -s tests -- -k sampler      pytest with these arguments only, on each backend
KERAS_BACKEND=jax nox -s tests -- -k sampler    on one backend
nox -s lint                     ruff and mypy
nox -s minima                   tests with the oldest versions in pyproject.toml

`tests` installs the newest releases. At its end it tries pre-releases of Keras and JAX:
what fails with these is a warning.
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

PARALLEL = ("--numprocesses=2", "--dist=worksteal")
BACKENDS = ("jax", "tensorflow", "torch")
# PyTorch's threads spin while they wait, which is slow where others want the cores. XLA
# takes longer to compile a small model than to train it: LLVM need not optimise.
SETTINGS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_WAIT_POLICY": "PASSIVE",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
# Many tests compile the same.
SHARED_COMPILATION = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
ROOT = pathlib.Path(__file__).parent
# What the oldest versions are tested with: the numbers, the work, the state, `fit`.
OF_MINIMA = (
    *("fit", "golden", "gradients", "optimizers", "private_names", "saving", "work"),
)
# What others' next versions may move.
OF_NEXT = ("tests/test_private_names.py",)
# Folders of Keras' tests for each of our optimizers. Where tracing and compiling takes
# long, each folder has one of them: SLSAM where the most is trained.
KERAS_SPLIT = {
    "sam": ("callbacks", "models", "saving"),
    "slsam": ("optimizers", "trainers"),
}
KERAS_ALL = dict.fromkeys(KERAS_SPLIT, sum(KERAS_SPLIT.values(), ()))
KERAS_TESTS = {"jax": KERAS_SPLIT, "tensorflow": KERAS_SPLIT, "torch": KERAS_ALL}
# The fewest of these tests that must take our step.
KERAS_FEWEST = {
    "jax": {"sam": 108, "slsam": 205},
    "tensorflow": {"sam": 120, "slsam": 220},
    "torch": {"sam": 250, "slsam": 245},
}


@nox.session
def tests(session):
    needs = ["-r", "requirements-cpu.txt", "-e"]
    needs += [".[jax,tensorflow,torch,examples,test]"]
    if session.posargs:
        install(session, *needs)
    else:
        # Installing keeps one core busy, so the README's command runs beside it.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            quickstart = pool.submit(run_quickstart, session)
            install(session, *needs)
            check(session)
            session.log(quickstart.result())
    for env in environments():
        session.run("pytest", *PARALLEL, "--durations=10", *session.posargs, env=env)
        if not session.posargs:
            run_keras_suite(session, env)
            run_with_next_versions(session, env)


@nox.session
def minima(session):
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    needs = project["dependencies"] + [n for name in BACKENDS for n in extras[name]]
    oldest = [need.replace(">=", "==") for need in needs]
    install(session, "-r", "requirements-cpu.txt", *oldest, "flax", "pytest")
    files = [f"tests/test_{name}.py" for name in OF_MINIMA]
    for env in environments():
        session.run("pytest", *files, *session.posargs, env=env)


@nox.session
def lint(session):
    session.install("ruff", "mypy", "keras", "numpy")
    check(session)


def install(session, *needs):
    """Installs what is needed, unless that is what was installed last."""
    declared = [ROOT / name for name in ("pyproject.toml", "requirements-cpu.txt")]
    asked = repr([needs, *(file.read_bytes() for file in declared)])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    stamp = pathlib.Path(session.virtualenv.location) / "installed"
    if stamp.exists() and stamp.read_text("utf-8") == digest:
        return
    # Python compiles what it imports, which is a small part.
    session.install("--no-compile", *needs)
    # Left out, as the line above is, where nox is told to install nothing.
    write = f"import pathlib; pathlib.Path({str(stamp)!r}).write_text({digest!r})"
    session.run_install("python", "-c", write)


def environments():
    """The environment of the tests on each backend, or on that of KERAS_BACKEND."""
    chosen = os.environ.get("KERAS_BACKEND")
    with tempfile.TemporaryDirectory() as cache:
        for backend in (chosen,) if chosen else BACKENDS:
            yield {
                **SETTINGS,
                **SHARED_COMPILATION,
                "JAX_COMPILATION_CACHE_DIR": cache,
                "KERAS_BACKEND": backend,
            }


def run_keras_suite(session, env):
    """Keras' own tests through our step."""
    backend = env["KERAS_BACKEND"]
    for optimizer, folders in KERAS_TESTS[backend].items():
        session.run(
            "python",
            "tests/keras_suite",
            f"--optimizer={optimizer}",
            f"--fewest={KERAS_FEWEST[backend][optimizer]}",
            *PARALLEL,
            *(f"keras/src/{folder}" for folder in folders),
            env=env,
        )


def run_with_next_versions(session, env):
    """Tests with pre-releases of Keras and JAX; where they fail, a warning."""
    with tempfile.TemporaryDirectory() as folder:
        into = ("--quiet", "--pre", "--no-deps", "--no-compile", "--target", folder)
        try:
            session.run("pip", "install", *into, "keras", "jax", "jaxlib")
            env = {**env, "PYTHONPATH": folder}
            session.run("pytest", "--numprocesses=2", *OF_NEXT, env=env)
        except nox.command.CommandFailed:
            session.warn("The next versions of Keras and JAX need a look.")


def check(session):
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    # The README's command that tests is the one of continuous integration.
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    if f"command='{readme_command('nox -s tests')}'" not in script:
        session.error(".ci/run does not run the README's command that tests.")


def run_quickstart(session):
    """The README's command, word for word, in a copy; returns what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*"))
        command = f"{readme_command('examples/quickstart.py')} --limit=160"
        return session.run(
            "bash",
            "-c",
            f"cd {copy} && {command}",
            external=True,
            silent=True,
            env={"PIP_NO_COMPILE": "1", "KERAS_BACKEND": None},
        )


def readme_command(end):
    """The one command in the README that ends so."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = readme.split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    (command,) = [line for line in lines if line.endswith(end)]
    return command
