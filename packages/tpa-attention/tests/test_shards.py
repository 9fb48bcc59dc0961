"""Token shards of the training recipe: windows, their order, other people's files, and `prepare`."""

import json
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the recipe trains torch models")
pytest.importorskip("tenfold_tools.data", reason="the recipe runs in the monorepo's workshop")

from recipe_runs import script, status

from tenfold_tools.run_folder import UsageError

shards = script("shards")


def two_shards(context=4):
    """13 and 9 tokens: three windows of four, then two."""
    return shards.Shards(
        {"a": np.arange(13, dtype=np.uint16), "b": np.arange(100, 109, dtype=np.uint16)}, context
    )


def test_windows_are_cut_in_every_shard_and_hold_the_token_after_them():
    found = two_shards().rows(range(5), 128)
    expected = [range(first, first + 5) for first in (0, 4, 8, 100, 104)]
    np.testing.assert_array_equal(found, [list(row) for row in expected])
    assert two_shards().windows == 5


@pytest.mark.parametrize("count", [1, 2, 5, 12, 97])
def test_an_epoch_meets_every_window_once_in_an_order_of_its_own(count):
    some = shards.Shards({"a": np.zeros(count + 1, np.uint16)}, 1)
    first, second = (some.order(range(start, start + count), 3) for start in (0, count))
    assert sorted(first) == sorted(second) == list(range(count))
    assert some.order([count + count // 2], 3) == [second[count // 2]]  # from the position alone
    if count == 97:
        assert first != second and first != some.order(range(count), 4) and first != sorted(first)


def test_files_of_nanogpt_and_of_llm_c_are_read_as_they_are(tmp_path):
    tokens = np.arange(2000, dtype="<u2")
    tokens.tofile(tmp_path / "train.bin")
    header = np.zeros(256, "<i4")
    header[:3] = shards.MAGIC, 1, 2000
    with (tmp_path / "val_000000.bin").open("wb") as file:
        file.write(header.tobytes() + tokens.tobytes())
    corpus = shards.open_corpus(str(tmp_path), 1999)
    assert corpus.vocabulary is None
    for split in (corpus.train, corpus.val):
        np.testing.assert_array_equal(split.rows([0], 2000)[0], tokens)
    assert corpus.train.fingerprint == [["train.bin", 2000]]


def spoil(folder, what):
    if what == "missing":
        (folder / "val.bin").unlink()
    elif what == "odd":
        (folder / "train.bin").write_bytes(b"123")
    elif what == "short":
        np.zeros(4, np.uint16).tofile(folder / "val.bin")
    elif what == "empty":
        (folder / "val.bin").write_bytes(b"")
    elif what == "cut":
        header = np.zeros(256, "<i4")
        header[:3] = shards.MAGIC, 1, 9
        (folder / "train.bin").write_bytes(header.tobytes() + bytes(16))
    elif what == "meta":
        (folder / "meta.json").write_text("{}")
    elif what == "vocabulary":
        (folder / "meta.json").write_text('{"vocabulary": 70000}')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"must hold val\*.bin, made by `train_lm.py prepare`, and has none"),
        ("odd", "train.bin must hold uint16 tokens, got an odd number of bytes"),
        ("short", "val.bin must hold more than 4 tokens, got 4 at most"),
        ("empty", "val.bin must hold more than 4 tokens, got 0 at most"),
        ("cut", "train.bin must hold the 9 tokens of its header, got 8"),
        ("meta", r"meta.json must give the vocabulary: KeyError\('vocabulary'\)"),
        ("vocabulary", r"meta.json must be in \[1, 65536\], got 70000"),
    ],
)
def test_a_bad_folder_is_refused_by_the_name_of_its_file(tmp_path, what, message):
    for name in ("train", "val"):
        np.zeros(9, np.uint16).tofile(tmp_path / f"{name}.bin")
    spoil(tmp_path, what)
    with pytest.raises(UsageError, match=message):
        shards.open_corpus(str(tmp_path), 4)


def test_a_token_outside_of_the_vocabulary_is_refused_by_the_name_of_its_file():
    with pytest.raises(UsageError, match="b must hold tokens below 104, got 104"):
        two_shards().rows([0, 3], 104)
    with pytest.raises(UsageError, match="--data must be a folder of shards or 'stdlib', got nowhere"):
        shards.open_corpus("nowhere", 4)


def test_the_standard_library_needs_no_files():
    corpus = shards.open_corpus("stdlib", 64)
    assert corpus.vocabulary == 256
    assert corpus.val.fingerprint[0][1] == 100_000
    assert bytes(corpus.val.rows([0], 256)[0].tolist()).decode("latin1").isprintable() is False  # has lines


# ------------------------------------------------------------------------------------------------- prepare


def written(folder, split):
    return np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob(f"{split}_*.bin"))])


def test_prepare_writes_every_byte_and_the_end_of_every_document(tmp_path):
    (tmp_path / "text" / "b").mkdir(parents=True)
    texts = {"a.txt": b"first", "b/c.txt": "zweit\u00e9".encode(), "d.txt": b""}
    for name, content in texts.items():
        (tmp_path / "text" / name).write_bytes(content)
    out = tmp_path / "shards"
    options = ("--out", out, "--shard-tokens", 5, "--val-tokens", 4)
    assert status(["prepare", tmp_path / "text", *options]) == 0
    expected = [token for content in texts.values() for token in (*content, 256)]
    found = np.concatenate([written(out, "val"), written(out, "train")])
    np.testing.assert_array_equal(found, expected)
    assert [path.stat().st_size // 2 for path in sorted(out.glob("train_*"))] == [5, 5, 1]
    assert json.loads((out / "meta.json").read_text()) == {
        "encoding": "bytes",
        "vocabulary": 257,
        "documents": 3,
        "val": 4,
        "train": 11,
    }
    assert shards.open_corpus(str(out), 1).vocabulary == 257
    assert status(["prepare", tmp_path / "text", *options]) == 2  # never over other shards


def test_prepare_uses_an_encoding_of_tiktoken(tmp_path, monkeypatch):
    encoding = types.SimpleNamespace(n_vocab=1000, eot_token=999, encode_ordinary=lambda text: [len(text), 7])
    fake = types.SimpleNamespace(get_encoding={"gpt2": encoding}.__getitem__)
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", fake)
    (tmp_path / "a.txt").write_text("hello")
    out = tmp_path / "out"
    assert status(["prepare", tmp_path / "a.txt", "--out", out, "--encoding", "gpt2", "--val-tokens", 1]) == 0
    np.testing.assert_array_equal(np.concatenate([written(out, "val"), written(out, "train")]), [5, 7, 999])
    assert shards.vocabulary_of(out) == 1000
    encoding.n_vocab = 70000
    with pytest.raises(UsageError, match="at most 65536 tokens to fit uint16, got 70000"):
        shards.encoder("gpt2")
    with pytest.raises(UsageError, match="tiktoken has no --encoding other"):
        shards.encoder("other")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    encoding.n_vocab = 1000
    with pytest.raises(UsageError, match=r"latin\.txt must be UTF-8"):
        shards.encoder("gpt2")[0](tmp_path / "latin.txt")


def test_prepare_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    (tmp_path / "a.txt").write_text("hello")
    here = ["prepare", tmp_path / "a.txt", "--out", tmp_path / "out"]
    for more, message in (
        (["--encoding", "gpt2"], "needs tiktoken: pip install tiktoken"),
        (["--shard-tokens", 0], "--shard-tokens must be >= 1, got 0"),
        (["--val-tokens", 6], "must hold more than --val-tokens 6, got 6"),
        ([Path("nowhere")], "nowhere does not exist"),
    ):
        assert status([*here, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
