"""The notebooks run from beginning to end on what they import alone, and are kept as they ran."""

import json
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import converted
from experiments.llava import TURNS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "experiments" / "notebooks").glob("*.ipynb"))


def parameters(notebook: str, directory: Path) -> dict[str, object]:
    """What stands in a notebook's cell of parameters here: a few steps, and a language model that is made."""
    if notebook == "densities":
        families = ("kde", "gaussian_process", "autoregressive", "flow", "vae", "diffusion")
        return {"STEPS": dict.fromkeys(families, 2)}
    if notebook == "latents":
        return {"FIRST_STEPS": 2, "SECOND_STEPS": 2, "CODE_STEPS": 2}
    if notebook == "mixed_modal":
        return {"STEPS": 2, "QUESTIONS": 8}
    config = replace(converted.CONFIG, context_length=256)
    weights = converted.write_llama(directory, config, converted.random_weights(config))
    (weights / "tokenizer_config.json").write_text(json.dumps({"chat_template": TURNS}))
    return {"LANGUAGE": str(weights), "TOWER_STEPS": 2, "PROJECTOR_STEPS": 2, "BATCH_SIZE": 2, "PICTURES": 8}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kernel_spec(tmp_path / "kernels" / "this-interpreter")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # conftest trades speed for compile time, which does not pay here
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workdir = tmp_path / "cwd"
    workdir.mkdir()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            small = parameters(path.stem, tmp_path / "weights")
            assert [*small] == re.findall(r"^([A-Z_]+) =", cell.source, re.MULTILINE)
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    client = NotebookClient(
        notebook, timeout=900, kernel_name="this-interpreter", resources={"metadata": {"path": str(workdir)}}
    )
    client.execute()
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path: Path) -> None:
    """Executed in order in a fresh kernel, without errors, warnings or traces of the machine, and small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(^|[\s'\"=])(/|[A-Z]:\\)\w", text), text
    assert path.stat().st_size < 500_000


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
