"""What `import tpa_attention` loads, exports and says when a framework is missing."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tpa_attention

EXPORTS = [name for name in tpa_attention.__all__ if name != "__version__"]
TORCH_EXPORTS = [name for name in EXPORTS if tpa_attention._HOME[name].startswith("torch")]


def in_fresh_interpreter(code):
    """Run code in a new interpreter and return what it prints, decoded from JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def foreign_modules_after(code):
    """Top-level modules outside of the standard library that the code loads."""
    loaded = in_fresh_interpreter(
        f"import sys, json, io, contextlib; before = set(sys.modules)\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    return {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "code",
    [
        "import tpa_attention",
        "from tpa_attention import config, accounting, comparison; config.preset('medium')",
        "from tpa_attention.__main__ import main; main(['cache-size', '--preset', 'small'])",
    ],
)
def test_what_is_free_of_frameworks_loads_neither_them_nor_numpy(code):
    assert foreign_modules_after(code) == {"tpa_attention"}


def test_every_public_name_is_listed_once_and_found_by_dir():
    assert len(set(tpa_attention.__all__)) == len(tpa_attention.__all__)
    assert set(tpa_attention.__all__) <= set(dir(tpa_attention))
    assert set(tpa_attention._HOME) == set(EXPORTS)
    with pytest.raises(AttributeError, match="module 'tpa_attention' has no attribute 'FlashTPA'"):
        _ = tpa_attention.FlashTPA


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_resolves_to_the_object_of_its_home_module(name):
    home = tpa_attention._HOME[name]
    if home.startswith("torch"):
        pytest.importorskip("torch", reason="the torch names need torch")
    try:
        module = import_module(f"tpa_attention.{home}")
    except ImportError as error:
        if "tpa-attention[hf]" not in str(error):
            raise
        pytest.skip("the Hugging Face names need transformers")
    assert getattr(tpa_attention, name) is getattr(module, name)


@pytest.mark.parametrize("missing", ["torch", "jaxtyping"])
def test_torch_names_without_torch_say_what_to_install(missing):
    messages = in_fresh_interpreter(
        f"import sys, json; sys.modules[{missing!r}] = None; import tpa_attention\n"
        "messages = []\n"
        f"for name in {[*TORCH_EXPORTS, None]!r}:\n"
        "    try: getattr(tpa_attention, name) if name else __import__('tpa_attention.torch')\n"
        "    except ImportError as error: messages.append(str(error))\n"
        "    else: messages.append(f'{name} needs nothing')\n"
        "print(json.dumps(messages))"
    )
    assert len(messages) == len(TORCH_EXPORTS) + 1
    for message in messages:
        assert f"{missing} is not installed" in message
        assert 'pip install "tpa-attention[torch]"' in message


def test_the_version_is_the_one_of_the_project_file():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert tpa_attention.__version__ == project["version"]


def examples_of_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    return [block.split("```")[0] for block in readme.split("```python\n")[1:]]


def test_the_layer_and_the_decode_example_of_the_readme_run():
    pytest.importorskip("torch", reason="the examples are about torch")
    layer, _, decoding, *_ = examples_of_the_readme()
    error, shape, loaded = in_fresh_interpreter(
        f"import json, sys\n{layer}\n{decoding}\n"
        "error = (last - y[:, 9:]).abs().max().item() / y.abs().max().item()\n"
        "print(json.dumps([error, list(out.shape), sorted(sys.modules)]))"
    )
    assert error < 1e-5  # float32
    assert shape == [1, 1, 32, 64]
    assert not {"jax", "transformers", "triton"} & {name.partition(".")[0] for name in loaded}


@pytest.mark.slow  # a model of 124M parameters is made, generates and is saved
def test_the_model_and_the_conversion_example_of_the_readme_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the examples are about Hugging Face")
    monkeypatch.chdir(tmp_path)
    _, model, _, conversion, *_ = examples_of_the_readme()
    shape, exact, saved = in_fresh_interpreter(
        f"import json, os, torch\n{model}\n{conversion.replace('print(report)', '')}\n"
        "print(json.dumps([list(text.shape), 'exact' in str(report), sorted(os.listdir('t6'))]))"
    )
    assert (shape, exact) == ([1, 16], True)
    assert "model.safetensors" in saved
