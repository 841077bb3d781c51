# SPDX-License-Identifier: Apache-2.0
"""The trainer: truncated back-propagation through time over a contiguous text, resumable to the bit."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models.pretrained import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    PretrainedMixin,
)
from llmkern.text import Tokenizer, bptt_windows
from llmkern.training import checkpoints, snapshots
from llmkern.training.arguments import TrainingArguments
from llmkern.training.metrics import evaluate
from llmkern.training.progress import Display, epoch_summary, make_display
from llmkern.training.run_folder import BEST_NAME, RunFolder
from llmkern.training.run_log import LOG_NAME, TENSORBOARD_NAME, RunLog
from llmkern.training.signals import StopRequest
from llmkern.training.state import Stopwatch, TrainingState
from llmkern.training.stepping import Stepper
from llmkern.training.texts import checked_lanes, fingerprint


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        stop_reason: "epochs", "max_steps", "max_seconds", "patience" (no better epoch) or "interrupted".
        step: optimizer steps taken in all.
        epoch: epochs finished.
        best_loss: the best validation loss of a finished epoch, in nats; None without one.
        valid_loss: the last validation loss, also one in mid-epoch; None without one.
        history: one dict for each finished epoch: epoch, step, learning_rate, train_loss, valid_loss.
    """

    stop_reason: str
    step: int
    epoch: int
    best_loss: float | None
    valid_loss: float | None
    history: list[dict[str, Any]]


@dataclass
class _Session:
    """What lasts as long as one call of train()."""

    request: StopRequest
    log: RunLog
    display: Display
    began: float = field(default_factory=time.monotonic)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    valid_loss: float | None = None


class Trainer:
    """Trains a language model on one long text.

    The text is cut into ``batch_size`` lanes that are read side by side, ``bptt`` tokens a step. The state is carried
    from step to step through the whole epoch; the gradient stops at the window's edge.

    With an ``output_dir`` the run leaves there: the checkpoint (last state), the model with the best validation loss
    (the newest one without validation text), log.jsonl and tb/. A run resumed from its checkpoint gives the same bits
    as one that was never stopped.

    Args:
        model: a module with ``loss(ids [B, T], targets [B, T], state) -> (mean loss, state)``, state None at first.
            Models of llmkern are also saved with ``save_pretrained``; the best state_dict of others is best.pt, for
            ``torch.load``. The state is made of tensors and plain values in tuples, named tuples, lists and dicts.
        arguments: how to train.
        train_ids: the text, int64 [N].
        valid_ids: the validation text, int64 [M]; None trains without.
        output_dir: the run's folder, made if need be; None writes nothing.
        tokenizer: saved in the checkpoint and with the model.
        show_progress: a bar on standard error, or lines where that is no terminal.

    Raises:
        TypeError: the model has no ``loss``.
        ValueError: the model has no parameters; a text is too short for its batch size, or has ids the model does not
            know; or the precision does not go with the model's device.

    Example:
        >>> trainer = Trainer(model, TrainingArguments(epochs=3), train_ids, valid_ids, output_dir="run")
        >>> trainer.train().best_loss
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        train_ids: Tensor,
        valid_ids: Tensor | None = None,
        *,
        output_dir: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.arguments = arguments
        self.state = TrainingState()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.tokenizer = tokenizer
        _check_model(model)
        self.device = next(model.parameters()).device
        if arguments.precision == "bf16" and self.device.type != "cuda":
            raise ValueError(
                f"llmkern.Trainer: expected precision float32 for a model on {self.device}, got bf16, "
                f"which needs CUDA"
            )
        self._show_progress = show_progress
        self.eval_batch_size = arguments.eval_batch_size or arguments.batch_size
        lanes = checked_lanes("train_ids", train_ids, "batch_size", arguments.batch_size, model)
        self._lanes = lanes.to(self.device)
        self.data = {"train_ids": fingerprint(train_ids)}
        if valid_ids is not None:
            checked_lanes("valid_ids", valid_ids, "eval_batch_size", self.eval_batch_size, model)
            self.data["valid_ids"] = fingerprint(valid_ids)
        self._valid_ids = valid_ids
        self.steps_per_epoch = math.ceil((self._lanes.shape[1] - 1) / arguments.bptt)
        self.total_steps = arguments.epochs * self.steps_per_epoch
        if arguments.max_steps is not None:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        self.stepper = Stepper(model, arguments, self.steps_per_epoch, self.total_steps)

    def train(self, *, resume: bool = False, overwrite: bool = False) -> TrainingResult:
        """Trains until an end is reached.

        Ctrl-C (and SIGTERM) finishes the step, saves and returns; a second Ctrl-C is a KeyboardInterrupt.

        Args:
            resume: go on from the newest checkpoint in output_dir.
            overwrite: replace the run in output_dir, if there is one. It stays as it is until this run has taken a
                step and saved its first checkpoint; files that no run made are left alone.

        Raises:
            FileNotFoundError: there is no checkpoint to resume from.
            FileExistsError: output_dir holds a run, and neither resume nor overwrite is set; or it holds files that
                this run would write and that no run made.
            ValueError: the checkpoint is corrupt, or of another model, text or training.
            TypeError: the model's state, or what it carries from step to step, cannot be saved and read again.
            RuntimeError: another process trains in output_dir; names it.
            FloatingPointError: the loss or the gradient is NaN or infinite; names the step. The parameters and
                the last checkpoint are those before that step.
            MemoryError: a step needs more memory than there is.
            OSError: a checkpoint cannot be written; the one before is unharmed.
        """
        if resume and self.output_dir is None:
            raise ValueError("llmkern.Trainer: expected an output_dir to resume from, got None")
        self._folder = RunFolder(
            self.output_dir,
            self._file_names(),
            resume=resume,
            overwrite=overwrite,
            begun=self.state.step > 0,
            show=self._show_progress,
        )
        with self._folder:
            if resume:
                snapshots.restore(self, self._lanes.shape[1])
            elif self.state.step == 0:
                torch.manual_seed(self.arguments.seed)
                self._save(log_size=0)  # shows now whether the folder can be written to
            return self._train()

    def _train(self) -> TrainingResult:
        state = self.state
        with StopRequest() as request:
            log = RunLog(
                self._folder.path,
                tensorboard=self.arguments.tensorboard,
                size=state.log_size,
                step=state.step,
            )
            self._folder.followers.append(log)
            display = make_display(self.total_steps, state.step, show=self._show_progress)
            try:
                with log:
                    result = self._run(_Session(request, log, display))
                    if state.step == 0 and result.stop_reason == "interrupted":
                        raise KeyboardInterrupt  # before there is anything to keep
                    self._folder.settle()
                    return result
            finally:
                display.close()

    def _run(self, session: _Session) -> TrainingResult:
        state = self.state
        if state.step == 0:
            session.log.write("start", 0, arguments=asdict(self.arguments), data=self.data)
        reason = self._finished()
        while reason is None:
            reason = self._train_epoch(session)
            if reason is None:
                self._end_epoch(session)
                reason = self._finished()
        if state.position or state.step == 0:
            self._stop_in_epoch(session, reason)
        return TrainingResult(
            stop_reason=reason,
            step=state.step,
            epoch=state.epoch,
            best_loss=state.best_loss,
            valid_loss=session.valid_loss,
            history=state.history,
        )

    def _finished(self) -> str | None:
        """Why there is no further epoch, if so."""
        patience = self.arguments.patience
        if self.state.epoch >= self.arguments.epochs:
            return "epochs"
        if patience is not None and self.state.epochs_without_gain >= patience:
            return "patience"
        return None

    def _stopped(self, session: _Session) -> str | None:
        """Why there is no further step, if so."""
        arguments = self.arguments
        if session.request:
            return "interrupted"
        if arguments.max_steps is not None and self.state.step >= arguments.max_steps:
            return "max_steps"
        seconds = time.monotonic() - session.began
        if arguments.max_seconds is not None and seconds >= arguments.max_seconds:
            return "max_seconds"
        return None

    def _train_epoch(self, session: _Session) -> str | None:
        """Reads the rest of this epoch; says why if it stops before its end."""
        arguments, state = self.arguments, self.state
        self.model.train()
        session.stopwatch.start()
        windows = bptt_windows(self._lanes, arguments.bptt, start=state.position)
        for start, inputs, targets in windows:
            reason = self._stopped(session)
            if reason is not None:
                return reason
            learning_rate = self.stepper.learning_rate.value
            loss, norm = self.stepper.step(inputs, targets, state.step + 1)
            state.add(loss, targets.numel(), learning_rate, position=start + inputs.shape[1])
            values = {
                "epoch": state.epoch + 1,
                "loss": state.interval_loss(),
                "learning_rate": learning_rate,
                "grad_norm": norm,
                "tokens_per_second": session.stopwatch.speed(targets.numel()),
            }
            session.display.step(state.step, **values)
            if state.step % arguments.log_every == 0:
                session.log.write("train", state.step, **values)
                session.display.interval(state.step, **values)
                state.end_interval()
                session.stopwatch.start()
            if arguments.save_every_steps and state.step % arguments.save_every_steps == 0:
                self._save(session.log.size)
        return None

    def _evaluate(self, session: _Session) -> float | None:
        if self._valid_ids is None:
            return None
        result = evaluate(
            self.model,
            self._valid_ids,
            batch_size=self.eval_batch_size,
            bptt=self.arguments.bptt,
            accuracy=False,
            on_progress=lambda done, total: session.display.note(f"validating {done / total:.0%}"),
        )
        session.valid_loss = result.loss
        values = {"loss": result.loss, "perplexity": result.perplexity}
        session.log.write("validation", self.state.step, epoch=self.state.epoch + 1, **values)
        return result.loss

    def _end_epoch(self, session: _Session) -> None:
        state = self.state
        valid_loss = self._evaluate(session)
        if valid_loss is not None:
            self.stepper.learning_rate.after_epoch(valid_loss)
        is_best = state.end_epoch(valid_loss)
        self.stepper.hidden = None
        record = state.history[-1]
        session.log.write("epoch", **record)
        session.display.line(epoch_summary(record, self.arguments.epochs))
        if is_best:
            self._export()
        self._save(session.log.size)

    def _stop_in_epoch(self, session: _Session, reason: str) -> None:
        """Saves first. A first epoch's model is better than none; a later one does not replace the best."""
        self._save(session.log.size)
        if reason != "interrupted":
            self._evaluate(session)
        if self.state.epoch == 0:
            self._export()

    def _save(self, log_size: int) -> None:
        if self._folder.path is not None:
            self.state.log_size = log_size
            content = snapshots.take(self, self._folder.files)
            checkpoints.save_checkpoint(
                self._folder.path, self.state.step, content, keep=self.arguments.keep
            )
            if self.state.step > 0:
                self._folder.settle()

    def _file_names(self) -> set[str]:
        """What the run writes besides checkpoints."""
        names = {LOG_NAME}
        if self.arguments.tensorboard:
            names.add(TENSORBOARD_NAME)
        if not isinstance(snapshots.uncompiled(self.model), PretrainedMixin):
            return names | {BEST_NAME}
        return names | {CONFIG_NAME, WEIGHTS_NAME} | ({TOKENIZER_NAME} if self.tokenizer else set())

    def _export(self) -> None:
        """Saves the model as it is for use: where it knows how, as its own files, else its state_dict."""
        if self._folder.path is None:
            return
        model = snapshots.uncompiled(self.model)
        if isinstance(model, PretrainedMixin):
            model.save_pretrained(self._folder.path, self.tokenizer)
        else:
            checkpoints.save_state(self._folder.path / BEST_NAME, model.state_dict())


def _check_model(model: nn.Module) -> None:
    if not callable(getattr(model, "loss", None)):
        raise TypeError(
            "llmkern.Trainer: expected a model with a method loss(ids, targets, state) that returns the mean loss and "
            f"the next state, got a {type(model).__name__} without one"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"llmkern.Trainer: expected a model with parameters, got a {type(model).__name__} without any"
        )
