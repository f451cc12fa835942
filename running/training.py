"""The one training loop: progress, checkpoints, signals and resuming."""

import contextlib
import dataclasses
import datetime
import math
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from running import ranks
from running.command_line import InputError, place_of
from running.directory import load_state, load_torch, save_torch
from running.files import write_csv
from running.optimisation import make_optimiser, training_step
from running.schedules import learning_rate

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal or the connection was closed


@dataclasses.dataclass
class Progress:
    """Where a run stands: steps done, loss since the last line of the log, the log, seconds spent in the loop."""

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    log: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def train(experiment, directory):
    """Train the modules of an Experiment for args.train_steps steps; returns the Progress at the end.

    Continues from checkpoint.pt if the directory has one. The signals STOP, unless they are ignored, write a checkpoint, say how
    to resume and exit with 128 + the signal's number. Raises InputError if the loss is no longer finite, and if checkpoint.pt is
    damaged or of another run.
    """
    args, checkpoint, progress = experiment.args, directory / "checkpoint.pt", Progress()
    optimiser = make_optimiser(experiment.modules, args, experiment.rates)
    for module in experiment.modules.values():
        module.train()
        ranks.share_batch_norms(module)
    if ranks.from_first(checkpoint.exists):
        content = ranks.from_first(lambda: load_torch(checkpoint))
        with ranks.agreed():
            progress = _adopt_checkpoint(content, checkpoint, experiment, optimiser)
        print(f"resumed from step {progress.step} of {args.train_steps}")
        # a kill may have come between the checkpoint, which holds the log, and the log's own file
        ranks.from_first(lambda: write_csv(pd.DataFrame(progress.log), directory / "train_log.csv"))
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=experiment.device)
    already, started = progress.seconds, time.perf_counter()
    bar = tqdm(
        total=args.train_steps,
        initial=progress.step,
        unit="step",
        smoothing=0.05,
        disable=ranks.rank() > 0 or not sys.stderr.isatty(),
    )

    def mean_loss():
        loss = loss_sum.item() / max(progress.loss_steps, 1)
        for name, value in (("loss", loss), ("norm of the gradient", norm.item())):
            if not math.isfinite(value):
                raise InputError(
                    f"the {name} is {value} within the steps up to {progress.step}; lower --lr, or use --precision fp32"
                )
        return loss

    def seconds():
        return already + time.perf_counter() - started

    def save():
        mean_loss()  # what is not finite shall not take the place of the last checkpoint
        progress.loss_sum, progress.seconds = loss_sum.item(), seconds()
        _save_checkpoint(checkpoint, progress, experiment, optimiser)
        write_csv(pd.DataFrame(progress.log), directory / "train_log.csv")

    def keep():
        mean_loss()
        experiment.keep(directory, progress.step)

    def log():
        row = {"step": progress.step, "loss": mean_loss(), "lr": learning_rate(args, share_done),
               "seconds": round(seconds(), 3)}  # fmt: skip
        columns, text = experiment.monitor()
        progress.log.append({**row, **columns})
        loss_sum.zero_()
        progress.loss_steps = 0
        save()
        bar.write(_progress_line(progress, args.train_steps, text), file=sys.stdout)
        sys.stdout.flush()

    def end():
        save()
        bar.close()
        _end_by(number, f"after step {progress.step} of {args.train_steps}", args)

    with bar, _StopSignals() as stop:
        while progress.step < args.train_steps:
            share_done = progress.step / args.train_steps
            loss, norm = training_step(experiment, optimiser, share_done)
            loss_sum += loss
            progress.step += 1
            progress.loss_steps += 1
            if experiment.keep_steps and progress.step % experiment.keep_steps == 0:
                ranks.from_first(keep)
            if bar.update() and not loss.is_cuda:  # a GPU would be waited for
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if progress.step % args.log_steps == 0 or progress.step == args.train_steps:
                ranks.from_first(log)
                loss_sum.zero_()  # as the first process has done
                progress.loss_steps = 0
            if number := stop.decided():
                ranks.from_first(end)
    return progress


def _end_by(number, where, args):
    print(
        f"stopped by {signal.Signals(number).name} {where}; the checkpoint is written, continue with: "
        f"{ranks.launcher()} {Path(sys.argv[0]).name} {place_of(args)} --resume",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(128 + number)


@contextlib.contextmanager
def after_training(args):
    """Context of what follows `train`: the signals STOP, unless they are ignored, end it and say how to resume."""
    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller has the signals
        for number in STOP:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, _: _end_by(number, "in the evaluation", args))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_line(progress, total, text):
    row, previous = progress.log[-1], progress.log[-2] if len(progress.log) > 1 else {"step": 0, "seconds": 0.0}
    rate = (row["step"] - previous["step"]) / max(row["seconds"] - previous["seconds"], 1e-9)
    left = datetime.timedelta(seconds=round((total - row["step"]) / rate))
    return f"step {row['step']:>{len(str(total))}}/{total}  loss {row['loss']:.3f}  {text}  {rate:.1f} steps/s, {left} left"


def _save_checkpoint(path, progress, experiment, optimiser):
    content = {
        "progress": dataclasses.asdict(progress),
        "device": experiment.device.type,
        "modules": {name: module.state_dict() for name, module in experiment.modules.items()},
        "optimiser": optimiser.state_dict(),
        "preconditioner": optimiser.whitening.state_dict() if optimiser.whitening else None,
        "generators": {name: generator.get_state() for name, generator in experiment.generators.items()},
    }
    save_torch(content, path)


def _adopt_checkpoint(content, path, experiment, optimiser):
    """Put the dict that `path` holds in its place; returns the Progress, or raises InputError if it is of another run."""
    try:
        for name, module in experiment.modules.items():
            load_state(module, content["modules"][name], path)
        optimiser.load_state_dict(content["optimiser"])
        if optimiser.whitening:
            optimiser.whitening.load_state_dict(content["preconditioner"])
        progress = Progress(**content["progress"])
        optimiser.count = progress.step
        before, now = content.get("device", experiment.device.type), experiment.device.type
        for name, generator in experiment.generators.items():
            if before == now or not isinstance(generator, torch.Generator):
                generator.set_state(content["generators"][name])
            else:  # the states of generators on a CPU and on a GPU say nothing to each other
                generator.manual_seed((generator.initial_seed() + progress.step) % 2**63)
                print(f"the run was on {before} and is on {now}: it goes on with other random numbers")
        return progress
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a checkpoint of this run ({type(error).__name__}: {error}); start anew with --overwrite"
        ) from None


class _StopSignals:
    """Context that notes the first of STOP, unless it is ignored, in `signal`; a second of its kind does what it did before.

    One of another kind may come at the same moment, as SIGTERM and SIGHUP do where a session ends, and says nothing new.
    Of several processes none heeds a second one: torchrun hands on what its scheduler may have sent to all of them.
    """

    def __enter__(self):
        self.signal = None
        self._interval = self._steps_left = 1
        self._asked = time.perf_counter()
        self._previous = {}
        with contextlib.suppress(ValueError):  # not in the main thread: the caller has the signals
            for number in STOP:
                # nohup and a shell's background ignore theirs; SIGTERM is ignored by jobs on SLURM, before and after a training
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = self.signal or signal.Signals(number)
        if ranks.size() == 1:
            signal.signal(number, self._previous[number])

    def decided(self):
        """The signal that ends the run after this step, None for none: the same in all processes, which all ask after each.

        They tell each other about once a second.
        """
        if ranks.size() == 1:
            return self.signal
        self._steps_left -= 1
        if self._steps_left:
            return None
        number, seconds = ranks.largest(self.signal or 0, time.perf_counter() - self._asked)
        self._asked = time.perf_counter()
        self._interval = max(1, min(2 * self._interval, round(self._interval / max(seconds, 1e-3))))
        self._steps_left = self._interval
        return int(number) or None

    def _restore(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *exception):
        self._restore()
