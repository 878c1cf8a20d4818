"""What `pip install .` puts on a machine: the library alone, with its data, fit to be imported anywhere."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone_and_the_readmes_example_runs_from_it(tmp_path: Path) -> None:
    """Top-level packages named `tools` or `experiments` would collide with those of any other project."""
    source = tmp_path / "source"  # setuptools would leave a `build` in the checkout, and take from it what is stale
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for package in ("vlm_jax", "experiments", "tools"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vlm_jax"}
    kept = {path.relative_to(source).as_posix() for path in (source / "vlm_jax").rglob("*") if path.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == kept

    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(example for example in examples if "make_train_step" in example)
    check = "import vlm_jax; assert 'installed' in vlm_jax.__file__, vlm_jax.__file__\n"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{check}{example}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
