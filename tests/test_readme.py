"""The README's Python runs as it stands, its commands exist, its files are there."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jdet.certify import assert_batch_invariant

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    namespace["test_layer"](assert_batch_invariant)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_files_it_names_exist() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:tests|scripts|pallas_kernels|jdet|models)/[\w./-]+)`", README)
    assert linked
    for name in [*linked, *named]:
        assert (ROOT / name).exists(), name


def test_commands_it_names_exist() -> None:
    from jdet.cli import app

    for command in sorted(set(re.findall(r"`jdet ([\w-]+)", README))):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, command


def test_its_figures_are_those_of_the_committed_results() -> None:
    path = ROOT / "scripts" / "bench" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = dict(re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL))
    assert shown.keys() == module.tables().keys()
    for name, table in module.tables().items():
        assert shown[name].strip() == table, f"run scripts/bench/tables.py for {name}"
