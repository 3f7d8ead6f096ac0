"""One function a verb: from the words after it to a room below, and what came of it to the terminal.

Heavy imports stay inside the functions, so that help is there at once.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lean3d import recipes
from lean3d.cli import show
from lean3d.cli.arguments import (
    Bench,
    Check,
    Convert,
    Data,
    Demo,
    Doctor,
    Eval,
    Models,
    Predict,
    Prepare,
    Recipes,
    Report,
    Stream,
    Train,
    parse,
)
from lean3d.cli.plan import plan
from lean3d.cli.show import err, out
from lean3d.config import TrainConfig, to_dict, to_json
from lean3d.errors import ConfigError, DecodeError, did_you_mean

if TYPE_CHECKING:
    from lean3d.bench.nets import Net
    from lean3d.checkpoint import Checkpoint
    from lean3d.stream import Session


def train(argv: Sequence[str]) -> int:
    """Train, go on with a training, or show what a training would be."""
    assumed = argv[0] if argv and _is_recipe(argv[0]) else "light"
    args = parse(Train, argv, _train_defaults(assumed))
    if args.resume is not None:
        if args != dataclasses.replace(_train_defaults(assumed), resume=args.resume):
            raise ConfigError(
                "--resume goes on with the run's own settings, so nothing else can be set: "
                f"lean3d train --resume {shlex.quote(args.resume)}"
            )
        return _fit(resume=args.resume)
    recipe, root = _recipe_and_data(args.words)
    if recipe != assumed:  # the recipe came after an option
        args = parse(Train, argv, _train_defaults(recipe))
    data = dataclasses.replace(args.data, root=root) if root else args.data
    if not data.root and not args.dry_run:
        raise ConfigError(
            "which data? Give a folder that has a folder of clips for each class, or an annotation file: "
            f"lean3d train {recipe} path/to/clips"
        )
    config = TrainConfig(recipe, args.model, data, args.augment, args.optim, args.init, args.test, args.run)
    if args.dry_run:
        plan(config)
        return 0
    return _fit(config)


def evaluate(argv: Sequence[str]) -> int:
    """Test a model; what is not set is as in its training."""
    args = parse(Eval, argv)
    from lean3d import checkpoint
    from lean3d import evaluate as room

    found = checkpoint.load(args.run)
    recipe = found.recipe or TrainConfig()
    args = parse(Eval, argv, Eval(args.run, views=recipe.test, data=recipe.data))
    before = to_dict(recipe.data)
    changes = {key: value for key, value in to_dict(args.data).items() if value != before[key]}
    changes |= {"root": args.root} if args.root else {}
    if args.stream:
        return _evaluate_stream(args, found, changes, shlex.join(["lean3d", "eval", *argv]))
    folder = Path(args.out) if args.out else room.results_folder(found.path, args.others)
    results = room.run(
        args.run,
        args.others,
        data=changes,
        split=args.split,
        views=args.views,
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        fast=args.fast,
        out=folder,
        command=shlex.join(["lean3d", "eval", *argv]),
    )
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    show.results(results, written["data"]["split"])
    if args.others:
        out.print()
        members = zip((args.run, *args.others), written["ensemble"], strict=True)
        rows = [(name, f"{member['metrics']['top1']:.4f}") for name, member in members]
        show.pairs("of the ensemble", "top-1", [*rows, ("mean of scores", f"{results.top1:.4f}")])
    out.print(f"\nresults    {folder / 'results.json'}\nconfusion  {folder / 'confusion.png'}", soft_wrap=True)
    return 0


def predict(argv: Sequence[str]) -> int:
    """Predict files and folders; of several, those that can't be decoded are named and the others go on."""
    args = parse(Predict, argv)
    if not args.videos:
        raise ConfigError(f"which video? Name a file or a folder: lean3d predict {args.run} clip.mp4")
    if args.engine == "ray":
        return _predict_many(args)
    if args.out or args.workers:
        raise ConfigError("--out and --workers go with --engine ray; annotated videos go to --video")
    from lean3d import predict as room
    from lean3d.data.dataset import BadFile

    many = len(args.videos) > 1
    videos: list[room.VideoPrediction] = []
    bad: list[BadFile] = []
    for path in map(Path, args.videos):
        video = Path(args.video) if args.video else None
        if video is not None and many:
            video = video / (path.name if path.is_dir() else f"{path.stem}.mp4")
        try:
            found = room.run(
                args.run,
                path,
                top_k=args.top_k,
                stride=args.stride,
                device=args.device,
                fast=args.fast,
                video=video,
                quiet=args.json,
            )
        except DecodeError as error:
            if not many:
                raise
            bad.append(BadFile(error.path, error.reason))
        else:
            videos += found.videos
            bad += found.bad_files
    predictions = room.Predictions(tuple(videos), tuple(bad))
    if args.json:
        print(predictions.to_json())
        return 0
    out.print(predictions.table())
    if args.video:
        out.print(f"annotated  {args.video}", soft_wrap=True)
    return 0


def data(argv: Sequence[str]) -> int:
    """Check a data set, or prepare it."""
    action = parse(Data, argv).action
    return _prepare(action) if isinstance(action, Prepare) else _check(action)


def stream(argv: Sequence[str]) -> int:
    """Watch sources; what happens goes to standard output, all else to standard error."""
    args = parse(Stream, argv)
    if args.model is None:
        raise ConfigError("which model? Name a run's folder: lean3d stream SOURCE --model runs/mine")
    if not args.source and args.sources is None:
        raise ConfigError(
            f"which source? Name a file, a camera's number or an address: lean3d stream 0 --model {args.model}"
        )
    from lean3d import stream as room

    words = [*args.source, *(room.read_list(args.sources) if args.sources else ())]
    session = room.Session(args.model, sampling_rate=args.sampling_rate, device=args.device, fast=args.fast)
    _say_gain(session)
    channels = session.model.input_spec.channels
    done = room.run(
        session,
        [
            room.find_source(word, size=args.raw_size, fps=args.fps, channels=channels, timeout=args.timeout)
            for word in words
        ],
        events=args.events,
        lines=args.lines,
        realtime=args.realtime,
        retries=args.retries,
        seconds=args.seconds,
        video=args.video,
        show=args.show,
        write=lambda line: print(line, flush=True),
        console=err,
    )
    return 0 if done.signal is None else 128 + done.signal


def models(argv: Sequence[str]) -> int:
    """The zoo, or one model."""
    args = parse(Models, argv)
    from lean3d.models import list_models, model_arguments

    names = list_models(args.pattern)
    if not names:
        raise ConfigError(f"no model matches {args.pattern!r}: {did_you_mean(args.pattern, list_models())}")
    rows = []
    with out.status("counting") as status:
        for name in names:
            status.update(f"counting {name}")
            rows.append(show.model_row(name))
    if args.markdown:
        show.markdown(rows)
        return 0
    show.models(rows)
    if names == [args.pattern]:
        out.print()
        show.pairs("argument", "default", ((name, str(value)) for name, value in model_arguments(args.pattern).items()))
    return 0


def bench(argv: Sequence[str]) -> int:
    """Time nets on this machine, or count them."""
    args = parse(Bench, argv)
    from lean3d.bench.nets import find_nets

    nets = find_nets(args.nets, num_frames=args.num_frames, size=args.size, options=args.options)
    return _count(args, nets) if args.cost else _time(args, nets)


def convert(argv: Sequence[str]) -> int:
    """Make published weights a checkpoint."""
    args = parse(Convert, argv)
    from lean3d import convert as room

    done = room.run(
        args.source,
        args.file,
        out=args.out,
        model=args.model,
        num_frames=args.num_frames,
        sampling_rate=args.sampling_rate,
        labels=args.labels,
    )
    path = shlex.quote(str(done.path))
    out.print(f"found     {done}", soft_wrap=True, markup=False)
    if args.labels is None:
        out.print("classes   named by their numbers; --labels FILE gives them names", soft_wrap=True)
    out.print(f"\nmodel     {done.path}\ntest it   lean3d eval {path} DATA", soft_wrap=True)
    out.print(f"use it    lean3d predict {path} VIDEO", soft_wrap=True)
    out.print(
        f"tune it   lean3d train DATA --model.name {done.model.spec['name']} --init.weights {path}", soft_wrap=True
    )
    return 0


def show_recipes(argv: Sequence[str]) -> int:
    """The recipes, or one."""
    args = parse(Recipes, argv)
    if args.name is not None:
        print(to_json(recipes.get_recipe(args.name)))
        return 0
    show.pairs("recipe", "what it is", ((name, recipes.describe_recipe(name)) for name in recipes.list_recipes()))
    return 0


def demo(argv: Sequence[str]) -> int:
    """The whole way once."""
    args = parse(Demo, argv)
    from lean3d import demo as room

    room.run(args.out, minutes=args.minutes, clips_per_class=args.clips_per_class, console=out)
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Look at this machine."""
    args = parse(Doctor, argv)
    from lean3d import doctor as room

    findings = room.examine()
    if args.json:
        print(json.dumps(room.to_dict(findings), indent=2))
    else:
        out.print(room.render(findings))
    return 0 if room.healthy(findings) else 1


def report(argv: Sequence[str]) -> int:
    """Write the page about a run."""
    args = parse(Report, argv)
    from lean3d.report import write_report

    path = write_report(args.run, args.out, compare=args.compare, clips=args.clips)
    out.print(f"report  {path}", soft_wrap=True)
    return 0


def _check(args: Check) -> int:
    from lean3d.data_tools import check
    from lean3d.report import write_data_page

    root = Path(args.root)
    out_folder = Path(args.out) if args.out else Path(f"check-{root.absolute().stem}")
    health = check.run(
        dataclasses.replace(args.data, root=args.root),
        out_folder,
        workers=args.workers,
        seconds=args.seconds,
        memory=round(args.memory * 2**30),
        quiet=args.json,
    )
    page = write_data_page(out_folder)
    if args.json:
        print((out_folder / check.CHECK_FILE).read_text(encoding="utf-8").strip())
    else:
        show.health(health)
        out.print(f"\npage      {page}\nmanifest  {out_folder / check.MANIFEST_FILE}", soft_wrap=True)
    return 0 if health.healthy else 1


def _prepare(args: Prepare) -> int:
    from lean3d.data_tools import prepare

    done = prepare.run(
        dataclasses.replace(args.data, root=args.root),
        args.out,
        short_side=args.short_side,
        gop=args.gop,
        codec=args.codec,
        quality=args.quality,
        shards=args.shards,
        shard_mb=args.shard_mb,
        workers=args.workers,
        seconds=args.seconds,
    )
    before = f" ({done.kept} from before)" if done.kept else ""
    out.print(
        f"{done.files} clips{before}, {done.bytes_before / 1e6:.1f} MB before, {done.bytes_after / 1e6:.1f} MB after, "
        f"{len(done.bad)} bad"
    )
    for file in done.bad[:5]:
        out.print(f"bad: {file.path}: {file.reason}", style="red", soft_wrap=True, markup=False)
    if len(done.bad) > 5:
        out.print(f"... and {len(done.bad) - 5} more bad files; all are in bad_files.csv", style="red")
    out.print(f"\ntrain on it  lean3d train {shlex.quote(str(done.root))}", soft_wrap=True)
    return 1 if done.bad else 0


def _evaluate_stream(args: Eval, found: Checkpoint, changes: dict[str, Any], command: str) -> int:
    """Test a model frame by frame."""
    if args.others or args.precision != "fp32":
        raise ConfigError("--stream tests one model, in fp32: leave --with and --precision out")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lean3d import evaluate as room
    from lean3d.stream import Session
    from lean3d.stream import evaluate as streams

    config, manifest, split, clips = room.clips_to_test(found, changes, args.split)
    session = Session(found, device=args.device, fast=args.fast)
    _say_gain(session)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("clips, then joined")
        results = streams.evaluate(
            session,
            clips,
            frame_template=config.frame_template,
            events=args.events,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    about = {
        "command": command,
        "checkpoint": room.describe_checkpoint(found),
        "data": room.describe_data(config, manifest, split),
        "events": to_dict(args.events),
        "versions": room.versions(),
    }
    path = streams.write(results, Path(args.out or found.path.parent) / "stream.json", about)
    out.print(results.table())
    for file in results.bad[:5]:
        out.print(f"bad: {file.path}: {file.reason}", style="red", soft_wrap=True, markup=False)
    out.print(f"\nresults  {path}", soft_wrap=True)
    return 0


def _say_gain(session: Session) -> None:
    """What --fast is worth."""
    from lean3d.fast import FastStream

    if isinstance(session.net, FastStream):
        own, fast = (f"{seconds * 1e3:.2f} ms" for seconds in session.net.seconds)
        gain = (
            f"{fast} a frame, {own} as it is" if session.net.gains else f"no faster, so it runs as it is: {own} a frame"
        )
        err.print(f"compiled: {gain}", soft_wrap=True)


def _predict_many(args: Predict) -> int:
    if not args.out or args.video:
        words = shlex.join(args.videos)
        raise ConfigError(
            "--engine ray writes Parquet files to --out, and no videos: "
            f"lean3d predict {args.run} --engine ray {words} --out DIR"
        )
    from lean3d import batch

    done = batch.run(
        args.run,
        args.videos,
        args.out,
        top_k=args.top_k,
        stride=args.stride,
        device=args.device,
        fast=args.fast,
        workers=args.workers,
        quiet=args.json,
    )
    if args.json:
        print(json.dumps({"out": str(done.out), "videos": done.videos, "bad_files": len(done.bad_files)}))
        return 0
    before = f" ({done.before} from before)" if done.before else ""
    out.print(f"{done.videos} videos{before}, {len(done.bad_files)} bad\n\npredictions  {done.out}/part-*.parquet")
    if done.bad_files:
        out.print(f"bad files    {done.out / batch.BAD_FILE}", soft_wrap=True)
    return 0


def _is_recipe(word: str) -> bool:
    return word.replace("_", "-") in recipes.list_recipes()


def _train_defaults(recipe: str) -> Train:
    base = recipes.get_recipe(recipe)
    return Train(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "recipe"})


def _near_recipe(word: str) -> str:
    """The recipe that may be meant, or where they are listed: all of them would be a long message."""
    near = did_you_mean(word, recipes.list_recipes())
    return near if near.startswith("did you mean") else "`lean3d recipes` lists them"


def _recipe_and_data(words: Sequence[str]) -> tuple[str, str]:
    """What the leading words mean: (recipe, data's root or "")."""
    recipe, rest = (words[0], words[1:]) if words and _is_recipe(words[0]) else ("light", words)
    if len(rest) > 1:
        raise ConfigError(
            f"train takes a recipe and one folder or file of data, got {shlex.join(words)}; {_near_recipe(rest[0])}"
        )
    root = rest[0] if rest else ""
    if root and not Path(root).exists():
        raise ConfigError(
            f"{root!r} is neither a recipe ({_near_recipe(root)}) nor a folder or file that exists. "
            "Type lean3d train [RECIPE] [DATA], for example: lean3d train light path/to/clips"
        )
    return recipe, root


def _fit(config: TrainConfig | None = None, resume: str | None = None) -> int:
    from lean3d.engine import fit

    done = fit(config, resume=resume)
    run = shlex.quote(str(done.run))
    numbers = done.metrics
    if "val_top1" in numbers:
        bad = f", {numbers['bad_files']:.0f} bad files" if "bad_files" in numbers else ""
        out.print(f"[bold]validation top-1 {numbers['val_top1']:.4f}[/bold] (epoch {numbers['epoch'] + 1:.0f}{bad})")
    out.print(f"\nmodel     {done.run}\ntest it   lean3d eval {run}", soft_wrap=True)
    out.print(f"use it    lean3d predict {run} VIDEO\nlook      tensorboard --logdir {run}", soft_wrap=True)
    return 0


def _count(args: Bench, nets: Sequence[Net]) -> int:
    from lean3d.bench import cost

    tiles = cost.parse_tiles(args.tiles)
    measured = cost.measure(nets, tiles)
    if args.json:
        print(cost.to_json(measured, tiles, layers=args.layers))
        return 0
    if args.layers:
        for net in measured:  # wider than most terminals, so not rich's to break
            print(f"{net.net.name}\n{net.cost}\n")
    out.print(cost.cost_table(measured))
    if len(measured) > 1:
        out.print()
        out.print(cost.ratio_table(measured))
    out.print(
        "\nFor one clip. Weights: all parameters. GMACs: multiply-accumulates of convolutions and matrix products. "
        f"fast: multiplications, each axis by F(m, r) with m in {{{', '.join(map(str, tiles))}}} where that saves any.",
        style="dim",
    )
    return 0


def _time(args: Bench, nets: Sequence[Net]) -> int:
    from lean3d.bench import seconds
    from lean3d.bench import show as shown

    report = seconds.measure(
        nets,
        runtimes=seconds.parse_runtimes(args.runtimes),
        threads=seconds.parse_threads(args.threads),
        rounds=args.rounds,
    )
    files = shown.write(report, args.out) if args.out else ()
    if args.json:
        print(report.to_json())
        return 0
    shown.tables(report, out)
    for file in files:
        out.print(f"written  {file}", soft_wrap=True)
    return 0
