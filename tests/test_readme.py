"""The README's Python runs as it stands; its commands and files, and those of docs/, exist."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jdet.certify import assert_batch_invariant

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


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


def test_files_they_name_exist() -> None:
    assert len(PAGES) > 1
    for page, text in PAGES.items():
        linked = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text)
        named = re.findall(r"`((?:tests|scripts|pallas_kernels|jdet|models)/[\w./-]+)`", text)
        assert linked
        for path in [*(page.parent / name for name in linked), *(ROOT / name for name in named)]:
            assert path.exists(), f"{page.name}: {path}"


def test_commands_it_names_exist() -> None:
    from jdet.cli import app

    for command in sorted(set(re.findall(r"`jdet ([\w-]+)", "".join(PAGES.values())))):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, command


def test_their_figures_are_those_of_the_committed_results() -> None:
    path = ROOT / "scripts" / "bench" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        table
        for text in PAGES.values()
        for table in re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    ]
    shown = dict(found)
    assert sorted(name for name, _ in found) == sorted(module.tables())  # each in one place
    for name, table in module.tables().items():
        assert shown[name].strip() == table, f"run scripts/bench/tables.py for {name}"
