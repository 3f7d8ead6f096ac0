"""From labels on disk to clips in train, val and test."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean3d.config import DataConfig
from lean3d.data.annotations import Row
from lean3d.data.manifest import Manifest, held_back, read_manifest
from lean3d.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(root: Path, **settings) -> Manifest:
    return read_manifest(DataConfig(root=str(root), **settings))


def found(manifest: Manifest, root: Path) -> dict[str, tuple[str, str]]:
    """Relative path -> (class, split)."""
    names = [*manifest.classes, "(none)"]
    return {str(Path(c.path).relative_to(root)): (names[c.label], c.split) for c in manifest.clips}


# Class folders


def test_class_folders_with_a_seeded_split(tmp_path):
    touch(tmp_path, *(f"{kind}/{i}.mp4" for kind in ("run", "jump", "a10", "a9") for i in range(20)))
    manifest = read(tmp_path, val_share=0.2, test_share=0.1)
    assert manifest.classes == ("a9", "a10", "jump", "run")
    assert manifest.counts() == {"train": 56, "val": 16, "test": 8}
    assert Counter((c.label, c.split) for c in manifest.clips)[2, "val"] == 4
    assert manifest == read(tmp_path, val_share=0.2, test_share=0.1)
    assert manifest.digest() != read(tmp_path, val_share=0.2, test_share=0.1, split_seed=1).digest()
    assert all(Path(clip.path).is_absolute() for clip in manifest.clips)


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "validation", "testing"), ("train", "valid", "test")]
)
def test_split_folders_stay(tmp_path, names):
    for split, count in zip(names, (5, 2, 3), strict=True):
        touch(tmp_path, *(f"{split}/{kind}/{split}{i}.avi" for kind in "ab" for i in range(count)))
    touch(tmp_path, "other/c/1.mp4", "readme.txt")
    manifest = read(tmp_path, test_share=0.5)
    assert (manifest.classes, manifest.counts()) == (("a", "b"), {"train": 10, "val": 4, "test": 6})


def test_val_is_cut_from_train_where_only_test_is_written(tmp_path):
    touch(tmp_path, *(f"{s}/{kind}/{i}.mp4" for s in ("train", "test") for kind in "ab" for i in range(10)))
    manifest = read(tmp_path, val_share=0.2)
    assert manifest.counts() == {"train": 16, "val": 4, "test": 20}
    assert all(("/test/" in clip.path) == (clip.split == "test") for clip in manifest.clips)


def test_nested_folders_frame_folders_and_other_files(tmp_path):
    touch(tmp_path, "a/deep/er/1.mp4", "a/2.MKV", "a/clip3/00001.jpg", "a/clip3/00002.jpg", "a/notes.txt", "a/2.jpg")
    touch(tmp_path, "a/thumbs/1.mp4", "a/thumbs/1.jpg", "b/x.webm", "b/.hidden.mp4", ".cache/z/1.mp4", "empty/none.txt")
    assert set(found(read(tmp_path, val_share=0), tmp_path)) == {
        "a/deep/er/1.mp4",
        "a/2.MKV",
        "a/clip3",
        "a/thumbs/1.mp4",
        "b/x.webm",
    }


def test_groups_file_keeps_clips_together(tmp_path):
    touch(tmp_path, *(f"{kind}/{kind}{i}.mp4" for kind in "ab" for i in range(24)))
    table = write(
        tmp_path / "who.csv", "clip,person\n" + "".join(f"a{i},p{i // 6}\nb{i}.mp4,p{i // 6}\n" for i in range(20))
    )
    manifest = read(tmp_path, groups=str(table), val_share=0.25)
    sides = defaultdict(set)
    for clip in manifest.clips:
        if clip.group:
            sides[clip.group].add(clip.split)
    assert len(sides) == 4 and all(len(side) == 1 for side in sides.values())
    assert sum(not clip.group for clip in manifest.clips) == 8
    assert manifest == read(tmp_path, groups="who.csv", val_share=0.25)
    with pytest.raises(DataError, match="none of the clips"):
        read(tmp_path, groups=str(write(tmp_path / "bad.csv", "clip,person\nzzz,p\n")))
    with pytest.raises(DataError, match=r"data\.groups"):
        read(tmp_path, groups="nowhere.csv")


def test_sources_of_the_fight_set_stay_on_one_side(shared):
    root = shared / "data" / "surv_fight"
    manifest = read(root, groups=str(root / "sources.csv"), test_share=0.2)
    assert (manifest.classes, len(manifest.clips)) == (("fight", "noFight"), 300)
    sources = {row["clip"]: row["source"] for row in csv.DictReader((root / "sources.csv").open()) if row["source"]}
    sides = defaultdict(set)
    for clip in manifest.clips:
        if source := sources.get(Path(clip.path).stem):
            sides[source].add(clip.split)
    assert sides and all(len(side) == 1 for side in sides.values())
    counts = Counter((clip.split, clip.label) for clip in manifest.clips)
    assert all(abs(counts["test", label] - 30) <= 4 and abs(counts["val", label] - 18) <= 4 for label in (0, 1))


# CSV


def test_rows_of_the_lips_set(shared):
    root = shared / "data" / "grid_lips"
    manifest = read(root / "clips.csv", where={"task": "digit"})
    counts = manifest.counts()
    assert (len(manifest.classes), counts["test"], counts["train"] + counts["val"]) == (10, 197, 803)
    assert 110 <= counts["val"] <= 130
    assert read(root, where={"task": "digit"}) == manifest
    assert len(read(root / "digit").clips) == 1000
    with pytest.raises(DataError, match="color, digit, letter"):
        read(root / "clips.csv", where={"task": "colour"})


def test_csv_columns(tmp_path):
    touch(tmp_path / "v", *(f"{i}.mp4" for i in range(12)))
    lines = [f"{i}.mp4;{'ab'[i % 2]};{'test' if i > 9 else ''};s{i // 2};x" for i in range(12)]
    table = write(tmp_path / "t.csv", "\ufeffpath;class;split;speaker;note\n" + "\n".join(lines) + "\n\n")
    settings = {"videos": str(tmp_path / "v"), "label_column": "class", "group_column": "speaker"}
    manifest = read(table, **settings)
    assert manifest.counts()["test"] == 2
    assert {Path(c.path).name: c.group for c in manifest.clips}["3.mp4"] == "s1"
    with pytest.raises(
        DataError, match=r"'label' \(data.label_column\).*columns are path, class, split, speaker, note"
    ):
        read(table, videos=str(tmp_path / "v"), format="csv")
    with pytest.raises(DataError, match=r"'sex' \(data.where\)"):
        read(table, **settings, where={"sex": "f"})
    with pytest.raises(DataError, match=r"'who' \(data.group_column\)"):
        read(table, **{**settings, "group_column": "who"})
    with pytest.raises(DataError, match=r"set data\.videos"):
        read(table, **{**settings, "videos": None})
    with pytest.raises(DataError, match="unknown split 'x'"):
        read(write(tmp_path / "u.csv", "path,label,split\nv/1.mp4,a,x\n"))


def test_one_csv_for_each_split(tmp_path):
    touch(tmp_path, *(f"{i}.mp4" for i in range(6)))
    write(tmp_path / "train.csv", "path,label\n0.mp4,a\n1.mp4,b\n2.mp4,a\n")
    write(tmp_path / "val.csv", "path,label\n3.mp4,b\n")
    assert read(tmp_path).counts() == {"train": 3, "val": 1, "test": 0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0.mp4,a,train,", "0.mp4,a,test,", "1.mp4,b,train,"], r"0\.mp4 is in two splits"),
        (["0.mp4,a,train,", "./0.mp4,b,train,", "1.mp4,b,train,"], r"0\.mp4 has two labels"),
        (["0.mp4,a,train,", "1.mp4,a,train,"], "one class only, 'a'"),
        (["0.mp4,a,train,", "1.mp4,b,train,", "2.mp4,c,test,"], "no train clips of 'c', which test has"),
        (["0.mp4,a,train,", "1.mp4,b,train,", "2.mp4,c,val,"], "no train clips of 'c', which val has"),
        (["0.mp4,a,train,p", "1.mp4,b,train,", "2.mp4,a,test,p"], "group 'p' in train and in test"),
        (["0.mp4,a,train,", "1.mp4,,train,"], r"1\.mp4 has no label"),
        ([], "no row"),
    ],
)
def test_tables_that_do_not_fit_together(tmp_path, lines, message):
    touch(tmp_path, "0.mp4", "1.mp4", "2.mp4")
    table = write(tmp_path / "t.csv", "path,label,split,group\n" + "\n".join(lines))
    with pytest.raises(DataError, match=message):
        read(table)


def test_a_set_to_test_on_needs_no_train_clips(tmp_path):
    touch(tmp_path, "0.mp4")
    assert read(write(tmp_path / "t.csv", "path,label,split\n0.mp4,a,test\n")).counts()["test"] == 1


# Published layouts


def test_kinetics_tables(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\n"
    write(
        tmp_path / "train.csv",
        head + "".join(f"arm wrestling,-id{i},{i},{i + 10},train\nyoga,y_{i},0,10,train\n" for i in range(9)),
    )
    write(tmp_path / "validate.csv", head + "yoga,vid,100,110,validate\n")
    write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\ntid,7,17,test\n")
    for i in range(9):
        touch(tmp_path, f"videos/train/arm wrestling/-id{i}_{i:06d}_{i + 10:06d}.mp4")
        touch(tmp_path, f"videos/train/yoga/y_{i}_000000_000010.mp4")
    clips = found(read(tmp_path), tmp_path)
    assert clips["videos/train/arm wrestling/-id3_000003_000013.mp4"] == ("arm wrestling", "train")
    assert clips["videos/val/yoga/vid_000100_000110.mp4"] == ("yoga", "val")
    assert list(clips.values()).count(("(none)", "test")) == 1


@pytest.mark.parametrize("separator", [" ", ","])
def test_kinetics_lists(tmp_path, separator):
    touch(tmp_path / "clips", *(f"my {i}.mp4" for i in range(6)))
    write(tmp_path / "k400_train_list.txt", "".join(f"my {i}.mp4{separator}{i % 2 * 3}\n" for i in range(4)))
    write(tmp_path / "k400_val_list.txt", "".join(f"my {i}.mp4{separator}{i % 2 * 3}\n" for i in (4, 5)))
    settings = {"videos": str(tmp_path / "clips")}
    manifest = read(tmp_path, **settings)
    assert (manifest.classes, manifest.counts()) == (("0", "3"), {"train": 4, "val": 2, "test": 0})
    write(tmp_path / "label_map.txt", "zero\none\ntwo\nthree\n")
    manifest = read(tmp_path, **settings)
    assert manifest.classes == ("zero", "one", "two", "three")
    assert {c.label for c in manifest.clips} == {0, 3}
    single = read(tmp_path / "k400_train_list.txt", **settings, val_share=0)
    assert single.counts() == {"train": 4, "val": 0, "test": 0}


def test_lists_of_frame_folders_with_their_counts(tmp_path):
    touch(tmp_path, "f/c0/1.jpg", "f/c1/1.jpg")
    manifest = read(write(tmp_path / "train.txt", "f/c0 120 0\nf/c1 99 1\n"), val_share=0)
    assert found(manifest, tmp_path) == {"f/c0": ("0", "train"), "f/c1": ("1", "train")}


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_something_something_v2(tmp_path, prefix):
    def entry(i, template):
        return {"id": str(i), "label": "x", "template": template, "placeholders": ["x"]}

    push, drop = "Pushing [something] from left to right", "Dropping [something]"
    write(tmp_path / f"{prefix}train.json", json.dumps([entry(i, (push, drop)[i % 2]) for i in range(6)]))
    write(tmp_path / f"{prefix}validation.json", json.dumps([entry(8, drop)]))
    write(tmp_path / f"{prefix}test.json", json.dumps([{"id": "9"}]))
    names = {"Pushing something from left to right": "0", "Dropping something": "1"}
    write(tmp_path / f"{prefix}labels.json", json.dumps(names))
    touch(tmp_path, *(f"20bn-something-something-v2/{i}.webm" for i in range(10)))
    manifest = read(tmp_path)
    assert manifest.classes == tuple(names)
    clips = found(manifest, tmp_path)
    assert clips["20bn-something-something-v2/8.webm"] == ("Dropping something", "val")
    assert clips["20bn-something-something-v2/9.webm"] == ("(none)", "test")
    assert [c.label for c in manifest.select("test")] == [-1]


def test_something_something_v1_and_jester(tmp_path):
    for name, kinds in (
        ("something-something", ["Closing [something]", "Opening [part] of [something]"]),
        ("jester", ["Swiping Left", "No gesture"]),
    ):
        root = tmp_path / name
        write(root / f"{name}-v1-train.csv", "".join(f"{i};{kinds[i % 2]}\n" for i in range(4)))
        write(root / f"{name}-v1-validation.csv", f"4;{kinds[0]}\n")
        write(root / f"{name}-v1-test.csv", "5\n")
        plain = [kind.replace("[", "").replace("]", "") for kind in kinds]
        write(root / f"{name}-v1-labels.csv", "\n".join(reversed(plain)) + "\n")
        touch(root, *(f"20bn-{name}-v1/{i}/00001.jpg" for i in range(6)))
        manifest = read(root)
        assert manifest.classes == tuple(reversed(plain))
        assert manifest.counts() == {"train": 4, "val": 1, "test": 1}
        assert found(manifest, root)[f"20bn-{name}-v1/1"] == (plain[1], "train")
        assert read(root / f"{name}-v1-train.csv") == manifest


@pytest.mark.parametrize(("videos", "ending"), [("UCF-101", ".avi"), ("mp4", ".mp4")])
def test_ucf101(tmp_path, videos, ending):
    lists = tmp_path / "ucfTrainTestlist"
    kinds = ["ApplyEyeMakeup", "Archery"]
    write(lists / "classInd.txt", "".join(f"{i + 1} {kind}\n" for i, kind in enumerate(kinds)))
    names = {k: [f"{k}/v_{k}_g{g:02d}_c{c:02d}" for g in range(1, 9) for c in (1, 2)] for k in kinds}
    for fold in (1, 2):
        test = {k: names[k][:4] if fold == 1 else names[k][4:6] for k in kinds}
        train = [f"{n}.avi {i + 1}\r\n" for i, k in enumerate(kinds) for n in names[k] if n not in test[k]]
        write(lists / f"trainlist{fold:02d}.txt", "".join(train))
        write(lists / f"testlist{fold:02d}.txt", "".join(f"{n}.avi\n" for k in kinds for n in test[k]))
    touch(tmp_path / videos, *(n + ending for k in kinds for n in names[k]))
    manifest = read(tmp_path, val_share=0.2)
    assert (manifest.classes, manifest.counts()["test"]) == (tuple(kinds), 8)
    assert all(Path(clip.path).is_file() for clip in manifest.clips)
    groups = {s: {c.group for c in manifest.select(s)} for s in ("train", "val")}
    assert groups["val"] and not groups["train"] & groups["val"]
    assert read(tmp_path, fold=2).counts()["test"] == 4
    assert read(lists, videos=str(tmp_path / videos), fold=2, format="ucf101").counts()["test"] == 4
    with pytest.raises(DataError, match=r"data\.fold"):
        read(tmp_path, fold=3)


def test_hmdb51(tmp_path):
    lists = tmp_path / "testTrainMulti_7030_splits"
    for kind in ("brush_hair", "wave"):
        names = [f"Film{i // 2}_{kind}_u_nm_np1_ba_goo_{i}.avi" for i in range(10)]
        parts = [1] * 6 + [2, 2, 0, 0]
        write(lists / f"{kind}_test_split1.txt", "".join(f"{n} {p} \n" for n, p in zip(names, parts, strict=True)))
        write(
            lists / f"{kind}_test_split2.txt",
            "".join(f"{n} {p} \n" for n, p in zip(names, reversed(parts), strict=True)),
        )
        touch(tmp_path / "videos" / kind, *names)
    manifest = read(tmp_path, val_share=0.34)
    assert manifest.counts() == {"train": 8, "val": 4, "test": 4}
    assert all(Path(clip.path).is_file() for clip in manifest.clips)
    assert {c.group for c in manifest.select("val")}.isdisjoint(c.group for c in manifest.select("train"))
    assert {c.path for c in manifest.select("test")}.isdisjoint(c.path for c in read(tmp_path, fold=2).select("test"))


# Wrong roots, saving


def test_wrong_roots_say_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"data\.root"):
        read_manifest(DataConfig())
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none")
    for looked in ("a folder for each class", "path and label", "classInd.txt", "_test_split1.txt"):
        with pytest.raises(DataError, match=looked):
            read(tmp_path)
    with pytest.raises(DataError, match="columns clip, source"):
        read(write(tmp_path / "x.csv", "clip,source\na,b\n"))
    with pytest.raises(DataError, match="not in the format ucf101: expected classInd"):
        read(tmp_path, format="ucf101")
    with pytest.raises(ConfigError, match="val_share"):
        read(touch(tmp_path, "a/1.mp4", "b/1.mp4"), val_share=1.0)


def test_a_saved_manifest_reads_back(tmp_path):
    touch(tmp_path / "d", *(f"{kind}/{i}.mp4" for kind in ("a", "b, c") for i in range(8)))
    manifest = read(tmp_path / "d", test_share=0.2)
    manifest.to_csv(tmp_path / "m.csv")
    again = read(tmp_path / "m.csv", split_seed=7)
    assert (again.classes, again.clips, again.digest()) == (manifest.classes, manifest.clips, manifest.digest())


def test_digest_survives_a_move_and_sees_a_change(tmp_path):
    touch(tmp_path / "one", *(f"{kind}/{i}.mp4" for kind in "ab" for i in range(8)))
    before = read(tmp_path / "one").digest()
    (tmp_path / "one").rename(tmp_path / "two")
    assert read(tmp_path / "two").digest() == before
    touch(tmp_path / "two", "b/9.mp4")
    assert read(tmp_path / "two").digest() != before


def test_relative_root_and_videos(tmp_path, monkeypatch):
    touch(tmp_path, "v/a/1.mp4", "v/b/1.mp4")
    write(tmp_path / "t.csv", "path,label\na/1.mp4,a\nb/1.mp4,b\n")
    monkeypatch.chdir(tmp_path)
    manifest = read(Path("t.csv"), videos="v")
    assert [c.path for c in manifest.clips] == [str(tmp_path / "v" / k / "1.mp4") for k in "ab"]


# Properties of the split


@st.composite
def labelled_rows(draw: st.DrawFn) -> list[Row]:
    labels = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=80))
    groups = draw(st.lists(st.sampled_from(["", "", *"12345678"]), min_size=len(labels), max_size=len(labels)))
    return [Row(f"{i}.mp4", label, None, group) for i, (label, group) in enumerate(zip(labels, groups, strict=True))]


@settings(max_examples=150, deadline=None)
@given(labelled_rows(), st.floats(0.01, 0.9), st.integers(0, 5))
def test_held_back_parts(rows, share, seed):
    chosen = held_back(rows, share, str(seed))
    sides = defaultdict(set)
    for row in rows:
        sides[row.group or row.path].add(row.path in chosen)
    assert all(len(side) == 1 for side in sides.values()), "a group is on two sides"
    assert {row.label for row in rows} == {row.label for row in rows if row.path not in chosen}, "a class is empty"
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert held_back(shuffled, share, str(seed)) == chosen, "the order of files matters"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=5), st.floats(0.05, 0.6), st.integers(0, 5))
def test_shares_without_groups_are_exact_to_a_clip(sizes, share, seed):
    rows = [Row(f"{label}/{i}.mp4", str(label)) for label, size in enumerate(sizes) for i in range(size)]
    taken = Counter(path.partition("/")[0] for path in held_back(rows, share, str(seed)))
    for label, size in enumerate(sizes):
        assert abs(taken[str(label)] - max(share * size, 1)) <= 0.5 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.4))
def test_shares_with_groups_are_roughly_right(seed, share):
    rng = random.Random(seed)
    rows = [Row(f"{i}.mp4", rng.choice("ab"), None, rng.choice(["", *map(str, range(40))])) for i in range(300)]
    assert abs(len(held_back(rows, share, str(seed))) / 300 - share) < 0.04
