"""The command line: `posttrain COMMAND ...`. Each command's options are a typed record, turned into flags by tyro."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

COMMANDS = {
    "train": "CONFIG      train as the config says; the same command resumes",
    "evaluate": "CONFIG      loss, metrics and gradient norms on its data, without training",
    "inspect": "CONFIG      show its data as the model sees it, here and as a page",
    "plan": "CONFIG      will it fit on these chips, how long will it take, what will it cost",
    "generate": "MODEL ROWS  complete prompts or chats, JSON Lines in and out",
    "chat": "MODEL       talk to a model in the terminal",
    "logprobs": "MODEL ROWS  log-probability of every token, JSON Lines in and out",
    "score": "MODEL ROWS  what a reward model gives each row, JSON Lines in and out",
    "import": "GGUF OUT    turn a GGUF file into a Hugging Face directory",
    "export": "RUN OUT     write a run's checkpoint as a Hugging Face directory",
}

YAML_WORDS = {"true": "True", "false": "False", "null": "None"}
"""Config values may be spelled as in the file."""

USAGE = "\n".join(
    [
        "usage: posttrain COMMAND ... [--section.field VALUE ...]",
        "",
        "Turns a pretrained language model into an assistant.",
        "",
        *(f"  {name:<9} {text}" for name, text in COMMANDS.items()),
        "",
        "posttrain COMMAND --help lists a command's options; every config key is one (configs/ has examples).",
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit codes, by which launch/supervise.sh decides whether to start it again: 0 done, 1 crashed,
    2 wrong input or usage, 75 other processes did not come, 130 or 143 stopped by a signal (and saved, in training)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if words else 2)
    command, rest = words[0], words[1:]
    if command == "--version":
        from posttrain import __version__

        print(__version__)
        raise SystemExit(0)
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see posttrain --help"
        print(f"posttrain: {command!r} is no command; {hint}", file=sys.stderr)
        raise SystemExit(2)
    from posttrain.errors import UserError
    from posttrain.parallel.ending import note_failure

    _set_up_environment()
    failed = True
    try:
        code = HANDLERS[command](rest)
        failed = False
    except UserError as error:
        print(f"posttrain {command}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if failed:
        note_failure(code)
    raise SystemExit(code)


def _set_up_environment() -> None:
    """Before JAX starts: compiled programs are kept between runs, and of logs only what concerns the user is shown."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("posttrain").setLevel(logging.INFO)
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "posttrain", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _parse(options: Any, arguments: Sequence[str], command: str, default: Any = None) -> Any:
    import tyro

    return tyro.cli(
        options,
        prog=f"posttrain {command}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        **({} if default is None else {"default": default}),
    )


def _config_command(command: str, arguments: Sequence[str], options: Any) -> tuple[Any, Any]:
    """(config, options) of `posttrain COMMAND CONFIG [--section.field VALUE ...] [--option ...]`."""
    import dataclasses

    import tyro

    from posttrain.config import Config, load_config

    wants_help = any(word in ("-h", "--help") for word in arguments)
    if not arguments or arguments[0].startswith("-"):
        if not wants_help:
            print(f"usage: posttrain {command} CONFIG [--section.field VALUE ...]", file=sys.stderr)
            raise SystemExit(2)
        config, rest = Config(), list(arguments)
    else:
        config, rest = load_config(arguments[0]), list(arguments[1:])
    config, rest = _take_objective_parameters(config, rest)
    rest = [YAML_WORDS.get(word, word) for word in rest]
    both = dataclasses.make_dataclass(
        "both",
        [
            ("config", Annotated[Config, tyro.conf.arg(name="")], field(default=config)),
            ("options", Annotated[options, tyro.conf.arg(name="")], field(default_factory=options)),
        ],
        frozen=True,
    )
    both.__doc__ = f"posttrain {command} CONFIG: {COMMANDS[command].split('  ')[-1].strip()}."
    parsed = _parse(both, rest, f"{command} CONFIG")
    return _with_parameters(parsed.config, config.objective.model_extra or {}), parsed.options


def _take_objective_parameters(config: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """`--objective.beta 0.2`: which parameters there are depends on the loss, so they are no fields of the config. They
    are checked where the loss is built."""
    import yaml

    prefix, given, rest = "--objective.", {}, []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix(prefix).partition("=")
        name = name.replace("-", "_")
        if not word.startswith(prefix) or name in type(config.objective).model_fields:
            rest.append(word)
            continue
        value = value if equals else next(words, None)
        if value is None:
            print(f"{word}: needs a value", file=sys.stderr)
            raise SystemExit(2)
        given[name] = yaml.safe_load(value)
    return _with_parameters(config, given), rest


def _with_parameters(config: Any, given: dict[str, Any]) -> Any:
    """The config with more parameters of its objective; they are no fields, so nothing else passes them on."""
    objective = type(config.objective).model_validate({**config.objective.model_dump(), **given})
    return config.model_copy(update={"objective": objective})


@dataclass(frozen=True)
class TrainOptions:
    """What `train` does beside training."""

    dry_run: bool = False
    """Print the resolved config and the parameter, sharding and batch tables, and stop."""


def _train(arguments: Sequence[str]) -> int:
    config, options = _config_command("train", arguments, TrainOptions)
    from posttrain.experiment import build
    from posttrain.train.loop import run
    from posttrain.train.overview import describe

    experiment = build(config, rejects_dir=None if options.dry_run else config.run.dir)
    if options.dry_run:
        describe(experiment)
        return 0
    result = run(experiment)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _evaluate(arguments: Sequence[str]) -> int:
    from posttrain.evaluate import EvaluateOptions

    config, options = _config_command("evaluate", arguments, EvaluateOptions)
    from posttrain.evaluate import evaluate

    evaluate(config, options)
    return 0


def _inspect(arguments: Sequence[str]) -> int:
    from posttrain.data.inspect import InspectOptions

    config, options = _config_command("inspect", arguments, InspectOptions)
    options.check()
    from posttrain.data.inspect_page import write_page
    from posttrain.data.inspect_text import show
    from posttrain.experiment import inspect_data

    inspection = inspect_data(config, options)
    if options.html is not None:  # first: whoever reads the output may stop reading
        write_page(inspection, options.html, name=config.run.dir)
    show(inspection, options)
    if options.html is not None:
        print(f"\nwritten: {options.html}")
    return 0


def _plan(arguments: Sequence[str]) -> int:
    from posttrain.plan.command import PlanOptions

    config, options = _config_command("plan", arguments, PlanOptions)
    from posttrain.plan.command import plan

    plan(config, options)
    return 0


def _simple(command: str, module: str, options: str, function: str) -> Callable[[Sequence[str]], int]:
    """A command whose options are one record: `posttrain.MODULE.FUNCTION(OPTIONS)`."""

    def handle(arguments: Sequence[str]) -> int:
        import importlib

        loaded = importlib.import_module(f"posttrain.{module}")
        getattr(loaded, function)(_parse(getattr(loaded, options), arguments, command))
        return 0

    return handle


HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "plan": _plan,
    "generate": _simple("generate", "generate", "GenerateOptions", "generate_file"),
    "chat": _simple("chat", "generate", "ChatOptions", "chat"),
    "logprobs": _simple("logprobs", "logprobs", "LogprobsOptions", "logprobs"),
    "score": _simple("score", "score", "ScoreOptions", "score"),
    "import": _simple("import", "convert", "ImportOptions", "import_model"),
    "export": _simple("export", "convert", "ExportOptions", "export_run"),
}


if __name__ == "__main__":
    main()
