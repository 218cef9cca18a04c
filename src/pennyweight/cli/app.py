"""The verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli import lookups, machines, shelves

app = typer.Typer(
    name="pennyweight",
    help="Fit any model to a budget, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shelves.claims, name="claims")
app.add_typer(shelves.levers, name="levers")
app.add_typer(shelves.laws, name="laws")
app.add_typer(shelves.assets, name="assets")
app.command()(shelves.rows)
app.command()(machines.tune)
app.command()(machines.devices)
app.command()(lookups.embeddings)

#: What `plan` follows and takes where nothing is said.
_LAW, _UTILIZATION = "chinchilla (refit)", 0.4

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Short name, directory, GGUF file, or cached hub id.")]
Data = Annotated[str, typer.Option(help="Text to calibrate and judge on: short name, file or folder.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as JSON, too.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Levers = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Levers to use: a,b only these; +c with the usual ones; -d without it."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="LIMIT", help='"25%", "35MB", "params=90M", ...; may be given several times.'),
]
Floor = Annotated[str | None, typer.Option(metavar="BOUND", help='Least quality: "perplexity<=1.10x", "cosine>=0.99".')]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"pennyweight {installed('pennyweight')}")
        raise typer.Exit


@app.command()
def measure(
    model: Model,
    data: Data = "wiki",
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="The original to compare with.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of held-out text to score.")] = 32,
    timed: Annotated[bool, typer.Option("--timed/--untimed", help="Take times.")] = True,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Bound every operation on --device instead; a config.json will do.")
    ] = False,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Take time and memory of training and generation apart instead.")
    ] = False,
    idealized: Annotated[
        bool, typer.Option("--idealized", help="Fit the time of any query to a few runs instead.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="See `devices`; here is this machine, after `tune`; or a profile as JSON.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences, of --roofline and --breakdown.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each; the longest prompt of --idealized.")] = 512,
    precision: Annotated[
        str | None, typer.Option(metavar="BITS", help="Of --roofline: w4a16, w4a16kv8, fp16, int8, ...")
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """What a model costs and how good it is, with intervals."""
    if roofline or breakdown or idealized:
        machines.taken_apart(
            model, roofline=roofline, breakdown=breakdown, idealized=idealized, device=device, batch=batch,
            context=context, precision=precision, json=json,
        )  # fmt: skip
        return
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.measure import measure

    with progress() as report:
        found = measure(
            model, data, reference=reference, windows=windows, timed=timed, seed=seed,
            report=lambda done, total: report("scoring windows", done, total),
        )  # fmt: skip
    told(found, json)


@app.command()
def fit(
    model: Model,
    budget: Budgets = None,
    floor: Floor = None,
    data: Data = "wiki",
    levers: Levers = None,
    time: Annotated[str | None, typer.Option(metavar="DURATION", help='Time that repair may take: "10min".')] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the fitted model goes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict cost, quality, time and memory instead.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Overwrite = False,
    repair: Annotated[
        bool | None, typer.Option("--repair/--no-repair", help="Tune against the original after solving.")
    ] = None,
    seed: Seed = 0,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT", help="Plan what it holds, and write it, too: gguf, openvino, compressed-tensors."
        ),
    ] = None,
) -> None:
    """Fit a model to budgets and a floor: the main job."""
    from pennyweight.cli import summary
    from pennyweight.cli.progress import progress
    from pennyweight.fit import fit

    with progress() as report:
        found = fit(
            model, data=data, budgets=budget or (), floor=floor, levers=levers, time=time, out=out, dry_run=dry_run,
            resume=resume, overwrite=overwrite, repair=repair, seed=seed, target=target, progress=report,
        )  # fmt: skip
    print(found if dry_run else summary.of(found.receipt, found.directory))


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As of fit; without one, a training run is planned.")
    ] = None,
    budget: Budgets = None,
    floor: Floor = None,
    data: Data = "wiki",
    levers: Levers = None,
    seed: Seed = 0,
    compute: Annotated[
        str | None, typer.Option("--compute", metavar="FLOPS", help="Compute for training: 1e21, 3 ZFLOPs.")
    ] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Or hours of one device.")] = None,
    device: Annotated[str | None, typer.Option(help="h100, a100, ... or its peak FLOP/s.")] = None,
    utilization: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = _UTILIZATION,
    money: Annotated[float | None, typer.Option(help="Or an amount, with --price.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a device-hour.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="COUNT", help="Unique training tokens there are: 30B.")] = None,
    serve: Annotated[str | None, typer.Option(metavar="COUNT", help="Tokens served over the model's life: 2T.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="For the weights at deployment: 16GB.")] = None,
    score: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Points (loss, score) of a task, to predict its score.")
    ] = None,
    law: Annotated[
        str,
        typer.Option(metavar="FILE", help="Follow it: a law of N and D that `laws fit --json` wrote, or one by name."),
    ] = _LAW,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the training plan there as a page.")] = None,
    json: Json = None,
) -> None:
    """With a model, what a fit would do, cost and give (fit --dry-run); without one, how to spend training compute."""
    from pennyweight.errors import OptionError

    if model is not None:
        from pennyweight.cli.progress import progress
        from pennyweight.fit import fit

        given = {
            "--compute": compute, "--gpu-hours": gpu_hours, "--device": device, "--money": money, "--price": price,
            "--tokens": tokens, "--serve": serve, "--memory": memory, "--score": score, "--out": out, "--json": json,
            "--law": None if law == _LAW else law,
            "--utilization": None if utilization == _UTILIZATION else utilization,
        }  # fmt: skip
        if of_training := [name for name, value in given.items() if value is not None]:
            raise OptionError(f"plan: {', '.join(of_training)}: of a training run; leave MODEL out, or them")
        with progress() as report:
            found = fit(
                model, data=data, budgets=budget or (), floor=floor, levers=levers, dry_run=True, seed=seed,
                progress=report,
            )  # fmt: skip
        print(found)
        return
    from pennyweight.cli import laws_file
    from pennyweight.cli.tables import emit
    from pennyweight.laws.table import read_csv
    from pennyweight.plan import training
    from pennyweight.safe_write import write_text

    if budget or floor or levers:
        raise OptionError("plan: --budget, --floor and --levers are of a fit; give a MODEL with them")
    try:
        peak: str | float | None = device if device is None else float(device)
    except ValueError:
        peak = device
    planned = training(
        compute, gpu_hours=gpu_hours, device=peak, utilization=utilization, money=money, price_per_hour=price,
        data_tokens=tokens, inference_tokens=serve or 0.0, memory=memory,
        law=laws_file.chosen(law),
        score=None if score is None else read_csv(score),
    )  # fmt: skip
    print(planned)
    if out:
        write_text(out, planned.html())
    if json:
        emit(planned.to_json(), json)


@app.command()
def apply(
    model: Model,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model goes.")],
    data: Data = "wiki",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    stream: Annotated[
        bool, typer.Option("--stream", help="Block by block, for a checkpoint larger than memory.")
    ] = False,
) -> None:
    """Run a given recipe."""
    from pennyweight.apply import apply
    from pennyweight.cli import summary
    from pennyweight.cli.progress import progress

    if stream:
        from pennyweight.larger import apply_streaming

        with progress() as report:
            saved = apply_streaming(model, recipe, data=data, out=out, overwrite=overwrite, seed=seed, progress=report)
        print(f"{saved.bytes:,} bytes in {saved.directory}; `pennyweight measure` judges it where it fits into memory")
        return
    with progress() as report:
        found = apply(model, recipe, data=data, out=out, overwrite=overwrite, seed=seed, progress=report)
    print(summary.of(found.receipt, found.directory))


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A merge as YAML: method, base and models.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes.")],
    overwrite: Overwrite = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; as many as cores when left out.")] = None,
) -> None:
    """Merge several models into one, tensor by tensor; they may be larger than memory."""
    from pennyweight.merge.recipe import merge

    print(merge(recipe, out=out, overwrite=overwrite, workers=workers).words)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The directory of a fit, or any MODEL.")],
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="safetensors, gguf, onnx, compressed-tensors or openvino.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory; else a file that ends in .gguf or .onnx.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Round to f32, f16, bf16; of gguf also q8_0, and only what its blocks do not hold."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for another engine: transformers (safetensors), llama.cpp (gguf), vLLM, OpenVINO or ONNX."""
    from pennyweight.export import export

    print(export(model, format, out, dtype=dtype, overwrite=overwrite).words)


@app.command()
def compare(
    model: Model,
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPES...", help="Recipe files or lever names.")],
    budget: Budgets = None,
    data: Data = "wiki",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where table and picture go.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Several levers or recipes on the same model at the same budget, in one table."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.compare import compare

    with progress() as report:
        found = compare(model, recipes, budgets=budget or (), data=data, out=out, seed=seed, progress=report)
    told(found, json)


@app.command()
def study(
    model: Model,
    methods: Annotated[str, typer.Option(help="Of rounding: rtn, gptq, lorc.")] = "rtn,gptq,lorc",
    bits: Annotated[str, typer.Option(help="Of weights, 1 to 8.")] = "4,3",
    groups: Annotated[str, typer.Option(help="Input features that share a scale; row for all of them.")] = "128",
    activations: Annotated[
        str, typer.Option(help="What inputs are rounded to: 16 for nothing, 8 or fewer bits, e4m3, e5m2.")
    ] = "16,8",
    data: Data = "wiki",
    windows: Annotated[int, typer.Option(min=2, help="Windows of held-out text to judge by.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where study.json goes.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Quantize under every setting of a grid: method, bits, groups, inputs (all lists after commas)."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.errors import OptionError
    from pennyweight.job import Settings
    from pennyweight.study import study

    def numbers(option: str, text: str) -> list[int | None]:
        words = [word.strip() for word in text.split(",")]
        if not all(word.isdecimal() or (word == "row" and option == "groups") for word in words):
            raise OptionError(f"study: --{option} {text!r}; give whole numbers with commas between")
        return [None if word == "row" else int(word) for word in words]

    with progress() as report:
        found = study(
            model, methods=methods.split(","), bits=[n for n in numbers("bits", bits) if n is not None],
            groups=numbers("groups", groups), activations=activations.split(","), data=data, out=out,
            settings=Settings(length=length, heldout=windows, seed=seed), progress=report,
        )  # fmt: skip
    told(found, json)


@app.command()
def essential(
    model: Model,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="An earlier state of it; may be given several times.")
    ] = None,
    criteria: Annotated[str, typer.Option(help="What is zeroed: magnitude, random.")] = "magnitude,random",
    scopes: Annotated[
        str, typer.Option(help="Zeros over layers: global, layer, erk; none for patterns alone.")
    ] = "global",
    groups: Annotated[
        str | None, typer.Option(metavar="M,...", help="Patterns of N kept in every M, for each N.")
    ] = None,
    sparsities: Annotated[
        str, typer.Option(help="Shares of zeros, rising from 0.")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    floor: Floor = None,
    steps: Annotated[int, typer.Option(min=0, help="Of training after pruning, masks fixed.")] = 0,
    rate: Annotated[float, typer.Option(help="Of that training.")] = 1e-4,
    data: Data = "wiki",
    windows: Annotated[int, typer.Option(min=2, help="Windows of held-out text to judge by.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where essential.json goes.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """How far a model can be pruned for nothing: curves over sparsity, and where they turn (lists after commas)."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.errors import OptionError
    from pennyweight.essential import Tune, essential
    from pennyweight.job import Settings

    try:
        shares = [float(word) for word in sparsities.split(",")]
        sizes = [int(word) for word in groups.split(",")] if groups else []
    except ValueError as error:
        raise OptionError(f"essential: --sparsities, --groups: {error}; give numbers with commas between") from None
    with progress() as report:
        found = essential(
            model, checkpoints=checkpoint or (), criteria=criteria.split(","),
            scopes=[] if scopes == "none" else scopes.split(","), groups=sizes, sparsities=shares, floor=floor,
            tune=Tune(steps=steps, rate=rate), data=data, out=out,
            settings=Settings(length=length, heldout=windows, seed=seed), progress=report,
        )  # fmt: skip
    told(found, json)


@app.command()
def components(
    model: Model,
    part: Annotated[
        list[str], typer.Option(metavar="NAME=PATH,...", help="A part: paths of its modules, * for anything; several.")
    ],
    sparsities: Annotated[
        str, typer.Option(help="Shares of zeros, rising from 0.")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    totals: Annotated[str, typer.Option(help="Shares of zeros to split over the parts.")] = "0.3,0.4,0.5",
    score: Annotated[str, typer.Option(help="That ranks weights: magnitude, wanda, sparsegpt, nowag.")] = "magnitude",
    scope: Annotated[str, typer.Option(help="Ranked within: global (the part), matrix, row.")] = "global",
    data: Data = "wiki",
    windows: Annotated[int, typer.Option(min=2, help="Windows of held-out text to judge by.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """How much pruning each part of a model stands, and the best split of a total over them (lists after commas)."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.components import study_text_model
    from pennyweight.errors import OptionError
    from pennyweight.job import Settings

    named = {name: paths.split(",") for name, _, paths in (one.partition("=") for one in part)}
    if len(named) < len(part) or [""] in named.values():
        raise OptionError(f"components: --part {' '.join(part)}; give NAME=PATH,..., each name once")
    try:
        shares, wanted = ([float(word) for word in words.split(",")] for words in (sparsities, totals))
    except ValueError as error:
        raise OptionError(f"components: --sparsities, --totals: {error}; give numbers with commas between") from None
    with progress() as report:
        found = study_text_model(
            model, named, sparsities=shares, totals=wanted, score=score, scope=scope, data=data,
            settings=Settings(length=length, heldout=windows, seed=seed), progress=report,
        )  # fmt: skip
    told(found, json)


@app.command()
def frontier(
    model: Model,
    data: Data = "wiki",
    levers: Levers = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where table and picture go.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """The whole curve of quality against bytes, from one measurement of sensitivity."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.frontier import frontier

    with progress() as report:
        found = frontier(model, data=data, levers=levers, out=out, seed=seed, progress=report)
    told(found, json)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a fit.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original; else as the receipt names it.")
    ] = None,
    json: Json = None,
) -> None:
    """Re-measure a fitted directory against its receipt; exit code 1 when it does not hold."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import told
    from pennyweight.verify import verify

    with progress() as report:
        found = verify(directory, model=model, progress=report)
    told(found, json)
    if not found.holds:
        raise typer.Exit(1)


def commands() -> dict[str, Any]:
    """Every command by its words, as click has it: what documentation and tests walk over."""
    root = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in getattr(root, "commands", {}).items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {sub}": c for sub, c in inner.items()}
    return found
