"""All checks, in one environment that has the three backends (CPU builds).

nox -s tests                    everything, as continuous integration runs it
nox -s tests -- -k sampler      pytest with these arguments only, on each backend
nox -s lint                     ruff and mypy
"""

import pathlib
import shutil
import tempfile

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

PARALLEL = ("--numprocesses=2", "--dist=worksteal")
BACKENDS = ("jax", "tensorflow", "torch")
# PyTorch's threads spin while they wait, which is slow where others want the cores.
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE"}
# Many tests compile the same. (Without LLVM's optimisation most would be faster still,
# but convolutions eight times slower.)
SHARED_COMPILATION = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
ROOT = pathlib.Path(__file__).parent
# Folders of Keras' tests for each of our optimizers. Where tracing and compiling takes
# long, each folder has one of them: SLSAM where the most is trained.
KERAS_SPLIT = {
    "sam": ("callbacks", "models", "saving"),
    "slsam": ("optimizers", "trainers"),
}
KERAS_ALL = dict.fromkeys(KERAS_SPLIT, sum(KERAS_SPLIT.values(), ()))
KERAS_TESTS = {"jax": KERAS_SPLIT, "tensorflow": KERAS_SPLIT, "torch": KERAS_ALL}


@nox.session
def tests(session):
    session.install(
        "-r",
        "requirements-cpu.txt",
        "-e",
        ".[jax,tensorflow,torch,examples,test]",
    )
    if not session.posargs:
        check(session)
        run_quickstart(session)
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            **SETTINGS,
            **SHARED_COMPILATION,
            "JAX_COMPILATION_CACHE_DIR": cache,
        }
        for backend in BACKENDS:
            session.run(
                "pytest",
                *PARALLEL,
                "--durations=10",
                *session.posargs,
                env={**settings, "KERAS_BACKEND": backend},
            )
            if not session.posargs:
                for optimizer, folders in KERAS_TESTS[backend].items():
                    session.run(
                        "python",
                        "tests/keras_suite",
                        f"--optimizer={optimizer}",
                        "--fewest=50",
                        *PARALLEL,
                        *(f"keras/src/{folder}" for folder in folders),
                        env={**settings, "KERAS_BACKEND": backend},
                    )


@nox.session
def lint(session):
    session.install("ruff", "mypy", "keras", "numpy")
    check(session)


def check(session):
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    # The README's command that tests is the one of continuous integration.
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    if f"command='{readme_command('nox -s tests')}'" not in script:
        session.error(".ci/run does not run the README's command that tests.")


def run_quickstart(session):
    """The README's command, word for word, in a copy; then the other backends."""
    few = "--limit=240"
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*"))
        with session.chdir(copy):
            command = f"{readme_command('examples/quickstart.py')} {few}"
            session.run("bash", "-c", command, external=True)
    for backend in BACKENDS[1:]:
        session.run(
            "python",
            "examples/quickstart.py",
            few,
            env={**SETTINGS, "KERAS_BACKEND": backend},
        )


def readme_command(end):
    """The one command in the README that ends so."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = readme.split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    (command,) = [line for line in lines if line.endswith(end)]
    return command
