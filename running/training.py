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
from running.directory import CHECKPOINT, has_checkpoint, load_checkpoint, load_state, save_checkpoint
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
    """Train what an Experiment trains for args.train_steps steps; returns the Progress at the end.

    Continues from the checkpoint if the directory has one, or from the one before if that is damaged. The signals STOP, unless
    they are ignored, write a checkpoint, say how to resume and exit with 128 + the signal's number. Raises InputError if the loss
    is no longer finite, and if the checkpoint is damaged or of another run.
    """
    args, progress = experiment.args, Progress()
    optimiser = make_optimiser(experiment.trained, args, experiment.rates)
    for module in experiment.trained.values():
        module.train()
        ranks.share_batch_norms(module)
    if ranks.from_first(lambda: has_checkpoint(directory)):
        content, path = ranks.from_first(lambda: load_checkpoint(directory))
        with ranks.agreed():
            progress = _adopt_checkpoint(content, path, experiment, optimiser)
        print(f"resumed from step {progress.step} of {args.train_steps}")
        if path.name != CHECKPOINT:  # else the next would put the damaged one in its place
            ranks.from_first(lambda: path.replace(directory / CHECKPOINT))
        # a kill may have come between the checkpoint, which holds the log, and the log's own file
        ranks.from_first(lambda: write_csv(pd.DataFrame(progress.log), directory / "train_log.csv"))
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=experiment.device)
    already = progress.seconds
    started = saved = time.perf_counter()
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
        save_checkpoint(_checkpoint(progress, experiment, optimiser), directory)
        write_csv(pd.DataFrame(progress.log), directory / "train_log.csv")

    def keep():
        mean_loss()
        experiment.keep(directory, progress.step)

    def log():
        row = {"step": progress.step, "loss": mean_loss(), "lr": learning_rate(args, share_done),
               "seconds": round(seconds(), 3)}  # fmt: skip
        try:
            columns, text = experiment.monitor()
        except (ValueError, torch.linalg.LinAlgError) as error:  # the last update may have been the one that was too far
            raise InputError(
                f"the encodings after step {progress.step} cannot be scored: {error}; lower --lr, or use --precision fp32"
            ) from None
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
                saved = time.perf_counter()
            number, is_due = stop.decided(time.perf_counter() - saved >= 60 * args.checkpoint_minutes)
            if number:
                ranks.from_first(end)
            if is_due:
                ranks.from_first(save)
                saved = time.perf_counter()
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


def _checkpoint(progress, experiment, optimiser):
    return {
        "run": experiment.identity(),
        "progress": dataclasses.asdict(progress),
        "device": experiment.device.type,
        "modules": {name: module.state_dict() for name, module in experiment.trained.items()},
        "optimiser": optimiser.state_dict(),
        "preconditioner": optimiser.whitening.state_dict() if optimiser.whitening else None,
        "generators": {name: generator.get_state() for name, generator in experiment.generators.items()},
    }


def _adopt_checkpoint(content, path, experiment, optimiser):
    """Put the dict that `path` holds in its place; returns the Progress, or raises InputError if it is of another run."""
    try:
        then = content.get("run", {})  # older ones do not say
        for name, value in experiment.identity().items():
            if then.get(name, value) != value:
                what = f"--{name.replace('_', '-')}" if name in vars(experiment.args) else name
                raise InputError(f"{path} is not a checkpoint of this run: it is of {what} {then[name]}, and args.json says "
                                 f"{value}; restore either, or start anew with --overwrite")  # fmt: skip
        progress = Progress(**content["progress"])
        _check_progress(progress, experiment.args.train_steps)
        for name, module in experiment.trained.items():
            load_state(module, content["modules"][name], path)
        _check_alike(content["optimiser"], optimiser.state_dict())
        optimiser.load_state_dict(content["optimiser"])
        if optimiser.whitening:
            optimiser.whitening.load_state_dict(content["preconditioner"])
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


def _check_progress(progress, train_steps):
    """Raise ValueError or TypeError unless a Progress is one of a run of so many steps."""
    if type(progress.step) is not int or not 0 < progress.step <= train_steps:
        raise ValueError(f"it is at step {progress.step!r} of {train_steps}")
    numbers = [progress.loss_sum, progress.loss_steps, progress.seconds]
    numbers += [row[name] for row in progress.log for name in ("step", "seconds")]
    if type(progress.log) is not list or not all(map(math.isfinite, numbers)):
        raise ValueError("its log is none")


def _check_alike(found, expected):
    """Raise ValueError unless two nests of dicts, lists and tensors have the same names, lengths and shapes."""
    if isinstance(expected, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and found.layout == expected.layout and found.shape == expected.shape
    else:
        alike = type(found) is type(expected) and len(found) == len(expected)
    if not alike:
        raise ValueError("its tensors are of another kind or shape")
    for key in expected if isinstance(expected, dict) else range(len(expected)) if isinstance(expected, list) else ():
        _check_alike(found[key], expected[key])


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

    def decided(self, is_due):
        """(signal, is_due): what ends the run after this step, None for nothing, and whether a checkpoint is due in any process.

        The same in all processes, which all ask after each step. They tell each other about once a second.
        """
        if ranks.size() == 1:
            return self.signal, is_due
        self._steps_left -= 1
        if self._steps_left:
            return None, False
        number, seconds, is_due = ranks.largest(self.signal or 0, time.perf_counter() - self._asked, is_due)
        self._asked = time.perf_counter()
        self._interval = max(1, min(2 * self._interval, round(self._interval / max(seconds, 1e-3))))
        self._steps_left = self._interval
        return int(number) or None, bool(is_due)

    def _restore(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *exception):
        self._restore()
