"""The example of the README runs as pasted."""

import re
from pathlib import Path


def test_example(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    example, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Kalman filter", "particle filter", "AVF", "exact", "lower bound"))
