"""The `mage-tune` command: each verb parses, calls one function of the package, and prints.

Whatever is heavy (torch, transformers) is imported inside the verb that needs it, so that --help stays quick.
Exit codes: 0 done, 1 a bug of ours, 2 something for the user to fix (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import mage_tune

app = typer.Typer(
    name="mage-tune",
    help="Mask-guided fine-tuning of block-diffusion language models for sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The shipped recipes, and the schema of a recipe.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated.")
]
LayerBudgets = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keys of each layer, as mage-tune budgets measured them.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe.")]


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code; errors for people are one line."""
    arguments = sys.argv[1:] if argv is None else argv
    # PEFT 0.21 asks transformers 5.23 by a name that is going away; nothing the user could do about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    try:
        typer.main.get_command(app)(args=arguments, prog_name="mage-tune")
    except SystemExit as done:
        if done.code == 130:
            print("interrupted", file=sys.stderr)
        raise
    except Exception as error:
        if "--debug" in arguments:
            raise
        line, code = describe_error(error)
        print(f"{_rank()}error: {line}", file=sys.stderr)
        sys.exit(code)


def _rank() -> str:
    """Which of several processes speaks, on a line of its own, as the others may be in the middle of one."""
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return f"\nrank {rank} of {processes}: " if processes not in ("", "1") else ""


def describe_error(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code: 2 when the user can do something about it, 1 when it is our bug."""
    text = " ".join(str(error).split())
    if "No space left" in text or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the disk is full ({text}); free some space and run the same command again", 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which must not be imported for this
        return "out of GPU memory; lower train.rows or data.length, or set train.checkpointing=non_reentrant", 2
    if isinstance(error, (ValueError, OSError)):
        return text or type(error).__name__, 2
    return f"unexpected {type(error).__name__}: {text} (--debug shows where; please report it)", 1


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(mage_tune.__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeName,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, stop.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune: a recipe in, a run folder with a LoRA adapter out."""
    from mage_tune.recipe import load_recipe, resolved_yaml

    loaded = load_recipe(find_recipe(recipe), overrides or ())
    if dry_run:
        typer.echo(resolved_yaml(loaded), nl=False)
        return
    from mage_tune.run import train as run
    from mage_tune.stability import TrainingStopped
    from mage_tune.watch import Samples, ideal_step_s

    try:
        folder = run(loaded, watch=Samples, ideal_step_s=ideal_step_s(loaded))
    except TrainingStopped as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            typer.echo(str(stopped), err=True)
        raise typer.Exit(128 + stopped.signum) from None  # as a shell reports a process that a signal ended
    if int(os.environ.get("RANK", "0")) == 0:
        if loaded.model.random_weights is None:
            typer.echo(f"adapter written to {folder}; prove it with: mage-tune eval {folder}")
        else:
            typer.echo(f"adapter of RANDOM WEIGHTS written to {folder}: it shows that the run works, and fits no model")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Set = None,
    gpu: Annotated[str, typer.Option(help="Card: h100, h200, b200, a100, a100-40gb, l40s, rtx4090.")] = "h100",
    memory_gib: Annotated[float | None, typer.Option(help="Memory of the card, where it has another.", min=0.1)] = None,
    gpus: Annotated[int, typer.Option(help="Cards that train together.", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="What divides the work on several: ddp, fsdp2, zero3.")] = "ddp",
    try_it: Annotated[
        bool, typer.Option("--probe", help="Also run the longest batch on this machine, on random weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Will it fit, and how long will it take: memory and time of a recipe, from its config alone, without a GPU."""
    from rich.console import Console

    from mage_tune import plan as planning
    from mage_tune.recipe import load_recipe

    if try_it and gpus > 1:
        raise ValueError("--probe: tries one GPU; leave --gpus out")
    loaded = load_recipe(find_recipe(recipe), overrides or ())
    found = planning.plan(loaded, gpu, memory_gib, engine=engine, gpus=gpus)
    probed = planning.probe(loaded) if try_it else None
    if as_json:
        typer.echo(planning.as_json(found, probed))
    else:
        planning.show(found, Console(), probed)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, checkpoint folder or Hub id.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to compare a model with.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="What to measure: quick, standard, full or a YAML file; the recipe's by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="Override a key of the recipe's eval section, or of the suite."),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Compare two results.json (or folders with one), sample by sample, B with A."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare results whose settings differ.")] = False,
    list_suites: Annotated[bool, typer.Option("--list-suites", help="List the shipped suites.")] = False,
    print_suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="Print a shipped suite, to copy and change.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Prove it: base against adapter, exact against sparse attention; goes on where it was interrupted."""
    if list_suites:
        from mage_tune.evals.suites import shipped_suites
        from mage_tune.recipe import load_suite

        for name, file in shipped_suites().items():
            typer.echo(f"{name:10} {load_suite(file).description}")
    elif print_suite is not None:
        from mage_tune.evals.suites import find_suite

        typer.echo(find_suite(print_suite).read_text(encoding="utf-8"), nl=False)
    elif compare is not None:
        from mage_tune.evals.compare import compare_files

        compare_files(*compare, force=force)
    elif target is None:
        raise ValueError(
            "name a run folder or model to evaluate, or give --compare A B, --list-suites or --print-suite"
        )
    else:
        from mage_tune.evals.run import evaluate as run

        run(target, adapter=adapter, overrides=overrides or [], suite=suite)


@app.command()
def budgets(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, checkpoint folder or Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter of a model.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Training text, as a recipe names it; a run's own by default.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Keys per KV head and layer, on average.", min=4)] = 128,
    dense_layers: Annotated[int, typer.Option(help="First layers that stay exact.", min=0)] = 2,
    context: Annotated[int, typer.Option(help="Tokens of a window.", min=1)] = 2048,
    windows: Annotated[int, typer.Option(help="Windows of text.", min=1)] = 24,
    blocks: Annotated[int, typer.Option(help="Blocks of a window that are probed.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Times that all layers are measured.", min=1)] = 2,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; layer_budgets.json in the run folder by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Spend the keys where they count: measure how many each layer should keep, as many in all."""
    from mage_tune.evals.layer_budgets import Settings, run

    settings = Settings(budget, dense_layers, context, windows, blocks, rounds)
    found = run(target, settings, adapter=adapter, text=text, out=out, force=force)
    typer.echo(f"written to {found}; decode with --attention mage --layer-budgets {found}")


def check_layer_budgets(path: Path | None) -> None:
    """Refuse a file that decoding would refuse, before minutes of loading."""
    if path is not None:
        from mage_tune.decode.layer_budgets import read_layer_budgets

        read_layer_budgets(path)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")] = None,
    family: Annotated[str | None, typer.Option(help="Block-diffusion family, where the config does not tell.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block, where the config does not tell.")] = None,
    mask_id: Annotated[int | None, typer.Option(help="Id of the mask token, where the config does not tell.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens written.", min=1)] = 128,
    threshold: Annotated[float | None, typer.Option(help="Confidence above which a token is accepted.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most denoising steps per block.", min=1)] = None,
    attention: Annotated[str, typer.Option(help="Who picks the keys of later steps: exact, mage, ...")] = "exact",
    budget: Annotated[int | None, typer.Option(help="Keys kept per KV head by a sparse rule.", min=1)] = None,
    layer_budgets: LayerBudgets = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="By the decode engine: kernels and CUDA graphs.")] = False,
    debug: Debug = False,
) -> None:
    """Write text block by block."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("empty prompt; say something")
    check_layer_budgets(layer_budgets)
    from mage_tune.lm import load

    lm = load(model, adapter=adapter, family=family, block_size=block_size, mask_id=mask_id)
    if lm.tokenizer is None:
        raise ValueError(f"{model}: comes without a tokenizer, so it cannot read text")
    is_chat = not raw and getattr(lm.tokenizer, "chat_template", None)
    out = lm.generate(
        [{"role": "user", "content": text}] if is_chat else text,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        steps=steps,
        attention=attention,
        budget=budget,
        layer_budgets=layer_budgets,
        fast=fast,
    )
    typer.echo(out.text)
    forwards = ", ".join(f"{count} {kind}" for kind, count in out.forwards.items() if count)
    typer.echo(f"{len(out.tokens)} tokens in {out.blocks} blocks; forwards: {forwards}", err=True)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")] = None,
    family: Annotated[str | None, typer.Option(help="Block-diffusion family, where the config does not tell.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block, where the config does not tell.")] = None,
    mask_id: Annotated[int | None, typer.Option(help="Id of the mask token, where the config does not tell.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 512,
    threshold: Annotated[float | None, typer.Option(help="Confidence above which a token is accepted.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    attention: Annotated[str, typer.Option(help="Who picks the keys of later steps: exact, mage, ...")] = "exact",
    budget: Annotated[int | None, typer.Option(help="Keys kept per KV head by a sparse rule.", min=1)] = None,
    layer_budgets: LayerBudgets = None,
    debug: Debug = False,
) -> None:
    """Talk to a model, its blocks shown while they are denoised; /help inside."""
    check_layer_budgets(layer_budgets)
    from mage_tune.decode.chat import chat as run
    from mage_tune.lm import load

    lm = load(model, adapter=adapter, family=family, block_size=block_size, mask_id=mask_id)
    run(
        lm,
        system=system,
        attention=attention,
        budget=budget,
        layer_budgets=layer_budgets,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        temperature=temperature,
    )


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run or adapter folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Base checkpoint; the adapter's own record by default.")] = None,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base and save a checkpoint that loads by itself."""
    if out.exists():  # before minutes of loading
        raise ValueError(f"{out}: exists already; choose another folder or remove it")
    from mage_tune.publish.merge import merge as run

    typer.echo(f"merged checkpoint written to {run(adapter, out, base)}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Finished run folder.")],
    repo: Annotated[str, typer.Option(metavar="NAMESPACE/NAME", help="Repository; created when it is missing.")],
    base_id: Annotated[
        str | None, typer.Option(metavar="NAMESPACE/NAME", help="Hub id of a base that was trained on from a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence, where the base model's card does not tell it.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created when it is missing.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Publish the whole merged model, not the adapter.")] = False,
    collection: Annotated[str | None, typer.Option(metavar="SLUG", help="Collection to list it in.")] = None,
    without_eval: Annotated[
        bool, typer.Option("--without-eval", help="Publish an unevaluated run; the card will say so.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write RUN/publish, print files and card, send nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Ship it: adapter, recipe, evaluation and card to the Hub, in one commit."""
    from mage_tune import publish as verb

    options = verb.Options(
        repo_id=repo,
        base_id=base_id,
        license=license,
        private=private,
        revision=revision,
        merged=merged,
        collection=collection,
        without_eval=without_eval,
        dry_run=dry_run,
    )
    publication = verb.prepare(run, options)
    for name, size in publication.sizes.items():
        typer.echo(f"{size / 1e6:10.3f} MB  {name}")
    typer.echo(f"{sum(publication.sizes.values()) / 1e6:10.3f} MB  in all")
    if dry_run:
        typer.echo(f"\n{publication.card}")
        typer.echo(f"written to {verb.write_dry_run(publication, run)}; nothing was sent")
        return
    commit = verb.publish(publication, options)
    typer.echo(
        f"published to {repo}, commit {commit}" if commit else f"{repo} holds all of this already; no commit made"
    )


@app.command()
def bench(
    model: Annotated[
        list[str] | None, typer.Option(help="Published shape (1.5B, 7B, SDAR-8B) or a checkpoint; may be repeated.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Prefix lengths in tokens.")] = "131072,32768,8192",
    batches: Annotated[str, typer.Option(help="Rows that decode together.")] = "1,4,8",
    steps: Annotated[str, typer.Option(help="Denoising steps of a block.")] = "32,16,8",
    rules: Annotated[
        str, typer.Option(help="Selection rules.")
    ] = "exact,mage,quest,quest-gemm,quest-mean,sparsed,sparsed-budget,tidal,sparse-dllm",
    budget: Annotated[int, typer.Option(help="Keys kept per KV head.", min=1)] = 512,
    seconds: Annotated[float, typer.Option(help="Time for timing; the most important rows come first.")] = 240.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
    profile: Annotated[Path | None, typer.Option(help="JSON file for a profile, kernel by kernel.")] = None,
    debug: Debug = False,
) -> None:
    """Time decoding on this machine: milliseconds per output block, exact and sparse, against the roofline."""
    from mage_tune.bench.run import Options
    from mage_tune.bench.run import bench as run

    run(
        Options(
            models=model or ["7B", "1.5B", "SDAR-8B"],
            contexts=_numbers(contexts, "contexts"),
            batches=_numbers(batches, "batches"),
            steps=_numbers(steps, "steps"),
            rules=rules.split(","),
            budget=budget,
            seconds=seconds,
            out=out,
            plots=plots,
            profile=profile,
            command=" ".join(["mage-tune", *sys.argv[1:]]),
        )
    )


def _numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"--{option} {text!r}: give whole numbers separated by commas")
    return [int(part) for part in text.split(",")]


@app.command()
def engine(
    name: Annotated[str, typer.Argument(help="ddp, fsdp2, zero2 or zero3.")],
    debug: Debug = False,
) -> None:
    """Print where an engine's config for several GPUs lies: accelerate launch --config_file $(mage-tune engine ddp)."""
    from mage_tune.engines import config_file

    typer.echo(config_file(name))


@app.command()
def doctor(debug: Debug = False) -> None:
    """Check this machine: versions, device, disk, Hub settings, attention registration."""
    from rich.console import Console
    from rich.table import Table

    from mage_tune.doctor import examine

    findings = examine()
    table = Table(title=f"mage_tune {mage_tune.__version__}", title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.is_fine else "[red]bad[/]", finding.what, finding.found)
    Console().print(table)
    bad = [finding.what for finding in findings if not finding.is_fine]
    if bad:
        raise ValueError(f"not fit for use: {', '.join(bad)}")


@recipes_app.command(name="list")
def list_recipes() -> None:
    """Names and first lines of the shipped recipes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for file in shipped_recipes():
        table.add_row(file.stem, file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
    Console().print(table)


@recipes_app.command()
def show(recipe: RecipeName) -> None:
    """Print a recipe as shipped, comments included."""
    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@recipes_app.command()
def copy(
    recipe: RecipeName,
    to: Annotated[Path, typer.Argument(help="Folder to copy it to.")] = Path("."),
    debug: Debug = False,
) -> None:
    """Copy a shipped recipe, and the small data it comes with, to a folder of yours."""
    from mage_tune.recipe import load_recipe

    source = find_recipe(recipe)
    home = source.resolve().parent
    loaded = load_recipe(source)
    named = [s.path for s in loaded.data.sources] + ([loaded.eval.text] if loaded.eval.text else [])
    files = [source.resolve(), *dict.fromkeys(p for p in map(Path, named) if p.is_file() and p.is_relative_to(home))]
    targets = [to / file.relative_to(home) for file in files]
    if targets[0].exists():
        raise ValueError(f"{targets[0]}: exists already; choose another folder or remove it")
    for file, target in zip(files, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(file, target)
        typer.echo(target)


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools."""
    import json

    from mage_tune.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path as it is (reading it says if it is not there), or a shipped recipe by its name.

    Raises:
        ValueError: a name, and no recipe is called so.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if name not in shipped:
        raise ValueError(f"{name}: no such file or shipped recipe; shipped are {', '.join(shipped)}")
    return shipped[name]


def shipped_recipes() -> list[Path]:
    """Every shipped recipe, by name."""
    return sorted(recipes_folder().glob("*.yaml"))


def recipes_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(mage_tune.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


if __name__ == "__main__":
    main()
