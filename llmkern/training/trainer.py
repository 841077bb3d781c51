# SPDX-License-Identifier: Apache-2.0
"""The trainer: truncated back-propagation through time over a contiguous text, resumable to the bit."""

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._files import write_files
from llmkern.models.pretrained import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    PretrainedMixin,
)
from llmkern.text import Tokenizer, bptt_windows
from llmkern.training import checkpoints, snapshots
from llmkern.training.arguments import TrainingArguments
from llmkern.training.memory import reraise_out_of_memory
from llmkern.training.metrics import evaluate
from llmkern.training.progress import Display, epoch_summary, make_display, validation_summary
from llmkern.training.run_folder import BEST_NAME, RunFolder
from llmkern.training.run_log import DATA_NAME, LOG_NAME, TENSORBOARD_NAME, RunLog
from llmkern.training.signals import StopRequest
from llmkern.training.state import Stopwatch, TrainingState
from llmkern.training.stepping import Stepper
from llmkern.training.texts import (
    checked_lanes,
    default_batch_size,
    default_eval_batch_size,
    fingerprint,
)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        stop_reason: "epochs", "max_steps", "max_seconds", "patience" (no better epoch) or "interrupted".
        step: optimizer steps taken in all.
        epoch: epochs finished.
        best_loss: the best validation loss, in nats, which is that of the model kept; None without one.
        best_step: the step of that model.
        valid_loss: the last validation loss of this call; None without one.
        history: one dict for each finished epoch: epoch, step, learning_rate, train_loss, valid_loss.
    """

    stop_reason: str
    step: int
    epoch: int
    best_loss: float | None
    best_step: int | None
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
    valid_step: int | None = None


class Trainer:
    """Trains a language model on one long text.

    The text is cut into ``batch_size`` lanes that are read side by side, ``bptt`` tokens a step. The state is carried
    from step to step through the whole epoch; the gradient stops at the window's edge.

    With an ``output_dir`` the run leaves there: the checkpoint (last state), the model with the best validation loss
    (the newest one without validation text), log.jsonl, tb/ and, if ``source`` is given, data.json. A run resumed from
    its checkpoint gives the same bits as one that was never stopped.

    Args:
        model: a module with ``loss(ids [B, T], targets [B, T], state) -> (mean loss, state)``, state None at first.
            Models of llmkern are also saved with ``save_pretrained``; the best state_dict of others is best.pt, for
            ``torch.load``. The state is made of tensors and plain values in tuples, named tuples, lists and dicts.
        arguments: how to train.
        train_ids: the text, int64 or int32 [N].
        valid_ids: the validation text, int64 or int32 [M]; None trains without.
        output_dir: the run's folder, made if need be; None writes nothing.
        tokenizer: saved in the checkpoint and with the model.
        source: where the texts come from, as JSON holds it; saved in the checkpoint and as data.json.
        show_progress: a bar on standard error, or lines where that is no terminal.

    Raises:
        TypeError: the model has no ``loss``.
        ValueError: the model has no parameters; a text is too short for its batch size, or has ids the model does not
            know; a setting needs a validation text and there is none; schedule_steps ends before the run; or the
            precision does not go with the model's device.

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
        source: dict[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.state = TrainingState()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.tokenizer = tokenizer
        self.source = source
        _check_model(model)
        self.device = next(model.parameters()).device
        self._show_progress = show_progress
        self._valid_ids = valid_ids
        self.arguments = arguments = _completed(arguments, train_ids, valid_ids)
        self._check_arguments()
        assert arguments.batch_size is not None and arguments.eval_batch_size is not None
        self.eval_batch_size = arguments.eval_batch_size
        lanes = checked_lanes("train_ids", train_ids, "batch_size", arguments.batch_size, model)
        self._lanes = lanes.to(self.device)
        self.data = {"train_ids": fingerprint(train_ids)}
        if valid_ids is not None:
            checked_lanes("valid_ids", valid_ids, "eval_batch_size", self.eval_batch_size, model)
            self.data["valid_ids"] = fingerprint(valid_ids)
        self.steps_per_epoch = math.ceil((self._lanes.shape[1] - 1) / arguments.bptt)
        self.total_steps = arguments.epochs * self.steps_per_epoch
        if arguments.max_steps is not None:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        self._settle_schedule()
        self.stepper = Stepper(
            model,
            arguments,
            self.steps_per_epoch,
            self.arguments.schedule_steps or self.total_steps,
        )

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
            self._save_source()
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
                    if result.stop_reason == "interrupted" and self._folder.is_beside_another:
                        raise KeyboardInterrupt  # before a step: what is there is worth more
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
            best_step=state.best_step,
            valid_loss=session.valid_loss,
            history=state.history,
        )

    def _check_arguments(self) -> None:
        """What the settings need of the model and of the texts."""
        arguments = self.arguments
        if arguments.precision == "bf16" and self.device.type != "cuda":
            raise ValueError(
                f"llmkern.Trainer: expected precision float32 for a model on {self.device}, got bf16, "
                f"which needs CUDA"
            )
        validating = {
            "lr_schedule 'plateau'": arguments.lr_schedule == "plateau",
            f"patience {arguments.patience}": arguments.patience is not None,
            f"eval_every_steps {arguments.eval_every_steps}": arguments.eval_every_steps > 0,
        }
        needs = [name for name, is_set in validating.items() if is_set]
        if needs and self._valid_ids is None:
            raise ValueError(
                f"llmkern.Trainer: expected a validation text for {' and '.join(needs)}, which has no effect without"
                " one, got None"
            )

    def _settle_schedule(self) -> None:
        """Where the cosine ends is decided once, when the run begins, and saved with its settings."""
        if self.arguments.lr_schedule != "cosine":
            return
        steps = self.arguments.schedule_steps or self.total_steps
        if self.total_steps > steps:
            raise ValueError(
                f"llmkern.Trainer: expected epochs or max_steps to end the run at step {steps} at the latest, where "
                f"its cosine ends (schedule_steps: the learning rate is 0 from there on), got {self.total_steps} steps"
            )
        self.arguments = replace(self.arguments, schedule_steps=steps)

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
            if self._is_due(arguments.eval_every_steps) and not self._at_epochs_end():
                self._validate_in_epoch(session)
                session.stopwatch.start()
            if self._is_due(arguments.save_every_steps):
                self._save(session.log.size)
        return None

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _at_epochs_end(self) -> bool:
        return self.state.position == self._lanes.shape[1] - 1

    def _evaluate(self, session: _Session) -> float | None:
        """The validation loss; None without a validation text."""
        if self._valid_ids is None:
            return None
        try:
            result = evaluate(
                self.model,
                self._valid_ids,
                batch_size=self.eval_batch_size,
                bptt=self.arguments.bptt,
                accuracy=False,
                on_progress=lambda done, total: session.display.note(
                    f"validating {done / total:.0%}"
                ),
            )
        except (RuntimeError, MemoryError) as error:
            where = f"llmkern.Trainer: out of memory in the validation after step {self.state.step}"
            reraise_out_of_memory(
                error, where, eval_batch_size=self.eval_batch_size, bptt=self.arguments.bptt
            )
        if math.isnan(result.loss):
            raise FloatingPointError(
                f"llmkern.Trainer: expected a validation loss that is a number, got nan after step {self.state.step}; "
                f"lower learning_rate (now {self.stepper.learning_rate.value:g}) or clip the gradient harder "
                f"(max_grad_norm, now {self.arguments.max_grad_norm})"
            )
        session.valid_loss, session.valid_step = result.loss, self.state.step
        values = {"loss": result.loss, "perplexity": result.perplexity}
        session.log.write("validation", self.state.step, epoch=self.state.epoch + 1, **values)
        return result.loss

    def _validate_in_epoch(self, session: _Session) -> None:
        """Validates between two ends of epochs, and keeps the model if it is the best."""
        valid_loss = self._evaluate(session)
        assert valid_loss is not None  # the settings that lead here need a validation text
        session.display.line(validation_summary(self.state.step, self.total_steps, valid_loss))
        if self.state.validated(valid_loss):
            self._export()

    def _end_epoch(self, session: _Session) -> None:
        state = self.state
        valid_loss = self._evaluate(session)
        if valid_loss is not None:
            self.stepper.learning_rate.after_epoch(valid_loss)
        state.end_epoch(valid_loss)
        self.stepper.hidden = None
        record = state.history[-1]
        session.log.write("epoch", **record)
        session.display.line(epoch_summary(record, self.arguments.epochs))
        if valid_loss is None or state.validated(valid_loss):
            self._export()
        self._save(session.log.size)

    def _stop_in_epoch(self, session: _Session, reason: str) -> None:
        """Saves first. The best model stays the best: this one is kept if it is better, or the first."""
        self._save(session.log.size)
        validates = self._valid_ids is not None and reason != "interrupted"
        if validates and session.valid_step != self.state.step:
            self._validate_in_epoch(session)
            self._save(session.log.size)
        if self.state.best_loss is None:
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
        if self.source is not None:
            names.add(DATA_NAME)
        if not isinstance(snapshots.uncompiled(self.model), PretrainedMixin):
            return names | {BEST_NAME}
        return names | {CONFIG_NAME, WEIGHTS_NAME} | ({TOKENIZER_NAME} if self.tokenizer else set())

    def _save_source(self) -> None:
        """Writes where the texts come from, for whoever evaluates the model later."""
        if self._folder.path is not None and self.source is not None:
            text = json.dumps(self.source, indent=2) + "\n"
            write_files(self._folder.path, {DATA_NAME: text.encode()})

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


def _completed(
    arguments: TrainingArguments, train_ids: Tensor, valid_ids: Tensor | None
) -> TrainingArguments:
    """The settings with the batch sizes that were left to the length of the texts."""
    bptt = arguments.bptt
    batch_size = arguments.batch_size or default_batch_size(len(train_ids), bptt)
    tokens = len(train_ids if valid_ids is None else valid_ids)
    eval_batch_size = arguments.eval_batch_size or default_eval_batch_size(tokens, bptt, batch_size)
    return replace(arguments, batch_size=batch_size, eval_batch_size=eval_batch_size)
