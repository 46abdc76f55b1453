"""Training from the command line, and what bad input gets."""

import json
import os
import subprocess
import sys

import pytest
import torch

from visionattn.cli import main
from visionattn.heads.medusa import Medusa
from visionattn.tasks.classification import Classification, check_pairs
from visionattn.tasks.inference import evaluate_run, load_run
from visionattn.tasks.resuming import read_saved

SMALL = [
    "experiment=digits",
    "model=test_biformer",
    "trainer.max_epochs=3",
    "+trainer.limit_train_batches=4",
    "+trainer.limit_val_batches=2",
    "data.batch_size=16",
]


def test_classifier_with_gates_is_trained_and_loaded(tmp_path):
    gates = ["model=medusa", "model.backbone=test_litv2", "+model.body_dim=4", "+model.body_levels=2"]
    digits = [a for a in SMALL if not a.startswith("model=")]
    size = ["data.transform.input_size=[1,32,32]", "~model.drop_path_rate", "~model.n_win", "~model.topks"]
    main(["train", *digits, *gates, *size, f"output_dir={tmp_path}", "name=x"])
    classifier = load_run(tmp_path / "x")
    assert classifier.name == "test_litv2" and type(classifier.model) is Medusa
    assert classifier.model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_last_checkpoint_is_of_the_last_epoch_and_best_of_the_best(tmp_path):
    # averaged weights that never move: every epoch scores the same, so the first is the best
    changes = ["trainer.max_epochs=2", "task.ema_decay=1.0", "task.ema_eval=true"]
    main(["train", *[a for a in SMALL if "max_epochs" not in a], *changes, f"output_dir={tmp_path}", "name=x"])
    epochs = {
        name: torch.load(tmp_path / "x" / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 1}
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_two_processes_train_and_count_every_image(tmp_path):
    args = [argument for argument in SMALL if "limit_val" not in argument]
    command = [sys.executable, "-m", "visionattn.cli", "train", *args, f"output_dir={tmp_path}", "name=two"]
    command += ["trainer.devices=2", "+trainer.strategy=ddp", "data.batch_size=64", "trainer.max_epochs=1"]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("val/top1") == 1 and result.stderr.count("effective batch 128") == 1
    assert "sync_dist" not in result.stderr  # advice on figures that are the first process's own
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one_process = evaluate_run(tmp_path / "two" / "checkpoints" / "last.ckpt", [])
    assert one_process["images"] == 1000
    assert metrics["val/top1"] == pytest.approx(one_process["top1"] / 100, abs=1e-6)


@pytest.mark.slow
def test_bad_input_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:  # a text: printed as it is, with exit code 1
        main(["train", *SMALL, f"output_dir={tmp_path}", "name=bad", "model.model_name=biformer_ss"])
    assert ended.value.code.startswith("error: ") and "did you mean" in ended.value.code
    assert "\n" not in ended.value.code and not (tmp_path / "bad" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nothing"], "nothing"),
        (["data=folder", "data.root=/nowhere"], "no dataset folder"),
        (["ckpt_path=last"], "no checkpoint"),
        (["no_such_key=1"], "no_such_key"),
        (["data.in_chans=2"], "in_chans=2"),
    ],
)
def test_bad_settings_are_named(tmp_path, overrides, message):
    with pytest.raises(SystemExit, match=message):
        main(["train", *SMALL, f"output_dir={tmp_path}", "name=bad", *overrides])
    assert not (tmp_path / "bad" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+data.transform.hflipp=0.5"], "data.*hflipp"),
        (["data.transform.scale=0.5"], "data.*float"),
        (["data.transform.auto_augment=foo"], "data.*foo"),
        (["+data.transform.interpolation=foo"], "data.*foo"),
        (["+model.foo=1"], "model.*foo"),
        (["model.pretrained=true"], "test_biformer: No pretrained weights exist"),
        (["+task.foo=1"], "task.*foo"),
        (["task.smoothing=abc"], "task.*str"),
        (["task.warmup_epochs=null"], "task.warmup_epochs=null must be a number"),
        (["task.lr_batch=0"], "task.lr_batch=0 must be a number of at least 1"),
        (["patience=abc"], "patience=abc must be a whole number of at least 1, or null"),
        (["patience=2", "trainer.limit_val_batches=0"], "patience=2 waits .* trainer.limit_val_batches=0"),
        (["data.batch_size=abc"], "data.batch_size=abc"),
        (["data.batch_size=1", "task.mixup=0.8"], "task.mixup=0.8 .* in pairs, and it has 1; set data.batch_size=2"),
        (["data.batch_size=1", "task.cutmix=1"], "task.cutmix=1 .* in pairs"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 must be a whole number of at least 1"),
        (["trainer.max_epochs=-1", "+trainer.max_steps=2"], "trainer.max_epochs=-1"),
        (["trainer.max_epochs=null"], "trainer.max_epochs=null"),
        (["trainer.max_epochs=1.5"], "trainer.max_epochs=1.5"),
        (["+trainer.foo=1"], "unexpected keyword argument 'foo'"),
        (["+data.source.foo=1"], "unexpected keyword argument 'foo'"),
    ],
)
def test_wrong_values_are_named_in_one_line(tmp_path, overrides, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}") as ended:
        main(["train", *SMALL, f"output_dir={tmp_path}", "name=bad", *overrides])
    assert "\n" not in ended.value.code and not (tmp_path / "bad").exists()


def test_one_image_has_no_pair():
    with pytest.raises(ValueError, match="it has 1"):
        check_pairs(dict(mixup=0.0, cutmix=1.0), 1)
    check_pairs(dict(mixup=0.0, cutmix=0.0), 1)
    check_pairs(dict(mixup=0.8, cutmix=1.0), 2)
    training = dict(epochs=1, opt="sgd", lr=0.1, weight_decay=0.0)
    task = Classification(torch.nn.Linear(2, 2), 2, 0, 0.1, 0.8, 0.0, 0.0, {}, **training)
    with pytest.raises(ValueError, match="a batch of one image has no pair"):
        task.training_step(dict(image=torch.zeros(1, 2), label=torch.zeros(1, dtype=torch.long)), 0)


def test_bad_data_leaves_the_former_run_alone(tmp_path):
    last = tmp_path / "old" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"precious")
    overrides = ["data=folder", f"data.root={tmp_path / 'nowhere'}", f"output_dir={tmp_path}", "name=old"]
    with pytest.raises(SystemExit, match="holds a run"):
        main(["train", *overrides])
    with pytest.raises(SystemExit, match="no dataset folder"):
        main(["train", *overrides, "overwrite=true"])
    assert last.read_bytes() == b"precious"


def test_checkpoint_of_other_classes_is_not_resumed(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"classes": ["a", "b"]}}, path)
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        read_saved(path, ["a", "b"])
    loops = {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}
    torch.save({"hyper_parameters": {"classes": ["a", "b"]}, "state_dict": {}, "loops": loops}, path)
    with pytest.raises(ValueError, match="2 classes"):
        read_saved(path, ["a", "b", "c"])


def test_list_names_every_model(capsys):
    main(["list", "biformer_*"])
    assert "biformer_s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no model matches"):
        main(["list", "nothing_*"])
