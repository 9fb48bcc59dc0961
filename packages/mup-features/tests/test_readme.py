"""The README's examples run, one after another, as a reader would paste them."""

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL) if README.exists() else []


@pytest.mark.slow
def test_the_examples_run_and_the_check_passes(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    jax = pytest.importorskip("jax")
    if not hasattr(jax, "enable_x64"):
        pytest.skip("the README writes jax.enable_x64, which older versions of jax keep elsewhere")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "readme"}
    assert len(EXAMPLES) == 6
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "every width multiplier is 1")
        for example in EXAMPLES:
            exec(compile(example, str(README), "exec"), names)  # noqa: S102  (our own README)
    assert names["report"].verdict().outcome == "PASS"
    assert names["limit"].f[-1, :, 0].tolist() == pytest.approx([0.575830, -0.354445], abs=1e-3)
    assert {group["lr_scale"] for group in names["optimizer"].param_groups} == {1.0, 0.25}


def test_examples_are_short():
    code = [[line for line in example.splitlines() if line.strip()] for example in EXAMPLES]
    assert all(len(lines) <= 22 for lines in code)
