"""`memory-bench train`: train one member on your own text, and keep it."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.endings import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, DivergedError
from benchmarks.members import build_model
from benchmarks.progress import Display, display_for
from benchmarks.results import FINISHED, write_atomically
from benchmarks.training.data import load_text
from benchmarks.training.loop import Training
from benchmarks.training.processes import Processes, connect
from benchmarks.training.settings import TrainConfig
from benchmarks.training.tokenizer import load_tokenizer
from benchmarks.worker import stop_on_signal

LOG_FILE = "log.jsonl"
LOG_EVERY = 10

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options of `memory-bench train` and train; returns the exit code.

    Returns:
        0; 1 if the loss diverged or the disk refused; 2 for wrong use; 130 if it was stopped and saved.
    """
    import tyro

    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        config = tyro.cli(
            TrainConfig, args=words, prog="memory-bench train", config=(tyro.conf.FlagCreatePairsOff,)
        )
        training = prepare(config)
    except LookupError as error:
        # A KeyError prints its message in quotes.
        return _fail(error.args[0] if error.args else error, EXIT_USAGE)
    except (TypeError, ValueError, ImportError, OSError) as error:
        return _fail(error, EXIT_USAGE)
    main_process = training.processes.is_main
    again = shlex.join(["memory-bench", "train", *words])
    if training.processes.count > 1:
        again += "\nin as many processes as you like"
    try:
        finished = train(training, say=print if main_process else lambda _: None)
    except DivergedError as error:
        return _fail(error, EXIT_FAILED) if main_process else EXIT_FAILED
    except KeyboardInterrupt:
        return _fail(f"stopped at once; the last checkpoint stands. Go on with:\n  {again}", EXIT_INTERRUPTED)
    except OSError as error:
        return _fail(
            f"cannot write to {config.out}: {error}. The last checkpoint stands; make room, then give the "
            "same command again",
            EXIT_FAILED,
        )
    finally:
        training.processes.close()
    if not finished:
        if main_process:
            print(f"Stopped at step {training.step}; it is saved. Go on with:\n  {again}")
        return EXIT_INTERRUPTED
    return EXIT_OK


def prepare(config: TrainConfig, processes: Processes | None = None) -> Training:
    """The training that a configuration describes, at its start or where its checkpoint left it.

    Raises:
        LookupError, TypeError, ValueError, ImportError, OSError: for what the user can put right.
    """
    if config.tensorboard:
        _summary_writer()
    if config.threads:
        torch.set_num_threads(config.threads)
    processes = connect(config.device) if processes is None else processes
    # Asked before anything slow is done.
    processes.share(config.batch_size)
    options = config.model_options()
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(config.model, options, tokenizer.vocab_size)
    text = load_text(config, tokenizer, model.segment_length)
    config.out.mkdir(parents=True, exist_ok=True)
    return Training(config, text, model, processes)


def train(training: Training, *, say: Callable[[str], Any] = print) -> bool:
    """Train to the end, or until SIGINT or SIGTERM; writes checkpoints, the log and the model.

    Args:
        training: at its start or where it was left.
        say: takes what there is to tell.

    Returns:
        Whether the end was reached.

    Raises:
        DivergedError: if the loss or the gradient is not finite.
    """
    config, processes = training.config, training.processes
    log = Log(training)
    say(_beginning(training))
    display: Display | None = display_for() if processes.is_main else None
    title = f"{config.model} on {training.text.corpus.description}"
    if display is not None:
        display.start(total=1, done=0)
        display.job_started(title)
    began, first, saved = time.monotonic(), training.step, time.monotonic()

    def show(phase: str) -> None:
        if display is None:
            return
        done = training.step - first
        rate = done / max(time.monotonic() - began, 1e-9)
        loss = training.losses[-1] if training.losses else None
        display.job_progress(
            title,
            {"phase": phase, "step": training.step, "steps": config.steps, "rate": rate, "loss": loss},
        )
        display.time_left((config.steps - training.step) / rate if done else None)

    try:
        with stop_on_signal() as caught:
            while training.step < config.steps:
                training.advance()
                last = training.step == config.steps
                if training.step % LOG_EVERY == 0 or last:
                    log.write_loss()
                show("training")
                if last or (config.evaluate_every and training.step % config.evaluate_every == 0):
                    show("evaluating")
                    say(log.write_evaluation())
                due = time.monotonic() - saved >= config.checkpoint_seconds
                # All processes must do the same.
                [stop, save] = processes.sum(caught(), processes.is_main and due)
                if stop or save or last:
                    training.save()
                    training.export()
                    saved = time.monotonic()
                if stop and not last:
                    return False
        if display is not None:
            display.job_ended(title, {"status": FINISHED})
    finally:
        log.close()
        if display is not None:
            display.stop()
    if training.step == first:
        # It may have been killed after its last checkpoint.
        training.export()
    say(
        f"trained for {training.step} steps, {training.tokens} tokens; "
        f"the model is in {training.model_folder}"
    )
    return True


class Log:
    """Figures as lines of JSON in the training's folder, and for TensorBoard if asked.

    Lines after the step that the training goes on from are removed: they will be written again.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._path = training.config.out / LOG_FILE
        self._began = time.monotonic()
        self._tokens = training.tokens
        self._board: Any = None
        if not training.processes.is_main:
            return
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= training.step]
            write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode())
        if training.config.tensorboard:
            folder = str(training.config.out / "tensorboard")
            self._board = _summary_writer()(folder, purge_step=training.step + 1)

    def write_loss(self) -> None:
        """The mean loss since the last such line."""
        training = self._training
        losses, training.losses = training.losses, []
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._write(
            {
                "loss": sum(losses) / len(losses),
                "learning_rate": training.optimizer.param_groups[0]["lr"],
                "tokens": training.tokens,
                "tokens_per_second": round((training.tokens - self._tokens) / seconds, 1),
            },
            "training",
        )

    def write_evaluation(self) -> str:
        """Evaluate, and tell in words; a sample with it if one is wanted."""
        training = self._training
        scores = training.evaluate()
        sample = training.sample() if training.config.sample_tokens else ""
        self._write({**scores, **({"sample": sample} if sample else {})}, "held-out")
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        shown = f"\n  sample: {sample!r}" if sample else ""
        return f"step {training.step} of {training.config.steps}: held-out {figures}{shown}"

    def close(self) -> None:
        """Nothing more comes."""
        if self._board is not None:
            self._board.close()

    def _write(self, values: Mapping[str, Any], kind: str) -> None:
        training = self._training
        if not training.processes.is_main:
            return
        line = json.dumps({"step": training.step, "kind": kind, **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._board is not None:
            for name, value in values.items():
                add = self._board.add_text if isinstance(value, str) else self._board.add_scalar
                add(f"{kind}/{name}", value, training.step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs the package tensorboard: pip install 'memory-models[tensorboard]'"
        ) from error
    return SummaryWriter


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        # The half line of a process that was killed.
        return float("inf")


def _beginning(training: Training) -> str:
    config, text = training.config, training.text
    weights = sum(parameter.numel() for parameter in training.model.parameters())
    where = (
        f"{training.processes.count} processes" if training.processes.count > 1 else training.processes.device
    )
    start = f"goes on at step {training.step}" if training.step else "starts"
    return (
        f"{config.model} with {weights} weights, {text.tokenizer.vocab_size} tokens; "
        f"{len(text.training.segments)} documents of {len(text.training.tokens)} tokens, "
        f"{len(text.held_out.segments)} held out; {where}; {start}"
    )


def _fail(message: object, code: int) -> int:
    print(f"memory-bench: {message}", file=sys.stderr)
    return code
