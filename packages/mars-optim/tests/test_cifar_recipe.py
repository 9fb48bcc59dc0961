"""experiments/cifar.py reads binary data sets only, trains, continues exactly, reports the best accuracy."""

import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the recipes show their progress with it")

from recipes import EXPERIMENTS, assert_identical, checkpoint, script, status

cifar = script("cifar")

OPTIMIZERS = [
    ("adamw",),
    ("muon",),
    ("mars-adamw",),
    ("mars-adamw", "--exact"),
    ("mars-lion", "--exact"),
    ("mars-shampoo", "--exact"),
]


def write_records(path, count, classes, labels, seed):
    """Bright images of class 0 and dark ones of the last class, with noise."""
    generator = np.random.default_rng(seed)
    records = generator.integers(0, 100, (count, labels + 3072)).astype(np.uint8)
    records[:, :labels] = 0
    bright = np.arange(count) % 2 == 0
    records[bright, labels:] += 150
    records[~bright, labels - 1] = classes - 1
    records.tofile(path)


@pytest.fixture
def ten(tmp_path):
    """A folder in the binary format of CIFAR-10: 2 x 8 training and 8 test images."""
    folder = tmp_path / "ten"
    folder.mkdir()
    for seed, (name, count) in enumerate((("data_batch_1", 8), ("data_batch_2", 8), ("test_batch", 8))):
        write_records(folder / f"{name}.bin", count, 10, 1, seed)
    return folder


def arguments(data, out, *more, optimizer="mars-adamw", epochs=2):
    text = f"--width 4 --batch 8 --epochs {epochs} --optimizer {optimizer}"
    return ["--data", data, "--out", out, *text.split(), *more]


def train(data, out, *more, **options):
    assert status("cifar", arguments(data, out, *more, **options)) == 0
    return checkpoint(out)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_reports_its_best_accuracy_beside_the_published(ten, tmp_path, capsys):
    state = train(ten, tmp_path / "run", "--exact", "--batch", 4, epochs=4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # two classes told apart by brightness alone; chance is 50
    assert summary["best_test_accuracy"] == max(state["accuracies"]) >= 90
    assert summary["published"]["mars-adamw exact"] == 95.26
    log = [entry for entry in lines(tmp_path / "run") if "loss" in entry]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    # a tenth of the rate after half and after three quarters of the epochs
    assert [entry["lr"] for entry in log] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-5], rel=1e-12)
    out, err = capsys.readouterr()
    assert "best test accuracy" in out
    assert err == ""


@pytest.mark.parametrize("form", OPTIMIZERS, ids=" ".join)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(ten, tmp_path, form):
    optimizer, *more = form
    whole = train(ten, tmp_path / "whole", *more, optimizer=optimizer)
    assert train(ten, tmp_path / "parts", *more, "--stop-at", 1, optimizer=optimizer)["epoch"] == 1
    parts = train(ten, tmp_path / "parts", *more, "--resume", optimizer=optimizer)
    assert_identical(parts, whole)
    assert [e for e in lines(tmp_path / "parts") if "loss" in e] == [
        e for e in lines(tmp_path / "whole") if "loss" in e
    ]


def test_a_signal_within_an_epoch_leaves_the_checkpoint_of_the_one_before(ten, tmp_path, monkeypatch):
    whole = train(ten, tmp_path / "whole")
    augmented, calls = cifar.cropped_and_flipped, []

    def interrupt(images, generator):
        calls.append(len(images))
        if len(calls) == 3:  # two batches make an epoch
            signal.raise_signal(signal.SIGINT)
        return augmented(images, generator)

    with monkeypatch.context() as patch:
        patch.setattr(cifar, "cropped_and_flipped", interrupt)
        assert status("cifar", arguments(ten, tmp_path / "run")) == 130
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    assert_identical(train(ten, tmp_path / "run", "--resume"), whole)


def test_the_exact_form_leaves_batch_norm_statistics_to_the_pass_at_the_current_parameters(ten, tmp_path):
    state = train(ten, tmp_path / "run", "--exact", epochs=2)
    # two batches an epoch, each counted once although it is passed twice
    assert state["model"]["stem_norm.num_batches_tracked"] == 4


def test_one_hundred_classes_are_read_by_their_fine_label(tmp_path):
    folder = tmp_path / "hundred"
    folder.mkdir()
    write_records(folder / "train.bin", 20, 100, 2, 0)
    write_records(folder / "test.bin", 8, 100, 2, 1)
    (images, labels), (_, test_labels), classes = cifar.read_folder(folder)
    assert classes == 100
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [0, 99] * 10
    assert test_labels.tolist() == [0, 99] * 4
    train(folder, tmp_path / "run", epochs=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["published"]["adamw"] == 73.70


def test_planes_and_rows_are_read_in_the_order_of_the_format(tmp_path):
    pixels = np.arange(3072, dtype=np.uint8)
    np.concatenate([np.array([7], np.uint8), pixels]).tofile(tmp_path / "file.bin")
    images, labels = cifar.read([tmp_path / "file.bin"], 1, 10)
    assert labels.tolist() == [7]
    for channel, row, column in ((0, 0, 5), (1, 0, 0), (2, 31, 31), (0, 3, 2)):
        assert images[0, channel, row, column] == (1024 * channel + 32 * row + column) % 256


def test_crops_and_flips_are_shifts_by_four_pixels_with_black_borders():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    found = cifar.cropped_and_flipped(images, generator)
    assert found.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, result in zip(padded, found, strict=True):
        matches = [
            (row, column, flip)
            for row in range(9)
            for column in range(9)
            for flip in (False, True)
            if torch.equal(flipped(image[:, row : row + 32, column : column + 32], flip), result)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {flip for *_, flip in seen} == {False, True}
    assert {row for row, *_ in seen} == {column for _, column, _ in seen} == set(range(9))


def flipped(image, flip):
    return image.flip(-1) if flip else image


def test_the_network_is_resnet18():
    model = cifar.ResNet18(10, 64, torch.Generator().manual_seed(0))
    # the well-known count of ResNet-18 with a 3 x 3 stem and ten classes
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 20
    assert model.blocks(model.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 512, 4, 4)


def damaged(folder, what):
    if what == "pickle":
        for path in folder.iterdir():
            path.unlink()
        (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": b"never loaded"}))
    elif what == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif what == "no test set":
        (folder / "test_batch.bin").unlink()
    elif what == "cut":
        path = folder / "data_batch_2.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "label":
        np.full(3073, 10, np.uint8).tofile(folder / "data_batch_1.bin")


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("pickle", (), "holds the Python version of the data set"),
        ("empty", (), "holds neither data_batch_*.bin (CIFAR-10) nor train.bin (CIFAR-100)"),
        ("no test set", (), "test_batch.bin does not exist"),
        ("cut", (), "data_batch_2.bin must hold records of 3073 bytes, got 24583 bytes"),
        ("label", (), "data_batch_1.bin must hold labels below 10, got 10"),
        ("nothing", ("--resume",), "checkpoint.pt does not exist"),
        ("exact", ("--optimizer", "adamw", "--exact"), "--exact needs a mars optimizer, got adamw"),
        ("rate", ("--lr", "0"), "--lr must be finite and > 0, got 0"),
        ("batch", ("--batch", "0"), "--batch must be >= 1, got 0"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(ten, tmp_path, capsys, what, more, message):
    damaged(ten, what)
    assert status("cifar", arguments(ten, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("cifar.py: error: ")
    assert error.count("\n") == 1


def test_a_run_is_neither_overwritten_nor_continued_under_other_settings(ten, tmp_path, capsys):
    before = train(ten, tmp_path / "run", epochs=2)
    assert status("cifar", arguments(ten, tmp_path / "run", epochs=2)) == 2
    assert status("cifar", arguments(ten, tmp_path / "run", "--resume", epochs=3)) == 2
    assert "epochs 2 -> 3" in capsys.readouterr().err
    assert_identical(checkpoint(tmp_path / "run"), before)


@pytest.mark.slow
def test_the_script_runs_from_the_command_line(ten, tmp_path):
    argv = [str(part) for part in arguments(ten, tmp_path / "run", epochs=1)]
    command = [sys.executable, str(EXPERIMENTS / "cifar.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "best test accuracy" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
