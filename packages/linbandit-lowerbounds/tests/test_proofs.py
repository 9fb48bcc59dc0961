import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "proofs.md"
MODULES = {"B": "bounds", "S": "scaled_bound", "W": "weak", "P": "peeling", "I": "information"}


@pytest.mark.skipif(not PAGE.exists(), reason="docs/proofs.md lies outside the source distribution")
def test_every_test_that_the_proofs_name_exists_where_they_say():
    # "B: name, name; W: name." between stars; names in backticks are steps and functions
    lists = re.findall(r"([BSWPI]):([^.;*]*)", re.sub(r"`[^`]*`", "", PAGE.read_text("utf-8")))
    claims = {(m, name) for m, text in lists for name in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+){3,}", text)}
    assert len(claims) > 40
    for module, name in claims:
        source = (HERE / f"test_{MODULES[module]}.py").read_text("utf-8")
        assert f"def test_{name}(" in source, f"docs/proofs.md names {name} in test_{MODULES[module]}.py"
