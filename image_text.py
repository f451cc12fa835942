"""What the experiments on image–text pairs share: an image encoder and a text encoder, trained, probed and shown.

A script names its data set, sizes, columns and recipes in a subclass of ImageTextExperiment.
"""

import contextlib
import types
from pathlib import Path

import pandas as pd
import torch

import probes
from datasets import EpochOrder
from encoders import ImageEncoder, TextEncoder, initialise_all
from latent_spaces import seeded_generator
from losses import LabelLoss, LearnedLogits, image_text_contrastive_loss
from running.command_line import InputError, integer, number
from running.directory import save_weights, stored_args
from running.experiment import Experiment, names_of
from running.files import read_csv
from running.ranks import Share, summed
from running.schedules import FIRST_BATCHES_UNTIL, SPARE_UNTIL, batch_size, temperature, visible_dimensions
from running.staging import digest, recorded

NEGATIVES = {"code": "both", "paper": "cross"}  # of the loss, by protocol
PROBE_STEPS = {"code": None, "paper": 10_000}  # of the MLP probes; None: until their loss stalls
ENCODE_BATCH = 1024  # images or captions encoded at once where batch normalisation does not tell how many
WHITENING_FLOOR = 1e-4  # of variances, in units of the largest
MONITOR_PAIRS = 512  # pairs behind the scores of the progress lines to fit, and as many to test
MODALITIES = ("image", "text")
SCORES = ("r2_linreg", "r2_krreg", "mcc_logreg", "mcc_mlp")  # linear and nonlinear R², linear and nonlinear MCC


class ImageTextExperiment(Experiment):
    """One model: a ResNet-18 and a text CNN on pairs of one setting.

    A subclass has, beside what every Experiment has: bias_types, bias_ids of the settings, smallest (in words, the encoding
    that is taken for --encoding-size 0), datapath, bias_help, mean and std of the pixels' channels, perturbing (in words, how
    captions err, {:.0%} their share), own_text_factors (whether text encodings are probed for what captions state, not for
    what images show), columns (pairs of a column of results.csv and one of `evaluate`), spelling (dict factor → its name
    there), and bias(bias_type, bias_id), the Bias of a setting; default_encoding_size(unbiased), dimensions for that number of
    semantics; factors(bias, modality), what encodings are probed for; open(folder, bias_type, bias_id, device, workers), the
    (ImageTextPairs, Bias) of a folder.
    """

    weight_files = ("encoder_img.pt", "encoder_txt.pt")
    spelling = types.MappingProxyType({})
    columns = tuple((name, name) for name in ("ix", "modality", "factor_name", "factor_type", *SCORES))

    @classmethod
    def add_flags(cls, parser):
        """What --recipe sets beside the shared flags, the data, and the setting."""
        flag = parser.flag
        parser.section("checkpoints and data")
        flag("--checkpoint-steps", integer(1, 10**12), "steps between two savings of the encoders alone", 10_000, "freely")
        flag("--save-all-checkpoints", bool, "keep each of them, as encoder_img_STEP.pt and encoder_txt_STEP.pt", None,
             "freely")  # fmt: skip
        flag("--datapath", str, "folder of the data set", cls.datapath, "again")
        flag("--ceiling", str, "a model of --supervised: its scores come into references.csv, and small into the picture; none "
             "given: no ceiling", "", "freely")  # fmt: skip
        flag("--workers", integer(0, 1000), "threads that read each batch from disk, for a slow disk; 0 = the training's own", 0,
             "freely")  # fmt: skip
        parser.section("encoders and loss")
        flag("--encoding-size", integer(0), f"dimensions D of the encodings, 0 = {cls.smallest}", 0)
        flag("--hidden-size", integer(1), "outputs of the ResNet-18", 100)
        flag("--tau", number(0, above=True), "temperature", 1.0)
        flag("--first-tau", number(0), "temperature of the first steps, from which it goes in a straight line to --tau, that "
             "of the last; 0 = --tau always")  # fmt: skip
        flag("--first-batch-size", integer(2, 10**7, or_zero=True), "pairs in a batch in the first "
             f"{100 * FIRST_BATCHES_UNTIL:g} %% of the steps, while the temperature is the first; 0 = --batch-size "
             "always")  # fmt: skip
        flag("--text-lr-factor", number(0, above=True), "learning rate of the text encoder, in units of the image encoder's")
        flag("--spare-dimensions", integer(0), "extra dimensions of the encodings in the first "
             f"{100 * SPARE_UNTIL:g} %% of the steps")  # fmt: skip
        flag("--whitening-pairs", integer(2, or_zero=True), "set the last layers, before training, so that the encodings of "
             "that many pairs have mean 0 and covariance I in either modality; 0 = leave them as drawn")  # fmt: skip
        flag("--norm-penalty", number(0), "weight in the loss of the relative variance of the encodings' lengths, which the "
             "cosine does not see: it grows in a straight line from 0 to this")  # fmt: skip
        flag("--supervised", bool, "train on the factors' labels, not by contrast; --encoding-size 0 is --hidden-size then")
        parser.section("setting: what the caption says of the image")
        flag("--bias-type", cls.bias_types, "captions leave factors out, or state them wrongly", cls.bias_types[0])
        flag("--bias-id", int, cls.bias_help, cls.bias_ids[-1])

    @classmethod
    def default_id(cls, args):
        """mpi3d_selection_0 and the like."""
        return f"{cls.name}_{args.bias_type}_{args.bias_id}" + ("_supervised" if args.supervised else "")

    @classmethod
    def settle(cls, args):
        """Check the number of the setting."""
        ids = cls.bias_ids
        if args.bias_id not in ids:
            raise InputError(f"--bias-id {args.bias_id} is out of range: settings are {ids[0]} … {ids[-1]}")
        if args.supervised and args.loss != "infonce":
            raise InputError(f"--supervised has a loss of its own; leave out --loss {args.loss}")

    @classmethod
    def result_rows(cls, args):
        """Every factor that the encodings of either modality are probed for."""
        bias = cls.bias(args.bias_type, args.bias_id)
        column = next(name for name, own in cls.columns if own == "factor_name")
        return [{"modality": modality, column: name} for modality in MODALITIES for name in cls.factors(bias, modality)]

    def __init__(self, args, device):
        """Open the pairs, and build both encoders, their weights not set."""
        self.args, self.device = args, device
        self.pairs, self.setting = self.open(args.datapath, args.bias_type, args.bias_id, device, args.workers)
        self._check_counts()
        self.ceiling = self.read_ceiling(Path(args.ceiling)) if args.ceiling else None
        default_size = args.hidden_size if args.supervised else self.default_encoding_size(len(self.setting.unbiased))
        self.encoding_size = args.encoding_size or default_size
        self.width = self.encoding_size + (0 if args.evaluate or args.supervised else args.spare_dimensions)
        self.modules = self._encoders(self.width)
        self.objective = LearnedLogits(self.similarity, args.batch_size).to(device) if args.loss == "sigmoid" else None
        if args.supervised:
            self.labels = {name: {factor: values.to(self.pairs.images.index_device) for factor, values in labels.items()}
                           for name, labels in self.labels_of("train").items()}  # fmt: skip
            heads = {name: LabelLoss(self.encoding_size, labels) for name, labels in self.labels.items()}
            self.objective = torch.nn.ModuleDict(heads).to(device)
        self.rates, self.keep_steps = {"encoder_txt": args.text_lr_factor}, args.checkpoint_steps
        generator = seeded_generator(args.seed, "order")
        pairs, index_device = len(self.pairs.splits["train"]), self.pairs.images.index_device
        self.order = EpochOrder(pairs, generator, index_device, pinned=device.type == "cuda")
        self.generators, self.evaluated = {"order": self.order}, {}

    def labels_of(self, split):
        """Dict image, text → dict factor → (N,) values of a split that encodings of that modality are probed for."""
        own = self.pairs.splits[split]
        return {"image": own.image_factors, "text": own.text_factors if self.own_text_factors else own.image_factors}

    def _encoders(self, width):
        image = ImageEncoder(width, self.mean, self.std, self.args.hidden_size)
        return {"encoder_img": image.to(self.device), "encoder_txt": self._text_encoder(width)}

    def _text_encoder(self, width):
        args, pairs = self.args, self.pairs
        try:
            return TextEncoder(len(pairs.vocabulary), pairs.length, width).to(self.device)
        except ValueError as error:
            setting = f"{args.bias_type} {args.bias_id}"
            raise InputError(f"{args.datapath}, {setting}: {error}; shorten or lengthen them in their files") from None

    def _check_counts(self):
        args, available = self.args, len(self.pairs.splits["train"])
        sizes = {flag: getattr(args, flag) for flag in ("batch_size", "first_batch_size", "final_batch_size")}
        largest = max(sizes, key=sizes.get)
        if not args.evaluate and sizes[largest] > available:
            raise InputError(
                f"a batch of {sizes[largest]} pairs, and {args.datapath} has {available} to train with; lower "
                f"--{largest.replace('_', '-')}"
            )
        fit, test = (len(rows) for _, rows in self.probe_parts())
        if min(fit, test) < 2:
            raise InputError(
                f"{args.datapath} has {fit} pairs to fit the probes and {test} to test them, expected at least 2 of each"
            )

    def details(self):
        """The fingerprint of the pairs, and the protocols that they were made by, where that is told."""
        made_by = {"made_by": self.pairs.made_by} if self.pairs.made_by else {}
        return {**super().details(), "data": self.pairs.fingerprint, **made_by}

    def identity(self):
        """Dict of the flags that say which run this is, and the fingerprint of its pairs, wherever they lie."""
        return super().identity() | {"data": self.pairs.fingerprint}

    def check_stored(self, stored):
        """Raise InputError if the run was trained on other pairs than those of --datapath.

        A run of an earlier version, which knew the words of the training captions alone, goes on with these.
        """
        if stored.get("data") in (None, self.pairs.fingerprint):
            return
        self.pairs = self.pairs.with_training_words()
        self.modules["encoder_txt"] = self._text_encoder(self.width)
        if stored["data"] != self.pairs.fingerprint:
            directory = Path(self.args.model_dir) / self.args.model_id
            raise InputError(
                f"{self.args.datapath} does not hold the images, captions and order that {directory} was trained with; name "
                "its data set with --datapath, or make it again with its seed"
            )

    def draw_encoders(self):
        """Both encoders' weights, and with --whitening-pairs their last layers; --evaluate draws the spare dimensions as well."""
        args, pairs, generator = self.args, self.pairs, seeded_generator(self.args.seed, "init")
        width = self.encoding_size + (0 if args.supervised else args.spare_dimensions)
        drawn = self.modules if width == self.width else self._encoders(width)
        initialise_all(drawn.values(), args.init, generator, self.device)
        if args.whitening_pairs:
            rows = torch.randperm(len(pairs.splits["train"]), generator=generator)[: args.whitening_pairs]
            rows = rows.to(pairs.images.index_device)
            whiten(drawn["encoder_img"], pairs.images_of("train", rows))
            whiten(drawn["encoder_txt"], pairs.tokens_of("train", rows))
        if drawn is not self.modules:
            for name, encoder in drawn.items():
                self.modules[name].load_state_dict(self._without_spare(encoder.state_dict()))

    def _without_spare(self, state):
        return state | {name: state[name][: self.encoding_size].clone() for name in ("linear.weight", "linear.bias")}

    def weights(self):
        """State_dicts of both encoders, their last layers without spare dimensions."""
        return {name: self._without_spare(state) for name, state in super().weights().items()}

    def keep(self, directory, step):
        """Write both encoders, and with --save-all-checkpoints once more under the number of the step."""
        for suffix in ("", f"_{step}") if self.args.save_all_checkpoints else ("",):
            for name, state in self.weights().items():
                save_weights(state, directory / f"{name}{suffix}.pt")

    def loss(self, share_done):
        """Contrastive loss of the next batch by the cosine, and the penalty of lengths, which the cosine does not see."""
        args, pairs, share = self.args, self.pairs, Share(batch_size(self.args, share_done))
        rows = share.rows(self.order.next(share.total))
        visible = visible_dimensions(args, self.encoding_size, share_done)
        with self.encoder_precision():
            h_x = self.modules["encoder_img"](pairs.images_of("train", rows))[:, :visible]
            h_t = self.modules["encoder_txt"](pairs.tokens_of("train", rows))[:, :visible]
        if args.supervised:
            labels = {name: {factor: values[rows].to(self.device) for factor, values in part.items()}
                      for name, part in self.labels.items()}  # fmt: skip
            return sum(self.objective[name](h, labels[name], share.total) for name, h in (("image", h_x), ("text", h_t)))
        if self.objective:
            loss = self.objective(h_x, h_t, share)
        else:
            loss = image_text_contrastive_loss(h_x, h_t, temperature(args, share_done), NEGATIVES[args.protocol], share)
        if args.norm_penalty:
            variances = length_variance(h_x, share.total) + length_variance(h_t, share.total)
            loss = loss + share_done * args.norm_penalty * variances
        return loss

    def monitor(self):
        """Linear scores of every factor, on a few pairs."""
        columns, texts = {}, []
        for encodings, fit_targets, test_targets in self.probe_data(MONITOR_PAIRS).values():
            for modality, (fit_h, test_h) in encodings.items():
                scores = linear_scores(fit_h, fit_targets, test_h, test_targets)
                columns |= {f"{modality}_{name}": score for name, score in scores.items()}
                texts.append(f"linear {modality} " + " ".join(f"{max(score, 0):.2f}" for score in scores.values()))
        return columns, "  ".join(texts)

    def probe_parts(self):
        """((split, rows), (split, rows)): the pairs that fit the probes, and those that test them.

        The split "fit" fits where there is one; else the first half of "test", in file order, fits and the second half tests.
        """
        splits = self.pairs.splits
        test = torch.arange(len(splits["test"]))
        if "fit" in splits:
            return ("fit", torch.arange(len(splits["fit"]))), ("test", test)
        return ("test", test[: len(test) // 2]), ("test", test[len(test) // 2 :])

    @torch.no_grad()
    def encode(self, split, rows):
        """Dict image, text → (len(rows), D) float32 encodings of pairs of a split.

        Protocol "code": the rows, in order, in batches of --batch-size, of which each is normalised by its own statistics, as
        in the runs, which never left the training mode; "paper": all are normalised by the running statistics.
        """
        pairs, size, by_batch = self.pairs, self.args.batch_size, self.args.protocol == "code"
        image, text = self.modules["encoder_img"], self.modules["encoder_txt"]
        with evaluation_mode((image, text), by_batch):
            if by_batch:
                h_x = encoded_by_batch(lambda part: image(pairs.images_of(split, part)), rows, size)
                h_t = encoded_by_batch(lambda part: text(pairs.tokens_of(split, part)), rows, size)
            else:
                h_x = pairs.encode_images(split, rows, image, ENCODE_BATCH)
                h_t = pairs.encode_captions(split, rows, text, ENCODE_BATCH)
        return {"image": h_x[:, : self.encoding_size], "text": h_t[:, : self.encoding_size]}

    def probe_data(self, count=None):
        """Dict of modalities that share their factors → (encodings, fit_targets, test_targets).

        Keys are tuples of modalities; encodings: dict modality → (fit_h, test_h), standardised; targets: dict factor → (N,),
        classes in int64 or numbers in float64. `count` pairs to fit and to test, or all.
        """
        parts = [(split, rows[:count]) for split, rows in self.probe_parts()]
        fit, test = (self.encode(split, rows) for split, rows in parts)
        encodings = {name: probes.standardise(fit[name], test[name]) for name in fit}
        device = encodings["image"][0].device

        def targets(kind):
            factors = [(getattr(self.pairs.splits[split], kind), rows) for split, rows in parts]
            return [{name: values[rows].to(device) for name, values in part.items()} for part, rows in factors]

        if self.own_text_factors:
            of_each = {name: targets(f"{name}_factors") for name in ("image", "text")}
            data = {(name,): ({name: encodings[name]}, *both) for name, both in of_each.items()}
        else:
            of_each = {"": targets("image_factors")}
            data = {("image", "text"): (encodings, *of_each[""])}
        for part, h, place in (("fit", fit, 0), ("test", test, 1)):
            factors = {f"{name}_{factor}".strip("_"): values
                       for name, both in of_each.items() for factor, values in both[place].items()}  # fmt: skip
            self.evaluated[part] = {"h_image": h["image"], "h_text": h["text"]} | factors
        return data

    def evaluate(self, seed):
        """DataFrame of the scores of every factor: ix, modality, factor_name, factor_type, SCORES, NaN where none applies."""
        generator, rows, steps = seeded_generator(seed, "probe"), [], PROBE_STEPS[self.args.protocol]
        for encodings, fit_targets, test_targets in self.probe_data().values():
            nonlinear = nonlinear_scores(encodings, fit_targets, test_targets, generator, steps)
            for modality, (fit_h, test_h) in encodings.items():
                linear = linear_scores(fit_h, fit_targets, test_h, test_targets)
                for ix, (name, values) in enumerate(fit_targets.items()):
                    kind = "continuous" if values.is_floating_point() else "discrete"
                    columns = SCORES[:2] if kind == "continuous" else SCORES[2:]
                    scores = zip(columns, (linear[name], nonlinear[modality, name]), strict=True)
                    row = {"ix": ix, "modality": modality, "factor_name": name, "factor_type": kind}
                    rows.append(row | dict(scores))
        return pd.DataFrame(rows, columns=["ix", "modality", "factor_name", "factor_type", *SCORES])

    def table(self, results):
        """The columns of results.csv under their names there."""
        names, own = map(list, zip(*self.columns, strict=True))
        return results[own].set_axis(names, axis=1).replace(self.spelling)

    def read_ceiling(self, folder):
        """DataFrame as of `evaluate` from results.csv of a finished model of --supervised; InputError if it is none."""
        stored = stored_args(folder)
        if not (stored.get("supervised") and stored.get("finished")):
            raise InputError(f"{folder} is no finished model of --supervised; train one, or leave out --ceiling")
        path = folder / "results.csv"
        table = read_csv(path, [name for name, _ in self.columns], gaps=True, ended=True)
        if recorded(folder, "files").get(path.name) != digest(path):
            raise InputError(f"{path} is damaged: its evaluation wrote another; evaluate {folder} again, or leave out --ceiling")
        table = table.rename(columns=dict(self.columns)).replace({theirs: own for own, theirs in self.spelling.items()})
        return table.assign(ix=table.groupby("modality").cumcount())

    def describe(self):
        """What captions leave out, what they state wrongly, what should be learned, and how."""
        args, pairs, bias = self.args, self.pairs, self.setting
        parameters = sum(parameter.numel() for module in self.modules.values() for parameter in module.parameters())
        train = pairs.splits["train"]
        train_count = len(train)
        shown, told = train.image_factors, train.text_factors
        wrong = [] if self.own_text_factors else [shown[name] != told[name] for name in bias.perturbed]
        perturbing = self.perturbing.format(torch.cat(wrong).double().mean().item() if wrong else 0)
        test_count = sum(map(len, pairs.splits.values())) - train_count
        left_out = [name for name in train.image_factors if name not in bias.selected]
        height, width = pairs.images.array.shape[1:3]
        others = "".join(f"; {what} made with --protocol {name}" for what, name in pairs.made_by.items() if name != args.protocol)
        sizes = (args.first_batch_size, args.batch_size, args.final_batch_size)
        spare = f" and {args.spare_dimensions} dimensions at first" if self.width > self.encoding_size else ""
        at_random = f", and {bias.omitted:.1%} of I_θ at random" if bias.omitted else ""
        loss = f"negatives of {NEGATIVES[args.protocol]} modalities"
        if self.objective:
            loss = "labels of all factors" if args.supervised else f"{args.loss} loss"
        return {
            "data": f"{args.datapath}: {train_count} pairs to train, {test_count} to evaluate; images of {height} × {width}, "
            f"captions of {pairs.length} tokens, {len(pairs.vocabulary)} words{others}",
            "selected": f"I_θ = {names_of(bias.selected)}; captions leave out {names_of(left_out)}{at_random}",
            "perturbed": f"I_ρ = {names_of(bias.perturbed)}" + (f", {perturbing}" if bias.perturbed else ""),
            "unbiased": f"I_θ \\ I_ρ = {names_of(bias.unbiased)}: what the theory says is learned",
            "encoders": f"ResNet-18 and text CNN → R^{self.encoding_size}{spare}, {parameters:,} parameters",
            "training": f"{args.recipe} recipe: {args.train_steps} steps of {' to '.join(str(n) for n in sizes if n)} pairs, "
            f"lr {args.lr:g} {args.lr_schedule}, {args.init} initialisation, {loss} ({args.protocol} protocol)",
        }


@torch.no_grad()
def whiten(encoder, inputs):
    """Set the last layer so that the encodings of a batch have mean 0 and covariance I, in place.

    Directions that hardly vary are stretched by at most 100 times more than the widest.
    """
    encodings = encoder(inputs).double()
    covariance = torch.cov(encodings.T, correction=0).reshape(encodings.shape[1], -1)
    variances, directions = torch.linalg.eigh(covariance)
    if variances.max() <= 1e-10 * encodings.square().mean():  # a single pair, or captions that are all the same
        return
    scales = variances.clamp_min(WHITENING_FLOOR * variances.max()).rsqrt()
    transform = directions * scales @ directions.T
    layer = encoder.linear
    layer.bias.copy_(transform @ (layer.bias.double() - encodings.mean(dim=0)))
    layer.weight.copy_(transform @ layer.weight.double())


@contextlib.contextmanager
def evaluation_mode(encoders, batch_statistics):
    """Context in which batch normalisation takes its running statistics, or those of each batch, and changes neither."""
    training = [encoder.training for encoder in encoders]
    layers = [layer for encoder in encoders for layer in encoder.modules() if hasattr(layer, "running_mean")]
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    for encoder in encoders:
        encoder.eval()
    if batch_statistics:  # which a layer that has no others takes, in either mode
        for layer in layers:
            layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, running, strict=True):
            layer.running_mean, layer.running_var = mean, variance
        for encoder, mode in zip(encoders, training, strict=True):
            encoder.train(mode)


def encoded_by_batch(encode, rows, size):
    """(len(rows), D): what `encode` makes of the rows (N,), in order, `size` at a time.

    An incomplete last batch is filled up with the rows before it, which are encoded once more for its statistics alone.
    """
    parts = []
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        parts.append(encode(rows[max(stop - size, 0) : stop])[start - stop :])
    return torch.cat(parts)


def length_variance(h, total):
    """Variance of the lengths of encodings in units of their squared mean, a constant; a scalar tensor.

    h: (B, D), those of this process, of a batch of `total`; the variance is their part of it.
    """
    lengths = h.float().norm(dim=1)
    mean = summed(lengths.detach().sum()) / total
    return (lengths / mean - 1).square().sum() / total


def by_type(targets):
    """(continuous, discrete): the targets that are numbers, and those that are classes."""
    continuous = {name: values for name, values in targets.items() if values.is_floating_point()}
    return continuous, {name: values for name, values in targets.items() if name not in continuous}


def linear_scores(fit_h, fit_targets, test_h, test_targets):
    """Dict factor → R² of linear regression where it is continuous, MCC of logistic regression where it is discrete."""
    (numbers, classes), scores = by_type(fit_targets), {}
    if numbers:
        scores |= probes.linear_r2(fit_h, numbers, test_h, test_targets)
    if classes:
        scores |= probes.logistic_mcc(fit_h, classes, test_h, test_targets)
    return {name: scores[name] for name in fit_targets}


def nonlinear_scores(encodings, fit_targets, test_targets, generator, steps):
    """Dict (modality, factor) → R² or MCC of MLPs with one hidden layer, as `linear_scores`."""
    (numbers, classes), scores = by_type(fit_targets), {}
    if numbers:
        scores |= probes.mlp_r2(encodings, numbers, test_targets, generator, steps)
    if classes:
        scores |= probes.mlp_mcc(encodings, classes, test_targets, generator, steps)
    return scores
