"""What `import mars_optim` loads, exports and says when torch is missing."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mars_optim

TORCH_EXPORTS = ["MARS", "GammaScheduler", "VarianceReduced", "build_param_groups"]
EXPORTS = [*TORCH_EXPORTS, "gamma_star", "noise_ratio", "storm_schedule"]


def in_fresh_interpreter(code):
    """Run code in a new interpreter and return what it prints, decoded from JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_loads_no_framework_and_no_numpy():
    loaded = in_fresh_interpreter(
        "import sys, json; before = set(sys.modules); import mars_optim;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.partition(".")[0] for name in loaded}
    # nothing but itself and the standard library, which keeps it within its 50 ms
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"mars_optim"}


def test_theory_needs_no_framework():
    loaded = in_fresh_interpreter(
        "import sys, json; from mars_optim import noise_ratio; print(json.dumps(sorted(sys.modules)))"
    )
    assert "mars_optim.theory" in loaded
    assert "torch" not in loaded


def test_the_public_names_are_exactly_those_of_this_version():
    assert mars_optim.__all__ == EXPORTS
    assert set(EXPORTS) <= set(dir(mars_optim))
    with pytest.raises(AttributeError, match="module 'mars_optim' has no attribute 'SARAH'"):
        _ = mars_optim.SARAH


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_resolves_to_the_object_of_its_home_module(name):
    home = "torch" if name in TORCH_EXPORTS else "theory"
    if home == "torch":
        pytest.importorskip("torch", reason="the torch names need torch")
    __import__(f"mars_optim.{home}")
    assert getattr(mars_optim, name) is getattr(sys.modules[f"mars_optim.{home}"], name)


@pytest.mark.parametrize("missing", ["torch", "jaxtyping"])
@pytest.mark.parametrize("name", TORCH_EXPORTS)
def test_a_torch_name_without_torch_says_what_to_install(missing, name):
    message = in_fresh_interpreter(
        f"import sys, json; sys.modules[{missing!r}] = None; import mars_optim\n"
        f"try: mars_optim.{name}\n"
        "except ImportError as error: print(json.dumps(str(error)))\n"
        "else: print(json.dumps('no error'))"
    )
    assert missing in message
    assert 'pip install "mars-optim[torch]"' in message


@pytest.mark.parametrize("missing", ["torch", "jaxtyping"])
def test_the_torch_namespace_without_torch_says_what_to_install(missing):
    message = in_fresh_interpreter(
        f"import sys, json; sys.modules[{missing!r}] = None\n"
        "try: import mars_optim.torch\n"
        "except ImportError as error: print(json.dumps(str(error)))\n"
        "else: print(json.dumps('no error'))"
    )
    assert f"{missing} is not installed" in message
    assert 'pip install "mars-optim[torch]"' in message


def test_the_version_is_the_one_of_the_project_file():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert mars_optim.__version__ == project["version"]


def test_the_first_example_of_the_readme_trains_a_model_and_loads_no_other_framework():
    pytest.importorskip("torch", reason="the example trains a torch model")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    start, loss, loaded = in_fresh_interpreter(
        f"import json, sys, torch; torch.manual_seed(0); before = set(sys.modules)\n{example}\n"
        "start = torch.nn.functional.cross_entropy(torch.zeros(512, 10), y)\n"
        "print(json.dumps([start.item(), loss.item(), sorted(set(sys.modules) - before)]))"
    )
    assert loss < 0.8 * start  # from log 10, the loss of not knowing
    assert "mars_optim.torch.optimizer" in loaded
    assert not {"accelerate", "jax", "optax", "transformers"} & set(loaded)


@pytest.mark.slow  # 200 steps outside of jit
def test_the_jax_example_of_the_readme_finds_its_weights():
    pytest.importorskip("jax", reason="the example is about optax")
    pytest.importorskip("optax", reason="the example is about optax")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    example = readme.split("```python\nimport jax, ")[1].split("```")[0]
    losses = in_fresh_interpreter(
        f"import json\nimport jax, {example}\n"
        "print(json.dumps([float(loss(jnp.zeros((8, 1)))), float(loss(w))]))"
    )
    assert losses[1] < 1e-2 * losses[0]
