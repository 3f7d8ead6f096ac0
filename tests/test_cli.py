"""The command: what a user types, what comes back, and with which exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lean3d.cli import VERBS, main, show
from lean3d.cli.arguments import Train
from lean3d.config import TrainConfig, from_json
from lean3d.recipes import get_recipe, list_recipes
from tiny_runs import write_clips

TINY = [
    *("--model.width", "0.125", "--model.num-frames", "4", "--model.size", "32", "32", "--model.sampling-rate", "1"),
    *("--optim.epochs", "2", "--optim.batch-size", "4", "--optim.precise-bn", "0"),
    *("--data.num-workers", "0", "--run.accelerator", "cpu"),
]


@dataclasses.dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Everything that was said, with single spaces."""
        return " ".join((self.out + self.err).split())


@pytest.fixture
def lean3d(capsys: pytest.CaptureFixture[str]):
    """Call the command in this process."""

    def call(*words: str | Path) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return Done(leaving.value.code or 0, said.out, said.err)  # type: ignore[arg-type]

    return call


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data") / "clips", train=6, val=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A trained and tested run, made by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    for words in (["train", "light", str(clips), *TINY, "--run.out", str(folder)], ["eval", str(folder)]):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        assert leaving.value.code == 0
    return folder


# ---- help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_on_one_line_with_an_example(lean3d, words):
    done = lean3d(*words)
    assert done.status == 0
    lines = done.out.splitlines()
    for name, verb in VERBS.items():
        assert any(line.startswith(name) and verb.example in line for line in lines), name
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(lean3d, verb):
    done = lean3d(verb, "--help")
    assert done.status == 0
    assert f"usage: lean3d {verb}" in done.out


def test_help_on_settings_is_the_text_of_the_configs_fields(lean3d):
    words = lean3d("train", "--help").words.replace("│ ", "")
    assert "Distance between two sampled frames, in frames of the video." in words
    assert "--recipe" not in words  # a recipe is a word, not an option


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom lean3d.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_version(lean3d):
    assert lean3d("--version").out == "lean3d 0.1.0\n"


# ---- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no verb 'trian': did you mean train"),
        (["train"], "which data? Give a folder"),
        (["train", "ligth"], "'ligth' is neither a recipe (did you mean light?) nor a folder or file that exists"),
        (["train", "light", "a", "b"], "a recipe and one folder or file of data, got light a b"),
        (["train", "--resume", "nowhere"], "there is no run to go on with in nowhere"),
        (["train", "--resume", "x", "--optim.lr", "1"], "--resume goes on with the run's own settings"),
        (["eval", "nowhere"], "no checkpoint at nowhere"),
        (["predict", "nowhere"], "which video?"),
        (["predict", "nowhere", "x.mp4"], "no checkpoint at nowhere"),
        (["models", "smalbig50"], "no model matches 'smalbig50': did you mean smallbig50"),
        (["recipes", "ligth"], "did you mean light?"),
        (["report", "nowhere"], "there is no run at nowhere"),
        (["bench", "c3d", "--runtimes", "eagre"], "--runtimes has no 'eagre': did you mean eager?"),
        (["bench", "--cost"], "which net?"),
        (["bench", "c3d", "--cost", "--tiles", "1"], "whole numbers above 1"),
        (["convert", "smallbig", "nothing.pth"], "no file at nothing.pth"),
        (["demo", "--minutes", "0"], "a demo needs minutes above 0"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_status_2(lean3d, words, message):
    done = lean3d(*words)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ") and message in done.err
    assert "Traceback" not in done.err


def test_debug_shows_where_an_error_came_from():
    words = [sys.executable, "-m", "lean3d", "recipes", "ligth"]
    plain = subprocess.run([*words, "--debug"], capture_output=True, text=True)
    assert "Traceback" in plain.stderr and "UnknownRecipeError" in plain.stderr
    by_environment = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "LEAN3D_DEBUG": "1"})
    assert "Traceback" in by_environment.stderr


def test_an_unknown_option_names_its_neighbour(lean3d):
    done = lean3d("train", "--modle.name", "c3d")
    assert done.status == 2
    assert "--model.name" in done.err + done.out


# ---- train


def test_the_arguments_of_train_are_the_fields_of_its_config():
    config = {field.name: field.type for field in dataclasses.fields(TrainConfig) if field.name != "recipe"}
    arguments = {field.name: field.type for field in dataclasses.fields(Train)}
    assert {name: arguments.get(name) for name in config} == config


def plan(done: Done) -> TrainConfig:
    """The config that a dry run showed."""
    assert done.status == 0, done.err
    text = done.out[done.out.index("{") : done.out.index("\n}\n") + 2]
    return from_json(TrainConfig, text)


def test_dry_run_shows_the_plan_and_writes_nothing(lean3d, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lean3d("train", clips, *TINY, "--dry-run")
    assert plan(done).data.root == str(clips)
    assert "3 an epoch of 4 clips each, 2 epochs, 6 in all" in done.words
    assert "all 2 12 6 0" in done.words
    assert "4 frames, 1 apart in the video, 32 x 32 pixels, RGB" in done.words
    assert "runs/light-c3d_light-" in done.words
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_region_and_refuses_one_that_cannot_be(lean3d, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lean3d("train", clips, *TINY, "--model.region", "0.25", "0", "1", "0.5", "--dry-run")
    assert "32 x 32 pixels, RGB, from 25% to 100% of the width and 0% to 50% of the height" in done.words
    done = lean3d("train", clips, *TINY, "--model.region", "0.5", "0", "0.25", "1", "--dry-run")
    assert done.status and "left before right and top before bottom; got 0.5 0 0.25 1" in done.words


def test_dry_run_names_teachers_and_refuses_one_that_does_not_fit(lean3d, clips, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lean3d("train", clips, *TINY, "--optim.teachers", run, "nowhere", "--dry-run")
    assert done.status == 0 and f"{run.name}, nowhere (missing); 0.5 of the loss" in done.words
    done = lean3d("train", clips, *TINY, "--model.num-frames", "8", "--optim.teachers", run, "--dry-run")
    assert done.status and "takes other clips than the model" in done.words


def test_dry_run_without_data_shows_all_but_the_counts(lean3d, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lean3d("train", "k400-smallbig50", "--dry-run", "--init.weights", "r50.pth")
    assert plan(done).model == get_recipe("k400-smallbig50").model
    for words in (
        "missing: needed is train, val and test lists of 'path label'",
        "smallbig50 for 400 classes, 24.4M weights, 52 GMACs a clip",
        "r50.pth (missing)",
        "8 frames, 8 apart in the video, 224 x 224 pixels",
        "multi-scale crops, 1, 0.875, 0.75, 0.66 of the short side, flips",
        "SGD with Nesterov's momentum 0.9, learning rate 0.01 falling along a cosine to 0, no warm-up",
        "100 epochs of batches of 64 clips",
        "10 clips x 3 crops of each video",
        "lean3d train k400-smallbig50 path/to/data --dry-run",
    ):
        assert words in done.words, words
    assert list(tmp_path.iterdir()) == []
    done = lean3d("train", "sthv1-smallbig50-16f", "--dry-run", "--init.train", "staged")
    assert "for 174 classes" in done.words and "one frame from each of 16 equal parts" in done.words
    assert "no flips" in done.words and "one stage more every 2 epochs" in done.words
    assert "c3d_light, counted for 400 classes" in lean3d("train", "--dry-run").words


@pytest.mark.parametrize("name", ["c3d", "smallbig18"])
def test_dry_run_counts_what_a_recipe_does_with_the_data(lean3d, clips, name):
    words = ("--model.name", name, "--init.train", "head", "--augment.mixup", "0.2", "--optim.ema", "0.9")
    done = lean3d("train", clips, *TINY, *words, "--dry-run")
    for words in ("bright 6 3 0", f"{name} for 2 classes", "the classifier alone learns", "mixup 0.2", "weights 0.9"):
        assert words in done.words, words


def test_a_recipe_gives_the_defaults_wherever_it_stands(lean3d, clips):
    expected = dataclasses.replace(get_recipe("smallbig").optim, batch_size=4)
    for words in (["smallbig", clips, "--optim.batch-size", "4"], ["--optim.batch-size", "4", "smallbig", clips]):
        config = plan(lean3d("train", *words, "--dry-run"))
        assert config.optim == expected
        assert config.recipe == "smallbig"
        assert config.model == get_recipe("smallbig").model


def test_options_join_those_of_the_recipe_and_go_with_its_model(lean3d, clips):
    own = get_recipe("light").model.options
    assert own["stem"] == "conv" and own["expansion"] == 1.0
    config = plan(lean3d("train", clips, *TINY, "--model.options", "trg", "none", "--dry-run"))
    assert config.model.options == {**own, "trg": "none"}
    config = plan(lean3d("train", clips, *TINY, "--model.options", "stem", "separable", "--dry-run"))
    assert config.model.options == {**own, "stem": "separable"}
    config = plan(lean3d("train", clips, *TINY, "--model.name", "c2d_r18", "--dry-run"))
    assert config.model.options == {}


def test_dry_run_says_when_there_are_too_few_clips(lean3d, clips):
    done = lean3d("train", clips, "--dry-run", "--optim.batch-size", "64")
    assert done.status == 2
    assert "12 labelled clips, less than one batch of 64" in done.err


def test_train_leaves_a_run_that_is_not_overwritten(lean3d, run, clips):
    assert (run / "model.safetensors").is_file()
    config = from_json(TrainConfig, (run / "config.json").read_text())
    assert (config.recipe, config.model.width, config.optim.epochs) == ("light", 0.125, 2)
    done = lean3d("train", clips, *TINY, "--run.out", run)
    assert done.status == 2 and "there is a run in" in done.err


def test_resume_of_a_finished_run_gives_it_back(lean3d, run):
    before = (run / "model.safetensors").read_bytes()
    done = lean3d("train", "--resume", run)
    assert done.status == 0
    assert f"test it   lean3d eval '{run}'" in done.out  # quoted, since the folder's name has a space
    assert (run / "model.safetensors").read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_go_on(clips, tmp_path):
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "lean3d", "train", str(clips), *TINY, "--run.out", str(folder)]
    training = subprocess.Popen(
        [*words, "--optim.epochs", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 120
        while not (folder / "model.safetensors").exists():
            assert training.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        training.send_signal(signal.SIGINT)
        _, err = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 130
    assert f"to go on: lean3d train --resume {folder}" in err
    assert "Traceback" not in err
    assert list((folder / "checkpoints").glob("step-*"))


# ---- eval, predict, report


def test_eval_prints_the_numbers_and_where_the_rest_is(lean3d, run, clips, tmp_path):
    done = lean3d("eval", run, clips, "--split", "train", "--views.num-clips", "3", "--out", tmp_path)
    assert done.status == 0, done.err
    for line in ("split train", "top-1 ", "top-5 -", "mean class accuracy", "videos 12", "bad files 0", "bright 6 "):
        assert line in done.words
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["views"] == {"num_clips": 3, "num_crops": 1, "crop_area": 0.85}
    assert results["command"].startswith("lean3d eval ")
    assert str(tmp_path / "results.json") in done.out
    assert (tmp_path / "confusion.png").is_file()


def test_eval_takes_views_and_data_from_the_training(run):
    results = json.loads((run / "results.json").read_text())
    assert results["views"] == dataclasses.asdict(get_recipe("light").test)
    assert results["data"]["split"] == "val"


def test_eval_of_an_ensemble_names_each_models_accuracy(lean3d, run, clips, tmp_path):
    done = lean3d("eval", run, clips, "--with", run, run / "model.safetensors", "--out", tmp_path)
    assert done.status == 0, done.err
    alone = json.loads((run / "results.json").read_text())["metrics"]["top1"]
    assert done.words.count(f"{alone:.4f}") >= 4 and f"mean of scores {alone:.4f}" in done.words
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["ensemble"]) == 3 and written["metrics"]["top1"] == alone


def test_many_classes_are_shortened_to_the_worst(capsys):
    import torch

    from lean3d.evaluate import Scores, results_from_scores

    labels = torch.arange(30)
    said = torch.eye(30)[labels.clamp(min=1)]  # class 0 is taken for class 1
    names = [f"c{n}" for n in range(30)]
    show.results(results_from_scores(Scores(labels, labels, said), names), "test")
    text = capsys.readouterr().out
    assert "the 20 worst of 30 classes" in text
    assert "c0 " in text and "c29 " not in text


def test_predict_a_file_as_table_json_and_video(lean3d, run, clips, tmp_path):
    clip = clips / "val" / "dark" / "00.mp4"
    done = lean3d("predict", run, clip, "--video", tmp_path / "seen.mp4", "--top-k", "1")
    assert done.status == 0, done.err
    assert "whole video" in done.out
    assert (tmp_path / "seen.mp4").stat().st_size > 0
    done = lean3d("predict", run, clip, "--json")
    found = json.loads(done.out)
    assert [video["path"] for video in found["videos"]] == [str(clip)]
    assert set(found["videos"][0]["overall"]["labels"]) == {"bright", "dark"}


def test_predict_names_bad_files_and_goes_on(lean3d, run, clips, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    done = lean3d("predict", run, bad)
    assert done.status == 2 and done.err.startswith(f"error: can't decode {bad}: ")
    done = lean3d("predict", run, bad, clips / "val", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert len(found["videos"]) == 6 and [file["path"] for file in found["bad_files"]] == [str(bad)]


def test_report_is_written(lean3d, run, tmp_path):
    done = lean3d("report", run, "--out", tmp_path / "page.html", "--clips", "2")
    assert done.status == 0, done.err
    assert str(tmp_path / "page.html") in done.out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<video") == 2 and "lean3d eval" in page


# ---- models, recipes


def test_models_prints_the_zoo_with_costs(lean3d):
    done = lean3d("models", "c3d*")
    assert done.status == 0
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:5] == ["c3d", "16", "x", "112x112", "27.86"] for line in lines)
    assert "38.50" in done.out
    assert "c3d_light" in done.out and "argument" not in done.out


def test_models_with_a_name_prints_its_arguments(lean3d):
    done = lean3d("models", "c3d_light")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["expansion", "0.5"] in rows and ["num_frames", "16"] in rows


def test_models_as_markdown(lean3d):
    lines = lean3d("models", "c3d", "--markdown").out.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2].startswith("| `c3d` | 16 x 112x112 | 27.86 | 38.50 |")


def test_a_wide_terminal_has_descriptions_beside_the_numbers(capsys, monkeypatch):
    monkeypatch.setattr(show, "out", show.Console(width=140))
    show.models([show.model_row("c3d")])
    assert any("27.86" in line and "C3D: eight" in line for line in capsys.readouterr().out.splitlines())


def test_recipes_are_listed_and_shown_as_json(lean3d):
    done = lean3d("recipes")
    assert done.status == 0
    for name in list_recipes():
        assert name in done.out
    assert from_json(TrainConfig, lean3d("recipes", "smallbig").out) == get_recipe("smallbig")
