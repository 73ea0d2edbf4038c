"""The state of a training, and how it moves by a step; stopped at any moment, it goes on to the same numbers.

A step reads `segments` segments of every row, shared out among the processes and, with `accumulate`, read in
several parts by each; the loss is the mean over all that is asked of all of them.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.endings import DivergedError
from benchmarks.learning import learning_rate, make_optimizer
from benchmarks.task import stable_seed
from benchmarks.training import state as states
from benchmarks.training.data import Piece, Stream, Text
from benchmarks.training.processes import Processes
from benchmarks.training.reading import PRECISIONS, Window, replay
from benchmarks.training.settings import OPTIMISATION, TrainConfig
from memory_models.generate import generate, sampler
from memory_models.hub import save_pretrained
from memory_models.lm import MemoryLM
from memory_models.models import build, describe
from memory_models.state import Memory, cat

CHECKPOINT_FILE, MODEL_FOLDER = "checkpoint.pt", "model"
_SAMPLE_PROMPT_TOKENS = 64
# It starts at 2^16 and halves at each gradient that is not finite.
_SMALLEST_SCALE = 2.0**-24


class Training:
    """A model in training.

    Args:
        config: all settings.
        text: the documents.
        model: the language model; its weights are those at the start.
        processes: that train together, each with an equal share of the rows.

    Raises:
        ValueError: if the rows cannot be shared out evenly, or the model cannot be trained in this way.
        CheckpointError: if the checkpoint in `config.out` is damaged or of another training.
    """

    def __init__(self, config: TrainConfig, text: Text, model: MemoryLM, processes: Processes) -> None:
        self.config = config
        self.text = text
        self.model = model
        self.processes = processes
        self.settings = config.optimisation()
        self.groups = _groups(processes.share(config.batch_size), config.accumulate)
        self.identity = {
            "model": describe(model),
            **text.identity(),
            "batch_size": config.batch_size,
            "segments": config.segments,
            "seed": config.seed,
            **{name: getattr(config, name) for name in OPTIMISATION},
            "precision": _precision(config.precision),
        }
        self.step = 0
        self.tokens = 0
        self.losses: list[float] = []
        self.memories: list[Any] = [None] * len(self.groups)
        self._stream = Stream(
            text.training, rows=config.batch_size, segments=config.segments, seed=config.seed
        )
        self._store = getattr(model.module, "store", None)
        if self._store is not None and processes.count > 1:
            raise ValueError(
                f"{config.model!r} keeps what it wrote in a store outside the memory, which belongs to one "
                "process; train it in one, or with the store in the memory"
            )
        before = states.read_checkpoint(self.checkpoint, self.identity, may_change=config.may_change)
        if before is not None:
            model.load_state_dict(before["model"])
        dtype = PRECISIONS[self.identity["precision"]]
        self._fresh = model.init_memory(1).detach()
        self._window = Window(model, dtype=dtype)
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
        # Whatever is wrapped is called once for each backward pass.
        trained = model if config.gradient == "replay" else self._window
        self._trained, self.optimizer = processes.prepare(trained, make_optimizer(model, self.settings))
        self._reader: nn.Module = self._window
        if processes.sharded and config.gradient != "replay":
            self._reader = self._trained
        # Each process draws its own numbers (dropout).
        states.seed_generators(stable_seed("training", config.seed, processes.rank))
        if before is not None:
            self._restore(before)

    @property
    def checkpoint(self) -> Path:
        """The file to go on from."""
        return self.config.out / CHECKPOINT_FILE

    @property
    def model_folder(self) -> Path:
        """The trained model, for `from_pretrained`."""
        return self.config.out / MODEL_FOLDER

    def advance(self) -> float:
        """One optimiser step; gives its loss, nats per token over all processes.

        Raises:
            DivergedError: if the loss or the gradient is not finite; the weights are then as before.
        """
        processes = self.processes
        windows = [self._stream.window(self.step, rows) for rows in self.groups]
        asked = sum(piece.asked for window in windows for piece in window)
        [asked_by_all] = processes.sum(asked)
        self._trained.train()
        self._window.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        after: list[Any] = []
        for number, window in enumerate(windows):
            last = number == len(windows) - 1
            with nullcontext() if last else processes.no_sync(self._trained):
                # Processes average their gradients; the mean is over all that is asked.
                nats, memory = self._add_gradient(window, number, scale=processes.count / asked_by_all)
            total += nats.item()
            after.append(memory)
        [summed] = processes.sum(total)
        loss = summed / asked_by_all
        self._check("loss", loss)
        self._scaler.unscale_(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not self._scaler.is_enabled():
            # With fp16 the scaler leaves out such a step and scales less.
            self._check("gradient's norm", processes.whole(norm).item())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < _SMALLEST_SCALE:
            raise DivergedError(
                f"in fp16 the gradient is not finite at step {self.step + 1} of {self.settings.steps}, "
                "however small the loss is scaled; take --precision bf16 or fp32"
            )
        self.memories = after
        self.step += 1
        self.tokens += round(asked_by_all)
        self.losses.append(loss)
        return loss

    def evaluate(self) -> dict[str, float]:
        """The loss over the held-out documents: nats a token, perplexity, bits a byte."""
        config, processes = self.config, self.processes
        rows = -(-config.evaluation_rows // processes.count) * processes.count
        share = processes.share(rows)
        memory: Any = None
        total, asked = 0.0, 0
        self._reader.eval()
        self._window.eval()
        with torch.no_grad():
            for piece in self.text.held_out.evaluation(rows=rows, share=slice(share.start, share.stop)):
                nats, memory = self._reader([piece.to(processes.device)], memory)
                total += nats.item()
                asked += piece.asked
        self._window.train()
        total, count = processes.sum(total, asked)
        loss = total / count
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.text.tokenizer.is_bytes:
            scores["bits per byte"] = loss / math.log(2)
        return scores

    def sample(self) -> str:
        """Text that the model writes now; empty but in the main process. Training does not notice it."""
        config, tokenizer = self.config, self.text.tokenizer
        weights = states.whole_weights(self.model, self.processes) if self.processes.sharded else None
        if not self.processes.is_main:
            return ""
        model = self.model if weights is None else self._rebuilt(weights)
        device = next(model.parameters()).device
        if config.sample_prompt:
            ids = tokenizer.encode(config.sample_prompt.encode())
        else:
            ids = self.text.held_out.tokens[: min(_SAMPLE_PROMPT_TOKENS, int(self.text.held_out.asked[0]))]
        prompt = torch.tensor(ids.tolist(), dtype=torch.int64, device=device)[None]
        generator = torch.Generator(device).manual_seed(config.seed)
        decode = tokenizer.stream()
        steps = generate(
            model, prompt, max_new_tokens=config.sample_tokens, sample=sampler(generator=generator)
        )
        return "".join(decode(int(step.token[0])) for step in steps)

    def save(self) -> None:
        """Write the checkpoint, atomically; every process must call it.

        Raises:
            OSError: if the disk refuses; the checkpoint before still stands.
        """
        processes = self.processes
        memory = self._memory_of_all()
        store = f"store-{self.step}"
        content: dict[str, Any] = {
            "identity": self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "losses": self.losses,
            "model": states.whole_weights(self.model, processes),
            "optimizer": states.whole_optimizer(self.optimizer, processes),
            "scaler": self._scaler.state_dict(),
            "memory": None if memory is None else memory.tensors(),
            "store": None if self._store is None else store,
            "generators": processes.gather_objects(states.generator_states(processes.device)),
        }
        if processes.is_main:
            if self._store is not None:
                # Under a name of its own: until the checkpoint is there the one before needs its own store.
                self._store.save(self.checkpoint.with_name(store))
            states.write_checkpoint(self.checkpoint, content)
            for old in self.config.out.glob("store-*"):
                if old.name != store:
                    old.unlink(missing_ok=True)
        processes.wait()

    def export(self) -> None:
        """Write the model for `from_pretrained` and `memory-bench generate`; every process must call it.

        Raises:
            OSError: if the disk refuses; the model before still stands.
        """
        memory = self._memory_of_all() if self.config.keep_memory else None
        weights = states.whole_weights(self.model, self.processes) if self.processes.sharded else None
        if self.processes.is_main:
            model = self.model if weights is None else self._rebuilt(weights)
            self.text.tokenizer.save(self.model_folder)
            save_pretrained(model, self.model_folder, memory=memory)
        self.processes.wait()

    def _add_gradient(self, window: list[Piece], number: int, *, scale: float) -> tuple[Tensor, Any]:
        window = [piece.to(self.processes.device) for piece in window]
        memory = self.memories[number]
        if self.config.gradient == "replay":
            return replay(
                self._trained,
                window,
                memory,
                scale=scale,
                dtype=self._window.dtype,
                scaler=self._scaler if self._scaler.is_enabled() else None,
            )
        nats, memory = self._trained(window, memory)
        self._scaler.scale(nats * scale).backward()
        return nats.detach(), memory.detach()

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} at step {self.step + 1} of {self.settings.steps}; lower "
                "--learning-rate or --clip, or look for bad numbers in the model's options. The checkpoint "
                "before it stands, and the same command goes on from there"
            )

    def _memory_of_all(self) -> Any:
        if self.memories[0] is None:
            return None
        mine: Memory = cat(self.memories)
        return self.processes.gather_memory(mine)

    def _rebuilt(self, weights: dict[str, Tensor]) -> MemoryLM:
        model = build(self.identity["model"])
        assert isinstance(model, MemoryLM)
        model.load_state_dict({name: value.cpu() for name, value in weights.items()})
        return model

    def _restore(self, before: dict[str, Any]) -> None:
        device = self.processes.device
        states.load_optimizer(self.optimizer, before["optimizer"])
        self._scaler.load_state_dict(before["scaler"])
        if before["memory"] is not None:
            self.memories = [
                states.memory_from(before["memory"], self._fresh, rows, device) for rows in self.groups
            ]
        self.step, self.tokens, self.losses = before["step"], before["tokens"], before["losses"]
        if self._store is not None:
            self._store.load(self.checkpoint.with_name(before["store"]))
        # Others than before have other rows: they draw numbers of their own from here on.
        if len(before["generators"]) == self.processes.count:
            states.set_generator_states(before["generators"][self.processes.rank], device)
        else:
            seed = stable_seed("training", self.config.seed, self.processes.rank, self.step)
            states.seed_generators(seed)


def _groups(rows: range, parts: int) -> list[range]:
    if len(rows) % parts:
        raise ValueError(f"a process's {len(rows)} rows cannot be read in {parts} equal parts (accumulate)")
    each = len(rows) // parts
    return [rows[start : start + each] for start in range(0, len(rows), each)]


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told == "no":
        return "fp32"
    if told not in PRECISIONS:
        raise ValueError(f"mixed precision {told!r} of Accelerate is not supported; take bf16 or fp16")
    return told
