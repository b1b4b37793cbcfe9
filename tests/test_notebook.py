"""Tests of the notebook: it is committed without outputs, it runs, and its figures show what the text says."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import rnncodec

NOTEBOOK = Path(__file__).parent.parent / "docs" / "progressive.ipynb"
KERNEL = "this-python"

# What pyzmq advises nbclient, which takes the default loop of Windows.
pytestmark = pytest.mark.filterwarnings("ignore:Proactor event loop does not implement add_reader:RuntimeWarning")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells, name="stdout"):
    streams = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == name)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs; in a last cell, which is added, the kernel tells what it runs on."""
    folder = tmp_path_factory.mktemp("notebook")
    # A kernel of that name may be installed for the user, with another Python; the one of this name is ours.
    kernel = folder / "jupyter" / "kernels" / KERNEL
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
    (folder / "work").mkdir()
    notebook = read()
    about = "import sys; print(sys.executable, rnncodec.__file__, sep='\\n')"
    notebook.cells.append(nbformat.v4.new_code_cell(about))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("OMP_NUM_THREADS", "1")  # as for all tests
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures in the notebook
        resources = {"metadata": {"path": str(folder / "work")}}
        NotebookClient(notebook, timeout=600, kernel_name=KERNEL, resources=resources).execute()
    assert list((folder / "work").iterdir()) == []
    return code_cells(notebook)


def test_it_is_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"  # which everybody has
    assert len(code_cells(notebook)) > 5
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None), cell.source


def test_its_links_lead_somewhere():
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 1
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_every_cell_runs_with_this_python_and_this_package(executed):
    assert [cell.execution_count for cell in executed] == list(range(1, len(executed) + 1))
    assert printed(executed[-1:]).splitlines() == [sys.executable, rnncodec.__file__]


def test_it_draws_the_photograph_the_iterations_the_cuts_and_the_curves(executed):
    outputs = [output for cell in executed for output in cell.outputs if "data" in output]
    images = [output.data["image/png"] for output in outputs if "image/png" in output.data]
    assert len(images) == 4
    for image in images:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("L")).std() > 10


def test_cut_files_are_smaller_and_decode_as_what_they_hold(executed):
    found = re.findall(r"(\d+) x (\d+) pixels: .* (\d+) bytes encoded", printed(executed))
    width, height, size = map(int, found[0])
    rows = re.findall(r"(\d+) of (\d+) bytes, ([\d.]+) bpp: equals iteration (\d+), ([\d.]+) dB", printed(executed))
    sizes, wholes, rates, iterations, psnrs = zip(*(map(float, row) for row in rows), strict=True)
    assert set(wholes) == {size}
    assert sizes == (size // 2, size // 4, size // 8)
    assert 8 * size / (width * height) > rates[0] > rates[1] > rates[2]
    assert 16 > iterations[0] > iterations[1] > iterations[2] >= 1
    assert psnrs[0] > psnrs[1] > psnrs[2]
    # Nothing else is warned of.
    warned = re.findall(r"\w+Warning: .*", printed(executed, "stderr"))
    assert warned == [f"UserWarning: the file is cut: decoded {k:.0f} of 16 iterations" for k in iterations]


def test_each_iteration_costs_bits_and_is_better_than_the_last_and_than_jpeg(executed):
    header, *lines = printed(executed[-2:-1]).splitlines()
    assert header.split() == ["iterations", "bpp", "PSNR", "JPEG", "MS-SSIM", "JPEG"]
    iterations, rates, psnrs, jpeg_psnrs, ms_ssims, jpeg_ms_ssims = np.array([line.split() for line in lines], float).T
    assert iterations.tolist() == [1, 2, 4, 8, 16]
    for rising in (rates, psnrs, ms_ssims):
        assert (np.diff(rising) > 0).all()
    assert 0 < rates[0] < rates[-1] < 3
    assert 20 < psnrs[0] < psnrs[-1] < 40
    assert 0.5 < ms_ssims[0] < ms_ssims[-1] < 1
    known = ~np.isnan(jpeg_psnrs)
    assert known.sum() >= 3
    assert (known == ~np.isnan(jpeg_ms_ssims)).all()
    assert (psnrs > jpeg_psnrs)[known].all()
    assert (ms_ssims > jpeg_ms_ssims)[known].all()
