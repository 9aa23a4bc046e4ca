"""`rushes COMMAND [CONFIG.yaml] [--key.path value ...] [--resume] [--json] [--debug]`

What a command is: a module in `recipes/` with a `Config` and a `main`.

    class Config(align.config.Config):
        out: Path = Path("runs/example")
        \"\"\"Folder of the run.\"\"\"

    def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
        ...
        return {"out": str(cfg.out), "loss": 0.1}

`main` gets the loaded configuration and returns what the command found: text, numbers, lists and mappings. With `--json` standard output is exactly that, as one
JSON object (an error is `{"error": {"kind": ..., "message": ...}}`), otherwise `key: value` lines. Progress and remarks belong on standard error. Errors are
raised as `base_model.errors` says. A benchmark, `recipes/bench/<name>.py`, is the same with a field `quick: bool`; its `main` returns `{"rows": [flat mappings]}`.

Exit status: 0; 2 user or environment; 3 stopped by a guard or a self-check; 130 or 143 interrupted and saved; 1 a bug.

Nothing heavy is imported before the command is known, and the environment is set before torch is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import difflib
import importlib
import itertools
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from base_model.errors import Interrupted, RushesError, UserError

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # with the default, two busy processes slow small models down 10 to 60 times
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # set it to 0 to let a command download a model you named
}

KEPT_MEMORY = {
    -8: 1,  # M_ARENA_MAX: threads share what one of them gave back
    -3: 32 << 20,  # M_MMAP_THRESHOLD: larger blocks than 32 MiB, the most there is, still go back to the system
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the rest does not
    -2: 64 << 20,  # M_TOP_PAD
}
"""glibc's settings (`mallopt(3)`). As it comes it returns every large tensor to the system when it is freed, and the next one costs a page fault for each 4 KiB."""


class Command(NamedTuple):
    """The module of a command, what it does, in one sentence, the keys that its first words give, those that further words may; without any a first word is a configuration.

    shared: whether the processes that torchrun starts share its work; others are refused there, for they would do all of it each, and write over one another."""

    module: str
    help: str
    words: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    shared: bool = False


COMMANDS = {
    "doctor": Command("recipes.doctor", "Say what this machine can do, and what is missing for what."),
    "demo": Command("recipes.demo", "Do everything: data, SFT, takes, rankings, reward model, constrained RL, report.", shared=True),
    "pretrain": Command("recipes.pretrain", "Make the shipped base model again.", shared=True),
    "vae": Command("recipes.vae", "Make the shipped video VAE again.", shared=True),
    "match": Command("recipes.match", "Make the shipped matchers of clips and captions again, from which reward models start."),
    "quality": Command("recipes.quality", "Make the shipped judges of quality again, which every reward model holds beside its matcher."),
    "upsample": Command("recipes.upsample", "Learn a stage of a cascade: twice as many pixels a side, or twice as many frames.", shared=True),
    "temporal": Command("recipes.temporal", "Make a video model of an image model: keyframes, or the frames between them.", shared=True),
    "curate": Command("recipes.curate", "Measure clips, keep the good ones, say why the others are not: rushes curate INPUT.", ("input",)),
    "caption": Command("recipes.caption", "Describe a folder of clips with a vision-language model: a caption a clip, flagged where something speaks against it."),
    "caption-train": Command("recipes.caption_train", "Fine-tune a captioner on clips and their captions; without either, a tiny one on the built-in world.", shared=True),
    "encode": Command("recipes.encode", "Encode a folder of captioned clips once: latents and text states, kept on disk.", shared=True),
    "sft": Command("recipes.sft", "Fine-tune a base model on curated prompt-video pairs.", shared=True),
    "expand": Command("recipes.expand", "Teach a language model to make prompts long: SFT on pairs, then GRPO against the reward of the clips.", shared=True),
    "generate": Command("recipes.generate", "Make clips of prompts and keep them in a clip store.", shared=True),
    "verify": Command("recipes.verify", "Say what a clip's C2PA manifest tells, and whether it holds: rushes verify FILE.", ("file",)),
    "import-rankings": Command("recipes.import_rankings", "Read preferences in a public format: rushes import-rankings FORMAT FILE.", ("format", "file")),
    "export-rankings": Command("recipes.export_rankings", "Write rankings in a public format: rushes export-rankings FORMAT FOLDER FILE.", ("format", "folder", "file")),
    "reward-model": Command("recipes.reward_model", "Learn a reward model from ranked clips."),
    "evaluate-reward": Command("recipes.evaluate_reward", "Judge a reward model on rankings it has not seen; write the report."),
    "serve-reward": Command("recipes.serve_reward", "Serve a reward model over HTTP to other processes and machines."),
    "vlm-reward": Command("recipes.vlm_reward", "Learn a reward from ranked clips on top of a vision-language model.", shared=True),
    "latent-reward": Command("recipes.latent_reward", "Distil a reward on pixels into one that scores latents at any noise level, without decoding.", shared=True),
    "ddpo": Command("recipes.ddpo", "Move a model toward the reward: DDPO with LoRA under a safety limit.", shared=True),
    "ppo": Command("recipes.ppo", "Move a model toward the reward: PPO with a critic and LoRA under a safety limit.", shared=True),
    "grpo": Command("recipes.grpo", "Move a model toward the reward: GRPO with LoRA under a safety limit.", shared=True),
    "nft": Command("recipes.nft", "Move a model toward the reward: forward-process reinforcement (DiffusionNFT) with LoRA under a safety limit.", shared=True),
    "dpo": Command("recipes.dpo", "Move a model toward what people preferred, or toward the better of its own clips: DPO with LoRA.", shared=True),
    "reward-gradient": Command("recipes.reward_gradient", "Move a model up the gradient of a reward: DRaFT, AlignProp, ReFL or VADER with LoRA under a safety limit.", shared=True),
    "rounds": Command("recipes.rounds", "Go in rounds: rank the new policy's clips, learn the reward anew, go on with RL.", shared=True),
    "check": Command("recipes.check", "Check an RL configuration before its first expensive second: rushes check CONFIG.yaml [--recipe NAME].", ("file",), shared=True),
    "evaluate": Command("recipes.evaluate", "Compare models on the same prompts and seeds; write the report."),
    "compare": Command("recipes.compare", "Say which of two runs makes the better clips, blind: rushes compare RUN_A RUN_B [--by judge|guard|people].", ("run_a", "run_b")),
    "audit": Command("recipes.audit", "Draw clips that people look at to find out how good the safety filters are: rushes audit FOLDER --clips STORE.", ("folder",)),
    "safety-train": Command("recipes.safety_train", "Learn a clip filter from tags, from reviewers' readings or from planted hazards."),
    "safety-report": Command("recipes.safety_report", "Say what people found of a safety filter, with intervals: rushes safety-report FOLDER.", ("folder",)),
    "app": Command("recipes.app", "Open the web app in which people rank clips and judge the filters: rushes app ACTION [FOLDER].", ("action",), ("folder",)),
    "bench": Command("recipes.bench", "Measure something: rushes bench NAME [--quick]."),
}

USAGE = """rushes COMMAND [CONFIG.yaml] [--key.path value ...] [--resume] [--json] [--debug]

{commands}

  --resume   go on with the run that is in --out
  --json     standard output is one JSON object
  --debug    show the traceback of an error
  --help     with a command: its keys and their defaults

Without CONFIG.yaml a command uses its tiny configuration, which needs a CPU and seconds to minutes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {flag for flag in ("--resume", "--json", "--debug", "--help") if flag in words} | ({"--help"} if "-h" in words else set())
    words = [word for word in words if word not in flags and word != "-h"]
    _open_standard_streams()
    as_json = "--json" in flags
    if not words and "--help" in flags:
        return _say(json.dumps({"help": usage()}) if as_json else usage())
    if not words:
        return (_report(UserError("no command. `rushes --help` lists them"), as_json=True, debug=False) if as_json else _say(usage())) or 2
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _keep_memory()
    atexit.register(leave_group)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _stdout_to_stderr() if as_json else contextlib.nullcontext():
            result = _run(words, flags)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, as_json=as_json, debug="--debug" in flags)
    finally:
        signal.signal(signal.SIGTERM, before)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process speaks for all
        return 0
    if as_json:
        return _say(json.dumps({"help": result} if isinstance(result, str) else plain(result)))
    return _say(result if isinstance(result, str) else _lines(plain(result)))


def _keep_memory() -> None:
    """What was freed is used again, where the C library is glibc and its settings are nobody's choice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in KEPT_MEMORY.items():
            mallopt(option, value)


def leave_group() -> None:
    """Ends the connections between torchrun's processes, at the end of each: threads of gloo that are at work when Python is gone abort it, which torchrun takes for a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def usage() -> str:
    """What `rushes --help` prints."""
    return USAGE.format(commands="\n".join(f"  {name:<17}{command.help}" for name, command in COMMANDS.items()))


def _run(words: list[str], flags: set[str]) -> dict[str, Any] | str:
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown command {name!r}, on the command line. Did you mean {nearest}? `rushes --help` lists them")
    if name == "bench":
        return _bench(rest, flags)
    module = _import(COMMANDS[name].module, name)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not COMMANDS[name].shared and "--help" not in flags:
        raise UserError(f"rushes {name} works in one process, and torchrun started {started}, WORLD_SIZE. Start it without torchrun: `rushes {name}`")
    if "--help" in flags:
        return _command_help(name, COMMANDS[name].help, module, words=[*COMMANDS[name].words, *(f"[{word}]" for word in COMMANDS[name].further)])
    from align.config import load

    config, overrides = arguments_of(name, rest)
    result: dict[str, Any] = module.main(load(module.Config, config, overrides), resume="--resume" in flags)
    return result


def arguments_of(name: str, rest: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(configuration, `--key value` words) of what follows a command's name."""
    keys = COMMANDS[name].words
    if name == "check":
        return None, _check_words(rest)
    if not keys:
        return (Path(rest[0]), list(rest[1:])) if rest and not rest[0].startswith("-") else (shipped_config(name), list(rest))
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    further = COMMANDS[name].further
    if given and not len(keys) <= len(given) <= len(keys) + len(further):
        raise UserError(f"{len(given)} words after {name}, on the command line. Write rushes {name} {' '.join([*keys, *(f'[{word}]' for word in further)]).upper()}")
    return None, [*(f"--{key}={word}" for key, word in zip([*keys, *further], given, strict=False)), *rest[len(given) :]]


def _check_words(rest: Sequence[str]) -> list[str]:
    """`[CONFIG.yaml] [--recipe NAME]` and whatever else, which is for the recipe's configuration, as words for that of `check`."""
    words = [*rest]
    file = [f"--file={words.pop(0)}"] if words and not words[0].startswith("-") else []
    recipe = []
    for place, word in enumerate(words):
        if word == "--recipe" or word.startswith("--recipe="):
            recipe, words[place : place + 1 + (word == "--recipe")] = [f"--recipe={word.partition('=')[2] or ''.join(words[place + 1 : place + 2])}"], []
            break
    return [*file, *recipe, *([f"--keys={json.dumps(words)}"] if words else [])]


def _bench(rest: list[str], flags: set[str]) -> dict[str, Any] | str:
    from align.config import commit, load, versions

    known = benchmarks()
    if not rest or rest[0] not in known:
        if "--help" in flags:
            return "rushes bench NAME [--quick] [--json]\n\n" + "".join(f"  {name}\n" for name in known)
        got = f"unknown benchmark {rest[0]!r}, did you mean {difflib.get_close_matches(rest[0], known, n=1, cutoff=0.0)[0]}?" if rest and known else "which benchmark?"
        raise UserError(f"{got} There are: {', '.join(known) or 'none yet'}. Write rushes bench NAME [--quick]")
    module = _import(f"recipes.bench.{rest[0].replace('-', '_')}", f"bench {rest[0]}")
    if "--help" in flags:
        return _command_help(f"bench {rest[0]}", (module.__doc__ or "").partition("\n")[0], module, takes_file=False)
    from recipes.doctor import hardware

    measured_by = commit()  # now: files may change while it measures
    rows: list[dict[str, Any]] = module.main(load(module.Config, None, rest[1:]), resume="--resume" in flags)["rows"]
    return {"command": " ".join(["rushes bench", *rest]), "commit": measured_by, "versions": versions(), "hardware": hardware(), "rows": rows}


def benchmarks() -> list[str]:
    """The names `rushes bench` knows: the files of `recipes/bench/`."""
    return sorted(file.stem.replace("_", "-") for file in (Path(__file__).parent / "bench").glob("*.py") if not file.stem.startswith("_"))


def shipped_config(command: str) -> Path | None:
    """`recipes/configs/tiny/<command>.yaml`, the dashes being underscores; None where the defaults are the tiny configuration."""
    file = Path(__file__).parent / "configs" / "tiny" / f"{command.replace('-', '_')}.yaml"
    return file if file.exists() else None


def _import(name: str, command: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing.partition(".")[0] in ("align", "base_model", "reward", "recipes") and missing != name:
            raise
        needed = f"`rushes {command}` is not part of this installation" if missing == name else f"`rushes {command}` needs the package {missing!r}, which is not installed"
        raise UserError(f"{needed}. See `rushes doctor`") from error


def _command_help(name: str, sentence: str, module: ModuleType, *, takes_file: bool = True, words: Sequence[str] = ()) -> str:
    from align.config import help_text

    shipped = shipped_config(name)
    default = f"\nWithout CONFIG.yaml: {shipped}\n" if shipped else ""
    file = "".join(f"{word.upper()} " for word in words) or ("[CONFIG.yaml] " if takes_file else "")
    return f"rushes {name} {file}[--key.path value ...] [--resume] [--json] [--debug]\n\n{sentence}\n{default}\n{help_text(module.Config)}\n"


# Results


def plain(value: Any) -> Any:
    """`value` as JSON can say it: paths become text, one-element tensors and arrays numbers, and what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    return str(value)


def _lines(result: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(result, sort_keys=False, allow_unicode=True, width=10_000) if result else ""


def _report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    bug = not isinstance(error, RushesError | KeyboardInterrupt)
    result = getattr(error, "result", None)
    if not as_json and result:
        _say(_lines(plain(result)))
    message = " ".join(str(error).split()) if not isinstance(error, KeyboardInterrupt) else "interrupted. Go on with --resume"
    if debug or bug:
        _complain("".join(traceback.format_exception(error)).rstrip())
    if bug:
        message = f"this is a bug in rushes, please report it with the lines above: {type(error).__name__}: {message}"
    _complain(f"rushes: {message}")
    if as_json:
        _say(json.dumps({"error": {"kind": type(error).__name__, "message": message}, **({} if result is None else {"result": plain(result)})}))
    return error.exit_status if isinstance(error, RushesError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _open_standard_streams() -> None:
    """A stream that was closed before we began (`>&-`) leads nowhere, instead of into the next file that is opened."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _lead_nowhere(number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _say(text: str) -> int:
    """Writes one text to standard output. The exit status: 0, also where the reader has gone (`| head`), and 2 where it cannot be written."""
    try:
        print(text.rstrip("\n"), end="\n" if text else "", flush=True)
    except OSError as error:
        _lead_nowhere(sys.stdout.fileno())  # what is still buffered would fail once more at exit
        if not isinstance(error, BrokenPipeError):
            _complain(f"rushes: cannot write to standard output: {error.strerror}. Free some space or send it elsewhere")
            return UserError.exit_status
    return 0


def _complain(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _lead_nowhere(sys.stderr.fileno())


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Interrupted("terminated; what was finished is kept. Go on with --resume", number)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever the command, its libraries and its children print goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    sys.exit(main())
