"""The accuracy study's machinery: no test clip is read twice, nothing finished runs again, a kill loses nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from lean3d.blocks import TemporalResidualGradient
from lean3d.data.drawing import ON_EVERY_CPU
from lean3d.data.loader import Batch
from lean3d.data.synthetic import make_motion_set
from lean3d.errors import ConfigError, DataError
from lean3d.models import registry

STUDY = Path(__file__).parents[1] / "benchmarks" / "accuracy"
sys.path.insert(0, str(STUDY))
ZOO = dict(registry._MODELS)

import probes  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402
import studies  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
from ledger import Ledger, ReadTwiceError  # noqa: E402

# The study's own nets are in the registry for its tests alone: those of the zoo go through all that is there.
PEERS = {name: registry._MODELS.pop(name) for name in registry._MODELS.keys() - ZOO.keys()}

TINY_NET = studies.Net("tiny net", "c3d_light", {"layers": 5, "stem": "conv"}, width=1 / 32)
OTHER_NET = studies.Net("other net", "c3d_light", {"layers": 5, "stem": "conv", "trg": "none"}, width=1 / 32)
LINEAR = studies.Net("linear", "linear_pixels", {"places": 64}, width=1.0)


@pytest.fixture(autouse=True)
def peers_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in PEERS.items():
        monkeypatch.setitem(registry._MODELS, name, entry)


def tiny(nets: tuple[studies.Net, ...] = (LINEAR, TINY_NET), **changes) -> dict[str, studies.Table]:
    task = tasks.Task("tiny", "set", channels=1, size=(32, 32), clips=(60, 10))
    studies.TASKS["tiny"] = task
    settings = {"tasks": ("tiny",), "shares": (50,), "seeds": (0,), **changes}
    return {"tiny": studies.Table("tiny", "Does it run?", nets, **settings)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_motion_set(folder / "set", clips_per_class=6, test_clips_per_class=1, size=32, workers=1)
    return folder


@pytest.fixture
def words(clips: Path, tmp_path: Path) -> list[str]:
    where = ["--clips", str(clips), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    return ["tiny", "--threads", "1", *where]


# ---- tasks


def fake_set(folder: Path, classes: int = 3, number: int = 20) -> Path:
    """Class folders of empty files; pairs of files share a source."""
    lines = ["clip,source"]
    for kind in range(classes):
        (folder / f"class{kind}").mkdir(parents=True)
        for index in range(number):
            (folder / f"class{kind}" / f"c{kind}_{index:02d}.mp4").touch()
            lines.append(f"c{kind}_{index:02d},s{kind}_{index // 2}")
    (folder / "sources.csv").write_text("\n".join(lines))
    return folder


def test_subsets_lie_in_each_other_and_no_part_meets_another(tmp_path):
    fake_set(tmp_path / "set")
    task = tasks.Task("fake", "set", groups="sources.csv")
    places = tasks.Places(tmp_path, tmp_path, tmp_path)
    by_share = {share: tasks.parts(task, share, 1, places) for share in (10, 25, 50, 100)}
    for small, large in ((10, 25), (25, 50), (50, 100)):
        assert set(by_share[small].train) < set(by_share[large].train)
    for share, parts in by_share.items():
        counts = Counter(clip.label for clip in parts.train)
        whole = Counter(clip.label for clip in by_share[100].train)
        assert all(abs(counts[k] - share / 100 * whole[k]) < 1 for k in whole), "each class has its share"
        assert (parts.val, parts.test) == (by_share[100].val, by_share[100].test)
        sides = [{clip.group for clip in side} for side in (by_share[100].train, parts.val, parts.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2]), "no source is torn apart"
        listed = parts.manifest("train", "val")
        assert not {clip.path for clip in listed.clips} & {clip.path for clip in parts.test}
    other = tasks.parts(task, 100, 2, places)
    assert other.test == by_share[100].test, "tests are on the same clips, whatever the seed"
    assert other.val != by_share[100].val


def test_parts_do_not_depend_on_where_the_clips_lie(tmp_path):
    found = []
    for place in ("here", "there/and/deeper"):
        fake_set(tmp_path / place / "set")
        task = tasks.Task("fake", "set")
        parts = tasks.parts(task, 50, 1, tasks.Places(tmp_path / place, tmp_path, tmp_path))
        found.append([[Path(clip.path).name for clip in part] for part in (parts.train, parts.val, parts.test)])
    assert found[0] == found[1]


def test_a_task_without_clips_says_where_it_looked(tmp_path):
    with pytest.raises(DataError, match="set LEAN3D_SHARED"):
        tasks.parts(tasks.TASKS["digit"], 10, 0, tasks.Places(tmp_path / "none", tmp_path, tmp_path))


# ---- the ledger


def test_the_ledger_refuses_a_second_reading(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.open_test("row", "weights", "clips")
    ledger.open_test("row", "weights", "clips")  # cut off before its result was kept: the same reading again
    for model, test in (("others", "clips"), ("weights", "others")):
        with pytest.raises(ReadTwiceError, match="began to read its test clips"):
            ledger.open_test("row", model, test)
    with pytest.raises(ReadTwiceError, match="no open test"):
        ledger.close_test("other row", {"top1": 0.5})
    ledger.close_test("row", {"top1": 0.5})
    with pytest.raises(ReadTwiceError, match="choices are made on val"):
        ledger.open_test("row", "weights", "clips")
    with pytest.raises(ReadTwiceError):
        ledger.close_test("row", {"top1": 0.9})
    assert ledger.check("row", {"top1": 0.5}) and not ledger.check("row", {"top1": 0.9})
    assert [entry["event"] for entry in ledger.entries("row")] == ["opened", "closed"]


# ---- the runner


def test_a_kill_in_mid_table_loses_nothing_and_nothing_runs_twice(words, tmp_path, capsys, monkeypatch):
    """The second row is killed, hard, in its training; the same command goes on with it."""
    script = f"""
        import sys
        sys.path[:0] = [{str(STUDY)!r}, {str(Path(__file__).parent)!r}]
        import studies, test_accuracy
        test_accuracy.registry._MODELS.update(test_accuracy.PEERS)
        studies.EPOCHS[50] = 15
        test_accuracy.run.main({words!r}, test_accuracy.tiny())
    """
    monkeypatch.setitem(studies.EPOCHS, 50, 15)
    file = tmp_path / "results" / "rows-tiny.jsonl"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "work").glob("*/checkpoints/step-*3")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    first = file.read_text()
    assert [json.loads(line)["net"] for line in first.splitlines()] == ["linear"]

    assert run.main(words, tiny()) == 0
    assert re.search(r"goes on after step [1-9]", capsys.readouterr().out)
    lines = file.read_text().splitlines(keepends=True)
    assert lines[0] == first and [json.loads(line)["net"] for line in lines] == ["linear", "tiny net"]
    result = json.loads(lines[1])
    assert len(result["val_top1_by_epoch"]) == 15 and result["cpu_minutes"] > 0
    assert set(result["test"]["probes"]) == set(probes.PROBES)
    assert sum(map(sum, result["test"]["confusion"])) == result["test"]["videos"] == 10
    assert result["clips"] == {"train": 30, "val": 10, "test": 10}

    assert run.main(words, tiny()) == 0, "there is nothing to do"
    assert file.read_text() == "".join(lines)
    listed = next((tmp_path / "work" / result["key"]).glob("clips.csv")).read_text()
    assert "/train/" in listed and "/test/" not in listed, "the training knows of no test clip"

    # who takes the result away to have another one is refused
    file.write_text(first)
    assert run.main(words, tiny()) == 1
    assert "has read its test clips and has its result" in capsys.readouterr().out
    assert file.read_text() == first


def test_minutes_end_a_row_that_goes_on_later(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(studies.EPOCHS, 50, 100000)
    assert run.main([*words, "--minutes", "0.05"], tiny((TINY_NET,))) == 1
    said = capsys.readouterr().out
    assert "the same command goes on" in said
    assert not (tmp_path / "results").exists()


def test_variants_have_no_test_and_a_later_table_may_test_them(words, tmp_path, monkeypatch):
    monkeypatch.setitem(studies.EPOCHS, 50, 1)
    store = rows.Store(tmp_path / "results")
    assert run.main(words, tiny((TINY_NET,), choice=True)) == 0
    (before,) = store.read().values()
    assert "test" not in before and not store.ledger.entries(before["key"])
    assert run.main(words, tiny((TINY_NET,))) == 0
    (after,) = store.read().values()
    assert after["test"]["videos"] == 10 and after["weights_sha256"] == before["weights_sha256"]


def test_a_teacher_is_trained_before_the_row_that_follows_it_and_once(words, tmp_path, monkeypatch):
    monkeypatch.setitem(studies.EPOCHS, 50, 1)
    plain, follows = studies.Trick("light"), studies.Trick("distilled", teachers=(OTHER_NET,))
    assert run.main(words, tiny((TINY_NET,), tricks=(plain, follows), choice=True)) == 0
    results = rows.Store(tmp_path / "results").read()
    (alone, distilled) = results.values()
    assert alone["weights_sha256"] != distilled["weights_sha256"]
    student = studies.Row(TINY_NET, studies.TASKS["tiny"], 50, 0, follows, False)
    (teacher,) = student.teachers()
    assert rows.key(student) in results and rows.key(teacher) not in results
    folder = tmp_path / "work" / rows.key(teacher)
    config = json.loads((tmp_path / "work" / rows.key(student) / "config.json").read_text())
    assert config["optim"]["teachers"] == [str(folder)]
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert run.main(words, tiny((OTHER_NET,), choice=True)) == 0
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before, "the table that has the teacher takes it as it is"


def test_a_missing_package_passes_over_its_row_alone(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "movinets", None)
    assert run.main(words, tiny((studies.MOVINET_A0, LINEAR))) == 1
    assert "not done: tiny/50/MoViNet-A0" in capsys.readouterr().out
    assert [result["net"] for result in rows.Store(tmp_path / "results").read().values()] == ["linear"]


def test_wrong_words_are_named(words):
    with pytest.raises(ConfigError, match="did you mean tiny"):
        run.main(["tinny"], tiny())
    with pytest.raises(ConfigError, match="task/share/net/recipe/seed"):
        run.main([*words, "--only", "digit/*"], tiny())


# ---- the tables' lists


def test_each_table_names_rows_that_differ():
    labels: dict[str, studies.Net] = {}
    for table in studies.TABLES.values():
        for net in table.nets:
            assert labels.setdefault(net.label, net) == net, "one label, one net"
        names = [row.name for row in table.rows()]
        assert len(set(names)) == len(names) > 0
    heads = {net for pair in tables.PAIRS for net in pair[:2]}
    assert heads <= set(labels)


def test_all_nets_are_trained_alike():
    configs = [row.config() for row in studies.TABLES["both"].rows() if (row.task.name, row.seed) == ("digit", 0)]
    assert len(configs) == 11
    # but for the learning rate, which each kind of net has of its own
    configs = [dataclasses.replace(c, optim=dataclasses.replace(c.optim, lr=1.0)) for c in configs]
    first = configs[0]
    for config in configs[1:]:
        assert (config.optim, config.augment, config.test, config.run) == (
            first.optim,
            first.augment,
            first.test,
            first.run,
        )
        assert config.model.width == first.model.width and config.model.size == first.model.size


def test_an_equal_cost_net_costs_as_much():
    narrow = studies.C3D_NARROW
    ratio = studies.multiplications("c3d", (), studies.width_of(narrow)) / studies.multiplications(
        "c3d_light", (), studies.C3D_LIGHT.width
    )
    assert 0.85 < ratio < 1.15 and studies.width_of(narrow) < studies.C3D.width


def test_a_peer_behind_trg_gets_the_gradient_of_its_clip():
    arguments = {"num_classes": 4, "in_channels": 1, "width": 0.125}
    torch.manual_seed(0)
    plain = registry.create_model("r2plus1d_18", **arguments).eval()
    behind = registry.create_model("behind_trg", net="r2plus1d_18", **arguments).eval()
    behind.load_state_dict({k.replace("stem.", "stem.1.", 1): v for k, v in plain.state_dict().items()})
    clip = torch.randn(1, 1, 8, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(behind(clip), plain(TemporalResidualGradient()(clip)))
        assert not torch.allclose(behind(clip), plain(clip))


@pytest.mark.slow
def test_every_net_of_every_table_can_be_built():
    from lean3d.models import model_from_config

    nets = {net for table in studies.TABLES.values() for net in map(repr, table.nets)}
    built = 0
    for table in studies.TABLES.values():
        for net in table.nets:
            if repr(net) in nets and net not in studies.MOVINETS:
                nets.discard(repr(net))
                row = studies.Row(net, studies.TASKS["digit"], 25, 0, studies.Trick("light"), True)
                with torch.device("meta"):
                    model_from_config(row.config().model, 10)
                built += 1
    assert built > 60


def test_a_trick_changes_its_setting_alone():
    table = studies.TABLES["tricks"]
    plain, longer = (
        studies.Row(studies.SMALL, studies.TASKS["digit"], 25, 0, trick, False).config() for trick in table.tricks[:2]
    )
    assert longer.optim.epochs == 2 * plain.optim.epochs
    assert dataclasses.replace(longer, optim=plain.optim) == plain
    assert table.choice and not any(row.tested for row in table.rows())


# ---- probes


@pytest.mark.parametrize("name", list(probes.PROBES))
@pytest.mark.parametrize("channels", [1, 3])
def test_probes_change_a_clip_and_follow_from_the_video(name, channels, monkeypatch):
    ramp = torch.linspace(30, 220, 16)[None, :, None, None] + torch.arange(18)[None, None, None, :]
    clip = ramp.expand(channels, 16, 15, 18).clamp(0, 255).byte().clone()
    clip[:, :, 4:9, 4:9] = 0
    before = clip.clone()
    clips = torch.stack([clip, clip])[:, None]
    batch = Batch(clips, torch.zeros(2, dtype=torch.int64), torch.tensor([4, 9]), ())
    changed = probes.apply(probes.PROBES[name], batch)
    assert torch.equal(clip, before) and torch.equal(batch.clips, clips), "the batch stays as it is"
    assert changed.clips.shape == clips.shape and changed.clips.dtype == torch.uint8
    with monkeypatch.context() as without_vectors:
        without_vectors.setitem(ON_EVERY_CPU, "x264-params", f"{ON_EVERY_CPU['x264-params']}:asm=0")
        again = probes.apply(probes.PROBES[name], batch)
    assert torch.equal(changed.clips, again.clips), "each time and on every processor"
    one, other = changed.clips[:, 0].float()
    assert not torch.equal(one, clip.float())
    assert torch.equal(one, other) == (name in ("blur", "darker", "compressed")), "what is random differs by video"
    difference = (one - clip.float()).abs()
    if name == "shuffled":
        assert torch.equal(one.mean((0, 2, 3)).sort().values, clip.float().mean((0, 2, 3)).sort().values)
    if name == "noise":
        inner = (clip > 80) & (clip < 175)
        assert abs((one - clip.float())[inner].std() - probes.NOISE) < 1.5
    if name == "dropped":
        repeated = [(one[:, t] == one[:, t - 1]).all().item() for t in range(1, 16)]
        assert sum(repeated) == 8 and torch.equal(one[:, 0], clip[:, 0].float())
    if name == "darker":
        assert (one - clip.float() / 2).abs().max() <= 0.5
    if name == "blur":
        assert one.mean() == pytest.approx(clip.float().mean(), abs=1)
        assert one[:, :, 6, 3:10].diff().abs().max() < 0.6 * clip[:, :, 6, 3:10].float().diff().abs().max()
    if name == "compressed":
        assert 0.5 < difference.mean() < 25


# ---- the page


def kept_results(folder: Path, accuracies: dict[str, list[float]], table: studies.Table) -> None:
    """Results as the runner keeps them, with these test accuracies by net and seed."""
    store = rows.Store(folder)
    for row in table.rows():
        if row.seed >= len(accuracies.get(row.net.label, [])):
            continue
        top1 = accuracies[row.net.label][row.seed]
        heavy = row.net.label == "C3D"
        result = {
            "key": rows.key(row), "task": row.task.name, "share": row.share, "net": row.net.label,
            "recipe": row.trick.label, "seed": row.seed, "clips": {"train": 73, "val": 119, "test": 200},
            "weights": 1_500_000 if heavy else 150_000, "macs": 900_000_000 if heavy else 90_000_000,
            "multiplications": 130_000_000 if heavy else 60_000_000,
            "val": {"top1": top1, "loss": 1.0, "epoch": 3}, "val_top1_by_epoch": [0.1, 0.5, 0.85, 0.8, 0.9],
            "cpu_minutes": 2.0,
            "test": {
                "top1": top1, "videos": 200, "classes": ["bin", "lay", "place", "set"],
                "confusion": [[90, 10, 0, 0], [3, 97, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
                "probes": dict.fromkeys(probes.PROBES, top1 / 2),
            },
        }  # fmt: skip
        store.ledger.open_test(result["key"], "weights", "clips")
        store.add(result)
        store.ledger.close_test(result["key"], result["test"])


def test_the_page_says_what_the_results_say(tmp_path):
    nets = (studies.C3D, studies.C3D_LIGHT_PLAIN, studies.C3D_LIGHT)
    table = dataclasses.replace(studies.TABLES["light"], nets=nets, tasks=("digit",), shares=(10,))
    found = {"C3D": [0.50, 0.52, 0.54], "light C3D": [0.60, 0.62], "light C3D + TRG": [0.70, 0.75, 0.80]}
    kept_results(tmp_path, found, table)
    page = tmp_path / "docs" / "accuracy.md"
    page.parent.mkdir()
    page.write_text("# Accuracy\n\nOurs.\n\n<!-- tables -->\nold\n<!-- /tables -->\n\nBelow.\n")
    tables.main(["--results", str(tmp_path), "--page", str(page)], [table])
    text = page.read_text()
    assert text.startswith("# Accuracy\n\nOurs.") and text.endswith("\n\nBelow.\n") and "old" not in text
    rows_of = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "| 0.25 |" in line}
    assert "0.520 ± 0.020" in rows_of["C3D"] and "1.500 | 0.130" in rows_of["C3D"]
    assert "0.610 (2)" in rows_of["light C3D"], "two seeds have no spread"
    assert "0.750 ± 0.050" in rows_of["light C3D + TRG"]
    assert "| 0.375 ± 0.025 |" in text, "the probes"
    assert "| 3 ± 0 |" in text, "epochs to nine tenths"
    assert "Most confused at 10 % by light C3D + TRG, the best on val: bin as lay (30), lay as bin (9)." in text
    assert "8 of 9 rows so far" in text and "| `light` |" in text.partition("### Not yet")[2]
    claim = next(line for line in text.splitlines() if line.startswith("| C3D / light C3D + TRG"))
    assert "10.0x (7.4x) | 15.0x (11.0x) | +23.0 (+3.0) | +23.0 | digit 10 % +23.0 (3)" in claim
    picture = re.search(r"!\[.*\]\((images/.*\.png)\)", text)
    assert picture and (page.parent / picture[1]).stat().st_size > 5000

    idle = tmp_path / "idle"
    kept_results(idle, {**found, "C3D": [0.26, 0.24]}, table)
    page.write_text("<!-- tables -->\n<!-- /tables -->\n")
    tables.main(["--results", str(idle), "--page", str(page)], [table])
    claim = next(line for line in page.read_text().splitlines() if line.startswith("| C3D / light C3D + TRG"))
    assert "| +47.5 (+3.0) | - | digit 10 % +47.5 (2)" in claim, "to be ahead of a net that guesses is told apart"

    forged = tmp_path / "rows-digit.jsonl"
    forged.write_text(forged.read_text().replace('"top1": 0.8, "videos"', '"top1": 0.9, "videos"'))
    with pytest.raises(DataError, match="does not vouch"):
        tables.main(["--results", str(tmp_path), "--page", str(page)], [table])


def test_peers_are_shown_side_by_side_at_the_share_that_most_were_run_on(tmp_path):
    nets = (studies.SMALL, studies.R2PLUS1D_18)
    table = dataclasses.replace(studies.TABLES["peers"], nets=nets, tasks=("digit", "color"), shares=(25, 100))
    here = [row for row in table.rows() if row.share == 25 or row.net == studies.SMALL]
    kept = {rows.key(row): row for row in here}
    top1 = {(net.label, task): 0.1 * (1 + i) for i, (net, task) in enumerate(itertools.product(nets, table.tasks))}
    results = {
        name: {"test": {"top1": top1[row.net.label, row.task.name] + (row.share == 100)}} for name, row in kept.items()
    }
    page = tables._against_peers(tables.Kept(results, {}), [table], tmp_path / "images")
    assert "| net | ms | digit, 25 % | color, 25 % |" in page
    assert "| recipe's net | - | 0.100 ± 0.000 | 0.200 ± 0.000 |" in page
    assert "| R(2+1)D-18 | - | 0.300 ± 0.000 | 0.400 ± 0.000 |" in page
    assert (tmp_path / "images" / "accuracy-against-peers.png").stat().st_size > 5000


def test_what_is_kept_is_vouched_for():
    tables.read(Path(__file__).parents[1] / "benchmarks" / "results" / "accuracy")
