"""The order of a run, the same for every experiment, and what a crash in it may leave.

    flags → directory → weights → train → evaluate → args.json

args.json is there from the first moment and says "finished" last of all: killed anywhere between, the run goes on with --resume.
An evaluation of a trained model takes the place of the earlier one as a whole, at the moment when args.json says so; what it does
not write, references.csv and encodings.npz without their flags, stays. From the first look at its directory to the end no other
process works there.
"""

import contextlib
import copy
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from running import directory as store
from running import ranks
from running.command_line import InputError, Parser, integer, is_out_of_memory, number, place_of
from running.devices import describe_device, encoder_precision, keep_freed_memory, select_device, settled_precision
from running.files import replaced, write_csv, write_json
from running.geometry import geometry
from running.lock import occupied
from running.memory import limit_memory
from running.official import official_args, official_names
from running.schedules import LR_SCHEDULES, smallest_batch
from running.staging import digests, staged
from running.training import after_training, train


class Experiment:
    """What one experiment has of its own. The class is a setting's flags; an object is one model of a setting.

    Of the class: name; recipes, dict name → dict flag → value; similarity, the loss's, "distance" or "cosine"; weight_files, what
    a trained model consists of. Of an object: args and device; modules, dict name → nn.Module that is trained; networks, these
    and what is not trained, None for these alone; encoding_size, the encodings' dimensions; objective, nn.Module of what the loss
    itself learns, None for nothing; ceiling, what `evaluate` found of a model that was told the factors, None for nothing;
    generators, dict name → torch.Generator or what else has its get_state and set_state: every source of randomness of `loss`,
    the order of the data too; rates, dict name of a module → factor of its learning rate, 1 where there is none; keep_steps:
    steps between two calls of keep(directory, step), 0 for none. A subclass gives these methods, the first four of the class; all
    raise InputError for what a user can mend. In several processes draw, monitor, keep and evaluate are called in the first
    alone.

        add_flags(parser)           add the experiment's own flags to a Parser
        default_id(args)            name of a fresh model directory
        settle(args)                check the flags against each other, and replace "auto" in all but the precision, in place
        result_rows(args)           list of dicts column → value: what tells the rows apart that results.csv must have
        __init__(args, device)      open the data or set up the latents, and build the modules
        describe()                  dict title → text: the setting in words
        draw_encoders()             set the weights of the encoders from the training seed
        draw(directory)             the same, and of what is not trained, which is kept there, or read from there
        loss(share_done)            the loss of one fresh batch, a scalar tensor; of several processes, this one's part
        monitor()                   (dict column → number, text) for a line of the log, from random numbers of its own
        evaluate(seed)              DataFrame of what the probes find, by random numbers of that seed; sets `evaluated`, as
                                    `write_encodings` takes it, the encodings of images and of texts first
        show(results, path, references)  print that and what follows from it, and draw it into the PNG `path`; beside it the
                                    references, dict "floor", "ceiling" → DataFrame, of either, both or none
    """

    name, recipes, similarity, weight_files = "", {}, "cosine", ()
    networks, objective, rates, keep_steps, ceiling = None, None, None, 0, None

    @classmethod
    def parser(cls):
        """Parser of the script, whose docstring is its help."""
        parser = Parser(sys.modules[cls.__module__].__doc__, cls.recipes)
        add_run_flags(parser)
        cls.add_flags(parser)
        return parser

    @classmethod
    def widest_layer(cls, args):
        """Units of the encoders' widest layer, by which --precision auto is settled; of images, convolutions are wide enough."""
        return math.inf

    @classmethod
    def parse_flags(cls, argv=None):
        """(args, given) of a command line: the Namespace with the recipe's values filled in, and the flags that were given."""
        return cls.parser().parse(argv)

    def check_stored(self, stored):
        """Raise InputError if a run whose args.json is the dict `stored` was of other data."""
        return

    def details(self):
        """Dict of what args.json holds beside the flags."""
        return {"dimensions": self.encoding_size}

    def identity(self):
        """Dict of the flags that say which run this is; args.json of an unfinished one may not say otherwise."""
        differing = self.parser().differs
        return {name: value for name, value in vars(self.args).items() if name not in differing}

    def encoder_precision(self):
        """Context of the encoders' forward pass: in the precision of the flags while they are trained, else in fp32."""
        return encoder_precision(self.device, self.args.precision if torch.is_grad_enabled() else "fp32")

    @property
    def trained(self):
        """Dict name → nn.Module of all that is trained: the encoders, and what the loss itself learns."""
        return self.modules | ({"objective": self.objective} if self.objective else {})

    def weights(self):
        """Dict name of a file → state_dict of the encoders."""
        return {name: module.state_dict() for name, module in self.modules.items()}

    def load(self, directory):
        """Read the weights of a trained model; InputError that names a file that is missing, damaged or of another setting."""
        for name, module in (self.networks or self.modules).items():
            store.load_weights(module, directory / f"{name}.pt")

    def draw(self, directory):
        """Draw the encoders, where nothing else has weights."""
        self.draw_encoders()

    def complete(self):
        """Make of the encoders, after the last step of the training, those whose weights are kept."""
        return

    def table(self, results):
        """What results.csv holds of the DataFrame of `evaluate`."""
        return results


def add_run_flags(parser):
    """Add the flags that every training script shares."""
    recipes, flag = tuple(parser.recipes), parser.flag

    def auto(name, text):
        """What a recipe's auto means, if one has it."""
        return f"; a recipe's auto: {text}" if any(values[name] == "auto" for values in parser.recipes.values()) else ""

    parser.section("run")
    flag("--model-dir", str, "folder of all models", "models", "call")
    flag("--model-id", str, "folder of this model inside it; none given: a fresh one is made and printed", None, "call")
    flag("--seed", integer(0), "training seed, or with --evaluate the evaluation's; none given: one is drawn and stored")
    flag("--resume", bool, "continue an unfinished run from its last checkpoint; start it if there is none", None, "call")
    flag("--overwrite", bool, "train anew where a model lies already", None, "call")
    flag("--evaluate", bool, "do not train: evaluate a trained model again, with another seed", None, "call")
    flag("--load-args", bool, "let args.json of the model directory win over contradicting flags", None, "call")
    flag("--export-official", str, "do not train: write a trained model into that folder, as the code behind the paper's "
         "figures reads it", None, "call")  # fmt: skip
    flag("--log-steps", integer(1, 10**12), "steps between two lines of progress and checkpoints", 1000, "freely")
    flag("--checkpoint-minutes", number(0, above=True), "a checkpoint comes at least that often", 10.0, "freely")
    flag("--save-encodings", bool, "keep encodings and factors of the evaluation's samples in encodings.npz", None, "freely")
    flag("--floor", bool, "probe untrained encoders too: references.csv, and small in the picture", None, "freely")
    flag("--no-cuda", bool, "stay on the CPU", None, "freely")
    parser.section("training", "--recipe sets what follows it at once; a flag that is given wins")
    flag("--protocol", ("code", "paper"), "where the paper's text and its runs differ, follow which", "code")
    flag("--recipe", recipes, "the paper's training, or a faster one", "paper")
    flag("--loss", ("infonce", "sigmoid"), "a soft-max over negatives, as the paper's, or each combination of a batch by itself, "
         "pair or not, by a learned scale (Zhai et al., 2023)", "infonce")  # fmt: skip
    flag("--init", ("default", "he"), "encoders' weights: PyTorch's default or He's")
    flag("--lr", number(0, above=True), "Adam's learning rate, its peak under a schedule")
    flag("--optimiser", ("adam", "muon"), "muon takes the filters of convolutions and an MLP's matrices but the last, Adam "
         "all else; see running/optimisation.py")  # fmt: skip
    flag("--layer-lr", ("uniform", "fan-in"), "of all layers alike, or larger where the fan-in is smaller; see there")
    flag("--preconditioner", ("none", "inputs"), "of Adam's gradients; inputs: whiten by each layer's inputs; see there")
    flag("--lr-schedule", tuple(LR_SCHEDULES), "one cycle warms up and comes down to nothing")
    flag("--batch-size", integer(2, 10**7), "pairs a step")
    flag("--final-batch-size", integer(2, 10**7, or_zero=True), "pairs in the last step: the batch grows geometrically from "
         "--batch-size; 0 = it does not" + auto("final_batch_size", "larger for larger encodings"))  # fmt: skip
    flag("--train-steps", integer(1, 10**12), "steps of training" + auto("train_steps", "by the size of the encodings"))
    flag("--precision", ("fp32", "tf32", "bf16"), "of matrix products; tf32 on CUDA alone" +
         auto("precision", "bf16 where the encoders are wide and the device computes it fast, else fp32"))  # fmt: skip


def run_experiment(experiment_class, argv=None):
    """Train and evaluate a model, or with --evaluate evaluate one again; returns the exit code.

    Each of several processes that torchrun has started trains on its share of every batch; the first does all else.
    """
    keep_freed_memory()
    with ranks.joined(), contextlib.ExitStack() as held:
        ranks.require_alike({"flags": " ".join(sys.argv[1:] if argv is None else argv)})
        args, given, directory = ranks.from_first(lambda: settled_flags(experiment_class, argv, held))
        if args.evaluate or args.export_official is not None:
            work = evaluate_again if args.evaluate else export_model
            return work(experiment_class, args, directory) if ranks.rank() == 0 else 0
        if args.resume and ranks.from_first(lambda: store.is_finished(directory)):
            print(f"{directory} is finished already: nothing to resume")
            return 0
        goes_on = ranks.from_first(lambda: args.resume and (directory / "args.json").exists())
        stored = ranks.from_first(lambda: store.stored_args(directory)) if goes_on else None
        with ranks.agreed():
            device = select_device(args.no_cuda)
            if not (stored and args.precision == "tf32"):  # a run may move to a CPU, which computes that in full
                args.precision = settled_precision(args.precision, device, experiment_class.widest_layer(args))
            if device.type == "cpu":
                limit_memory()
            experiment = experiment_class(args, device)
            if stored:
                experiment.check_stored(stored)
            details = store.provenance(device) | experiment.details()
            details |= {"processes": ranks.size()} if ranks.size() > 1 else {}
        ranks.require_alike({"precision": args.precision, "versions": details["versions"], "data": details.get("data"),
                             "GPU": describe_device(device) if device.type == "cuda" else None})  # fmt: skip
        details = ranks.from_first(lambda: begin(experiment, directory, details, stored, "no_cuda" in given))
        ranks.share_weights((experiment.networks or experiment.modules).values())
        progress = train(experiment, directory)
        return finish(experiment, directory, progress, details) if ranks.rank() == 0 else 0


def settled_flags(experiment_class, argv, held):
    """(args, given, directory) of a command line: all flags settled but the precision; InputError for what does not fit.

    held: ExitStack that keeps the directory occupied, from before the first look into it.
    """
    parser = experiment_class.parser()
    args, given = parser.parse(argv)
    directory = store.find_directory(args, experiment_class.default_id(args))
    if args.export_official is not None:
        return args, given, directory
    try:
        held.enter_context(occupied(directory))
    except InputError:
        if "model_id" in given or not directory.exists():
            raise
        return settled_flags(experiment_class, argv, held)  # another run has just taken the fresh name
    store.tidy(directory, experiment_class.weight_files)
    store.adopt_stored_flags(args, given, parser, directory)
    store.refuse_to_overwrite(args, directory, parser)
    experiment_class.settle(args)
    if args.seed is None and not args.evaluate:
        args.seed = store.drawn_seed()
    if ranks.size() > smallest_batch(args) and not args.evaluate:
        raise InputError(f"{ranks.size()} processes share a batch of {smallest_batch(args)} pairs, and each needs one; start "
                         "fewer, or raise --batch-size")  # fmt: skip
    return args, given, directory


def begin(experiment, directory, details, stored, no_cuda_given):
    """Make the directory or go on in it, and draw the weights; returns the details that args.json has beside the flags.

    stored: args.json of a run that is resumed, else None.
    """
    args = experiment.args
    drawn = [name for name in experiment.weight_files if Path(name).stem not in experiment.modules]  # once, not trained
    details["weights"] = {name: digest for name, digest in (stored or {}).get("weights", {}).items() if name in drawn}
    if stored:
        details |= store.check_machine(directory, stored, details, no_cuda_given)
    store.start_directory(directory, args, details, experiment.weight_files)
    print(f"model        {directory}, seed {args.seed}")
    print_description(experiment)
    experiment.draw(directory)
    details["weights"] = store.weights_digests(directory, drawn)
    store.write_args(directory, args, {**details, "finished": False})
    return details


def finish(experiment, directory, progress, details):
    """Write the weights, evaluate, and say in args.json that the run is finished; returns the exit code."""
    args = experiment.args
    experiment.complete()
    for name, state in experiment.weights().items():
        store.save_weights(state, directory / f"{name}.pt")
    details["weights"] = store.weights_digests(directory, experiment.weight_files)
    details["train_seconds"] = round(progress.seconds, 1)
    store.write_args(directory, args, {**details, "finished": False})
    details["eval_seed"] = args.seed + 1
    with after_training(args), staged(directory) as folder:
        details |= write_evaluation(experiment, directory, folder, details["eval_seed"])
        details["files"] = digests(folder)
        for file in folder.iterdir():
            file.replace(directory / file.name)
    (directory / store.CHECKPOINT_BEFORE).unlink(missing_ok=True)
    store.write_args(directory, args, {**details, "finished": True})
    return 0


def evaluate_again(experiment_class, args, directory):
    """--evaluate: results.csv of a trained model by another seed; the results of an earlier one are kept beside it."""
    device, parser = select_device(args.no_cuda), experiment_class.parser()
    stored, seed = store.take_evaluation_seed(args, directory, parser, experiment_class.weight_files)
    # in full, also where the device does not have the precision of the training
    args.seed, args.precision = stored["seed"], "fp32"
    if device.type == "cpu":
        limit_memory()
    experiment = experiment_class(args, device)
    experiment.check_stored(stored)
    experiment.load(directory)
    print(f"model        {directory}, training seed {args.seed}, evaluation seed {seed}")
    print_description(experiment)
    with staged(directory) as folder:
        timing = write_evaluation(experiment, directory, folder, seed)
        store.keep_results(directory, folder, stored.get("eval_seed"), seed)
        files = {**stored.get("files", {}), **digests(folder)}
        flags = {name: getattr(args, name) for name in parser.names("again")}
        write_json(directory / "args.json", {**stored, **flags, "eval_seed": seed, **timing, "files": files, "finished": True})
    (directory / store.CHECKPOINT_BEFORE).unlink(missing_ok=True)
    return 0


def export_model(experiment_class, args, directory):
    """--export-official: weights and args.json of a trained model in the folder that it names, as running/official.py says.

    Raises InputError if that holds files, and for a model that the code behind the paper's figures could not evaluate.
    """
    target = Path(args.export_official)
    args, _ = store.trained_args(directory, experiment_class)
    flags = official_args(args, experiment_class.parser())
    states = {file: store.read_weights(directory / file) for file in experiment_class.weight_files}
    flags["encoding_size"] = store.encoding_size(states[experiment_class.weight_files[-1]])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; name a folder that does not")
    target.mkdir(parents=True, exist_ok=True)
    for file, state in states.items():
        store.save_torch(official_names(Path(file).stem, state), target / file)
    write_json(target / "args.json", flags)
    print(f"{target}: {directory} as the code behind the paper's figures reads it")
    return 0


def print_description(experiment):
    """Say what is trained or evaluated, and where."""
    precision, device = experiment.args.precision, experiment.device
    precision = "fp32" if precision == "tf32" and device.type == "cpu" else precision
    lines = experiment.describe() | {"device": f"{describe_device(device)}, {precision}"}
    print("\n".join(f"{name:12} {line}" for name, line in lines.items()), flush=True)


def write_evaluation(experiment, directory, folder, seed):
    """Evaluate the model in `directory`, write results.csv and .png into `folder`, print both; returns the duration as a dict.

    Raises InputError if the encodings are of no use, and if they take more memory than there is: the model lies in the directory
    by then.
    """
    started = time.perf_counter()
    try:
        results = experiment.evaluate(seed)
        evaluated = dict(experiment.evaluated)  # what the references leave alone
        h_x, h_t, *_ = evaluated["test"].values()
        place = geometry(h_x, h_t, experiment.similarity)
        references = reference_scores(experiment, seed)
    except (ValueError, torch.linalg.LinAlgError) as error:  # weights that are not finite, or make encodings explode
        raise InputError(f"the encodings of {directory} cannot be evaluated: {error}; train it anew") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(_with_less_to_evaluate(experiment, directory, seed)) from None
    write_csv(experiment.table(results), folder / "results.csv")
    write_csv(pd.DataFrame([place]), folder / "geometry.csv")
    if experiment.args.save_encodings:
        write_encodings(folder / "encodings.npz", evaluated, seed)
        print(f"encodings    {directory / 'encodings.npz'}")
    if references:
        tables = {name: experiment.table(scores) for name, scores in references.items()}
        write_csv(pd.concat(tables, names=["reference", ""]).reset_index("reference"), folder / "references.csv")
    experiment.show(results, folder / "results.png", references)
    print(f"picture      {directory / 'results.png'}", flush=True)
    return {"eval_seconds": round(time.perf_counter() - started, 1)}


def write_encodings(path, evaluated, seed):
    """Write what was evaluated as an npz: each name of `evaluated` → (N, …), of the samples that fit the probes, then of those
    that test them; is_test (N,), and the evaluation's seed.

    evaluated: dict "fit", "test" → dict name → (n, …) tensor.
    """
    fit, test = evaluated["fit"], evaluated["test"]
    arrays = {name: torch.cat((fit[name], test[name])).cpu().numpy() for name in fit}
    fitted, tested = (len(next(iter(part.values()))) for part in (fit, test))
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, is_test=np.arange(fitted + tested) >= fitted, seed=seed)


def reference_scores(experiment, seed):
    """What scores could have been: dict "floor" → DataFrame as of `evaluate`, with --floor, "ceiling" → one, if there is one."""
    references = {}
    if experiment.args.floor:
        with ranks.alone(), untrained(experiment):
            references["floor"] = experiment.evaluate(seed)
    return references | ({} if experiment.ceiling is None else {"ceiling": experiment.ceiling})


@contextlib.contextmanager
def untrained(experiment):
    """Context in which the encoders are drawn from the training seed, and not trained."""
    trained = {name: copy.deepcopy(module.state_dict()) for name, module in experiment.modules.items()}
    for module in experiment.modules.values():
        for layer in module.modules():
            if hasattr(layer, "reset_running_stats"):
                layer.reset_running_stats()
    try:
        experiment.draw_encoders()
        yield
    finally:
        for name, state in trained.items():
            experiment.modules[name].load_state_dict(state)


def _with_less_to_evaluate(experiment, directory, seed):
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
        f"{directory}: evaluate it with {place_of(args)} {again} and "
        f"{' or '.join(ways) or 'more memory'}"
    )


def names_of(factors):
    """Set of factors in words, e.g. {s_0, s_2}."""
    return "{" + ", ".join(factors) + "}" if factors else "∅"
