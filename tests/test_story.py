"""The committed notebook is scripts/batch_invariant_story.py, run."""

import json
import re
from pathlib import Path

STORY = Path(__file__).parents[1] / "scripts" / "batch_invariant_story.py"


def cells_of_script() -> list[tuple[str, str]]:
    """(type, source) of each `# %%` cell."""
    parts = re.split(r"^# %%( \[markdown\])?\n", STORY.read_text(encoding="utf-8"), flags=re.M)
    found = []
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        if mark:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        found.append(("markdown" if mark else "code", text.strip()))
    return found


def test_the_notebook_shows_what_the_script_does():
    notebook = json.loads(STORY.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [(c["cell_type"], "".join(c["source"]).strip()) for c in notebook["cells"]]
    assert cells == cells_of_script(), "make story"
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert {o["output_type"] for o in outputs} == {"stream"}
    text = "".join("".join(o["text"]) for o in outputs)
    assert not re.search(r"(?i)warning|error|/tmp|/root|/home", text), text
    plain, fixed = (int(n) for n in re.findall(r"unique answers: (\d+)", text))
    assert plain > 1, "the control: the model as published has several answers"
    assert fixed == 1
