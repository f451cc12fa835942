"""Models of the code behind the paper's figures, https://github.com/YichaoCai1/crossmodal_misalignment.

The files of a model directory are the same. What differs is how weights are called, and that args.json names no flag that only
this repository has.

    file              here               there
    g_x.pt, g_t.pt    layers.1.weight    2.weight              the mixing networks: linear and LeakyReLU layers by turns
    f_x.pt, f_t.pt    2.weight           2.weight
    encoder_img.pt    resnet.…           module.0.…            `module.` is DataParallel's, which is read with it and without
                      linear.…           module.2.…
    encoder_txt.pt    convolutions.…     module.convnet.…
                      embedding.…        module.embedding.…    and linear.… likewise
"""

from running.command_line import InputError

WRAPPER = "module."
BEGINNINGS = {"encoder_img": [("resnet.", "0."), ("linear.", "2.")], "encoder_txt": [("convolutions.", "convnet.")]}
OURS = ("protocol", "recipe", "loss", "latents", "omission_prob", "supervised")  # set by no recipe, unknown there


def own_names(network, state):
    """The state_dict of a network (g_x, encoder_img, …) under our names, whichever it has."""
    state = {name.removeprefix(WRAPPER): weight for name, weight in state.items()}
    return _renamed(state, [(theirs, ours) for ours, theirs in _beginnings(network, state)])


def official_names(network, state):
    """The state_dict of a network, which has our names, under theirs."""
    renamed = _renamed(state, _beginnings(network, state))
    return {(WRAPPER if network in BEGINNINGS else "") + name: weight for name, weight in renamed.items()}


def _beginnings(network, state):
    """List of (our, their) beginning of the names of a network's weights, of those that differ."""
    if network in ("g_x", "g_t"):  # a weight a layer
        return [(f"layers.{i}.", f"{2 * i}.") for i in range(len(state))]
    return BEGINNINGS.get(network, [])


def _renamed(state, beginnings):
    def rename(name):
        return next((new + name.removeprefix(old) for old, new in beginnings if name.startswith(old)), name)

    return {rename(name): weight for name, weight in state.items()}


def is_official(stored):
    """Whether the dict of an args.json is theirs: ours say from the first moment on whether the run is finished."""
    return not {"recipe", "finished"} & stored.keys()


def shared_names(parser):
    """Set of the flags in args.json of either: the seed and the setting."""
    own = {*OURS, *parser.recipes["paper"], *parser.freely, *parser.names("again")}
    return set(vars(parser.parse([])[0])) - own


def completed(stored, parser):
    """Their args.json, a dict, with the flags that only we have, as they trained: by the protocol "code" and the recipe "paper".

    Raises InputError for dependent latents: their seed draws covariances otherwise, and nothing else says which they were.
    """
    if stored.get("causal_dependence"):
        raise InputError(
            "a model of dependent latents that the code behind the paper's figures trained: its seed draws other covariances "
            "there, so that it cannot be evaluated here; train it anew"
        )
    defaults, _ = parser.parse([])
    own = {*OURS, *parser.recipes[defaults.recipe], *parser.names("again")}
    return {name: value for name, value in vars(defaults).items() if name in own} | stored


def official_args(args, parser):
    """Dict of args.json as theirs, of the Namespace of a trained model; InputError for what their code cannot evaluate."""
    if args.protocol != "code" or getattr(args, "causal_dependence", False):
        raise InputError(
            "the code behind the paper's figures knows neither --protocol paper nor the covariances that a seed draws here "
            "for --causal-dependence: it could not evaluate this model"
        )
    if (latents := getattr(args, "latents", "gaussian")) != "gaussian":
        raise InputError(f"the code behind the paper's figures samples no {latents} latents: it could not evaluate this model")
    if getattr(args, "omission_prob", 0):
        raise InputError("the code behind the paper's figures knows no --omission-prob: it could not evaluate this model")
    if getattr(args, "hidden_sizes", "paper") != "paper":
        built = "the code behind the paper's figures builds no encoders with"
        raise InputError(f"{built} --hidden-sizes {args.hidden_sizes}: it could not evaluate this model")
    own = {*OURS, *parser.freely, *parser.recipes["paper"]} - {"lr", "batch_size", "train_steps"}
    return {name: value for name, value in vars(args).items() if name not in own}
