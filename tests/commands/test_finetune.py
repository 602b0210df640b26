"""Fine-tuning from file to file: what is written, found, reported, refused, stopped and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_command, succeeded
from safetensors.torch import load_file
from toys import as_torchrun

import ttcompress
from ttcompress.commands import compress as pipeline
from ttcompress.commands.demo import train_digits
from ttcompress.commands.evaluate import evaluate_file
from ttcompress.commands.finetune import finetune_file, state_file
from ttcompress.data.opening import open_data
from ttcompress.errors import CheckpointError, DataError, PlanError
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.layers.linear import TTLinear
from ttcompress.networks import architectures as models
from ttcompress.networks.opening import initialise, open_fresh
from ttcompress.recipe import Recipe
from ttcompress.records.report import Report

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"train": "digits", "epochs": 2, "lr": 0.02, "device": "cpu", "augment": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits.pt, digits-tt.safetensors at 20x with its accuracy, alone/digits-tt.safetensors, plain.npz; read only."""
    folder = tmp_path_factory.mktemp("finetune")
    write_dense(folder / "digits.pt", train_digits().state_dict())
    (folder / "alone").mkdir()
    for output in (folder / "digits-tt.safetensors", folder / "alone" / "digits-tt.safetensors"):
        pipeline.compress_file(folder / "digits.pt", output, Recipe(ratio=20, data="digits", device="cpu"))
    (pixels, _), *_ = [
        *open_data("digits@train").training_batches(known(), [(np.arange(600), torch.zeros(600, 5))])
    ]
    np.savez(folder / "plain.npz", images=pixels[:, 0].numpy())
    return folder


def known() -> Any:
    return open_data("digits@train").statistics()


def tuned(source: Path, tmp_path: Path, name: str = "out.safetensors", **options: Any) -> tuple[Path, Any]:
    output = tmp_path / name
    report = finetune_file(source, output, Recipe(**{**QUICK, **options}), force=True)
    return output, report


@pytest.mark.parametrize(("options", "warm_up"), [({"epochs": 1}, 1 / 3), ({"epochs": 1, "warm_up": 1.0}, 1)])
def test_the_rate_falls_in_the_only_epoch_too(
    folder: Path, tmp_path: Path, options: dict[str, Any], warm_up: float
) -> None:
    """Unless the user wants it to rise to the end."""
    output, _ = tuned(folder / "digits-tt.safetensors", tmp_path, batch_size=16, **options)
    state = torch.load(state_file(output), weights_only=True)
    last = state["optimizer"]["param_groups"][0]["lr"] / QUICK["lr"]
    assert (last < 0.01) == (warm_up < 1)
    assert state["fingerprint"]["warm_up"] == warm_up


def test_a_compressed_file_comes_out_better_and_whole(folder: Path, tmp_path: Path) -> None:
    output, report = tuned(folder / "digits-tt.safetensors", tmp_path, epochs=6, data="digits")
    before, after = read_metadata(folder / "digits-tt.safetensors"), read_metadata(output)
    assert after["accuracy"]["compressed"] > before["accuracy"]["compressed"] + 5
    assert after["accuracy"]["dense"] == before["accuracy"]["dense"]
    assert after == {**report.metadata(), "layout": after["layout"]}
    training = after["finetuning"]
    assert training["before"] == before["accuracy"]
    assert training["teacher"] == "the dense network"
    assert [epoch["epoch"] for epoch in training["history"]] == [*range(7)]
    best = max(training["history"][1:], key=lambda epoch: epoch["val"])
    assert training["best"] == best["epoch"]
    assert after["layers"] != before["layers"]
    for key in ("compression", "params_after", "architecture", "recipe", "source", "bytes_after"):
        assert after[key] == before[key]
    accuracy, _ = evaluate_file(output, Recipe(data="digits", device="cpu"))
    assert accuracy.top1 == after["accuracy"]["compressed"]


@pytest.mark.parametrize(
    ("options", "chosen"), [({}, "float32"), ({"precision": "bfloat16"}, "bfloat16")], ids=str
)
def test_the_file_says_in_which_precision_it_was_trained(
    folder: Path, tmp_path: Path, options: dict[str, Any], chosen: str
) -> None:
    """A training of seconds stays in float32 unasked; cores and the rest are float32 in any case."""
    output, report = tuned(folder / "digits-tt.safetensors", tmp_path, **options)
    assert read_metadata(output)["finetuning"]["precision"] == chosen
    assert {tensor.dtype for tensor in load_file(output).values()} == {torch.float32}
    assert (", in bfloat16\n" in str(report)) == (chosen == "bfloat16")
    assert torch.load(state_file(output), weights_only=True)["precision"] == chosen


def test_the_errors_of_the_weights_are_those_of_the_new_ones(folder: Path, tmp_path: Path) -> None:
    output, _ = tuned(folder / "digits-tt.safetensors", tmp_path)
    model, dense = ttcompress.load(output), torch.load(folder / "digits.pt")
    layers = [layer for layer in read_metadata(output)["layers"] if "tt_ranks" in layer]
    assert layers
    for layer in layers:
        ours = model.get_submodule(layer["fqn"]).weight.detach().double().numpy()  # type: ignore[operator]
        theirs = dense[f"{layer['fqn']}.weight"].double().numpy()
        error = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
        assert layer["relative_error"] == pytest.approx(error, rel=1e-5)


def test_away_from_its_checkpoint_there_is_no_teacher_and_no_error(folder: Path, tmp_path: Path) -> None:
    output, _ = tuned(folder / "alone" / "digits-tt.safetensors", tmp_path, data="digits")
    data = read_metadata(output)
    assert data["finetuning"]["teacher"] is None
    assert {layer["relative_error"] for layer in data["layers"] if "tt_ranks" in layer} == {None}
    assert data["accuracy"]["dense"] == data["finetuning"]["before"]["dense"]
    assert data["accuracy"]["agreement"] is None
    assert data["accuracy"]["lost_interval"] is None
    text = succeeded("report", output, cwd=tmp_path)
    assert "fine-tuned        2 epochs on digits@train\n" in text


def test_a_teacher_can_be_named_or_declined(folder: Path, tmp_path: Path) -> None:
    alone = folder / "alone" / "digits-tt.safetensors"
    taught, _ = tuned(alone, tmp_path, "taught.safetensors", teacher=str(folder / "digits.pt"))
    assert read_metadata(taught)["finetuning"]["teacher"].startswith("digits.pt ")
    declined, _ = tuned(folder / "digits-tt.safetensors", tmp_path, "declined.safetensors", distill=0)
    without, _ = tuned(alone, tmp_path, "without.safetensors")
    assert same(load_file(declined), load_file(without))
    assert not same(load_file(declined), load_file(taught))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_dense_checkpoint_stays_one(folder: Path, tmp_path: Path) -> None:
    for name in ("out.pt", "out.safetensors"):
        output, report = tuned(folder / "digits.pt", tmp_path, name, data="digits")
        assert report.plan.layers == ()
        assert report.plan.compression == 1
        accuracy, _ = evaluate_file(output, Recipe(data="digits", device="cpu"))
        assert accuracy.top1 == report.accuracy["compressed"]
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {*state} == {*torch.load(folder / "digits.pt")}
    assert same(state, load_file(tmp_path / "out.safetensors"))


FACTORIES = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())

class Tied(Net):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

class Helped(Net):
    def forward(self, x):
        y = super().forward(x)
        return (y, -y) if self.training else y
"""


@pytest.mark.parametrize("name", ["Tied", "Helped"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unusual_networks_come_out_as_they_went_in(tmp_path: Path, name: str, suffix: str) -> None:
    """Weights that are shared have both names again; of an auxiliary head the main output is trained."""
    (tmp_path / "net.py").write_text(FACTORIES)
    arch = f"{tmp_path / 'net.py'}:{name}"
    torch.manual_seed(0)
    source = tmp_path / f"net{suffix}"
    model = open_fresh(arch).model
    initialise(model)
    write_dense(source, {key: each.clone() for key, each in model.state_dict().items()})
    output, report = tuned(
        source, tmp_path, f"out{suffix}", arch=arch, epochs=4, lr=0.1, distill=0, data="digits"
    )
    state = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
    model.load_state_dict(state)
    assert report.accuracy["compressed"] > 60
    assert torch.equal(state["a.weight"], state["b.weight"]) == (name == "Tied")


def test_what_was_learnt_by_heart_does_not_win(folder: Path, tmp_path: Path) -> None:
    """The start knows the images that are held out of its own training images, but not those of --val."""
    bad = {"lr": 1.0, "epochs": 1, "label_smoothing": 0.9, "distill": 0}
    output, report = tuned(folder / "digits.pt", tmp_path, "out.pt", **bad)
    first, last = report.finetuning["history"]
    assert first["val"] > last["val"] + 10
    assert report.finetuning["best"] == 1
    given, report = tuned(folder / "digits.pt", tmp_path, "given.pt", val="digits@test", **bad)
    assert report.finetuning["best"] == 0
    state = torch.load(given, weights_only=True)
    assert same(state, torch.load(folder / "digits.pt"))
    assert not same(state, torch.load(output, weights_only=True))


def test_labels_are_not_needed_with_a_teacher(folder: Path, tmp_path: Path) -> None:
    unlabelled = f"npz:{folder / 'plain.npz'}"
    output, _ = tuned(folder / "digits-tt.safetensors", tmp_path, train=unlabelled, epochs=5, data="digits")
    data = read_metadata(output)
    assert data["accuracy"]["compressed"] > data["finetuning"]["before"]["compressed"]
    with pytest.raises(DataError, match="has no labels: name a network to learn from with --teacher"):
        tuned(folder / "alone" / "digits-tt.safetensors", tmp_path, train=unlabelled)


def test_the_same_command_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    one, again, other = (
        tuned(folder / "digits-tt.safetensors", tmp_path, f"{number}.safetensors", seed=seed)[0].read_bytes()
        for number, seed in enumerate((3, 3, 4))
    )
    assert one == again
    assert one != other


def test_narrow_types_are_trained_in_more_and_written_as_they_were(folder: Path, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in torch.load(folder / "digits.pt").items()}
    write_dense(tmp_path / "half.pt", half)
    recipe = Recipe(ratio=20, dtype="bfloat16", data="digits", device="cpu")
    pipeline.compress_file(tmp_path / "half.pt", tmp_path / "half-tt.safetensors", recipe)
    output, report = tuned(tmp_path / "half-tt.safetensors", tmp_path, data="digits")
    before, after = (load_file(path) for path in (tmp_path / "half-tt.safetensors", output))
    assert {name: value.dtype for name, value in after.items()} == {
        name: each.dtype for name, each in before.items()
    }
    assert not same(before, after)
    accuracy, _ = evaluate_file(output, Recipe(data="digits", device="cpu"))
    assert accuracy.top1 == report.accuracy["compressed"]


# --------------------------------------------------------------------------------------------------------- from scratch


def test_layers_of_the_zoo_are_drawn_as_torch_draws_them() -> None:
    for name, alike in (("conv-fc", True), ("resnet20", False)):
        torch.manual_seed(3)
        fresh = open_fresh(name).model
        assert any(parameter.is_meta for parameter in fresh.parameters())
        initialise(fresh)
        torch.manual_seed(3)
        built = models.build(models.resolve(name), device="cpu")
        assert fresh.state_dict().keys() == built.state_dict().keys()
        for key, value in built.state_dict().items():
            ours = fresh.state_dict()[key]
            # Residual stages are made in another order than that of their layers.
            assert torch.equal(ours, value) or not alike
            assert ours.dtype == value.dtype
            if ours.numel() > 500:
                assert float(ours.std()) == pytest.approx(float(value.std()), rel=0.1)
            elif "bn" in key:
                assert torch.equal(ours, value)


def test_a_network_too_large_to_be_dense_is_trained_in_tt_form(tmp_path: Path) -> None:
    """262,144 hidden units: 7.5 GB dense, and never held."""
    # Linux's own peak of the process: that of getrusage begins at what its parent held.
    code = (
        "import sys; from pathlib import Path; from ttcompress.commands.finetune import finetune_file; "
        "from ttcompress.recipe import Recipe; "
        "finetune_file(None, Path(sys.argv[1]), Recipe(arch='wide', from_scratch=True, ranks=2, epochs=1, "
        "train=sys.argv[2], batch_size=4, device='cpu')); "
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=pixels, labels=np.arange(16) % 10)
    output = tmp_path / "wide.safetensors"
    command = [sys.executable, "-c", code, str(output), f"npz:{tmp_path / 'few.npz'}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1.5e6
    report = Report.from_json(read_metadata(output))
    shown = succeeded("report", output, cwd=tmp_path)
    assert "fine-tuned" in shown
    assert "decomposed by" not in shown
    assert report.plan.params_before > 1.8e9
    assert report.plan.params_after < 600_000


def test_from_scratch_dense_and_in_tt_form(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))\n"
    )
    arch = f"{tmp_path / 'net.py'}:build"
    scratch = {**QUICK, "arch": arch, "from_scratch": True, "epochs": 8, "lr": 0.1, "data": "digits"}
    dense = finetune_file(None, tmp_path / "dense.pt", Recipe(**scratch))
    assert dense.accuracy is not None
    assert dense.accuracy["compressed"] > 80
    assert dense.accuracy["dense"] is None
    output = tmp_path / "tt.safetensors"
    tt = finetune_file(None, output, Recipe(**scratch, ranks=4))
    assert tt.accuracy is not None
    assert tt.accuracy["compressed"] > 60
    assert tt.plan.compression > 2
    from ttcompress.networks.factories import load_factory

    model = ttcompress.load(output, factory=load_factory(arch))
    assert isinstance(model.get_submodule("1"), TTLinear)


# ------------------------------------------------------------------------------------------------------ command line


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ttcompress", *map(str, arguments)]


def run(*arguments: object, cwd: Path) -> str:
    """What a command in a process of its own prints on stderr."""
    done = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stderr


def refused(*arguments: object, cwd: Path) -> str:
    """The one line of a command that has to be refused."""
    done = run_command(*arguments, cwd=cwd)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    return done.err


def stopped(*arguments: object, cwd: Path, by: signal.Signals) -> tuple[str, str]:
    """What a training prints that a signal stops after its second epoch."""
    started = subprocess.Popen(
        command(*arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stderr is not None
    while '"epoch": 2' not in started.stderr.readline():
        assert started.poll() is None
    started.send_signal(by)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    return out, err


def test_everything_in_one_go(folder: Path, tmp_path: Path) -> None:
    given = ["--ratio", 20, "--finetune", 2, "--train", "digits", "--data", "digits", "-o", "out.safetensors"]
    done = run_command("compress", folder / "digits.pt", *given, cwd=tmp_path)
    assert done.code == 0, done
    data = read_metadata(tmp_path / "out.safetensors")
    assert data["finetuning"]["teacher"] == "the dense network"
    assert data["compression"] >= 20
    assert "fine-tuned        2 epochs on digits@train, taught by the dense network" in done.out
    assert "before it " in done.out
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all({"loss", "train", "val", "seconds"} <= {*line} for line in lines[1:])


@pytest.mark.slow
def test_everything_in_one_go_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "digits.pt").write_bytes((folder / "digits.pt").read_bytes())
    given = ["--ratio", 20, "--finetune", 20, "--train", "digits", "-o", "out.safetensors"]
    stopped("compress", "digits.pt", *given, cwd=tmp_path, by=signal.SIGTERM)
    err = refused("compress", "digits.pt", "--ratio", 10, *given[2:], "--resume", cwd=tmp_path)
    assert "out.safetensors: was compressed otherwise: ratio was 20.0, is 10.0; repeat" in err
    err = refused("compress", "digits.pt", *given, "--calib", "digits", "--resume", cwd=tmp_path)
    assert "was compressed otherwise: calib was None, is digits@train; repeat" in err
    err = run("compress", "digits.pt", *given, "--resume", cwd=tmp_path)
    first, *_ = [json.loads(line)["epoch"] for line in err.splitlines()]
    assert first >= 3
    history = read_metadata(tmp_path / "out.safetensors")["finetuning"]["history"]
    assert [epoch["epoch"] for epoch in history] == [*range(21)]


def test_compression_is_for_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in as_torchrun(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    err = refused("compress", folder / "digits.pt", "--ratio", 20, cwd=tmp_path)
    assert err == "ttcompress: compress in one process, then `torchrun ... -m ttcompress finetune`\n"
    assert not [*tmp_path.iterdir()]


TRAINING = ["--train", "digits", "--epochs", 20, "--lr", 0.02, "--mixup", 0.2, "--ema", 0.9]


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """The output of that training, never stopped."""
    run("finetune", folder / "digits-tt.safetensors", *TRAINING, "-o", "whole.safetensors", cwd=folder)
    return (folder / "whole.safetensors").read_bytes()


@pytest.mark.slow
def test_stopped_and_resumed_on_the_command_line(folder: Path, whole: bytes, tmp_path: Path) -> None:
    source = folder / "digits-tt.safetensors"
    out, err = stopped(
        "finetune", source, *TRAINING, "-o", "stopped.safetensors", cwd=tmp_path, by=signal.SIGINT
    )
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("{")]
    assert line.startswith("ttcompress: stopped in epoch ")
    assert "stopped.safetensors.training" in line
    assert not (tmp_path / "stopped.safetensors").exists()
    err = refused("finetune", source, *TRAINING[:3], 21, *TRAINING[4:], "-o", "stopped.safetensors", "--resume",
                  "--mean", 0.9, "--std", 0.1, cwd=tmp_path)  # fmt: skip
    assert "epochs was 20, is 21" in err
    assert "mean was [0." in err
    run("finetune", source, *TRAINING, "-o", "stopped.safetensors", "--resume", cwd=tmp_path)
    assert (tmp_path / "stopped.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(folder: Path, whole: bytes, tmp_path: Path) -> None:
    source = folder / "digits-tt.safetensors"
    for delay in (0.3, 0.1):
        resume = ["--resume"] * (tmp_path / "killed.safetensors.training").exists()
        started = subprocess.Popen(
            command("finetune", source, *TRAINING, "-o", "killed.safetensors", *resume), cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert started.stderr is not None
        started.stderr.readline()
        time.sleep(delay)
        started.kill()
        started.communicate()
    if not (tmp_path / "killed.safetensors").exists():
        run("finetune", source, *TRAINING, "-o", "killed.safetensors", "--resume", cwd=tmp_path)
    assert (tmp_path / "killed.safetensors").read_bytes() == whole


REFUSED = {
    "no images": ({"train": None}, DataError, "--train"),
    "budget on a trained file": ({"ratio": 3.0}, PlanError, "is trained as it is"),
    "from scratch with a file": ({"from_scratch": True}, PlanError, "is trained as it is"),
    "which layers, of a trained file": ({"exclude": ("fc1",)}, PlanError, "leave out --exclude"),
    "calibration of a trained file": ({"calib": "npz:nope"}, PlanError, "leave out --calib"),
    "too few images": ({"train": "npz:few.npz"}, DataError, "too few to hold some out: give --val"),
    "wrong size": ({"train": "npz:large.npz", "val": "digits"}, DataError, "does not take images of shape"),
    "another kind of teacher": ({"teacher": "plain.npz"}, CheckpointError, "plain.npz"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_ends_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 9, 8), dtype=np.uint8)
    np.savez("large.npz", images=pixels, labels=np.zeros(40, dtype=np.int64))
    np.savez("few.npz", images=pixels[:9, :8], labels=np.zeros(9, dtype=np.int64))
    np.savez("plain.npz", images=pixels)
    with pytest.raises(error, match=message) as caught:
        tuned(folder / "digits-tt.safetensors", tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_replaced_unless_asked(folder: Path, tmp_path: Path) -> None:
    for name in ("out.safetensors", "out.safetensors.training"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(CheckpointError, match="exists"):
            finetune_file(folder / "digits-tt.safetensors", tmp_path / "out.safetensors", Recipe(**QUICK))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        finetune_file(
            folder / "digits-tt.safetensors", tmp_path / "out.safetensors", Recipe(**QUICK), resume=True
        )


# -------------------------------------------------------------------------------------------- other images, two runs


@pytest.mark.parametrize("change", ["pixels", "labels", "one pixel", "val"])
def test_other_images_of_the_same_name_and_number_are_not_resumed_on(
    folder: Path, tmp_path: Path, change: str
) -> None:
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (64, 8, 8), dtype=np.uint8), np.arange(64) % 10
    np.savez(tmp_path / "t.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "v.npz", images=pixels, labels=labels)
    given = [
        "finetune",
        folder / "digits-tt.safetensors",
        "--train",
        "npz:t.npz",
        "--val",
        "npz:v.npz",
        "--epochs",
        1,
    ]
    given += ["-o", "out.safetensors"]
    run(*given, cwd=tmp_path)
    state = (tmp_path / "out.safetensors.training").read_bytes()

    changed = pixels.copy()
    changed[0 if change == "one pixel" else slice(None), 0] ^= 1
    others = {
        "images": pixels if change == "labels" else changed,
        "labels": labels[::-1] if change == "labels" else labels,
    }
    np.savez(tmp_path / ("v.npz" if change == "val" else "t.npz"), **others)
    err = refused(*given, "--resume", "--force", cwd=tmp_path)
    assert f"was trained otherwise: {'val' if change == 'val' else 'train'} was npz:" in err
    assert (tmp_path / "out.safetensors.training").read_bytes() == state


def test_two_trainings_of_one_output(folder: Path, tmp_path: Path) -> None:
    """The second ends at once; the first goes on, and saves when the terminal is closed."""
    given = [
        "finetune",
        folder / "digits-tt.safetensors",
        "--train",
        "digits",
        "--epochs",
        10_000,
        "-o",
        "out.safetensors",
    ]
    line = [sys.executable, "-m", "ttcompress", *map(str, given)]
    process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        process.stderr.readline()
        for more in ([], ["--force"], ["--resume"]):
            err = refused(*given, *more, cwd=tmp_path)
            assert f"another command is writing it (process {process.pid})" in err
        process.send_signal(signal.SIGHUP)
        err = process.communicate(timeout=100)[1]
        assert process.returncode == 130
        assert "the last good state is in out.safetensors.training" in err
    finally:
        process.kill()
    assert [each.name for each in tmp_path.iterdir()] == ["out.safetensors.training"]
