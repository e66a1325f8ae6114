"""Stock SGLang and streaming side by side: the same server command, the same question, and the cost of each load.

One `Trial` is one server: it is started, asked and stopped, and its load reports are read. `Comparison` holds the two
trials of a model. Servers run one after the other, so that neither takes memory or cores from the other.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe import chart, report
from sglang_overlay.observe.formats import bytes_text, seconds_text
from sglang_overlay.settings import MODE_VARIABLE, REPORT_VARIABLE
from workbench.bench import page_tables
from workbench.loads import serving
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.quality.accuracy import Evaluation, gsm8k
from workbench.releases import environment

Mode = Literal["stock", "streaming"]

SWITCH: dict[Mode, str] = {"stock": "0", "streaming": "1"}
SPECS = (
    CheckpointSpec("qwen3_moe", size="demo", files=4),
    CheckpointSpec("deepseek_v3", size="demo", files=4),
)
QUESTION = "What does it take to load a large model?"
ANSWER_TOKENS = 12
"""Few, because the CPU reference platform takes about a second for each."""
ACCURACY_NOISE = 0.03
"""Tolerance for the share of right answers: kernels sum in a different order for other batches, so answers vary."""
WIDTH_WITHOUT_TERMINAL = 120
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to look at."""


@dataclass(frozen=True)
class Subject:
    """A model to try.

    Attributes:
        name: for headings and file names.
        model: what `--model-path` gets: a folder, or a name on the hub.
        arguments: server arguments besides the model and the quantization.
        evaluation: further questions for both servers, if any.
    """

    name: str
    model: str
    arguments: tuple[str, ...] = ()
    evaluation: Evaluation | None = None

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder if it is on this machine."""
        path = Path(self.model)
        return path if path.is_dir() else None


@dataclass(frozen=True)
class Trial:
    """One server's answer, the load reports of all its ranks, and its share of right answers if it was evaluated."""

    mode: Mode
    answer: str
    reports: tuple[report.LoadReport, ...]
    accuracy: float | None = None

    @property
    def peak(self) -> int:
        """Highest peak of any rank, in bytes above start: it decides whether the model fits."""
        return max(found.memory.peak_above_start for found in self.reports)

    @property
    def seconds(self) -> float:
        """Load time of the slowest rank."""
        return max(found.seconds for found in self.reports)

    @property
    def final_bytes(self) -> int:
        """Bytes of the loaded model on the rank that holds the most."""
        return max(found.final_bytes for found in self.reports)


@dataclass(frozen=True)
class Comparison:
    """Stock and streaming on one model, and the chart that shows both."""

    subject: Subject
    stock: Trial
    streaming: Trial
    picture: Path

    @property
    def same_answer(self) -> bool:
        """Whether both servers gave the same answer."""
        return self.stock.answer == self.streaming.answer

    @property
    def is_less_accurate(self) -> bool:
        """Whether streaming answers fewer evaluation questions correctly, by more than the tolerance."""
        if self.stock.accuracy is None or self.streaming.accuracy is None:
            return False
        return self.streaming.accuracy < self.stock.accuracy - ACCURACY_NOISE


class Screen:
    """Shows progress: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = WIDTH_WITHOUT_TERMINAL

    def say(self, message: str) -> None:
        """Print one finished step."""
        self.console.print(Text(message), soft_wrap=True)

    @contextmanager
    def step(self, message: str) -> Iterator[Callable[[str], None]]:
        """Context of a long step. Yields a function that shows its progress, on a terminal only."""
        if not self.console.is_terminal:
            self.say(f"{message} ...")
            yield lambda _: None
            return
        with self.console.status(Text(message)) as status:
            yield lambda progress: status.update(Text(f"{message}: {progress}"))


def try_server(screen: Screen, subject: Subject, mode: Mode, folder: Path, timeout: float) -> Trial:
    """Start the server in one mode, ask it, stop it, and read its load reports.

    Raises:
        DemoError: it did not start, did not answer, or did not load in this mode.
    """
    launch = launch_of(subject, mode, folder)
    screen.say(f"{subject.name}, {mode}: {shown(launch, mode)}")
    try:
        answer, accuracy = answers_of(screen, launch, subject, mode, timeout)
        trial = Trial(mode, answer, report.read_folder(folder / "reports"), accuracy)
    except (serving.ServerError, StreamFP8Error) as error:
        told = str(error) if str(launch.log) in str(error) else f"{error}\n{serving.tail(launch)}"
        raise DemoError(f"{subject.name}, {mode}: {told}") from error
    check_mode(trial, launch)
    screen.say(f"{subject.name}, {mode}: loaded in {seconds_text(trial.seconds)}, peak +{bytes_text(trial.peak)}")
    return trial


def launch_of(subject: Subject, mode: Mode, folder: Path) -> serving.Launch:
    """The command and the environment variables of one trial, its log and reports under `folder`."""
    port = serving.free_port()
    device = () if has_cuda() else ("--device", "cpu")
    arguments = ("--quantization", "fp8", *device, *subject.arguments)
    return serving.Launch(
        command=serving.sglang_command(sys.executable, subject.model, port, arguments),
        port=port,
        log=folder / "server.log",
        variables={MODE_VARIABLE: SWITCH[mode], REPORT_VARIABLE: str(folder / "reports")},
    )


def answers_of(
    screen: Screen, launch: serving.Launch, subject: Subject, mode: Mode, timeout: float
) -> tuple[str, float | None]:
    """Run the server, get its answer and, if requested, evaluate it."""
    title, accuracy = f"{subject.name}, {mode}", None
    with (
        screen.step(f"{title}: starting the server, log in {launch.log}") as show,
        serving.running(launch, timeout, lambda seconds: show(f"{seconds:.0f} s")) as url,
    ):
        show("asking")
        answer = serving.ask(url, QUESTION, ANSWER_TOKENS)
        if subject.evaluation is not None:
            show("evaluating")
            accuracy = gsm8k(url, subject.evaluation, launch.log.parent)
        show("stopping")
    return answer, accuracy


def check_mode(trial: Trial, launch: serving.Launch) -> None:
    """Refuse a trial whose load was not in the mode that its row says."""
    wrong = [found.mode for found in trial.reports if found.mode != trial.mode]
    if wrong:
        raise DemoError(
            f"The {trial.mode} server loaded as {wrong[0]}, so there is nothing to compare.\n{serving.tail(launch)}"
        )


def shown(launch: serving.Launch, mode: Mode) -> str:
    """The command as typed in a shell."""
    return " ".join([f"{MODE_VARIABLE}={SWITCH[mode]}", "python", *launch.command[1:]])


def compare(screen: Screen, subject: Subject, out: Path, timeout: float) -> Comparison:
    """Try `subject` with stock, then with streaming, and draw both."""
    folder = out / subject.name
    if folder.exists():
        shutil.rmtree(folder)
    read_through(screen, subject)
    stock = try_server(screen, subject, "stock", folder / "stock", timeout)
    streaming = try_server(screen, subject, "streaming", folder / "streaming", timeout)
    curves = [chart.Curve("stock", stock.reports), chart.Curve("streaming", streaming.reports)]
    title = f"{subject.name}: memory while SGLang loads it with --quantization fp8"
    picture = chart.draw(curves, folder / "memory.png", title)
    return Comparison(subject, stock, streaming, picture)


def read_through(screen: Screen, subject: Subject) -> None:
    """Read the weight files once, so that neither load has to read them from a cold disk."""
    if subject.folder is None:
        return
    with screen.step(f"{subject.name}: reading the checkpoint once, so both loads find it in the file cache") as show:
        for file in weight_files(subject.folder):
            show(file.name)
            with file.open("rb", buffering=0) as source:
                while source.read(1 << 24):
                    pass


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files."""
    return sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def table_of(comparisons: list[Comparison]) -> Table:
    """The result as a table with two rows per model."""
    table = Table(title="SGLang --quantization fp8: stock and streaming", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("Model", "Loading", "Answer") else "right")
    for comparison in comparisons:
        for row in rows_of(comparison):
            table.add_row(*(Text(cell) for cell in row))
        table.add_section()
    return table


HEADINGS = ("Model", "Loading", "Peak memory", "x FP8 model", "x stock", "Load time", "x stock", "Answer")


def rows_of(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells of `HEADINGS` for the stock server and the streaming one."""
    stock, streaming = comparison.stock, comparison.streaming
    peak, size = bytes_text(stock.peak), ratio(stock.peak, stock.final_bytes)
    first = (comparison.subject.name, "stock", peak, size, "", seconds_text(stock.seconds), "", "")
    second = (
        f"FP8 model: {bytes_text(streaming.final_bytes)}",
        "streaming",
        bytes_text(streaming.peak),
        ratio(streaming.peak, streaming.final_bytes),
        ratio(streaming.peak, stock.peak),
        seconds_text(streaming.seconds),
        ratio(streaming.seconds, stock.seconds),
        "equal" if comparison.same_answer else "DIFFERENT",
    )
    return [first, second]


def ratio(value: float, whole: float) -> str:
    """`value / whole` with two decimals, or a dash if `whole` is 0."""
    return f"{value / whole:.2f}" if whole else "-"


def markdown_of(comparisons: list[Comparison]) -> str:
    """The same table in Markdown."""
    return page_tables.markdown(HEADINGS, [row for found in comparisons for row in rows_of(found)])


def facts_of(comparisons: list[Comparison]) -> str:
    """The same in JSON, answers included."""
    return json.dumps(
        [
            {
                "model": found.subject.name,
                "answers_equal": found.same_answer,
                "chart": f"{found.picture.parent.name}/{found.picture.name}",
                **{
                    trial.mode: {
                        "answer": trial.answer,
                        "peak_bytes": trial.peak,
                        "seconds": trial.seconds,
                        "final_bytes": trial.final_bytes,
                        "accuracy": trial.accuracy,
                    }
                    for trial in (found.stock, found.streaming)
                },
            }
            for found in comparisons
        ],
        indent=2,
    )


def has_cuda() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return bool(torch.cuda.is_available())


def given_subject(model: str, arguments: tuple[str, ...]) -> Subject:
    """The user's own model: a folder, made absolute because servers run elsewhere, or a name on the hub.

    Raises:
        DemoError: it can only be a folder, and there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Subject(path.resolve().name, str(path.resolve()), arguments)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise DemoError(f"There is no folder {model}. --model takes a checkpoint's folder, or its name on the hub.")
    return Subject(path.name, model, arguments)


@contextmanager
def subjects(screen: Screen, model: str | None, arguments: tuple[str, ...], scratch: Path) -> Iterator[list[Subject]]:
    """The user's model, or the two models made for the demo."""
    if model is not None:
        yield [given_subject(model, arguments)]
        return
    made = []
    for spec in SPECS:
        name = f"{spec.family}-{spec.size}"
        with screen.step(f"{name}: making the checkpoint"):
            made.append(Subject(name, str(build(spec, scratch)), arguments))
        size = sum(file.stat().st_size for file in weight_files(Path(made[-1].model)))
        screen.say(f"{name}: {bytes_text(size)} in bf16, random weights, {made[-1].model}")
    yield made


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="Your own bf16 or fp16 checkpoint instead of the two that the demo makes.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for charts, reports and logs.")
@click.option("--keep", "made", flag_value="keep", default="remove", help="Keep the checkpoints the demo made (2 GB).")
@click.option("--timeout", type=float, default=1800, show_default=True, help="Seconds a server may take to be ready.")
@click.option("--evaluate", type=click.IntRange(min=1), help="GSM8K questions that both servers are asked as well.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), help="A file of them, else downloaded.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    model: str | None,
    out: Path | None,
    made: str,
    timeout: float,
    evaluate: int | None,
    questions: Path | None,
    arguments: tuple[str, ...],
) -> None:
    """Load a model with stock SGLang, then with streaming, and compare answers, peak memory and load time.

    ARGUMENTS after -- go to both servers, for example: ci/demo --model PATH -- --tp 2
    """
    # A terminated demo exits like an interrupted one, so that its server is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    screen, results = Screen(), (out or environment.CLONE / "demo-output").resolve()
    scratch = results / "checkpoints"
    try:
        evaluation = Evaluation(evaluate, questions and questions.resolve()) if evaluate else None
        with subjects(screen, model, arguments, scratch) as found:
            tried = [replace(subject, evaluation=evaluation) for subject in found]
            comparisons = [compare(screen, subject, results, timeout) for subject in tried]
    except (DemoError, StreamFP8Error) as error:
        screen.console.print(Text(f"error: {error}"), style="bold red", soft_wrap=True)
        sys.exit(1)
    finally:
        if made == "remove":
            shutil.rmtree(scratch, ignore_errors=True)
    publish(screen, comparisons, results)
    sys.exit(0 if all(found.same_answer and not found.is_less_accurate for found in comparisons) else 1)


def publish(screen: Screen, comparisons: list[Comparison], results: Path) -> None:
    """Print the table, and write it to files."""
    screen.console.print(table_of(comparisons))
    for found in comparisons:
        if found.stock.accuracy is not None:
            share = f"stock {found.stock.accuracy:.3f}, streaming {found.streaming.accuracy:.3f}"
            screen.say(f"{found.subject.name}: share of GSM8K questions answered right: {share}")
        screen.say(f"{found.subject.name}: memory over time in {found.picture}")
    (results / "table.md").write_text(markdown_of(comparisons), encoding="utf-8")
    (results / "results.json").write_text(facts_of(comparisons) + "\n", encoding="utf-8")
    screen.say(f"The table as Markdown and JSON, the logs and the reports are in {results}")


if __name__ == "__main__":
    main()
