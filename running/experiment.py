"""The order of a run, the same for every experiment, and what a crash in it may leave.

    flags → directory → weights → train → evaluate → args.json

args.json is there from the first moment and says "finished" last of all: killed anywhere between, the run goes on with --resume.
"""

import abc
import sys
import time

import torch

from running.command_line import InputError, Parser, integer, number
from running.devices import describe_device, encoder_precision, is_out_of_memory, select_device, settled_precision
from running.directory import (
    adopt_stored_flags,
    check_machine,
    drawn_seed,
    find_directory,
    is_finished,
    keep_results,
    load_weights,
    provenance,
    refuse_to_overwrite,
    save_weights,
    start_directory,
    stored_args,
    take_evaluation_seed,
    write_args,
)
from running.files import write_csv, write_json
from running.schedules import LR_SCHEDULES
from running.training import after_training, train


class Experiment(abc.ABC):
    """What one experiment has of its own. The class is a setting's flags; an object is one model of a setting.

    Of the class: name; recipes, dict name → dict flag → value; weight_files, what a trained model consists of. Of an object:
    args and device; modules, dict name → nn.Module that is trained; generators, dict name → torch.Generator or what else has
    its get_state and set_state: every source of randomness of `loss`, the order of the data too; rates, dict name of a
    module → factor of its learning rate, 1 where there is none; keep_steps: steps between two calls of `keep`, 0 for none.
    """

    name, recipes, weight_files = "", {}, ()
    rates, keep_steps = None, 0

    @classmethod
    def parser(cls):
        """Parser of the script, whose docstring is its help."""
        parser = Parser(sys.modules[cls.__module__].__doc__, cls.recipes)
        add_run_flags(parser)
        cls.add_flags(parser)
        return parser

    @classmethod
    def parse_flags(cls, argv=None):
        """(args, given) of a command line: the Namespace with the recipe's values filled in, and the flags that were given."""
        return cls.parser().parse(argv)

    @classmethod
    @abc.abstractmethod
    def add_flags(cls, parser):
        """Add the experiment's own flags to a Parser."""

    @classmethod
    @abc.abstractmethod
    def default_id(cls, args):
        """Name of a fresh model directory."""

    @classmethod
    @abc.abstractmethod
    def settle(cls, args):
        """Replace "auto" by its value in all flags but the precision, in place; InputError for flags that do not fit."""

    @classmethod
    @abc.abstractmethod
    def result_rows(cls, args):
        """List of dicts column → value: what tells the rows apart that results.csv must have."""

    @abc.abstractmethod
    def __init__(self, args, device):
        """Open the data or set up the latents, and build the modules; InputError if that cannot be."""

    def check_stored(self, stored):
        """Raise InputError if a run whose args.json is the dict `stored` was of other data."""
        return

    def details(self):
        """Dict of what args.json holds beside the flags."""
        return {}

    @abc.abstractmethod
    def describe(self):
        """Dict title → text: the setting in words."""

    @abc.abstractmethod
    def draw(self, directory):
        """Set all weights from the training seed; what is not trained is kept in the directory, or read from there."""

    @abc.abstractmethod
    def loss(self, share_done):
        """The loss of one fresh batch, a scalar tensor, when that share of the steps is done."""

    @abc.abstractmethod
    def monitor(self):
        """(dict column → number, text) for a line of the log, from random numbers of its own."""

    def encoder_precision(self):
        """Context of the encoders' forward pass: in the precision of the flags while they are trained, else in fp32."""
        return encoder_precision(self.device, self.args.precision if torch.is_grad_enabled() else "fp32")

    def weights(self):
        """Dict name of a file → state_dict of what was trained."""
        return {name: module.state_dict() for name, module in self.modules.items()}

    def keep(self, directory, step):
        """Called every keep_steps steps, when `step` of them are done."""
        return

    def load(self, directory):
        """Read the weights of a trained model; InputError that names a file that is missing, damaged or of another setting."""
        for name, module in self.modules.items():
            load_weights(module, directory / f"{name}.pt")

    @abc.abstractmethod
    def evaluate(self, seed):
        """DataFrame of what the probes find, by random numbers of that seed."""

    def table(self, results):
        """What results.csv holds of the DataFrame of `evaluate`."""
        return results

    @abc.abstractmethod
    def show(self, results, path):
        """Print the DataFrame of `evaluate` and what follows from it, and draw it into the PNG `path`."""


def add_run_flags(parser):
    """Add the flags that every training script shares."""
    recipes = tuple(parser.recipes)
    flag = parser.flag
    parser.section("run")
    flag("--model-dir", str, "folder of all models", "models", "call")
    flag("--model-id", str, "folder of this model inside it; none given: a fresh one is made and printed", None, "call")
    flag(
        "--seed", integer(0), "training seed, or with --evaluate the evaluation's; none given: one is drawn and stored"
    )
    flag(
        "--resume", bool, "continue an unfinished run from its last checkpoint; start it if there is none", None, "call"
    )
    flag("--overwrite", bool, "train anew where a model lies already", None, "call")
    flag("--evaluate", bool, "do not train: evaluate a trained model again, with another seed", None, "call")
    flag("--load-args", bool, "let args.json of the model directory win over contradicting flags", None, "call")
    flag("--log-steps", integer(1), "steps between two lines of progress and checkpoints", 1000, "freely")
    flag("--no-cuda", bool, "stay on the CPU", None, "freely")
    parser.section("training", "--recipe sets what follows it at once; a flag that is given wins")
    flag("--protocol", ("code", "paper"), "where the paper's text and its runs differ, follow which", "code")
    flag("--recipe", recipes, "the paper's training, or a faster one", "paper")
    flag("--init", ("default", "he"), "encoders' weights: PyTorch's default or He's")
    flag("--lr", number(0, above=True), "Adam's learning rate, its peak under a schedule")
    flag("--optimiser", ("adam", "muon"), "muon takes the filters of convolutions, Adam all else; see optimisation.py")
    flag("--layer-lr", ("uniform", "fan-in"), "of all layers alike, or larger where the fan-in is smaller; see there")
    flag(
        "--preconditioner", ("none", "inputs"), "of Adam's gradients; inputs: whiten by each layer's inputs; see there"
    )
    flag("--lr-schedule", tuple(LR_SCHEDULES), "one cycle warms up and comes down to nothing")
    flag("--batch-size", integer(2), "pairs a step")
    flag("--final-batch-size", integer(2, or_zero=True), "pairs in the last step: the batch grows geometrically from "
         "--batch-size; 0 = it does not; a recipe's auto: larger for larger encodings")  # fmt: skip
    flag("--train-steps", integer(1), "steps of training; a recipe's auto: by the size of the encodings")
    flag("--precision", ("fp32", "tf32", "bf16"), "of matrix products; tf32 on CUDA alone; a recipe's auto: bf16 where the "
         "device computes it fast, else fp32")  # fmt: skip


def run_experiment(experiment_class, argv=None):
    """Train and evaluate a model, or with --evaluate evaluate one again; returns the exit code."""
    parser = experiment_class.parser()
    args, given = parser.parse(argv)
    directory = find_directory(args, experiment_class.default_id(args))
    adopt_stored_flags(args, given, parser, directory)
    refuse_to_overwrite(args, directory)
    experiment_class.settle(args)
    device = select_device(args.no_cuda)
    if args.evaluate:
        return evaluate_again(experiment_class, args, directory, device)
    args.precision = settled_precision(args.precision, device)
    if args.resume and is_finished(directory):
        print(f"{directory} is finished already: nothing to resume")
        return 0
    if args.seed is None:
        args.seed = drawn_seed()
    experiment = experiment_class(args, device)
    details = provenance(device) | experiment.details()
    if args.resume and (directory / "args.json").exists():
        stored = stored_args(directory)
        experiment.check_stored(stored)
        details |= check_machine(directory, stored, details, "no_cuda" in given)
    start_directory(directory, args, details)
    print(f"model        {directory}, seed {args.seed}")
    print_description(experiment)

    experiment.draw(directory)
    progress = train(experiment, directory)
    for name, state in experiment.weights().items():
        save_weights(state, directory / f"{name}.pt")
    details |= {"eval_seed": args.seed + 1, "train_seconds": round(progress.seconds, 1)}
    with after_training(args):
        details |= write_evaluation(experiment, directory, details["eval_seed"])
    write_args(directory, args, {**details, "finished": True})
    return 0


def evaluate_again(experiment_class, args, directory, device):
    """--evaluate: results.csv of a trained model by another seed; the results of an earlier one are kept beside it."""
    stored, seed = take_evaluation_seed(args, directory)
    # in full, also where the device does not have the precision of the training
    args.seed, args.precision = stored["seed"], "fp32"
    experiment = experiment_class(args, device)
    experiment.check_stored(stored)
    experiment.load(directory)
    print(f"model        {directory}, training seed {args.seed}, evaluation seed {seed}")
    print_description(experiment)
    timing = write_evaluation(experiment, directory, seed, stored.get("eval_seed"))
    flags = {name: getattr(args, name) for name in experiment_class.parser().names("again")}
    write_json(directory / "args.json", {**stored, **flags, "eval_seed": seed, **timing, "finished": True})
    return 0


def print_description(experiment):
    """Say what is trained or evaluated, and where."""
    lines = experiment.describe() | {"device": f"{describe_device(experiment.device)}, {experiment.args.precision}"}
    print("\n".join(f"{name:12} {line}" for name, line in lines.items()), flush=True)


def write_evaluation(experiment, directory, seed, earlier_seed=None):
    """Evaluate, write results.csv and results.png, print both; returns the duration as a dict.

    The results of an earlier evaluation with another seed are kept as results_seed{N}.csv and .png. Raises InputError if the
    encodings are of no use, and if they take more memory than there is: the model lies in the directory by then.
    """
    started = time.perf_counter()
    try:
        results = experiment.evaluate(seed)
    except (ValueError, torch.linalg.LinAlgError) as error:  # weights that are not finite, or make encodings explode
        raise InputError(f"the encodings of {directory} cannot be evaluated: {error}; train it anew") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(_with_less_memory(experiment, directory, seed)) from None
    keep_results(directory, earlier_seed, seed)
    write_csv(experiment.table(results), directory / "results.csv")
    experiment.show(results, directory / "results.png")
    print(f"picture      {directory / 'results.png'}", flush=True)
    return {"eval_seconds": round(time.perf_counter() - started, 1)}


def _with_less_memory(experiment, directory, seed):
    """What to do where the evaluation takes more memory than there is."""
    args, ways = experiment.args, []
    if getattr(args, "num_eval_batches", 1) > 1:
        ways.append(f"--num-eval-batches below {args.num_eval_batches}")
    if not getattr(args, "mlp_eval", True):
        ways.append("--mlp-eval")
    if experiment.device.type == "cuda":
        ways.append("--no-cuda")
    again = f"--evaluate --seed {seed}" if args.evaluate else "--resume"
    return (
        f"{describe_device(experiment.device)} has too little memory for the evaluation; the trained model is kept in "
        f"{directory}: evaluate it with --model-dir {args.model_dir} --model-id {args.model_id} {again} and "
        f"{' or '.join(ways) or 'more memory'}"
    )
