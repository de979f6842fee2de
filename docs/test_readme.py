"""The example of the README runs as pasted, and prints what is printed there."""

import math
import re
import subprocess
import sys
from pathlib import Path


def rows(table):
    """By method: log evidence, kind and standard error."""
    found = re.findall(r"^(\S.*?) {2,}(-?[\d.]+) +(\S.*?) {2,}([\d.]+) ", table, re.MULTILINE)
    return {name: (float(value), kind, float(error)) for name, value, kind, error in found}


def test_example():
    """Other processors round otherwise, and a guide trains otherwise then: estimates are within six standard errors of one
    another, which two of the same mean are but for once in 10^8."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,), (table,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "text"))
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    printed, expected = rows(done.stdout), rows(table)
    assert list(printed) == list(expected) == ["Kalman filter", "particle filter", "AVF"]
    for name, (value, kind, error) in expected.items():
        assert printed[name][1] == kind
        assert abs(printed[name][0] - value) <= 6 * math.hypot(error, printed[name][2]) + 0.005
