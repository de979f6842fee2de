"""The tutorials run from top to bottom, and are stored as they ran: with outputs and without warnings."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(notebook, output_type):
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == output_type]


def written_to_stderr(notebook):
    return [output.text for output in outputs(notebook, "stream") if output.name == "stderr"]


def kernel_of_this_interpreter(folder):
    """A kernel that is ``sys.executable``, whatever kernels are registered on this machine."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "this interpreter", "language": "python"}
    (folder / "this-interpreter").mkdir(parents=True)
    (folder / "this-interpreter" / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(folder)])
    return AsyncKernelManager(kernel_name="this-interpreter", kernel_spec_manager=specs)


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    client = NotebookClient(notebook, km=kernel_of_this_interpreter(tmp_path / "kernels"), timeout=300,
                            resources={"metadata": {"path": str(tmp_path)}})
    environment = {**os.environ, "CI": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    client.execute(env=environment, cleanup_kc=True)
    assert notebook.cells[-1].outputs[0].text.strip() == sys.executable
    assert not written_to_stderr(notebook)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run all cells once, in order, in a fresh kernel, and save"
    assert not outputs(notebook, "error")
    assert not written_to_stderr(notebook)
    shown = outputs(notebook, "display_data") + outputs(notebook, "execute_result")
    assert any("image/png" in output.data for output in shown)
    assert outputs(notebook, "stream")
