"""All checks, in one environment that has the three backends (CPU builds).

nox -s tests                    everything, as continuous integration runs it
nox -s tests -- -k sampler      pytest with these arguments only, on each backend
nox -s lint                     ruff and mypy
"""

import pathlib

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

BACKENDS = ("jax", "tensorflow", "torch")
# PyTorch's threads spin while they wait, which is slow where others want the cores.
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE"}
ROOT = pathlib.Path(__file__).parent


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
        for backend in BACKENDS:
            # As in the README, on a few words.
            session.run(
                "python",
                "examples/quickstart.py",
                "--limit=240",
                env={**SETTINGS, "KERAS_BACKEND": backend},
            )
    for backend in BACKENDS:
        session.run(
            "pytest", *session.posargs, env={**SETTINGS, "KERAS_BACKEND": backend}
        )


@nox.session
def lint(session):
    session.install("ruff", "mypy", "keras", "numpy")
    check(session)


def check(session):
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    check_readme(session)


def check_readme(session):
    """The README's commands are those that run here and in `.ci/run`."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = readme.split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    (test_command,) = [line for line in lines if "nox -s tests" in line]
    if f"command='{test_command}'" not in script.splitlines():
        session.error(f".ci/run does not run the README's: {test_command}")
    (quickstart,) = [line for line in lines if line.endswith("examples/quickstart.py")]
    for part in ("requirements-cpu.txt", ".[jax,examples]"):
        if part not in quickstart:
            session.error(f"The README's quickstart does not install {part}")
