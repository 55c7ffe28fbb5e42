"""The wheel holds the whole library under one name, and `import jdet` stays cheap.

An editable install hides both faults looked for here: a package missing from the list
in pyproject.toml still imports, and so does a file that no wheel would hold.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]  # {"jdet.models": "models", ...}


def modules() -> dict[str, str]:
    """The path in the wheel, and the package, of every Python file of the library."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            inside = pathlib.PurePosixPath(*package.split("."), file.relative_to(ROOT / folder))
            found[str(inside)] = ".".join(inside.parent.parts)
    return found


def run(*command: str | pathlib.Path, **kwargs) -> str:
    """Run a command and return what it printed; a failure shows it."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The built wheel, unpacked."""
    # Not in the tree: setuptools takes over whatever an earlier build left in build/lib.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    [built] = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_every_package_is_listed():
    assert sorted(SETUPTOOLS["packages"]) == sorted(set(modules().values()))


def test_every_package_has_an_init():
    inits = {package for path, package in modules().items() if path.endswith("/__init__.py")}
    assert set(modules().values()) == inits


def test_wheel_holds_every_module_and_nothing_beside_jdet(wheel):
    files = {str(f.relative_to(wheel).as_posix()) for f in wheel.rglob("*") if f.is_file()}
    installed = {f for f in files if not f.split("/")[0].endswith(".dist-info")}
    assert {f for f in installed if f.endswith(".py")} == set(modules())
    assert {f for f in installed if not f.startswith("jdet/")} == set()
    assert "jdet/py.typed" in installed


def test_wheel_imports_without_jax(wheel):
    code = "import jdet, sys; print(jdet.__file__); print('jax' in sys.modules)"
    printed = run(
        sys.executable, "-c", code, cwd=wheel.parent, env={**os.environ, "PYTHONPATH": str(wheel)}
    )
    assert printed.splitlines() == [str(wheel / "jdet" / "__init__.py"), "False"]


def test_wheel_brings_its_pytest_plugin(wheel, tmp_path):
    """By its entry point, in a pytest that knows nothing of jdet, and without importing jax."""
    (tmp_path / "test_theirs.py").write_text(
        "import os, sys\n"
        "def test(request):\n"
        "    assert request.config.pluginmanager.hasplugin('jdet')\n"
        "    assert 'jdet' in sys.modules and 'jax' not in sys.modules\n"
        "    assert sys.modules['jdet'].__file__.startswith(os.environ['WHEEL'])\n"
    )
    # Other plugins of the environment may import jax.
    others = [f"-pno:{name}" for name in ("jaxtyping", "hypothesispytest", "xdist")]
    run(
        *(sys.executable, "-m", "pytest", "-q", "--jdet-sizes=1,8", *others),
        *("-p", "no:cacheprovider"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel), "WHEEL": str(wheel)},
    )
