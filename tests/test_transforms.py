"""Transforms against plain references: slices, Pillow frame by frame, sums by hand."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from lean3d.config import AugmentConfig, InputSpec
from lean3d.data import clip_ops
from lean3d.data.clip_ops import RandAugment
from lean3d.data.transforms import BatchMix, TestTransform, TrainTransform, flip_labels, normalize
from lean3d.errors import ConfigError

PLAIN = AugmentConfig(crop="center", flip="off", color_jitter=0.0)
GREY = InputSpec(num_frames=4, size=(24, 32), channels=1, mean=(0.5,), std=(0.25,))
RGB = InputSpec(num_frames=4, size=(24, 32))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def natural_clip(channels: int = 3, frames: int = 3, height: int = 40, width: int = 52) -> torch.Tensor:
    """Smooth colours that don't fill the range, (C, T, h, w), different in each frame."""
    coarse = torch.rand(channels, frames, 5, 6, generator=seeded(3))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (40 + 150 * smooth).byte()


def with_pillow(clip: torch.Tensor, change: Any) -> torch.Tensor:
    """`change` of a Pillow image that holds all frames below each other, so that it sees the clip's statistics."""
    channels, frames, height, width = clip.shape
    tall = clip.permute(1, 2, 3, 0).reshape(frames * height, width, channels)
    changed = np.asarray(change(Image.fromarray(tall.numpy() if channels == 3 else tall[..., 0].numpy())))
    return torch.tensor(changed).view(frames, height, width, channels).permute(3, 0, 1, 2)


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


# --- crops ---------------------------------------------------------------------------------------------------------


def test_a_crop_of_the_wanted_size_is_a_slice():
    frames = random_frames(4, 24, 50, 3)
    clip, label = TrainTransform(PLAIN, RGB, ["a"])(frames, 0, seeded())
    assert torch.equal(clip, frames[:, :, 9:41].permute(3, 0, 1, 2))
    assert label == 0
    assert clip.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_antialiased_bilinear_of_the_center(channels):
    spec = RGB if channels == 3 else GREY
    frames = natural_clip(channels, 4, 96, 180).permute(1, 2, 3, 0)
    clip, _ = TrainTransform(PLAIN, spec, ["a"])(frames, 0, seeded())
    assert clip.shape == (channels, 4, 24, 32)
    for t, frame in enumerate(frames[:, :, 26:154]):
        image = Image.fromarray(frame.numpy() if channels == 3 else frame[..., 0].numpy())
        reference = torch.tensor(np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR))).view(24, 32, channels)
        assert distance(clip[:, t], reference.permute(2, 0, 1)) <= 1


def crop_boxes(augment: AugmentConfig, spec: InputSpec, height: int, width: int, number: int = 400) -> np.ndarray:
    transform = TrainTransform(augment, spec, ["a"])
    source = seeded()
    return np.array([transform._draw_box(height, width, source) for _ in range(number)])


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized", "random", "center"])
@pytest.mark.parametrize("frame", [(60, 100), (100, 60), (24, 32), (7, 200), (1, 1)])
def test_boxes_lie_within_the_frame(crop, frame):
    boxes = crop_boxes(dataclasses.replace(PLAIN, crop=crop), RGB, *frame)
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= frame[0]
    assert (left + width).max() <= frame[1]


def test_multi_scale_takes_corners_and_center_at_all_scales():
    square = dataclasses.replace(RGB, size=(32, 32))
    boxes = crop_boxes(dataclasses.replace(PLAIN, crop="multi_scale"), square, 100, 160)
    sizes = [100, 88, 75, 66]
    seen = {(int(h), int(w)) for h, w in boxes[:, 2:]}
    assert seen == {(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1}
    places = {(int(t), int(s)) for t, s, h, w in boxes if (h, w) == (66, 66)}
    assert places == {(0, 0), (0, 94), (34, 0), (34, 94), (17, 47)}


def test_random_crop_moves_along_the_longer_side_only():
    boxes = crop_boxes(dataclasses.replace(PLAIN, crop="random"), RGB, 48, 100)
    assert {tuple(box) for box in boxes[:, [0, 2, 3]].tolist()} == {(0, 48, 64)}
    assert set(boxes[:, 1].tolist()) == set(range(37))


def test_random_resized_has_the_area_and_the_aspect():
    augment = dataclasses.replace(PLAIN, crop="random_resized", area=(0.1, 0.3), aspect=(0.8, 1.25))
    _, _, height, width = crop_boxes(augment, RGB, 240, 320, number=1000).T
    area, aspect = height * width / (240 * 320), (width / height) / (32 / 24)
    assert 0.098 < area.min() < 0.12
    assert 0.28 < area.max() < 0.302
    assert 0.79 < aspect.min() < 0.83
    assert 1.2 < aspect.max() < 1.27


@pytest.mark.parametrize(("height", "width"), [(48, 100), (100, 64), (48, 64)])
def test_three_crops_lie_along_the_longer_side(height, width):
    frames = random_frames(4, height, width, 3)
    views = TestTransform(RGB, 3)(frames)
    assert views.shape == (3, 3, 4, 24, 32)
    last = (height - 48, width - 64)
    for view, (top, left) in zip(views, [(0, 0), (last[0] // 2, last[1] // 2), last], strict=True):
        crop = frames[:, top : top + 48, left : left + 64]
        expected, _ = TrainTransform(PLAIN, RGB, ["a"])(crop, 0, seeded())
        assert torch.equal(view, expected)
    assert torch.equal(TestTransform(RGB)(frames)[0], views[1])


# --- the whole training transform ----------------------------------------------------------------------------------

EVERYTHING = AugmentConfig(crop="multi_scale", flip="on", rand_augment=3, rand_augment_magnitude=9, erasing=0.5)


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["rgb", "grey"])
def test_a_still_video_stays_still_and_the_generator_decides(spec):
    frames = random_frames(1, 50, 70, spec.channels).expand(4, -1, -1, -1)
    transform = pickle.loads(pickle.dumps(TrainTransform(EVERYTHING, spec, ["a", "b"])))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed % 3)  # must not matter
        clip, label = transform(frames, 1, seeded(seed))
        assert clip.dtype == torch.uint8
        assert clip.shape == (spec.channels, 4, 24, 32)
        assert label == 1
        assert torch.equal(clip, clip[:, :1].expand_as(clip)), "one draw a clip: equal frames stay equal"
        torch.manual_seed(99)
        again, _ = transform(frames, 1, seeded(seed))
        assert torch.equal(clip, again)
        seen.add(clip.numpy().tobytes())
    assert len(seen) == 40


def test_the_frames_that_come_in_are_not_written_to():
    frames = random_frames(4, 24, 32, 3)
    before = frames.clone()
    transform = TrainTransform(dataclasses.replace(EVERYTHING, crop="center", erasing=1.0), RGB, ["a"])
    for seed in range(30):
        transform(frames, 0, seeded(seed))
    assert torch.equal(frames, before)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"crop": "corner"}, "crop must be multi_scale"),
        ({"flip": "yes"}, "flip must be auto, on or off"),
        ({"scales": ()}, "scales"),
        ({"area": (0.5, 1.5)}, "area"),
        ({"aspect": (2.0, 1.0)}, "aspect"),
        ({"color_jitter": -0.1}, "color_jitter"),
        ({"erasing": 1.1}, "erasing"),
        ({"speed": -0.5}, "speed must be at least 0"),
        ({"time_shift": -0.1}, "time_shift must be at least 0"),
        ({"rand_augment_magnitude": 11}, "rand_augment_magnitude"),
    ],
)
def test_settings_out_of_range_are_named(change, what):
    with pytest.raises(ConfigError, match=what):
        TrainTransform(dataclasses.replace(PLAIN, **change), RGB, ["a"])


@pytest.mark.parametrize(
    ("frames", "came"),
    [
        (torch.zeros(4, 24, 32, 3), r"float32 \(4, 24, 32, 3\)"),
        (torch.zeros(4, 24, 32, 1, dtype=torch.uint8), r"uint8 \(4, 24, 32, 1\)"),
        (torch.zeros(24, 32, 3, dtype=torch.uint8), r"uint8 \(24, 32, 3\)"),
        (torch.zeros(0, 24, 32, 3, dtype=torch.uint8), r"uint8 \(0, 24, 32, 3\)"),
        (np.zeros((4, 24, 32, 3), np.uint8), "ndarray"),
    ],
)
def test_wrong_frames_are_described(frames, came):
    for transform in (TestTransform(RGB), lambda x: TrainTransform(PLAIN, RGB, ["a"])(x, 0, seeded())):
        with pytest.raises(ConfigError, match=rf"must be uint8 \(T, H, W, 3\).*got {came}"):
            transform(frames)


def test_wrong_number_of_crops():
    with pytest.raises(ConfigError, match="num_crops must be 1"):
        TestTransform(RGB, 2)


# --- flips and their labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "flip_map", "expected"),
    [
        (["run", "jump"], {}, [0, 1]),
        (["moves-left", "moves-right", "grows"], {}, [1, 0, 2]),
        (["Right to left", "Left to right"], {}, [1, 0]),
        (["swipe_LEFT", "swipe_right"], {}, [1, 0]),
        (["Turning Hand Clockwise", "Turning Hand Counterclockwise"], {}, [1, 0]),
        (["anti-clockwise", "clockwise", "bright", "leftover", "copyright"], {}, [1, 0, 2, 3, 4]),
        (["moves-left", "jump"], {}, None),
        (["left and right", "still"], {}, None),
        (["left-hand", "left_hand", "right-hand", "right_hand"], {}, [2, 3, 0, 1]),
        (["go left", "go LEFT", "go right"], {}, None),
        (["port", "starboard", "left", "right"], {"port": "starboard"}, [1, 0, 3, 2]),
        (["port", "starboard"], {"port": "starboard", "starboard": "port"}, [1, 0]),
        (["turn left", "drehe rechts"], {"turn left": "drehe rechts"}, [1, 0]),
        (["all right", "jump"], {"all right": "all right"}, [0, 1]),
        ([], {}, []),
    ],
)
def test_flip_labels(classes, flip_map, expected):
    assert flip_labels(classes, flip_map) == expected


def test_flip_labels_of_the_map_alone():
    assert flip_labels(["left", "right", "a", "b"], {"a": "b"}, from_names=False) == [0, 1, 3, 2]
    assert flip_labels(["left", "b"], {}, from_names=False) == [0, 1]


def test_wrong_flip_maps_are_named():
    with pytest.raises(ConfigError, match="no class is named 'prot'; did you mean port"):
        flip_labels(["port", "starboard"], {"prot": "starboard"})
    with pytest.raises(ConfigError, match="'b' is in two pairs"):
        flip_labels(["a", "b", "c"], {"a": "b", "b": "c"})


def flip_outcomes(flip: str, classes: list[str], label: int, **change: Any) -> set[tuple[bool, int]]:
    frames = random_frames(4, 24, 32, 3)
    straight = frames.permute(3, 0, 1, 2)
    transform = TrainTransform(dataclasses.replace(PLAIN, flip=flip, **change), RGB, classes)
    outcomes = set()
    source = seeded()
    for _ in range(40):
        clip, after = transform(frames, label, source)
        assert torch.equal(clip, straight) or torch.equal(clip, straight.flip(-1))
        outcomes.add((not torch.equal(clip, straight), after))
    return outcomes


def test_a_flip_exchanges_the_label_with_the_picture():
    pair = ["moves-left", "moves-right", "grows"]
    assert flip_outcomes("auto", pair, 0) == {(False, 0), (True, 1)}
    assert flip_outcomes("auto", pair, 2) == {(False, 2), (True, 2)}
    assert flip_outcomes("auto", pair, -1) == {(False, -1), (True, -1)}
    assert flip_outcomes("auto", ["moves-left", "grows"], 0) == {(False, 0)}
    assert flip_outcomes("on", ["moves-left", "grows"], 0) == {(False, 0), (True, 0)}
    assert flip_outcomes("on", ["a", "b"], 0, flip_map={"a": "b"}) == {(False, 0), (True, 1)}
    assert flip_outcomes("off", pair, 0) == {(False, 0)}


# --- operations on a clip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (clip_ops.autocontrast, ImageOps.autocontrast),
        (clip_ops.equalize, ImageOps.equalize),
        (lambda clip: clip_ops.posterize(clip, 3), lambda image: ImageOps.posterize(image, 3)),
        (lambda clip: clip_ops.solarize(clip, 100), lambda image: ImageOps.solarize(image, 100)),
    ],
    ids=["autocontrast", "equalize", "posterize", "solarize"],
)
def test_mappings_of_values_equal_pillow(channels, ours, pillow):
    clip = natural_clip(channels)
    rounding = 1 if pillow is ImageOps.autocontrast else 0  # Pillow's floats fall below exact integers here and there
    assert distance(ours(clip), with_pillow(clip, pillow)) <= rounding
    flat = torch.full_like(clip, 77)
    assert torch.equal(ours(flat), with_pillow(flat, pillow))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.3])
def test_colour_agrees_with_pillow(channels, factor):
    clip = natural_clip(channels)
    for name, enhancer in [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ]:
        reference = with_pillow(clip, lambda image, enhancer=enhancer: enhancer(image).enhance(factor))
        assert distance(clip_ops.adjust_colour(clip, **{name: factor}), reference) <= 1, name


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.9])
def test_sharpness_agrees_with_pillow(factor):
    clip = natural_clip(frames=1)
    noisy = (clip.int() + torch.randint(-20, 20, clip.shape, generator=seeded())).clamp(0, 255).byte()
    reference = with_pillow(noisy, lambda image: ImageEnhance.Sharpness(image).enhance(factor))
    assert distance(clip_ops.sharpen(noisy, factor), reference) <= 1


def test_colour_of_all_three_is_one_after_the_other():
    clip = natural_clip()
    together = clip_ops.adjust_colour(clip, brightness=0.9, contrast=0.8, saturation=0.7)
    parts = clip_ops.adjust_colour(clip_ops.adjust_colour(clip, saturation=0.7), contrast=0.8)
    assert distance(together, clip_ops.adjust_colour(parts, brightness=0.9)) <= 2


def test_affine_agrees_with_pillow():
    clip = natural_clip(frames=1)
    height, width = clip.shape[-2:]
    a, b, c, d, tx, ty = 0.9, 0.2, -0.1, 1.1, 3.5, -2.25
    middle_x, middle_y = width / 2, height / 2
    coefficients = (
        *(a, b, middle_x + tx - a * middle_x - b * middle_y),
        *(c, d, middle_y + ty - c * middle_x - d * middle_y),
    )
    reference = with_pillow(
        clip,
        lambda image: image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR),
    )
    ours = clip_ops.affine(clip, (a, b, c, d), (tx, ty))
    inside = clip_ops.affine(torch.full_like(clip, 255), (a, b, c, d), (tx, ty)) == 255  # edges are blended or not
    assert inside.float().mean() > 0.6
    assert distance(ours[inside], reference[inside]) <= 2


def test_geometry_by_exact_cases():
    clip = natural_clip(height=30, width=30)
    assert distance(clip_ops.rotate(clip, 90), clip.rot90(1, (-2, -1))) <= 1
    moved = clip_ops.affine(clip, (1, 0, 0, 1), (4, 0))
    assert distance(moved[..., :-4], clip[..., 4:]) <= 1
    assert (moved[..., -4:] == 128).all(), "mid grey comes in"


@pytest.mark.parametrize("name", list(RandAugment.OPERATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_keeps_type_shape_and_input(name, channels):
    clip = natural_clip(channels)
    before = clip.clone()
    operation = RandAugment.OPERATIONS[name]
    for level in (0.0, 0.7, 1.0):
        for sign in (-1, 1):
            changed = operation(clip, level, sign)
            assert changed.dtype == torch.uint8
            assert changed.shape == clip.shape
            assert torch.equal(clip, before)
    if name not in ("autocontrast", "equalize"):
        assert distance(operation(clip, 0.0, 1), clip) <= 1, "strength 0 changes nothing"
    if name != "identity" and not (name == "saturation" and channels == 1):
        assert distance(operation(clip, 0.9, -1), clip) > 1
    tiny = clip[..., :1, :2]
    assert operation(tiny, 0.7, 1).shape == tiny.shape


def test_rand_augment_draws_all_operations(monkeypatch):
    drawn = []
    spies = {name: (lambda clip, level, sign, name=name: drawn.append((name, level, sign)) or clip) for name in "abc"}
    monkeypatch.setattr(RandAugment, "OPERATIONS", spies)
    augment = RandAugment(2, 7)
    source = seeded()
    for _ in range(60):
        augment(natural_clip(), source)
    assert len(drawn) == 120
    assert set(drawn) == {(name, 0.7, sign) for name in "abc" for sign in (-1, 1)}


def test_erasing_covers_one_box_in_every_frame():
    clip = torch.full((3, 4, 40, 60), 7, dtype=torch.uint8)
    for seed in range(50):
        erased = clip_ops.erase(clip, (0.0, 0.5, 1.0), seeded(seed)) != clip
        box = erased[0, 0]
        assert torch.equal(erased, box.expand_as(erased))
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert box.sum() == len(rows) * len(columns)
        assert 0.01 < box.float().mean() < 0.36
    assert set(clip_ops.erase(clip, (0.0, 0.5, 1.0), seeded())[:, 0].flatten(1).unique().tolist()) == {0, 7, 128, 255}


# --- normalisation and mixing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["rgb", "grey"])
def test_normalize(spec):
    clips = random_frames(2, spec.channels, 4, 6, 5)
    for c in range(spec.channels):
        expected = (clips[:, c].double() / 255 - spec.mean[c]) / spec.std[c]
        torch.testing.assert_close(normalize(clips, spec)[:, c].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(normalize(clips[0], spec), normalize(clips, spec)[0])
    assert torch.equal(normalize(clips, spec, torch.bfloat16), normalize(clips, spec).bfloat16())
    with pytest.raises(ConfigError, match=r"must be uint8 .* got float32 \(2, "):
        normalize(clips.float(), spec)
    with pytest.raises(ConfigError, match=r"got uint8 \(2, 4, 4, 6, 5\)"):
        normalize(random_frames(2, 4, 4, 6, 5), spec)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_mixed_targets_tell_the_true_shares(mixup, cutmix):
    mix = BatchMix(mixup, cutmix, num_classes=8)
    labels = torch.arange(8)
    clips = F.one_hot(labels, 8).float()[:, :, None, None, None].expand(8, 8, 3, 20, 30)  # channel = class
    kinds = set()
    for seed in range(30):
        mixed, targets = mix(clips, labels, seeded(seed))
        assert mixed.shape == clips.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        torch.testing.assert_close(mixed.mean((2, 3, 4)), targets, atol=1e-5, rtol=0)
        assert torch.equal(mixed[:, :, 0], mixed[:, :, 2])
        pasted = bool(((mixed == 0) | (mixed == 1)).all())
        kinds.add("same" if torch.equal(mixed, clips) else "pasted" if pasted else "blended")
        again, _ = mix(clips, labels, seeded(seed))
        assert torch.equal(mixed, again)
    expected = ({"blended"} if mixup else set()) | ({"pasted"} if cutmix else set()) or {"same"}
    assert kinds - {"same"} == expected - {"same"}
    assert clips[0, 0].min() == 1, "the input stays"


def test_shares_follow_the_beta_distribution():
    mix = BatchMix(0.4, 0.0, num_classes=2)
    labels = torch.tensor([0, 1])
    source = seeded()
    targets = torch.stack([mix(torch.zeros(2, 1, 1, 1, 1), labels, source)[1][0, 0] for _ in range(2000)])
    mixed = targets[targets < 1]  # the permutation leaves every second batch as it is
    assert abs(mixed.mean() - 0.5) < 0.03
    assert abs(mixed.var() - 0.25 / 1.8) < 0.02


def test_wrong_batches_are_described():
    mix = BatchMix(0.2, 0.0, 4)
    with pytest.raises(ConfigError, match=r"clips must be float .* got uint8"):
        mix(random_frames(2, 3, 4, 6, 5), torch.tensor([0, 1]), seeded())
    with pytest.raises(ConfigError, match=r"labels must be int64 \(2,\), got int64 \(3,\)"):
        mix(torch.zeros(2, 3, 4, 6, 5), torch.tensor([0, 1, 2]), seeded())
    with pytest.raises(ConfigError, match="at least 0"):
        BatchMix(-1.0, 0.0, 4)


@pytest.mark.parametrize("shape", [(56, 80), (60, 120), (120, 60)])
def test_smaller_test_crops_lie_in_the_middle_and_along_the_longer_side(shape):
    height, width = shape
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    for axis, picture in (("height", rows), ("width", columns)):
        frames = picture[None, ..., None].expand(2, -1, -1, 3).contiguous()
        spec = InputSpec(num_frames=2, size=(28, 40))
        crops = TestTransform(spec, 3, crop_area=0.81)(frames).float()[:, 0, 0]
        largest = TestTransform(spec, 1)(frames).float()[0, 0, 0]
        middles = crops.mean((1, 2))
        assert abs(middles[1] - (largest.mean())) < 1
        along = "height" if height / width > 28 / 40 else "width"
        assert (middles[2] - middles[0] > 3) == (axis == along)
        reach = crops[1].max() - crops[1].min()
        assert abs(reach / (largest.max() - largest.min()) - 0.9) < 0.06


@pytest.mark.parametrize("region", [(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 1.0, 1.0), (0.99, 0.99, 1.0, 1.0)])
def test_only_the_region_is_looked_at(region):
    """As if the frames had been cut to it before; it has a pixel at least."""
    frames = random_frames(4, 40, 60, 3)
    left, top, right, bottom = region
    cut = frames[:, round(40 * top) : round(40 * bottom), round(60 * left) : round(60 * right)]
    cut = cut if cut.numel() else frames[:, -1:, -1:]
    spec, whole = InputSpec(num_frames=4, size=(16, 24), region=region), InputSpec(num_frames=4, size=(16, 24))
    assert torch.equal(TestTransform(spec, 3)(frames), TestTransform(whole, 3)(cut))
    augment = AugmentConfig()
    for seed in range(5):
        clip, _ = TrainTransform(augment, spec, ("a", "b"))(frames, 0, seeded(seed))
        assert torch.equal(clip, TrainTransform(augment, whole, ("a", "b"))(cut, 0, seeded(seed))[0])
