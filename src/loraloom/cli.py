"""The command line: one thin command a verb. torch is imported inside a command, so --help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from . import console
from .config import parse_setting
from .errors import INTERRUPTED, Failure, OutOfMemory, UserError
from .progress import starting
from .verbs import cli, model_option, offline_option, with_json


def run(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 failure, 2 usage, 3 data, 4 memory, 5 non-finite, 130 Ctrl-C."""
    debug = "--debug" in (argv if argv is not None else sys.argv)
    try:
        code = cli(args=argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        if debug:
            raise
        console.show_error(error)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        console.show_error(UserError(error.format_message(), hint="--help lists what there is"))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        told = error.__cause__ if isinstance(error, click.Abort) else error  # click puts its own in its place
        console.err.print(Text(str(told or "") or "interrupted"))
        return INTERRUPTED
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported here
            raise
        console.show_error(OutOfMemory(f"the device ran out of memory: {str(error).splitlines()[0]}"))
        return OutOfMemory.exit_code


def main() -> None:
    """The entry point of `loraloom` and `python -m loraloom`."""
    sys.exit(run())


class MergedFormat(click.Choice[str]):
    """What a merged model may be written in; 4 bits pass, to be refused with the reason."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in ("nf4", "fp4", "e2m1") else super().convert(value, param, ctx)


@cli.command()
@click.argument("model", required=False)
@click.option("--online", is_flag=True, help="Ask the hub too; without it no request is made.")
@with_json
def doctor(model: str | None, online: bool, as_json: bool) -> Any:
    """Say what this machine can do, and what to install for the rest; of a MODEL, how it would run on a GPU."""
    from . import doctor as examination

    checks = examination.examine(model, online=online)
    if as_json:
        return [asdict(check) for check in checks]
    return examination.render(checks, console.out)


@cli.command()
@click.argument("id")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--local-dir", help="Copy the files here instead of into the cache.")
@offline_option
@with_json
def download(id: str, revision: str | None, local_dir: str | None, offline: bool, as_json: bool) -> Any:
    """Fetch a model, and show what it is. smollm2-135m-instruct needs no hub."""
    from . import facts, hub

    if local_dir is None:
        folder = hub.resolve(id, revision=revision, offline=offline).path
    else:
        folder = hub.download(id, revision=revision, offline=offline, local_dir=local_dir)
    found = facts.model_facts(folder)
    return console.fields({"folder": str(folder), **asdict(found)}, as_json)


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights to write."
)
@click.option("--allow-pickle", is_flag=True, help="Read .bin files, which could run code.")
@click.option("--tokenizer", help="A folder with the tokenizer, instead of the one in SRC.")
@click.option("--quantize", type=click.Choice(["nf4", "fp4"]), help="Linear layers in bitsandbytes' 4 bits.")
@click.option("--no-double-quant", is_flag=True, help="With --quantize: keep the scales in 32 bits.")
@click.option("--force", is_flag=True, help="Replace DST.")
@with_json
def convert(
    src: str, dst: str, quantize: str | None, no_double_quant: bool, as_json: bool, **options: Any
) -> Any:
    """Turn a GGUF file or .bin weights into a safetensors folder, or a model into 4 bits, and verify it."""
    if quantize is None:
        from . import convert as conversion

        return console.fields(asdict(conversion.convert(src, dst, **options)), as_json)
    from . import quantize_files

    if options.pop("tokenizer"):
        raise UserError("--tokenizer is for GGUF files", hint="leave it out")
    made = quantize_files.quantize_folder(src, dst, table=quantize, double=not no_double_quant, **options)
    return console.fields(asdict(made), as_json)


@cli.command()
@click.argument("file")
@model_option
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting, such as data.prompt=alpaca."
)
@click.option("--previews", default=2, show_default=True, help="Examples to show with their loss mask.")
@offline_option
@with_json
def data(
    file: str, model: str | None, settings: tuple[str, ...], previews: int, offline: bool, as_json: bool
) -> Any:
    """Show what is in a data set: counts, lengths, which tokens are trained."""
    from . import look

    prepared, tokenizer = look.prepare_file(file, model, dict(map(parse_setting, settings)), offline=offline)
    if as_json:
        return prepared.report.to_dict()
    return look.show_file(prepared, tokenizer, console.out, previews=previews)


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `train`; every other setting goes by --set."""
    for option in reversed(
        (
            click.argument("config", required=False),
            model_option,
            click.option("-d", "--data", help="A file of examples, or hf:ID."),
            click.option("-o", "--output", help="The run folder to make."),
            click.option("-c", "--config", "config_file", help="A YAML file; the same as CONFIG."),
            click.option("--method", help="lora, dora, vera ...; theirs: train --settings"),
            click.option("--seed", type=int, help="Of the initial adapter, the order and dropout."),
            click.option(
                "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, repeatable."
            ),
            offline_option,
            click.option("-q", "--quiet", is_flag=True, help="Only errors."),
        )
    ):
        function = option(function)
    return function


def given(
    config: str | None,
    config_file: str | None,
    seed: int | None,
    settings: tuple[str, ...],
    named: dict[str, Any],
) -> tuple[str | None, dict[str, Any]]:
    """The configuration file and the settings that the options of a run name."""
    if config and config_file:
        raise UserError(f"two configuration files: {config} and {config_file}", hint="name one of them")
    chosen = {key: value for key, value in named.items() if value is not None}
    chosen |= {"train.seed": seed} if seed is not None else {}
    return config or config_file, chosen | dict(map(parse_setting, settings))


@cli.command()
@run_options
@click.option("--shape", help="A published model's shape, such as llama3-8b or gpt3-175b; needs no files.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of a pass: train.micro_tokens.")
@click.option(
    "--length", type=click.IntRange(min=1), help="Tokens of the longest example, instead of the data's."
)
@click.option("--gpu", help="Memory to fit into, such as 80GB; without it the first GPU here.")
@click.option("--fit", is_flag=True, help="Plan for the largest pass that fits.")
@with_json
def plan(
    config: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    seed: int | None,
    offline: bool,
    quiet: bool,
    as_json: bool,
    shape: str | None,
    tokens: int | None,
    length: int | None,
    gpu: str | None,
    fit: bool,
    **named: Any,
) -> Any:
    """Say what a run will take: memory by part, the largest pass that fits, disk, steps. Loads no weights.

    \b
    loraloom plan run.yaml --gpu 24GB --fit
    loraloom plan --shape llama2-7b --tokens 8192 --length 2048 --set model.quantize=nf4
    """
    file, chosen = given(config, config_file, seed, settings, named)
    chosen |= {"model": shape} if shape else {}
    chosen |= {"train.micro_tokens": tokens} if tokens else {}
    progress = not (quiet or as_json)
    with starting(shown=progress):
        from . import api

    made = api.plan(
        file,
        shape=shape,
        gpu=gpu,
        length=length,
        fit=fit,
        offline=offline,
        progress=progress,
        settings=chosen,
    )
    return made if as_json else console.show_plan(made)


@cli.command(epilog="All settings: loraloom train --settings")
@run_options
@click.option("--settings", "list_settings", is_flag=True, help="List every setting with its default.")
@with_json
def train(
    config: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    seed: int | None,
    offline: bool,
    quiet: bool,
    list_settings: bool,
    as_json: bool,
    **named: Any,
) -> Any:
    """Fine-tune a model. CONFIG is a YAML file; three lines are enough: model, data, output."""
    if list_settings:
        return show_settings(as_json, named["method"])
    file, chosen = given(config, config_file, seed, settings, named)
    with starting(shown=not (quiet or as_json)):
        from . import api

    view = console.TrainView(quiet=quiet or as_json)
    run = api.train(file, listen=view, offline=offline, progress=not (quiet or as_json), settings=chosen)
    return finish(run, quiet, as_json)


def show_settings(as_json: bool, method: str | None) -> Any:
    """Every setting with its default and what it is for; those of one method, if it is named."""
    from . import look

    rows = look.settings(method)
    if as_json:
        return [{"name": name, "default": default, "description": text} for name, default, text in rows]
    for name, default, text in rows:
        click.echo(f"{name} = {default}\n    {text}")
    return None


@cli.command()
@click.argument("run")
@offline_option
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@with_json
def resume(run: str, offline: bool, quiet: bool, as_json: bool) -> Any:
    """Go on with a run that was stopped or killed, as if it had not been."""
    with starting(shown=not (quiet or as_json)):
        from . import api

    view = console.TrainView(quiet=quiet or as_json)
    return finish(
        api.resume(run, listen=view, offline=offline, progress=not (quiet or as_json)), quiet, as_json
    )


def finish(run: Any, quiet: bool, as_json: bool) -> Any:
    if as_json:
        return run.state | {"path": str(run.path), "checks": run.checks()}
    if not quiet:
        console.show_run(run)
    return None


@cli.command()
@click.argument("run")
@click.argument("out")
@model_option
@click.option(
    "--dtype",
    type=MergedFormat(["float32", "bfloat16", "float16"]),
    help="Of the merged weights, as in the base.",
)
@click.option(
    "--base",
    type=click.Choice(["dequantized", "original"]),
    help="Of a run in 4 bits: the weights that training saw, as by default, or those of the checkpoint.",
)
@click.option("--no-verify", is_flag=True, help="Do not run the merged model beside the adapter.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@offline_option
@with_json
def merge(run: str, out: str, as_json: bool, **options: Any) -> Any:
    """Fold a run's adapter into its base, write the whole model to OUT, and verify it."""
    with starting(shown=not as_json):
        from . import fold

    result = fold.merge(run, out, progress=not as_json, **options)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        console.show_merge(result)
    return 0 if result.ok else Failure.exit_code


@cli.command("eval")
@click.argument("targets", nargs=-1, metavar="RUN...")
@model_option
@click.option("--data", help="A file of examples, instead of the run's held-out ones.")
@click.option(
    "--answers", type=click.IntRange(min=0), help="Examples to answer for exact match; 200 by default."
)
@click.option("--max-new-tokens", type=int, help="Length of an answer.")
@click.option(
    "--metrics", help="More of the answers, with commas: bleu, nist, rouge_l, cider, meteor, sql (queries)."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Instead of the run's.")
@click.option(
    "--tasks",
    help="Benchmarks of lm-eval instead, with commas: its own names, a YAML file, mc1, mc2, causative, facts, "
    "2ds, 4ds, article2 for these six, or list.",
)
@click.option("--data-dir", help="With --tasks: a folder with the six tasks' files, which then need no hub.")
@click.option("--shots", type=click.IntRange(min=0), help="With --tasks: solved examples before a question.")
@click.option("--limit", type=click.IntRange(min=1), help="With --tasks: only the first items of each.")
@click.option("--chat-template", is_flag=True, help="With --tasks: write prompts by the chat template.")
@click.option("--batch", type=click.IntRange(min=1), help="With --tasks: rows at once, instead of what fits.")
@click.option("--name", help="With --tasks: of the result in the run's eval folder.")
@offline_option
@with_json
def evaluate(targets: tuple[str, ...], as_json: bool, **options: Any) -> Any:
    """Held-out loss, perplexity and exact match, or --tasks: the base beside the tuned model.

    With --tasks several runs or models stand in one table.

    \b
    loraloom eval runs/first
    loraloom eval runs/first --tasks article2 --data-dir DIR
    loraloom eval MODEL MODEL --tasks mc2,arc_easy --limit 200
    """
    with starting(shown=not as_json):
        from . import eval_verb

    return eval_verb.run(targets, options, console.out, as_json=as_json)


@cli.command()
@click.argument("run")
@model_option
@click.option("--ask", help="Answer this and leave.")
@click.option("--compare", is_flag=True, help="With --ask: answer with the base too.")
@click.option("--base", is_flag=True, help="Begin with the base model.")
@click.option("--system", help="A system message.")
@click.option("--temperature", default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample among the likeliest tokens of this share."
)
@click.option("--max-new-tokens", default=512, show_default=True, help="Length of an answer.")
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@offline_option
@with_json
def chat(
    run: str,
    model: str | None,
    ask: str | None,
    compare: bool,
    base: bool,
    offline: bool,
    as_json: bool,
    **settings: Any,
) -> Any:
    """Talk with a tuned model; /base switches to the base and back."""
    if ask is None and (as_json or compare):
        raise UserError(f"{'--json' if as_json else '--compare'} needs a question", hint="--ask TEXT")
    with starting(shown=not as_json):
        from . import chat as terminal
        from . import use

    conversation = use.converse(use.open_target(run, model=model, offline=offline), **settings)
    conversation.base = base or conversation.adapters is None
    if ask is not None:
        terminal.ask_once(conversation, ask, console=console.out, as_json=as_json, compare=compare)
        return None
    return terminal.loop(conversation, console.out)


@cli.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "-o", "--output", help="The page: report.html in the run, or comparison.html here, unless named."
)
@with_json
def report(runs: tuple[str, ...], output: str | None, as_json: bool) -> Any:
    """Write a run's page again, or one page that compares several runs.

    Compared are all that the runs were measured at (`loraloom eval`, with --tasks and --metrics too), what they cost,
    and the settings that differ; --json has the same.
    """
    from . import report as page
    from .rundir import Run

    opened = [Run.open(path) for path in runs]
    if len(opened) == 1:
        found: dict[str, Any] = {
            "report": str(page.build_report(opened[0], Path(output) if output else None))
        }
    else:
        found = page.compare(opened, Path(output or "comparison.html"))
    return found if as_json else click.echo(found["report"])


@cli.command()
@click.argument("folder", default="runs")
@with_json
def runs(folder: str, as_json: bool) -> Any:
    """List the runs in a folder."""
    from .results import runs_table

    rows = runs_table(folder)
    if as_json:
        return rows
    if not rows:
        raise UserError(f"there are no runs in {folder}", hint="loraloom train makes one")
    return console.show_runs(rows)


from . import cli_inspect, cli_study  # noqa: E402, F401

if __name__ == "__main__":
    main()
