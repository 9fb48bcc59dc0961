"""Files that stand in for the base model."""

import builtins
import json

import pytest

from mup_features.roles import load_shapes, save_shapes
from mup_features.shapes import BaseShape, compare_widths

BASE = {"w": (16, 8), "b": (16,), "scale": ()}
OTHER = {"w": (32, 8), "b": (32,), "scale": ()}


def test_shapes_come_back_as_they_were_saved(tmp_path):
    file = tmp_path / "base.json"
    save_shapes(file, BASE)
    assert load_shapes(file) == {name: BaseShape(shape) for name, shape in BASE.items()}
    assert list(tmp_path.iterdir()) == [file]


def test_a_second_width_marks_the_widths(tmp_path):
    save_shapes(tmp_path / "base.json", BASE, OTHER)
    loaded = load_shapes(tmp_path / "base.json")
    assert {name: shape.width for name, shape in loaded.items()} == {"w": (0,), "b": (0,), "scale": ()}


def test_marked_shapes_and_sizes_of_entries_survive(tmp_path):
    shapes = {"w": BaseShape((None, 8), (1,), 0.25)}
    save_shapes(tmp_path / "base.json", shapes)
    assert load_shapes(tmp_path / "base.json") == shapes


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "base.json"
    save_shapes(file, BASE)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mup_features.shapes.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_shapes(file, {"w": (1,)})
    assert load_shapes(file)["w"] == BaseShape((16, 8))
    assert list(tmp_path.iterdir()) == [file]


def test_two_widths_of_different_models_are_refused():
    with pytest.raises(ValueError, match="differing are \\['b'\\]"):
        compare_widths({"w": (2,)}, {"w": (2,), "b": (2,)})
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) in other, \(2, 2\) in base"):
        compare_widths({"w": (2, 2)}, {"w": (2,)})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("not json", "must be a shapes file"),
        ("[]", "its format is not"),
        ('{"format": "other"}', "its format is not"),
        ('{"format": "mup-features shapes", "version": 9}', "must have version 1, got 9"),
        ('{"format": "mup-features shapes", "version": 1, "shapes": {"w": [4]}}', "entry of 'w' must be"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, rule):
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ValueError, match=rule):
        load_shapes(tmp_path / "base.json")


def test_impossible_entries_are_named(tmp_path):
    for entry in ({"shape": ["4"], "width": None, "std": None}, {"shape": [4], "width": None, "std": -1.0}):
        content = {"format": "mup-features shapes", "version": 1, "shapes": {"block.w": entry}}
        (tmp_path / "base.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"block\.w"):
            load_shapes(tmp_path / "base.json")


def test_what_has_no_shapes_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got list"):
        save_shapes(tmp_path / "base.json", [(4, 4)])


def test_a_bsh_file_marks_widths_by_their_size(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "base.bsh").write_text("# comment\nw: [16, null]\nb:\n    - 16\n")
    assert load_shapes(tmp_path / "base.bsh") == {
        "w": BaseShape((16, None), (0,)),
        "b": BaseShape((16,), (0,)),
    }


def test_a_bsh_file_of_something_else_is_refused(tmp_path):
    pytest.importorskip("yaml")
    for text in ("- 1\n", "w: 5\n", "w: [x]\n"):
        (tmp_path / "base.bsh").write_text(text)
        with pytest.raises(ValueError, match=r"base\.bsh"):
            load_shapes(tmp_path / "base.bsh")


def test_a_bsh_file_without_yaml_names_the_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    (tmp_path / "base.bsh").write_text("w: [16]\n")
    with pytest.raises(ImportError, match=r'pip install "mup-features\[bsh\]"'):
        load_shapes(tmp_path / "base.bsh")


def test_a_bsh_file_written_by_microsoft_mup_is_read(tmp_path):
    mup = pytest.importorskip("mup")
    nn = pytest.importorskip("torch").nn

    def model(width):
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 2 * width), mup.MuReadout(2 * width, 3))

    mup.make_base_shapes(model(16), model(32), str(tmp_path / "base.bsh"))
    shapes = load_shapes(tmp_path / "base.bsh")
    assert shapes["1.weight"] == BaseShape((32, 16), (0, 1))
    assert shapes["2.weight"] == BaseShape((None, 32), (1,))
    assert shapes["2.bias"] == BaseShape((None,), ())
